"""NVML's readings, played back for every board on record: values, refusals of every call, MIG, and energy windows."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from edgellm_cupy.bench.machine import nvml, rails, telemetry
from edgellm_cupy.bench.machine.nvml import SLOWED_DOWN, THROTTLE_REASONS, NvmlDevice
from edgellm_cupy.bench.metrics import is_metric, measured, missing
from edgellm_cupy.bench.parts import hardware, power, utilisation
from edgellm_cupy.bench.parts.hardware import GPU_KEYS
from edgellm_cupy.bench.reporting import schema
from tests.data.nvml.record import record
from tests.nvml_boards import BOARDS, FIRST_INSTANCE, NoDriver, RecordedNvml, calls_of, device, load

REFUSALS = [(board, call) for board in BOARDS for call in calls_of(board)]


def every_figure(gpu: NvmlDevice) -> dict[str, Any]:
    """All that the suite reads of a GPU."""
    probes = {f"probe {name}": probe() for name, probe in utilisation.gpu_probes(gpu).items()}
    probes |= {f"condition {name}": probe() for name, probe in telemetry.condition_probes(gpu).items()}
    return {
        **gpu.figures(),
        **probes,
        "driver": gpu.driver_version(),
        "instant": gpu.power_instant(),
        "energy": gpu.energy(),
        "margin": gpu.degrees_to_slowdown(),
        "sensor": rails.power_sensor(gpu).read(),
    }


def assert_reported(figures: dict[str, Any]) -> None:
    """Every figure has a value, or a reason for having none, and goes into JSON."""
    json.dumps(figures, allow_nan=False)
    for key, figure in figures.items():
        assert is_metric(figure), key
        assert figure["value"] is not None or figure["reason"], key


def unknown(board: str) -> set[str]:
    """Keys that are null for a board."""
    return {key for key, figure in every_figure(device(board)).items() if figure["value"] is None}


# ---- readings -------------------------------------------------------------------------------------------------------


def test_a_device_is_found_by_its_bus_id_and_never_by_index() -> None:
    two = RecordedNvml("h200", "t4")
    assert NvmlDevice("0000:00:1e.0", two).figures()["power_limit_w"] == measured(70.0, "W")
    assert NvmlDevice("0000:00:06.0", two).figures()["power_limit_w"] == measured(700.0, "W")
    assert two.calls[:2] == ["nvmlInit", "0000:00:1e.0"]
    assert NvmlDevice("0000:00:06.0", two).figures()["gpus_in_machine"] == measured(2)
    lost = NvmlDevice("0000:ff:00.0", two)
    assert lost.unavailable == "NVML for the GPU at 0000:ff:00.0: Not Found"
    assert lost.driver_version() == measured("580.159.04")
    assert lost.energy() == missing(lost.unavailable, "J")


def test_cudas_numbers_are_not_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA counts the T4 first here, the fastest or what CUDA_VISIBLE_DEVICES says; NVML goes by the bus."""
    cupy = pytest.importorskip("cupy")

    bus_ids = ["0000:00:1e.0", "0000:00:06.0"]
    two = RecordedNvml("h200", "t4")
    monkeypatch.setattr(cupy.cuda.runtime, "deviceGetPCIBusId", bus_ids.__getitem__)
    monkeypatch.setattr(nvml, "import_module", lambda name: two)
    nvml.nvml_device.cache_clear()
    try:
        limits = []
        for current in (0, 1):
            monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda current=current: current)
            limits.append(hardware.current_nvml_device().figures()["power_limit_w"]["value"])
    finally:
        nvml.nvml_device.cache_clear()
    assert limits == [70.0, 700.0]


def test_figures_have_values_and_units() -> None:
    figures = device().figures()
    assert_reported(figures)
    assert set(figures) <= set(GPU_KEYS)
    assert figures["power_limit_w"] == figures["power_limit_default_w"] == measured(700.0, "W")
    assert (figures["power_min_w"], figures["power_max_w"]) == (measured(200.0, "W"), measured(700.0, "W"))
    assert figures["max_sm_clock_mhz"] == figures["application_sm_clock_mhz"] == measured(1980, "MHz")
    assert (figures["sm_clock_mhz"], figures["memory_clock_mhz"]) == (measured(345, "MHz"), measured(3201, "MHz"))
    assert figures["vram_total_mb"]["value"] == pytest.approx(143771, abs=1)
    assert figures["memory_bus_bits"] == measured(6016, "bits")
    assert (figures["persistence_mode"], figures["ecc_mode"]) == (measured("Enabled"), measured("Enabled"))
    assert (figures["mig_mode"], figures["compute_mode"]) == (measured("Disabled"), measured("default"))
    assert figures["virtualisation"] == measured("pass-through")
    assert figures["vbios_version"] == measured("96.00.A5.00.1A")
    assert figures["slowdown_temperature_c"] == measured(89, "C")
    assert figures["throttle_reasons"] == measured(["GpuIdle"])
    assert device().driver_version() == measured("580.159.04")
    assert device().power_instant()["value"] == pytest.approx(80.167)
    assert device().degrees_to_slowdown() == measured(51, "C")


