"""The doctor on boards on record and on made-up hosts: what it warns of, what it only notes, what it cannot read."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from edgellm_cupy.bench.machine import doctor, doctor_gpu, doctor_host
from edgellm_cupy.bench.machine.finding import Finding, ok, warning
from edgellm_cupy.bench.machine.nvml import NvmlDevice
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts.baselines import BaselineUnavailableError
from tests.nvml_boards import BOARDS, NoDriver, calls_of, device

_CPU = "sys/devices/system/cpu"


def host_tree(root: Path, **changed: str | None) -> Path:
    """A quiet Linux host under `root`. `changed`: other contents of files in proc, or None to leave one out."""
    files = {
        "proc/loadavg": "0.10 0.20 0.30 1/200 999\n",
        "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 60000000 kB\nSwapTotal: 2000000 kB\nSwapFree: 2000000 kB",
        "proc/cpuinfo": "".join(f"processor\t: {i}\nmodel name\t: CPU\nflags\t\t: fpu sse2 avx2\n" for i in range(8)),
        "proc/sys/kernel/osrelease": "6.8.0-48-generic\n",
        "proc/self/cgroup": "0::/user.slice\n",
        f"{_CPU}/cpu0/cpufreq/scaling_governor": "performance\n",
        f"{_CPU}/cpu1/cpufreq/scaling_governor": "performance\n",
        f"{_CPU}/intel_pstate/no_turbo": "1\n",
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/AC/online": "1\n",
    }
    for path, content in (files | changed).items():
        if content is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content)
    return root


def host(root: Path, cpus: int = 8, **environment: str) -> list[Finding]:
    return list(doctor_host.findings(doctor_host.Host(root, environment, cpus, root)))


def link(generation: int | None = 5, width: int | None = 16) -> Callable[[], dict[str, Any]]:
    def figure(value: int | None) -> dict[str, Any]:
        return missing("nvmlDeviceGetCurrPcieLink: Not Supported") if value is None else measured(value)

    return lambda: {"pcie_generation_under_load": figure(generation), "pcie_width_under_load": figure(width)}


def gpu(nvml: NvmlDevice, pcie: Callable[[], dict[str, Any]] | None = None) -> list[Finding]:
    return list(doctor_gpu.findings(nvml, pcie or link()))


def levels(findings: list[Finding], words: str) -> list[str]:
    """Levels of the findings that speak of something."""
    return [finding.level for finding in findings if words in finding.what]


def only(findings: list[Finding], words: str) -> Finding:
    (found,) = [finding for finding in findings if words in finding.what]
    return found


def assert_sound(findings: list[Finding]) -> None:
    """Every finding says something; a warning also why, and what to do."""
    for finding in findings:
        assert finding.what, finding
        assert not finding.what.endswith("."), finding
        assert finding.level == "ok" or finding.why, finding
        assert finding.level != "warning" or finding.remedy, finding


# ---- GPU ------------------------------------------------------------------------------------------------------------


def test_the_recorded_h200_is_in_order() -> None:
    findings = gpu(device())
    assert_sound(findings)
    assert {finding.level for finding in findings} == {"ok", "note"}
    assert levels(findings, "SM clock 345 MHz now, at most 1980 MHz") == ["note"]
    assert levels(findings, "passed through to a virtual machine") == ["note"]
    assert levels(findings, "51 degrees below") == ["ok"]
    assert levels(findings, "power limit 700 W, default 700 W") == ["ok"]
    assert levels(findings, "no failing memory") == ["ok"]
    assert levels(findings, "PCIe generation 5") == levels(findings, "PCIe width 16") == ["ok"]


def test_the_desktop_pascal_has_all_that_disturbs() -> None:
    findings = gpu(device("gtx1080"), link(generation=3, width=8))
    assert_sound(findings)
    warned = [finding.what for finding in findings if finding.level == "warning"]
    assert warned == [
        "the GPU is 11 % busy before anything of ours runs",
        "the GPU draws a screen (1 graphics processes)",
        "the GPU holds its clocks down: SwPowerCap",
        "8 degrees below the temperature at which the GPU slows down",
        "power limit 150 W, default 180 W",
        "persistence mode off",
        "PCIe width 8 under load, the board and slot could do 16",
    ]
    assert "--power-limit=180" in only(findings, "power limit").remedy
    assert levels(findings, "ECC: not readable") == levels(findings, "application clocks: not readable") == ["note"]


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_and_every_call_refused(board: str) -> None:
    everything = gpu(device(board))
    assert_sound(everything)
    for call in calls_of(board):
        findings = gpu(device(board, refuse={call}))
        assert_sound(findings)
    refused = gpu(device(board, refuse=calls_of(board)), link(None, None))
    assert_sound(refused)
    assert {finding.level for finding in refused} == {"note"}
    assert all("Not Supported" in finding.why for finding in refused)


def test_without_a_driver_there_is_one_note() -> None:
    (finding,) = gpu(device(nvml=NoDriver))
    assert (finding.level, finding.what) == ("note", "GPU: NVML says nothing")
    assert "NVML Shared Library Not Found" in finding.why


def process(pid: int, memory: int | None = 512 << 20) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=memory)


def test_other_processes_are_named() -> None:
    parent = os.getppid()
    found = only(gpu(device(ComputeRunningProcesses_v3=[process(os.getpid()), process(parent)])), "on the GPU:")
    assert found.level == "warning"
    assert f"(process {parent}, 512 MiB)" in found.what
    own = gpu(device(ComputeRunningProcesses_v3=[process(os.getpid())]))
    assert levels(own, "no other process") == ["ok"]


def test_in_a_container_the_one_unknown_process_may_be_this_one() -> None:
    unknown = 2**30  # beyond the kernel's highest number of a process
    found = only(gpu(device(ComputeRunningProcesses_v3=[process(unknown, None)])), "on the GPU:")
    assert found.level == "note"
    assert f"a process of another container (process {unknown})" in found.what
    two = gpu(device(ComputeRunningProcesses_v3=[process(unknown), process(unknown + 1)]))
    assert levels(two, "on the GPU:") == ["warning"]
    beside_ours = gpu(device(ComputeRunningProcesses_v3=[process(unknown), process(os.getpid())]))
    assert levels(beside_ours, "on the GPU:") == ["warning"]


@pytest.mark.parametrize(
    ("answers", "words", "level"),
    [
        ({"PowerManagementLimit": 800_000}, "power limit 800 W", "note"),
        ({"ApplicationsClock": 1200}, "application clock 1200 MHz, below the default 1980 MHz", "warning"),
        ({"ComputeMode": 2}, "compute mode prohibited", "warning"),
        ({"ComputeMode": 3}, "compute mode exclusive process", "ok"),
        ({"EccMode": [1, 0]}, "will be off after the next reset", "warning"),
        ({"RemappedRows": [0, 0, 1, 0]}, "memory of the GPU is failing", "warning"),
        ({"RemappedRows": [5, 0, 0, 0]}, "no failing memory", "ok"),
        ({"RetiredPagesPendingStatus": 1}, "memory of the GPU is failing", "warning"),
        ({"VirtualizationMode": 2}, "this is a virtual GPU", "warning"),
        ({"VirtualizationMode": 0}, "the GPU is not virtual", "ok"),
        ({"PersistenceMode": 0}, "persistence mode off", "warning"),
        ({"CurrentClocksEventReasons": 0x2}, "clocks are held by: ApplicationsClocksSetting", "note"),
        ({"CurrentClocksEventReasons": 0x40}, "holds its clocks down: HwThermalSlowdown", "warning"),
        ({"CurrentClocksEventReasons": 0x1}, "nothing holds the clocks down", "ok"),
    ],
)
def test_each_state_of_the_board(answers: dict[str, Any], words: str, level: str) -> None:
    findings = gpu(device(**answers))
    assert_sound(findings)
    assert levels(findings, words) == [level]


def test_a_mig_instance_shares_its_board() -> None:
    found = only(gpu(device("h100-mig")), "MIG instance")
    assert found.level == "warning"
    assert "MIG-00000000-0000-0000-0000-000000000091" in found.what


def test_a_slow_link_and_one_that_cannot_be_loaded() -> None:
    findings = gpu(device(), link(generation=3))
    assert levels(findings, "PCIe generation 3 under load, the board and slot could do 5") == ["warning"]

    def full() -> dict[str, Any]:
        raise MemoryError("out of memory allocating 67,108,864 bytes")

    found = only(gpu(device(), full), "PCIe link: not readable")
    assert (found.level, "67,108,864" in found.why) == ("note", True)


# ---- host -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests under coverage is warned of it, and would be here."""
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(sys, "getprofile", lambda: None)


