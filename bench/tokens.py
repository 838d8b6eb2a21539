"""Tokens as a user gets them: time to the first, processing of the prompt, gaps between the next ones, throughput.

Boundary: the engine. Token ids go in and come out; no tokeniser, no network. Decoding runs from an empty cache in
runs of `Plan.run_tokens` tokens, again and again, so that the context stays short however many samples are wanted
(:mod:`.scaling` measures long ones).

Results of :func:`run`:

    plan                    what was asked for; the runs end early at the time limit
    first_token             series in ms: prompt ids on the host -> first greedy token on the host, wall clock
    prompts                 one row for each prompt length: series in ms until the device is idle, tokens/s
    token_latency           series in ms: CUDA events around each graph launch (the token stays on the device), or the
                            wall clock on NumPy
    token_latency_streamed  series in ms, CUDA only: wall clock when the host reads every token before the next one
    throughput_tok_s        tokens/s of whole runs: wall clock, one synchronisation at the end
    *_token_latency_ms, token_gap_variance_ms2, time_to_first_token_ms, prompt_tok_s
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from . import timing
from .context import Context

PROMPT_TOKENS = 128
WARM_UP_TOKENS = 4
"""Decoded before the first timed token, so that the device is busy and the host ahead of it when timing begins."""

_FIRST_TOKEN = 1  # decoding needs some id to start from; its value costs nothing


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        run_tokens: tokens of one run, from an empty cache.
        tokens: samples wanted of the token latency; p99 needs 1,000 for ten beyond it.
        limit_s: seconds after which no further run begins, for latency and for throughput each.
        prompts: prompt lengths in tokens; `prompt_tok_s` is that of the last.
        rule: when a prompt's series has enough samples.
    """

    run_tokens: int
    tokens: int
    limit_s: float
    prompts: tuple[int, ...]
    rule: timing.StopRule


_PROMPT_RULE = timing.StopRule(relative_error=0.005, min_samples=10, min_seconds=0.5, max_seconds=3)
_QUICK_PROMPT_RULE = timing.StopRule(relative_error=0.02, min_samples=3, min_seconds=0.05, max_seconds=0.5)


def _plan(ctx: Context) -> Plan:
    prompts = (32, 128) if ctx.no_gpu else (128, 512)
    if ctx.quick:
        return Plan(32, 64, 1, prompts[:1], _QUICK_PROMPT_RULE)
    return Plan(128, 1152, 6, prompts, _PROMPT_RULE)


def run(ctx: Context) -> dict[str, Any]:
    """Measure everything in the module's table. Milliseconds and tokens a second."""
    plan = _plan(ctx)
    first = _first_token(ctx, plan)
    prompts = [_prompt(ctx, n, plan) for n in plan.prompts]
    latency = _latency(ctx, plan)
    return {
        "boundary": "engine",
        "plan": {
            "run_tokens": plan.run_tokens,
            "tokens": plan.tokens,
            "limit_s": plan.limit_s,
            "warm_up_tokens": WARM_UP_TOKENS,
        },
        "first_token": first,
        "prompts": prompts,
        **latency,
        "time_to_first_token_ms": {**first["median"], "prompt_tokens": PROMPT_TOKENS},
        "prompt_tok_s": {**prompts[-1]["tok_s"], "prompt_tokens": prompts[-1]["tokens"]},
        **{f"{p}_token_latency_ms": latency["token_latency"][p] for p in ("mean", "p50", "p90", "p95", "p99", "max")},
        "token_gap_variance_ms2": latency["token_latency"]["gap_variance"],
        "throughput_tok_s": _throughput(ctx, plan),
    }


# ---- shared with the other parts ------------------------------------------------------------------------------------


def synchronise(ctx: Context) -> None:
    """Wait until the device has done everything that was enqueued; nothing to wait for on NumPy."""
    if not ctx.no_gpu:
        import cupy

        cupy.cuda.Device().synchronize()


