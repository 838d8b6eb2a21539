"""Folders of runs: names, numbers, states, and the commands that list and show them."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import cli
from edgellm_cupy.bench import journal
from edgellm_cupy.bench.reporting import report, runs
from tests.cpu.test_cli import TINY

COMMIT = "4b4b6729f2eb5f8e05e99f57d97937e92fcde363"


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def measured(tmp_path, monkeypatch) -> Path:
    """The current folder, with one run of a cheap part."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(json.dumps(TINY))
    done = invoke("bench", "hardware", "--model", "tiny.json", "--backend", "numpy")
    assert done.exit_code == 0, done.output
    return tmp_path


def with_rows(folder: Path, keys: tuple[str, ...] = ("scaling/context 1024",)) -> Path:
    """A run that was killed: rows and no report."""
    rows = journal.Journal.open(folder, {"model": {"name": "tiny"}})
    for key in keys:
        rows.record(key, 0.5, {"value": 1}, [])
    rows.close()
    return folder


# ---- names and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
        ("numpy Intel(R) Xeon(R) CPU @ 2.20GHz", "numpy-intel-xeon-2-20ghz"),
        ("numpy AMD EPYC 9654 96-Core Processor", "numpy-amd-epyc-9654-96-core"),
        ("numpy ", "numpy"),
        ("../../etc", "etc"),
        ("日本", "unknown"),
    ],
)
def test_slug(name, expected):
    assert runs.slug(name) == expected


def test_a_slug_is_short_enough_for_a_folder():
    assert len(runs.slug("a b " * 200)) <= 60
    assert not runs.slug("a b " * 200).endswith("-")


def test_numbers_go_on_over_all_gpus_and_nothing_is_overwritten(tmp_path):
    first = runs.new_folder(tmp_path, "NVIDIA H200", COMMIT)
    second = runs.new_folder(tmp_path, "numpy AMD EPYC", None)
    third = runs.new_folder(tmp_path, "NVIDIA H200", COMMIT)
    assert re.fullmatch(r"0001_4b4b672_\d{8}T\d{4}", first.name)
    assert re.fullmatch(r"0002_nogit_\d{8}T\d{4}", second.name)
    assert re.fullmatch(r"0003_4b4b672_\d{8}T\d{4}", third.name)
    assert first.parent == third.parent == tmp_path / "nvidia-h200"
    first.rename(first.with_name(first.name.replace("0001", "9999")))
    assert runs.new_folder(tmp_path, "NVIDIA H200", COMMIT).name.startswith("10000_")


def _make(root: str, count: int, names: multiprocessing.Queue) -> None:
    for _ in range(count):
        names.put(runs.new_folder(Path(root), f"gpu {os.getpid() % 2}", COMMIT).name)


def test_runs_that_start_at_once_get_numbers_of_their_own(tmp_path):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    names = context.Queue()
    processes = [context.Process(target=_make, args=(str(tmp_path), 10, names)) for _ in range(4)]
    for process in processes:
        process.start()
    made = [names.get(timeout=60) for _ in range(40)]
    for process in processes:
        process.join(60)
    assert len({name.split("_")[0] for name in made}) == 40
    assert sorted(path.name for path in tmp_path.glob("*/*")) == sorted(made)


def test_a_root_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(report.ReportError, match=r"file/gpu: cannot be made"):
        runs.new_folder(tmp_path / "file", "gpu", None)


def _fail(root: Path, keys: tuple[str, ...]) -> None:
    with runs.kept(root, "gpu", None) as folder:
        with_rows(folder, keys)
        raise ec.EdgeLLMError("no")


def test_a_run_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    with pytest.raises(ec.EdgeLLMError, match="no"):
        _fail(tmp_path, ())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ec.EdgeLLMError, match="no"):
        _fail(tmp_path, ("scaling/context 1024",))
    assert [run.rows for run in runs.listing(tmp_path)] == [1]


# ---- states ---------------------------------------------------------------------------------------------------------


def test_states_follow_from_the_report(measured):
    (run,) = runs.listing(runs.ROOT)
    assert (run.state, run.number, run.model, run.tok_s) == ("finished", 1, "tiny", None)
    written = json.loads((run.path / "report.json").read_text())
    for change, state in (
        ({"interrupted": True, "failures": ["x"]}, "interrupted"),
        ({"failures": ["x"], "errors": {"tokens": {"reason": "x"}}}, "wrong"),
        ({"errors": {"tokens": {"reason": "x"}}}, "partial"),
        ({"summary": None}, "unreadable"),
        ({"schema_version": "9.0.0"}, "unreadable"),
        ({"workload": {**written["workload"], "timestamp": {"value": 7}}}, "unreadable"),
        ({"summary": {**written["summary"], "throughput_tok_s": {"value": "many"}}}, "unreadable"),
    ):
        (run.path / "report.json").write_text(json.dumps(written | change))
        assert runs.read(run.path).state == state


