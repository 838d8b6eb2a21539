"""How decoding slows down with the context: one token's time at growing depths of a real KV cache, and its slope.

The cache is filled with random keys and values, which cost attention the same as real ones; that of the shortest
context is decoded. Where a timed token lies beyond `ModelConfig.max_context` the row is marked ``synthetic``: the model
was never made for it, only its cost is real.

Results of :func:`run`:

    rows                the shortest context that is measured, then the depths, each with its token times, tokens/s,
                        bytes of KV cache and whether it is synthetic; tokens are decoded behind the depth
    prompts             one row for each of the reported depths: a prompt behind so many tokens, time until the device
                        is idle and tokens/s; behind none it is in :mod:`.tokens`
    fit                 the straight line through the medians of all depths (:class:`Fit`); not of the shortest context
    time_16k_over_0     how many times as long a token takes at the last depth as at the shortest context
    conditions          of the GPU meanwhile
    throughput_*_ctx_tok_s, throughput_degradation_slope_pct_per_1k
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, fields, inner, is_metric, measured, missing
from .tokens import PROMPT_RULE, SHORT_RUN, WARM_UP_TOKENS, prompt_times, short_times, times_at_depth

REPORTED = {"1k": 1024, "4k": 4096, "8k": 8192, "16k": 16384}
SHORTEST = WARM_UP_TOKENS + SHORT_RUN // 2
"""Depth 0 as it can be measured: the mean context of short runs from an empty cache that is just long enough."""
DEPTHS = (1024, 2048, 4096, 8192, 12288, 16384)
"""Two more than are reported: with four points the slope's interval would rest on two degrees of freedom."""

PROMPT_TOKENS = {"cuda": 512, "numpy": 32}
"""Of a prompt behind a depth, by backend."""

_TOKENS = {"cuda": 256, "numpy": 20}  # timed at each depth
_TOKENS_QUICK = 8

SLOPE_DEFINITION = (
    "ordinary least squares of the median ms per token against context, over all depths; the slope for 1,024 more "
    "tokens of context, in per cent of the fitted time at 1,024 tokens; positive: slower; 95 % t interval"
)


@dataclass(frozen=True)
class Fit:
    """ms per token = ms_at_1k + ms_per_1k * (context - 1024) / 1024.

    Attributes:
        ms_at_1k: fitted time of a token at a context of 1,024 tokens.
        ms_per_1k: milliseconds more for each 1,024 tokens of context.
        pct_per_1k: 100 * ms_per_1k / ms_at_1k.
        ms_per_1k_ci95, pct_per_1k_ci95: 95 % t intervals; the second by the delta method. The residuals are those of
            the medians around the line, so a bend of the true curve widens the interval.
        degrees_of_freedom: points - 2.
    """

    ms_at_1k: float
    ms_per_1k: float
    pct_per_1k: float
    ms_per_1k_ci95: tuple[float, float]
    pct_per_1k_ci95: tuple[float, float]
    degrees_of_freedom: int


