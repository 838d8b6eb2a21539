"""Tokens as a user gets them: time to the first, processing of the prompt, gaps between the next ones, throughput.

Boundary: the engine. Token ids go in and come out; no tokeniser, no network. Decoding runs from an empty cache in
runs of `Plan.run_tokens` tokens, again and again, so that the context stays short however many samples are wanted
(:mod:`.scaling` measures long ones). It grows within a run all the same: the spread and the upper percentiles of the
token latencies hold that growth beside the jitter. Gaps are differences of neighbours within a run.

Results of :func:`run`:

    plan                    what was asked for; the runs end early at the time limit
    first_token             series in ms: prompt ids on the host -> first greedy token on the host, wall clock
    prompts                 one row for each prompt length: series in ms until the device is idle, tokens/s
    batches                 one row for each number of sequences decoded side by side: series in ms of a step, which is
                            a token of each of them, and tokens/s of all together
    sampling                one row for each way to choose the next token: series in ms, and what it costs over greedy
    token_latency           series in ms: CUDA events around each graph launch (the token stays on the device), or the
                            wall clock on NumPy
    token_latency_streamed  series in ms: wall clock when the host reads every token before the next one; null on NumPy,
                            whose token_latency is that
    throughput_tok_s        tokens/s of whole runs: wall clock, one synchronisation at the end; on NumPy of the runs of
                            token_latency. `context` is the mean over a run
    conditions              of the GPU meanwhile
    *_token_latency_ms, token_gap_variance_ms2, time_to_first_token_ms
    prompt_tok_s            of the longest prompt up to :data:`REPORTED_PROMPT` tokens
    batch_tok_s             of the largest batch
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from ...sampling import Sampling
from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, fields, inner, is_metric, missing

PROMPT_TOKENS = 128
REPORTED_PROMPT = 512
LONG_PROMPT = 4096
"""Measured too, where the model was made for contexts that long."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_k=40, top_p=0.95), Sampling(temperature=1.0))
"""Greedy first, what the others are compared with; then the filters that chats use, and the whole vocabulary."""
PROMPT_SEED = 0
"""Of the token ids of every prompt."""
WARM_UP_TOKENS = 4
"""Decoded before the first timed token, so that the device is busy and the host ahead of it when timing begins."""

SHORT_RUN = 16
"""Timed tokens of a run, after the warm-up, where the context is to stay as it is."""

_FIRST_TOKEN = 1  # decoding needs some id to start from; its value costs nothing


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        run_tokens: tokens of one run, from an empty cache.
        tokens: samples wanted of the token latency; p99 needs 1,000 for ten beyond it.
        runs: fewest runs; six give the median of their rates an interval.
        limit_s: seconds after which no run beyond these begins, for each series and for throughput.
        prompts: prompt lengths in tokens, ascending.
        batches: sequences decoded side by side.
        short_runs: runs of :data:`SHORT_RUN` tokens for each batch and for each way of sampling.
        rule: when a prompt's series has enough samples.
    """

    run_tokens: int
    tokens: int
    runs: int
    limit_s: float
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    short_runs: int
    rule: timing.StopRule


PROMPT_RULE = timing.StopRule(relative_error=0.005, min_samples=10, min_seconds=0.5, max_seconds=3)
_QUICK_PROMPT_RULE = timing.StopRule(relative_error=0.02, min_samples=3, min_seconds=0.05, max_seconds=0.5)


def _plan(ctx: Context) -> Plan:
    prompts: tuple[int, ...] = (32, 128) if ctx.no_gpu else (PROMPT_TOKENS, REPORTED_PROMPT, LONG_PROMPT)
    batches = BATCHES[:2] if ctx.no_gpu else BATCHES
    if ctx.quick:
        return Plan(32, 64, 2, 1, prompts[:1], batches[:1] if ctx.no_gpu else (1, 4), 1, _QUICK_PROMPT_RULE)
    # A long prompt is worth its time where the model was made for it; the others are compared between all models.
    prompts = tuple(n for n in prompts if n <= max(REPORTED_PROMPT, ctx.config.max_context))
    return Plan(32 if ctx.no_gpu else 128, 1152, 6, 6, prompts, batches, 2 if ctx.no_gpu else 16, PROMPT_RULE)


def run(ctx: Context) -> dict[str, Any]:
    """Measure everything in the module's table. Milliseconds and tokens a second."""
    with ctx.telemetry.watch() as conditions:
        figures = _measure(ctx, _plan(ctx))
    return {**figures, "conditions": conditions}


