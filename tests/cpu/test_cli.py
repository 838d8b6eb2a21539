"""The command: exit codes, what goes to stdout and what to stderr, and machines that lack something."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import cli, runtime, tuning, verify, version
from edgellm_cupy.bench import report, scaling, suite
from edgellm_cupy.formats import compact
from edgellm_cupy.formats.checkpoint import Checkpoint
from tests.emulated import H200

TINY = {
    "name": "tiny",
    "num_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
ROOT = Path(ec.__file__).resolve().parents[1]
COMMAND = [sys.executable, "-c", "from edgellm_cupy.cli import main; main()"]
NO_CUPY = "raise ImportError(\"No module named 'cupy'\")"
# CuPy as far as it is asked before the driver's absence shows. Its NVRTC binding is hidden with it.
NO_DRIVER = """
class CUDARuntimeError(RuntimeError):
    pass

class cuda:
    class runtime:
        CUDARuntimeError = CUDARuntimeError

        def getDeviceCount():
            raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")
"""


@pytest.fixture
def tiny(tmp_path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def invoke(*arguments: str):
    """In this process: fast, for what does not depend on streams or on the machine."""
    return CliRunner().invoke(cli.app, list(arguments))


def environment(tmp_path: Path, cupy: str | None = None) -> dict[str, str]:
    """Of a process that finds this package, and in place of CuPy a module with the source `cupy`."""
    path = [str(ROOT)]
    if cupy is not None:
        stand_in = tmp_path / "stand_in"
        stand_in.mkdir(exist_ok=True)
        (stand_in / "cupy.py").write_text(cupy)
        (stand_in / "cupy_backends.py").write_text(NO_CUPY)
        path.insert(0, str(stand_in))
    unset = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE")
    return {**{k: v for k, v in os.environ.items() if k not in unset}, "PYTHONPATH": os.pathsep.join(path)}


def edgellm(tmp_path: Path, *arguments: str, cupy: str | None = None) -> subprocess.CompletedProcess[str]:
    """A process of its own, in `tmp_path`."""
    env = environment(tmp_path, cupy)
    return subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


# ---- 0: done --------------------------------------------------------------------------------------------------------


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output == f"edgellm-cupy {ec.__version__}\n"


@pytest.mark.parametrize(
    ("pyproject", "expected"),
    [
        ('[project]\nname = "edgellm-cupy"\nversion = "1.2.3"\n', "1.2.3+uninstalled"),
        ('[project]\nname = "other"\nversion = "1.2.3"\n', "0+uninstalled"),
        (None, "0+uninstalled"),
    ],
)
def test_version_of_a_checkout_that_is_not_installed(tmp_path, pyproject, expected):
    file = tmp_path / "pyproject.toml"
    if pyproject:
        file.write_text(pyproject)
    assert version._uninstalled(file) == expected


def test_parts_are_those_of_the_suite():
    assert [part.value for part in cli.Part] == list(suite.PARTS)


@pytest.mark.parametrize("cupy", [NO_CUPY, NO_DRIVER], ids=["no CuPy", "no driver"])
def test_bench_without_a_gpu_measures_on_the_host_and_says_so(tmp_path, tiny, cupy):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--quick", cupy=cupy)
    assert done.returncode == 0, done.stderr
    assert "No GPU was measured" in done.stdout
    assert "throughput_tok_s" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    layer = "CuPy" if cupy == NO_CUPY else "driver"
    first, second = done.stderr.splitlines()[:2]
    assert re.fullmatch(rf"edgellm bench: (no usable GPU: {layer}: .*; .*install.*)\. Measuring on .*", first)
    assert second == "edgellm bench: hardware"
    folder = tmp_path / "edgellm-report"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md"}
    report = json.loads((folder / "report.json").read_text())
    assert report["command"] == f"edgellm bench --model {tiny} --quick"
    assert report["backend"] == "numpy"
    assert report["quick"] is True
    reason = report["summary"]["gpu_model"]["reason"]
    assert reason.startswith(f"no usable GPU: {layer}: ")
    assert report["no_gpu"].startswith(f"{reason}; ")  # and what to do about it, once
    assert report["no_gpu"].partition("; ")[2] in (folder / "report.md").read_text().partition("## ")[0]


def test_one_part_leaves_the_whole_report_alone(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "hardware", "--model", tiny, "--backend", "numpy")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "edgellm-report" / "hardware" / "report.json").read_text())
    assert list(report["parts"]) == ["hardware"]
    assert report["summary"]["throughput_tok_s"] == {"value": None, "reason": "part tokens not run"}


@pytest.mark.parametrize(("cupy", "layer"), [(NO_CUPY, "CuPy"), (NO_DRIVER, "driver")])
def test_info_says_what_is_missing(tmp_path, cupy, layer):
    done = edgellm(tmp_path, "info", cupy=cupy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no usable GPU: {layer}: ")
    as_json = json.loads(edgellm(tmp_path, "info", "--json", cupy=cupy).stdout)
    assert as_json["gpu_model"]["value"] is None
    assert as_json["cpu_threads"]["value"] >= 1


def test_report_makes_the_markdown_again(tmp_path, tiny):
    first = tmp_path / "first"
    assert invoke("bench", "hardware", "--model", tiny, "--backend", "numpy", "--out", str(first)).exit_code == 0
    result = invoke("report", str(first / "report.json"), "--out", str(tmp_path / "again"))
    assert result.exit_code == 0
    assert (tmp_path / "again" / "report.md").read_bytes() == (first / "report.md").read_bytes()


def test_convert_and_bench_of_its_result(tmp_path):
    pytest.importorskip("safetensors")
    compact.write(Checkpoint.random(ec.ModelConfig.from_dict(TINY)), tmp_path / "a.safetensors")
    result = invoke("convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert result.exit_code == 0, result.output
    weights = str(tmp_path / "b.safetensors")
    result = invoke("bench", "hardware", "--weights", weights, "--backend", "numpy", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report.json").read_text())["model"]["config"]["name"] == "tiny"


# ---- 2: wrong usage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "nonsense"], "utilisation"),
        (["bench", "--nonsense"], "--nonsense"),
        (["bench", "--backend", "opencl"], "numpy"),
        (["nonsense"], "nonsense"),
        (["bench", "--model", "llama", "--backend", "numpy"], "error: no model preset 'llama'"),
        (["bench", "--model", "missing.json", "--backend", "numpy"], "error: missing.json: not a readable"),
        (["bench", "--model", "a", "--weights", "b", "--backend", "numpy"], "error: --model and --weights"),
        (["bench", "--weights", "missing.gguf", "--backend", "numpy"], "error: missing.gguf: "),
        (["convert", "missing.gguf", "x"], "error: missing.gguf: "),
        (["report", "missing.json"], "error: missing.json: "),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_wrong_file_is_one_line_on_stderr(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--weights", tiny, "--backend", "numpy")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tiny}: neither GGUF nor safetensors\n"


def test_an_output_folder_that_is_a_file_is_refused_before_the_work(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--backend", "numpy", "--out", tiny)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*tiny\.json: cannot be made: File exists\n", done.stderr)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder that nobody can write to")
def test_an_output_folder_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, tiny):
    done = edgellm(tmp_path, "bench", "--model", tiny, "--backend", "numpy", "--out", "/proc/self")
    assert done.returncode == 2
    assert re.fullmatch(r"error: /proc/self: cannot be written to: .*\n", done.stderr)


def test_a_disk_that_is_full_at_the_end_still_shows_the_summary(tmp_path, tiny, monkeypatch):
    def full(result, folder):
        raise report.ReportError("report.json: cannot be written: No space left on device")

    monkeypatch.setattr(report, "write", full)
    result = invoke("bench", "cpu", "--model", tiny, "--backend", "numpy", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "cpu_utilization_pct" in result.stdout
    assert result.stderr.endswith("error: report.json: cannot be written: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file that nothing fits into")
@pytest.mark.parametrize("command", [["info"], ["--help"], ["bench", "hardware", "--backend", "numpy"]])
def test_a_full_stdout_is_one_line_on_stderr(tmp_path, command):
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([*COMMAND, *command], cwd=tmp_path, env=environment(tmp_path), **streams, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: stdout: cannot be written: No space left on device"
    assert "Traceback" not in done.stderr


# ---- 3: no GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["bench", "--backend", "cuda"], ["verify"]])
@pytest.mark.parametrize(("cupy", "layer"), [(NO_CUPY, "CuPy"), (NO_DRIVER, "driver")])
def test_a_demanded_gpu_that_is_missing(tmp_path, arguments, cupy, layer):
    done = edgellm(tmp_path, *arguments, cupy=cupy)
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(rf"error: no usable GPU: {layer}: .*; .*install.*\n", done.stderr)


# ---- 4, 6, 130: a run that does not end well ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exception", "code"), [(RuntimeError("broken"), 6), (KeyboardInterrupt(), 130), (ec.CheckpointError("x"), 6)]
)
def test_a_part_that_fails_still_leaves_a_report(tmp_path, tiny, monkeypatch, exception, code):
    def run(ctx):
        raise exception

    monkeypatch.setattr(scaling, "run", run)
    out = str(tmp_path / "out")
    result = invoke("bench", "scaling", "--model", tiny, "--backend", "numpy", "--out", out)
    assert result.exit_code == code
    assert (tmp_path / "out" / "report.md").exists()


def test_a_wrong_result_ends_with_4(tmp_path, tiny, monkeypatch):
    def run(ctx):
        ctx.failures.append("qkv: wrong")
        return {}

    monkeypatch.setattr(scaling, "run", run)
    result = invoke("bench", "scaling", "--model", tiny, "--backend", "numpy", "--out", str(tmp_path / "out"))
    assert result.exit_code == 4
    assert "Wrong result: qkv: wrong" in result.output


@pytest.mark.parametrize(
    ("failures", "code", "said"),
    [
        ([], 0, r"\d+ cases and \d+ kernel specialisations on Test GPU: every result agrees with the reference\n"),
        (["M=1: wrong"], 4, r"wrong: M=1: wrong\n1 failures in \d+ cases and \d+ kernel spec.* on Test GPU\n"),
    ],
)
def test_verify_says_how_much_it_checked(monkeypatch, failures, code, said):
    monkeypatch.setattr(runtime, "require_gpu", lambda: None)
    monkeypatch.setattr(runtime, "device_name", lambda: "Test GPU")
    monkeypatch.setattr(tuning.device, "current_facts", lambda: H200)
    monkeypatch.setattr(verify, "run", lambda progress: failures)
    result = invoke("verify")
    assert result.exit_code == code
    assert re.fullmatch(said, result.stdout)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_writes_what_is_finished(tmp_path, tiny):
    arguments = [*COMMAND, "bench", "--model", tiny, "--backend", "numpy"]
    with subprocess.Popen(
        arguments, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line == "edgellm bench: tokens\n":
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    report = json.loads((tmp_path / "edgellm-report" / "report.json").read_text())
    assert report["interrupted"] is True
    assert report["summary"]["os"]["value"]
    assert report["summary"]["throughput_tok_s"]["value"] is None


# ---- pipes and terminals --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("command", [["info"], ["bench", "hardware", "--backend", "numpy"]])
def test_a_reader_that_goes_away_is_no_error(tmp_path, command):
    read, write = os.pipe()
    os.close(read)
    try:
        streams = {"stdout": write, "stderr": subprocess.PIPE}
        process = subprocess.run([*COMMAND, *command], cwd=tmp_path, env=environment(tmp_path), **streams, text=True)
    finally:
        os.close(write)
    assert process.returncode == 0
    assert "Traceback" not in process.stderr
    assert "BrokenPipe" not in process.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo terminal")
@pytest.mark.parametrize("no_color", [False, True])
def test_a_bar_on_a_terminal_only_and_not_under_no_color(tmp_path, tiny, no_color):
    terminal, end = os.openpty()
    env = environment(tmp_path) | {"TERM": "xterm"} | ({"NO_COLOR": "1"} if no_color else {})
    arguments = [*COMMAND, "bench", "hardware", "--model", tiny, "--backend", "numpy"]
    try:
        done = subprocess.run(arguments, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=end, text=True)
        seen = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 0
    assert ("\x1b[" in seen) == (not no_color)
    assert "\x1b" not in done.stdout