_NO_POWER = {"power_w", "probe power_w", "instant", "sensor", "energy", "power_limit_w", "power_limit_default_w"}
_NO_CLOCKS = {"sm_clock_mhz", "memory_clock_mhz", "max_sm_clock_mhz", "temperature_c", "throttle_reasons"}


def test_each_board_lacks_what_it_lacks() -> None:
    # This process runs on no GPU, so that no board's list of processes holds it.
    assert unknown("h200") == {"probe process_vram_mb"}
    assert unknown("a100") == {"probe process_vram_mb", "instant"}
    assert unknown("t4") == {"probe process_vram_mb", "instant", "mig_mode", "memory_bus_bits"}
    assert unknown("gtx1080") >= {"energy", "ecc_mode", "mig_mode", "application_sm_clock_mhz"}
    assert not unknown("gtx1080") & {"instant", "power_w", "power_limit_w", *_NO_CLOCKS}
    for board in ("jetson-orin", "h100-mig"):
        assert unknown(board) >= _NO_POWER | _NO_CLOCKS | {"probe gpu_utilization_pct"}
    assert unknown("vgpu") >= _NO_POWER | {"temperature_c", "throttle_reasons", "pcie_width_max"}
    assert not unknown("vgpu") & {"probe gpu_utilization_pct", "vram_total_mb", "sm_clock_mhz"}


@pytest.mark.parametrize(("board", "call"), REFUSALS, ids=lambda x: x)
@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
def test_every_call_refused_alone_is_null_or_another_answer(board: str, call: str, error: int) -> None:
    figures = every_figure(device(board, refuse={call}, error=error))
    assert_reported(figures)
    words = str(pynvml.NVMLError(error))
    newly = {key for key, figure in figures.items() if figure["value"] is None} - unknown(board)
    # A MIG board that does not list its instances leaves nothing to ask, and says that instead.
    assert all(words in figures[key]["reason"] or "MIG is on" in figures[key]["reason"] for key in newly)


@pytest.mark.parametrize("board", BOARDS)
def test_every_call_refused_at_once(board: str) -> None:
    figures = every_figure(device(board, refuse=calls_of(board)))
    assert_reported(figures)
    for key, figure in figures.items():
        assert figure["value"] is None, key
        assert "Not Supported" in figure["reason"], key


def test_without_a_driver_nothing_is_called() -> None:
    absent = device(nvml=NoDriver)
    figures = every_figure(absent)
    assert_reported(figures)
    assert all("NVML Shared Library Not Found" in figure["reason"] for figure in figures.values())


def test_a_pynvml_that_is_too_old_for_a_function_or_a_constant() -> None:
    old = device(lacks={"NVML_FI_DEV_POWER_INSTANT", "nvmlDeviceGetVbiosVersion", "NVML_CLOCK_SM"})
    figures = every_figure(old)
    assert_reported(figures)
    for key in ("instant", "vbios_version", "sm_clock_mhz"):
        assert "too new for the installed nvidia-ml-py" in figures[key]["reason"]
    assert figures["memory_clock_mhz"]["value"] == 3201


def test_a_field_that_is_refused_alone_says_why() -> None:
    assert device(refuse={"NVML_FI_DEV_POWER_INSTANT"}).power_instant() == missing(
        "nvmlDeviceGetFieldValues: Not Supported", "W"
    )


@pytest.mark.parametrize(
    ("kind", "value"), [("UNSIGNED_INT", 7000), ("UNSIGNED_LONG_LONG", 7000), ("SIGNED_INT", 7000)]
)
def test_a_field_is_read_by_its_type(kind: str, value: int) -> None:
    answer = {"valueType": getattr(pynvml, f"NVML_VALUE_TYPE_{kind}"), "value": value}
    assert device(NVML_FI_DEV_POWER_INSTANT=answer).power_instant() == measured(7.0, "W")