def _measure(ctx: Context, plan: Plan) -> dict[str, Any]:
    def row(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return ctx.row(f"tokens/{what}", "engine", measure)

    def rows(what: str, numbers: Sequence[int], measure: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        """One for each number, measured in the order of this run."""
        found = {n: row(f"{what} {n}", partial(measure, ctx, n, plan)) for n in ctx.shuffled(what, numbers)}
        return [found[n] for n in numbers]

    first = row("first token", lambda: _first_token(ctx, plan))
    prompts = [
        {"tokens": n, "tok_s": inner(r, "tok_s", unit="tok/s"), "latency": inner(r, "latency", unit="ms"), **fields(r)}
        for n, r in zip(plan.prompts, rows("prompt", plan.prompts, _prompt), strict=True)
    ]
    token = row("latency", lambda: _latency(ctx, plan))
    streamed = row("streamed", lambda: _streamed(ctx, plan))
    throughput = row("throughput", lambda: _throughput(ctx, plan, token))
    batches = [
        {"batch": n, "tok_s": inner(r, "tok_s", unit="tok/s"), "latency": inner(r, "latency", unit="ms"), **fields(r)}
        for n, r in zip(plan.batches, rows("batch", plan.batches, _batch), strict=True)
    ]
    samplings = row("sampling", lambda: _samplings(ctx, plan))
    reported = next(row for row in reversed(prompts) if row["tokens"] <= REPORTED_PROMPT)
    return {
        "boundary": "engine",
        "plan": {
            "run_tokens": plan.run_tokens,
            "tokens": plan.tokens,
            "runs": plan.runs,
            "limit_s": plan.limit_s,
            "warm_up_tokens": WARM_UP_TOKENS,
            "short_runs": plan.short_runs,
            "short_run_tokens": SHORT_RUN,
        },
        "first_token": first,
        "prompts": prompts,
        "token_latency": token,
        "token_latency_streamed": streamed,
        "throughput_tok_s": throughput,
        "batches": batches,
        "sampling": samplings
        if is_metric(samplings)
        else [{**row, **{key: samplings[key] for key in ("boundary", "conditions")}} for row in samplings["rows"]],
        "time_to_first_token_ms": {**inner(first, "median", unit="ms"), "prompt_tokens": PROMPT_TOKENS},
        "prompt_tok_s": {**reported["tok_s"], "prompt_tokens": reported["tokens"]},
        "batch_tok_s": {**batches[-1]["tok_s"], "batch": batches[-1]["batch"]},
        **{f"{p}_token_latency_ms": inner(token, p, unit="ms") for p in ("mean", "p50", "p90", "p95", "p99", "max")},
        "token_gap_variance_ms2": inner(token, "gap_variance", unit="ms^2"),
    }


# ---- shared with the other parts ------------------------------------------------------------------------------------


def synchronise(ctx: Context) -> None:
    """Wait until the device has done everything that was enqueued; nothing to wait for on NumPy."""
    if not ctx.no_gpu:
        import cupy

        cupy.cuda.Device().synchronize()


def decode_times(ctx: Context, cache: Any, n: int) -> list[float]:
    """Milliseconds of each of `n` steps, a token a sequence, one after the other, behind :data:`WARM_UP_TOKENS` others.

    On CUDA the distance of two events on the stream, one behind each token's graph: the host runs ahead, nothing waits.
    On NumPy the wall clock.
    """
    if ctx.no_gpu:
        return wall_times(ctx, cache, n)
    return timing.event_gaps(_Chain(ctx, cache), n)


class _Chain:
    """Each call decodes the next token of a cache, behind the :data:`WARM_UP_TOKENS` that its making decodes."""

    def __init__(self, ctx: Context, cache: Any):
        self._model, self._cache = ctx.model, cache
        self.token: Any = [_FIRST_TOKEN] * cache.batch
        for _ in range(WARM_UP_TOKENS):
            self()

    def __call__(self) -> None:
        self.token = self._model.decode_one_token(self.token, self._cache)


def times_at_depth(ctx: Context, cache: Any, depth: int, n: int) -> list[float]:
    """:func:`decode_times` of `n` tokens behind a context of `depth`, in runs of :data:`SHORT_RUN` from there.

    Behind it, as other engines count depth: a kernel that takes a step at a power of two has not half of its samples on
    either side. In short runs: the samples are of one context, not of a growing one.
    """
    return _at_depth(decode_times, ctx, cache, depth, n)


def wall_times_at_depth(ctx: Context, cache: Any, depth: int, n: int) -> list[float]:
    """:func:`wall_times` as :func:`times_at_depth`."""
    return _at_depth(wall_times, ctx, cache, depth, n)


def _at_depth(times: Callable[..., list[float]], ctx: Context, cache: Any, depth: int, n: int) -> list[float]:
    begin = depth - WARM_UP_TOKENS
    cache.fill_random(begin)
    found: list[float] = []
    while len(found) < n:
        cache.truncate(begin)
        found += times(ctx, cache, min(SHORT_RUN, n - len(found)))
    return found


def short_times(ctx: Context, caches: Sequence[Any], runs: int) -> list[list[float]]:
    """:func:`decode_times` of runs of :data:`SHORT_RUN` steps for each cache, each run from the empty cache.

    The caches take turns, so that what slows the machine down for a while meets all of them. One more run of each goes
    before these; it compiles, allocates and warms up.
    """
    times: list[list[float]] = [[] for _ in caches]
    for run in range(runs + 1):
        for cache, series in zip(caches, times, strict=True):
            cache.truncate(0)
            run_times = decode_times(ctx, cache, SHORT_RUN)
            series += run_times if run else ()
    return times


def wall_times(ctx: Context, cache: Any, n: int) -> list[float]:
    """Like :func:`decode_times`, but by the wall clock, and the host reads each token before it asks for the next."""
    chain = _Chain(ctx, cache)
    synchronise(ctx)

    def step() -> None:
        chain()
        int(chain.token[0])

    return timing.wall_gaps(step, n)


# ---- prompt ---------------------------------------------------------------------------------------------------------


def _prompt_ids(ctx: Context, n: int) -> np.ndarray:
    return np.random.default_rng(PROMPT_SEED).integers(0, ctx.config.vocab_size, n, dtype=np.int32)


def _first_token(ctx: Context, plan: Plan) -> dict[str, Any]:
    ctx.progress(f"time to the first token, prompt of {PROMPT_TOKENS}")
    ids, cache = _prompt_ids(ctx, PROMPT_TOKENS), ctx.new_cache(PROMPT_TOKENS)

    def call() -> None:
        logits = ctx.model.prefill(ids, cache)
        # On CUDA the step itself chooses the token and leaves it in the cache.
        int(logits.argmax() if ctx.no_gpu else cache.token[0])

    return timing.wall_clock(call, plan.rule, "ms", prepare=lambda: _cut(ctx, cache, 0)).summary(
        series="end_to_end", prompt_tokens=PROMPT_TOKENS, method="wall clock, host ids to first token on the host"
    )


def _prompt(ctx: Context, n: int, plan: Plan) -> dict[str, Any]:
    ctx.progress(f"prompt of {n}")
    latency = prompt_times(ctx, ctx.new_cache(n), n, 0, plan.rule).summary(method="wall clock until idle")
    return {"tok_s": statistics.rate(latency["median"], 1e3 * n, "tok/s"), "latency": latency}


def prompt_times(ctx: Context, cache: Any, n: int, depth: int, rule: timing.StopRule) -> timing.Samples:
    """Milliseconds until the device has processed a prompt of `n` behind the first `depth` tokens of `cache`."""
    ids = _prompt_ids(ctx, n)

    def call() -> None:
        ctx.model.prefill(ids, cache)
        synchronise(ctx)

    return timing.wall_clock(call, rule, "ms", prepare=lambda: _cut(ctx, cache, depth))


def _cut(ctx: Context, cache: Any, length: int) -> None:
    cache.truncate(length)
    synchronise(ctx)


# ---- generation -----------------------------------------------------------------------------------------------------


def _latency(ctx: Context, plan: Plan) -> dict[str, Any]:
    """The gaps between tokens that nobody waits for; on NumPy each is on the host as soon as it is made."""
    ctx.progress("gaps between tokens")
    return _series(ctx, plan, decode_times, "wall clock" if ctx.no_gpu else "CUDA events around each graph launch")


def _streamed(ctx: Context, plan: Plan) -> dict[str, Any]:
    if ctx.no_gpu:
        return missing("on NumPy every token is on the host: token_latency is this series", "ms")
    ctx.progress("gaps between tokens that the host reads")
    return _series(ctx, plan, wall_times, "wall clock, the host reads each token")


def _series(ctx: Context, plan: Plan, times: Callable[..., list[float]], method: str) -> dict[str, Any]:
    runs, stop = _runs(ctx, plan, times)
    method = f"{method}; upper percentiles hold the growth of the context within a run beside the jitter"
    samples = [ms for run in runs for ms in run]
    detail = {"run_tokens": plan.run_tokens, "method": method, "stop": stop}
    at_s = np.cumsum(samples) / 1e3  # of the tokens themselves, without the breaks between the runs
    return statistics.summarise(samples, "ms", list(map(float, at_s)), plan.run_tokens, **detail)


def _throughput(ctx: Context, plan: Plan, token: dict[str, Any]) -> Metric:
    """Tokens a second of whole runs; on NumPy of those that `token`, the series of gaps, is made of."""
    context = WARM_UP_TOKENS + plan.run_tokens // 2
    if not ctx.no_gpu:
        ctx.progress("throughput")
        runs, _ = _runs(ctx, plan, _rate)
        rates, method = [rate for run in runs for rate in run], "wall clock of whole runs, median of runs"
    elif is_metric(token):
        return missing(token["reason"], "tok/s")
    else:
        gaps = np.reshape(token["samples"], (-1, plan.run_tokens))
        rates, method = list(1e3 / gaps.mean(axis=1)), "runs of token_latency, median of runs"
    return statistics.median(rates, "tok/s", context=context, run_tokens=plan.run_tokens, method=method, samples=rates)


def _runs(ctx: Context, plan: Plan, measure: Callable[..., list[float]]) -> tuple[list[list[float]], str]:
    """What `measure(ctx, cache, n)` returns of each run from an empty cache, after one that counts for nothing.

    Also why there are not more of them.
    """
    cache = ctx.new_cache(WARM_UP_TOKENS + plan.run_tokens)
    measure(ctx, cache, plan.run_tokens)  # compiles, allocates and warms up everything that a run needs
    runs: list[list[float]] = []
    start = time.perf_counter()
    while len(runs) * plan.run_tokens < plan.tokens:
        if len(runs) >= plan.runs and time.perf_counter() - start >= plan.limit_s:
            return runs, f"time limit of {plan.limit_s} s"
        cache.truncate(0)
        runs.append(measure(ctx, cache, plan.run_tokens))
    return runs, f"{plan.tokens} tokens"


def _rate(ctx: Context, cache: Any, n: int) -> list[float]:
    """Tokens a second of one run, by the wall clock, with one synchronisation at its end."""
    chain = _Chain(ctx, cache)
    synchronise(ctx)

    def whole() -> None:
        for _ in range(n):
            chain()
        synchronise(ctx)

    return [1e3 * n / timing.wall_gaps(whole, 1)[0]]


# ---- several sequences, and other ways to choose a token ------------------------------------------------------------


def _batch(ctx: Context, batch: int, plan: Plan) -> dict[str, Any]:
    """So many sequences side by side, all as short as in :func:`short_times`."""
    ctx.progress(f"batch of {batch}")
    [times] = short_times(ctx, [_short_cache(ctx, batch)], plan.short_runs)
    latency = _short_series(times)
    rate = statistics.rate(latency["median"], 1e3 * batch, "tok/s", of="all sequences together")
    return {"tok_s": rate, "latency": latency}


def _samplings(ctx: Context, plan: Plan) -> dict[str, Any]:
    """`rows`, one for each of :data:`SAMPLINGS`; its cost is the difference to the greedy token of the same turn."""
    ctx.progress("ways to choose a token")
    caches = [_short_cache(ctx, sampling=sampling) for sampling in SAMPLINGS]
    greedy, *others = short_times(ctx, caches, plan.short_runs)
    costs = [statistics.median([1e3 * (a - b) for a, b in zip(times, greedy, strict=True)], "us") for times in others]
    rows = zip(SAMPLINGS, (greedy, *others), (missing("this is greedy", "us"), *costs), strict=True)
    return {
        "rows": [
            {"sampling": name(sampling), "latency": _short_series(times), "over_greedy_us": cost}
            for sampling, times, cost in rows
        ]
    }


def name(sampling: Sampling) -> str:
    """What of it is not the default, in words."""
    said = {field: value for field, value in asdict(sampling).items() if value != getattr(Sampling, field)}
    return ", ".join(f"{field} {value:g}" for field, value in said.items()) or "greedy"


def _short_cache(ctx: Context, batch: int = 1, sampling: Sampling | None = None) -> Any:
    return ctx.new_cache(WARM_UP_TOKENS + SHORT_RUN, batch, sampling)


def _short_series(times: Sequence[float]) -> dict[str, Any]:
    return statistics.summarise(times, "ms", run=SHORT_RUN, context=WARM_UP_TOKENS + SHORT_RUN // 2)
