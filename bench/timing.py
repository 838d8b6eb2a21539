"""Samples of a duration: taking them until they are precise enough, and saying what they are worth.

Three series, never mixed:

    kernel       launches inside a CUDA graph, between two events, divided by their number
    device       two events around one operation as a user calls it, the cost of enqueuing included
    end_to_end   wall clock, host arrays in and out

What samples are worth is :mod:`.statistics`' business.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from .statistics import FEWEST, relative_standard_error, summarise

GRAPH_LAUNCHES = 50  # fewest launches in a graph, so that what is left of its own start is spread thin
GRAPH_US = 5000  # a graph this long need not have as many: what is left of its start is 0.1 %
FEWEST_LAUNCHES = 8
PATIENCE = 4  # times the limit of time, for as many samples as an interval needs
COLD_L2_FACTOR = 3  # a cold rotation touches this many times the L2


@dataclass(frozen=True)
class StopRule:
    """When a series has enough samples.

    Attributes:
        relative_error: stop once the standard error of the mean, over the mean, is at most this (of as many samples as
            the series is worth, where they depend on each other) ...
        min_samples, min_seconds: ... and there are that many samples, and that much time has passed;
        max_seconds: or when this much time has passed, precise or not; :data:`PATIENCE` times as much where an interval
            has to be waited for;
        max_samples: or at this many samples, which p99 can rest on and a report can still hold.
    """

    relative_error: float = 0.005
    min_samples: int = 30
    min_seconds: float = 0.1
    max_seconds: float = 0.5
    max_samples: int = 2000


GLANCE = StopRule(relative_error=math.inf, min_samples=3, min_seconds=0.0)
QUICK = StopRule(relative_error=0.02, min_samples=20, min_seconds=0.02, max_seconds=0.2)


@dataclass
class Samples:
    """Raw samples in order.

    Attributes:
        unit: of the values, ``"us"`` or ``"ms"``.
        values: the samples.
        at_s: when each was complete, seconds after the series began.
        stop: why the series ended, in words.
    """

    unit: str
    values: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    stop: str = ""

    @property
    def relative_error(self) -> float:
        """See :func:`.statistics.relative_standard_error`: drifting samples count for fewer than they are."""
        return relative_standard_error(self.values)

    def summary(self, **detail: Any) -> dict[str, Any]:
        """See :func:`.statistics.summarise`."""
        return summarise(self.values, self.unit, at_s=self.at_s, stop=self.stop, **detail)


def take(sample: Callable[[], float], unit: str, rule: StopRule) -> Samples:
    """Call `sample`, which returns one duration in `unit`, until `rule` is content. Python collects no garbage then."""
    with _no_collection():
        return _take(sample, unit, rule)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collection of garbage takes milliseconds, and comes when it likes; as in Python's own timeit."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _take(sample: Callable[[], float], unit: str, rule: StopRule) -> Samples:
    series = Samples(unit)
    start = time.perf_counter()
    check_at = rule.min_samples
    while not series.stop:
        series.values.append(sample())
        elapsed = time.perf_counter() - start
        series.at_s.append(elapsed)
        enough = len(series.values) >= min(FEWEST, rule.min_samples) or elapsed >= PATIENCE * rule.max_seconds
        if (enough and elapsed >= rule.max_seconds) or len(series.values) >= rule.max_samples:
            limit = f"{rule.max_seconds:g} s" if elapsed >= rule.max_seconds else f"{rule.max_samples} samples"
            error = f"{series.relative_error:.2%}" if len(series.values) > 1 else "unknown"
            series.stop = f"limit of {limit} reached, relative standard error {error}"
        elif len(series.values) >= check_at and elapsed >= rule.min_seconds:
            # Looking at every sample would cost more than the samples; every tenth more is often enough.
            check_at = len(series.values) + max(1, len(series.values) // 10)
            if series.relative_error <= rule.relative_error:
                series.stop = f"relative standard error {series.relative_error:.2%} after {elapsed:.2f} s"
    return series


# ---- host -----------------------------------------------------------------------------------------------------------


def wall_clock(
    call: Callable[[], Any], rule: StopRule, unit: str = "us", prepare: Callable[[], Any] | None = None
) -> Samples:
    """Wall-clock samples of `call`, after two calls that warm it up; `prepare` runs before each, outside the clock."""
    scale = {"us": 1e6, "ms": 1e3}[unit]

    def sample() -> float:
        if prepare:
            prepare()
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * scale

    for _ in range(2):
        sample()
    return take(sample, unit, rule)


def wall_gaps(step: Callable[[], Any], n: int) -> list[float]:
    """Milliseconds from one return of `step` to the next, `n` times, by the wall clock; no garbage is collected."""
    with _no_collection():
        stamps = [time.perf_counter()]
        for _ in range(n):
            step()
            stamps.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(stamps)]


# ---- device ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotation:
    """The launches of a graph, each on one of several copies of the same data.

    A cold graph goes through the copies in turn; a warm one has as many launches, all of them on the first copy, so
    that the two differ in nothing but what the L2 holds.

    Attributes:
        calls: enqueue the same work, one on each copy.
        copy_bytes: of one copy: what is read once a call and shared with no other copy.
        l2: ``"cold"`` or ``"warm"``.
        least: fewest calls in a graph. Fewer than :data:`GRAPH_LAUNCHES` are enough where one takes long.
    """

    calls: Sequence[Callable[[], Any]]
    copy_bytes: int
    l2: str
    least: int = GRAPH_LAUNCHES

    @property
    def used(self) -> Sequence[Callable[[], Any]]:
        """The calls that the graph consists of."""
        return self.calls if self.l2 == "cold" else self.calls[:1]

    @property
    def launches(self) -> int:
        """Calls in one graph: whole rounds through all copies, at least `least`."""
        return math.ceil(self.least / len(self.calls)) * len(self.calls)

    @property
    def bytes_touched(self) -> int:
        """Bytes of all copies that the graph reads."""
        return self.copy_bytes * len(self.used)


def l2_bytes() -> int:
    """Bytes of the current device's L2 cache, as the driver reports them."""
    import cupy as cp

    return int(cp.cuda.runtime.getDeviceProperties(cp.cuda.runtime.getDevice())["l2CacheSize"])


