"""Occupancy by Nsight Compute: its table is read, its complaints are reasons, and it never holds a run up."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path

import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.parts import child, ncu
from edgellm_cupy.formats.checkpoint import Checkpoint

TINY = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256)
PRODUCT = "edgellm_rmsnorm_ternary_matmul___half_0_1_1_1_2_2_1_128_2_4"
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"\n'
)
# Nsight Compute on an H200 with driver 580.159 wrote its lines so.
OCCUPANCY = (
    '"{id}","496","python3.12","127.0.0.1","{name}","1","7","(128, 1, 1)","({grid}, 1, 1)","0","9.0",'
    '"Command line profiler metrics","sm__warps_active.avg.pct_of_peak_sustained_active","%","{value}"\n'
)
DURATION = OCCUPANCY.replace("sm__warps_active.avg.pct_of_peak_sustained_active", "gpu__time_duration.sum").replace(
    '"%"', '"{unit}"'
)


def launch(id, value, us, name=PRODUCT, grid=60, unit="ns"):
    duration = {"ns": f"{1e3 * us:,.0f}", "us": f"{us}", "usecond": f"{us}", "ms": f"{us / 1e3}"}[unit]
    return (
        f"==PROF== Profiling {name}: 0%....50%....100% - 1 pass\n",
        OCCUPANCY.format(id=id, name=name, grid=grid, value=value)
        + DURATION.format(id=id, name=name, grid=grid, value=duration, unit=unit),
    )


def output(*launches):
    prof, rows = zip(*launches, strict=True)
    return "".join(["==PROF== Connected to process 496\n", *prof, "==PROF== Disconnected\n", HEADER, *rows])


@pytest.mark.parametrize("unit", ["ns", "us", "usecond", "ms"])
def test_a_table_is_read_by_kernel_and_launch_shape(unit):
    rows = ncu.parse(
        output(
            launch(0, 6.0, 1.5, unit=unit),
            launch(1, 50.0, 1200.25, "edgellm_lm_head_1", 256, unit),
            launch(2, 8.0, 2.5, unit=unit),
            launch(3, 30.0, 3.0, grid=192, unit=unit),
        )
    )
    assert [(row["name"], row["grid"], row["block"], row["launches"]) for row in rows] == [
        (PRODUCT, "60 x 1 x 1", "128 x 1 x 1", 2),
        ("edgellm_lm_head_1", "256 x 1 x 1", "128 x 1 x 1", 1),
        (PRODUCT, "192 x 1 x 1", "128 x 1 x 1", 1),
    ]
    assert rows[0]["measured_occupancy_pct"]["value"] == 7.0
    assert rows[0]["measured_occupancy_pct"]["unit"] == "%"
    assert rows[0]["duration_us"]["value"] == pytest.approx(2.0)
    assert rows[1]["duration_us"]["value"] == pytest.approx(1200.25, rel=1e-3)
    json.dumps(rows, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "ncu printed no table: it printed nothing"),
        ("==PROF== x\n==WARNING== No kernels were profiled.\n", "no table: No kernels were profiled."),
        ("==ERROR== The application returned an error code (1).\nlast", "no table: The application returned"),
        (HEADER, "measured no sm__warps_active"),
        (HEADER + OCCUPANCY.format(id=0, name="k", grid=1, value="5.0"), "with gpu__time_duration.sum"),
        (output(launch(0, "n/a", 1.0)), "gave 'n/a' for sm__warps_active"),
        (output(launch(0, "nan", 1.0)), "gave 'nan' for sm__warps_active"),
        (output(launch(0, 5.0, 1.0, unit="us")).replace('"1.0"', '"inf"'), "gave 'inf' for gpu__time_duration.sum"),
        (output(launch(0, 5.0, 1.0)).replace('"ns"', '"fortnight"'), "gave a time in 'fortnight'"),
    ],
)
def test_what_is_no_table_says_why(text, reason):
    with pytest.raises(ec.EdgeLLMError, match="ncu") as caught:
        ncu.parse(text)
    assert reason in str(caught.value)


# ---- the program ----------------------------------------------------------------------------------------------------


class FakeModel:
    activation, dtype, head_dtype = "int8", "float16", "int8"


@pytest.fixture
def ctx(monkeypatch):
    monkeypatch.setattr(Context, "model", FakeModel())
    return Context(Checkpoint.random(TINY), None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a program `ncu` on the PATH, which runs the given lines of Python with `arguments` in scope."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(text):
        program = tmp_path / "ncu"
        program.write_text(f"#!{sys.executable}\nimport os, sys, time\narguments = sys.argv[1:]\n{text}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    return write


def test_a_profile_of_one_token(ctx, install, tmp_path):
    (tmp_path / "output.txt").write_text(output(launch(0, 6.0, 1.5), launch(1, 8.0, 2.5)))
    install(
        f"open({str(tmp_path / 'asked.json')!r}, 'w').write(__import__('json').dumps([arguments, os.environ]"
        f", default=dict))\nprint(open({str(tmp_path / 'output.txt')!r}).read())"
    )
    found = ncu.achieved_occupancy(ctx)
    assert found["kernels"][0]["measured_occupancy_pct"]["value"] == 7.0
    arguments, environment = json.loads((tmp_path / "asked.json").read_text())
    at = arguments.index(sys.executable)
    assert arguments[at + 1 : at + 3] == ["-m", "edgellm_cupy.bench.parts.one_token"]
    assert json.loads(arguments[at + 3]) == TINY.to_dict()
    assert json.loads(arguments[at + 4]) == {
        "activation": "int8",
        "dtype": "float16",
        "head": "int8",
        "kv_dtype": "auto",
    }
    flags = dict(zip(arguments[1:at:2], arguments[2:at:2], strict=True))
    assert arguments[0] == "--csv"
    assert flags["--profile-from-start"] == "off"
    assert flags["--graph-profiling"] == "node"
    assert flags["--clock-control"] == "none"  # the GPU's settings are its owner's
    assert str(Path(ec.__path__[0]).parent) in environment["PYTHONPATH"].split(os.pathsep)

    assert ncu.of_kernel(found, PRODUCT, "60 x 1 x 1")["value"] == 7.0
    assert "does not launch it so" in ncu.of_kernel(found, PRODUCT, "61 x 1 x 1")["reason"]
    assert "does not launch it so" in ncu.of_kernel(found, "other", "60 x 1 x 1")["reason"]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (
            "print('==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
            "Counters on the target device 0.'); sys.exit(1)",
            "ERR_NVGPUCTRPERM: only root may read the GPU's counters here",
        ),
        ("print('==ERROR== unknown option'); sys.exit(3)", "ncu ended with 3: unknown option"),
        ("print('GpuUnavailableError: x', file=sys.stderr); sys.exit(1)", "ncu ended with 1: GpuUnavailableError: x"),
        ("print('==WARNING== No kernels were profiled.')", "ncu printed no table: No kernels were profiled."),
    ],
)
def test_a_complaint_is_the_reason(ctx, install, program, reason):
    install(program)
    found = ncu.achieved_occupancy(ctx)
    assert found["value"] is None
    assert found["reason"].startswith(reason)
    assert ncu.of_kernel(found, PRODUCT, "60 x 1 x 1") == {"value": None, "unit": "%", "reason": found["reason"]}


def test_the_time_limit_ends_what_ncu_started_too(ctx, install, tmp_path):
    """Its own child holds the pipe open: waiting for its end would wait for that child."""
    pid = tmp_path / "pid"
    install(f"child = os.fork()\nif not child:\n    open({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    begin = time.perf_counter()
    found = ncu.achieved_occupancy(ctx, time_limit_s=1.5)
    assert found["reason"] == "ncu was not done after 1.5 s"
    assert time.perf_counter() - begin < 20
    status = Path(f"/proc/{pid.read_text()}/stat")
    while status.exists() and status.read_text().split(")")[1].split()[0] != "Z":  # killed is not yet gone
        assert time.perf_counter() - begin < 20
        time.sleep(0.01)


def test_a_file_that_does_not_start_is_a_reason(ctx, install, tmp_path):
    install("")
    (tmp_path / "ncu").write_text("#!/nowhere/python\n")
    assert ncu.achieved_occupancy(ctx)["reason"] == f"{tmp_path / 'ncu'}: No such file or directory"


def test_without_the_program_there_is_a_reason(ctx, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ncu.achieved_occupancy(ctx)["reason"] == "no ncu (Nsight Compute) on the PATH"


def test_without_a_gpu_there_is_a_reason():
    assert ncu.achieved_occupancy(Context(Checkpoint.random(TINY), "no GPU here"))["reason"] == "no GPU here"


def test_the_child_finds_this_package():
    """It ends with the complaint of the machine or of the arguments, not with a missing module."""
    code, text = child.run("one_token", ("{}", "{}"), 60)
    assert code == 1
    assert "CONFIG: the model field" in child.last_words(text)


def test_shapes_are_written_as_kernel_stats_writes_them():
    assert ncu._shape("(60, 2, 1)") == "60 x 2 x 1"
