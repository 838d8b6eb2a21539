"""`edgellm tune`: which enumerated configuration is the fastest for each product of a workload, on this GPU.

Every candidate is checked as in :mod:`.parts.table`: on a poisoned result, before it is timed and after, a random
sample of tokens and rows against the float64 reference. What is wrong has failed and is never kept. Times are those of
the `kernel` series with a cold L2.

The smallest of many noisy medians flatters its owner, so the fastest of a short look at all of them is measured again
together with the default, and kept when it is faster by more than :data:`MARGIN` and the intervals are apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import edgellm_cupy as ec

from ..arguments import MODEL_DTYPES
from ..formats import packing
from ..formats.config import ModelConfig
from ..ops import enqueue
from ..tuning import dispatch, tuned
from ..tuning.device import DeviceFacts, current_facts
from ..tuning.tuned import Tuned
from . import timing
from .context import WrongResultError
from .metrics import Metric
from .parts import table
from .parts.latency import EPS, cold_weights
from .parts.shapes import TABLE, Shape
from .timing import Rotation, StopRule

MARGIN = 0.02

_LOOK = StopRule(relative_error=0.02, min_samples=6, min_seconds=0.0, max_seconds=0.05)
_MEASURE = StopRule(relative_error=0.003, min_samples=12, min_seconds=0.05, max_seconds=0.5)
_HOPELESS = 3.0  # times the default's time of one call, launching included: its graph is not worth recording


class Product(NamedTuple):
    """A product of the workload.

    Attributes:
        gamma: dtype of the norm weights; None without a norm.
    """

    shape: Shape
    gamma: str | None


@dataclass(frozen=True)
class Row:
    """What came of one problem.

    Attributes:
        default: what dispatch chooses by itself.
        default_us: its time in microseconds; None when its result was wrong.
        best: what is kept; None: the default.
    """

    product: Product
    problem: dispatch.Problem
    default: dispatch.Config
    default_us: float | None
    best: Tuned | None


class Outcome(NamedTuple):
    """Of a run.

    Attributes:
        failures: one line for each candidate whose result was wrong.
        path: the file that holds the choices.
    """

    rows: list[Row]
    failures: list[str]
    path: Path


def of_model(config: ModelConfig) -> list[Product]:
    """The products of one decoder layer, with the float32 norms that the decoder has before the first and the third."""
    normed = ("qkv", "gate_up", "up")
    return [
        Product(Shape(config.name, layer, m, k), "float32" if layer in normed else None)
        for layer, (m, k) in config.products().items()
    ]


def of_table(dtype: str) -> list[Product]:
    """The fused products that `edgellm bench latency --shapes table` measures, with norms of x's dtype."""
    return [Product(shape, dtype) for shape in TABLE]


