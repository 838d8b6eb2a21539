"""`edgellm bench` as a user sees it: options and parts, progress, Ctrl-C, SIGTERM and `--resume`, `--strict`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from rich.cells import cell_len

from edgellm_cupy.bench import suite
from edgellm_cupy.bench.parts import hardware, scaling
from edgellm_cupy.cli import output, progress
from tests.cpu.test_cli import COMMAND, ROOT, TINY, edgellm, environment, invoke, kept

SIGNALS = pytest.mark.skipif(os.name != "posix", reason="sends signals")
PART_LINE = r"edgellm bench: \d+:\d\d {}(, about \d+:\d\d left)?\n?"


def host(*arguments: str) -> list[str]:
    return ["bench", *arguments, "--model", "tiny.json", "--backend", "numpy"]


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return "tiny.json"


# ---- options and parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "tiny.json", "--backend", "numpy", "--quick", "--seed", "7", "--out", "out", "hardware"],
        ["--model", "tiny.json", "--quick", "hardware", "--backend", "numpy", "--out", "out", "--seed", "7"],
        ["--seed", "6", "--quick", *host("hardware", "--out", "out", "--seed", "7")[1:]],
    ],
    ids=["in front", "mixed", "both: the last one counts"],
)
def test_options_in_front_of_a_part_count(tiny, arguments):
    done = invoke("bench", *arguments)
    assert done.exit_code == 0, done.output
    written = json.loads(Path("out/report.json").read_text())
    assert list(written["parts"]) == ["hardware"]
    assert (written["quick"], written["seed"]) == (True, 7)
    assert written["model"]["config"]["name"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--strict", "server", "--url", "http://x", "--api", "openai"], "--strict: not an option of"),
        (["--kv-dtype", "int8", "server", "--url", "http://x", "--api", "openai"], "--kv-dtype: not an option of"),
        (["--shapes", "table", "tokens"], "--shapes: not an option of `edgellm bench tokens`"),
        (["--shapes", "table"], "--shapes: only for `edgellm bench latency`"),
        (["--tokens", "1"], "--tokens: only for `edgellm bench latency`"),
        (["server", "--api", "openai"], "--url"),
        (["server", "--url", "http://x", "--api", "grpc"], "grpc"),
        (["server", "--url", "ftp://x", "--api", "openai"], "url is 'ftp://x'"),
        (["hardware", "tokens"], "tokens"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_what_does_not_belong_together_is_refused(tiny, arguments, message):
    done = invoke("bench", *arguments)
    assert done.exit_code == 2
    assert message in done.output
    assert not Path(".edgellm").exists()


def test_a_part_that_there_is_not(tmp_path):
    done = edgellm(tmp_path, "bench", "nonsense")
    assert done.returncode == 2
    said = " ".join(re.findall(r"[\w',-]+", done.stderr))
    assert f"no part 'nonsense', expected one of {', '.join([*suite.PARTS, 'server'])}" in said


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["bench"], *(["bench", part] for part in ("hardware", "latency", "server")), ["compare"], ["doctor"],
        ["runs"], ["runs", "list"], ["runs", "show"], ["report"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_help_fits_80_columns(tmp_path, arguments):
    env = environment(tmp_path) | {"COLUMNS": "80"}
    done = subprocess.run([*COMMAND, *arguments, "--help"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert max(map(cell_len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout  # nothing is cut off
    assert "object at 0x" not in done.stdout
    if arguments == ["bench"]:
        assert all(re.search(rf"^\W+{part}\b", done.stdout, re.M) for part in (*suite.PARTS, "server"))


def test_the_seed_is_recorded_and_sets_the_order(tiny, monkeypatch):
    orders = []
    monkeypatch.setattr(scaling, "run", lambda ctx: orders.append(ctx.shuffled("depths", range(20))) or {})
    for seed in ("1", "2", "1"):
        assert invoke(*host("scaling", "--seed", seed, "--out", "out")).exit_code == 0
    assert orders[0] == orders[2] != orders[1]
    assert json.loads(Path("out/report.json").read_text())["seed"] == 1


# ---- how it ends ----------------------------------------------------------------------------------------------------


def test_an_unstable_run_ends_with_5_only_when_that_was_asked_for(tiny, monkeypatch):
    seen = [(None, "the GPU held its clocks down")]
    monkeypatch.setattr(suite.stability, "_sentences", lambda report, where: seen)
    assert invoke(*host("hardware")).exit_code == 0
    done = invoke(*host("hardware", "--strict"))
    assert done.exit_code == 5
    assert "the GPU held its clocks down" in done.stdout


def until(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """Lines of stderr up to the first that matches."""
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.fullmatch(pattern, line):
            return lines
    raise AssertionError(f"never said: {pattern}: {lines}")


# Four rows: the third waits, if no file says that it was here before, until a signal comes.
ROWS = """
import time
from pathlib import Path
from edgellm_cupy import cli
from edgellm_cupy.bench.parts import transfer

