"""Where a token's microseconds go: its graph again and again, each time without one kind of kernel.

A kind of kernel costs what a token gains when it is left out. Kernels overlap (the next one loads its weights while its
predecessor still computes), and what is left out takes its share of the overlap with it: the costs need not add up to
the token's time, and one is below 0 where the kernels that are left lose more overlap than it takes. Beside each cost
stands its floor, what the memory alone would take, and the gap between the two. What the graphs compute is meaningless,
so nothing but their time is looked at.

The four products of a layer may share one kernel, so kinds are told apart by the order of the launches, which repeats
itself in every layer. The kernel that ends a step is absent from all graphs but one: without it the context keeps its
length, and no token is taken from logits that were never computed. Its own cost is what that one graph takes longer.

Results of :func:`run`:

    meaning         how to read it, in one sentence
    context         keys and values in the cache
    token_us        median time of the whole graph
    sum_us          of the costs below
    kernels         one row a kind: kernels, file, launches a token, time, floor and gap in microseconds
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, is_metric, measured, missing
from .latency import Problem, cold_weights, measure_bandwidth, measure_floor
from .utilisation import CONTEXT

LAST = "next_token"
"""The kind that ends a greedy step."""

_PRODUCTS = ("rmsnorm_ternary_matmul", "ternary_matmul", "ternary_gemm")
_BEFORE_PRODUCTS = ("rmsnorm", "quantise_tiles")  # launches of their own that belong to the product behind them
_REPLAYS, _LEAD = 8, 2  # timed replays of a graph for one sample, behind others that keep the device busy
_FIRST_TOKEN = 1  # decoding needs some id to start from
_MEANING = (
    "time: what a token gains when these launches are left out of its graph, below 0 where those that are left can "
    "overlap less; floor: what their bytes alone take; the times need not add up to the token's, as kernels overlap"
)
_NO_FLOOR = "it moves too few bytes for the memory to be its bound"


def run(ctx: Context) -> dict[str, Any]:
    """Leave out one kind after the other, round by round, and set the costs beside their floors. Needs a GPU."""
    caches, order, kinds = record(ctx)
    ctx.progress("a token without one kind of kernel after the other")
    samples = _samples(ctx, caches, rounds=8 if ctx.quick else 40)
    floors = _floors(ctx, caches[None], set(kinds))
    return table(samples, describe(order, kinds), floors)


# ---- kinds of launches ----------------------------------------------------------------------------------------------


def kinds_of(files: Sequence[str], products: Sequence[str]) -> list[str]:
    """The kind of each launch of a token, in order.

    Args:
        files: the kernels' files.
        products: names of a layer's products, in the order in which they run.

    Returns:
        The product that a launch computes, or prepares; else the name of its file. The file's name for all, where the
        launches are not whole rounds through the products.
    """
    stems = [file.removesuffix(".cu") for file in files]
    if sum(stem in _PRODUCTS for stem in stems) % len(products):
        return stems
    kinds, done = [], 0
    for i, stem in enumerate(stems):
        prepares = stem in _BEFORE_PRODUCTS and stems[i + 1 : i + 2] and stems[i + 1] in _PRODUCTS
        kinds.append(products[done % len(products)] if prepares or stem in _PRODUCTS else stem)
        done += stem in _PRODUCTS
    return kinds


def variants(kinds: Iterable[str]) -> dict[str | None, frozenset[str]]:
    """What is left out: of the whole graph (None) nothing, of each other :data:`LAST` and one kind."""
    return {None: frozenset[str](), **{kind: frozenset({LAST, kind}) for kind in (LAST, *dict.fromkeys(kinds))}}


def skip(kinds: Iterable[str], left_out: Container[str]) -> Callable[[str], bool]:
    """For one capture: whether a launch, called upon in order, is one of those left out. Its name tells too little."""
    turn = iter(kinds)

    def asked(name: str) -> bool:
        if (kind := next(turn, None)) is None:
            raise RuntimeError(f"one launch more than when the token was first recorded: {name}")
        return kind in left_out

    return asked


def describe(order: Sequence[tuple[str, str]], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Kind -> kernels, files and launches a token, in the order of a token."""
    rows: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(kinds):
        launches = [launch for launch, k in zip(order, kinds, strict=True) if k == kind]
        names, files = (list(dict.fromkeys(column)) for column in zip(*launches, strict=True))
        rows[kind] = {"kernels": names, "files": files, "launches_per_token": len(launches)}
    return rows


# ---- from samples to the table --------------------------------------------------------------------------------------


