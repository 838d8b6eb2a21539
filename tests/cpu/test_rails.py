"""A Jetson's power rails through a sysfs tree, and the choice of a GPU's power sensor."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm_cupy.bench.machine import rails
from edgellm_cupy.bench.metrics import measured
from edgellm_cupy.bench.parts import power
from tests.cpu.test_nvml import Steps
from tests.nvml_boards import device

_DRIVERS = "bus/i2c/drivers"


def hwmon(root: Path, rails_of: dict[str, tuple[int, int]], chip: str = "1-0040", driver: str = "ina3221") -> Path:
    """A monitor as JetPack 5 shows it: rail -> (millivolts, milliamperes)."""
    folder = root / _DRIVERS / driver / chip / "hwmon/hwmon3"
    folder.mkdir(parents=True)
    for channel, (name, (millivolts, milliamperes)) in enumerate(rails_of.items(), start=1):
        (folder / f"in{channel}_label").write_text(f"{name}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("1234\n")
    return folder


def iio(root: Path, rails_of: dict[str, int]) -> None:
    """A monitor as JetPack 4 shows it: rail -> milliwatts."""
    folder = root / _DRIVERS / "ina3221x/6-0040/iio:device0"
    folder.mkdir(parents=True)
    for channel, (name, milliwatts) in enumerate(rails_of.items()):
        (folder / f"rail_name_{channel}").write_text(f"{name}\n")
        (folder / f"in_power{channel}_input").write_text(f"{milliwatts}\n")


def found(root: Path) -> rails.Rails:
    there = rails.find(root)
    assert there is not None
    return there


def test_orin_volts_and_amperes(tmp_path: Path) -> None:
    hwmon(tmp_path, {"VDD_GPU_SOC": (19_000, 400), "VDD_CPU_CV": (19_000, 100), "VIN_SYS_5V0": (5_000, 800)})
    hwmon(tmp_path, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5_000, 100)}, chip="1-0041")
    board = found(tmp_path)
    assert board.sensor == "INA3221 rail VDD_GPU_SOC (GPU and SoC)"
    assert board.power() == measured(
        7.6,
        "W",
        rail="VDD_GPU_SOC",
        feeds="GPU and SoC",
        rails={"NC": 0.0, "VDDQ_VDD2_1V8AO": 0.5, "VDD_CPU_CV": 1.9, "VDD_GPU_SOC": 7.6, "VIN_SYS_5V0": 4.0},
    )


def test_nano_watts(tmp_path: Path) -> None:
    iio(tmp_path, {"POM_5V_IN": 5210, "POM_5V_GPU": 1530, "POM_5V_CPU": 640})
    figure = found(tmp_path).power()
    assert (figure["value"], figure["rail"], figure["feeds"]) == (1.53, "POM_5V_GPU", "GPU")
    assert figure["rails"] == {"POM_5V_CPU": 0.64, "POM_5V_GPU": 1.53, "POM_5V_IN": 5.21}


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], "VDD_CPU_GPU_CV"),
        (["VDD_IN", "VDD_SYS_GPU", "VDD_SYS_CPU"], "VDD_SYS_GPU"),
        (["GPU", "CPU", "SOC"], "GPU"),
        (["VDD_IN", "VDD_SOC"], "VDD_IN"),
    ],
)
def test_the_rail_nearest_to_the_gpu(tmp_path: Path, names: list[str], chosen: str) -> None:
    hwmon(tmp_path, dict.fromkeys(names, (5_000, 100)))
    assert found(tmp_path).gpu.name == chosen


def test_other_boards_have_none(tmp_path: Path) -> None:
    assert rails.find(tmp_path) is None
    hwmon(tmp_path, {"VDD_FAN": (12_000, 100)})
    assert rails.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "not a number"])
def test_a_monitor_that_fails_is_null_with_the_reason(tmp_path: Path, text: str) -> None:
    folder = hwmon(tmp_path, {"VDD_GPU_SOC": (19_000, 400), "VDD_CPU_CV": (19_000, 100)})
    board = found(tmp_path)
    (folder / "curr2_input").write_text(text)
    assert board.power()["rails"] == {"VDD_CPU_CV": None, "VDD_GPU_SOC": 7.6}
    (folder / "in1_input").write_text(text)
    assert board.power()["reason"].startswith("rail VDD_GPU_SOC: invalid literal")
    (folder / "in1_input").unlink()
    assert "No such file" in board.power()["reason"]


def test_a_label_that_is_not_readable_is_no_rail(tmp_path: Path) -> None:
    folder = hwmon(tmp_path, {"VDD_IN": (5_000, 100)})
    (folder / "in1_label").unlink()
    (folder / "in1_label").mkdir()
    assert rails.find(tmp_path) is None


def test_a_jetsons_energy_is_the_integral_of_its_rail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hwmon(tmp_path, {"VDD_GPU_SOC": (20_000, 500)})
    sensor = rails.power_sensor(device("jetson-orin"), tmp_path)
    assert sensor.name == "INA3221 rail VDD_GPU_SOC (GPU and SoC)"
    monkeypatch.setattr(power, "power_sensor", lambda _: sensor)
    monkeypatch.setattr(power, "_SAMPLE_S", 0.002)
    window = power.Meter(device("jetson-orin")).window(Steps(), 0.3)
    assert window["joules"]["value"] == pytest.approx(10 * window["seconds"], rel=0.01)
    assert "no energy counter" in window["joules"]["source"]
    assert window["sampled_power_w"]["sensor"] == sensor.name


def test_nvml_comes_before_a_rail(tmp_path: Path) -> None:
    hwmon(tmp_path, {"VDD_GPU_SOC": (20_000, 500)})
    assert rails.power_sensor(device("h200"), tmp_path).name.startswith("NVML_FI_DEV_POWER_INSTANT")
    assert rails.power_sensor(device("t4"), tmp_path).name == "nvmlDeviceGetPowerUsage (instantaneous)"


def test_without_any_sensor_there_is_a_reason(tmp_path: Path) -> None:
    sensor = rails.power_sensor(device("jetson-orin"), tmp_path)
    assert sensor.read()["reason"] == "nvmlDeviceGetPowerUsage: Not Supported"
