"""Power and energy: the energy counter of the GPU over windows of seconds, and sampled power beside it.

A window repeats the same work and nothing else. It begins and ends on a step of NVML's energy counter, with the device
synchronised at both ends. A sampler thread reads the power meanwhile; its integral has to agree with the counter, or
the window is marked ``suspect``. Where the sensor averages over a second, the work has run for one before the window
begins, lest what came before is in its readings. Idle windows of the same length, context alive, before and after all
others, give net figures. Boards measure with an error of about 10 %: small differences between two GPUs or two runs
mean nothing.

The whole benchmark measures tokens and one product; `edgellm bench power` all products.

Results of :func:`run`:

    plan                seconds and number of the windows
    note                what the figures of a board are worth
    idle, idle_after    one window each (:meth:`Meter.window`) without work; net is above the mean of both
    token               the windows of decoding, gross and net joules a token
    products            layer type -> the windows of its fused int8 product on cold weights, joules an operation;
                        `window`: the first of them
    avg_power_w, peak_power_w, min_power_w      sampled while decoding, with the name of the sensor's window
    energy_per_token_j  gross, median of the windows; energy_per_token_net_j: without what the GPU draws when idle;
                        both at the depth `context`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache as cached
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import edgellm_cupy as ec

from .. import statistics, timing
from ..context import Context, WrongResultError
from ..machine.rails import power_sensor
from ..machine.telemetry import Sampler
from ..metrics import Metric, inner, is_metric, measured, missing
from .hardware import NvmlDevice, current_nvml_device
from .latency import Operation, Problem, cold_weights
from .utilisation import CONTEXT, SENSOR_LEAD_S, Chunks, DecodeLoop

FEWEST_TICKS = 20
SUSPECT_PCT = 5.0
SENSOR_NOTE = "boards measure with about 10 % of error"

_SAMPLE_S = 0.02  # the counter of an H200 steps at most as often, the sensor every 25 ms at best
_TICK_TIMEOUT_S = 2.0
_SETTLE_S = 2.0  # after work a GPU keeps its clocks, and its draw, for a while
_NO_COUNTER = "this GPU has no energy counter"
_PRODUCT = Operation("rmsnorm_ternary_matmul", "int8")


@dataclass(frozen=True)
class Plan:
    """Seconds of a window, and how many windows of each work: six give a 95 % interval of the median."""

    window_s: float
    trials: int


def run(ctx: Context) -> dict[str, Any]:
    """Idle, decoding, and the products of the workload."""
    if ctx.no_gpu:
        return {key: missing(ctx.no_gpu, unit) for key, unit in _FIGURES.items()}
    plan = Plan(2.5, 2) if ctx.quick else Plan(10.0, 6)
    meter = Meter(current_nvml_device())
    idle = _idle(ctx, meter, plan, "before")
    decode = cached(lambda: Chunks(DecodeLoop(ctx)))
    trials = _trials(ctx, meter, plan, "decoding", lambda: (decode(), 1))
    products: dict[str, Any] = {}
    for layer, (m, k) in ctx.config.products().items():
        if products and (ctx.whole or ctx.quick):
            products[layer] = missing("the first product only; `edgellm bench power` without --quick takes all", "J")
            continue
        products[layer] = _product(ctx, meter, plan, Problem.random(layer, m, k))
    idle_after = _idle(ctx, meter, plan, "after")

    resting = (idle, idle_after)
    token = {**per_call(trials, resting, context=CONTEXT), "windows": trials, "boundary": "engine"}
    return {
        "plan": asdict(plan),
        "note": SENSOR_NOTE,
        "idle": idle,
        "idle_after": idle_after,
        "token": token,
        "products": {
            layer: {**p, **per_call(p["windows"], resting)} if "windows" in p else p for layer, p in products.items()
        },
        **_power(trials),
        "energy_per_token_j": token["gross_j"],
        "energy_per_token_net_j": token["net_j"],
    }


_FIGURES: dict[str, str | None] = {
    "plan": None,
    "note": None,
    "idle": None,
    "idle_after": None,
    "token": None,
    "products": None,
    "avg_power_w": "W",
    "peak_power_w": "W",
    "min_power_w": "W",
    "energy_per_token_j": "J",
    "energy_per_token_net_j": "J",
}


def _idle(ctx: Context, meter: Meter, plan: Plan, when: str) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        ctx.progress(f"power: idle, {when} the work")
        time.sleep(_SETTLE_S)
        return meter.window(Idle(), plan.window_s)

    return ctx.row(f"power/idle {when}", "kernel", measure)


def _trials(
    ctx: Context, meter: Meter, plan: Plan, what: str, work: Callable[[], tuple[Work, int]], boundary: str = "engine"
) -> list[dict[str, Any]]:
    """Windows of `work`, which is made when the first of them needs it: what repeats, and calls in one step of it."""

    def measure(trial: int) -> dict[str, Any]:
        ctx.progress(f"power: {what}, window {trial + 1} of {plan.trials}")
        step, calls = work()
        return meter.window(step, plan.window_s, calls)

    return [ctx.row(f"power/{what}, window {i + 1}", boundary, partial(measure, i)) for i in range(plan.trials)]


def _product(ctx: Context, meter: Meter, plan: Plan, p: Problem) -> dict[str, Any]:
    """The windows of one fused product: a graph over cold copies of the weight, again and again."""
    import cupy as cp

    x, gamma, y = cp.asarray(p.x), cp.asarray(p.gamma), cp.full(p.W.shape[0], cp.nan, cp.float16)

    def call_on(weight: ec.TernaryWeight) -> Callable[[], None]:
        return lambda: _PRODUCT.call(ec, x, gamma, weight, y)

    def work() -> tuple[Work, int]:
        rotation = timing.Rotation([call_on(w) for w in cold_weights(p.W)], p.W.packed.nbytes, "cold")
        graph = timing.capture(rotation)
        y.fill(cp.nan)
        graph.launch()
        if wrong := _PRODUCT.bound(p).check(y.get()):
            raise WrongResultError(f"{p.layer}: energy of {_PRODUCT.name}: {wrong}")
        return Chunks(graph.launch), rotation.launches

    m, k = p.W.shape
    windows = _trials(ctx, meter, plan, f"{p.layer} {m} x {k}", cached(work), "kernel")
    return {**_PRODUCT.facts(), "l2": "cold", "boundary": "kernel", "window": windows[0], "windows": windows}


# ---- one window -----------------------------------------------------------------------------------------------------


class Work(Protocol):
    """What runs in a window: :class:`.utilisation.Chunks`, or :class:`Idle`."""

    def once(self) -> int:
        """A few milliseconds of it, device synchronised at the end; returns the number of steps."""

    def for_seconds(self, seconds: float) -> int:
        """At least that long, device synchronised at the end; returns the number of steps."""


class Idle:
    """No work: what the GPU draws with the context alive."""

    def once(self) -> int:
        time.sleep(0.002)
        return 0

    def for_seconds(self, seconds: float) -> int:
        time.sleep(seconds)
        return 0


@dataclass(frozen=True)
class _Reading:
    """The energy counter right after it stepped.

    Attributes:
        joules: null when there is no counter, or when it did not step in time.
        at: time.perf_counter() of the reading.
        steps: of the work, done while waiting for it.
    """

    joules: Metric
    at: float
    steps: int


class Meter:
    """Measures windows on one GPU.

    Attributes:
        sensor: which power reading is sampled, and over which time it averages.
    """

    def __init__(self, device: NvmlDevice):
        self._device = device
        sensor = power_sensor(device)
        self._power, self.sensor = sensor.read, sensor.name
        averages = sensor.read == device.power_usage and device.power_usage_window() != "instantaneous"
        self._lead_s = SENSOR_LEAD_S if averages else 0.0

    def window(self, work: Work, seconds: float, calls_per_step: int = 1) -> dict[str, Any]:
        """Repeat `work` for at least `seconds`, from one step of the energy counter to another.

        Keys: seconds, calls, joules (of the window), mean_power_w, ticks (steps of the counter that were seen; a null
        figure without a counter), sampled_power_w, integral_j, counter_minus_integral_pct, suspect.
        """
        if self._lead_s:
            work.for_seconds(self._lead_s)
        counts = self._device.energy()["value"] is not None
        probes = {"power_w": self._power, "energy_j": self._device.energy}
        with Sampler(probes, interval_s=_SAMPLE_S) as sampler:
            begin = self._next_step(work)
            steps = work.for_seconds(seconds)
            end = self._next_step(work)
        elapsed, calls = end.at - begin.at, (steps + end.steps) * calls_per_step
        power = {**sampler.mean("power_w", begin.at, end.at), "sensor": self.sensor}
        integral = (
            missing(power["reason"], "J")
            if power["value"] is None
            else _integral(sampler.readings["power_w"], begin.at, end.at)
        )
        ticks = sum(a != b for a, b in pairwise(sampler.values("energy_j", begin.at, end.at)))
        without = {**integral, "source": f"integral of the sampled power: {_NO_COUNTER}; {self.sensor}"}
        joules = _joules(begin.joules, end.joules, ticks) if counts else without
        return {
            "seconds": elapsed,
            "calls": calls,
            "joules": joules,
            "ticks": ticks if counts else missing(_NO_COUNTER),
            "sampled_power_w": power,
            "mean_power_w": _divided(joules, elapsed, "W"),
            "integral_j": integral,
            **(
                _agreement(joules, integral) if counts else _disagreement_unknown("there is no counter to compare with")
            ),
        }

    def _next_step(self, work: Work) -> _Reading:
        """Work on until the energy counter steps."""
        before, steps, deadline = self._device.energy(), 0, time.perf_counter() + _TICK_TIMEOUT_S
        if before["value"] is None:
            return _Reading(before, time.perf_counter(), 0)
        while time.perf_counter() < deadline:
            steps += work.once()
            now = self._device.energy()
            if now["value"] != before["value"]:
                return _Reading(now, time.perf_counter(), steps)
        reason = f"the energy counter did not step within {_TICK_TIMEOUT_S:g} s"
        return _Reading(missing(reason, "J"), time.perf_counter(), steps)


def _joules(begin: Metric, end: Metric, ticks: int) -> Metric:
    """Energy of a window by the counter."""
    for reading in (begin, end):
        if reading["value"] is None:
            return reading
    if ticks < FEWEST_TICKS:
        return missing(f"{ticks} steps of the energy counter in the window, fewer than {FEWEST_TICKS}", "J")
    difference = end["value"] - begin["value"]
    if difference <= 0:
        return missing(f"the energy counter advanced by {difference} J", "J")
    return measured(difference, "J", source="nvmlDeviceGetTotalEnergyConsumption")


def _integral(readings: Sequence[tuple[float, float]], begin: float, end: float) -> Metric:
    """Joules from sampled watts by the trapezoid rule; the ends, where no sample lies, by the samples' mean power."""
    inside = [(t, watts) for t, watts in readings if begin <= t <= end]
    if len(inside) < FEWEST_TICKS:
        return missing(f"{len(inside)} power samples in the window, fewer than {FEWEST_TICKS}", "J")
    area = sum((t1 - t0) * (w0 + w1) / 2 for (t0, w0), (t1, w1) in pairwise(inside))
    span = inside[-1][0] - inside[0][0]
    return measured(area / span * (end - begin), "J", n=len(inside))