@pytest.mark.usefixtures("_untraced")
def test_a_quiet_host_is_in_order(tmp_path: Path) -> None:
    findings = host(host_tree(tmp_path))
    assert_sound(findings)
    assert not [finding for finding in findings if finding.warns]
    assert levels(findings, "CPU governor performance") == levels(findings, "CPU turbo off") == ["ok"]
    assert levels(findings, "no CPU quota") == levels(findings, "no variable that disturbs is set") == ["ok"]


def test_a_host_without_any_file_is_all_notes_with_reasons(tmp_path: Path) -> None:
    findings = host(tmp_path)
    assert_sound(findings)
    for subject in ("kind of machine", "CPU governor", "CPU turbo", "load", "CPU quota", "memory"):
        assert levels(findings, f"{subject}: not readable") == ["note"]


MEMORY = "MemTotal: 1000000 kB\nMemAvailable: {} kB\nSwapTotal: 1000 kB\nSwapFree: {} kB"


@pytest.mark.parametrize(
    ("files", "words", "level"),
    [
        ({f"{_CPU}/cpu1/cpufreq/scaling_governor": "powersave"}, "CPU governor performance, powersave", "warning"),
        ({f"{_CPU}/cpu1/cpufreq/scaling_governor": "schedutil"}, "CPU governor performance, schedutil", "note"),
        ({f"{_CPU}/intel_pstate/no_turbo": "0"}, "CPU turbo on", "note"),
        ({f"{_CPU}/intel_pstate/no_turbo": None, f"{_CPU}/cpufreq/boost": "1"}, "CPU turbo on", "note"),
        ({f"{_CPU}/intel_pstate/no_turbo": None, f"{_CPU}/cpufreq/boost": "0"}, "CPU turbo off", "ok"),
        ({"proc/loadavg": "7.5 7 7 1/1 1"}, "load 7.5 on 8 processors", "warning"),
        ({"proc/loadavg": "5.0 7 7 1/1 1"}, "load 5 on 8 processors", "note"),
        ({"proc/loadavg": "nonsense"}, "load: not readable", "note"),
        ({"proc/sys/kernel/osrelease": "5.15.0-microsoft-standard-WSL2"}, "subsystem for Linux", "warning"),
        ({"proc/cpuinfo": "flags\t: fpu hypervisor sse2"}, "this is a virtual machine", "note"),
        ({"proc/meminfo": MEMORY.format(50_000, 1000)}, "5% of the memory available", "warning"),
        ({"proc/meminfo": MEMORY.format(900_000, 500)}, "90% of the memory available", "note"),
        ({"proc/meminfo": "MemTotal: 1 kB"}, "memory: not readable", "note"),
        ({"sys/class/power_supply/AC/online": "0"}, "runs on its battery", "warning"),
        ({"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0"}, "NVIDIA Jetson Orin Nano", "note"),
        ({"proc/device-tree/model": "Raspberry Pi 5\0"}, "Raspberry Pi 5", "ok"),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, "CPU quota of 2.5 processors, 8 are usable", "warning"),
        ({"sys/fs/cgroup/user.slice/cpu.max": "1600000 100000"}, "CPU quota of 16 processors", "ok"),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, "no CPU quota", "ok"),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            "CPU quota of 1.5 processors",
            "warning",
        ),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            "no CPU quota",
            "ok",
        ),
    ],
)
def test_each_state_of_the_host(tmp_path: Path, files: dict[str, str | None], words: str, level: str) -> None:
    findings = host(host_tree(tmp_path, **files))
    assert_sound(findings)
    assert levels(findings, words) == [level]


