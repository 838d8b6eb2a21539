"""Sampling: how the next token is chosen from the logits. The same on the GPU and in NumPy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import ArgumentTypeError, ArgumentValueError


@dataclass(frozen=True)
class Sampling:
    """Filters, applied in this order, as Hugging Face's generation does; the defaults are greedy decoding.

    Attributes:
        repetition_penalty: logits of tokens in the context are divided by it where positive, multiplied where negative
            (Keskar et al. 2019, arXiv:1909.05858); 1: none.
        temperature: logits are divided by it; 0: the largest logit, the lowest index among equals.
        top_k: only the k largest logits (the lowest indices among equals); 0: all.
        top_p: only the smallest set of the most probable tokens whose probabilities reach it (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751); 1: all.
        min_p: only tokens at least this fraction as probable as the most probable one (arXiv:2407.01082); 0: all.
        seed: of the random numbers, 0 to 2**64 - 1. They depend on seed, sequence and position alone, so the same call
            gives the same tokens.

    Raises:
        ArgumentTypeError, ArgumentValueError: a value of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name}: expected an integer, got {type(value).__name__}")
            object.__setattr__(self, name, int(value))  # NumPy's integers overflow
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.floating, np.integer)) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name}: expected a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ArgumentValueError(f"{name} is {value}, expected a finite number")
        for name, right, expected in (
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0, or 1e-4 to 1e4"),
            ("top_k", 0 <= self.top_k < 2**31, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, up to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "0.001 to 1000"),
            ("seed", 0 <= self.seed < 2**64, "0 to 2**64 - 1"),
        ):
            if not right:
                raise ArgumentValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def greedy(self) -> bool:
        """The next token is the largest logit, whatever was said before."""
        return self.temperature == 0 and self.repetition_penalty == 1