def test_a_name_with_a_time_that_no_clock_shows(tmp_path):
    folder = tmp_path / "gpu" / "0007_abc_20261399T9999"
    folder.mkdir(parents=True)
    with_rows(folder)
    (run,) = runs.listing(tmp_path)
    assert (run.path, run.number, run.time, run.state) == (folder, 7, None, "interrupted")


def test_a_run_without_a_report_was_killed_or_is_running(tmp_path):
    folder = with_rows(runs.new_folder(tmp_path, "NVIDIA H200", COMMIT))
    (run,) = runs.listing(tmp_path)
    assert (run.state, run.rows, run.model, run.gpu, run.commit) == ("interrupted", 1, "tiny", "nvidia-h200", "4b4b672")
    if runs.fcntl:
        with runs.held(folder):
            assert runs.listing(tmp_path)[0].state == "running"
            with pytest.raises(runs.RunsError, match=re.escape(f"{folder}: another run is writing to it")):
                runs.held(folder).__enter__()
    assert runs.listing(tmp_path)[0].state == "interrupted"


def test_the_newest_interrupted_run_of_this_gpu_is_the_one_to_resume(tmp_path):
    with pytest.raises(runs.RunsError, match="gpu: no interrupted run here: nothing to resume"):
        runs.unfinished(tmp_path, "gpu")
    older = with_rows(runs.new_folder(tmp_path, "gpu", COMMIT))
    newer = with_rows(runs.new_folder(tmp_path, "gpu", COMMIT))
    with_rows(runs.new_folder(tmp_path, "another gpu", COMMIT))
    assert runs.unfinished(tmp_path, "gpu") == newer
    if runs.fcntl:
        with runs.held(newer):  # still running
            assert runs.unfinished(tmp_path, "gpu") == older


# ---- list and show --------------------------------------------------------------------------------------------------


def test_list_has_the_newest_last_and_fits_80_columns(measured):
    long = json.loads(next(runs.ROOT.glob("*/*/report.json")).read_text())
    long["workload"]["model_name"]["value"] = "a-model-with-a-very-long-name-" * 3
    long["summary"]["throughput_tok_s"] = {"value": 123456.7, "unit": "tok/s"}
    folder = runs.new_folder(runs.ROOT, "NVIDIA GeForce RTX 4090 with a long name", COMMIT)
    (folder / "report.json").write_text(json.dumps(long))
    with_rows(runs.new_folder(runs.ROOT, "NVIDIA H200", COMMIT))
    listed = invoke("runs", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["no", "1", "2", "3"]
    assert max(map(cell_len, listed)) <= 80
    assert listed[2].endswith("123,457")
    assert " interrupted " in listed[3]
    found = json.loads(invoke("runs", "list", "--json").stdout)
    assert [run["number"] for run in found] == [1, 2, 3]
    assert found[1]["tok_s"] == 123456.7
    assert invoke("runs", "list", str(measured / ".edgellm" / "runs")).stdout.splitlines() == listed


def test_list_takes_any_folder_with_reports(measured):
    invoke("bench", "hardware", "--model", "tiny.json", "--backend", "numpy", "--out", "results/mine")
    lines = invoke("runs", "list", "results").stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[0] == "-"


def test_show_takes_a_number_a_folder_or_a_file_and_else_the_newest(measured):
    (folder,) = runs.ROOT.glob("*/*")
    shown = invoke("runs", "show")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("tiny on the NumPy backend")
    assert f"{folder}\n" in shown.stdout
    for which in ("1", "0001", str(folder), str(folder / "report.json")):
        assert invoke("runs", "show", which).stdout == shown.stdout
    killed = with_rows(runs.new_folder(runs.ROOT, "NVIDIA H200", COMMIT))
    assert invoke("runs", "show").stdout == f"{killed}: interrupted, no report; finished rows in rows.jsonl: 1\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "error: nowhere: no such folder: no run is kept here\n"),
        (["show", "--root", "nowhere"], "error: nowhere: no such folder: no run is kept here\n"),
        (["show", "7"], "error: .edgellm/runs: no run 7\n"),
        (["show", "tiny.json"], "error: tiny.json: neither the number of a run nor a folder with one\n"),
    ],
)
def test_what_is_not_there_is_one_line(measured, arguments, message):
    done = invoke("runs", *arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", message)
