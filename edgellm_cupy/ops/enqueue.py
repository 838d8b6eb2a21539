"""Enqueueing the kernels of the operations: no checks (the callers have made them), no synchronisation.

Used by the public operations and by the decoder, which owns its buffers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arguments import BFLOAT16, FLOAT16, FLOAT32, address
from ..formats.ternary import TernaryWeight
from ..kernels import keep_while_captured, load
from ..tuning import dispatch, tuned
from ..tuning.device import current_facts
from ..tuning.gemm import GemmLaunch, quantise_tiles_launch, tile_shape
from ..tuning.product import NORM_THREADS, ProductLaunch, norm_spec

DTYPE_TAGS = {FLOAT16: 0, BFLOAT16: 1, FLOAT32: 2}
"""Run-time dtype tags of the kernels: elements.cuh."""

FFN = {"silu": 1, "relu2": 2, "relu2 scaled": 3}
FFN_GATED = 4
"""The products' `ffn` parameter, with FFN_GATED added or not: ffn.cuh. Scaled: by SQUARED_UNIT."""

_NAMES = {dtype: dtype.name for dtype in DTYPE_TAGS}  # dtype.name itself takes microseconds
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
    args = (x, gamma, gamma.dtype == FLOAT32, out, DTYPE_TAGS[out.dtype], x.shape[-1], n, eps)
    load(norm_spec(_NAMES[x.dtype]))((min(n, _MAX_NORM_BLOCKS), 1, 1), (NORM_THREADS, 1, 1), args)


def product(
    cp: Any,
    x: Any,
    gamma: Any,
    W: TernaryWeight,
    eps: float,
    activation: str,
    residual: Any,
    choice: str | dispatch.Config,
    out: Any,
    ffn: int = 0,
) -> None:
    """out = scale * (t @ x) + residual, with RMSNorm in front where `gamma` is given, and the activation `ffn` behind.

    ffn: 0, or of :data:`FFN`, only with `gamma`; a gated one halves the rows of `out`, and W has gate and up in
    turns.
    choice: a strategy, or a configuration of it (for tuning); "adaptive" takes what has been tuned, where that is.
    """
    m, k = W.shape
    gamma_name = None if gamma is None else _NAMES[gamma.dtype]
    problem = dispatch.Problem(m, tokens_of(x), k, _NAMES[x.dtype], gamma_name, _aligned(x, gamma, k), activation)
    if choice == "adaptive":
        choice = tuned.lookup(problem) or choice
    plan = dispatch.launch(problem, choice, current_facts())
    if isinstance(plan, ProductLaunch):
        _streaming(plan, problem, x, gamma, W, eps, residual, out, ffn)
    else:
        _separate(cp, plan, problem, x, gamma, W, eps, residual, out, ffn)


def _aligned(x: Any, gamma: Any, k: int) -> bool:
    """Four elements of every row can be loaded at once, as the kernels' ALIGNED variants do."""
    if k % 4 or address(x) % (4 * x.itemsize):
        return False
    return gamma is None or address(gamma) % (4 * gamma.itemsize) == 0


def _streaming(
    plan: ProductLaunch,
    problem: dispatch.Problem,
    x: Any,
    gamma: Any,
    W: TernaryWeight,
    eps: float,
    residual: Any,
    out: Any,
    ffn: int,
) -> None:
    launch = plan.launch
    args: tuple[Any, ...] = (
        *((x,) if gamma is None else (x, gamma)),
        W.packed,
        W.scale,
        W.scale.size > 1,
        residual,
        out,
        DTYPE_TAGS[out.dtype],
        *(() if gamma is None else (ffn,)),
        problem.m,
        problem.k,
        problem.n,
        *(() if gamma is None else (eps,)),
        plan.slice_steps,
    )
    load(launch.spec)(launch.grid, launch.block, args, launch.shared_bytes)


def _separate(
    cp: Any,
    plan: GemmLaunch,
    problem: dispatch.Problem,
    x: Any,
    gamma: Any,
    W: TernaryWeight,
    eps: float,
    residual: Any,
    out: Any,
    ffn: int,
) -> None:
    m, n, k = problem[:3]
    activation = problem.activation
    tiles = workspace(cp, tile_shape(n, k, activation, problem.planes), np.uint8)
    dequant = workspace(cp, (n,), np.float32)
    q_sums = workspace(cp, (n,), np.int32) if activation == "int8" else None
    front, launch = quantise_tiles_launch(n, k, problem.x_dtype, gamma is not None, activation), plan.launch
    args: tuple[Any, ...] = (x, gamma, gamma is None or gamma.dtype == FLOAT32, tiles, dequant, q_sums, k, eps)
    load(front.spec)(front.grid, front.block, args, front.shared_bytes)
    args = (
        *(tiles, dequant, q_sums),
        *(W.packed, W.scale, W.scale.size > 1),
        *(residual, DTYPE_TAGS[x.dtype], out, DTYPE_TAGS[out.dtype], ffn),
        *(m, k, n, plan.stages),
    )
    load(launch.spec)(launch.grid, launch.block, args, launch.shared_bytes)
