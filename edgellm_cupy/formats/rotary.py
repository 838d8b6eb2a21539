"""The rotary embedding (Su et al. 2021, arXiv:2104.09864) with the scalings that stretch it to longer contexts.

Half against half, as Hugging Face does it: features i and i + D / 2 of a head turn by the angle of frequency i.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from ..errors import ArgumentValueError

KINDS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """One of the variants that Hugging Face's `rope_scaling` describes, by its names.

    Attributes:
        kind: ``"linear"`` (Chen et al. 2023, arXiv:2306.15595), ``"dynamic"`` (NTK-aware, by the length so far),
            ``"yarn"`` (Peng et al. 2023, arXiv:2309.00071), ``"llama3"`` (Llama 3.1) or ``"longrope"``
            (Ding et al. 2024, arXiv:2402.13753).
        factor: by how much the context was stretched; for yarn and longrope 1 means `max_context / original_context`.
        original_context: tokens that the unscaled embedding was trained for; needed by all but linear.
        low_freq_factor, high_freq_factor: llama3.
        beta_fast, beta_slow, mscale, mscale_all_dim, truncate: yarn.
        attention_factor: what cosine and sine are multiplied by (yarn, longrope); 0: the variant's own formula.
        short_factor, long_factor: longrope, one a frequency.
    """

    kind: str
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentValueError(f"rope_scaling.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "float" and not (_is_number(value) and 0 <= value < math.inf):
                raise ArgumentValueError(f"rope_scaling.{f.name} is {value!r}, expected a finite number >= 0")
            if f.type == "bool" and not isinstance(value, bool):
                raise ArgumentValueError(f"rope_scaling.{f.name} is {value!r}, expected true or false")
            if f.type == "tuple[float, ...]" and not (
                isinstance(value, tuple) and all(_is_number(v) and 0 < v < math.inf for v in value)
            ):
                raise ArgumentValueError(f"rope_scaling.{f.name} is {value!r:.80}, expected finite numbers above 0")
        if not self.factor > 0:
            raise ArgumentValueError(f"rope_scaling.factor is {self.factor}, expected above 0")
        context = self.original_context
        if self.kind != "linear" and not (isinstance(context, int) and not isinstance(context, bool) and context >= 1):
            raise ArgumentValueError(
                f"rope_scaling.original_context is {context!r}, expected at least 1 for {self.kind}"
            )
        if self.kind == "dynamic" and self.factor < 1:
            raise ArgumentValueError(f"rope_scaling.factor is {self.factor}, expected at least 1 for dynamic")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ArgumentValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor}, expected below high_freq_factor = "
                f"{self.high_freq_factor}"
            )
        if self.kind == "yarn" and not 0 < self.beta_slow <= self.beta_fast:
            raise ArgumentValueError(
                f"rope_scaling.beta_slow is {self.beta_slow}, expected above 0 and at most beta_fast = {self.beta_fast}"
            )

    @classmethod
    def from_dict(cls, values: Any) -> RopeScaling:
        """From a dictionary with the attributes as keys (see :meth:`to_dict`).

        Raises:
            ArgumentValueError: not such a dictionary.
        """
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or "kind" not in values or set(values) - known:
            raise ArgumentValueError(
                f"rope_scaling is {values!r:.80}, expected an object with {', '.join(sorted(known))}"
            )
        # JSON has lists where this class has tuples.
        arguments: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_table(
    head_dim: int, theta: float, scaling: RopeScaling | None, max_len: int, max_context: int
) -> np.ndarray:
    """float32 [max_len, head_dim / 2, 2]: cosine and sine of each angle (float64), times the attention factor.

    A key is rotated once, when its position is appended, so the table must not change while a cache fills. Two variants
    depend on the length, and Hugging Face recomputes their frequencies in each forward pass, for all positions of that
    pass; the keys of earlier passes stay as they are. Here:

    - dynamic: position p turns by the frequencies of a sequence that ends with it, p + 1 tokens long. That is what
      Hugging Face does token by token; one forward pass over a prompt longer than `original_context` differs, because
      there its first positions turn by the frequencies of its last one.
    - longrope: the long factors when `max_len` is beyond `original_context`, else the short ones, for all positions.
      A cache made for a long context uses the long factors from its first token on, where Hugging Face changes from
      short to long ones in mid-sequence.

    Args:
        max_context: of the model; yarn and longrope without a factor take it from there.

    Raises:
        ArgumentValueError: a scaling that does not fit head_dim or theta.
    """
    positions = np.arange(max_len, dtype=np.float64)[:, None]
    # [D / 2], or [max_len, D / 2] where they depend on the position
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    attention = 1.0
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "dynamic":
        frequencies = _dynamic(head_dim, theta, scaling, positions + 1)
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies, attention = _yarn(frequencies, head_dim, theta, scaling, max_context)
    else:
        frequencies, attention = _longrope(frequencies, scaling, max_len, max_context)
    angles = positions * frequencies
    return np.ascontiguousarray((np.stack([np.cos(angles), np.sin(angles)], axis=-1) * attention).astype(np.float32))


# ---- one variant each -----------------------------------------------------------------------------------------------


def _dynamic(head_dim: int, theta: float, scaling: RopeScaling, lengths: np.ndarray) -> np.ndarray:
    """A larger base for longer sequences: the lowest frequency falls by the stretch, the highest stays 1."""
    lengths = np.maximum(lengths, scaling.original_context)
    stretch = scaling.factor * lengths / scaling.original_context - (scaling.factor - 1)
    base = theta * stretch ** (head_dim / max(head_dim - 2, 1))
    return base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Features that turn often within the original context keep their frequency, those that turn rarely are slowed down
    by the factor, and those between are blended."""
    turns = scaling.original_context * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(frequencies, scaling.factor, np.clip(keep, 0, 1))


