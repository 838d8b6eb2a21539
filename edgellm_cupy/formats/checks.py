"""What is checked of a checkpoint's values, whatever format they come from."""

from __future__ import annotations

import numpy as np

from . import packing
from .ternary import TernaryWeight

_BYTES_AT_ONCE = 1 << 24


def not_finite(values: np.ndarray) -> tuple[int, ...] | None:
    """Position of the first NaN or infinity of float [N] or [M, K], None without one. Takes the rows in pieces."""
    rows = max(1, _BYTES_AT_ONCE // max(1, values[:1].nbytes))
    for start in range(0, len(values), rows):
        with np.errstate(invalid="ignore"):  # ml_dtypes warns of the NaN that it is asked about
            bad = ~np.isfinite(values[start : start + rows])
        if bad.any():
            first, *rest = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            return start + first, *rest
    return None


def why_untrained(weight: TernaryWeight) -> str | None:
    """Why a host weight cannot come from training, None when it can.

    Public uploads exist whose matrices are all zero: zero weights, or zero bytes, which are -1 in some formats.
    """
    if not weight.scale.all():
        return "a scale is 0, which no trained model has"
    value = int(packing.unpack(weight.packed[:1, :1], 1, np)[0, 0])
    row = packing.pack(np.full((1, weight.shape[1]), value, np.int8), np)
    if bool((weight.packed == row).all()):
        return f"every weight is {value}, which no trained model has"
    return None
