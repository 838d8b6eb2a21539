"""The fused product on the shapes of public models: `edgellm bench latency --shapes table`.

For each shape of :data:`.shapes.TABLE`, each number of tokens and both activations: `rmsnorm_ternary_matmul` with
``strategy="adaptive"`` inside CUDA graphs, cold and warm, beside the floor and cuBLAS in float16. For one token also
``alone``, where no launch starts before its predecessor has ended; the floor and cuBLAS never do. For
:data:`STRATEGY_TOKENS` also the two strategies that "adaptive" chooses from. The floor, each activation and each
baseline are rows of the run of their own, with their own conditions; the seed draws the order of a shape's rows, and of
the series in a row.

Every series is checked on a poisoned result before and after it: no result may be left unwritten, and a random sample
of tokens and rows is compared with the float64 reference. What is wrong has no speed, and the run has failed.

What takes the place of `products` in the latency part:

    table     {op, dtype, gamma_dtype, eps, shapes: [{model, layer, m, k, weight_bytes, floor, tokens: [{n, bytes,
              baselines, rows}]}]}; a time is a median in microseconds with its samples, the launches of its graph, and
              the copies of the weight that the graph reads in turn
    summary   see :func:`..reporting.table_figures.summary`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

import edgellm_cupy as ec

from ...formats import packing
from ...kernels.launch import overlap
from ...reference import accuracy
from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, inner, is_metric, measured, missing
from ..reporting import table_figures
from ..timing import Rotation, StopRule
from .baselines import BaselineUnavailableError, CuBlas, load_cublas
from .latency import ACTIVATIONS, EPS, L2, about, cold_weights, measure_bandwidth, measure_floor, with_conditions
from .roofline import current_roof_facts, roofline
from .shapes import TABLE, Shape

STRATEGIES = ("streaming", "separate")
STRATEGY_TOKENS = (1, 4, 16, 64)
BASELINES = {"cublas_fp16": L2, "cublas_fp16_product": ("cold",)}
"""And the series of each."""

_RULE = StopRule(relative_error=0.01, min_samples=10, min_seconds=0.0, max_seconds=0.1)
_QUICK = StopRule(relative_error=0.05, min_samples=3, min_seconds=0.0, max_seconds=0.02)
_SAMPLE_TOKENS = 8
_SAMPLE_WEIGHTS = 1 << 20  # of the sampled rows: some 30 ms of reference
_BYTES = np.array([b for b in range(256) if not b & b >> 1 & 0x55], np.uint8)  # without the code 3

Call = Callable[[], None]


def run(ctx: Context) -> dict[str, Any]:
    """Measure every shape for each number of tokens in `ctx.tokens`."""
    facts = {
        "op": "rmsnorm_ternary_matmul", "strategy": "adaptive", "dtype": "float16", "gamma_dtype": "float16",
        "eps": EPS,
    }  # fmt: skip
    figures = _run_numpy(ctx, ctx.no_gpu) if ctx.no_gpu else _run_cuda(ctx)
    table = {**facts, "shapes": figures.pop("shapes")}
    bandwidth = figures["bandwidth"]
    roof = missing(ctx.no_gpu) if ctx.no_gpu else roofline(table["shapes"], bandwidth, current_roof_facts())
    return {
        **figures,
        "products": {},
        "table": table,
        "summary": table_figures.summary(table),
        "roofline": roof,
    }


def _run_numpy(ctx: Context, no_gpu: str) -> dict[str, Any]:
    """Nothing is measured: the reference would take minutes for one of the larger products."""
    shapes = [_unmeasured(ctx, shape, no_gpu) for shape in TABLE]
    return {"bandwidth": missing(no_gpu, "GB/s"), "cublas": missing(no_gpu), "shapes": shapes}


def _run_cuda(ctx: Context) -> dict[str, Any]:
    import cupy as cp

    ctx.progress("memory bandwidth")
    bandwidth = ctx.row("latency/bandwidth", "kernel", lambda: measure_bandwidth(ctx, timing.QUICK))
    cublas, library = load_cublas()
    found = {}
    for shape in ctx.shuffled("shapes", TABLE):
        found[shape] = _Product(ctx, shape, cublas, bandwidth).measure()
        cp.get_default_memory_pool().free_all_blocks()  # the next shape's copies have another size
    return {"bandwidth": bandwidth, "cublas": library, "shapes": [found[shape] for shape in TABLE]}


def _unmeasured(ctx: Context, shape: Shape, reason: str) -> dict[str, Any]:
    """A shape without a time."""
    nothing = missing(reason)
    floor, found = dict.fromkeys(L2, nothing), dict.fromkeys((*BASELINES, *ACTIVATIONS), nothing)
    return {
        **_facts(shape),
        "floor": floor,
        "tokens": [_entry(shape, n, found, floor, nothing, nothing) for n in ctx.tokens],
    }


# ---- one problem and its check --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One product on the host, the same for every run.

    Attributes:
        x: float16 [N, K], for the most tokens; fewer are its first ones.
        gamma: float16 [K].
        W: ternary [M, K] with a scale a row that float16 holds exactly, so that cuBLAS has the same weights to the bit.
    """

    shape: Shape
    x: np.ndarray
    gamma: np.ndarray
    W: ec.TernaryWeight

    @classmethod
    def random(cls, shape: Shape, n: int) -> Problem:
        m, k = shape.m, shape.k
        rng = np.random.default_rng((m, k))
        codes = rng.integers(0, len(_BYTES), (m, packing.chunks(k), packing.CHUNK_BYTES), dtype=np.uint8)
        scale = (rng.uniform(0.5, 1.5, m) / np.sqrt(k)).astype(np.float16).astype(np.float32)
        return cls(
            shape,
            rng.standard_normal((n, k), dtype=np.float32).astype(np.float16),
            rng.uniform(0.5, 1.5, k).astype(np.float16),
            ec.TernaryWeight.from_packed(_BYTES[codes], scale, (m, k)),
        )

    def sample(self, n: int, activation: str, fused: bool = True) -> Sample:
        """The check of `n` tokens; the last token and row are always in it."""
        m, k = self.shape.m, self.shape.k
        rng = np.random.default_rng((m, k, n))
        tokens = _choose(rng, n, _SAMPLE_TOKENS)
        rows = _choose(rng, m, _SAMPLE_WEIGHTS // k)
        weight = ec.TernaryWeight(self.W.packed[rows], self.W.scale[rows], (len(rows), k))
        gamma = self.gamma if fused else None
        return Sample(tokens, rows, accuracy.bound(self.x[tokens], gamma, weight, eps=EPS, activation=activation))


def bytes_moved(shape: Shape, n: int) -> int:
    """What `n` tokens must move: codes and scales, norm weights, activations and results in float16."""
    code_bytes = packing.chunks(shape.k) * packing.CHUNK_BYTES
    return shape.m * (code_bytes + 4) + 2 * (shape.k + n * (shape.k + shape.m))


def _choose(rng: np.random.Generator, size: int, most: int) -> np.ndarray:
    """Sorted indices below `size`: all of them, or `most`, of which one is the last."""
    if size <= most:
        return np.arange(size)
    return np.append(np.sort(rng.choice(size - 1, most - 1, replace=False)), size - 1)


@dataclass(frozen=True)
class Sample:
    """Which results of a product are compared with the reference, and what they may be.

    Attributes:
        tokens, rows: indices, sorted.
        bound: of their results, [tokens, rows].
    """

    tokens: np.ndarray
    rows: np.ndarray
    bound: accuracy.Bound

    def check(self, y: Any) -> str | None:
        """None when `y`, CuPy float16 [N, M] or [M], was written everywhere and is right in the sample."""
        import cupy as cp

        y = y.reshape(-1, y.shape[-1])
        if unwritten := int(cp.isnan(y).sum()):
            return f"{unwritten} of {y.size} results are NaN"
        wrong = self.bound.check(y[cp.asarray(self.tokens)[:, None], cp.asarray(self.rows)].get())
        return wrong and f"in a sample of {len(self.tokens)} tokens and {len(self.rows)} rows: {wrong}"


# ---- measuring ------------------------------------------------------------------------------------------------------


class _Product:
    """All measurements of one shape on the GPU: device arrays are made once and shared."""

    def __init__(
        self,
        ctx: Context,
        shape: Shape,
        cublas: CuBlas | BaselineUnavailableError,
        bandwidth: Metric,
    ):
        import cupy as cp

        self._ctx, self._shape, self._cp, self._cublas = ctx, shape, cp, cublas
        self._bandwidth = bandwidth
        self._launches: dict[str, int] = {}  # in a graph, by row: its series differ in nothing else
        self._rule = _QUICK if ctx.quick else _RULE

    # Made by the first row that needs them: what does not fit into memory costs rows, and a row that is there nothing.

    @cached_property
    def _p(self) -> Problem:
        return Problem.random(self._shape, max(self._ctx.tokens))

    @cached_property
    def _x(self) -> Any:
        return self._cp.asarray(self._p.x)

    @cached_property
    def _gamma(self) -> Any:
        return self._cp.asarray(self._p.gamma)

    @cached_property
    def _y(self) -> Any:
        return self._cp.empty((len(self._p.x), self._shape.m), self._cp.float16)

    @cached_property
    def _copies(self) -> list[ec.TernaryWeight]:
        return cold_weights(self._p.W)

    @cached_property
    def _dense(self) -> list[Any]:
        """Copies of the weight as float16 [M, K], exact, which together exceed the L2 as a cold rotation must."""
        W = self._copies[0]
        dense = W.to_int8().astype(self._cp.float16)
        dense *= W.scale.astype(self._cp.float16)[:, None]
        copies = timing.cold_copies(dense.nbytes, timing.l2_bytes())
        return [dense, *(dense.copy() for _ in range(copies - 1))]

    def measure(self) -> dict[str, Any]:
        """Floor, baselines and activations in a random order, then the entries that compare them."""
        shape, tokens = self._shape, self._ctx.tokens
        measures: dict[Any, Callable[[], dict[str, Metric]]] = {
            "floor": self._floor,
            **{(n, name): partial(self._baseline, n, name) for n in tokens for name in BASELINES},
            **{(n, activation): partial(self._fused, n, activation) for n in tokens for activation in ACTIVATIONS},
        }
        rows = {what: self._row(what, measures[what]) for what in self._ctx.shuffled(shape.name, measures)}
        floor = with_conditions(rows["floor"], L2)
        entries = []
        for n in tokens:
            found = {name: rows[n, name] for name in (*BASELINES, *ACTIVATIONS)}
            entries.append(_entry(shape, n, found, floor, self._bandwidth, measured(bytes_moved(shape, n), "bytes")))
        return {**_facts(shape), "floor": floor, "tokens": entries}

    def _row(self, what: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        shape = self._shape
        name = what if isinstance(what, str) else "{} tokens, {}".format(*what)
        self._ctx.progress(f"{shape.name} {shape.m} x {shape.k}: {name}")
        return self._ctx.row(f"latency/{shape.name}/{name}", "kernel", measure)

    def _floor(self) -> dict[str, Metric]:
        packed = [w.packed for w in self._copies]
        return {l2: _compact(measure_floor(self._ctx, packed, l2, self._rule)) for l2 in L2}

    def _arrays(self, n: int) -> tuple[Any, Any]:
        """x and y of `n` tokens; of one as vectors."""
        return (self._x[:n], self._y[:n]) if n > 1 else (self._x[0], self._y[0])

    def _in_any_order(self, what: str, measures: Mapping[str, Callable[[], Metric]]) -> dict[str, Metric]:
        """What each measures, one after the other as the seed says."""
        return {name: measures[name]() for name in self._ctx.shuffled(f"{self._shape.name} {what}", measures)}

    def _fused(self, n: int, activation: str) -> dict[str, Metric]:
        """The series of the adaptive strategy by the names of their L2, for one token also `alone`; and, cold, by their
        names the two strategies that it chooses from."""
        x, y = self._arrays(n)
        sample = self._p.sample(n, activation)

        def series(strategy: str, l2: str = "cold") -> Metric:
            options = {"eps": EPS, "activation": activation, "strategy": strategy, "out": y}
            calls = [partial(ec.rmsnorm_ternary_matmul, x, self._gamma, w, **options) for w in self._copies]
            found = self._series(f"{n} {activation}", calls, self._p.W.packed.nbytes, l2, y, sample)
            if found["value"] is None and found.get("wrong"):
                self._failed(f"{self._shape.name}, N = {n}, {activation}, {strategy}: {found['reason']}")
            return found

        def alone() -> Metric:
            with overlap(False):
                return series("adaptive")

        kernel: dict[str, Callable[[], Metric]] = {l2: partial(series, "adaptive", l2) for l2 in L2}
        if n == 1:
            kernel["alone"] = alone
        strategies = {s: partial(series, s) for s in STRATEGIES} if n in STRATEGY_TOKENS else {}
        found = self._in_any_order(f"{n} {activation}", {**kernel, **strategies})
        if wrong := next((found[name] for name in kernel if found[name].get("wrong")), None):
            found |= dict.fromkeys(kernel, wrong)
        return found

    def _failed(self, line: str) -> None:
        if line not in self._ctx.failures:
            self._ctx.failures.append(line)

    def _baseline(self, n: int, name: str) -> dict[str, Metric]:
        """Its series by their L2: RMSNorm (ours), then cublasGemmEx on the dense float16 weight; or that alone."""
        if isinstance(self._cublas, BaselineUnavailableError):
            return dict.fromkeys(BASELINES[name], missing(str(self._cublas), "us"))
        fused = name == "cublas_fp16"
        x, y = self._arrays(n)
        product, normed = self._cublas.product, self._cp.empty_like(x)
        sample = self._p.sample(n, "float", fused)

        def call(w: Any) -> None:
            if fused:
                ec.rmsnorm(x, self._gamma, EPS, out=normed)
            product(w, normed if fused else x, y)

        def series(l2: str) -> Metric:
            try:
                calls = [partial(call, w) for w in self._dense]
                return self._series(f"{n} {name}", calls, self._dense[0].nbytes, l2, y, sample)
            except BaselineUnavailableError as e:
                return missing(str(e), "us")

        return self._in_any_order(f"{n} {name}", {l2: partial(series, l2) for l2 in BASELINES[name]})

    def _series(self, row: str, calls: Sequence[Call], copy_bytes: int, l2: str, y: Any, sample: Sample) -> Metric:
        """The compact `kernel` series; null when the result is wrong (then with ``wrong``) or memory does not last."""

        def poison() -> None:
            y.fill(np.nan)

        try:
            poison()
            calls[0]()
            if not (wrong := sample.check(y)):
                if row not in self._launches:
                    self._launches[row] = timing.launches_of(calls[0])
                rotation = Rotation(calls, copy_bytes, l2, self._launches[row])
                series = timing.kernel(rotation, self._rule, poison)
                wrong = sample.check(y)
        except self._cp.cuda.memory.OutOfMemoryError as e:
            return missing(str(e), "us")
        return missing(f"wrong result: {wrong}", "us") | {"wrong": True} if wrong else _compact(series)


def _compact(series: dict[str, Any]) -> Metric:
    """A series as one figure: the table has a thousand of them."""
    if is_metric(series):
        return series
    launch = {key: series[key] for key in ("blocks", "threads") if key in series}  # of the floor
    return {
        **series["median"],
        **launch,
        "launches": series["launches_per_sample"],
        "copies": series["copies"],
        **{key: series[key] for key in ("relative_error",) if key in series},
        "samples": series["samples"],
    }


# ---- rows -----------------------------------------------------------------------------------------------------------


def _facts(shape: Shape) -> dict[str, Any]:
    weight_bytes = shape.m * (packing.chunks(shape.k) * packing.CHUNK_BYTES + 4)
    return {**shape._asdict(), "weight_bytes": measured(weight_bytes, "bytes")}


def _entry(
    shape: Shape,
    n: int,
    found: Mapping[str, dict[str, Any]],
    floor: Mapping[str, Metric],
    bandwidth: Metric,
    moved: Metric,
) -> dict[str, Any]:
    """What the report says of `n` tokens.

    Args:
        found: row of each baseline and activation, or the null figure in its place.
        floor, bandwidth: what it is compared with.
        moved: bytes, null where nothing was measured.
    """
    baselines = {name: with_conditions(found[name], l2s) for name, l2s in BASELINES.items()}
    series = (*L2, "alone") if n == 1 else L2
    strategies = STRATEGIES if n in STRATEGY_TOKENS else ()
    rows = []
    for activation in ACTIVATIONS:
        kernel, two = (
            {name: inner(found[activation], name, unit="us") for name in names} for names in (series, strategies)
        )
        row = _row(shape, n, activation, kernel, two, floor, baselines, moved, bandwidth)
        rows.append({**row, **about(found[activation])})
    return {"n": n, "bytes": moved, "baselines": baselines, "rows": rows}


def _row(
    shape: Shape,
    n: int,
    activation: str,
    kernel: Mapping[str, Metric],
    strategies: Mapping[str, Metric],
    floor: Mapping[str, Metric],
    baselines: Mapping[str, Mapping[str, Metric]],
    moved: Metric,
    bandwidth: Metric,
) -> dict[str, Any]:
    """One activation's times and what follows from them; the rates are those of a cold L2."""
    cold = kernel["cold"]
    rate = moved if moved["value"] is None else statistics.rate(cold, moved["value"] / 1e3, "GB/s")
    every = (*kernel.values(), *strategies.values())
    unknown = all(figure["value"] is None and not figure.get("wrong") for figure in every)  # nothing was checked
    row: dict[str, Any] = {
        "activation": activation,
        "correct": missing(cold["reason"]) if unknown else not any(figure.get("wrong") for figure in every),
        "kernel": dict(kernel),
        "ratio_to_floor": {l2: statistics.ratio(kernel[l2], floor[l2]) for l2 in L2},
        "warm_over_cold": statistics.ratio(kernel["warm"], cold),
        "gb_per_s": rate,
        "bandwidth_pct": statistics.ratio(rate, bandwidth, "%", 100),
        "tera_ops": statistics.rate(cold, 2 * shape.m * shape.k * n / 1e6, "TOP/s"),
        "speedup_over": {
            name: {l2: statistics.ratio(series, kernel[l2]) for l2, series in pair.items()}
            for name, pair in baselines.items()
        },
    }
    if strategies:
        row["strategies"] = dict(strategies)
        known = [figure for figure in strategies.values() if figure["value"] is not None]
        better = min(known, key=lambda figure: figure["value"]) if known else strategies["streaming"]
        row["over_better_strategy"] = statistics.ratio(cold, better)
    return row
