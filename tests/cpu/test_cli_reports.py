"""`edgellm compare`, `report`, `doctor` and `bench server` as a user sees them; other tests are of what they find."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from rich.cells import cell_len

from edgellm_cupy.bench.machine import doctor, finding
from edgellm_cupy.bench.serving import server
from tests.cpu.test_cli import ROOT, invoke
from tests.fake_server import openai, plain, stream, whole

MEASURED = ROOT / "bench" / "results" / "numpy" / "smollm-135m"


def slower(value: object, factor: float) -> object:
    """The report with every sample of time, and what was made of them, `factor` times as long."""
    if isinstance(value, list):
        return [slower(each, factor) for each in value]
    if not isinstance(value, dict):
        return value
    found = {key: slower(each, factor) for key, each in value.items()}
    if value.get("unit") in ("ms", "us"):
        for key in ("value", "mean", "min", "max", "std"):
            if isinstance(value.get(key), float):
                found[key] = value[key] * factor
        for key in ("samples", "ci95"):
            if isinstance(value.get(key), list):
                found[key] = [each * factor for each in value[key]]
    return found


# ---- compare --------------------------------------------------------------------------------------------------------


def test_compare_a_report_with_itself(tmp_path):
    done = invoke("compare", str(MEASURED), str(MEASURED / "report.json"), "--fail", "median:5%")
    assert done.exit_code == 0, done.output
    assert "SAME" in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80
    assert done.stderr == ""


def test_compare_ends_with_1_for_a_regression_only_when_told_to(tmp_path):
    second = tmp_path / "report.json"
    second.write_text(json.dumps(slower(json.loads((MEASURED / "report.json").read_text()), 2.0)))
    arguments = ["compare", str(MEASURED), str(second)]
    assert invoke(*arguments).exit_code == 0
    done = invoke(*arguments, "--fail", "median:50%")
    assert done.exit_code == 1
    assert "SLOWER" in done.stdout
    assert invoke(*arguments, "--fail", "median:150%").exit_code == 0
    found = json.loads(invoke(*arguments, "--json", "--margin", "3%", "--metric", "median").stdout)
    assert found["margin"] == pytest.approx(0.03)
    done = invoke(*arguments, "--md", str(tmp_path / "new" / "compared.md"))
    assert done.exit_code == 0
    assert done.stderr == f"written: {tmp_path / 'new' / 'compared.md'}\n"
    assert "| " in (tmp_path / "new" / "compared.md").read_text()
    same_rows = len(invoke(*arguments).stdout.splitlines())
    assert len(invoke(*arguments, "--all").stdout.splitlines()) >= same_rows


def test_compare_writes_markdown_behind_a_link_and_into_a_pipe(tmp_path):
    arguments = ["compare", str(MEASURED), str(MEASURED), "--md"]
    real, link = tmp_path / "there" / "real.md", tmp_path / "link.md"
    link.symlink_to(real)  # which is not there yet
    for _ in range(2):
        assert invoke(*arguments, str(link)).exit_code == 0
        assert link.is_symlink()
        assert real.read_text().startswith("# edgellm compare")
        assert [path.name for path in real.parent.iterdir()] == ["real.md"]
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert invoke(*arguments, str(pipe)).exit_code == 0
    assert pipe.is_fifo()
    reader.join(10)
    assert read == [real.read_text()]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    done = invoke(*arguments, str(circle))
    assert done.exit_code == 2
    assert f"error: {circle}: cannot be written: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(MEASURED)], "expected a baseline and at least one other"),
        ([str(MEASURED), "missing.json"], "missing.json"),
        ([str(MEASURED), str(MEASURED), "--fail", "5%"], "expected METRIC:PERCENT%"),
        ([str(MEASURED), str(MEASURED), "--margin", "x"], "--margin is 'x', expected a percentage such as 2.5%"),
        ([str(MEASURED), str(MEASURED), "--margin", "200%"], "margin is 2.0"),
        ([str(MEASURED), str(MEASURED), "--metric", "mode"], "metric is 'mode'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, message):
    done = invoke("compare", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


# ---- report ---------------------------------------------------------------------------------------------------------


def test_report_makes_everything_again(tmp_path):
    shutil.copy(MEASURED / "report.json", tmp_path)
    done = invoke("report", str(tmp_path / "report.json"))
    assert done.exit_code == 0, done.output
    first, *names = done.stdout.splitlines()
    assert first == f"written: {tmp_path}"
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html", "plots"}
    assert " ".join(names).split()[:2] == ["report.md,", "report.html,"]
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix != ".png"}
    assert invoke("report", str(tmp_path), "--out", str(tmp_path / "again")).exit_code == 0
    for path, data in made.items():
        if path != Path("report.json"):
            assert (tmp_path / "again" / path).read_bytes() == data


# ---- doctor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["ok", "note", "warning"])
def test_doctor_ends_with_5_only_for_a_warning_under_strict(monkeypatch, level):
    found = finding.Finding(level, "the governor is powersave", "clocks rise late", "cpupower frequency-set")
    monkeypatch.setattr(doctor, "examine", lambda no_gpu: [found])
    done = invoke("doctor")
    assert done.exit_code == 0
    assert "the governor is powersave" in done.stdout
    done = invoke("doctor", "--strict", "--json")
    assert done.exit_code == (5 if level == "warning" else 0)
    assert json.loads(done.stdout)["findings"][0]["level"] == level


def test_doctor_examines_this_machine():
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    assert "nothing was changed" in done.stdout
    assert max(map(cell_len, done.stdout.splitlines())) <= 80


# ---- bench server ---------------------------------------------------------------------------------------------------


SMALL = ["--requests", "3", "--warm-up", "1", "--max-tokens", "32", "--prompt-tokens", "32"]


def test_a_server_is_measured_and_the_run_is_kept(tmp_path, monkeypatch, serve):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(server.API_KEY_VARIABLE, "secret-key-123")
    fake = serve(openai(lambda request: stream(plain(n=32))))
    done = invoke("bench", "server", "--url", fake.url, "--api", "openai", *SMALL)
    assert done.exit_code == 0, done.output
    assert sum(request.method == "POST" for request in fake.requests) == 4
    assert fake.requests[-1].headers["authorization"] == "Bearer secret-key-123"
    (folder,) = Path(".edgellm/runs").glob("server-127-0-0-1-*/0001_*")
    assert f"written: {folder}\n" in done.stdout
    assert "client_first_token_ms" in done.stdout
    assert "edgellm bench server: request 2 of 3\n" in done.stderr
    for file in folder.rglob("*.*"):
        assert b"secret-key-123" not in file.read_bytes()
    assert invoke("runs", "list").stdout.splitlines()[1].split()[3].startswith("server")


def test_a_server_that_is_not_there_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke("bench", "server", "--url", "http://127.0.0.1:9", "--api", "ollama")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1].startswith("error: http://127.0.0.1:9: ")
    assert list(tmp_path.glob(".edgellm/runs/*/*")) == []


def test_a_request_that_failed_is_asked_again_by_a_resumed_run(tmp_path, monkeypatch, serve):
    monkeypatch.chdir(tmp_path)
    counts = [0]

    def answer(request):
        counts[-1] += 1
        return whole({"error": "no"}, "500 Oops") if counts == [3] else stream(plain(n=32))

    url = serve(openai(answer)).url
    arguments = ["bench", "server", "--url", url, "--api", "openai", *SMALL, "--out", "out"]
    done = invoke(*arguments)
    assert done.exit_code == 6
    rows = Path("out/rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["key"] for row in rows[1:]] == ["server/request 1", "server/request 3"]
    counts.append(0)
    done = invoke(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert counts[-1] == 2  # the warm-up and the one that failed
    assert Path("out/rows.jsonl").read_text().splitlines()[:3] == rows
    done = invoke(*arguments, "--resume", "--max-tokens", "16")
    assert done.exit_code == 2
    assert "out/rows.jsonl: cannot be resumed: max_tokens was 32, and is 16 now" in done.stderr