def test_the_remedy_for_turbo_turns_the_right_switch(tmp_path: Path) -> None:
    intel = only(host(host_tree(tmp_path / "a", **{f"{_CPU}/intel_pstate/no_turbo": "0"})), "CPU turbo on").remedy
    amd_files = {f"{_CPU}/intel_pstate/no_turbo": None, f"{_CPU}/cpufreq/boost": "1"}
    amd = only(host(host_tree(tmp_path / "b", **amd_files)), "CPU turbo on").remedy
    assert "echo 1 | sudo tee" in intel
    assert intel.endswith("intel_pstate/no_turbo")
    assert "echo 0 | sudo tee" in amd
    assert amd.endswith("cpufreq/boost")


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", "warning"),
        ("CUDA_LAUNCH_BLOCKING", "0", None),
        ("PYTHONMALLOC", "debug", "warning"),
        ("PYTHONMALLOC", "pymalloc", None),
        ("EDGELLM_OVERLAP", "0", "warning"),
        ("EDGELLM_OVERLAP", "1", None),
        ("EDGELLM_TUNED", "0", "note"),
        ("EDGELLM_CACHE_DIR", "/tmp", None),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so", "note"),
        ("LD_PRELOAD", "", None),
    ],
)
def test_variables_that_disturb(tmp_path: Path, name: str, value: str, level: str | None) -> None:
    findings = host(host_tree(tmp_path), **{name: value})
    assert_sound(findings)
    assert levels(findings, f"{name}={value}") == ([level] if level else [])
    assert levels(findings, "no variable that disturbs") == ([] if level else ["ok"])


