"""Latency of the ternary products: how long one takes, what limits it, and what a user would otherwise wait.

For each shape of the workload (`products`, keyed by layer type): the floor, that is a kernel that only reads the same
bytes; the baselines; and a row for each operation. A row begins with the check against the float64 reference, on a
poisoned result; an operation that fails it has no speed, and the failure goes to `Context.failures`. The graphs that
are timed are checked again after their last replay.

Everything is batch 1 in float16. ``device`` and ``end_to_end`` repeat one copy of the weight, so they are warm.

Results of :func:`run`:

    bandwidth           GB/s that the floor kernel reads from memory in this run: what percentages refer to
    products            layer type -> {m, k, weight_bytes, floor, baselines, rows}
    cublas              which library the float16 baselines used, or why there are none
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import edgellm_cupy as ec

from ..reference import accuracy
from . import timing
from .baselines import BaselineUnavailableError, CuBlas
from .context import Context
from .hardware import current_nvml_device
from .metrics import Metric, is_metric, measured, missing
from .timing import Rotation, StopRule
from .utilisation import Sampler, condition_probes, conditions

EPS = 1e-5
ACTIVATIONS = ("int8", "float")
BANDWIDTH_BYTES = 1 << 30
FLOOR_BLOCKS_PER_SM = (1, 2, 4, 8)
FLOOR_THREADS = (256, 512, 1024)
# Finds the best of the twelve floor configurations, which is then measured with the full rule.
_SWEEP = StopRule(relative_error=0.01, min_samples=5, min_seconds=0.0, max_seconds=0.03)

Series = dict[str, Any]  # of timing.summarise, or a null figure


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
        rows = [_numpy_row(ctx, p, operation, rule, nothing) for operation in OPERATIONS]
        floor = {"cold": nothing, "warm": nothing}
        products[layer] = {**_sizes(p), "floor": floor, "baselines": dict.fromkeys(_BASELINES, nothing), "rows": rows}
    return {"bandwidth": missing(no_gpu, "GB/s"), "cublas": nothing, "products": products}


def _numpy_row(ctx: Context, p: Problem, operation: Operation, rule: StopRule, nothing: Metric) -> dict[str, Any]:
    y = np.full(p.W.shape[0], np.nan, p.x.dtype)

    def call() -> None:
        operation.call(ec.reference, p.x, p.gamma, p.W, y)

    call()
    wrong = _failed(ctx, p, operation, operation.bound(p).check(y))
    end_to_end = missing(wrong, "us") if wrong else timing.wall_clock(call, rule).summary(method="wall clock, NumPy")
    return {
        **operation.facts(),
        "correct": not wrong,
        "bytes": measured(operation.bytes(p), "bytes"),
        "kernel": {"cold": nothing, "warm": nothing},
        "device": nothing,
        "end_to_end": end_to_end,
        "ratio_to_floor": {"cold": nothing, "warm": nothing},
        "gb_per_s": nothing,
        "bandwidth_pct": nothing,
        "conditions": nothing,
    }


# ---- CUDA -----------------------------------------------------------------------------------------------------------


def _run_cuda(ctx: Context, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    rule = timing.QUICK if ctx.quick else StopRule()
    ctx.progress("memory bandwidth")
    bandwidth = measure_bandwidth()
    try:
        cublas: CuBlas | BaselineUnavailableError = CuBlas()
    except BaselineUnavailableError as e:
        cublas = e
    products = {}
    with Sampler(condition_probes(current_nvml_device()), interval_s=0.1) as sampler:
        for layer, (m, k) in shapes.items():
            products[layer] = _Product(ctx, Problem.random(layer, m, k), rule, cublas, bandwidth, sampler).measure()
    return {
        "bandwidth": bandwidth,
        "cublas": (
            missing(str(cublas))
            if isinstance(cublas, BaselineUnavailableError)
            else measured(cublas.version, library=cublas.library)
        ),
        "products": products,
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
        sampler: Sampler,
    ):
        import cupy as cp

        self._ctx, self._p, self._rule, self._cublas = ctx, problem, rule, cublas
        self._bandwidth, self._sampler, self._cp = bandwidth, sampler, cp
        self._x, self._gamma = cp.asarray(problem.x), cp.asarray(problem.gamma)
        self._y = cp.empty(problem.W.shape[0], dtype=cp.float16)
        self._copies = cold_weights(problem.W)

    def measure(self) -> dict[str, Any]:
        m, k = self._p.W.shape
        self._ctx.progress(f"latency of {self._p.layer} {m} x {k}: floor")
        floor = {l2: measure_floor([w.packed for w in copies], l2, self._rule) for l2, copies in self._by_l2().items()}
        self._ctx.progress(f"latency of {self._p.layer} {m} x {k}: baselines")
        baselines = self._baselines()
        rows = []
        for operation in OPERATIONS:
            self._ctx.progress(f"latency of {self._p.layer} {m} x {k}: {operation.name}, {operation.activation}")
            rows.append(self._row(operation, floor, baselines))
        return {**_sizes(self._p), "floor": floor, "baselines": baselines, "rows": rows}

    def _by_l2(self) -> dict[str, list[ec.TernaryWeight]]:
        return {"cold": self._copies, "warm": self._copies[:1]}

    def _row(self, operation: Operation, floor: dict[str, Series], baselines: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        bound, moved = operation.bound(self._p), operation.bytes(self._p)
        kernel = self._kernel(operation, bound)
        # The graphs ran and were right: the same operation called one by one is what remains to be timed.
        wrong = next((s["reason"] for s in kernel.values() if is_metric(s)), None)
        call = self._call(operation, self._copies[0])
        cold = kernel["cold"]
        rate = missing(wrong, "GB/s") if wrong else measured(moved / cold["median"]["value"] / 1e3, "GB/s", l2="cold")
        peak = self._bandwidth["value"]
        return {
            **operation.facts(),
            "correct": not wrong,
            "bytes": measured(moved, "bytes"),
            "kernel": kernel,
            "device": missing(wrong, "us") if wrong else timing.device(call, self._rule),
            "end_to_end": missing(wrong, "us") if wrong else self._end_to_end(call),
            "ratio_to_floor": {l2: ratio(kernel[l2], floor[l2]) for l2 in kernel},
            "speedup_over": {
                name: {l2: ratio(baseline[l2], kernel[l2]) for l2 in kernel}
                for name, baseline in baselines.items()
                if _comparable(name, operation)
            },
            "gb_per_s": rate,
            "bandwidth_pct": missing(wrong, "%") if wrong else measured(100 * rate["value"] / peak, "%", l2="cold"),
            "conditions": conditions(self._sampler, begin, time.perf_counter()),
        }

    def _call(self, operation: Operation, weight: ec.TernaryWeight) -> Callable[[], None]:
        return lambda: operation.call(ec, self._x, self._gamma, weight, self._y)

    def _kernel(self, operation: Operation, bound: accuracy.Bound) -> dict[str, Series]:
        """The cold and the warm series; both null when the operation is wrong."""
        what = f"{operation.name}, {operation.activation}, {operation.strategy}"
        return {
            l2: self._checked(what, Rotation([self._call(operation, w) for w in copies], self._p.W.nbytes, l2), bound)
            for l2, copies in self._by_l2().items()
        }

    def _checked(self, what: str, rotation: Rotation, bound: accuracy.Bound) -> Series:
        """The `kernel` series of a rotation that writes self._y, which has to be right before and after it."""
        if wrong := self._wrong(what, rotation.calls[0], bound):
            return missing(wrong, "us")
        series = timing.kernel(rotation, self._rule, prepare=lambda: self._y.fill(np.nan))
        wrong = _failed(self._ctx, self._p, f"{what}, {rotation.l2} graph", bound.check(self._y.get()))
        return missing(wrong, "us") if wrong else series

    def _wrong(self, what: str, call: Callable[[], None], bound: accuracy.Bound) -> str | None:
        self._y.fill(np.nan)
        call()
        return _failed(self._ctx, self._p, what, bound.check(self._y.get()))

    def _end_to_end(self, call: Callable[[], None]) -> Series:
        import cupyx

        cp = self._cp
        x = cupyx.empty_pinned(self._p.x.shape, self._p.x.dtype)
        y = cupyx.empty_pinned(self._y.shape, self._y.dtype)
        x[:] = self._p.x
        copy, runtime = cp.cuda.runtime.memcpyAsync, cp.cuda.runtime
        stream = cp.cuda.Stream(non_blocking=True)

        def round_trip() -> None:
            copy(self._x.data.ptr, x.ctypes.data, x.nbytes, runtime.memcpyHostToDevice, stream.ptr)
            call()
            copy(y.ctypes.data, self._y.data.ptr, y.nbytes, runtime.memcpyDeviceToHost, stream.ptr)
            stream.synchronize()

        with stream:
            return timing.end_to_end(round_trip, self._rule)

    def _baselines(self) -> dict[str, dict[str, Series]]:
        """Name -> {cold, warm}; every one checked like our own operations."""
        unfused = {
            f"unfused_ternary_{a}": self._kernel(
                (operation := Operation("rmsnorm_ternary_matmul", a, "separate")), operation.bound(self._p)
            )
            for a in ACTIVATIONS
        }
        if isinstance(self._cublas, BaselineUnavailableError):
            return {**dict.fromkeys(("cublas_fp16", "cublas_fp16_product"), _no_series(str(self._cublas))), **unfused}
        return {
            "cublas_fp16": self._float16(self._cublas, fused=True),
            "cublas_fp16_product": self._float16(self._cublas, fused=False),
            **unfused,
        }

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
        what = "cuBLAS float16" + (" after rmsnorm" if fused else "")
        try:
            return {
                l2: self._checked(what, Rotation([call_on(w) for w in some], dense.nbytes, l2), bound)
                for l2, some in (("cold", copies), ("warm", copies[:1]))
            }
        except BaselineUnavailableError as e:
            return _no_series(str(e))


_BASELINES = ("cublas_fp16", "cublas_fp16_product", "unfused_ternary_int8", "unfused_ternary_float")


def _comparable(baseline: str, operation: Operation) -> bool:
    """A fused operation is compared with what also normalises, a product with a product."""
    if not operation.fused:
        return baseline == "cublas_fp16_product"
    return baseline in ("cublas_fp16", f"unfused_ternary_{operation.activation}")


def _no_series(reason: str) -> dict[str, Series]:
    return {"cold": missing(reason, "us"), "warm": missing(reason, "us")}


def _sizes(p: Problem) -> dict[str, Any]:
    return {"m": p.W.shape[0], "k": p.W.shape[1], "weight_bytes": measured(p.W.nbytes, "bytes")}


def _failed(ctx: Context, p: Problem, what: Operation | str, message: str | None) -> str | None:
    """Record a wrong result; returns the reason why there is no speed, None when the result was right."""
    if message is None:
        return None
    name = what if isinstance(what, str) else f"{what.name}, {what.activation}"
    line = f"{p.layer}: {name}: {message}"
    if line not in ctx.failures:  # the cold and the warm series of one operation fail alike
        ctx.failures.append(line)
    return f"wrong result: {message}"


def ratio(above: Series, below: Series) -> Metric:
    """Ratio of two series' medians, or null with the reason of the one that is missing."""
    for series in (above, below):
        if is_metric(series):
            return missing(series["reason"], "x")
    return measured(above["median"]["value"] / below["median"]["value"], "x")


