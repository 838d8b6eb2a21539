"""Latency of the ternary products: how long one takes, what limits it, and what a user would otherwise wait.

For each shape of the workload (`products`, keyed by layer type): the floor, that is a kernel that only reads the packed
weight; the baselines; and a row for each operation. A row begins with the check against the float64 reference, on a
poisoned result, and each of its series is checked in the same way after its last sample. An operation that fails once
has no speed, and the failure goes to `Context.failures`. So does that of the floor, which has to have read every byte.
Somebody else's library that fails has no speed either, but is no failure of ours. Floor, baselines and operations of a
product are measured in an order that each run draws anew.

Everything is batch 1 in float16. ``device`` and ``end_to_end`` repeat one copy of the weight, so they are warm.

Results of :func:`run`:

    bandwidth           GB/s that the floor kernel reads from memory in this run: what percentages refer to
    products            layer type -> {m, k, weight_bytes, floor, baselines, rows}
    cublas              which library the float16 baselines used, or why there are none
    roofline            operations a byte and a second of each row, and the ceilings: :mod:`.roofline`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

import edgellm_cupy as ec

from ...reference import accuracy
from ...tuning import FLOOR_THREADS, floor_spec
from .. import statistics, timing
from ..context import Context
from ..metrics import Metric, inner, is_metric, measured, missing
from ..timing import COLD_L2_FACTOR, Rotation, StopRule
from .baselines import BaselineUnavailableError, CuBlas, load_cublas
from .roofline import current_roof_facts, roofline

L2 = ("cold", "warm")
EPS = 1e-5
ACTIVATIONS = ("int8", "float")
BANDWIDTH_BYTES = 1 << 30
FLOOR_BLOCKS_PER_SM = (1, 2, 4, 8)
# Finds the best of the twelve floor configurations, which is then measured with the full rule.
_SWEEP = StopRule(relative_error=0.01, min_samples=5, min_seconds=0.0, max_seconds=0.03)

Series = dict[str, Any]  # of statistics.summarise, or a null figure


def run(ctx: Context, shapes: Mapping[str, tuple[int, int]] | None = None) -> dict[str, Any]:
    """Measure every product. `shapes`: layer type -> (M, K); the workload's own when missing."""
    shapes = ctx.config.products() if shapes is None else shapes
    return _run_numpy(ctx, ctx.no_gpu, shapes) if ctx.no_gpu else _run_cuda(ctx, shapes)


@dataclass(frozen=True)
class Problem:
    """One product on the host, the same for every run.

    Attributes:
        x: float16 [K]; gamma: float32 [K].
        W: ternary [M, K] with a scale a row that float16 holds exactly, so that the float16 baseline has the same
            weights to the bit.
    """

    layer: str
    x: np.ndarray
    gamma: np.ndarray
    W: ec.TernaryWeight

    @classmethod
    def random(cls, layer: str, m: int, k: int) -> Problem:
        rng = np.random.default_rng((m, k))
        scale = (rng.uniform(0.5, 1.5, m) / np.sqrt(k)).astype(np.float16).astype(np.float32)
        return cls(
            layer,
            rng.standard_normal(k).astype(np.float16),
            rng.uniform(0.5, 1.5, k).astype(np.float32),
            ec.TernaryWeight.from_int8(rng.integers(-1, 2, (m, k), dtype=np.int8), scale),
        )

    def dense(self) -> np.ndarray:
        """The weight as float16 [M, K], exact."""
        return self.W.to_int8() * self.W.scale.astype(np.float16)[:, None]


@dataclass(frozen=True)
class Operation:
    """A public operation on a problem.

    Attributes:
        name: of the function in `edgellm_cupy` and `edgellm_cupy.reference`.
    """

    name: str
    activation: str
    strategy: str = "adaptive"

    @property
    def fused(self) -> bool:
        return self.name == "rmsnorm_ternary_matmul"

    def call(self, library: Any, x: Any, gamma: Any, W: Any, out: Any) -> None:
        """Run it with `library`'s function of that name."""
        function = getattr(library, self.name)
        if self.fused:
            function(x, gamma, W, eps=EPS, activation=self.activation, strategy=self.strategy, out=out)
        else:
            function(x, W, activation=self.activation, out=out)

    def bound(self, p: Problem) -> accuracy.Bound:
        return accuracy.bound(p.x, p.gamma if self.fused else None, p.W, eps=EPS, activation=self.activation)

    def bytes(self, p: Problem) -> int:
        """What it must move: weights and scales, activations, norm weights when fused, results."""
        return int(p.W.nbytes + p.x.nbytes + (p.gamma.nbytes if self.fused else 0) + p.W.shape[0] * p.x.itemsize)

    def __str__(self) -> str:
        return f"{self.name} {self.activation}"

    def facts(self) -> dict[str, Any]:
        return {"op": self.name, "activation": self.activation, "strategy": self.strategy, "dtype": "float16", "n": 1}