def test_the_load_counts_for_all_processors_of_the_machine(tmp_path: Path) -> None:
    busy = host_tree(tmp_path, **{"proc/loadavg": "7.5 7 7 1/1 1"})
    assert levels(host(busy, cpus=2), "load 7.5 on 8 processors") == ["warning"]
    (busy / "proc/cpuinfo").write_text("CPU implementer : 0x41\n")
    assert levels(host(busy, cpus=64), "load 7.5 on 64 processors") == ["ok"]


def test_a_debugger_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: object())
    assert levels(host(host_tree(tmp_path)), "Python runs with a debugger") == ["warning"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "FREE_MIB", 2**40)
    later = doctor_host.Host(tmp_path, {}, 8, tmp_path / "not" / "yet")
    found = only(list(doctor_host.findings(later)), "MiB free")
    assert found.level == "warning"
    assert found.what.endswith(f"at {tmp_path}")


def test_tools_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "find_spec", lambda name: None)
    findings = host(host_tree(tmp_path), PATH=str(tmp_path))
    assert levels(findings, "no matplotlib") == levels(findings, "no Nsight Compute") == ["note"]


# ---- the whole ------------------------------------------------------------------------------------------------------


def examined(root: Path, no_gpu: str | None = None, **options: Any) -> list[Finding]:
    def none() -> None:
        raise BaselineUnavailableError("libcublas.so.13 not found")

    libraries = {"cuBLAS": (none, "no baseline"), "CUPTI": (lambda: None, "no trace")}
    options = {"device": device("gtx1080"), "pcie": link(), "libraries": libraries, "environment": {}} | options
    return doctor.examine(no_gpu, root, cpus=8, folder=root, **options)


def test_warnings_come_first_and_libraries_are_examined(tmp_path: Path) -> None:
    findings = examined(host_tree(tmp_path))
    assert_sound(findings)
    order = [finding.level for finding in findings]
    assert order == sorted(order, key=["warning", "note", "ok"].index)
    assert only(findings, "no cuBLAS: no baseline").why == "libcublas.so.13 not found"
    assert levels(findings, "CUPTI is there") == ["ok"]


def test_without_a_gpu_the_host_is_examined(tmp_path: Path) -> None:
    findings = examined(host_tree(tmp_path), no_gpu="no usable GPU: driver: none")
    assert only(findings, "no GPU was examined").why == "no usable GPU: driver: none"
    assert not levels(findings, "SM clock")
    assert levels(findings, "CPU governor") == ["ok"]


def test_this_machine_within_a_second() -> None:
    begin = time.perf_counter()
    findings = doctor.examine("no GPU in this test")
    assert time.perf_counter() - begin < 1
    assert_sound(findings)


def test_the_report_gets_warnings_and_notes(tmp_path: Path) -> None:
    findings = examined(host_tree(tmp_path))
    summary = doctor.summary(findings)
    assert summary == json.loads(json.dumps(summary))
    assert len(summary) == sum(finding.level != "ok" for finding in findings)
    assert set(summary[0]) == {"level", "what", "why"}
    assert summary[0]["level"] == "warning"


def test_as_json_counts_and_keeps_everything(tmp_path: Path) -> None:
    findings = examined(host_tree(tmp_path))
    data = json.loads(json.dumps(doctor.as_json(findings)))
    assert data["warnings"] == sum(finding.warns for finding in findings)
    assert data["warnings"] + data["notes"] + data["ok"] == len(data["findings"]) == len(findings)
    assert [Finding(**finding) for finding in data["findings"]] == findings


def rendered(findings: list[Finding]) -> str:
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(doctor.terminal(findings))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_has_80_columns_and_every_word(tmp_path: Path) -> None:
    findings = examined(host_tree(tmp_path))
    text = rendered(findings)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for finding in findings:
        for part in (finding.what, finding.why, finding.remedy):
            assert " ".join(part.split()[:4]) in words
    assert text.splitlines()[-1] == (
        f"warnings: {sum(f.warns for f in findings)}, notes: {levels_of(findings, 'note')}, "
        f"in order: {levels_of(findings, 'ok')}; nothing was changed"
    )


def levels_of(findings: list[Finding], level: str) -> int:
    return [finding.level for finding in findings].count(level)


def test_the_terminal_without_findings_of_a_kind() -> None:
    assert rendered([ok("fine")]) == "in order: fine\n\nwarnings: 0, notes: 0, in order: 1; nothing was changed\n"
    lines = rendered([warning("bad", "it is", "do not")]).splitlines()
    assert [line.strip() for line in lines] == [
        "warning  bad",
        "it is",
        "-> do not",
        "",
        "warnings: 1, notes: 0, in order: 0; nothing was changed",
    ]


def test_brackets_are_text_and_not_markup() -> None:
    assert "pip install 'edgellm-cupy[baselines]'" in rendered(
        [Finding("note", "no cuBLAS", "pip install 'edgellm-cupy[baselines]'")]
    )
