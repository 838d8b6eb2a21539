"""Which array library an argument belongs to, without importing CuPy for somebody who never passes a CuPy array."""

from __future__ import annotations

from typing import Any

import numpy as np


def is_cupy(a: Any) -> bool:
    """True for a CuPy array."""
    return type(a).__module__.split(".")[0] == "cupy" and hasattr(a, "__cuda_array_interface__")


def namespace(a: Any) -> Any:
    """The module (`numpy` or `cupy`) that made the array `a`."""
    if is_cupy(a):
        import cupy

        return cupy
    return np