def run(
    products: Sequence[Product],
    tokens: Sequence[int],
    activations: Sequence[str],
    dtype: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Measure every product for each number of tokens and activation, and write down each choice as it is found.

    Raises:
        GpuUnavailableError: no usable GPU.
        EdgeLLMError: the file of choices cannot be written.
    """
    import cupy as cp

    facts, key = current_facts(), tuned.key_of(cp.cuda.runtime.getDevice())
    path = tuned.save(tuned.folder(), key, facts, {})  # fails now, not after minutes of work
    rows: list[Row] = []
    failures: list[str] = []
    for product in products:
        operands = _Operands(product, max(tokens), dtype)
        for n in tokens:
            for activation in activations:
                trial = _Trial(operands, n, activation)
                progress(f"{trial.name}: {len(dispatch.candidates(trial.problem, facts))} candidates")
                rows.append(_row(product, trial, facts, failures))
                tuned.save(tuned.folder(), key, facts, {trial.problem: rows[-1].best})
        del operands, trial
        cp.get_default_memory_pool().free_all_blocks()  # the next product's copies have another size
    return Outcome(rows, failures, path)


def _row(product: Product, trial: _Trial, facts: DeviceFacts, failures: list[str]) -> Row:
    problem, default = trial.problem, dispatch.choose(trial.problem, "adaptive", facts)

    def measure(config: dispatch.Config, rule: StopRule) -> Metric | None:
        """None when it is wrong or hopeless."""
        try:
            return trial.time(config, rule)
        except WrongResultError as e:
            failures.append(f"{trial.name}, {text_of(config)}: {e}")
            return None

    others = [c for c in dispatch.candidates(problem, facts) if c != default]
    seen = {config: figure for config in (default, *others) if (figure := measure(config, _LOOK))}
    fastest = min(seen, key=lambda config: seen[config]["value"], default=default)
    if fastest != default and default in seen:
        seen = {config: figure for config in (fastest, default) if (figure := measure(config, _MEASURE))}
    if default not in seen:
        return Row(product, problem, default, None, None)
    default_us = seen[default]["value"]
    kept = fastest in seen and faster(seen[fastest], seen[default])
    return Row(
        product, problem, default, default_us, Tuned(fastest, seen[fastest]["value"], default_us) if kept else None
    )


def faster(a: Metric, b: Metric) -> bool:
    """Whether the median time `a` is smaller than `b` by more than the noise."""
    if not (a["ci95"] and b["ci95"]):
        return False
    return bool(a["value"] < (1 - MARGIN) * b["value"] and a["ci95"][1] < b["ci95"][0])


def _problem(shape: Shape, n: int) -> table.Problem:
    """Random operands for any K; those of the table fill whole chunks."""
    whole = table.Problem.random(shape._replace(k=packing.chunks(shape.k) * packing.CHUNK), n)
    if whole.shape == shape:
        return whole
    W = ec.TernaryWeight.from_int8(whole.W.to_int8()[:, : shape.k], whole.W.scale)
    return replace(whole, shape=shape, x=whole.x[:, : shape.k], gamma=whole.gamma[: shape.k], W=W)


class _Operands:
    """A product's arrays on the device, made once for all numbers of tokens."""

    def __init__(self, product: Product, n: int, dtype: str):
        import cupy as cp

        gamma = MODEL_DTYPES[product.gamma or dtype]
        p = _problem(product.shape, n)
        self.product, self.dtype = product, dtype
        self.host = replace(p, x=p.x.astype(MODEL_DTYPES[dtype]), gamma=p.gamma.astype(gamma))
        self.x = cp.asarray(self.host.x)
        self.gamma = cp.asarray(self.host.gamma) if product.gamma else None
        self.y = cp.empty((n, product.shape.m), self.host.x.dtype)
        self.weights = cold_weights(p.W)


class _Trial:
    """One problem, to be solved by any configuration."""

    def __init__(self, operands: _Operands, n: int, activation: str):
        product, shape = operands.product, operands.product.shape
        self._operands, self._x, self._y = operands, operands.x[:n], operands.y[:n]
        self._sample = operands.host.sample(n, activation, fused=product.gamma is not None)
        self._glance_us = 0.0  # of the first configuration
        # CuPy's memory is aligned, so it depends on K alone whether rows are.
        self.problem = dispatch.Problem(
            shape.m, n, shape.k, operands.dtype, product.gamma, shape.k % 4 == 0, activation
        )
        self.name = f"{shape.name} {shape.m} x {shape.k}, N = {n}, {activation}"

    def time(self, config: dispatch.Config, rule: StopRule) -> Metric | None:
        """The median in microseconds; None where one call shows already that the first configuration is far faster.

        Raises:
            WrongResultError: the result is not the reference's.
        """
        import cupy as cp

        o = self._operands
        calls = [
            partial(enqueue.product, cp, self._x, o.gamma, w, EPS, self.problem.activation, None, config, self._y)
            for w in o.weights
        ]
        self._poison()
        calls[0]()
        self._check()
        us = timing.device(calls[0], timing.GLANCE)["median"]["value"]
        self._glance_us = self._glance_us or us
        if us > _HOPELESS * self._glance_us:
            return None
        least = timing.enough_launches(us)
        rotation = Rotation(calls, o.host.W.packed.nbytes, "cold", least)
        series = timing.kernel(rotation, rule, self._poison)
        self._check()
        median: Metric = series["median"]
        return median

    def _poison(self) -> None:
        import cupy as cp

        cp.copyto(self._y, np.nan, casting="unsafe")  # what fill() makes of NaN is not said for bfloat16

    def _check(self) -> None:
        if wrong := self._sample.check(self._y):
            raise WrongResultError(f"wrong result: {wrong}")


# ---- what a reader sees ---------------------------------------------------------------------------------------------


def text_of(config: dispatch.Config) -> str:
    """Such as ``"streaming 1/2/4/4/512/4/1"``: the strategy and its fields, which :func:`text` explains."""
    return f"{tuned.strategy(config)} {'/'.join(map(str, astuple(config)))}"


def text(outcome: Outcome) -> str:
    """The choices as a table for a terminal."""
    head = ("product", "M x K", "N", "activation", "default", "us", "fastest", "us", "gain")
    lines = [head, *map(_cells, outcome.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 1, 3, 4, 6)
    table = [
        "  ".join(f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in lines
    ]
    names = [f"{name}: {'/'.join(f.name for f in fields(kind))}" for name, kind in tuned.CONFIGS.items()]
    kept = sum(row.best is not None for row in outcome.rows)
    total = f"{kept} of {len(outcome.rows)} defaults beaten by more than {MARGIN:.0%}"
    notes = ["", "Median of a launch in microseconds, cold L2, in a CUDA graph.", *names, "", total]
    return "\n".join(line.rstrip() for line in (*table, *notes))


def _cells(row: Row) -> tuple[str, ...]:
    shape, best = row.product.shape, row.best
    what = (shape.name, f"{shape.m} x {shape.k}", str(row.problem.n), row.problem.activation)
    default = (text_of(row.default), "wrong" if row.default_us is None else f"{row.default_us:.2f}")
    found = (text_of(best.config), f"{best.us:.2f}", f"{best.default_us / best.us - 1:.1%}") if best else ("", "", "")
    return (*what, *default, *found)
