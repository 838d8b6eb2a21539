"""What this machine is: GPU by CUDA and NVML (:mod:`..machine.nvml`), host by the operating system."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..machine import rails
from ..machine.nvml import MIB, NvmlDevice, current_nvml_device
from ..metrics import Metric, measured, missing

if TYPE_CHECKING:  # a context's telemetry reads this module's devices
    from ..context import Context

_PCIE_LOAD_SECONDS = 0.3
_PCIE_LOAD_BYTES = 64 * MIB


# ---- the part -------------------------------------------------------------------------------------------------------


def run(ctx: Context) -> dict[str, Any]:
    """Everything about GPU and host; see :func:`describe`."""
    ctx.progress("hardware: GPU and host")
    return describe(ctx.no_gpu)


def describe(no_gpu: str | None) -> dict[str, Metric]:
    """The current GPU, or its figures null with the reason `no_gpu`, and the host."""
    return {**(gpu() if no_gpu is None else dict.fromkeys(GPU_KEYS, missing(no_gpu))), **host()}


GPU_KEYS = (
    "gpu_model", "gpu_uuid", "pci_bus_id", "visible_gpus", "gpus_in_machine", "compute_capability", "sm_count",
    "l2_bytes", "vram_total_mb", "memory_bus_bits", "ecc_mode", "max_sm_clock_mhz", "max_memory_clock_mhz",
    "application_sm_clock_mhz", "application_memory_clock_mhz", "sm_clock_mhz", "memory_clock_mhz", "temperature_c",
    "slowdown_temperature_c", "throttle_reasons", "power_w", "power_limit_w", "power_limit_default_w", "power_min_w",
    "power_max_w", "pcie_generation_max", "pcie_width_max", "pcie_generation_under_load", "pcie_width_under_load",
    "persistence_mode", "compute_mode", "mig_mode", "virtualisation", "vbios_version", "driver_version",
    "cuda_version", "cuda_driver_version", "nvrtc_version", "cupy_version",
)  # fmt: skip
"""Keys of :func:`gpu`; null with one reason where there is none."""


def gpu() -> dict[str, Metric]:
    """The current CUDA device. Memory is in MiB, as nvidia-smi prints it under the name MB."""
    import cupy as cp

    from ...kernels import nvrtc

    runtime = cp.cuda.runtime
    device = runtime.getDevice()
    properties = runtime.getDeviceProperties(device)
    nvml = current_nvml_device()
    figures = {
        **nvml.figures(),
        **pcie_under_load(nvml),
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
    if figures["power_w"]["value"] is None:
        sensor = rails.power_sensor(nvml)
        figures["power_w"] = {**sensor.read(), "sensor": sensor.name}
    return {key: figures[key] for key in GPU_KEYS}


def cuda_version(number: int) -> str:
    """Such as ``"13.0"`` from CUDA's 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def pcie_under_load(nvml: NvmlDevice) -> dict[str, Metric]:
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
    cores = psutil.cpu_count(logical=False)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "board_model": _board_model(),
        "cpu_model": _cpu_model(),
        "cpu_architecture": measured(platform.machine()),
        "cpu_cores": measured(cores) if cores else missing("the operating system does not tell the number of cores"),
        "cpu_threads": measured(psutil.cpu_count(logical=True)),
        "cpu_threads_usable": measured(usable, of="this process"),
        "cpu_max_clock_mhz": _cpu_max_clock(),
        "host_ram_total_mb": measured(psutil.virtual_memory().total / MIB, "MiB"),
        "os": measured(platform.system()),
        "os_version": measured(platform.release()),
        "os_detail": measured(_os_detail()),
    }


def _cpu_max_clock() -> Metric:
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError) as e:  # a kernel that shows no clocks
        return missing(f"the operating system does not tell the clock: {e}", "MHz")
    if not clock or not clock.max:
        return missing("the operating system does not tell the highest clock", "MHz")
    return measured(clock.max, "MHz")


def _board_model(root: Path = Path("/")) -> Metric:
    """What a board with a device tree calls itself, such as a Jetson; else what its firmware says."""
    for path in ("proc/device-tree/model", "sys/class/dmi/id/product_name"):
        try:
            name = (root / path).read_text(errors="replace").strip("\0 \n")
        except OSError:
            continue
        if name:
            return measured(name, source=f"/{path}")
    return missing("neither a device tree nor the firmware names the board")


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