def row(ctx, i):
    def measure():
        if i == 3 and not Path("waited").exists():
            Path("waited").touch()
            print("waiting", file=__import__("sys").stderr, flush=True)
            {wait}
        return {{"value": time.time_ns()}}
    return ctx.row(f"transfer/{{i}}", "engine", measure)

transfer.run = lambda ctx: {{"rows": [row(ctx, i) for i in range(1, 5)]}}
cli.main()
"""


def start(tmp_path: Path, *arguments: str, wait: str = "time.sleep(60)") -> subprocess.Popen[str]:
    command = [COMMAND[0], "-c", ROWS.format(wait=wait), *host("transfer", *arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path), **pipes)


@SIGNALS
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("out", [[], ["--out", "out"]], ids=["kept", "--out"])
def test_what_was_finished_is_kept_and_the_next_run_goes_on(tmp_path, tiny, number, code, out):
    with start(tmp_path, *out) as process:
        until(process, "waiting\n")
        process.send_signal(number)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    folder = tmp_path / "out" if out else kept(tmp_path)
    assert "Interrupted: " in shown
    lines = said.splitlines()
    assert lines[0] == "stopping: what is finished is kept; once more ends at once"
    where = folder.relative_to(tmp_path)
    before, behind = ("--out out ", "") if out else ("", f"--out {where} ")
    command = f"edgellm bench transfer {before}--model tiny.json --backend numpy {behind}--resume"
    assert lines[1:] == [f"finished rows are kept in {where}; to go on: {command}"]
    rows = (folder / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in rows[1:]] == ["transfer/1", "transfer/2"]
    first = json.loads((folder / "report.json").read_text())
    assert first["interrupted"] is True

    again = edgellm(tmp_path, *host("transfer", "--out", str(where)))
    assert again.returncode == 2, again.stderr  # and not: begin anew, over what was finished
    assert again.stderr.startswith(f"error: --out: {where} has the 2 finished rows of an interrupted run: ")
    assert (folder / "rows.jsonl").read_text().splitlines() == rows

    with start(tmp_path, *out, "--resume") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    again = (folder / "rows.jsonl").read_text().splitlines()
    assert again[:3] == rows
    assert [json.loads(line)["key"] for line in again[3:]] == ["transfer/3", "transfer/4"]
    second = json.loads((folder / "report.json").read_text())
    assert second["interrupted"] is False
    assert second["resumed_rows"] == 2
    taken = first["parts"]["transfer"]["rows"][:2]
    taken = [{**row, "conditions": {**row["conditions"], "resumed": True}} for row in taken]
    assert second["parts"]["transfer"]["rows"][:2] == taken
    if not out:
        kept(tmp_path)  # no other folder was made


@SIGNALS
def test_a_second_ctrl_c_ends_at_once(tmp_path, tiny):
    stubborn = "\n            ".join(
        ["while True:", "    try:", "        time.sleep(60)", "    except KeyboardInterrupt:", "        pass"]
    )
    with start(tmp_path, wait=stubborn) as process:
        until(process, "waiting\n")
        process.send_signal(signal.SIGINT)
        until(process, "stopping: .*\n")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT  # which a shell shows as 130
    rows = (kept(tmp_path) / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 3


@SIGNALS
def test_a_killed_run_is_resumed_from_its_rows_and_keeps_its_seed(tmp_path, tiny):
    with start(tmp_path, "--seed", "7") as process:
        until(process, "waiting\n")
        process.kill()
        process.communicate(timeout=20)
    assert not (kept(tmp_path) / "report.json").exists()
    assert " interrupted " in edgellm(tmp_path, "runs", "list").stdout
    with start(tmp_path, "--resume") as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    written = json.loads((kept(tmp_path) / "report.json").read_text())
    assert (written["resumed_rows"], written["seed"]) == (2, 7)


@SIGNALS
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "rows.jsonl: cannot be resumed: quick was false, and is true now"),
        (["--seed", "2"], "rows.jsonl: cannot be resumed: seed was 0, and is 2 now"),
        (["--head", "int8"], 'rows.jsonl: cannot be resumed: decoder head was "auto", and is "int8" now'),
        (
            ["--model", "smollm-135m-notebook"],
            'rows.jsonl: cannot be resumed: model name was "tiny", and is "smollm-135m-notebook" now',
        ),
        (["--out", "empty"], "empty/rows.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_a_run_of_something_else_is_not_resumed(tmp_path, tiny, arguments, message):
    with start(tmp_path) as process:
        until(process, "waiting\n")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    before = (kept(tmp_path) / "rows.jsonl").read_bytes()
    done = edgellm(tmp_path, *host("transfer", "--resume"), *arguments)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert (kept(tmp_path) / "rows.jsonl").read_bytes() == before


def test_nothing_to_resume_is_one_line(tmp_path, tiny):
    done = edgellm(tmp_path, *host("hardware", "--resume"))
    assert done.returncode == 2
    assert re.fullmatch(r"error: \.edgellm/runs/numpy\S*: no interrupted run here: nothing to resume\n", done.stderr)


@SIGNALS
def test_two_runs_do_not_write_into_one_folder(tmp_path, tiny):
    with start(tmp_path, "--out", "out") as process:
        until(process, "waiting\n")
        done = edgellm(tmp_path, *host("hardware", "--out", "out"))
        process.kill()
        process.communicate(timeout=20)
    assert (done.returncode, done.stderr) == (2, "error: out: another run is writing to it\n")


def test_a_finished_report_is_replaced(tiny):
    for part in ("hardware", "reproducibility"):
        assert invoke(*host(part, "--out", "out")).exit_code == 0
        assert list(json.loads(Path("out/report.json").read_text())["parts"]) == [part]
        assert len(Path("out/rows.jsonl").read_text().splitlines()) >= 1
        assert json.loads(Path("out/rows.jsonl").read_text().splitlines()[0])["identity"]["parts"] == [part]


# ---- progress -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_remaining_time_follows_the_machine():
    clock = Clock()
    remaining = progress.Remaining({"a": 10, "b": 20, "c": 70}, clock=clock)
    assert remaining.seconds() is None
    remaining.begin("a")
    assert remaining.seconds() == 100
    clock.now += 4
    assert remaining.seconds() == 96
    clock.now += 26  # three times as slow: so the others are expected to be, the more the longer it lasts
    assert 150 < remaining.seconds() < 3 * 90
    remaining.begin("b")
    slow = remaining.seconds()
    assert 150 < slow < 3 * 90
    clock.now += 20 * 3
    remaining.begin("c")
    assert 70 * 2 < remaining.seconds() < 70 * 3
    clock.now += 500
    assert remaining.seconds() is None  # should have ended: nobody knows


def test_remaining_time_learns_nothing_from_parts_that_were_resumed():
    clock = Clock()
    remaining = progress.Remaining({"a": 50, "b": 50}, learn=False, clock=clock)
    remaining.begin("a")
    remaining.begin("b")
    assert remaining.seconds() == 50


def test_the_bar_never_goes_back_nor_beyond_its_end():
    clock = Clock()
    remaining = progress.Remaining({"a": 10, "b": 20}, clock=clock)
    assert remaining.fraction() == 0
    for part, inside in (("a", 10), ("b", 20)):
        remaining.begin(part)
        seen = []
        for _ in range(inside):
            seen.append(remaining.fraction())
            clock.now += 1
        assert seen == sorted(seen)
    assert 0.95 < remaining.fraction() < 1


@pytest.mark.parametrize("backend", ["cuda", "numpy"])
def test_expected_times_are_those_of_the_committed_reports(backend):
    """Within a tenth of a whole run for each part; the test prints what was measured."""
    folder = ROOT / "bench" / "results" / ("h200" if backend == "cuda" else "numpy") / "smollm-135m"
    seconds = json.loads((folder / "report.json").read_text())["seconds"]
    assert set(progress.SECONDS[backend]) == set(suite.PARTS)
    whole = sum(seconds.values())
    for part, expected in progress.SECONDS[backend].items():
        assert abs(expected - seconds[part]) < 0.1 * whole, f"edit progress.SECONDS[{backend!r}]: {seconds}"


def test_a_line_a_part_without_a_terminal(tmp_path, tiny):
    done = edgellm(tmp_path, *host("hardware"))
    assert re.fullmatch(PART_LINE.format("hardware"), done.stderr)


def on_a_terminal(tmp_path: Path, env: dict[str, str], code: str, *arguments: str) -> tuple[str, str]:
    """stdout, and what the terminal behind stderr got."""
    terminal, end = os.openpty()
    try:
        done = subprocess.run(
            [COMMAND[0], "-c", code, *arguments],
            cwd=tmp_path, env=environment(tmp_path) | env, stdout=subprocess.PIPE, stderr=end, text=True, timeout=60,
        )  # fmt: skip
        seen = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 0, seen
    return done.stdout, seen


MANY_STEPS = """
import threading, time
from edgellm_cupy import cli
from edgellm_cupy.bench.parts import hardware

