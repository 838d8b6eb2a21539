"""The kernels of one decoded token: how many, which, how long, and what each asks of the GPU.

Kernels are counted where the library launches them: a token's graph by the launches that were made while it was
recorded. What anyone else enqueues is not seen. Occupancy is the theoretical one, by the driver's calculator, for the
launch shapes that were really used.

Results of :func:`run`:

    kernels_per_token           kernels that ran for one token
    graph_launches_per_token    launches that the host made for it
    host_sync_calls_per_token   synchronisations inside `decode_one_token`; see :func:`_synchronisations`
    token_gpu_ms                series: GPU time of a token at a context of :data:`.utilisation.CONTEXT`
    avg_kernel_exec_time_ms     its median over the kernels of a token, the gaps between them included
    launch_share                one row a kernel of a token: its launches and their share
    kernels                     one row a kernel of a token and launch shape: resources and occupancy
    where_the_time_goes         what each kind of kernel costs a token, beside its floor: :mod:`.ablation`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from . import ablation, timing
from .context import Context
from .metrics import Metric, measured, missing
from .tokens import times_at_depth
from .utilisation import CONTEXT

_FIGURES: dict[str, str | None] = {
    "kernels_per_token": "kernels",
    "graph_launches_per_token": "launches",
    "host_sync_calls_per_token": "calls",
    "token_gpu_ms": "ms",
    "avg_kernel_exec_time_ms": "ms",
    "launch_share": None,
    "kernels": None,
    "where_the_time_goes": None,
}


def run(ctx: Context) -> dict[str, Any]:
    """Count, time and describe. Every figure is null with the reason where there is no GPU."""
    if ctx.no_gpu:
        return {key: missing(ctx.no_gpu, unit) for key, unit in _FIGURES.items()}
    from ..kernels import count_launches, loaded

    ctx.progress("kernels of one token")
    tokens = 64 if ctx.quick else 256
    for kernel in loaded():
        kernel.forget_launches()  # of prompts and products; what is recorded below is a token's
    with count_launches() as recorded:  # a new cache has buffers of its own, hence a graph of its own
        cache = ctx.new_cache(CONTEXT + tokens)
        token = ctx.model.decode_one_token(1, cache)
    with count_launches() as counter:
        token = ctx.model.decode_one_token(token, cache)
    kernels = [row for kernel in loaded() for row in _rows(kernel, recorded.by_name)]
    synchronisations = _synchronisations(ctx, cache, token)

    times = times_at_depth(ctx, cache, CONTEXT, tokens)
    token_ms = timing.summarise(times, "ms", context=CONTEXT, method="CUDA events around each graph launch")
    return {
        "kernels_per_token": measured(
            counter.kernels, "kernels", how="counted where the library launches, while the token's graph was recorded"
        ),
        "graph_launches_per_token": measured(counter.graph_launches, "launches"),
        "host_sync_calls_per_token": synchronisations,
        "token_gpu_ms": token_ms,
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
        "where_the_time_goes": ablation.run(ctx),
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
