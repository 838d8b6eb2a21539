"""What this machine is: GPU by CUDA and NVML, host by the operating system.

NVML is asked about the device that CUDA uses, matched by PCI bus id: with several GPUs, or under CUDA_VISIBLE_DEVICES,
the two number their devices differently. The suite only reads; it changes no setting of the GPU.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

from .context import Context
from .metrics import Metric, measured, missing

MIB = 2**20
_PCIE_LOAD_SECONDS = 0.3
_PCIE_LOAD_BYTES = 64 * MIB


class NvmlDevice:
    """One GPU as NVML sees it. Every reading is a figure: a call that NVML refuses is null with NVML's own words.

    Attributes:
        unavailable: why nothing can be read (no driver, no such device), or None.
    """

    def __init__(self, pci_bus_id: str, nvml: Any = None):
        """`pci_bus_id`: as CUDA writes it, such as ``"0000:1b:00.0"``. `nvml`: the module `pynvml`, or a stand-in."""
        self._nvml = import_module("pynvml") if nvml is None else nvml
        self.unavailable: str | None = None
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except self._nvml.NVMLError as e:
            self.unavailable = f"NVML for the GPU at {pci_bus_id}: {e}"

    def read(
        self, what: str, *args: Any, unit: str | None = None, convert: Callable[[Any], Any] | None = None
    ) -> Metric:
        """The result of ``nvmlDeviceGet<what>(device, *args)``, through `convert` when given; `unit` is the result's.

        A `convert` that returns None says that NVML knows no value.
        """
        function = f"nvmlDeviceGet{what}"
        if self.unavailable:
            return missing(self.unavailable, unit)
        try:
            value = getattr(self._nvml, function)(self._handle, *args)
        except self._nvml.NVMLError as e:
            return missing(f"{function}: {e}", unit)
        value = convert(value) if convert else value
        return missing(f"{function} knows no value", unit) if value is None else measured(value, unit)

    def field(self, name: str, unit: str, scale: float) -> Metric:
        """The value of the field `name` (``"NVML_FI_DEV_..."``), an unsigned int, times `scale`."""

        def value_of(fields: Any) -> float | None:
            return fields[0].value.uiVal * scale if fields[0].nvmlReturn == self._nvml.NVML_SUCCESS else None

        return self.read("FieldValues", [getattr(self._nvml, name)], unit=unit, convert=value_of)

    # ---- what more than one part reads ------------------------------------------------------------------------------

    def sm_clock(self) -> Metric:
        return self.read("ClockInfo", self._nvml.NVML_CLOCK_SM, unit="MHz")

    def memory_clock(self) -> Metric:
        return self.read("ClockInfo", self._nvml.NVML_CLOCK_MEM, unit="MHz")

    def temperature(self) -> Metric:
        return self.read("Temperature", self._nvml.NVML_TEMPERATURE_GPU, unit="C")

    def throttle_reasons(self) -> Metric:
        """Names of what holds the clocks down now; an empty list when nothing does."""
        return self.read("CurrentClocksThrottleReasons", convert=self._throttle_names)

    def _throttle_names(self, mask: int) -> list[str]:
        prefix = "nvmlClocksThrottleReason"
        return [name for name in THROTTLE_REASONS if mask & getattr(self._nvml, prefix + name)]

    def power_instant(self) -> Metric:
        """Power averaged over the last 25 or 100 ms, in watts; not known to drivers and GPUs of before about 2022."""
        return self.field("NVML_FI_DEV_POWER_INSTANT", unit="W", scale=1e-3)

    def power_usage(self) -> Metric:
        """Power in watts; averaged over one second on Ampere and newer except GA100."""
        return self.read("PowerUsage", unit="W", convert=lambda mw: mw / 1e3)

    def energy(self) -> Metric:
        """Joules since the driver was loaded; the counter steps every 20 to 100 ms."""
        return self.read("TotalEnergyConsumption", unit="J", convert=lambda mj: mj / 1e3)

    def figures(self) -> dict[str, Metric]:
        """What stays as it is while the benchmark runs, and the clocks, temperature and power of this moment."""
        n = self._nvml
        return {
            "gpu_uuid": self.read("UUID"),
            "vram_total_mb": self.read("MemoryInfo", unit="MiB", convert=lambda m: m.total / MIB),
            "max_sm_clock_mhz": self.read("MaxClockInfo", n.NVML_CLOCK_SM, unit="MHz"),
            "max_memory_clock_mhz": self.read("MaxClockInfo", n.NVML_CLOCK_MEM, unit="MHz"),
            "power_limit_w": self.read("PowerManagementLimit", unit="W", convert=lambda mw: mw / 1e3),
            "power_max_w": self.read("PowerManagementLimitConstraints", unit="W", convert=lambda mw: mw[1] / 1e3),
            "pcie_generation_max": self.read("MaxPcieLinkGeneration"),
            "pcie_width_max": self.read("MaxPcieLinkWidth", unit="lanes"),
            "persistence_mode": self.read("PersistenceMode", convert=_enabled),
            "mig_mode": self.read("MigMode", convert=lambda modes: _enabled(modes[0])),
            "sm_clock_mhz": self.sm_clock(),
            "memory_clock_mhz": self.memory_clock(),
            "temperature_c": self.temperature(),
            "throttle_reasons": self.throttle_reasons(),
            "power_w": self.power_usage(),
        }

    def driver_version(self) -> Metric:
        if self.unavailable:
            return missing(self.unavailable)
        try:
            return measured(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError as e:
            return missing(f"nvmlSystemGetDriverVersion: {e}")


# Reasons that slow a GPU under load. GpuIdle and the owner's own clock settings are none.
SLOWED_DOWN = ("SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
THROTTLE_REASONS = ("GpuIdle", "ApplicationsClocksSetting", "SyncBoost", "DisplayClockSetting", *SLOWED_DOWN)


def _enabled(mode: int) -> str:
    return "Enabled" if mode else "Disabled"


@cache
def nvml_device(cuda_device: int) -> NvmlDevice:
    """NVML's view of CUDA device number `cuda_device`. Needs CuPy and a driver."""
    import cupy as cp

    return NvmlDevice(cp.cuda.runtime.deviceGetPCIBusId(cuda_device))


