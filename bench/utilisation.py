"""What the machine does while it decodes: utilisation, memory, clocks, temperature and PCIe, sampled during the work.

A sampler thread reads while the main thread keeps the device busy. Nothing here is read after the work is over, when an
idle GPU has already lowered its clocks and its link. NVML's calls release Python's lock; the work runs up to two chunks
ahead of the device, so that the sampler costs it nothing.

Results of :func:`run`: `work` (what ran, for how long), one figure for each probe (mean with min, max and n), and
the keys vram_used_mb, vram_free_mb, host_ram_used_mb, gpu_utilization_pct, memory_utilization_pct.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil

from .context import Context
from .hardware import MIB, SLOWED_DOWN, NvmlDevice, current_nvml_device
from .metrics import Metric, measured, missing

Probe = Callable[[], Metric]

INTERVAL_S = 0.05
CHUNK_SECONDS = 0.01
CONTEXT = 1024
"""Depth at which :class:`DecodeLoop` decodes, on average: what a token costs depends on it, so it must not drift."""
DECODE_SPAN = 128
"""Tokens that :class:`DecodeLoop` generates before it takes the cache back by as many."""


# ---- sampling -------------------------------------------------------------------------------------------------------


class Sampler:
    """Reads every probe each `interval_s` on a thread of its own, while the ``with`` block runs.

    Attributes:
        readings: name of a probe -> [(time.perf_counter() of the reading, value), ...] in order.
        refused: name of a probe -> the null figure of its last reading that had no value.
    """

    def __init__(self, probes: Mapping[str, Probe], interval_s: float = INTERVAL_S):
        self._probes, self.interval_s = dict(probes), interval_s
        self.readings: dict[str, list[tuple[float, Any]]] = {name: [] for name in probes}
        self.refused: dict[str, Metric] = {}
        self._units: dict[str, str | None] = {}
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgellm-sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        if self._error and not any(exception):
            raise self._error

    def _watch(self) -> None:
        try:
            while not self._done.is_set():
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


def under_conditions(ctx: Context, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of `measure`, and under `conditions` what NVML saw of the GPU meanwhile."""
    if ctx.no_gpu:
        return {**measure(), "conditions": missing(ctx.no_gpu)}
    with Sampler(condition_probes(current_nvml_device()), interval_s=0.1) as sampler:
        figures = measure()
    return {**figures, "conditions": conditions(sampler)}


def gpu_probes(device: NvmlDevice) -> dict[str, Probe]:
    """Everything that NVML tells about a GPU at work."""
    return {
        **condition_probes(device),
        "gpu_utilization_pct": lambda: device.read("UtilizationRates", unit="%", convert=lambda u: u.gpu),
        "memory_utilization_pct": lambda: device.read("UtilizationRates", unit="%", convert=lambda u: u.memory),
        "process_vram_mb": lambda: process_memory(device),
        "device_vram_used_mb": lambda: device.read("MemoryInfo", unit="MiB", convert=lambda m: m.used / MIB),
        "vram_free_mb": lambda: device.read("MemoryInfo", unit="MiB", convert=lambda m: m.free / MIB),
        "vram_total_mb": lambda: device.read("MemoryInfo", unit="MiB", convert=lambda m: m.total / MIB),
        "pcie_generation": lambda: device.read("CurrPcieLinkGeneration"),
        "pcie_width": lambda: device.read("CurrPcieLinkWidth", unit="lanes"),
        "power_w": device.power_usage,
    }


def process_memory(device: NvmlDevice) -> Metric:
    """Device memory of this process in MiB. In a container NVML may know it by another id, or by none."""
    processes = device.read("ComputeRunningProcesses_v3")
    if processes["value"] is None:
        return missing(processes["reason"], "MiB")
    mine = [p.usedGpuMemory for p in processes["value"] if p.pid == os.getpid() and p.usedGpuMemory is not None]
    return (
        measured(sum(mine) / MIB, "MiB") if mine else missing(f"NVML lists no memory of process {os.getpid()}", "MiB")
    )


def host_probes() -> dict[str, Probe]:
    """Memory of this process."""
    process = psutil.Process()
    return {"host_ram_used_mb": lambda: measured(process.memory_info().rss / MIB, "MiB")}


# ---- work -----------------------------------------------------------------------------------------------------------