def _agreement(joules: Metric, integral: Metric) -> dict[str, Metric]:
    """How far counter and integral are apart; more than :data:`SUSPECT_PCT` makes the window suspect."""
    for figure in (joules, integral):
        if figure["value"] is None:
            return _disagreement_unknown(figure["reason"])
    apart = 100 * (joules["value"] - integral["value"]) / joules["value"]
    return {"counter_minus_integral_pct": measured(apart, "%"), "suspect": measured(abs(apart) > SUSPECT_PCT)}


def _disagreement_unknown(reason: str) -> dict[str, Metric]:
    return {"counter_minus_integral_pct": missing(reason), "suspect": missing(reason)}


# ---- from windows to figures ----------------------------------------------------------------------------------------


def per_call(windows: Sequence[dict[str, Any]], idle: Sequence[dict[str, Any]], **detail: Any) -> dict[str, Metric]:
    """Joules of one call: median over the windows, as drawn (`gross_j`) and above idle (`net_j`), with `detail`.

    Their `suspect` is true when any window is, and null, with `suspect_reason`, when none is but one cannot tell;
    `ticks`, the fewest of a window, is null, with `ticks_reason`, without a counter. A window without an energy is left
    out; with none left the figures are null with the first one's reason. `idle`: windows without work.
    """
    usable = [w for w in windows if inner(w, "joules")["value"] is not None]
    if not usable:
        nothing = missing(inner(windows[0], "joules")["reason"], "J")
        return {"gross_j": nothing, "net_j": nothing}
    detail |= {
        **_fewest_ticks(usable),
        "source": usable[0]["joules"]["source"],
        **_suspect(usable),
        "note": SENSOR_NOTE,
    }
    gross = statistics.median([w["joules"]["value"] / w["calls"] for w in usable], "J", **detail)
    resting = [inner(w, "mean_power_w") for w in idle]
    known = [power["value"] for power in resting if power["value"] is not None]
    if not known:
        return {"gross_j": gross, "net_j": missing(f"idle power: {resting[0]['reason']}", "J")}
    idle_w, idle_windows = sum(known) / len(known), len(known)
    above = [(w["joules"]["value"] - idle_w * w["seconds"]) / w["calls"] for w in usable]
    net = statistics.median(above, "J", idle_w=idle_w, idle_windows=idle_windows, **detail)
    return {"gross_j": gross, "net_j": net}


