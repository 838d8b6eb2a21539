"""The kernels of one decoded token: how many, which, how long, and what each asks of the GPU.

Kernels, launches and synchronisations are traced with CUPTI where it is installed (:mod:`.cupti`). Elsewhere kernels
are counted where the library launches them: a token's graph by the launches that were made while it was recorded; what
anyone else enqueues is not seen then. Both counts are reported, and have to agree. Occupancy is the theoretical one, by
the driver's calculator, for the launch shapes that were really used, and beside it the one that Nsight Compute measured
(:mod:`.ncu`), where it may.

Results of :func:`run`:

    kernels_per_token           kernels that ran for one token
    graph_launches_per_token    launches that the host made for it
    host_sync_calls_per_token   synchronisations inside `decode_one_token`
    token_gpu_ms                series: GPU time of a token at a context of :data:`.utilisation.CONTEXT`
    token_streamed_ms           series: wall clock of it when the host reads each token before the next one
    gpu_idle_share_pct          {streamed, not_waiting}: of the time of a token, when the host reads each and when it
                                runs ahead (traced)
    avg_kernel_exec_time_ms     median of token_gpu_ms over the kernels of a token, the gaps between them included
    launch_share                one row a kernel of a token: its launches and their share
    kernels                     one row a kernel of a token and launch shape: resources, occupancy by the driver's
                                calculator and, `measured_occupancy_pct`, by Nsight Compute (`occupancy_how`)
    trace                       what CUPTI saw: :func:`.cupti.figures`
    where_the_time_goes         what each kind of kernel costs a token, beside its floor: :mod:`.ablation`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import statistics
from ..context import Context
from ..metrics import Metric, inner, is_metric, measured, missing
from . import ablation, cupti, ncu
from .latency import with_conditions
from .one_token import CACHE_TOKENS
from .tokens import SHORT_RUN, times_at_depth, wall_times_at_depth
from .utilisation import CONTEXT

_FIGURES: dict[str, str | None] = {
    "kernels_per_token": "kernels",
    "graph_launches_per_token": "launches",
    "host_sync_calls_per_token": "calls",
    "token_gpu_ms": "ms",
    "token_streamed_ms": "ms",
    "gpu_idle_share_pct": "%",
    "avg_kernel_exec_time_ms": "ms",
    "launch_share": None,
    "kernels": None,
    "occupancy_how": None,
    "trace": None,
    "where_the_time_goes": None,
}


def run(ctx: Context) -> dict[str, Any]:
    """Count, time and describe. Every figure is null with the reason where there is no GPU."""
    if ctx.no_gpu:
        return {key: missing(ctx.no_gpu, unit) for key, unit in _FIGURES.items()}
    token = ctx.row("kernels/token", "engine", lambda: _token(ctx))
    where = ctx.row("kernels/where the time goes", "engine", lambda: ablation.run(ctx))
    occupancy = ctx.row("kernels/occupancy", "kernel", lambda: ncu.achieved_occupancy(ctx))
    trace = ctx.row("kernels/trace", "engine", lambda: cupti.decode_trace(ctx))  # last: it slows what it traces
    return figures(token, where, occupancy, trace)


def figures(
    token: dict[str, Any], where: dict[str, Any], occupancy: dict[str, Any], trace: dict[str, Any]
) -> dict[str, Any]:
    """The results of :func:`run` from its rows, each of which may be null."""
    counted = {key: inner(token, key, unit=_FIGURES[key]) for key in ("kernels_per_token", "graph_launches_per_token")}
    return {
        "kernels_per_token": _count(trace, "kernels_per_token", counted["kernels_per_token"]),
        "graph_launches_per_token": _count(trace, "launches_per_token", counted["graph_launches_per_token"]),
        "host_sync_calls_per_token": _count(
            trace, "synchronisations_per_token", inner(token, "host_sync_calls_per_token", unit="calls")
        ),
        **with_conditions(token, ("token_gpu_ms", "token_streamed_ms")),
        "gpu_idle_share_pct": {
            "streamed": _idle_share(token),
            "not_waiting": inner(trace, "gpu_idle_share_pct", unit="%"),
        },
        "avg_kernel_exec_time_ms": inner(token, "avg_kernel_exec_time_ms", unit="ms"),
        "launch_share": inner(token, "launch_share"),
        "kernels": (
            token
            if is_metric(token)
            else [
                {**row, "measured_occupancy_pct": ncu.of_kernel(occupancy, row["name"], row["grid"])}
                for row in token["kernels"]
            ]
        ),
        "occupancy_how": inner(occupancy, "how"),
        "trace": trace,
        "where_the_time_goes": where,
    }


def _count(trace: dict[str, Any], key: str, counted: Metric) -> Metric:
    """The traced figure with the `counted` one beside it, or that one where nothing was traced."""
    traced = inner(trace, key)
    if traced["value"] is None:
        return {**counted, "not_traced": traced["reason"]}
    return {**traced, "counted": counted["value"], "how": "traced by CUPTI; counted: by the library itself"}


def _idle_share(token: dict[str, Any]) -> Metric:
    """Of the time between two tokens that the host reads, what the GPU does not need for one."""
    busy, whole = (inner(token, key, "median", unit="%") for key in ("token_gpu_ms", "token_streamed_ms"))
    share = statistics.ratio(busy, whole, "%")
    if share["value"] is None:
        return share
    return measured(100 * (1 - share["value"]), "%", of="1 - token_gpu_ms / token_streamed_ms", context=CONTEXT)


def _token(ctx: Context) -> dict[str, Any]:
    """What can be counted and timed without a profiler."""
    from ...kernels import count_launches, loaded

    ctx.progress("kernels of one token")
    tokens = 64 if ctx.quick else 256
    cache = ctx.new_cache(CACHE_TOKENS)  # new, with buffers of its own, hence a graph of its own
    cache.fill_random(CONTEXT)  # attention is divided among blocks by the context
    for kernel in loaded():
        kernel.forget_launches()  # of prompts and products; what is recorded below is a token's
    with count_launches() as recorded:
        token = ctx.model.decode_one_token(1, cache)
    with count_launches() as counter:
        token = ctx.model.decode_one_token(token, cache)
    kernels = [row for kernel in loaded() for row in _rows(kernel, recorded.by_name)]
    synchronisations = _synchronisations(ctx, cache, token)

    times = times_at_depth(ctx, cache, CONTEXT, tokens)
    runs: dict[str, Any] = {"run": SHORT_RUN, "context": CONTEXT}
    token_ms = statistics.summarise(times, "ms", **runs, method="CUDA events around each graph launch")
    streamed = statistics.summarise(
        wall_times_at_depth(ctx, cache, CONTEXT, tokens), "ms", **runs, method="wall clock, the host reads each token"
    )
    return {
        "kernels_per_token": measured(
            counter.kernels, "kernels", how="counted where the library launches, while the token's graph was recorded"
        ),
        "graph_launches_per_token": measured(counter.graph_launches, "launches"),
        "host_sync_calls_per_token": synchronisations,
        "token_gpu_ms": token_ms,
        "token_streamed_ms": streamed,
        "avg_kernel_exec_time_ms": measured(
            token_ms["median"]["value"] / counter.kernels,
            "ms",
            of="GPU time of a token over its kernels, gaps included",
        ),
        "launch_share": [
            {"name": name, "launches": launches, "share_pct": _share(launches, recorded.by_name)}
            for name, launches in recorded.by_name.most_common()
        ],
        "kernels": sorted(kernels, key=lambda row: (-row["launches_per_token"], row["name"], row["grid"])),
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


def _share(launches: int, by_name: Mapping[str, int]) -> float:
    return 100 * launches / sum(by_name.values())


def _rows(kernel: Any, by_name: Mapping[str, int]) -> list[dict[str, Any]]:
    """One row for each shape in which `kernel` was launched."""
    if not kernel.launch_shapes:
        return []
    info = kernel.info
    return [
        {
            "name": info.name,
            "launches_per_token": launches,
            "share_pct": _share(launches, by_name),
            "grid": " x ".join(map(str, grid)),
            "block": " x ".join(map(str, block)),
            "dynamic_shared_bytes": shared_bytes,
            "registers": info.registers,
            "static_shared_bytes": info.static_shared_bytes,
            "local_bytes": info.local_bytes,
            "occupancy_pct": 100 * kernel.occupancy(math.prod(block), shared_bytes),
        }
        for (grid, block, shared_bytes), launches in sorted(kernel.launch_shapes.items())
    ]
