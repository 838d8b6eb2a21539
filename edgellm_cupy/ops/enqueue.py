"""Enqueueing the kernels of the operations: no checks (the callers have made them), no synchronisation.

Used by the public operations and by the decoder, which owns its buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arguments import BFLOAT16, FLOAT16, FLOAT32
from ..formats.packing import CHUNK, chunks
from ..formats.ternary import TernaryWeight
from ..kernels import keep_while_captured, load
from ..tuning.device import current_facts
from ..tuning.product import NORM_THREADS, STREAMING_TOKENS, norm_spec, product_launch, quantise_spec

DTYPE_TAGS = {FLOAT16: np.int32(0), BFLOAT16: np.int32(1), FLOAT32: np.int32(2)}
"""Run-time dtype tags of the kernels: elements.cuh."""

_NAMES = {dtype: dtype.name for dtype in (*DTYPE_TAGS, np.dtype(np.int8))}  # dtype.name itself takes microseconds
NULL = np.uint64(0)
_MAX_NORM_BLOCKS = 65535


def tokens_of(x: Any) -> int:
    """N: rows of [N, K], 1 for [K]."""
    return 1 if x.ndim == 1 else int(x.shape[0])


def workspace(cp: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Temporary memory of one call, from CuPy's pool.

    Freed memory may be handed out again at once, which is right in stream order and wrong for a graph that is being
    captured: its replays use the memory later. So what a captured call used is kept.
    """
    buffer = cp.empty(shape, dtype)
    if cp.cuda.get_current_stream().is_capturing():
        keep_while_captured(buffer)
    return buffer


def rmsnorm(cp: Any, x: Any, gamma: Any, eps: float, out: Any) -> None:
    """out = rmsnorm(x) * gamma."""
    n = tokens_of(x)
    kernel = load(norm_spec(_NAMES[x.dtype]))
    args = (
        x,
        gamma,
        np.int32(gamma.dtype == FLOAT32),
        out,
        DTYPE_TAGS[out.dtype],
        np.int32(x.shape[-1]),
        np.int32(n),
        np.float32(eps),
    )
    kernel((min(n, _MAX_NORM_BLOCKS), 1, 1), (NORM_THREADS, 1, 1), args)


def product(
    cp: Any,
    x: Any,
    gamma: Any,
    W: TernaryWeight,
    eps: float,
    activation: str,
    residual: Any,
    strategy: str,
    out: Any,
) -> None:
    """out = scale * (t @ x) + residual, with RMSNorm in front where `gamma` is given."""
    n = tokens_of(x)
    if strategy == "streaming" or (strategy == "adaptive" and n <= STREAMING_TOKENS):
        _product(x, NULL, gamma, W, eps, activation, residual, n, out)
    elif activation == "int8":
        q = workspace(cp, (n, chunks(W.shape[1]) * CHUNK), np.int8)
        dequant = workspace(cp, (n,), np.float32)
        kernel = load(quantise_spec(_NAMES[x.dtype], gamma is not None))
        args = (
            x,
            NULL if gamma is None else gamma,
            np.int32(gamma is None or gamma.dtype == FLOAT32),
            q,
            dequant,
            np.int32(W.shape[1]),
            np.int32(n),
            np.float32(eps),
        )
        kernel((min(n, _MAX_NORM_BLOCKS), 1, 1), (NORM_THREADS, 1, 1), args)
        _product(q, dequant, None, W, 0.0, "int8", residual, n, out)
    elif gamma is None:
        _product(x, NULL, None, W, eps, activation, residual, n, out)
    else:
        # float32 between the two kernels: the accuracy is that of one kernel, and no intermediate can overflow.
        normed = workspace(cp, x.shape, np.float32)
        rmsnorm(cp, x, gamma, eps, normed)
        _product(normed, NULL, None, W, eps, activation, residual, n, out)


def _product(
    x: Any, dequant: Any, gamma: Any, W: TernaryWeight, eps: float, activation: str, residual: Any, n: int, out: Any
) -> None:
    m, k = W.shape
    plan = product_launch(m, n, k, _NAMES[x.dtype], gamma is not None, activation, current_facts())
    front = (x, dequant) if gamma is None else (x, gamma, np.int32(gamma.dtype == FLOAT32))
    args = (
        *front,
        W.packed,
        W.scale,
        np.int32(W.scale.size > 1),
        NULL if residual is None else residual,
        DTYPE_TAGS[FLOAT32 if residual is None else residual.dtype],
        out,
        DTYPE_TAGS[out.dtype],
        np.int32(m),
        np.int32(k),
        np.int32(n),
        *(() if gamma is None else (np.float32(eps),)),
        np.int32(plan.slice_steps),
        np.int32(plan.pitch),
    )
    load(plan.launch.spec)(plan.launch.grid, plan.launch.block, args, plan.launch.shared_bytes)