def _fewest_ticks(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if without := [w["ticks"]["reason"] for w in windows if is_metric(w["ticks"])]:
        return {"ticks": None, "ticks_reason": without[0]}
    return {"ticks": min(w["ticks"] for w in windows)}


def _suspect(windows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if any(w["suspect"]["value"] for w in windows):
        return {"suspect": True}
    unknown = [w["suspect"]["reason"] for w in windows if w["suspect"]["value"] is None]
    return {"suspect": None, "suspect_reason": unknown[0]} if unknown else {"suspect": False}


def _power(windows: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    """Average, peak and minimum of the power sampled in all windows."""
    sampled = [inner(w, "sampled_power_w", unit="W") for w in windows]
    usable = [power for power in sampled if power["value"] is not None]
    keys = ("avg_power_w", "peak_power_w", "min_power_w")
    if not usable:
        return dict.fromkeys(keys, missing(sampled[0]["reason"], "W"))
    n = sum(power["n"] for power in usable)
    average = sum(power["value"] * power["n"] for power in usable) / n
    values = (average, max(power["max"] for power in usable), min(power["min"] for power in usable))
    return {
        key: measured(value, "W", n=n, sensor=usable[0]["sensor"], of="decoding")
        for key, value in zip(keys, values, strict=True)
    }


def _divided(figure: Metric, by: float, unit: str) -> Metric:
    if figure["value"] is None:
        return missing(figure["reason"], unit)
    return measured(figure["value"] / by, unit)
