"""What decoding costs the host: CPU time of this process, its threads, and the price of enqueuing one token.

The original reports the machine's load and the machine's threads; both figures here are this process's. 100 % is one
core fully busy. On CUDA each run ends on a blocking event, for which the thread sleeps: a synchronisation that spins
would make the CPU time of a token its wall clock. The clocks are read by the decoding thread itself, between two
tokens: a sampling thread would have to wait for Python's lock.

The telemetry's thread pauses meanwhile: its CPU time is not that of decoding.

Results of :func:`run`:

    cpu_time_per_token_ms           user and system time of all threads
    cpu_utilization_pct             CPU time / wall clock of the whole measurement
    cpu_peak_pct                    the busiest window of :data:`WINDOW_S`
    threads_used                    most threads alive at once
    context_switches_per_token      {voluntary, involuntary}, with the wait at the end of each run of :data:`RUN_TOKENS`
    enqueue_us                      CUDA only: series of one `decode_one_token` call, which does not wait for the device
    enqueue_launch_us               CUDA only: series of one `rmsnorm_ternary_matmul` call, which launches one kernel
    windows_pct                     the windows behind the peak
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import psutil

import edgellm_cupy as ec

from .. import statistics, timing
from ..context import Context
from ..metrics import is_metric, measured, missing
from .latency import Problem
from .utilisation import CONTEXT, DecodeLoop

WINDOW_S = 0.05
_LAUNCH_RUNS = 33  # the first one warms up
RUN_TOKENS = 32  # launches in flight at once: far below the depth at which the driver makes the host wait
_SCOPE = "this process; 100 % is one core"


def run(ctx: Context) -> dict[str, Any]:
    """Decode for a while and watch the process; then launch single kernels."""
    with ctx.telemetry.paused():
        decoding = ctx.row("cpu/decoding", "engine", lambda: _decoding(ctx))
        launch = ctx.row("cpu/launch", "kernel", lambda: _launch(ctx))
    figures = dict.fromkeys(_FIGURES, decoding) if is_metric(decoding) else decoding
    return {**figures, "enqueue_launch_us": launch}


_FIGURES = (
    "cpu_time_per_token_ms", "cpu_utilization_pct", "cpu_peak_pct", "threads_used", "context_switches_per_token",
    "enqueue_us",
)  # fmt: skip


def _decoding(ctx: Context) -> dict[str, Any]:
    ctx.progress("CPU time of decoding")
    seconds = 0.3 if ctx.quick else 2.0
    step = DecodeLoop(ctx)
    _decode(ctx, step, [])  # warm

    process = psutil.Process()
    enqueue_us: list[float] = []
    threads = 0
    switches = process.num_ctx_switches()
    stamps = [_stamp()]
    while stamps[-1][0] - stamps[0][0] < seconds:
        enqueue_us += _decode(ctx, step, stamps)
        threads = max(threads, process.num_threads())
    switched = process.num_ctx_switches()
    tokens = len(enqueue_us)
    windows = busy_pct(stamps, WINDOW_S)
    wall, cpu = (last - first for first, last in zip(stamps[0], stamps[-1], strict=True))
    return {
        "work": str(step),
        "tokens": tokens,
        "wall_s": wall,
        "cpu_time_per_token_ms": measured(1e3 * cpu / tokens, "ms", n=tokens, context=CONTEXT, scope=_SCOPE),
        "cpu_utilization_pct": measured(100 * cpu / wall, "%", scope=_SCOPE),
        "cpu_peak_pct": measured(
            max(windows), "%", n=len(windows), window=f"at least {WINDOW_S * 1e3:.0f} ms", scope=_SCOPE
        ),
        "threads_used": measured(threads, "threads", scope="this process, most at once"),
        "context_switches_per_token": {
            "voluntary": measured((switched.voluntary - switches.voluntary) / tokens),
            "involuntary": measured((switched.involuntary - switches.involuntary) / tokens),
        },
        "enqueue_us": (
            missing("NumPy computes the token inside the call", "us")
            if ctx.no_gpu
            else statistics.summarise(enqueue_us, "us", method="wall clock of decode_one_token, which returns at once")
        ),
        "windows_pct": [round(pct, 1) for pct in windows],
    }


def _launch(ctx: Context) -> dict[str, Any]:
    """What Python takes until the kernel of the first product is enqueued."""
    if ctx.no_gpu:
        return missing("NumPy launches no kernels", "us")
    ctx.progress("CPU time of a launch")
    layer, (m, k) = next(iter(ctx.config.products().items()))
    p = Problem.random(layer, m, k)
    import cupy as cp

    x, gamma, weight, y = cp.asarray(p.x), cp.asarray(p.gamma), p.W.to_device(), cp.empty(m, cp.float16)

    def call() -> None:
        ec.rmsnorm_ternary_matmul(x, gamma, weight, activation="int8", out=y)

    times: list[float] = []
    for _ in range(_LAUNCH_RUNS):
        times += timing.wall_gaps(call, RUN_TOKENS)
        _sleep_until_idle()
    return statistics.summarise(
        [1e3 * ms for ms in times[RUN_TOKENS:]], "us", product=layer, run=RUN_TOKENS,
        method="wall clock of rmsnorm_ternary_matmul, int8, which returns at once",
    )  # fmt: skip


def busy_pct(stamps: Sequence[tuple[float, float]], window_s: float) -> list[float]:
    """CPU time over wall clock, in per cent, of consecutive windows of at least `window_s`; a shorter rest is dropped.

    stamps: (wall clock, CPU time) in seconds, in order.
    """
    windows: list[float] = []
    begin, busy = stamps[0]
    for now, cpu in stamps:
        if now - begin >= window_s:
            windows.append(100 * (cpu - busy) / (now - begin))
            begin, busy = now, cpu
    return windows


def _stamp() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _decode(ctx: Context, step: DecodeLoop, stamps: list[tuple[float, float]]) -> list[float]:
    """A run of tokens; the microseconds after which each call returned. Appends to `stamps`."""
    times: list[float] = []
    for _ in range(RUN_TOKENS):
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
        stamps.append(_stamp())
    if not ctx.no_gpu:
        _sleep_until_idle()
    stamps.append(_stamp())
    return times


def _sleep_until_idle() -> None:
    import cupy as cp

    done = cp.cuda.Event(block=True, disable_timing=True)
    done.record()
    done.synchronize()
