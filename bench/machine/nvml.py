"""NVML: what the driver tells about one GPU, each reading a figure with its value or with the reason for having none.

NVML is asked about the device that CUDA uses, matched by PCI bus id: with several GPUs, or under CUDA_VISIBLE_DEVICES,
the two number their devices differently. With MIG the instance is asked, never the board that it shares with others.
The suite only reads; it changes no setting of the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

from ..metrics import Metric, measured, missing

MIB = 2**20

# Reasons that slow a GPU under load. GpuIdle and the owner's own clock settings are none.
SLOWED_DOWN = (
    "SwPowerCap", "HwSlowdown", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "BoardLimit",
    "Reliability",
)  # fmt: skip
# Bits of nvml.h, the same under their old name nvmlClocksThrottleReason* and their new one nvmlClocksEventReason*.
THROTTLE_REASONS = {
    "GpuIdle": 0x1,
    "ApplicationsClocksSetting": 0x2,
    "SwPowerCap": 0x4,
    "HwSlowdown": 0x8,
    "SyncBoost": 0x10,
    "SwThermalSlowdown": 0x20,
    "HwThermalSlowdown": 0x40,
    "HwPowerBrakeSlowdown": 0x80,
    "DisplayClockSetting": 0x100,
    "BoardLimit": 0x200,
    "Reliability": 0x400,
}

_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_VIRTUALISATION = {0: "none", 1: "pass-through", 2: "virtual GPU", 3: "host of virtual GPUs", 4: "host of vSGA"}
_FIELD_VALUES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by nvmlValueType_t


class NvmlDevice:
    """One GPU, or one MIG instance, as NVML sees it. A call that NVML refuses is null with NVML's own words.

    Attributes:
        unavailable: why nothing can be read (no driver, no such device), or None.
        instance: UUID of the MIG instance that is asked in place of its board, or None.
    """

    def __init__(self, pci_bus_id: str, nvml: Any = None, visible: str | None = None):
        """The GPU at `pci_bus_id`, which is written as CUDA does, such as ``"0000:1b:00.0"``.

        Args:
            nvml: the module `pynvml`, or a stand-in.
            visible: which MIG instance CUDA shows; the variable CUDA_VISIBLE_DEVICES when None.
        """
        self._nvml = import_module("pynvml") if nvml is None else nvml
        self.unavailable: str | None = None
        self.instance: str | None = None
        self._no_nvml: str | None = None
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as e:
            self._no_nvml = self.unavailable = f"NVML for the GPU at {pci_bus_id}: {e}"
            return
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id)
        except self._nvml.NVMLError as e:
            self.unavailable = f"NVML for the GPU at {pci_bus_id}: {e}"
            return
        if self.mig_mode()["value"] == "Enabled":
            self._use_instance(os.environ.get("CUDA_VISIBLE_DEVICES", "") if visible is None else visible)

    def _use_instance(self, visible: str) -> None:
        """Ask the MIG instance that CUDA shows. CUDA shows one at a time: the one that `visible` names."""
        instances = list(self._instances())
        if visible.startswith("MIG-"):
            named = visible.split(",")[0]
            instances = [(uuid, handle) for uuid, handle in instances if uuid.startswith(named)]
        if len(instances) == 1:
            self.instance, self._handle = instances[0]
        else:
            self.unavailable = (
                f"MIG is on, and {len(instances)} instances may be the one that CUDA uses: "
                "name one in CUDA_VISIBLE_DEVICES (nvidia-smi -L lists them)"
            )

    def _instances(self) -> Iterator[tuple[str, Any]]:
        """UUID and handle of each MIG instance of the board."""
        found = map(self._instance, range(self.read("MaxMigDeviceCount")["value"] or 0))
        return (instance for instance in found if instance)

    def _instance(self, index: int) -> tuple[str, Any] | None:
        """None for a slot without an instance, or with one that this container may not see."""
        try:
            handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(self._handle, index)
            return self._nvml.nvmlDeviceGetUUID(handle), handle
        except self._nvml.NVMLError:
            return None

    def read(
        self, what: str, *args: Any, unit: str | None = None, convert: Callable[[Any], Any] | None = None
    ) -> Metric:
        """The result of ``nvmlDeviceGet<what>(device, *args)``, through `convert` when given; `unit` is the result's.

        A text among `args`, or in a list there, names a constant of `pynvml`. A `convert` that returns None says that
        NVML knows no value. What this `pynvml` or this driver does not know yet is null too, and so is an answer that
        `convert` cannot take, such as one of a type that is newer than this package.
        """
        function = f"nvmlDeviceGet{what}"
        if self.unavailable:
            return missing(self.unavailable, unit)
        try:
            value = getattr(self._nvml, function)(self._handle, *map(self._constant, args))
            value = convert(value) if convert else value
            return missing(f"{function} knows no value", unit) if value is None else measured(value, unit)
        except self._nvml.NVMLError as e:
            return missing(f"{function}: {e}", unit)
        except AttributeError as e:
            return missing(f"{function}: too new for the installed nvidia-ml-py: {e}", unit)
        except (LookupError, TypeError, ValueError, ArithmeticError) as e:
            return missing(f"{function}: an answer of another form: {type(e).__name__}: {e}", unit)

    def _constant(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self._constant(one) for one in argument]
        return getattr(self._nvml, argument) if isinstance(argument, str) else argument

    def field(self, name: str, unit: str, scale: float) -> Metric:
        """The value of the field `name` (``"NVML_FI_DEV_..."``), whatever its type, times `scale`."""

        def value_of(fields: Any) -> float:
            answer = fields[0]
            if answer.nvmlReturn != self._nvml.NVML_SUCCESS:
                raise self._nvml.NVMLError(answer.nvmlReturn)
            return getattr(answer.value, _FIELD_VALUES[answer.valueType]) * scale

        return self.read("FieldValues", [name], unit=unit, convert=value_of)

    def _system(self, function: str) -> Metric:
        """The result of a function of NVML that asks about no device."""
        if self._no_nvml:
            return missing(self._no_nvml)
        try:
            return measured(getattr(self._nvml, function)())
        except self._nvml.NVMLError as e:
            return missing(f"{function}: {e}")

    # ---- what more than one part reads ------------------------------------------------------------------------------

    def sm_clock(self) -> Metric:
        return self.read("ClockInfo", "NVML_CLOCK_SM", unit="MHz")

    def memory_clock(self) -> Metric:
        return self.read("ClockInfo", "NVML_CLOCK_MEM", unit="MHz")

    def temperature(self) -> Metric:
        return self._first("C", ("Temperature", "NVML_TEMPERATURE_GPU"), ("TemperatureV", "NVML_TEMPERATURE_GPU"))

    def throttle_reasons(self) -> Metric:
        """Names of what holds the clocks down now; an empty list when nothing does."""
        names = ("CurrentClocksEventReasons", "CurrentClocksThrottleReasons")
        return self._first(None, *((name,) for name in names), convert=_throttle_names)

    def _first(self, unit: str | None, *calls: tuple[str, ...], convert: Callable[[Any], Any] | None = None) -> Metric:
        """The first of `calls` that answers: NVML renames functions, and drivers know the old, the new or both."""
        reasons: dict[str, None] = {}
        for what, *args in calls:
            figure = self.read(what, *args, unit=unit, convert=convert)
            if figure["value"] is not None:
                return figure
            reasons[figure["reason"]] = None
        return missing("; ".join(reasons), unit)

    def power_instant(self) -> Metric:
        """Power averaged over the last 25 or 100 ms, in watts; not known to drivers and GPUs of before about 2022."""
        return self.field("NVML_FI_DEV_POWER_INSTANT", unit="W", scale=1e-3)

    def power_usage(self) -> Metric:
        """Power in watts; over which time it is averaged, :meth:`power_usage_window` says."""
        return self.read("PowerUsage", unit="W", convert=_thousandth)

    def power_usage_window(self) -> str:
        """What :meth:`power_usage` averages over on this GPU, in NVML's words for its architecture."""
        capability = self.read("CudaComputeCapability", convert=tuple)["value"]
        if capability is None:
            return "average of one second on Ampere and newer except GA100"
        return "instantaneous" if capability <= (8, 0) else "average of one second"  # 8.0 is GA100

    def energy(self) -> Metric:
        """Joules since the driver was loaded; the counter steps every 20 to 100 ms."""
        return self.read("TotalEnergyConsumption", unit="J", convert=_thousandth)

    def mig_mode(self) -> Metric:
        """``"Enabled"`` when the board is cut into instances."""
        return self.read("MigMode", convert=lambda modes: _enabled(modes[0]))

    def compute_mode(self) -> Metric:
        return self.read("ComputeMode", convert=lambda mode: _COMPUTE_MODES.get(mode, str(mode)))

    def virtualisation(self) -> Metric:
        return self.read("VirtualizationMode", convert=lambda mode: _VIRTUALISATION.get(mode, str(mode)))

    def slowdown_temperature(self) -> Metric:
        """Where the GPU begins to slow itself down, in degrees."""
        return self.read("TemperatureThreshold", "NVML_TEMPERATURE_THRESHOLD_SLOWDOWN", unit="C")

    def degrees_to_slowdown(self) -> Metric:
        """How much hotter the GPU may get before it slows itself down; from Ada on NVML tells the margin itself."""
        threshold, now = self.slowdown_temperature(), self.temperature()
        unknown = [figure["reason"] for figure in (threshold, now) if figure["value"] is None]
        if not unknown:
            return measured(threshold["value"] - now["value"], "C")
        margin = self.read("MarginTemperature", unit="C")
        return margin if margin["value"] is not None else missing("; ".join([*unknown, margin["reason"]]), "C")

    def figures(self) -> dict[str, Metric]:
        """What stays as it is while the benchmark runs, and the clocks, temperature and power of this moment."""
        read = self.read
        return {
            "gpu_uuid": read("UUID"),
            "gpus_in_machine": self._system("nvmlDeviceGetCount"),
            "vbios_version": read("VbiosVersion"),
            "virtualisation": self.virtualisation(),
            "vram_total_mb": read("MemoryInfo", unit="MiB", convert=lambda m: m.total / MIB),
            "memory_bus_bits": read("MemoryBusWidth", unit="bits"),
            "ecc_mode": read("EccMode", convert=lambda modes: _enabled(modes[0])),
            "max_sm_clock_mhz": read("MaxClockInfo", "NVML_CLOCK_SM", unit="MHz"),
            "max_memory_clock_mhz": read("MaxClockInfo", "NVML_CLOCK_MEM", unit="MHz"),
            "application_sm_clock_mhz": read("ApplicationsClock", "NVML_CLOCK_SM", unit="MHz"),
            "application_memory_clock_mhz": read("ApplicationsClock", "NVML_CLOCK_MEM", unit="MHz"),
            "power_limit_w": read("PowerManagementLimit", unit="W", convert=_thousandth),
            "power_limit_default_w": read("PowerManagementDefaultLimit", unit="W", convert=_thousandth),
            "power_min_w": read("PowerManagementLimitConstraints", unit="W", convert=lambda mw: mw[0] / 1e3),
            "power_max_w": read("PowerManagementLimitConstraints", unit="W", convert=lambda mw: mw[1] / 1e3),
            "slowdown_temperature_c": self.slowdown_temperature(),
            "pcie_generation_max": read("MaxPcieLinkGeneration"),
            "pcie_width_max": read("MaxPcieLinkWidth", unit="lanes"),
            "persistence_mode": read("PersistenceMode", convert=_enabled),
            "mig_mode": self.mig_mode(),
            "compute_mode": self.compute_mode(),
            "sm_clock_mhz": self.sm_clock(),
            "memory_clock_mhz": self.memory_clock(),
            "temperature_c": self.temperature(),
            "throttle_reasons": self.throttle_reasons(),
            "power_w": self.power_usage(),
        }

    def driver_version(self) -> Metric:
        return self._system("nvmlSystemGetDriverVersion")


def _throttle_names(mask: int) -> list[str]:
    """The names of the bits in `mask`; a bit that we do not know by its number."""
    known = [name for name, bit in THROTTLE_REASONS.items() if mask & bit]
    bits = (1 << i for i in range(mask.bit_length()))
    return known + [hex(bit) for bit in bits if mask & bit and bit not in THROTTLE_REASONS.values()]


def _enabled(mode: int) -> str:
    return "Enabled" if mode else "Disabled"


def _thousandth(value: int) -> float:
    return value / 1e3


@cache
def nvml_device(cuda_device: int) -> NvmlDevice:
    """NVML's view of CUDA device number `cuda_device`. Needs CuPy and a driver."""
    import cupy as cp

    return NvmlDevice(cp.cuda.runtime.deviceGetPCIBusId(cuda_device))


def current_nvml_device() -> NvmlDevice:
    """NVML's view of the current CUDA device."""
    import cupy as cp

    return nvml_device(cp.cuda.runtime.getDevice())
