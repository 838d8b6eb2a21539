"""What crosses between host and device: measured rates of pinned memory, and the bytes of a token.

Weights cross once, before the first token. After that a decoded token sends nothing to the device, whose graph reads
the previous token where the last step left it. A caller who reads each token gets one int32 token id back, as in the
series `token_latency_streamed`; in `token_latency` and `throughput_tok_s` nothing crosses at all.

Results of :func:`run`:

    copies              one row a size and direction: `device` series (events), `end_to_end` series (wall clock until
                        the copy is complete), GB/s
    token_id_us         median wall clock of the four bytes that a token really costs
    original_formula    for the notebook's workload only: what the original counted, and its formula
    pcie_h2d_per_token_bytes, pcie_d2h_per_token_bytes, weight_bytes_one_time
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, inner, measured, missing

SIZES = (4, 1 << 16, 1 << 20, 1 << 26)
DIRECTIONS = ("h2d", "d2h")
TOKEN_ID_BYTES = np.dtype(np.int32).itemsize
NOTEBOOK = "smollm-135m-notebook"

_RULE = timing.StopRule(relative_error=0.01, min_samples=20, min_seconds=0.05, max_seconds=0.4)


def run(ctx: Context) -> dict[str, Any]:
    """Copies of :data:`SIZES` bytes both ways, and the counts."""
    # A row, because the model has to be built: one that does not fit costs this figure and no other.
    weights = ctx.row("transfer/weight bytes", "engine", lambda: {"weight_bytes_one_time": _weight_bytes(ctx)})
    figures: dict[str, Any] = {"weight_bytes_one_time": inner(weights, "weight_bytes_one_time", unit="bytes")}
    if ctx.no_gpu:
        nothing = missing(ctx.no_gpu)
        figures |= {"copies": nothing, "token_id_us": nothing}
        figures |= {f"pcie_{direction}_per_token_bytes": missing(ctx.no_gpu, "bytes") for direction in DIRECTIONS}
    else:
        ctx.progress("transfers between host and device")
        every = [(size, direction) for size in SIZES for direction in DIRECTIONS]
        found = {
            copy: ctx.row(f"transfer/{copy[0]} bytes {copy[1]}", "kernel", partial(_copy, *copy))
            for copy in ctx.shuffled("copies", every)
        }
        figures |= {
            "copies": [{"bytes": size, "direction": way, **found[size, way]} for size, way in every],
            "token_id_us": inner(found[TOKEN_ID_BYTES, "d2h"], "end_to_end", "median", unit="us"),
            "pcie_h2d_per_token_bytes": measured(
                0, "bytes", how="computed, not observed: every series decodes from the token on the device"
            ),
            "pcie_d2h_per_token_bytes": measured(
                TOKEN_ID_BYTES,
                "bytes",
                how="computed, not observed: one int32 token id in token_latency_streamed, where the host reads each "
                "token; 0 in token_latency and throughput_tok_s",
            ),
        }
    if ctx.config.name == NOTEBOOK:
        figures["original_formula"] = _original_formula(ctx)
    return figures


def _weight_bytes(ctx: Context) -> Metric:
    c, rows = ctx.checkpoint, 1 if ctx.config.tied_head else 2
    whole = int(c.body_bytes + c.norm_bytes + rows * ctx.model.head_bytes)
    return measured(whole, "bytes", of="codes, scales, norms, embedding and head (once where tied)")


def _original_formula(ctx: Context) -> dict[str, Any]:
    """Bytes that the original counts for its four products, which it feeds from the host one by one."""
    products = ctx.config.products().values()
    h2d, d2h = sum(4 * k for _, k in products), sum(4 * m for m, _ in products)

    def both(factor: int) -> dict[str, Metric]:
        return {"h2d": measured(factor * h2d, "bytes"), "d2h": measured(factor * d2h, "bytes")}

    return {
        "formula": "float32 activations of every product: 4 K bytes up and 4 M bytes down, summed over its products",
        "per_layer": both(1),
        "per_token": both(ctx.config.num_layers),
        "note": "no byte of this crosses here: activations stay on the device",
    }


def _copy(size: int, direction: str) -> dict[str, Any]:
    import cupy as cp
    import cupyx

    host = cupyx.empty_pinned(size, np.uint8)
    host[:] = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    device = cp.asarray(host)
    runtime = cp.cuda.runtime
    target, source, kind = (
        (device.data.ptr, host.ctypes.data, runtime.memcpyHostToDevice)
        if direction == "h2d"
        else (host.ctypes.data, device.data.ptr, runtime.memcpyDeviceToHost)
    )

    def copy() -> None:
        runtime.memcpyAsync(target, source, size, kind, cp.cuda.get_current_stream().ptr)

    def copy_and_wait() -> None:
        copy()
        cp.cuda.get_current_stream().synchronize()

    events = timing.device(copy, _RULE)
    with cp.cuda.Stream(non_blocking=True):
        wall = timing.end_to_end(copy_and_wait, _RULE)
    rate = statistics.rate(events["median"], size / 1e3, "GB/s", of="the device series")
    return {"device": events, "end_to_end": wall, "gb_per_s": rate}