def run(ctx):
    before = threading.active_count()
    end = time.monotonic() + 1.2
    while time.monotonic() < end:
        ctx.progress("a step")
        time.sleep(0.01)
    return {"threads": before}

hardware.run = run
cli.main()
"""


@SIGNALS
def test_the_bar_is_drawn_twice_a_second_and_by_no_thread(tmp_path, tiny):
    _, seen = on_a_terminal(tmp_path, {"TERM": "xterm"}, MANY_STEPS, *host("hardware", "--out", "out"))
    assert 2 <= seen.count("hardware: a step") <= 3
    assert re.search(r"left about 0:0\d|left \?", seen)
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["parts"]["hardware"]["threads"] == 1


@SIGNALS
@pytest.mark.parametrize("columns", [40, 50, 80])
def test_the_remaining_time_is_seen_on_narrow_terminals(tmp_path, tiny, columns):
    env = {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "24"}
    _, seen = on_a_terminal(tmp_path, env, MANY_STEPS, *host("hardware", "--out", "out"))
    assert re.search(r"0:0\d, left (about 0:0\d|\?)", seen)
    assert "…" not in seen


def test_a_report_that_is_replaced_is_named(tiny):
    assert "replaced" not in invoke(*host("hardware", "--out", "out")).stderr
    replaced = re.search(
        r"out: its report is replaced \(.+, 20\d\d-.+\)", invoke(*host("hardware", "--out", "out")).stderr
    )
    assert replaced


@SIGNALS
@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}], ids=["dumb", "NO_COLOR"])
def test_a_terminal_that_cannot_or_must_not_be_drawn_on_gets_lines(tmp_path, tiny, env):
    _, seen = on_a_terminal(tmp_path, env, MANY_STEPS, *host("hardware"))
    assert "\x1b" not in seen
    assert re.fullmatch(PART_LINE.format("hardware"), seen.replace("\r", ""))


@SIGNALS
def test_ctrl_c_shows_the_cursor_again(tmp_path, tiny):
    terminal, end = os.openpty()
    code = ROWS.format(wait="import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    env = environment(tmp_path) | {"TERM": "xterm"}
    arguments = [COMMAND[0], "-c", code, *host("transfer")]
    try:
        streams = {"stdout": subprocess.DEVNULL, "stderr": end}
        done = subprocess.run(arguments, cwd=tmp_path, env=env, **streams, timeout=60)
        seen = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(terminal)
        os.close(end)
    assert done.returncode == 130
    hidden, shown = seen.rfind("\x1b[?25l"), seen.rfind("\x1b[?25h")
    assert 0 <= hidden < shown
    assert "stopping: what is finished is kept" in seen


# ---- what is printed ------------------------------------------------------------------------------------------------


def test_files_are_listed_below_their_folder(tmp_path):
    paths = [tmp_path / name for name in ("report.json", "report.md", "plots/a.svg", "plots/a.png", "rows.jsonl")]
    assert output.files(tmp_path, paths) == (
        f"written: {tmp_path}\n  report.json, report.md, rows.jsonl, plots/ (2 files)"
    )


@SIGNALS
def test_head_ends_a_benchmark_without_a_word(tmp_path, tiny):
    command = f"{COMMAND[0]} -m edgellm_cupy {' '.join(host('hardware'))} | head -1; exit ${{PIPESTATUS[0]}}"
    env = environment(tmp_path)
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny on the NumPy backend")
    assert re.fullmatch(PART_LINE.format("hardware"), done.stderr)


def test_signals_are_left_alone_outside_the_main_thread(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with output.interruptible() as code:
            seen.append((signal.getsignal(signal.SIGINT), code()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_a_reproducible_summary(tiny, monkeypatch):
    """The table's units and intervals stand below each other."""
    monkeypatch.setattr(hardware, "run", lambda ctx: {"steady": {"samples": [1.0, 1.0], "relative_error": 0.0}})
    figures = {
        "throughput_tok_s": {"value": 1234.5, "unit": "tok/s", "ci95": [1200.0, 1300.0]},
        "p50_token_latency_ms": {"value": 0.5, "unit": "ms", "ci95": [0.4, 0.6]},
        "kernels_per_token": {"value": 183, "unit": "kernels"},
    }
    summarised = suite.report.summary
    monkeypatch.setattr(suite.report, "summary", lambda result: summarised(result) | figures)
    lines = invoke(*host("hardware")).stdout.splitlines()
    rows = [line for line in lines if line.split(" ")[0] in figures]
    assert len(rows) == 3
    assert len({row.index(f" {unit}") for row, unit in zip(rows, ("tok/s", "ms", "kernels"), strict=True)}) == 1
    assert rows[0].index(" to ") == rows[1].index(" to ")
    assert len(rows[0]) == len(rows[1])
    assert "Stable: no series stayed noisy." in lines  # of NumPy, which nothing throttles
