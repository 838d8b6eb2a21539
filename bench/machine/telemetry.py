"""What NVML sees of the GPU while something is measured: samples on a thread of their own.

A :class:`Sampler` reads a set of probes for a while. One :class:`Telemetry` watches a whole run, ten times a second:
clocks, temperature, throttle reasons and power. It tells each row under which conditions it was measured, and the
report how they went over time. NVML's calls release Python's lock; what measures this process itself pauses the thread.

conditions of a row:

    begin_s, end_s      seconds since the run began
    before, after       {sm_clock_mhz, memory_clock_mhz, temperature_c, throttle_reasons}, read at once
    sm_clock_mhz, memory_clock_mhz, temperature_c    meanwhile: mean, with min, max and n
    throttle_reasons    all that were seen meanwhile and after; those `before` are what the row before left behind
    throttled           whether one of them slows a GPU under load
    resumed             true in a row that an earlier process has measured: its seconds are those of that process
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..metrics import Metric, measured, missing
from .nvml import SLOWED_DOWN, NvmlDevice
from .rails import power_sensor

Probe = Callable[[], Metric]

INTERVAL_S = 0.05
TELEMETRY_S = 0.1


class Sampler:
    """Reads every probe each `interval_s` on a thread of its own, while the ``with`` block runs.

    Attributes:
        readings: name of a probe -> [(time.perf_counter() of the reading, value), ...] in order.
        refused: name of a probe -> the null figure of its last reading that had no value.
        is_paused: inside :meth:`paused`.
    """

    is_paused = False

    def __init__(self, probes: Mapping[str, Probe], interval_s: float = INTERVAL_S):
        self._probes, self.interval_s = dict(probes), interval_s
        self.readings: dict[str, list[tuple[float, Any]]] = {name: [] for name in probes}
        self.refused: dict[str, Metric] = {}
        self._units: dict[str, str | None] = {}
        self._error: BaseException | None = None
        self._done, self._awake = threading.Event(), threading.Event()
        self._awake.set()
        self._thread = threading.Thread(target=self._watch, name="edgellm-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._awake.set()
        self._thread.join()
        if self._error and not any(exception):
            raise self._error

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is read: the thread sleeps, and its CPU time is not this process's."""
        self._awake.clear()
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False
            self._awake.set()

    def _watch(self) -> None:
        try:
            while not self._done.is_set():
                self._awake.wait()
                for name, probe in self._probes.items():
                    self._read(name, probe)
                self._done.wait(self.interval_s)
        except Exception as e:  # a probe's bug belongs to the thread that asked for the samples
            self._error = e

    def _read(self, name: str, probe: Probe) -> None:
        metric = probe()
        if metric["value"] is None:
            self.refused[name] = metric
            return
        self._units[name] = metric.get("unit")
        self.readings[name].append((time.perf_counter(), metric["value"]))

    def unit(self, name: str) -> str | None:
        """Of a probe's values; None where it has none, or was never read."""
        return self._units.get(name)

    def values(self, name: str, begin: float = 0.0, end: float = float("inf")) -> list[Any]:
        """The values read between `begin` and `end` (time.perf_counter())."""
        return [value for t, value in self.readings[name] if begin <= t <= end]

    def mean(self, name: str, begin: float = 0.0, end: float = float("inf")) -> Metric:
        """Mean of a numeric probe with min, max and number of readings, or null with the reason."""
        values = self.values(name, begin, end)
        if not values:
            return self.refused.get(name) or missing(f"no reading in {self.interval_s * 1e3:.0f} ms steps")
        unit = self._units[name]
        return measured(sum(values) / len(values), unit, n=len(values), min=min(values), max=max(values))

    def union(self, name: str, begin: float = 0.0, end: float = float("inf")) -> Metric:
        """All members that a probe of lists showed at any time, sorted, or null with the reason."""
        values = self.values(name, begin, end)
        if not values:
            return self.refused.get(name) or missing(f"no reading in {self.interval_s * 1e3:.0f} ms steps")
        return measured(sorted({member for value in values for member in value}), n=len(values))


def condition_probes(device: NvmlDevice) -> dict[str, Probe]:
    """Clocks, temperature and throttle reasons: under which conditions something was timed."""
    return {
        "sm_clock_mhz": device.sm_clock,
        "memory_clock_mhz": device.memory_clock,
        "temperature_c": device.temperature,
        "throttle_reasons": device.throttle_reasons,
    }