def test_an_answer_of_another_form_is_null() -> None:
    assert device(NVML_FI_DEV_POWER_INSTANT={"valueType": 99}).power_instant() == missing(
        "nvmlDeviceGetFieldValues: an answer of another form: IndexError: tuple index out of range", "W"
    )
    for answer, error in (([], "IndexError"), (None, "TypeError")):
        figure = device(EccMode=answer).figures()["ecc_mode"]
        assert figure["value"] is None
        assert error in figure["reason"]
    assert "not a measurement" in device(PowerUsage=float("nan")).power_usage()["reason"]


def test_names_of_throttle_reasons_are_nvmls() -> None:
    for name, bit in THROTTLE_REASONS.items():
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == bit
    assert set(SLOWED_DOWN) < set(THROTTLE_REASONS)
    reasons = device(CurrentClocksEventReasons=0x4 | 0x40 | 0x8000).throttle_reasons()
    assert reasons == measured(["SwPowerCap", "HwThermalSlowdown", "0x8000"])


def test_an_old_driver_knows_throttle_reasons_by_their_old_name() -> None:
    assert device("t4").throttle_reasons() == measured(["GpuIdle"])
    neither = device("t4", refuse={"CurrentClocksThrottleReasons"}).throttle_reasons()
    assert neither == missing(
        "nvmlDeviceGetCurrentClocksEventReasons: Function Not Found; "
        "nvmlDeviceGetCurrentClocksThrottleReasons: Not Supported"
    )


def test_a_driver_that_dropped_the_old_name_of_the_temperature() -> None:
    assert device(refuse={"Temperature"}, error=pynvml.NVML_ERROR_DEPRECATED).temperature() == measured(38, "C")


def test_the_margin_where_the_driver_tells_no_threshold() -> None:
    assert device(refuse={"TemperatureThreshold"}).degrees_to_slowdown() == measured(49, "C")


@pytest.mark.parametrize(
    ("board", "window"),
    [("t4", "instantaneous"), ("a100", "instantaneous"), ("vgpu", "average of one second"), ("h200", "average of one")],
)
def test_what_power_usage_averages_over(board: str, window: str) -> None:
    assert device(board).power_usage_window().startswith(window)


def test_what_power_usage_averages_over_when_the_architecture_is_unknown() -> None:
    window = device(refuse={"CudaComputeCapability"}).power_usage_window()
    assert window == "average of one second on Ampere and newer except GA100"


# ---- MIG ------------------------------------------------------------------------------------------------------------


def mig(visible: str) -> NvmlDevice:
    return NvmlDevice(load("h100-mig")["bus_id"], RecordedNvml("h100-mig"), visible=visible)


def test_mig_the_instance_is_asked_and_not_the_board() -> None:
    first, second = (i["uuid"] for i in load("h100-mig")["instances"])
    assert first == FIRST_INSTANCE
    for uuid, megabytes in ((first, 9984), (second, 19968)):
        figures = mig(uuid).figures()
        assert figures["gpu_uuid"] == measured(uuid)
        assert figures["vram_total_mb"]["value"] == megabytes
        assert figures["power_w"] == missing("nvmlDeviceGetPowerUsage: Not Supported", "W")


@pytest.mark.parametrize("visible", ["", "0", "MIG-00000000"])
def test_mig_an_instance_that_nobody_names_is_not_guessed(visible: str) -> None:
    nameless = mig(visible)
    assert nameless.unavailable is not None
    assert "2 instances may be the one" in nameless.unavailable
    assert nameless.energy() == missing(nameless.unavailable, "J")
    assert nameless.driver_version()["value"] == "550.54.15"


# What CUDA's runtime tells of a device; no driver is there to ask.
_PROPERTIES = {
    "name": b"NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "l2CacheSize": 50 << 20,
    "totalGlobalMem": 8 << 30,
}


