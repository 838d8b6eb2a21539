"""The operations in NumPy, computed in float64 and rounded once, to the result's dtype.

The functions in the second half (`normalise`, `quantise`, `product`) are the float64 steps themselves: tests compare
kernels with them before any rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arguments import check_rmsnorm, check_rmsnorm_ternary_matmul, check_ternary_matmul
from ..formats.ternary import TernaryWeight

Q_MAX = 127  # BitNet b1.58 quantises activations to -127..127 (-128 is never reached with absmax scaling)
ABSMAX_FLOOR = 1e-5  # a token with a smaller absmax is quantised as if it had this one


def rmsnorm(x: Any, gamma: Any, eps: float = 1e-6, out: Any = None) -> Any:
    """y = x / sqrt(mean(x**2) + eps) * gamma over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: float16, bfloat16 or float32 [K] or [N, K], C-contiguous.
        gamma: [K], float32 or x's dtype.
        eps: >= 0.
        out: where to write y, of x's shape and one of the three dtypes; allocated with x's dtype when missing.

    Raises:
        ArgumentTypeError, ArgumentValueError: see :mod:`edgellm_cupy.arguments`.
    """
    check_rmsnorm(np.ndarray, x, gamma, eps, out)
    return _store(normalise(x, gamma, eps), x, out)


def ternary_matmul(x: Any, W: TernaryWeight, activation: str = "float", out: Any = None) -> Any:
    """y = scale * (t @ x) for each token; see :func:`edgellm_cupy.ternary_matmul`."""
    check_ternary_matmul(np.ndarray, x, W, activation, out)
    return _store(product(x.astype(np.float64), W, activation), x, out)


def rmsnorm_ternary_matmul(
    x: Any,
    gamma: Any,
    W: TernaryWeight,
    eps: float = 1e-6,
    activation: str = "float",
    residual: Any = None,
    strategy: str = "adaptive",
    out: Any = None,
) -> Any:
    """y = scale * (t @ rmsnorm(x)) + residual; see :func:`edgellm_cupy.rmsnorm_ternary_matmul`.

    `strategy` changes nothing here: all of them have the same meaning.
    """
    check_rmsnorm_ternary_matmul(np.ndarray, x, gamma, W, eps, activation, residual, strategy, out)
    y = product(normalise(x, gamma, eps), W, activation)
    if residual is not None:
        y += residual.astype(np.float64)
    return _store(y, x, out)


# ---- the steps, in float64 ------------------------------------------------------------------------------------------


def normalise(x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm in float64. A token that is all zero stays zero, also with eps = 0; NaN or inf makes the token NaN."""
    x64 = x.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        rms = np.sqrt(np.mean(x64 * x64, axis=-1, keepdims=True) + eps)
        n = x64 / np.where(rms == 0, 1, rms) * gamma.astype(np.float64)
    return _nan_tokens(n, x64)


def quantise(n: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Absmax int8 quantisation of each token, as BitNet b1.58 does it.

    Returns:
        q: int8, shape of `n`, half rounded to even.
        step: float64 [..., 1] with n ~ q * step; NaN for a token that is not finite.
        exact: float64, n / step before rounding (how far from a tie each value lay).
    """
    finite = np.isfinite(n).all(axis=-1, keepdims=True)
    safe = np.where(finite, n, 0.0)
    step = np.maximum(np.abs(safe).max(axis=-1, keepdims=True), ABSMAX_FLOOR) / Q_MAX
    exact = safe / step
    return np.rint(exact).astype(np.int8), np.where(finite, step, np.nan), exact


def product(n: np.ndarray, W: TernaryWeight, activation: str) -> np.ndarray:
    """scale * (t @ n) for each token of `n` (float64), in float64; with int8 the integer sums are exact."""
    t = W.to_int8()
    if activation == "int8":
        q, step, _ = quantise(n)
        return (q.astype(np.float64) @ t.T.astype(np.float64)) * step * W.scale
    n = _nan_tokens(n, n)
    with np.errstate(invalid="ignore"):
        return (n @ t.T.astype(np.float64)) * W.scale


def _nan_tokens(values: np.ndarray, source: np.ndarray) -> np.ndarray:
    """`values`, but NaN throughout each token whose `source` holds a NaN or an infinity."""
    return np.where(np.isfinite(source).all(axis=-1, keepdims=True), values, np.nan)


def _store(y: np.ndarray, x: np.ndarray, out: np.ndarray | None) -> np.ndarray:
    if out is None:
        out = np.empty(y.shape, dtype=x.dtype)
    with np.errstate(over="ignore"):
        out[...] = y.astype(out.dtype)
    return out