def cold_copies(copy_bytes: int, l2: int) -> int:
    """How many copies of `copy_bytes` exceed :data:`COLD_L2_FACTOR` times `l2` bytes."""
    return COLD_L2_FACTOR * l2 // copy_bytes + 1


def capture(rotation: Rotation) -> Any:
    """A graph of `rotation.launches` calls, each of which ran once before: compiled, allocated, warm.

    Raises:
        ValueError: a cold rotation whose copies do not exceed :data:`COLD_L2_FACTOR` times the L2.
    """
    if rotation.l2 == "cold" and rotation.bytes_touched <= COLD_L2_FACTOR * (l2 := l2_bytes()):
        raise ValueError(f"{rotation.bytes_touched} bytes are not cold: the L2 holds {l2}, {COLD_L2_FACTOR} times that")
    import cupy as cp

    from ..kernels import capture as record

    for call in rotation.used:
        call()
    cp.cuda.Device().synchronize()

    def calls() -> None:
        for i in range(rotation.launches):
            rotation.used[i % len(rotation.used)]()

    return record(calls)  # not CuPy's own capture: this one frees the calls' workspaces together with the graph


def enough_launches(us: float) -> int:
    """Fewest launches of a graph whose calls take `us` each: :data:`GRAPH_LAUNCHES`, or fewer when they take
    :data:`GRAPH_US`."""
    return min(GRAPH_LAUNCHES, max(FEWEST_LAUNCHES, math.ceil(GRAPH_US / us)))


def launches_of(call: Callable[[], Any]) -> int:
    """:func:`enough_launches` of a graph of this call, by a glance at a short one: a call alone is mostly enqueuing."""
    return enough_launches(kernel(Rotation([call], 0, "warm", FEWEST_LAUNCHES), GLANCE)["median"]["value"])


def kernel(rotation: Rotation, rule: StopRule, prepare: Callable[[], Any] | None = None) -> dict[str, Any]:
    """The `kernel` series in microseconds a call: one sample is one replay of the graph, divided by its calls.

    Another replay goes before it, so that the device is busy when it reaches the first event: the start of a graph,
    about 5 us, stays out of the sample. What the graph needs between two nodes stays in: 0.8 us on an H200, as an empty
    kernel shows, less where launches overlap. `prepare` is called between the capture and the first replay, for example
    to poison the result that the graph has to write.

    Raises:
        ValueError: see :func:`capture`.
    """
    graph = capture(rotation)
    if prepare:
        prepare()
    series = _between_events(graph.launch, rule, rotation.launches, lead=graph.launch)
    return series.summary(
        series="kernel",
        method="CUDA graph between events, behind another replay",
        l2=rotation.l2,
        launches_per_sample=rotation.launches,
        copies=len(rotation.used),
        bytes_touched=rotation.bytes_touched,
        l2_bytes=l2_bytes(),
    )


def device(call: Callable[[], Any], rule: StopRule) -> dict[str, Any]:
    """The `device` series in microseconds: two events around one call, the GPU idle before it."""
    return _between_events(call, rule, 1).summary(series="device", method="events around one call")


def end_to_end(call: Callable[[], Any], rule: StopRule) -> dict[str, Any]:
    """The `end_to_end` series in microseconds: wall clock around a `call` that copies in, works, copies out, waits."""
    return wall_clock(call, rule).summary(series="end_to_end", method="wall clock, pinned host arrays")


def event_gaps(step: Callable[[], Any], n: int) -> list[float]:
    """Milliseconds between `n` steps of a chain on the current stream: an event behind each, none waited for."""
    import cupy as cp

    events = [cp.cuda.Event() for _ in range(n + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    return [float(cp.cuda.get_elapsed_time(a, b)) for a, b in pairwise(events)]


def _between_events(
    call: Callable[[], Any], rule: StopRule, divisor: int, lead: Callable[[], Any] | None = None
) -> Samples:
    """Microseconds of `call` over `divisor`; `lead` is enqueued before the first event."""
    import cupy as cp

    stream = cp.cuda.Stream(non_blocking=True)
    start, stop = cp.cuda.Event(), cp.cuda.Event()

    def sample() -> float:
        if lead:
            lead()
        start.record(stream)
        call()
        stop.record(stream)
        stop.synchronize()
        return float(cp.cuda.get_elapsed_time(start, stop)) * 1e3 / divisor

    cp.cuda.Device().synchronize()  # what other streams prepared must be there before this one reads it
    with stream:
        for _ in range(3):
            sample()
        return take(sample, "us", rule)