class DecodeLoop:
    """Each call enqueues one decoded token, at a context of :data:`CONTEXT` tokens give or take half a span."""

    def __init__(self, ctx: Context):
        self._start, self._end = CONTEXT - DECODE_SPAN // 2, CONTEXT + DECODE_SPAN // 2
        self._model, self._cache = ctx.model, ctx.new_cache(self._end)
        self._cache.fill_random(self._start)
        self._token: Any = 1  # decoding needs some id to start from; its value costs nothing

    def __call__(self) -> None:
        if self._cache.length == self._end:
            self._cache.truncate(self._start)
        self._token = self._model.decode_one_token(self._token, self._cache)

    def __str__(self) -> str:
        return f"greedy decoding at a context of {self._start} to {self._end} tokens, again and again"


class Chunks:
    """Keeps a CUDA device busy with calls of `step`, the host at most two chunks ahead of it.

    Without a limit the driver queues a thousand launches, seconds of work that no clock of the host could end.
    """

    def __init__(self, step: Callable[[], Any]):
        import cupy as cp

        self._cp, self._step = cp, step
        self._stream = cp.cuda.Stream(non_blocking=True)
        self._pending = [cp.cuda.Event(block=True, disable_timing=True) for _ in range(2)]
        cp.cuda.Device().synchronize()
        with self._stream:
            for _ in range(3):  # compiled, allocated, graph uploaded
                step()
            self._stream.synchronize()
            start, trial = time.perf_counter(), 8
            for _ in range(trial):
                step()
            self._stream.synchronize()
        self.size = max(1, round(CHUNK_SECONDS * trial / (time.perf_counter() - start)))

    def once(self) -> int:
        """One chunk, device synchronised at the end. Returns the number of calls."""
        with self._stream:
            for _ in range(self.size):
                self._step()
            self._stream.synchronize()
        return self.size

    def for_seconds(self, seconds: float) -> int:
        """Chunks for at least `seconds`, device synchronised at the end. Returns the number of calls."""
        calls, end = 0, time.perf_counter() + seconds
        with self._stream:
            while time.perf_counter() < end:
                for _ in range(self.size):
                    self._step()
                calls += self.size
                self._pending[0].record(self._stream)
                self._pending.reverse()
                self._pending[0].synchronize()  # the chunk before this one
            self._stream.synchronize()
        return calls


def _repeat(step: Callable[[], Any], seconds: float) -> int:
    """Calls of `step` on the host for at least `seconds`; how many."""
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        step()
        calls += 1
    return calls


# ---- the part -------------------------------------------------------------------------------------------------------


def run(ctx: Context) -> dict[str, Any]:
    """Sample while the workload's model decodes."""
    ctx.progress("utilisation and memory while decoding")
    seconds = 1.0 if ctx.quick else 4.0  # NVML's own utilisation window is up to one second
    step = DecodeLoop(ctx)
    if ctx.no_gpu:
        step()
        with Sampler(host_probes()) as sampler:
            start = time.perf_counter()
            calls = _repeat(step, seconds)
        figures = dict.fromkeys(_GPU_KEYS, missing(ctx.no_gpu))
    else:
        chunks = Chunks(step)
        chunks.for_seconds(0.5 * seconds)  # what NVML averages over must be full of work before the first reading
        with Sampler({**gpu_probes(current_nvml_device()), **host_probes()}) as sampler:
            start = time.perf_counter()
            calls = chunks.for_seconds(seconds)
        figures = _gpu_figures(sampler)
    elapsed = time.perf_counter() - start
    return {
        "work": {
            "what": str(step),
            "context": CONTEXT,
            "calls": calls,
            "seconds": elapsed,
            "sampled_every_s": sampler.interval_s,
        },
        **figures,
        "host_ram_used_mb": {**sampler.mean("host_ram_used_mb"), "scope": "resident memory of this process"},
    }


_GPU_KEYS = (
    "sm_clock_mhz", "memory_clock_mhz", "temperature_c", "throttle_reasons", "throttled", "gpu_utilization_pct",
    "memory_utilization_pct", "process_vram_mb", "device_vram_used_mb", "vram_free_mb", "vram_total_mb",
    "pcie_generation", "pcie_width", "power_w", "vram_used_mb",
)  # fmt: skip


def _gpu_figures(sampler: Sampler) -> dict[str, Metric]:
    numeric = [key for key in _GPU_KEYS if key in sampler.readings and key != "throttle_reasons"]
    figures = {**conditions(sampler), **{key: sampler.mean(key) for key in numeric}}
    for key in ("gpu_utilization_pct", "memory_utilization_pct"):
        figures[key] = {**figures[key], "context": CONTEXT}
    mine, whole = figures["process_vram_mb"], figures["device_vram_used_mb"]
    figures["vram_used_mb"] = (
        {**mine, "scope": "this process"}
        if mine["value"] is not None
        else {**whole, "scope": f"the whole device ({mine['reason']})"}
    )
    return figures
