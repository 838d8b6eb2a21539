"""The fused product on the shapes of public models: `edgellm bench latency --shapes table`.

For each shape of :data:`.shapes.TABLE`, each number of tokens and both activations: `rmsnorm_ternary_matmul` with
``strategy="adaptive"`` inside CUDA graphs, cold and warm, beside the floor and cuBLAS in float16. For one token also
``alone``, where no launch starts before its predecessor has ended; the floor and cuBLAS never do. For
:data:`STRATEGY_TOKENS` also the two strategies that "adaptive" chooses from.

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
from .. import timing
from ..context import INTERRUPTED, Context
from ..metrics import Metric, inner, is_metric, measured, missing
from ..reporting import table_figures
from ..reporting.table_figures import quotient
from ..timing import Rotation, StopRule
from .baselines import BaselineUnavailableError, CuBlas, load_cublas
from .latency import ACTIVATIONS, EPS, L2, cold_weights, measure_bandwidth, measure_floor, with_conditions
from .roofline import current_roof_facts, roofline
from .shapes import TABLE, Shape

STRATEGIES = ("streaming", "separate")
STRATEGY_TOKENS = (1, 4, 16, 64)

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
        if ctx.interrupted:
            found[shape] = _unmeasured(ctx, shape, INTERRUPTED)
            continue
        found[shape] = _Product(ctx, Problem.random(shape, max(ctx.tokens)), cublas, bandwidth).measure()
        cp.get_default_memory_pool().free_all_blocks()  # the next shape's copies have another size
    return {"bandwidth": bandwidth, "cublas": library, "shapes": [found[shape] for shape in TABLE]}


def _unmeasured(ctx: Context, shape: Shape, reason: str) -> dict[str, Any]:
    """A shape without a time."""
    nothing = missing(reason)
    floor = dict.fromkeys(L2, nothing)
    return {**_facts(shape), "floor": floor, "tokens": [_entry(shape, n, nothing, floor, nothing) for n in ctx.tokens]}


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

    def bytes(self, n: int) -> int:
        """What `n` tokens must move: weights and scales, activations, norm weights, results."""
        return int(self.W.nbytes + self.gamma.nbytes + n * (self.shape.k + self.shape.m) * self.x.itemsize)

    def sample(self, n: int, activation: str, fused: bool = True) -> Sample:
        """The check of `n` tokens; the last token and row are always in it."""
        m, k = self.shape.m, self.shape.k
        rng = np.random.default_rng((m, k, n))
        tokens = _choose(rng, n, _SAMPLE_TOKENS)
        rows = _choose(rng, m, _SAMPLE_WEIGHTS // k)
        weight = ec.TernaryWeight(self.W.packed[rows], self.W.scale[rows], (len(rows), k))
        gamma = self.gamma if fused else None
        return Sample(tokens, rows, accuracy.bound(self.x[tokens], gamma, weight, eps=EPS, activation=activation))


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
        problem: Problem,
        cublas: CuBlas | BaselineUnavailableError,
        bandwidth: Metric,
    ):
        import cupy as cp

        self._ctx, self._p, self._cp, self._cublas = ctx, problem, cp, cublas
        self._bandwidth = bandwidth
        self._rule = _QUICK if ctx.quick else _RULE

    # Made by the first row that needs them: what does not fit into memory costs rows, and a row that is there nothing.

    @cached_property
    def _x(self) -> Any:
        return self._cp.asarray(self._p.x)

    @cached_property
    def _gamma(self) -> Any:
        return self._cp.asarray(self._p.gamma)

    @cached_property
    def _y(self) -> Any:
        return self._cp.empty((len(self._p.x), self._p.shape.m), self._cp.float16)

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
        shape = self._p.shape

        def row(what: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            self._ctx.progress(f"{shape.name} {shape.m} x {shape.k}: {what}")
            return self._ctx.row(f"latency/{shape.name}/{what}", "kernel", measure)

        floor = with_conditions(row("floor", self._floor), L2)
        found = {
            n: row(f"{n} tokens", partial(self._series_of, n)) for n in self._ctx.shuffled(shape.name, self._ctx.tokens)
        }
        entries = [
            _entry(shape, n, found[n], floor, self._bandwidth, measured(self._p.bytes(n), "bytes"))
            for n in self._ctx.tokens
        ]
        return {**_facts(shape), "floor": floor, "tokens": entries}

    def _floor(self) -> dict[str, Metric]:
        packed = [w.packed for w in self._copies]
        return {l2: _compact(measure_floor(self._ctx, packed, l2, self._rule)) for l2 in L2}

    def _series_of(self, n: int) -> dict[str, Any]:
        """Everything about `n` tokens at once: `baselines`, and of each activation {kernel, strategies}."""
        x, y = (self._x[:n], self._y[:n]) if n > 1 else (self._x[0], self._y[0])
        samples = {activation: self._p.sample(n, activation) for activation in ACTIVATIONS}
        baselines = self._baselines(x, y, n, samples["float"])
        return {"baselines": baselines, **{a: self._fused(x, y, n, a, samples[a]) for a in ACTIVATIONS}}

    def _fused(self, x: Any, y: Any, n: int, activation: str, sample: Sample) -> dict[str, dict[str, Metric]]:
        """The series of the adaptive strategy (`kernel`), and, cold, of the two that it chooses from (`strategies`)."""

        def series(strategy: str, l2: str = "cold") -> Metric:
            options = {"eps": EPS, "activation": activation, "strategy": strategy, "out": y}
            calls = [partial(ec.rmsnorm_ternary_matmul, x, self._gamma, w, **options) for w in self._copies]
            found = self._series(calls, self._p.W.packed.nbytes, l2, y, sample)
            if found["value"] is None and found.get("wrong"):
                self._failed(f"{self._p.shape.name}, N = {n}, {activation}, {strategy}: {found['reason']}")
            return found

        kernel = {l2: series("adaptive", l2) for l2 in L2}
        if n == 1:
            with overlap(False):
                kernel["alone"] = series("adaptive")
        if wrong := next((figure for figure in kernel.values() if figure.get("wrong")), None):
            kernel = dict.fromkeys(kernel, wrong)
        return {"kernel": kernel, "strategies": {s: series(s) for s in STRATEGIES} if n in STRATEGY_TOKENS else {}}

    def _failed(self, line: str) -> None:
        if line not in self._ctx.failures:
            self._ctx.failures.append(line)

    def _baselines(self, x: Any, y: Any, n: int, fused: Sample) -> dict[str, dict[str, Metric]]:
        """RMSNorm (ours), then cublasGemmEx on the dense float16 weight; and, cold only, the product alone."""
        if isinstance(self._cublas, BaselineUnavailableError):
            nothing = missing(str(self._cublas), "us")
            return {"cublas_fp16": dict.fromkeys(L2, nothing), "cublas_fp16_product": {"cold": nothing}}
        product, normed = self._cublas.product, self._cp.empty_like(x)

        def norm_and_product(w: Any) -> None:
            ec.rmsnorm(x, self._gamma, EPS, out=normed)
            product(w, normed, y)

        def series(call: Callable[[Any], None], l2: str, sample: Sample) -> Metric:
            try:
                return self._series([partial(call, w) for w in self._dense], self._dense[0].nbytes, l2, y, sample)
            except BaselineUnavailableError as e:
                return missing(str(e), "us")

        alone = self._p.sample(n, "float", fused=False)
        return {
            "cublas_fp16": {l2: series(norm_and_product, l2, fused) for l2 in L2},
            "cublas_fp16_product": {"cold": series(lambda w: product(w, x, y), "cold", alone)},
        }

    def _series(self, calls: Sequence[Call], copy_bytes: int, l2: str, y: Any, sample: Sample) -> Metric:
        """The compact `kernel` series; null when the result is wrong (then with ``wrong``) or memory does not last."""

        def poison() -> None:
            y.fill(np.nan)

        try:
            poison()
            calls[0]()
            if not (wrong := sample.check(y)):
                series = timing.kernel(Rotation(calls, copy_bytes, l2, _launches(calls[0])), self._rule, poison)
                wrong = sample.check(y)
        except self._cp.cuda.memory.OutOfMemoryError as e:
            return missing(str(e), "us")
        return missing(f"wrong result: {wrong}", "us") | {"wrong": True} if wrong else _compact(series)


def _launches(call: Call) -> int:
    return timing.enough_launches(timing.device(call, timing.GLANCE)["median"]["value"])


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
    found: dict[str, Any],
    floor: Mapping[str, Metric],
    bandwidth: Metric,
    moved: Metric | None = None,
) -> dict[str, Any]:
    """What the report says of `n` tokens.

    Args:
        found: what :meth:`_Product._series_of` measured, or the null figure in its place.
        floor, bandwidth: what it is compared with.
        moved: bytes, None where nothing was measured.
    """
    moved = moved or found
    baselines = {
        name: {l2: inner(found, "baselines", name, l2, unit="us") for l2 in l2s}
        for name, l2s in (("cublas_fp16", L2), ("cublas_fp16_product", ("cold",)))
    }
    series = (*L2, "alone") if n == 1 else L2
    strategies = STRATEGIES if n in STRATEGY_TOKENS else ()
    about = {"boundary": "kernel", "conditions": inner(found, "conditions")}
    rows = []
    for activation in ACTIVATIONS:
        kernel = {name: inner(found, activation, "kernel", name, unit="us") for name in series}
        two = {name: inner(found, activation, "strategies", name, unit="us") for name in strategies}
        rows.append({**_row(shape, n, activation, kernel, two, floor, baselines, moved, bandwidth), **about})
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
    rate = quotient(moved, cold, "GB/s", 1e-3)
    every = (*kernel.values(), *strategies.values())
    unknown = all(figure["value"] is None and not figure.get("wrong") for figure in every)  # nothing was checked
    row: dict[str, Any] = {
        "activation": activation,
        "correct": missing(cold["reason"]) if unknown else not any(figure.get("wrong") for figure in every),
        "kernel": dict(kernel),
        "ratio_to_floor": {l2: quotient(kernel[l2], floor[l2]) for l2 in L2},
        "warm_over_cold": quotient(kernel["warm"], cold),
        "gb_per_s": rate,
        "bandwidth_pct": quotient(rate, bandwidth, "%", 100),
        "tera_ops": quotient(measured(2.0 * shape.m * shape.k * n), cold, "TOP/s", 1e-6),
        "speedup_over": {
            name: {l2: quotient(series, kernel[l2]) for l2, series in pair.items()} for name, pair in baselines.items()
        },
    }
    if strategies:
        row["strategies"] = dict(strategies)
        known = [figure for figure in strategies.values() if figure["value"] is not None]
        better = min(known, key=lambda figure: figure["value"]) if known else strategies["streaming"]
        row["over_better_strategy"] = quotient(cold, better)
    return row
