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
        factor: of the context.
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
            if f.type == "float" and not (
                isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
            ):
                raise ArgumentValueError(f"rope_scaling.{f.name} is {value!r}, expected a finite number >= 0")
        if not self.factor > 0:
            raise ArgumentValueError(f"rope_scaling.factor is {self.factor}, expected above 0")
        if self.kind != "linear" and not (isinstance(self.original_context, int) and self.original_context >= 1):
            raise ArgumentValueError(
                f"rope_scaling.original_context is {self.original_context!r}, expected at least 1 for {self.kind}"
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
        lists = {name: tuple(values[name]) for name in ("short_factor", "long_factor") if name in values}
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_table(
    head_dim: int, theta: float, scaling: RopeScaling | None, max_len: int, max_context: int
) -> np.ndarray:
    """float32 [max_len, head_dim / 2, 2]: cosine and sine of each angle, from float64 angles, times the attention factor.

    Args:
        max_context: of the model; some variants take their factor from it.
    """
    if scaling is not None:
        raise NotImplementedError(scaling.kind)
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    angles = np.arange(max_len, dtype=np.float64)[:, None] * frequencies
    return np.ascontiguousarray(np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32))