def fit_line(contexts: Sequence[int], ms: Sequence[float]) -> Fit:
    """Ordinary least squares of `ms` against `contexts` (tokens); 3 to `len(DEPTHS)` points.

    Raises:
        ValueError: another number of points, or a fitted time at 1k that is not positive.
    """
    degrees = len(contexts) - 2
    if not 1 <= degrees <= len(DEPTHS) - 2 or len(ms) != len(contexts):
        raise ValueError(f"{len(contexts)} contexts and {len(ms)} times, expected 3 to {len(DEPTHS)} of each")
    thousands = (np.asarray(contexts, np.float64) - 1024) / 1024
    design = np.stack([np.ones_like(thousands), thousands], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    at_1k, per_1k = inverse @ design.T @ np.asarray(ms, np.float64)
    if at_1k <= 0:
        raise ValueError(f"the fitted time at 1k is {at_1k} ms: the times do not grow like a line")
    residuals = np.asarray(ms) - design @ (at_1k, per_1k)
    covariance = inverse * (residuals @ residuals) / degrees
    gradient = np.array([-per_1k / at_1k, 1]) / at_1k  # of per_1k / at_1k by (at_1k, per_1k)
    t = statistics.student95(degrees)

    def interval(centre: float, variance: float) -> tuple[float, float]:
        half = t * float(np.sqrt(variance))
        return float(centre) - half, float(centre) + half

    return Fit(
        ms_at_1k=float(at_1k),
        ms_per_1k=float(per_1k),
        pct_per_1k=float(100 * per_1k / at_1k),
        ms_per_1k_ci95=interval(per_1k, covariance[1, 1]),
        pct_per_1k_ci95=interval(100 * per_1k / at_1k, 1e4 * (gradient @ covariance @ gradient)),
        degrees_of_freedom=degrees,
    )


def run(ctx: Context) -> dict[str, Any]:
    """Token times at each depth of :data:`DEPTHS`, and the line through them. Milliseconds and tokens a second."""
    with ctx.telemetry.watch() as conditions:
        figures = _measure(ctx)
    return {**figures, "conditions": conditions}


def cache_length(ctx: Context) -> int:
    """Positions of the one cache that serves all :data:`DEPTHS`."""
    return DEPTHS[-1] + max(_tokens(ctx), PROMPT_TOKENS[ctx.backend])


def _tokens(ctx: Context) -> int:
    return _TOKENS_QUICK if ctx.quick else _TOKENS[ctx.backend]


def _measure(ctx: Context) -> dict[str, Any]:
    tokens = _tokens(ctx)
    warm: list[Any] = []

    def cache() -> Any:
        """One for all depths, warm: clocks have risen, memory is touched, graphs for short and long contexts exist."""
        if not warm:
            warm.append(ctx.new_cache(cache_length(ctx)))
            for depth in (DEPTHS[0], DEPTHS[-1]):
                times_at_depth(ctx, warm[0], depth, tokens)
        return warm[0]

    measures: dict[int, Callable[[], dict[str, Any]]] = {
        SHORTEST: lambda: _shortest_row(ctx, tokens),
        **{depth: partial(_row, ctx, cache, depth, tokens) for depth in DEPTHS},
    }
    found = {
        depth: ctx.row(f"scaling/context {depth}", "engine", measures[depth])
        for depth in ctx.shuffled("depths", measures)
    }
    length = PROMPT_TOKENS[ctx.backend]
    prompts = {
        depth: ctx.row(f"scaling/prompt of {length} at {depth}", "engine", partial(_prompt, ctx, cache, depth, length))
        for depth in ctx.shuffled("prompt depths", REPORTED.values())
    }
    shortest, *rows = (_described(ctx, depth, found[depth]) for depth in measures)
    tok_s = {row["context"]: row["tok_s"] for row in rows}
    return {
        "boundary": "engine",
        "rows": [shortest, *rows],
        "prompts": [
            {
                "context": depth,
                "tokens": length,
                "synthetic": depth + length > ctx.config.max_context,
                "tok_s": inner(prompts[depth], "tok_s", unit="tok/s"),
                "latency": inner(prompts[depth], "latency", unit="ms"),
                **fields(prompts[depth]),
            }
            for depth in REPORTED.values()
        ],
        "time_16k_over_0": _growth(shortest, rows[-1]),
        **{f"throughput_{name}_ctx_tok_s": tok_s[depth] for name, depth in REPORTED.items()},
        **_fit_figures(rows),
    }


def _fit_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The line and its slope; null where times as noisy as these make none, or where one is missing."""
    medians = [inner(row["latency"], "median") for row in rows]
    if null := next((median for median in medians if median["value"] is None), None):
        return _no_fit(null["reason"])
    try:
        line = fit_line(DEPTHS, [median["value"] for median in medians])
    except ValueError as e:
        return _no_fit(str(e))
    return {
        "fit": {
            "ms_at_1k": measured(line.ms_at_1k, "ms"),
            "ms_per_1k": measured(line.ms_per_1k, "ms", ci95=list(line.ms_per_1k_ci95)),
            "degrees_of_freedom": line.degrees_of_freedom,
        },
        "throughput_degradation_slope_pct_per_1k": measured(
            line.pct_per_1k, "%", n=len(rows), ci95=list(line.pct_per_1k_ci95), definition=SLOPE_DEFINITION
        ),
    }


def _no_fit(reason: str) -> dict[str, Any]:
    return {"fit": missing(reason), "throughput_degradation_slope_pct_per_1k": missing(reason, "%")}


def _row(ctx: Context, cache: Callable[[], Any], depth: int, tokens: int) -> dict[str, Any]:
    ctx.progress(f"context {depth}")
    return _latency(cache(), depth, times_at_depth(ctx, cache(), depth, tokens))


def _prompt(ctx: Context, cache: Callable[[], Any], depth: int, length: int) -> dict[str, Any]:
    ctx.progress(f"prompt of {length} at a context of {depth}")
    cache().fill_random(depth)
    series = prompt_times(ctx, cache(), length, depth, timing.QUICK if ctx.quick else PROMPT_RULE)
    latency = series.summary(method="wall clock until idle")
    return {"tok_s": statistics.rate(latency["median"], 1e3 * length, "tok/s"), "latency": latency}


def _shortest_row(ctx: Context, tokens: int) -> dict[str, Any]:
    """In a cache of its own: one that is made for 16k tokens divides even a short context among many blocks."""
    ctx.progress(f"context {SHORTEST}")
    cache = ctx.new_cache(WARM_UP_TOKENS + SHORT_RUN)
    [times] = short_times(ctx, [cache], -(-tokens // SHORT_RUN))
    return _latency(cache, SHORTEST, times)


def _latency(cache: Any, depth: int, times: Sequence[float]) -> dict[str, Any]:
    return {
        "latency": statistics.summarise(times, "ms", run=SHORT_RUN, run_tokens=SHORT_RUN),
        # Of a cache that is just long enough; the one measured on may be longer.
        "kv_cache_bytes": measured(cache.nbytes * depth // cache.max_len, "bytes"),
    }


def _described(ctx: Context, depth: int, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the report from what was measured of it."""
    synthetic = depth + SHORT_RUN > ctx.config.max_context  # the tokens that are timed lie behind the depth
    latency = inner(row, "latency", unit="ms")
    rate = (
        missing(latency["reason"], "tok/s")
        if is_metric(latency)
        else statistics.rate(latency["median"], 1e3, "tok/s", context=depth, synthetic=synthetic)
    )
    return {
        **fields(row),
        "context": depth,
        "synthetic": synthetic,
        "latency": latency,
        "tok_s": rate,
        "kv_cache_bytes": inner(row, "kv_cache_bytes", unit="bytes"),
    }


def _growth(shortest: dict[str, Any], deepest: dict[str, Any]) -> Metric:
    """Of the median times of two rows."""
    above, below = (inner(row["latency"], "median", unit="x") for row in (deepest, shortest))
    of = f"time a token at context {deepest['context']} over {shortest['context']}"
    return statistics.ratio(above, below, of=of)
