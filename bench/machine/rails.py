"""Power of a Jetson, from the INA3221 monitors on its board; and which power sensor a GPU has.

A Jetson's NVML refuses power and energy. Its board has monitors on some supply rails, which the kernel shows in sysfs:
by volts and amperes (hwmon, JetPack 5 and newer) or by watts (iio, JetPack 4). A rail rarely feeds the GPU alone, so
every figure carries the rail's name and what hangs on it. :func:`power_sensor` chooses for any GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..metrics import Metric, measured, missing
from .nvml import NvmlDevice

# Rails that feed the GPU and little else, best first; then those of the whole board. NVIDIA's developer guides of TX2,
# Nano, Xavier, Xavier NX, Orin, Orin NX and Thor name them.
_FEEDS = {
    "VDD_GPU": "GPU",
    "GPU": "GPU",
    "POM_5V_GPU": "GPU",
    "VDD_SYS_GPU": "GPU",
    "VDD_GPU_SOC": "GPU and SoC",
    "VDD_CPU_GPU_CV": "CPU, GPU and vision accelerators",
    "VDD_IN": "the whole board",
    "POM_5V_IN": "the whole board",
    "VIN": "the whole board",
}


@dataclass(frozen=True)
class Rail:
    """One supply rail: `files` hold millivolts and milliamperes, or milliwatts alone."""

    name: str
    files: tuple[Path, ...]

    def power(self) -> Metric:
        """Watts now, or null when the monitor is not readable."""
        try:
            values = [int(file.read_text()) for file in self.files]
        except (OSError, ValueError) as e:
            return missing(f"rail {self.name}: {e}", "W")
        return measured(values[0] / 1e3 if len(values) == 1 else values[0] * values[1] / 1e6, "W")


@dataclass(frozen=True)
class Rails:
    """The monitored rails of a board.

    Attributes:
        gpu: the rail that says most about the GPU.
        all: every rail that has a monitor, by name.
    """

    gpu: Rail
    all: tuple[Rail, ...]

    @property
    def sensor(self) -> str:
        """What :meth:`power` reads, for a report."""
        return f"INA3221 rail {self.gpu.name} ({_FEEDS[self.gpu.name]})"

    def power(self) -> Metric:
        """Watts of the rail :attr:`gpu`, and under `rails` those of all; null when it cannot be read."""
        watts = self.gpu.power()
        if watts["value"] is None:
            return watts
        rails = {rail.name: rail.power()["value"] for rail in self.all}
        return {**watts, "rail": self.gpu.name, "feeds": _FEEDS[self.gpu.name], "rails": rails}


def find(root: Path = Path("/sys")) -> Rails | None:
    """The rails under a sysfs tree, or None where no monitor feeds a GPU that we know: on every board but a Jetson."""
    rails = sorted([*_hwmon(root), *_iio(root)], key=lambda rail: rail.name)
    known = {rail.name: rail for rail in rails}
    chosen = next((known[name] for name in _FEEDS if name in known), None)
    return Rails(chosen, tuple(rails)) if chosen else None


def _hwmon(root: Path) -> list[Rail]:
    rails = []
    for label in root.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label"):
        channel = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        if (name := _name(label)) and all(file.is_file() for file in files):  # in7 is a sum and has no current
            rails.append(Rail(name, files))
    return rails


def _iio(root: Path) -> list[Rail]:
    rails = []
    for label in root.glob("bus/i2c/drivers/ina3221*/*/iio:device*/rail_name_*"):
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        if (name := _name(label)) and power.is_file():
            rails.append(Rail(name, (power,)))
    return rails


def _name(label: Path) -> str:
    """The rail's name; empty where the label is not readable."""
    try:
        return label.read_text().strip()
    except OSError:
        return ""


# ---- which sensor ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerSensor:
    """Where a GPU's power is read.

    Attributes:
        name: of the reading, with what it averages over or covers.
        read: watts now, or null with the reason.
    """

    name: str
    read: Callable[[], Metric]


def power_sensor(device: NvmlDevice, root: Path = Path("/sys")) -> PowerSensor:
    """The best sensor that answers: NVML's instantaneous field, NVML's power usage, a Jetson's rail.

    Where none answers, it is NVML's power usage, whose null figure holds the reason.
    """
    if device.power_instant()["value"] is not None:
        return PowerSensor("NVML_FI_DEV_POWER_INSTANT (window of 25 or 100 ms)", device.power_instant)
    usage = PowerSensor(f"nvmlDeviceGetPowerUsage ({device.power_usage_window()})", device.power_usage)
    if device.power_usage()["value"] is not None:
        return usage
    rails = find(root)
    return PowerSensor(rails.sensor, rails.power) if rails else usage