# ---- yardsticks, for other parts too --------------------------------------------------------------------------------


def cold_weights(W: ec.TernaryWeight) -> list[ec.TernaryWeight]:
    """Device copies of a host weight that together exceed the L2 as :func:`timing.cold_copies` asks, at least one."""
    return [W.to_device() for _ in range(timing.cold_copies(W.nbytes, timing.l2_bytes()))]


def measure_floor(data: Sequence[Any], l2: str, rule: StopRule) -> Series:
    """The `kernel` series of reading each array of `data` once: the best of all launch configurations.

    data: CuPy arrays of the same size, each a multiple of 16 bytes.
    """
    import cupy as cp

    from ..kernels import KernelSpec, load

    sms = cp.cuda.Device().attributes["MultiProcessorCount"]
    sink = cp.zeros(1, dtype=cp.uint32)
    words = np.int64(data[0].nbytes // 16)

    def rotation(blocks: int, threads: int) -> Rotation:
        kernel = load(KernelSpec("read_floor.cu", (("THREADS", str(threads)),)))

        def call_on(a: Any) -> Callable[[], None]:
            return lambda: kernel((blocks, 1, 1), (threads, 1, 1), (a, words, sink))

        return Rotation([call_on(a) for a in data], data[0].nbytes, l2)

    def median_us(configuration: tuple[int, int]) -> float:
        return float(timing.kernel(rotation(*configuration), _SWEEP)["median"]["value"])

    blocks, threads = min(((sms * b, t) for b in FLOOR_BLOCKS_PER_SM for t in FLOOR_THREADS), key=median_us)
    return {**timing.kernel(rotation(blocks, threads), rule), "blocks": blocks, "threads": threads}


def measure_bandwidth() -> Metric:
    """GB/s of reading device memory: the floor kernel on :data:`BANDWIDTH_BYTES`, or on a quarter of what is free."""
    import cupy as cp

    free, _ = cp.cuda.runtime.memGetInfo()
    block = np.random.default_rng(0).integers(0, 256, 1 << 26, dtype=np.uint8)  # random, but cheap to make: 64 MiB
    repeats = max(1, min(BANDWIDTH_BYTES, free // 4) // block.nbytes)
    data = cp.tile(cp.asarray(block), repeats)
    floor = measure_floor([data], "cold", _SWEEP)
    median = floor["median"]
    gb_per_s = [data.nbytes / us / 1e3 for us in (median["value"], *reversed(median["ci95"] or ()))]
    return measured(gb_per_s[0], "GB/s", ci95=gb_per_s[1:] or None, n=floor["n"], bytes=data.nbytes,
                    blocks=floor["blocks"], threads=floor["threads"], method="16-byte loads, CUDA graph")  # fmt: skip