def conditions(sampler: Sampler, begin: float = 0.0, end: float = float("inf")) -> dict[str, Metric]:
    """The :func:`condition_probes` between two times, and whether the GPU was slowed down meanwhile."""
    reasons = sampler.union("throttle_reasons", begin, end)
    throttled = (
        missing(reasons["reason"])
        if reasons["value"] is None
        else measured(bool(set(reasons["value"]) & set(SLOWED_DOWN)))
    )
    clocks = {key: sampler.mean(key, begin, end) for key in ("sm_clock_mhz", "memory_clock_mhz", "temperature_c")}
    return {**clocks, "throttle_reasons": reasons, "throttled": throttled}


class Telemetry:
    """One sampler for a whole run, and what each row needs of it. Without a device there is only the reason why.

    Used as a context manager; times are counted from its beginning.

    Attributes:
        broken: name of a probe -> the first exception that it raised. Its readings are null with that reason; what is
            measured meanwhile, and the other probes, go on.
    """

    def __init__(self, device: NvmlDevice | None, why_none: str = "nothing watched the GPU"):
        self._why_none = why_none
        self._sampler: Sampler | None = None
        self._conditions: dict[str, Probe] = {}
        self.broken: dict[str, Exception] = {}
        if device:
            power = power_sensor(device)
            self._power_sensor = power.name
            probes = {**condition_probes(device), "power_w": power.read}
            probes = {name: partial(self._read, name, probe) for name, probe in probes.items()}
            self._sampler = Sampler(probes, TELEMETRY_S)
            self._conditions = {name: probe for name, probe in probes.items() if name != "power_w"}
        self._start = time.perf_counter()
        self._parts: list[dict[str, Any]] = []

    def __enter__(self) -> Telemetry:
        if self._sampler:
            self._sampler.__enter__()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._sampler:
            self._sampler.__exit__(*exception)

    @contextmanager
    def watch(self) -> Iterator[dict[str, Any]]:
        """Hands out a dictionary that holds the conditions of the ``with`` block once it has ended."""
        found: dict[str, Any] = {}
        if not self._sampler:
            found.update(missing(self._why_none))
            yield found
            return
        before, paused = self._now(), self._sampler.is_paused
        begin = time.perf_counter()
        yield found
        end, after = time.perf_counter(), self._now()
        found.update(begin_s=self._since(begin), end_s=self._since(end), before=before, after=after)
        found.update(conditions(self._sampler, begin, end))
        if paused:
            nothing = missing("sampling paused: the row is about this process itself")
            found.update(dict.fromkeys(("sm_clock_mhz", "memory_clock_mhz", "temperature_c"), nothing))
        # A reason outlasts its cause by some tenths of a second. One from `before` counts if it lasts into the row.
        seen = [c["throttle_reasons"] for c in (found, after) if c["throttle_reasons"]["value"] is not None]
        if seen:
            reasons = sorted({reason for c in seen for reason in c["value"]})
            found["throttle_reasons"] = measured(reasons, n=sum(c.get("n", 1) for c in seen))
            found["throttled"] = measured(bool(set(reasons) & set(SLOWED_DOWN)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is sampled."""
        if not self._sampler:
            yield
            return
        with self._sampler.paused():
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Note when a part of the benchmark ran."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._parts.append({"name": name, "begin_s": self._since(begin), "end_s": self._since(end)})

    def figures(self) -> dict[str, Any]:
        """Everything that was sampled, as the report keeps it: {every_s, series, parts}; or null with the reason."""
        if not self._sampler:
            return missing(self._why_none)
        series = {
            name: {
                "unit": self._sampler.unit(name),
                "at_s": [self._since(t) for t, _ in readings],
                "values": [value for _, value in readings],
            }
            for name, readings in self._sampler.readings.items()
            if name != "throttle_reasons"
        }
        return {"every_s": TELEMETRY_S, "power_sensor": self._power_sensor, "series": series, "parts": self._parts}

    def _since(self, t: float) -> float:
        return round(t - self._start, 3)

    def _now(self) -> dict[str, Metric]:
        return {name: probe() for name, probe in self._conditions.items()}

    def _read(self, name: str, probe: Probe) -> Metric:
        try:
            return probe()
        except Exception as e:  # a bug of one probe: no reading is worth a run
            self.broken.setdefault(name, e)
            return missing(f"{type(e).__name__}: {e}")