def current_nvml_device() -> NvmlDevice:
    """NVML's view of the current CUDA device."""
    import cupy as cp

    return nvml_device(cp.cuda.runtime.getDevice())


# ---- the part -------------------------------------------------------------------------------------------------------


def run(ctx: Context) -> dict[str, Any]:
    """Everything about GPU and host; see :func:`describe`."""
    ctx.progress("hardware: GPU and host")
    return describe(ctx.no_gpu)


def describe(no_gpu: str | None) -> dict[str, Metric]:
    """The current GPU, or its figures null with the reason `no_gpu`, and the host."""
    return {**(gpu() if no_gpu is None else dict.fromkeys(GPU_KEYS, missing(no_gpu))), **host()}


GPU_KEYS = (
    "gpu_model", "gpu_uuid", "pci_bus_id", "visible_gpus", "compute_capability", "sm_count", "l2_bytes",
    "vram_total_mb", "max_sm_clock_mhz", "max_memory_clock_mhz", "sm_clock_mhz", "memory_clock_mhz", "temperature_c",
    "throttle_reasons", "power_w", "power_limit_w", "power_max_w", "pcie_generation_max", "pcie_width_max",
    "pcie_generation_under_load", "pcie_width_under_load", "persistence_mode", "mig_mode", "driver_version",
    "cuda_version", "cuda_driver_version", "nvrtc_version", "cupy_version",
)  # fmt: skip
"""Keys of :func:`gpu`; null with one reason where there is none."""