OPERATIONS = tuple(Operation(name, a) for name in ("rmsnorm_ternary_matmul", "ternary_matmul") for a in ACTIVATIONS)


# ---- NumPy ----------------------------------------------------------------------------------------------------------


def _run_numpy(ctx: Context, no_gpu: str, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    rule = StopRule(relative_error=0.02, min_samples=10, min_seconds=0.0, max_seconds=0.1 if ctx.quick else 0.5)
    nothing = missing(no_gpu)
    products = {}
    for layer, (m, k) in shapes.items():
        ctx.progress(f"latency of {layer} {m} x {k}")
        p = Problem.random(layer, m, k)
        found = {
            operation: ctx.row(
                f"latency/{layer}/{operation}", "kernel", partial(_numpy_series, ctx, p, operation, rule, nothing)
            )
            for operation in ctx.shuffled(layer, OPERATIONS)
        }
        yardsticks = {"floor": _no_series(no_gpu), "baselines": dict.fromkeys(_BASELINES, nothing)}
        rows = [_row(p, operation, found[operation], **yardsticks, bandwidth=nothing) for operation in OPERATIONS]
        products[layer] = {**_sizes(p), **yardsticks, "rows": rows}
    return {"bandwidth": missing(no_gpu, "GB/s"), "cublas": nothing, "products": products, "roofline": nothing}


_NUMPY_METHOD = (
    "wall clock of the reference operation, in float64, which unpacks the weight at each call; the NumPy decoder does "
    "not: it keeps dense float32 matrices"
)


def _numpy_series(ctx: Context, p: Problem, operation: Operation, rule: StopRule, nothing: Metric) -> dict[str, Any]:
    y = np.full(p.W.shape[0], np.nan, p.x.dtype)

    def call() -> None:
        operation.call(ec.reference, p.x, p.gamma, p.W, y)

    call()
    message = operation.bound(p).check(y)
    wrong = _failed(ctx, p, operation, message) if message else None
    end_to_end = wrong or timing.wall_clock(call, rule).summary(method=_NUMPY_METHOD)
    return {"kernel": dict.fromkeys(L2, nothing), "device": nothing, "end_to_end": end_to_end, "correct": not wrong}


# ---- a row from its series ------------------------------------------------------------------------------------------


def _row(
    p: Problem,
    operation: Operation,
    found: dict[str, Any],
    floor: Mapping[str, Series],
    baselines: Mapping[str, Any],
    bandwidth: Metric,
) -> dict[str, Any]:
    """What the report says of an operation.

    Args:
        found: its series, or the null figure in their place.
        floor, baselines, bandwidth: what it is compared with.
    """
    kernel = {l2: inner(found, "kernel", l2, unit="us") for l2 in L2}
    moved = operation.bytes(p)
    rate = statistics.rate(inner(kernel, "cold", "median"), moved / 1e3, "GB/s", l2="cold")
    compared = {name: series for name, series in baselines.items() if _comparable(name, operation)}
    return {
        **operation.facts(),
        "correct": inner(found, "correct"),
        "bytes": measured(moved, "bytes"),
        "kernel": kernel,
        **{name: inner(found, name, unit="us") for name in ("device", "end_to_end")},
        "ratio_to_floor": {l2: ratio(kernel[l2], floor[l2]) for l2 in L2},
        "speedup_over": {
            name: {l2: ratio(inner(series, l2, unit="us"), kernel[l2]) for l2 in L2}
            for name, series in compared.items()
        },
        "gb_per_s": rate,
        "bandwidth_pct": statistics.ratio(rate, bandwidth, "%", 100, l2="cold"),
        **about(found),
    }


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def _run_cuda(ctx: Context, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    rule = timing.QUICK if ctx.quick else StopRule()
    ctx.progress("memory bandwidth")
    bandwidth = ctx.row("latency/bandwidth", "kernel", lambda: measure_bandwidth(ctx, rule))
    cublas, library = load_cublas()
    found = {
        layer: _Product(ctx, Problem.random(layer, m, k), rule, cublas, bandwidth).measure()
        for layer, (m, k) in ctx.shuffled("products", shapes.items())
    }
    products = {layer: found[layer] for layer in shapes}
    return {
        "bandwidth": bandwidth,
        "cublas": library,
        "products": products,
        "roofline": roofline(products, bandwidth, current_roof_facts()),
    }


class _Product:
    """All measurements of one product on the GPU: device arrays are made once and shared by its rows."""

    def __init__(
        self,
        ctx: Context,
        problem: Problem,
        rule: StopRule,
        cublas: CuBlas | BaselineUnavailableError,
        bandwidth: Metric,
    ):
        import cupy as cp

        self._ctx, self._p, self._rule, self._cublas = ctx, problem, rule, cublas
        self._bandwidth, self._cp = bandwidth, cp

    # Made by the first row that needs them: what does not fit into memory costs rows, and a row that is there nothing.

    @cached_property
    def _x(self) -> Any:
        return self._cp.asarray(self._p.x)

    @cached_property
    def _gamma(self) -> Any:
        return self._cp.asarray(self._p.gamma)

    @cached_property
    def _y(self) -> Any:
        return self._cp.empty(self._p.W.shape[0], dtype=self._cp.float16)

    @cached_property
    def _copies(self) -> list[ec.TernaryWeight]:
        return cold_weights(self._p.W)

    def measure(self) -> dict[str, Any]:
        """Floor, baselines and operations in a random order, then the rows that compare them."""
        measures: dict[Any, Callable[[], dict[str, Any]]] = {
            "floor": self._floor,
            **{name: partial(self._baseline, name) for name in _BASELINES},
            **{operation: partial(self._operation, operation) for operation in OPERATIONS},
        }
        found = {what: self._measured(what, measures[what]) for what in self._ctx.shuffled(self._p.layer, measures)}
        floor = with_conditions(found["floor"], L2)
        baselines = {name: with_conditions(found[name], L2) for name in _BASELINES}
        rows = [_row(self._p, o, found[o], floor, baselines, self._bandwidth) for o in OPERATIONS]
        return {**_sizes(self._p), "floor": floor, "baselines": baselines, "rows": rows}

    def _measured(self, what: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        m, k = self._p.W.shape
        self._ctx.progress(f"latency of {self._p.layer} {m} x {k}: {what}")
        return self._ctx.row(f"latency/{self._p.layer}/{what}", "kernel", measure)

    def _floor(self) -> dict[str, Series]:
        packed = [w.packed for w in self._copies]
        return {l2: measure_floor(self._ctx, packed, l2, self._rule) for l2 in L2}

    def _operation(self, operation: Operation) -> dict[str, Any]:
        """`kernel`, `device` and `end_to_end` of an operation of ours, and whether all of its results were right."""
        bound = operation.bound(self._p)
        call = self._call(operation, self._copies[0])
        kernel = self._kernel(operation, bound)
        series: dict[str, Series] = {}
        for name, measure in (("device", self._device), ("end_to_end", self._end_to_end)):
            series[name] = _first_null(kernel) or self._ours(operation, measure(call, bound))
        wrong = _first_null({**kernel, **series})
        if wrong:
            kernel, series = dict.fromkeys(kernel, wrong), dict.fromkeys(series, wrong)
        return {"kernel": kernel, **series, "correct": not wrong}

    def _call(self, operation: Operation, weight: ec.TernaryWeight) -> Callable[[], None]:
        return lambda: operation.call(ec, self._x, self._gamma, weight, self._y)

    def _ours(self, operation: Operation, series: Series) -> Series:
        """`series`; when it is null because the result was wrong, that is a failure of the run."""
        return _failed(self._ctx, self._p, operation, series["reason"]) if is_metric(series) else series

    def _kernel(self, operation: Operation, bound: accuracy.Bound) -> dict[str, Series]:
        """The cold and the warm series of an operation of ours."""
        calls = [self._call(operation, w) for w in self._copies]
        rotations = [Rotation(calls, self._p.W.packed.nbytes, l2) for l2 in L2]
        return {r.l2: self._ours(operation, self._checked(r, bound)) for r in rotations}

    def _checked(self, rotation: Rotation, bound: accuracy.Bound) -> Series:
        """The `kernel` series of a rotation that writes self._y, or null when that is wrong before or after."""
        self._poison()
        rotation.calls[0]()
        if wrong := bound.check(self._y.get()):
            return missing(wrong, "us")
        series = timing.kernel(rotation, self._rule, prepare=self._poison)
        wrong = bound.check(self._y.get())
        return missing(f"{rotation.l2} graph: {wrong}", "us") if wrong else series

    def _poison(self) -> None:
        self._y.fill(np.nan)

    def _device(self, call: Callable[[], None], bound: accuracy.Bound) -> Series:
        self._poison()
        series = timing.device(call, self._rule)
        wrong = bound.check(self._y.get())
        return missing(f"called one by one: {wrong}", "us") if wrong else series

    def _end_to_end(self, call: Callable[[], None], bound: accuracy.Bound) -> Series:
        import cupyx

        cp = self._cp
        x = cupyx.empty_pinned(self._p.x.shape, self._p.x.dtype)
        y = cupyx.empty_pinned(self._y.shape, self._y.dtype)
        x[:], y[:] = self._p.x, np.nan
        copy, runtime = cp.cuda.runtime.memcpyAsync, cp.cuda.runtime
        stream = cp.cuda.Stream(non_blocking=True)

        def round_trip() -> None:
            copy(self._x.data.ptr, x.ctypes.data, x.nbytes, runtime.memcpyHostToDevice, stream.ptr)
            call()
            copy(y.ctypes.data, self._y.data.ptr, y.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
            stream.synchronize()

        self._poison()
        cp.cuda.Device().synchronize()  # the new stream does not wait for the one that poisons
        with stream:
            series = timing.end_to_end(round_trip, self._rule)
        wrong = bound.check(y)
        return missing(f"pinned host array: {wrong}", "us") if wrong else series

    def _baseline(self, name: str) -> dict[str, Series]:
        """Its cold and its warm series, checked."""
        if name in _UNFUSED:
            operation = _UNFUSED[name]
            return self._kernel(operation, operation.bound(self._p))
        if isinstance(self._cublas, BaselineUnavailableError):
            return _no_series(str(self._cublas))
        return self._float16(self._cublas, fused=name == "cublas_fp16")

    def _float16(self, cublas: CuBlas, fused: bool) -> dict[str, Series]:
        """RMSNorm (ours), then cublasGemmEx on the dense float16 weight; or the product alone."""
        dense = self._cp.asarray(self._p.dense())
        copies = [dense, *(dense.copy() for _ in range(timing.cold_copies(dense.nbytes, timing.l2_bytes()) - 1))]
        normed = self._cp.empty_like(self._x)

        def call_on(w: Any) -> Callable[[], None]:
            def call() -> None:
                if fused:
                    ec.rmsnorm(self._x, self._gamma, EPS, out=normed)
                cublas.product(w, normed if fused else self._x, self._y)

            return call

        bound = Operation("rmsnorm_ternary_matmul" if fused else "ternary_matmul", "float").bound(self._p)
        calls = [call_on(w) for w in copies]
        try:
            return {l2: self._checked(Rotation(calls, dense.nbytes, l2), bound) for l2 in L2}
        except BaselineUnavailableError as e:
            return _no_series(str(e))


_UNFUSED = {f"unfused_ternary_{a}": Operation("rmsnorm_ternary_matmul", a, "separate") for a in ACTIVATIONS}
_BASELINES = ("cublas_fp16", "cublas_fp16_product", *_UNFUSED)


def with_conditions(found: dict[str, Any], names: Iterable[str]) -> dict[str, Series]:
    """The series `names` of a row, each with the row's boundary and conditions; null with its reason where it is."""
    series = {name: inner(found, name, unit="us") for name in names}
    return {name: s if s.get("value", 0) is None else {**s, **about(found)} for name, s in series.items()}


def about(found: dict[str, Any]) -> dict[str, Any]:
    """Boundary and conditions of a row of :meth:`.Context.row`, also where it is null."""
    return {"boundary": found.get("boundary", "kernel"), "conditions": inner(found, "conditions")}


def _comparable(baseline: str, operation: Operation) -> bool:
    """A fused operation is compared with what also normalises, a product with a product."""
    if not operation.fused:
        return baseline == "cublas_fp16_product"
    return baseline in ("cublas_fp16", f"unfused_ternary_{operation.activation}")


def _no_series(reason: str) -> dict[str, Series]:
    return {"cold": missing(reason, "us"), "warm": missing(reason, "us")}


def _sizes(p: Problem) -> dict[str, Any]:
    return {"m": p.W.shape[0], "k": p.W.shape[1], "weight_bytes": measured(p.W.nbytes, "bytes")}


def _first_null(series: Mapping[str, Series]) -> Metric | None:
    return next((s for s in series.values() if is_metric(s)), None)


def _failed(ctx: Context, p: Problem, operation: Operation, message: str) -> Metric:
    """Record a wrong result; returns the null figure that stands in the place of its speed."""
    line = f"{p.layer}: {operation.name}, {operation.activation}, {operation.strategy}: {message}"
    if line not in ctx.failures:  # the cold and the warm series of one operation fail alike
        ctx.failures.append(line)
    return missing(f"wrong result: {message}", "us")


def ratio(above: Series, below: Series) -> Metric:
    """Ratio of two series' medians, or null with the reason of the one that is missing."""
    return statistics.ratio(inner(above, "median"), inner(below, "median"))


# ---- yardsticks, for other parts too --------------------------------------------------------------------------------


def cold_weights(W: ec.TernaryWeight) -> list[ec.TernaryWeight]:
    """Device copies of a host weight whose codes together exceed the L2 as :func:`timing.cold_copies` asks."""
    return [W.to_device() for _ in range(timing.cold_copies(W.packed.nbytes, timing.l2_bytes()))]


def measure_floor(ctx: Context, data: Sequence[Any], l2: str, rule: StopRule) -> Series:
    """The `kernel` series of reading each array of `data` once: the best of all launch configurations.

    That configuration is run once with the variant of the kernel that hands out the exclusive or of all words. If it
    is wrong, the series is null and the run has failed.

    data: CuPy arrays of the same content, a multiple of 16 bytes.
    """
    import cupy as cp

    from ...kernels import load

    sms = cp.cuda.Device().attributes["MultiProcessorCount"]
    sink = cp.zeros(1, dtype=cp.uint32)
    words = data[0].nbytes // 16

    def read(a: Any, blocks: int, threads: int, check: bool = False) -> None:
        load(floor_spec(threads, check))((blocks, 1, 1), (threads, 1, 1), (a, words, sink))

    least = timing.launches_of(partial(read, data[0], sms, max(FLOOR_THREADS)))

    def rotation(blocks: int, threads: int) -> Rotation:
        return Rotation([partial(read, a, blocks, threads) for a in data], data[0].nbytes, l2, least)

    def median_us(configuration: tuple[int, int]) -> float:
        return float(timing.kernel(rotation(*configuration), _SWEEP)["median"]["value"])

    blocks, threads = min(((sms * b, t) for b in FLOOR_BLOCKS_PER_SM for t in FLOOR_THREADS), key=median_us)
    sink.fill(0)
    read(data[0], blocks, threads, check=True)
    found, expected = int(sink.get()[0]), int(np.bitwise_xor.reduce(data[0].get().reshape(-1).view(np.uint32)))
    if found != expected:
        wrong = f"floor of {data[0].nbytes} bytes: the words' exclusive or is {found:#x}, expected {expected:#x}"
        ctx.failures.append(wrong)
        return missing(f"wrong result: {wrong}", "us")
    return {**timing.kernel(rotation(blocks, threads), rule), "blocks": blocks, "threads": threads}


def measure_bandwidth(ctx: Context, rule: StopRule) -> Metric:
    """GB/s of reading device memory: the floor kernel on :data:`BANDWIDTH_BYTES`, or on a quarter of what is free."""
    import cupy as cp

    free, _ = cp.cuda.runtime.memGetInfo()
    size, l2 = min(BANDWIDTH_BYTES, free // 4) // 16 * 16, timing.l2_bytes()
    if size <= COLD_L2_FACTOR * l2:
        return missing(
            f"a quarter of the free memory is {size} bytes, not {COLD_L2_FACTOR} times the L2 of {l2}", "GB/s"
        )
    data = cp.asarray(np.random.default_rng(0).integers(0, 2**64, size // 8, dtype=np.uint64))
    floor = measure_floor(ctx, [data], "cold", rule)
    if is_metric(floor):
        return missing(floor["reason"], "GB/s")
    return statistics.rate(floor["median"], size / 1e3, "GB/s", bytes=size, blocks=floor["blocks"],
                       threads=floor["threads"], method="16-byte loads, CUDA graph")  # fmt: skip
