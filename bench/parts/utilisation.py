"""What the machine does while it decodes: utilisation, memory, clocks, temperature and PCIe, sampled during the work.

A :class:`..machine.telemetry.Sampler` reads while the main thread keeps the device busy. Nothing here is read after the
work is over, when an idle GPU has already lowered its clocks and its link. The work runs up to two chunks ahead of the
device, so that the sampler costs it nothing.

Results of :func:`run`: `work` (what ran, for how long), one figure for each probe (mean with min, max and n), and
the keys vram_used_mb, vram_free_mb, host_ram_used_mb, gpu_utilization_pct, memory_utilization_pct.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from ..context import Context
from ..machine.rails import power_sensor
from ..machine.telemetry import Probe, Sampler, condition_probes, conditions
from ..metrics import Metric, is_metric, measured, missing
from .hardware import MIB, NvmlDevice, current_nvml_device

CHUNK_SECONDS = 0.01
CONTEXT = 1024
"""Depth at which :class:`DecodeLoop` decodes, on average: what a token costs depends on it, so it must not drift."""
DECODE_SPAN = 128
"""Tokens that :class:`DecodeLoop` generates before it takes the cache back by as many."""

SENSOR_LEAD_S = 1.2
"""Seconds of work before the first reading of what NVML averages over up to one second: utilisation, some power."""


# ---- probes ---------------------------------------------------------------------------------------------------------


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
        "power_w": power_sensor(device).read,
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
    found = ctx.row("utilisation", "engine", lambda: _measure(ctx))
    return found if not is_metric(found) else dict.fromkeys((*_GPU_KEYS, "host_ram_used_mb"), found)


def _measure(ctx: Context) -> dict[str, Any]:
    ctx.progress("utilisation and memory while decoding")
    seconds = 1.0 if ctx.quick else 4.0
    step = DecodeLoop(ctx)
    if ctx.no_gpu:
        step()
        with Sampler(host_probes()) as sampler:
            start = time.perf_counter()
            calls = _repeat(step, seconds)
        figures = dict.fromkeys(_GPU_KEYS, missing(ctx.no_gpu))
    else:
        chunks = Chunks(step)
        chunks.for_seconds(SENSOR_LEAD_S)  # what NVML averages over must be full of work before the first reading
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
        figures[key] = {**figures[key], "context": CONTEXT, "scope": "the whole device, while this process decodes"}
    mine, whole = figures["process_vram_mb"], figures["device_vram_used_mb"]
    figures["vram_used_mb"] = (
        {**mine, "scope": "this process"}
        if mine["value"] is not None
        else {**whole, "scope": f"the whole device ({mine['reason']})"}
    )
    return figures
