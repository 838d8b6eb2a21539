"""NVML's readings through a stand-in of pynvml: values, refusals of every call, no driver, and energy windows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from edgellm_cupy.bench import power, utilisation
from edgellm_cupy.bench.hardware import GPU_KEYS, NvmlDevice, host
from edgellm_cupy.bench.metrics import is_metric, measured, missing

BUS_ID = "0000:1b:00.0"


class FakeNvml:
    """Plays the part of the module `pynvml`. `refuse`: names of functions that answer NotSupported, or all of them."""

    class NVMLError(Exception):
        pass

    NVML_SUCCESS, NVML_ERROR_NOT_SUPPORTED = 0, 3
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_FI_DEV_POWER_INSTANT = 186
    nvmlClocksThrottleReasonGpuIdle = 0x1
    nvmlClocksThrottleReasonApplicationsClocksSetting = 0x2
    nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksThrottleReasonHwSlowdown = 0x8
    nvmlClocksThrottleReasonSyncBoost = 0x10
    nvmlClocksThrottleReasonSwThermalSlowdown = 0x20
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80
    nvmlClocksThrottleReasonDisplayClockSetting = 0x100

    def __init__(self, refuse: set[str] | bool = False, tick_s: float = 0.01, watts: float = 200.0, **answers: Any):
        self.refuse, self.calls = refuse, []
        self._tick_s, self._watts, self._start = tick_s, watts, time.perf_counter()
        self._answers: dict[str, Callable[..., Any] | Any] = {
            "Name": "NVIDIA H200",
            "UUID": "GPU-1234",
            "MemoryInfo": SimpleNamespace(total=140 << 30, used=10 << 30, free=130 << 30),
            "MaxClockInfo": lambda clock: {1: 1980, 2: 3201}[clock],
            "ClockInfo": lambda clock: {1: 1755, 2: 3201}[clock],
            "Temperature": 41,
            "CurrentClocksThrottleReasons": 0x4 | 0x1,
            "PowerManagementLimit": 700_000,
            "PowerManagementLimitConstraints": [200_000, 700_000],
            "MaxPcieLinkGeneration": 5,
            "MaxPcieLinkWidth": 16,
            "CurrPcieLinkGeneration": 5,
            "CurrPcieLinkWidth": 16,
            "PersistenceMode": 1,
            "MigMode": [0, 0],
            "PowerUsage": int(watts * 1e3),
            "UtilizationRates": SimpleNamespace(gpu=97, memory=31),
            "ComputeRunningProcesses_v3": [],
            "TotalEnergyConsumption": self._millijoules,
            "FieldValues": lambda fields: [
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=int(watts * 1e3))) for _ in fields
            ],
            **answers,
        }

    def _millijoules(self) -> int:
        """The counter of a board that draws `watts` and steps every `tick_s`."""
        ticks = int((time.perf_counter() - self._start) / self._tick_s)
        return 7_000_000 + int(ticks * self._tick_s * self._watts * 1e3)

    def nvmlInit(self) -> None:
        self.calls.append("nvmlInit")

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        self.calls.append(bus_id)
        if bus_id != BUS_ID:
            raise self.NVMLError("Not Found")
        return "handle"

    def nvmlSystemGetDriverVersion(self) -> str:
        if self.refuse is True:
            raise self.NVMLError("Not Supported")
        return "580.82.07"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        what = name.removeprefix("nvmlDeviceGet")
        if what == name or what not in self.__dict__["_answers"]:
            raise AttributeError(f"pynvml has no {name}")

        def call(handle: str, *args: Any) -> Any:
            assert handle == "handle"
            self.calls.append(name)
            if self.refuse is True or (self.refuse and what in self.refuse):
                raise self.NVMLError("Not Supported")
            answer = self._answers[what]
            return answer(*args) if callable(answer) else answer

        return call


class NoDriver(FakeNvml):
    def nvmlInit(self) -> None:
        raise self.NVMLError("NVML Shared Library Not Found")


def device(**options: Any) -> NvmlDevice:
    return NvmlDevice(BUS_ID, FakeNvml(**options))


def assert_reported(figures: dict[str, Any]) -> None:
    """Every figure has a value, or a reason for having none, and goes into JSON."""
    json.dumps(figures, allow_nan=False)
    for key, figure in figures.items():
        assert is_metric(figure), key
        assert figure["value"] is not None or figure["reason"], key


# ---- readings -------------------------------------------------------------------------------------------------------


def test_the_device_is_found_by_its_bus_id_and_never_by_index() -> None:
    nvml = FakeNvml()
    NvmlDevice(BUS_ID, nvml)
    assert nvml.calls == ["nvmlInit", BUS_ID]
    assert NvmlDevice("0000:ff:00.0", nvml).unavailable == "NVML for the GPU at 0000:ff:00.0: Not Found"


def test_figures_have_values_and_units() -> None:
    figures = device().figures()
    assert_reported(figures)
    assert set(figures) <= set(GPU_KEYS)
    assert figures["power_limit_w"] == measured(700.0, "W")
    assert figures["power_max_w"] == measured(700.0, "W")
    assert figures["max_sm_clock_mhz"] == measured(1980, "MHz")
    assert figures["memory_clock_mhz"] == measured(3201, "MHz")
    assert figures["vram_total_mb"] == measured(140 * 1024.0, "MiB")
    assert figures["persistence_mode"] == measured("Enabled")
    assert figures["mig_mode"] == measured("Disabled")
    assert figures["throttle_reasons"] == measured(["GpuIdle", "SwPowerCap"])
    assert device().driver_version() == measured("580.82.07")


def test_every_refused_call_is_null_with_nvmls_words() -> None:
    refused = device(refuse=True)
    figures = {**refused.figures(), "driver": refused.driver_version(), "instant": refused.power_instant()}
    for probe_name, probe in utilisation.gpu_probes(refused).items():
        figures[f"probe {probe_name}"] = probe()
    assert_reported(figures)
    for key, figure in figures.items():
        assert figure["value"] is None, key
        assert "Not Supported" in figure["reason"], key


def test_without_a_driver_nothing_is_called() -> None:
    nvml = NoDriver()
    absent = NvmlDevice(BUS_ID, nvml)
    figures = {**absent.figures(), "driver": absent.driver_version(), "energy": absent.energy()}
    assert_reported(figures)
    assert all("NVML Shared Library Not Found" in figure["reason"] for figure in figures.values())
    assert nvml.calls == []


def test_a_field_that_is_refused_alone() -> None:
    fields = [SimpleNamespace(nvmlReturn=3, value=SimpleNamespace(uiVal=0))]
    assert device(FieldValues=lambda _: fields).power_instant() == missing(
        "nvmlDeviceGetFieldValues knows no value", "W"
    )


def test_host_figures() -> None:
    assert_reported(host())


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_memory_of_this_process_or_of_the_device() -> None:
    import os

    mine = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=512 << 20), SimpleNamespace(pid=1, usedGpuMemory=1 << 30)]
    assert utilisation.process_memory(device(ComputeRunningProcesses_v3=mine)) == measured(512.0, "MiB")
    unknown = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]
    assert utilisation.process_memory(device(ComputeRunningProcesses_v3=unknown))["value"] is None

    with utilisation.Sampler(utilisation.gpu_probes(device()), interval_s=0.001) as sampler:
        time.sleep(0.05)
    figures = utilisation._gpu_figures(sampler)
    assert_reported(figures)
    assert figures["vram_used_mb"]["value"] == 10 * 1024
    assert figures["vram_used_mb"]["scope"].startswith("the whole device (NVML lists no memory of process")


def test_samples_have_mean_range_and_reasons() -> None:
    values = iter([1, 2, 6] + [6] * 100_000)
    probes = {"a": lambda: measured(next(values), "W"), "b": lambda: missing("not here", "W")}
    with utilisation.Sampler(probes, interval_s=0.001) as sampler:
        while len(sampler.readings["a"]) < 3:
            time.sleep(0.001)
    mean = sampler.mean("a")
    assert (mean["min"], mean["max"], mean["n"]) == (1, 6, len(sampler.readings["a"]))
    assert sampler.mean("b") == missing("not here", "W")
    assert sampler.mean("a", end=0.0)["value"] is None


def test_a_probe_that_breaks_is_not_swallowed() -> None:
    def broken() -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), utilisation.Sampler({"a": broken}, interval_s=0.001):
        time.sleep(0.02)


@pytest.mark.parametrize(("mask", "throttled"), [(0, False), (0x1, False), (0x100, False), (0x4, True), (0x41, True)])
def test_idle_is_not_throttled_and_a_power_cap_is(mask: int, throttled: bool) -> None:
    probes = utilisation.condition_probes(device(CurrentClocksThrottleReasons=mask))
    with utilisation.Sampler(probes, interval_s=0.001) as sampler:
        time.sleep(0.01)
    assert utilisation.conditions(sampler)["throttled"] == measured(throttled)


# ---- energy ---------------------------------------------------------------------------------------------------------


class Steps:
    """Work of `step_s` seconds a step, without a GPU."""

    def __init__(self, step_s: float = 0.002):
        self.step_s = step_s

    def once(self) -> int:
        time.sleep(self.step_s)
        return 1

    def for_seconds(self, seconds: float) -> int:
        steps = 0
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            steps += self.once()
        return steps


@pytest.fixture(autouse=True)
def _sample_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "_SAMPLE_S", 0.002)
    monkeypatch.setattr(power, "_TICK_TIMEOUT_S", 0.2)


def test_a_window_measures_what_the_board_draws() -> None:
    window = power.Meter(device(watts=200.0)).window(Steps(), 0.5, calls_per_step=10)
    assert window["joules"]["source"] == "nvmlDeviceGetTotalEnergyConsumption"
    assert window["mean_power_w"]["value"] == pytest.approx(200, rel=0.05)
    assert window["joules"]["value"] == pytest.approx(200 * window["seconds"], rel=0.05)
    assert window["ticks"] >= power.FEWEST_TICKS
    assert window["calls"] % 10 == 0
    assert window["suspect"] == measured(False)
    json.dumps(window, allow_nan=False)


def test_counter_and_sensor_that_disagree_are_suspect() -> None:
    nvml = FakeNvml(watts=200.0)
    nvml._answers["FieldValues"] = lambda _: [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=150_000))]
    window = power.Meter(NvmlDevice(BUS_ID, nvml)).window(Steps(), 0.4)
    assert window["suspect"] == measured(True)
    assert window["counter_minus_integral_pct"]["value"] == pytest.approx(25, abs=5)


def test_without_a_counter_the_power_is_integrated() -> None:
    window = power.Meter(device(refuse={"TotalEnergyConsumption"}, watts=300.0)).window(Steps(), 0.3)
    assert window["joules"]["value"] == pytest.approx(300 * window["seconds"], rel=0.01)
    assert "no energy counter" in window["joules"]["source"]
    nothing = missing("there is no counter to compare with")
    assert window["counter_minus_integral_pct"] == window["suspect"] == nothing
    assert power.per_call([window], window)["gross_j"]["suspect"] is None


@pytest.mark.parametrize(
    ("windows", "suspect"), [([False, True, None], True), ([False, None], None), ([False, False], False)]
)
def test_an_unknown_agreement_is_not_a_good_one(windows: list[bool | None], suspect: bool | None) -> None:
    one = {"joules": measured(10.0, "J", source="counter"), "calls": 2, "seconds": 1.0}
    idle = {"mean_power_w": measured(1.0, "W")}
    figures = power.per_call([{**one, "suspect": {"value": s}} for s in windows], idle, context=1024)
    for figure in figures.values():
        assert figure["suspect"] is suspect
        assert figure["context"] == 1024


def test_without_the_instant_field_the_sensor_is_named() -> None:
    meter = power.Meter(device(refuse={"FieldValues"}))
    assert meter.sensor.startswith("nvmlDeviceGetPowerUsage")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"TotalEnergyConsumption": 5}, "did not step within"),
        ({"tick_s": 0.1}, "fewer than 20"),
        ({"refuse": True}, "Not Supported"),
    ],
)
def test_an_energy_that_cannot_be_known_is_null(options: dict[str, Any], reason: str) -> None:
    window = power.Meter(device(**options)).window(Steps(), 0.3)
    figures = power.per_call([window], window)
    for figure in (window["joules"], window["mean_power_w"], figures["gross_j"], figures["net_j"]):
        assert figure["value"] is None
        assert reason in figure["reason"]
    json.dumps(window, allow_nan=False)


def test_net_energy_is_above_idle() -> None:
    def window(joules: float, seconds: float, calls: int) -> dict[str, Any]:
        return {
            "joules": measured(joules, "J", source="counter"),
            "seconds": seconds,
            "calls": calls,
            "suspect": measured(False),
            "mean_power_w": measured(joules / seconds, "W"),
        }

    figures = power.per_call([window(1000, 5, 100)] * 6, idle=window(400, 5, 0))
    assert figures["gross_j"]["value"] == pytest.approx(10)
    assert figures["net_j"]["value"] == pytest.approx(6)
    assert figures["net_j"]["idle_w"] == 80
    assert figures["gross_j"]["ci95"] == [10, 10]
