"""rmsnorm, ternary_matmul and rmsnorm_ternary_matmul on CuPy arrays.

All of them run on the current device and stream, never synchronise, and may be captured into a CUDA graph. PyTorch and
JAX arrays come in through DLPack without a copy: ``cupy.from_dlpack(tensor)``.
"""

from __future__ import annotations

from typing import Any

from ..arguments import check_rmsnorm, check_rmsnorm_ternary_matmul, check_ternary_matmul
from ..formats.ternary import TernaryWeight
from ..runtime import require_gpu
from . import enqueue

_cupy: Any = None


def _require_cupy() -> Any:
    """CuPy, asked for once: the check of the driver costs more than a launch."""
    global _cupy
    if _cupy is None:
        _cupy = require_gpu()
    return _cupy


def rmsnorm(x: Any, gamma: Any, eps: float = 1e-6, out: Any = None) -> Any:
    """y = x / sqrt(mean(x**2) + eps) * gamma over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: float16, bfloat16 or float32 CuPy array [K] or [N, K], C-contiguous.
        gamma: [K], float32 or x's dtype.
        eps: >= 0.
        out: where to write y, of x's shape and any of the three dtypes; allocated with x's dtype when missing.

    Returns:
        y. A token that holds a NaN or an infinity is NaN throughout; others are untouched by it.

    Raises:
        ArgumentTypeError: a NumPy array, or a wrong dtype.
        ArgumentValueError: shape, contiguity, device, eps < 0, or `out` overlapping an input.
        GpuUnavailableError: no usable GPU.
    """
    cp = _require_cupy()
    check_rmsnorm(cp.ndarray, x, gamma, eps, out)
    if out is None:
        out = cp.empty_like(x)
    enqueue.rmsnorm(cp, x, gamma, eps, out)
    return out


def ternary_matmul(x: Any, W: TernaryWeight, activation: str = "float", out: Any = None) -> Any:
    """y[n, m] = scale[m] * sum_k t[m, k] * x[n, k].

    Args:
        x: float16, bfloat16 or float32 CuPy array [K] or [N, K], C-contiguous.
        W: [M, K] on the same device.
        activation: ``"float"`` keeps x's precision; ``"int8"`` quantises each token by its absmax,
            half to even, as BitNet b1.58 does (arXiv:2402.17764), with exact integer sums.
        out: where to write y, [M] or [N, M], of any of the three dtypes; allocated with x's dtype when missing.

    Returns:
        y. A token that holds a NaN or an infinity gives NaN in all M outputs.

    Raises:
        ArgumentTypeError: a NumPy array, a host weight (call ``W.to_device()``), or a wrong dtype.
        ArgumentValueError: shape, contiguity, device, unknown activation, or `out` overlapping x.
        GpuUnavailableError: no usable GPU.
    """
    cp = _require_cupy()
    check_ternary_matmul(cp.ndarray, x, W, activation, out)
    if out is None:
        out = cp.empty((*x.shape[:-1], W.shape[0]), x.dtype)
    enqueue.product(cp, x, None, W, 0.0, activation, None, "adaptive", out)
    return out


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
    """y = scale * (t @ rmsnorm(x, gamma, eps)) (+ residual), for one token in one launch.

    Args:
        x: float16, bfloat16 or float32 CuPy array [K] or [N, K], C-contiguous.
        gamma: [K], float32 or x's dtype.
        W: [M, K] on the same device.
        eps: >= 0.
        activation: as in :func:`ternary_matmul`; it is the normalised x that is quantised.
        residual: [M] or [N, M] of x's dtype, added at the end; may be `out` itself.
        strategy: ``"streaming"``: norm and product in one launch; ``"separate"``: the norm (and quantisation) first,
            once a token, then the product; ``"adaptive"``: streaming for few tokens, separate for many.
        out: where to write y, of any of the three dtypes; allocated with x's dtype when missing.

    Returns:
        y, [M] or [N, M]. A token that holds a NaN or an infinity gives NaN in all M outputs.

    Raises:
        ArgumentTypeError: a NumPy array, a host weight (call ``W.to_device()``), or a wrong dtype.
        ArgumentValueError: shape, contiguity, device, eps < 0, an unknown option, or `out` overlapping an input.
        GpuUnavailableError: no usable GPU.
    """
    cp = _require_cupy()
    check_rmsnorm_ternary_matmul(cp.ndarray, x, gamma, W, eps, activation, residual, strategy, out)
    if out is None:
        out = cp.empty((*x.shape[:-1], W.shape[0]), x.dtype)
    enqueue.product(cp, x, gamma, W, eps, activation, residual, strategy, out)
    return out
