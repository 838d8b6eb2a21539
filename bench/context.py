"""Context: the workload, the backend and the places to report to, handed to every part of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import edgellm_cupy as ec

from ..formats.checkpoint import Checkpoint
from ..sampling import Sampling


class WrongResultError(ec.EdgeLLMError):
    """A kernel's result differs from the reference: its speed must not be reported. The command ends with 4."""


def _silent(message: str) -> None:
    """Progress of a run that nobody watches."""


@dataclass
class Context:
    """One run.

    Attributes:
        checkpoint: configuration and host weights of the workload.
        no_gpu: why there is no GPU to measure, in one line; None when `backend` is ``"cuda"``.
        quick: shorter windows and fewer samples, for a first look; reports say so.
        progress: called with a line for each step that begins.
        tokens: measure the table of shapes for these numbers of tokens (:mod:`.table`) in place of the workload's
            products; empty: the workload's.
        activation, dtype, head: of the decoder, as its constructor takes them.
        kv_dtype: of every cache, as its `new_cache` takes it.
        failures: one line for each kernel that failed its check against the reference.
    """

    checkpoint: Checkpoint
    no_gpu: str | None
    quick: bool = False
    progress: Callable[[str], None] = _silent
    tokens: tuple[int, ...] = ()
    activation: str = "int8"
    dtype: str = "auto"
    head: str = "auto"
    kv_dtype: str = "auto"
    failures: list[str] = field(default_factory=list)

    @property
    def backend(self) -> str:
        """``"cuda"`` or ``"numpy"``."""
        return "numpy" if self.no_gpu else "cuda"

    @property
    def config(self) -> ec.ModelConfig:
        return self.checkpoint.config

    @property
    def options(self) -> dict[str, str]:
        """For the constructor of a decoder."""
        return {"activation": self.activation, "dtype": self.dtype, "head": self.head}

    @cached_property
    def model(self) -> Any:
        """The workload's decoder on this run's backend, built once: every part measures the same model."""
        transformer = ec.reference.TernaryTransformer if self.no_gpu else ec.TernaryTransformer
        return transformer(self.checkpoint, **self.options)

    def new_cache(self, max_len: int, batch: int = 1, sampling: Sampling | None = None) -> Any:
        """A cache of :attr:`model`, of this run's dtype."""
        return self.model.new_cache(max_len, batch, self.kv_dtype, sampling)