def _yarn(
    frequencies: np.ndarray, head_dim: int, theta: float, scaling: RopeScaling, max_context: int
) -> tuple[np.ndarray, float]:
    """The same idea, with a ramp that is linear in the index of the feature."""
    if not theta > 1:
        raise ArgumentValueError(f"rope_theta is {theta}, expected above 1 for yarn")
    factor = _stretch(scaling, max_context)

    def index(turns: float) -> float:
        """Of the (fractional) feature that turns so often within the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first if last != first else 0.001  # a step instead of a ramp
    slowed = np.clip((np.arange(head_dim // 2) - first) / width, 0, 1)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.attention_factor:
        attention = scaling.attention_factor
    elif scaling.mscale and scaling.mscale_all_dim:
        attention = temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    else:
        attention = temperature(1.0)
    return _blend(frequencies, factor, 1 - slowed), attention


def _longrope(
    frequencies: np.ndarray, scaling: RopeScaling, max_len: int, max_context: int
) -> tuple[np.ndarray, float]:
    """A factor of its own for each frequency, found by search."""
    name = "long_factor" if max_len > scaling.original_context else "short_factor"
    factors = np.array(getattr(scaling, name), np.float64)
    if factors.shape != frequencies.shape:
        raise ArgumentValueError(
            f"rope_scaling.{name} has {factors.size} numbers, expected head_dim / 2 = {frequencies.size}"
        )
    stretch = _stretch(scaling, max_context)
    attention = scaling.attention_factor
    if not attention:
        # With one token of original context there is nothing to stretch: log(1) would divide by zero.
        grown = stretch > 1 and scaling.original_context > 1
        attention = math.sqrt(1 + math.log(stretch) / math.log(scaling.original_context)) if grown else 1.0
    return frequencies / factors, attention


def _stretch(scaling: RopeScaling, max_context: int) -> float:
    return scaling.factor if scaling.factor != 1 else max_context / scaling.original_context


def _blend(frequencies: np.ndarray, factor: float, keep: np.ndarray) -> np.ndarray:
    """`keep` 1: the frequency itself; 0: slowed down by the factor."""
    return frequencies * keep + frequencies / factor * (1 - keep)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