@pytest.mark.parametrize("board", BOARDS)
def test_every_figure_of_every_board(board: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = pytest.importorskip("cupy")

    from edgellm_cupy.kernels import nvrtc

    runtime, gpu = cupy.cuda.runtime, device(board)
    for name, answer in {
        "getDevice": lambda: 0,
        "getDeviceProperties": lambda _: _PROPERTIES,
        "getDeviceCount": lambda: 1,
        "deviceGetPCIBusId": lambda _: load(board)["bus_id"],
        "runtimeGetVersion": lambda: 13000,
        "driverGetVersion": lambda: 13010,
    }.items():
        monkeypatch.setattr(runtime, name, answer)
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(hardware, "current_nvml_device", lambda: gpu)
    link = {"pcie_generation_under_load": measured(5), "pcie_width_under_load": measured(16, "lanes")}
    monkeypatch.setattr(hardware, "pcie_under_load", lambda asked: link if asked is gpu else {})

    figures = hardware.gpu()
    assert_reported(figures)
    assert tuple(figures) == GPU_KEYS
    assert figures["sm_count"] == measured(132)
    assert figures["cuda_driver_version"]["value"] == "13.1"
    if board == "jetson-orin":  # where NVML is silent, CUDA tells the memory
        assert figures["vram_total_mb"] == measured(8192.0, "MiB", source="CUDA")
        assert figures["power_w"]["sensor"].startswith("nvmlDeviceGetPowerUsage")


# ---- recording ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("board", ["h200", "t4", "a100", "jetson-orin", "vgpu", "gtx1080"])
def test_recording_a_board_gives_its_file(board: str) -> None:
    data = load(board)
    recorded = record(data["bus_id"], RecordedNvml(board), seconds=0.25)
    for part in ("device", "system"):
        answers = {call: {k: a[k] for k in a if k != "documented"} for call, a in data[part].items()}
        answers = {call: a if call != "UUID" else {"value": "GPU-anonymous"} for call, a in answers.items()}
        if "value" in answers.get("TotalEnergyConsumption", {}):
            answers["TotalEnergyConsumption"] = recorded[part]["TotalEnergyConsumption"]
        assert recorded[part] == answers
    (field,) = data["fields"]
    assert recorded["fields"][field] == {k: v for k, v in data["fields"][field].items() if k != "documented"}
    energies = [energy for _, energy in recorded["energy_steps"]]
    assert energies == sorted(set(energies))
    assert (len(energies) >= 2) == ("value" in data["device"]["TotalEnergyConsumption"])


# ---- the part's figures ---------------------------------------------------------------------------------------------


def test_host_figures() -> None:
    assert_reported(hardware.host())
    assert hardware.host()["cpu_threads_usable"]["value"] >= 1


@pytest.mark.parametrize(
    ("answer", "figure"),
    [
        (SimpleNamespace(max=3700.0), measured(3700.0, "MHz")),
        (SimpleNamespace(max=0.0), missing("the operating system does not tell the highest clock", "MHz")),
        (None, missing("the operating system does not tell the highest clock", "MHz")),
        (OSError("no cpufreq"), missing("the operating system does not tell the clock: no cpufreq", "MHz")),
    ],
)
def test_the_clock_of_the_cpu(answer: Any, figure: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def cpu_freq() -> Any:
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr(hardware.psutil, "cpu_freq", cpu_freq)
    assert hardware.host()["cpu_max_clock_mhz"] == figure


def test_a_board_is_named_by_its_device_tree_or_its_firmware(tmp_path: Any) -> None:
    assert "names the board" in hardware._board_model(tmp_path)["reason"]
    firmware = tmp_path / "sys/class/dmi/id/product_name"
    firmware.parent.mkdir(parents=True)
    firmware.write_text("PowerEdge XE9680\n")
    assert hardware._board_model(tmp_path)["value"] == "PowerEdge XE9680"
    tree = tmp_path / "proc/device-tree/model"
    tree.parent.mkdir(parents=True)
    tree.write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    model = hardware._board_model(tmp_path)
    assert model == measured("NVIDIA Jetson AGX Orin Developer Kit", source="/proc/device-tree/model")


def test_without_a_gpu_every_gpu_figure_is_null_with_the_reason() -> None:
    figures = hardware.describe("no driver")
    assert_reported(figures)
    assert all(figures[key] == missing("no driver") for key in GPU_KEYS)


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_memory_of_this_process_or_of_the_device() -> None:
    mine = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=512 << 20), SimpleNamespace(pid=1, usedGpuMemory=1 << 30)]
    assert utilisation.process_memory(device(ComputeRunningProcesses_v3=mine)) == measured(512.0, "MiB")
    unknown = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]
    assert utilisation.process_memory(device(ComputeRunningProcesses_v3=unknown))["value"] is None

    with telemetry.Sampler(utilisation.gpu_probes(device()), interval_s=0.001) as sampler:
        time.sleep(0.05)
    figures = utilisation._gpu_figures(sampler)
    assert_reported(figures)
    assert figures["vram_used_mb"]["value"] == pytest.approx(615, abs=1)
    assert figures["vram_used_mb"]["scope"].startswith("the whole device (NVML lists no memory of process")