def gpu() -> dict[str, Metric]:
    """The current CUDA device. Memory is in MiB, as nvidia-smi prints it under the name MB."""
    import cupy as cp

    from ..kernels import nvrtc

    runtime = cp.cuda.runtime
    device = runtime.getDevice()
    properties = runtime.getDeviceProperties(device)
    nvml = nvml_device(device)
    figures = {
        **nvml.figures(),
        **_pcie_under_load(nvml),
        "gpu_model": measured(properties["name"].decode()),
        "pci_bus_id": measured(runtime.deviceGetPCIBusId(device)),
        "visible_gpus": measured(runtime.getDeviceCount(), measured_device=device),
        "compute_capability": measured(f"{properties['major']}.{properties['minor']}"),
        "sm_count": measured(properties["multiProcessorCount"]),
        "l2_bytes": measured(properties["l2CacheSize"], "bytes"),
        "driver_version": nvml.driver_version(),
        "cuda_version": measured(cuda_version(runtime.runtimeGetVersion()), of="the CUDA runtime that CuPy uses"),
        "cuda_driver_version": measured(cuda_version(runtime.driverGetVersion()), of="the newest CUDA the driver runs"),
        "nvrtc_version": measured(nvrtc.version()),
        "cupy_version": measured(cp.__version__),
    }
    if figures["vram_total_mb"]["value"] is None:
        figures["vram_total_mb"] = measured(properties["totalGlobalMem"] / MIB, "MiB", source="CUDA")
    return {key: figures[key] for key in GPU_KEYS}


def cuda_version(number: int) -> str:
    """Such as ``"13.0"`` from CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _pcie_under_load(nvml: NvmlDevice) -> dict[str, Metric]:
    """Generation and width of the PCIe link while it copies: an idle link is put into a slower state."""
    import cupy as cp
    import cupyx

    source = cupyx.empty_pinned(_PCIE_LOAD_BYTES, dtype="uint8")
    target = cp.empty(_PCIE_LOAD_BYTES, dtype="uint8")
    stream = cp.cuda.Stream(non_blocking=True)
    what = {
        "pcie_generation_under_load": ("CurrPcieLinkGeneration", None),
        "pcie_width_under_load": ("CurrPcieLinkWidth", "lanes"),
    }
    seen: dict[str, list[Metric]] = {key: [] for key in what}
    end = time.perf_counter() + _PCIE_LOAD_SECONDS
    while time.perf_counter() < end:
        for _ in range(4):
            cp.cuda.runtime.memcpyAsync(
                target.data.ptr, source.ctypes.data, _PCIE_LOAD_BYTES, cp.cuda.runtime.memcpyHostToDevice, stream.ptr
            )
        for key, (function, unit) in what.items():
            seen[key].append(nvml.read(function, unit=unit))
        stream.synchronize()
    return {key: max(metrics, key=lambda m: m["value"] or 0) for key, metrics in seen.items()}


def host() -> dict[str, Metric]:
    """CPU, memory and operating system."""
    cores, clock = psutil.cpu_count(logical=False), psutil.cpu_freq()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu_model": _cpu_model(),
        "cpu_cores": measured(cores) if cores else missing("the operating system does not tell the number of cores"),
        "cpu_threads": measured(psutil.cpu_count(logical=True)),
        "cpu_threads_usable": measured(usable, of="this process"),
        "cpu_max_clock_mhz": measured(clock.max, "MHz") if clock and clock.max else missing("not told", "MHz"),
        "host_ram_total_mb": measured(psutil.virtual_memory().total / MIB, "MiB"),
        "os": measured(platform.system()),
        "os_version": measured(platform.release()),
        "os_detail": measured(_os_detail()),
    }


def _cpu_model() -> Metric:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return measured(value.strip())
    return measured(platform.processor()) if platform.processor() else missing("the operating system does not tell")


def _os_detail() -> str:
    if platform.system() == "Linux":
        try:
            return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {platform.platform()}"
        except OSError:  # a Linux without /etc/os-release
            return platform.platform()
    return platform.platform()
