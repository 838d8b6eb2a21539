"""The kernels of one decoded token: how many, which, how long, and what each asks of the GPU.

Launches are counted at the one place of the library that launches, and a CUDA graph by the nodes recorded into it.
Occupancy is the theoretical one, by the driver's calculator, for the launch shapes that were really used.

Results of :func:`run`:

    kernels_per_token           kernels that ran for one token
    graph_launches_per_token    launches that the host made for it
    host_sync_calls_per_token   synchronisations inside `decode_one_token`; see :func:`_synchronisations`
    token_gpu_ms                series: GPU time of a token at a context of :data:`DEPTH`, from events
    avg_kernel_exec_time_ms     its median over the kernels of a token, the gaps between them included
    launch_share                kernel name -> {launches, share_pct} as recorded into a token's graph
    kernels                     one row a kernel that this process has loaded: resources, launch shapes, occupancy
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import timing
from .context import Context
from .metrics import Metric, measured, missing
from .tokens import WARM_UP_TOKENS, decode_times

DEPTH = 1024
_FIGURES: dict[str, str | None] = {
    "kernels_per_token": "kernels",
    "graph_launches_per_token": "launches",
    "host_sync_calls_per_token": "calls",
    "token_gpu_ms": "ms",
    "avg_kernel_exec_time_ms": "ms",
    "launch_share": None,
    "kernels": None,
}


def run(ctx: Context) -> dict[str, Any]:
    """Count, time and describe. Every figure is null with the reason where there is no GPU."""
    if ctx.no_gpu:
        return {key: missing(ctx.no_gpu, unit) for key, unit in _FIGURES.items()}
    from ..kernels import count_launches

    ctx.progress("kernels of one token")
    tokens = 64 if ctx.quick else 256
    with count_launches() as recorded:  # a new cache has buffers of its own, hence a graph of its own
        cache = ctx.model.new_cache(DEPTH + WARM_UP_TOKENS + tokens)
        token = ctx.model.decode_one_token(1, cache)
    with count_launches() as counter:
        token = ctx.model.decode_one_token(token, cache)
    synchronisations = _synchronisations(ctx, cache, token)

    cache.fill_random(DEPTH)
    token_ms = timing.summarise(
        decode_times(ctx, cache, tokens), "ms", context=DEPTH, method="CUDA events around each graph launch"
    )
    return {
        "kernels_per_token": measured(
            counter.kernels, "kernels", how="counted: nodes of the graphs that were launched"
        ),
        "graph_launches_per_token": measured(counter.graph_launches, "launches"),
        "host_sync_calls_per_token": synchronisations,
        "token_gpu_ms": token_ms,
        "avg_kernel_exec_time_ms": measured(
            token_ms["median"]["value"] / counter.kernels,
            "ms",
            of="GPU time of a token over its kernels, gaps included",
        ),
        "launch_share": _shares(recorded.by_name),
        "kernels": _loaded(recorded.by_name),
    }


def _synchronisations(ctx: Context, cache: Any, token: Any) -> Metric:
    """Whether `decode_one_token` waits for the device, observed and not assumed.

    Behind a backlog of tokens, each call is preceded by an event. When the call has returned and the event has not
    happened yet, the call cannot have waited for the stream. Once the device has caught up nothing can be told.
    """
    import cupy as cp

    backlog, calls = 8, 16
    stream, before = cp.cuda.get_current_stream(), cp.cuda.Event(disable_timing=True)
    returned_first = 0
    for i in range(backlog + calls):
        before.record(stream)
        token = ctx.model.decode_one_token(token, cache)
        returned_first += i >= backlog and not before.done
    stream.synchronize()
    if returned_first < calls:
        return missing(f"the device was done before {calls - returned_first} of {calls} calls returned", "calls")
    return measured(
        0, "calls", how=f"observed: {calls} of {calls} calls returned while earlier tokens were still being computed",
        note="a caller who reads each token on the host adds one",
    )  # fmt: skip


def _shares(by_name: Mapping[str, int]) -> dict[str, Any]:
    total = sum(by_name.values())
    return {
        name: {"launches": measured(count, "launches"), "share_pct": measured(100 * count / total, "%")}
        for name, count in sorted(by_name.items(), key=lambda item: -item[1])
    }


def _loaded(in_token: Mapping[str, int]) -> list[dict[str, Any]]:
    from ..kernels import loaded

    return sorted((_kernel(kernel, in_token) for kernel in loaded()), key=lambda row: row["name"])


def _kernel(kernel: Any, in_token: Mapping[str, int]) -> dict[str, Any]:
    info = kernel.info
    return {
        "name": info.name,
        "file": info.file,
        "in_token": info.name in in_token,
        "registers": measured(info.registers, "registers/thread"),
        "static_shared_bytes": measured(info.static_shared_bytes, "bytes/block"),
        "local_bytes": measured(info.local_bytes, "bytes/thread", of="spills and local arrays"),
        "max_threads_per_block": measured(info.max_threads_per_block, "threads"),
        "binary_arch": measured(f"sm_{info.arch}"),
        "launches": [_launch(kernel, info, *shape) for shape in sorted(kernel.launch_shapes)],
    }


def _launch(kernel: Any, info: Any, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int) -> dict[str, Any]:
    return {
        "grid": list(grid),
        "block": list(block),
        "dynamic_shared_bytes": measured(shared_bytes, "bytes/block"),
        "shared_bytes": measured(info.static_shared_bytes + shared_bytes, "bytes/block"),
        "theoretical_occupancy_pct": measured(100 * kernel.occupancy(math.prod(block), shared_bytes), "%"),
    }