def test_samples_have_mean_range_and_reasons() -> None:
    values = iter([1, 2, 6] + [6] * 100_000)
    probes = {"a": lambda: measured(next(values), "W"), "b": lambda: missing("not here", "W")}
    with telemetry.Sampler(probes, interval_s=0.001) as sampler:
        while len(sampler.readings["a"]) < 3:
            time.sleep(0.001)
    mean = sampler.mean("a")
    assert (mean["min"], mean["max"], mean["n"]) == (1, 6, len(sampler.readings["a"]))
    assert sampler.mean("b") == missing("not here", "W")
    assert sampler.mean("a", end=0.0)["value"] is None


def test_a_probe_that_breaks_is_not_swallowed() -> None:
    def broken() -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), telemetry.Sampler({"a": broken}, interval_s=0.001):
        time.sleep(0.02)


@pytest.mark.parametrize(("mask", "throttled"), [(0, False), (0x1, False), (0x100, False), (0x4, True), (0x41, True)])
def test_idle_is_not_throttled_and_a_power_cap_is(mask: int, throttled: bool) -> None:
    probes = telemetry.condition_probes(device(CurrentClocksEventReasons=mask))
    with telemetry.Sampler(probes, interval_s=0.001) as sampler:
        time.sleep(0.01)
    assert telemetry.conditions(sampler)["throttled"] == measured(throttled)


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
    monkeypatch.setattr(power, "SENSOR_LEAD_S", 0.25)


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
    window = power.Meter(device(watts=200.0, NVML_FI_DEV_POWER_INSTANT={"value": 150_000})).window(Steps(), 0.4)
    assert window["suspect"] == measured(True)
    assert window["counter_minus_integral_pct"]["value"] == pytest.approx(25, abs=5)


def test_without_a_counter_the_power_is_integrated() -> None:
    window = power.Meter(device(refuse={"TotalEnergyConsumption"}, watts=300.0)).window(Steps(), 0.3)
    assert window["joules"]["value"] == pytest.approx(300 * window["seconds"], rel=0.01)
    assert "no energy counter" in window["joules"]["source"]
    nothing = missing("there is no counter to compare with")
    assert window["counter_minus_integral_pct"] == window["suspect"] == nothing
    assert window["ticks"] == missing("this GPU has no energy counter")
    for figure in power.per_call([window], [window]).values():
        assert (figure["ticks"], figure["ticks_reason"]) == (None, "this GPU has no energy counter")
        assert (figure["suspect"], figure["suspect_reason"]) == (None, "there is no counter to compare with")


def test_a_sensor_that_averages_over_a_second_has_seen_the_work_before_a_window_begins() -> None:
    """It rises from 60 W, of before the work, to the 300 W that the counter counts."""
    averaged_s = 0.2

    class Work(Steps):
        begin = float("inf")

        def once(self) -> int:
            self.begin = min(self.begin, time.perf_counter())
            return super().once()

    work = Work()

    def milliwatts() -> int:
        return round(1e3 * (60 + 240 * min(1.0, max(0.0, time.perf_counter() - work.begin) / averaged_s)))

    one_second = device(refuse={"FieldValues"}, watts=300.0, PowerUsage=milliwatts)
    window = power.Meter(one_second).window(work, 0.4)
    assert window["suspect"] == measured(False)
    assert window["sampled_power_w"]["min"] == pytest.approx(300)


@pytest.mark.parametrize(("board", "lead"), [("h200", []), ("a100", []), ("vgpu", [0.25])])
def test_work_runs_before_the_window_only_where_the_sensor_averages(board: str, lead: list[float]) -> None:
    asked = []

    class Work(Steps):
        def for_seconds(self, seconds: float) -> int:
            asked.append(seconds)
            return super().for_seconds(seconds)

    power.Meter(device(board, watts=150.0)).window(Work(), 0.1)
    assert asked == [*lead, 0.1]


@pytest.mark.parametrize(
    ("windows", "suspect"), [([False, True, None], True), ([False, None], None), ([False, False], False)]
)
def test_an_unknown_agreement_is_not_a_good_one(windows: list[bool | None], suspect: bool | None) -> None:
    one = {"joules": measured(10.0, "J", source="counter"), "calls": 2, "ticks": 25, "seconds": 1.0}
    verdicts = {None: missing("the sensor refused")}
    idle = {"mean_power_w": measured(1.0, "W")}
    of = [{**one, "suspect": verdicts.get(s, {"value": s})} for s in windows]
    for figure in power.per_call(of, [idle], context=1024).values():
        assert figure["suspect"] is suspect
        assert figure.get("suspect_reason") == (None if suspect is not None else "the sensor refused")
        assert figure["context"] == 1024