def table(
    samples: Mapping[str | None, Sequence[float]], rows: Mapping[str, dict[str, Any]], floors: Mapping[str, Metric]
) -> dict[str, Any]:
    """The results of :func:`run`.

    Args:
        samples: microseconds of each of :func:`variants`, one a round; the samples of a round are neighbours in time.
        rows: see :func:`describe`.
        floors: kind -> microseconds a token, for those that have one.
    """
    kernels = []
    for kind, what in rows.items():
        slow, fast = (samples[None], samples[LAST]) if kind == LAST else (samples[LAST], samples[kind])
        time = statistics.median([a - b for a, b in zip(slow, fast, strict=True)], "us")
        floor = floors.get(kind, missing(_NO_FLOOR, "us"))
        gap = missing(floor["reason"], "us") if floor["value"] is None else _gap(time, floor)
        kernels.append({"kind": kind, **what, "time_us": time, "floor_us": floor, "gap_us": gap})
    return {
        "meaning": _MEANING,
        "context": CONTEXT,
        "token_us": statistics.median(samples[None], "us", method="replays of the whole graph between two events"),
        "sum_us": measured(sum(row["time_us"]["value"] for row in kernels), "us", of="the times of all kinds"),
        "kernels": kernels,
    }


def _gap(time: Metric, floor: Metric) -> Metric:
    return measured(time["value"] - floor["value"], "us")


# ---- on the GPU -----------------------------------------------------------------------------------------------------


def record(ctx: Context) -> tuple[dict[str | None, Any], list[tuple[str, str]], list[str]]:
    """Caches at a depth of :data:`.utilisation.CONTEXT`, of which each has the graph of one of :func:`variants`.

    Also (name, file) and kind of each launch of the whole graph, in order.
    """
    from ...kernels import loaded

    names: list[str] = []

    def note(name: str) -> bool:
        names.append(name)
        return False

    whole = _recorded(ctx, note)
    files = {kernel.spec.name: kernel.spec.file for kernel in loaded()}
    order = [(name, files[name]) for name in names]
    kinds = kinds_of([file for _, file in order], list(ctx.config.products()))
    without = {kind: left_out for kind, left_out in variants(kinds).items() if kind}
    return {None: whole, **{kind: _recorded(ctx, skip(kinds, out)) for kind, out in without.items()}}, order, kinds


def _recorded(ctx: Context, skip: Callable[[str], bool]) -> Any:
    """A cache whose graph, which its first token makes and its later ones replay, lacks launches."""
    cache = ctx.new_cache(CONTEXT + _LEAD + _REPLAYS)
    cache.fill_random(CONTEXT)
    with leaving_out(skip):
        ctx.model.decode_one_token(_FIRST_TOKEN, cache)
    return cache


@contextmanager
def leaving_out(skip: Callable[[str], bool]) -> Iterator[None]:
    """Inside, launches of whose kernels' names `skip` says so are not made; it is asked for each, in order."""
    from ...kernels.loader import Kernel

    launch = Kernel.__call__

    def unless_skipped(kernel: Any, *args: Any, **options: Any) -> None:
        if not skip(kernel.spec.name):
            launch(kernel, *args, **options)

    with mock.patch.object(Kernel, "__call__", unless_skipped):
        yield


def _samples(ctx: Context, caches: Mapping[str | None, Any], rounds: int) -> dict[str | None, list[float]]:
    """Microseconds of a token by each graph, one sample a round: a drift of the clocks meets all of them alike."""
    import cupy as cp

    begin, end = cp.cuda.Event(), cp.cuda.Event()

    def sample(cache: Any) -> float:
        cache.truncate(CONTEXT)
        for _ in range(_LEAD):
            ctx.model.decode_one_token(cache.token, cache)
        begin.record()
        for _ in range(_REPLAYS):
            ctx.model.decode_one_token(cache.token, cache)
        end.record()
        end.synchronize()
        return 1e3 * float(cp.cuda.get_elapsed_time(begin, end)) / _REPLAYS

    samples: dict[str | None, list[float]] = {kind: [] for kind in caches}
    for turn in range(rounds + 1):
        for kind, cache in caches.items():
            us = sample(cache)
            if turn:  # the first round uploads the graphs
                samples[kind].append(us)
    return samples


def _floors(ctx: Context, cache: Any, kinds: Container[str]) -> dict[str, Metric]:
    """Microseconds a token: products by a kernel that only reads their weight, the others by the measured bandwidth."""
    rule = timing.QUICK
    floors = {}
    for product, (m, k) in ctx.config.products().items():
        if product in kinds:
            ctx.progress(f"floor of {product} {m} x {k}")
            packed = [w.packed for w in cold_weights(Problem.random(product, m, k).W)]
            floors[product] = _each_layer(ctx, measure_floor(ctx, packed, "cold", rule))
    ctx.progress("memory bandwidth")
    bandwidth = measure_bandwidth(ctx, rule)
    cached = cache.nbytes * CONTEXT // cache.max_len
    for kind, read in (("lm_head", ctx.model.head_bytes), ("attention", cached), ("attention_decode", cached)):
        floors[kind] = (
            missing(bandwidth["reason"], "us")
            if bandwidth["value"] is None
            else measured(read / bandwidth["value"] / 1e3, "us", bytes=read, of="the bandwidth measured here")
        )
    return floors


def _each_layer(ctx: Context, floor: dict[str, Any]) -> Metric:
    """The floor of one product, as often as a token has it."""
    if is_metric(floor):
        return missing(floor["reason"], "us")
    layers = ctx.config.num_layers
    return measured(layers * floor["median"]["value"], "us", layers=layers, of="a kernel that only reads, cold L2")
