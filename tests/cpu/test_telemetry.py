"""What watches the GPU during a run: conditions of a row, the series of the report, and that it can be paused."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.machine import telemetry
from edgellm_cupy.bench.machine.telemetry import Telemetry
from edgellm_cupy.bench.metrics import Metric, measured, missing
from edgellm_cupy.bench.parts import cpu
from edgellm_cupy.bench.reporting import stability
from edgellm_cupy.formats.checkpoint import Checkpoint


class Device:
    """A GPU that counts who reads it, and which is throttled once `hot`."""

    def __init__(self) -> None:
        self.clock, self.hot, self.readers = 1980, False, []

    def sm_clock(self) -> Metric:
        self.readers.append(threading.current_thread().name)
        return measured(self.clock, "MHz")

    def memory_clock(self) -> Metric:
        return missing("Not Supported", "MHz")

    def temperature(self) -> Metric:
        return measured(41, "C")

    def throttle_reasons(self) -> Metric:
        return measured(["HwThermalSlowdown"] if self.hot else ["GpuIdle"])

    def power(self) -> Metric:
        return measured(123.0, "W")


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(telemetry, "power_sensor", lambda device: SimpleNamespace(read=device.power, name="a sensor"))
    monkeypatch.setattr(telemetry, "TELEMETRY_S", 0.005)
    return device


def test_a_row_knows_its_conditions_before_during_and_after(device):
    with Telemetry(device) as watching, watching.watch() as found:
        time.sleep(0.05)
        device.clock, device.hot = 1200, True
        time.sleep(0.05)
    assert found["before"]["sm_clock_mhz"]["value"] == 1980
    assert found["after"]["sm_clock_mhz"]["value"] == 1200
    during = found["sm_clock_mhz"]
    assert (during["min"], during["max"]) == (1200, 1980)
    assert during["n"] >= 4
    assert found["memory_clock_mhz"] == {"value": None, "unit": "MHz", "reason": "Not Supported"}
    assert found["throttle_reasons"]["value"] == ["GpuIdle", "HwThermalSlowdown"]
    assert found["throttled"]["value"] is True
    assert 0 <= found["begin_s"] < found["end_s"] < 5


def test_a_row_shorter_than_the_sampling_still_knows_whether_it_was_throttled(device, monkeypatch):
    monkeypatch.setattr(telemetry, "TELEMETRY_S", 10)
    device.hot = True
    with Telemetry(device) as watching:
        time.sleep(0.05)  # the one sample that there will be
        with watching.watch() as found:
            pass
    assert found["sm_clock_mhz"]["value"] is None
    assert found["throttled"]["value"] is True


def test_what_the_row_before_left_behind_does_not_count(device, monkeypatch):
    monkeypatch.setattr(telemetry, "TELEMETRY_S", 10)
    with Telemetry(device) as watching:
        time.sleep(0.05)  # the one sample that there will be
        device.hot = True
        with watching.watch() as found:
            device.hot = False
    assert found["before"]["throttle_reasons"]["value"] == ["HwThermalSlowdown"]
    assert found["throttle_reasons"]["value"] == ["GpuIdle"]
    assert found["throttled"]["value"] is False


def test_a_probe_that_breaks_costs_its_own_figures(device):
    def broken():
        raise ZeroDivisionError("of a driver")

    device.temperature = broken
    ctx = Context(Checkpoint.random(ec.ModelConfig("tiny", 2, 64, 96, 4, 2, 16, 256)), "no GPU here", quick=True)
    ctx.telemetry = Telemetry(device)
    result = suite.run(ctx, ["transfer", "cpu"])
    assert list(result["errors"]) == ["telemetry/temperature_c"]
    assert result["errors"]["telemetry/temperature_c"]["reason"] == "ZeroDivisionError: of a driver"
    conditions = result["parts"]["cpu"]["conditions"]
    assert conditions["before"]["temperature_c"] == missing("ZeroDivisionError: of a driver")
    assert conditions["before"]["sm_clock_mhz"]["value"] == 1980
    assert result["telemetry"]["series"]["power_w"]["values"]


def test_idle_is_not_throttled(device):
    with Telemetry(device) as watching, watching.watch() as found:
        time.sleep(0.02)
    assert found["throttled"]["value"] is False
    assert stability.findings({"parts": {"a": {"conditions": found}}}) == []


def test_the_report_holds_what_was_sampled_and_when_the_parts_ran(device):
    with Telemetry(device) as watching, watching.part("tokens"):
        time.sleep(0.05)
    figures = watching.figures()
    power = figures["series"]["power_w"]
    assert power["unit"] == "W"
    assert set(power["values"]) == {123.0}
    assert len(power["values"]) == len(power["at_s"]) >= 3
    assert power["at_s"] == sorted(power["at_s"])
    assert figures["power_sensor"] == "a sensor"
    assert figures["series"]["memory_clock_mhz"]["values"] == []
    [part] = figures["parts"]
    assert part["name"] == "tokens"
    assert part["end_s"] - part["begin_s"] == pytest.approx(0.05, abs=0.04)


def test_nothing_is_sampled_while_the_cpu_time_of_decoding_is_measured(device):
    ctx = Context(Checkpoint.random(ec.ModelConfig("tiny", 2, 64, 96, 4, 2, 16, 256)), "no GPU here", quick=True)
    with Telemetry(device) as ctx.telemetry:
        time.sleep(0.02)
        with ctx.telemetry.paused():
            time.sleep(0.02)  # a reading may have been under way
            before = device.readers.count("edgellm-sampler")
            cpu.run(ctx)
            assert device.readers.count("edgellm-sampler") == before
            assert device.readers.count("MainThread") > 0  # before and after each row
        time.sleep(0.05)
        assert device.readers.count("edgellm-sampler") > before


def test_without_a_gpu_the_reason_stands_everywhere():
    watching = Telemetry(None, "no driver")
    with watching, watching.part("tokens"), watching.watch() as found, watching.paused():
        pass
    assert found == watching.figures() == missing("no driver")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"rows": [{"conditions": {"throttled": measured(True)}}]}, "held its clocks down during scaling.rows[0]"),
        ({"latency": {"samples": [1.0, 2.0], "relative_error": 0.03}}, "above 2% was left in scaling.latency"),
        ({"windows": [{"joules": measured(1.0), "suspect": measured(True)}]}, "disagree in scaling.windows[0]"),
        ({"latency": {"samples": [1.0, 1.0], "relative_error": 0.01}}, None),
        ({"windows": [{"joules": missing("20 steps"), "suspect": missing("20 steps")}]}, None),
        ({"conditions": {"throttled": missing("Not Supported")}}, "held its clocks down during scaling (Not Supp"),
        ({"conditions": missing("no NVML")}, "clocks down during scaling (no NVML)"),
        ({"conditions": missing("not recorded before 1.3")}, None),
        ({"latency": {"samples": [1.0]}}, "one sample does not tell its error in scaling.latency"),
        ({"windows": [{"joules": measured(1.0), "suspect": missing("none")}]}, "agree in scaling.windows[0] (none)"),
    ],
)
def test_what_was_unstable_or_could_not_be_told_is_read_off_the_report(part, said):
    found = stability.findings({"parts": {"scaling": part}})
    assert len(found) == (said is not None)
    if said:
        assert said in found[0]
    assert not found or stability.ruled_out({"parts": {"scaling": part}}) == []


def test_without_a_gpu_nobody_has_to_see_that_nothing_is_throttled():
    part = {
        "throttled": missing("no GPU"),
        "conditions": missing("no GPU"),
        "samples": [1.0, 1.0],
        "relative_error": 0.0,
    }
    assert stability.findings({"no_gpu": "no GPU", "parts": {"scaling": part}}) == []


def test_only_what_was_read_is_ruled_out():
    part = {
        "conditions": {"throttled": measured(False)},
        "latency": {"samples": [1.0, 1.0], "relative_error": 0.0},
        "windows": [{"joules": measured(1.0), "suspect": measured(False)}],
    }
    assert stability.ruled_out({"parts": {"a": part}}) == [
        "nothing was throttled", "no series stayed noisy", "no energy is in doubt",
    ]  # fmt: skip
    del part["windows"]
    part["row"] = {"conditions": missing("not recorded before 1.3")}
    assert stability.ruled_out({"parts": {"a": part}}) == ["no series stayed noisy"]
    assert stability.ruled_out({"no_gpu": "no GPU", "parts": {"a": part}}) == ["no series stayed noisy"]