@pytest.mark.parametrize(
    ("board", "refuse", "sensor"),
    [
        ("h200", {}, "NVML_FI_DEV_POWER_INSTANT (window of 25 or 100 ms)"),
        ("h200", {"FieldValues"}, "nvmlDeviceGetPowerUsage (average of one second)"),
        ("a100", {}, "nvmlDeviceGetPowerUsage (instantaneous)"),
        ("vgpu", {}, "nvmlDeviceGetPowerUsage (average of one second)"),
    ],
)
def test_the_sensor_is_named_with_its_window(board: str, refuse: set[str], sensor: str) -> None:
    assert power.Meter(device(board, refuse=refuse)).sensor == sensor


def assert_window(window: dict[str, Any]) -> None:
    """Every figure of a window and what follows from it is reported."""
    figures = {key: figure for key, figure in window.items() if is_metric(figure)}
    assert {"joules", "mean_power_w", "integral_j", "sampled_power_w", "suspect"} <= set(figures)
    assert_reported({**figures, **power.per_call([window], [window])})
    line = {"key": "power/idle", "seconds": 1.0, "failures": [], "figures": window}
    assert schema.faults(json.loads(json.dumps(line, allow_nan=False)), schema.ROW) == []


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("refused", ["", "PowerUsage", "FieldValues", "TotalEnergyConsumption"])
def test_a_window_on_every_board_is_a_figure_or_a_reason(board: str, refused: str) -> None:
    window = power.Meter(device(board, refuse={refused}, watts=150.0)).window(Steps(), 0.3)
    assert_window(window)
    energy, sampled = window["joules"]["value"], window["sampled_power_w"]["value"]
    if board in ("jetson-orin", "h100-mig", "vgpu"):
        assert energy is sampled is None
    elif board == "gtx1080" or refused == "TotalEnergyConsumption":
        assert energy == pytest.approx(150 * window["seconds"], rel=0.02)
        assert "no energy counter" in window["joules"]["source"]
    else:
        assert energy == pytest.approx(150 * window["seconds"], rel=0.1)
        if board in ("t4", "a100") and refused == "PowerUsage":  # their drivers know no other power
            assert window["suspect"]["value"] is None
        else:
            assert sampled == pytest.approx(150)


def test_a_window_of_the_recorded_counter() -> None:
    window = power.Meter(device()).window(Steps(), 2.2)
    assert_window(window)
    assert power.FEWEST_TICKS <= window["ticks"] <= 24  # one every 100 ms
    assert window["mean_power_w"]["value"] == pytest.approx(86, rel=0.04)  # as the counter went up in the record
    assert window["sampled_power_w"]["value"] == pytest.approx(80.167)  # one reading, taken before that
    assert window["suspect"] == measured(True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"watts": 200.0, "TotalEnergyConsumption": 5}, "did not step within"),
        ({"watts": 200.0, "tick_s": 0.1}, "fewer than 20"),
        ({"refuse": calls_of("h200")}, "Not Supported"),
    ],
)
def test_an_energy_that_cannot_be_known_is_null(options: dict[str, Any], reason: str) -> None:
    window = power.Meter(device(**options)).window(Steps(), 0.3)
    figures = power.per_call([window], [window])
    for figure in (window["joules"], window["mean_power_w"], figures["gross_j"], figures["net_j"]):
        assert figure["value"] is None
        assert reason in figure["reason"]
    json.dumps(window, allow_nan=False)


def test_net_energy_is_above_idle() -> None:
    def window(joules: float, seconds: float, calls: int) -> dict[str, Any]:
        return {
            "joules": measured(joules, "J", source="counter"),
            "ticks": 25,
            "seconds": seconds,
            "calls": calls,
            "suspect": measured(False),
            "mean_power_w": measured(joules / seconds, "W"),
        }

    figures = power.per_call([window(1000, 5, 100)] * 6, idle=[window(300, 5, 0), window(500, 5, 0)])
    assert figures["gross_j"]["value"] == pytest.approx(10)
    assert figures["net_j"]["value"] == pytest.approx(6)
    assert figures["net_j"]["idle_w"] == 80
    assert figures["gross_j"]["ci95"] == [10, 10]