def decode_times(ctx: Context, cache: Any, n: int) -> list[float]:
    """Milliseconds of each of `n` tokens decoded one after the other, after :data:`WARM_UP_TOKENS` untimed ones.

    On CUDA the distance of two events on the stream, one behind each token's graph: the host runs ahead, nothing waits.
    On NumPy the wall clock.
    """
    if ctx.no_gpu:
        return _wall_times(ctx, cache, n)
    import cupy

    token = _warm_up(ctx, cache)
    events = [cupy.cuda.Event() for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        token = ctx.model.decode_one_token(token, cache)
        event.record()
    events[-1].synchronize()
    return [float(cupy.cuda.get_elapsed_time(a, b)) for a, b in pairwise(events)]


def _wall_times(ctx: Context, cache: Any, n: int) -> list[float]:
    """Like :func:`decode_times`, but by the wall clock, and the host reads each token before it asks for the next."""
    token = _warm_up(ctx, cache)
    synchronise(ctx)
    stamps = [time.perf_counter()]
    for _ in range(n):
        token = ctx.model.decode_one_token(token, cache)
        int(token[0])
        stamps.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(stamps)]


def _warm_up(ctx: Context, cache: Any) -> Any:
    token: Any = _FIRST_TOKEN
    for _ in range(WARM_UP_TOKENS):
        token = ctx.model.decode_one_token(token, cache)
    return token


# ---- prompt ---------------------------------------------------------------------------------------------------------


def _prompt_ids(ctx: Context, n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, ctx.config.vocab_size, n, dtype=np.int32)


def _first_token(ctx: Context, plan: Plan) -> dict[str, Any]:
    ctx.progress(f"time to the first token, prompt of {PROMPT_TOKENS}")
    ids, cache = _prompt_ids(ctx, PROMPT_TOKENS), ctx.model.new_cache(PROMPT_TOKENS)

    def call() -> None:
        cache.fill_random(0)
        logits = ctx.model.prefill(ids, cache)
        # On CUDA the step itself chooses the token and leaves it in the cache.
        int(logits.argmax() if ctx.no_gpu else cache.token[0])

    return timing.wall_clock(call, plan.rule, "ms").summary(
        series="end_to_end", prompt_tokens=PROMPT_TOKENS, method="wall clock, host ids to first token on the host"
    )


def _prompt(ctx: Context, n: int, plan: Plan) -> dict[str, Any]:
    ctx.progress(f"prompt of {n}")
    ids, cache = _prompt_ids(ctx, n), ctx.model.new_cache(n)

    def call() -> None:
        cache.fill_random(0)
        ctx.model.prefill(ids, cache)
        synchronise(ctx)

    series = timing.wall_clock(call, plan.rule, "ms")
    rates = [1e3 * n / ms for ms in series.values]
    latency = series.summary(method="wall clock until idle")
    return {"tokens": n, "tok_s": timing.median(rates, "tok/s"), "latency": latency}


# ---- generation -----------------------------------------------------------------------------------------------------


def _latency(ctx: Context, plan: Plan) -> dict[str, Any]:
    ctx.progress("gaps between tokens")
    cache = ctx.model.new_cache(WARM_UP_TOKENS + plan.run_tokens)

    def series(times: Any, method: str) -> dict[str, Any]:
        cache.fill_random(0)
        times(ctx, cache, plan.run_tokens)  # compiles, allocates and warms up everything that a run needs
        samples: list[float] = []
        start = time.perf_counter()
        while len(samples) < plan.tokens and (not samples or time.perf_counter() - start < plan.limit_s):
            cache.fill_random(0)
            samples += times(ctx, cache, plan.run_tokens)
        enough = len(samples) >= plan.tokens
        stop = f"{plan.tokens} tokens" if enough else f"time limit of {plan.limit_s} s"
        return timing.summarise(samples, "ms", run_tokens=plan.run_tokens, method=method, stop=stop)

    if ctx.no_gpu:
        return {"token_latency": series(decode_times, "wall clock")}
    return {
        "token_latency": series(decode_times, "CUDA events around each graph launch"),
        "token_latency_streamed": series(_wall_times, "wall clock, the host reads each token"),
    }


def _throughput(ctx: Context, plan: Plan) -> dict[str, Any]:
    ctx.progress("throughput")
    cache = ctx.model.new_cache(WARM_UP_TOKENS + plan.run_tokens)
    rates: list[float] = []
    start = time.perf_counter()
    while len(rates) * plan.run_tokens < plan.tokens and (not rates or time.perf_counter() - start < plan.limit_s):
        cache.fill_random(0)
        token = _warm_up(ctx, cache)
        synchronise(ctx)
        begin = time.perf_counter()
        for _ in range(plan.run_tokens):
            token = ctx.model.decode_one_token(token, cache)
        synchronise(ctx)
        rates.append(plan.run_tokens / (time.perf_counter() - begin))
    return timing.median(rates, "tok/s", run_tokens=plan.run_tokens, method="wall clock of whole runs, median of runs")
