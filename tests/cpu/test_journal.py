"""Rows of a run: kept as they finish, null when they fail or are interrupted, taken again by a resumed run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import INTERRUPTED, Context, WrongResultError
from edgellm_cupy.bench.journal import FILE, Journal, JournalError, read
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts import hardware, reproducibility, scaling, tokens
from edgellm_cupy.bench.reporting import report, schema
from edgellm_cupy.formats.checkpoint import Checkpoint

CONFIG = ec.ModelConfig("tiny", 2, 64, 96, 4, 2, 16, 256, max_context=128)
IDENTITY = {"model": "tiny", "quick": True}


def context(journal: Journal | None = None, seed: int = 0) -> Context:
    ctx = Context(Checkpoint.random(CONFIG), "not asked for", quick=True, seed=seed)
    if journal:
        ctx.journal = journal
    return ctx


def journal(folder: Path, resume: bool = False, **changed: object) -> Journal:
    return Journal.open(folder, {**IDENTITY, **changed}, resume)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_row_is_on_the_disk_before_the_next_one_begins(tmp_path):
    ctx = context(journal(tmp_path))
    ctx.row("first", "kernel", lambda: {"us": 1.0})

    def second():
        header, rows = read(tmp_path / FILE)
        assert header["identity"] == IDENTITY
        assert [(row["key"], row["figures"]["us"], row["figures"]["boundary"]) for row in rows] == [
            ("first", 1.0, "kernel")
        ]
        return {"us": 2.0}

    assert ctx.row("second", "engine", second)["us"] == 2.0
    assert [row["key"] for row in read(tmp_path / FILE)[1]] == ["first", "second"]


def test_a_resumed_run_takes_what_is_there_and_measures_the_rest(tmp_path):
    context(journal(tmp_path)).row("first", "kernel", lambda: {"us": 1.0})
    with (tmp_path / FILE).open("a") as f:
        f.write('{"key": "cut o')  # the process was killed while it wrote
    ctx = context(journal(tmp_path, resume=True))
    assert ctx.row("first", "kernel", lambda: pytest.fail("measured again"))["us"] == 1.0
    assert ctx.row("cut off", "kernel", lambda: {"us": 3.0})["us"] == 3.0
    assert list(ctx.journal.taken) == ["first"]
    assert [row["key"] for row in read(tmp_path / FILE)[1]] == ["first", "cut off"]


def test_without_resume_a_run_begins_anew(tmp_path):
    context(journal(tmp_path)).row("first", "kernel", lambda: {"us": 1.0})
    journal(tmp_path).close()
    assert read(tmp_path / FILE)[1] == []


def test_rows_of_another_run_are_refused_with_what_differs(tmp_path):
    journal(tmp_path).close()
    with pytest.raises(JournalError, match=r"rows\.jsonl: cannot be resumed: quick was true, and is false now"):
        journal(tmp_path, resume=True, quick=False)
    assert read(tmp_path / FILE)[0]["identity"] == IDENTITY  # and nothing was lost
    journal(tmp_path, shape={"hidden": 64, "layers": 2}).close()
    with pytest.raises(JournalError, match=r"cannot be resumed: shape hidden was 64, and is 128 now$"):
        journal(tmp_path, resume=True, shape={"hidden": 128, "layers": 2})
    journal(tmp_path, resume=True, shape={"layers": 2, "hidden": 64}).close()


def test_what_changes_results_makes_another_run(tmp_path, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "EDGELLM_OVERLAP"):
        monkeypatch.delenv(name, raising=False)
    weights = tmp_path / "model.gguf"
    weights.write_bytes(b"one")
    first = suite.identity(context(), ["cpu"], weights)
    assert suite.identity(context(), ["cpu"], tmp_path) == first  # the folder, in which it is the one file

    def differs(**changed: int) -> list[str]:
        now = suite.identity(context(**changed), ["cpu"], weights)
        return [key for key in now if now[key] != first[key]]

    assert differs() == []
    assert differs(seed=1) == ["seed"]
    with monkeypatch.context() as m:  # the rows themselves, in a folder of the checkout
        where = suite.reproducibility.environment(context()) | {"git_modified": measured(True)}
        m.setattr(suite.reproducibility, "environment", lambda ctx: where)
        assert differs() == []
    weights.write_bytes(b"three")
    assert differs() == ["checkpoint"]
    weights.write_bytes(b"two")
    os.utime(weights, (1, 1))
    assert differs() == ["checkpoint"]
    weights.unlink()
    weights.write_bytes(b"one")
    first = suite.identity(context(), ["cpu"], weights)
    for name in ("OPENBLAS_NUM_THREADS", "EDGELLM_OVERLAP"):
        with monkeypatch.context() as m:
            m.setenv(name, "0")
            assert differs() == ["variables"]
    tuned = {"value": 1, "unit": "entries", "file": "x", "sha256": "0"}
    where = suite.reproducibility.environment(context())
    for sha256 in ("0", "1"):
        changed = where | {"tuned": tuned | {"sha256": sha256}}
        monkeypatch.setattr(suite.reproducibility, "environment", lambda ctx, changed=changed: changed)
        if sha256 == "0":
            first = suite.identity(context(), ["cpu"], weights)
    assert differs() == ["tuned"]


def test_shards_are_those_of_the_folder(tmp_path):
    for name in ("model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "README.md"):
        (tmp_path / name).touch()
    for weights in (tmp_path, tmp_path / "model.safetensors.index.json"):
        files = suite.identity(context(), ["cpu"], weights)["checkpoint"]
        assert list(files) == ["model-1.safetensors", "model-2.safetensors"]


ROWS_WITHOUT_SECONDS = '{"identity": {}}\n{"key": "a", "figures": {}, "failures": []}\n'


@pytest.mark.parametrize(
    "text", [None, "", "\n", "[]\n", "{}\n", ROWS_WITHOUT_SECONDS, '{"identity": {}}\n1\n', "no JSON\n"]
)
def test_what_is_no_journal_is_one_error_that_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(JournalError, match=r"rows\.jsonl: (cannot be read|not the rows of a run): "):
        journal(tmp_path, resume=True)


def test_a_journal_of_a_newer_layout_is_refused(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({"schema_version": "2.0.0", "identity": IDENTITY}) + "\n")
    with pytest.raises(JournalError, match=r"schema_version is 2\.0\.0"):
        journal(tmp_path, resume=True)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_that_raises_is_null_and_no_line(tmp_path):
    ctx = context(journal(tmp_path))
    row = ctx.row("broken", "kernel", lambda: {"us": 1 / 0})
    assert row == {"value": None, "reason": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in ctx.errors["broken"]["traceback"]
    assert ctx.row("next", "kernel", lambda: {"us": 1.0})["us"] == 1.0
    assert [row["key"] for row in read(tmp_path / FILE)[1]] == ["next"]


def test_a_row_that_json_cannot_hold_is_null(tmp_path):
    ctx = context(journal(tmp_path))
    assert ctx.row("nan", "kernel", lambda: {"us": float("nan")})["value"] is None
    assert list(ctx.errors) == ["nan"]


def test_a_wrong_result_is_a_failure_also_of_the_run_that_resumes(tmp_path):
    def wrong():
        ctx.failures.append("qkv: wrong")
        return {"us": None}

    ctx = context(journal(tmp_path))
    ctx.row("wrong", "kernel", wrong)
    resumed = context(journal(tmp_path, resume=True))
    resumed.row("wrong", "kernel", lambda: pytest.fail("measured again"))
    assert resumed.failures == ["qkv: wrong"]

    def raises():
        raise WrongResultError("down: wrong")

    assert ctx.row("raises", "kernel", raises)["value"] is None
    assert ctx.failures == ["qkv: wrong", "down: wrong"]


def test_after_ctrl_c_no_row_is_measured(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    ctx = context(journal(tmp_path))
    assert ctx.row("a", "kernel", interrupted)["reason"] == INTERRUPTED
    assert ctx.row("b", "kernel", lambda: pytest.fail("measured"))["reason"] == INTERRUPTED
    assert ctx.interrupted
    assert ctx.errors == {}


def test_the_order_is_the_seeds_and_nothing_is_lost():
    items = list(range(20))
    first, again, other = (context(seed=seed).shuffled("a", items) for seed in (1, 1, 2))
    assert sorted(first) == items != first
    assert first == again != other
    assert context(seed=1).shuffled("b", items) != first


# ---- whole parts ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_reports_its_rows_and_can_be_resumed(tmp_path, monkeypatch):
    calls: list[int] = []
    real = scaling.times_at_depth

    def until_the_fifth(ctx, cache, depth, n):
        calls.append(depth)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(ctx, cache, depth, n)

    monkeypatch.setattr(scaling, "times_at_depth", until_the_fifth)
    ctx = context()
    ctx.journal = Journal.open(tmp_path, suite.identity(ctx, ["scaling", "cpu"]))
    result = suite.run(ctx, ["scaling", "cpu"])
    assert result["interrupted"]
    assert suite.exit_code(result) == 130
    assert list(result["parts"]) == ["scaling"]
    rows = result["parts"]["scaling"]["rows"]
    finished = {row["context"]: row["tok_s"]["value"] for row in rows if row["tok_s"]["value"] is not None}
    lines = read(tmp_path / FILE)[1]
    assert 0 < len(finished) == len(lines) < len(rows)
    assert {row["tok_s"].get("reason") for row in rows} == {None, INTERRUPTED}
    assert result["parts"]["scaling"]["fit"]["reason"] == INTERRUPTED

    monkeypatch.setattr(scaling, "times_at_depth", real)
    ctx = context()
    ctx.journal = Journal.open(tmp_path, suite.identity(ctx, ["scaling", "cpu"]), resume=True)
    resumed = suite.run(ctx, ["scaling", "cpu"])
    assert suite.exit_code(resumed) == 0
    assert resumed["resumed_rows"] == len(lines)
    assert read(tmp_path / FILE)[1][: len(lines)] == lines
    again = {row["context"]: row["tok_s"]["value"] for row in resumed["parts"]["scaling"]["rows"]}
    assert finished.items() <= again.items()
    assert None not in again.values()


def test_taken_rows_say_so_and_count_their_seconds(tmp_path):
    for resume in (False, True):
        ctx = context()
        ctx.journal = Journal.open(tmp_path, suite.identity(ctx, ["latency", "tokens"]), resume)
        result = suite.run(ctx, ["latency", "tokens"])
        ctx.journal.close()
        parts = result["parts"]
        rows = [row for product in parts["latency"]["products"].values() for row in product["rows"]]
        rows += [*parts["tokens"]["batches"], *parts["tokens"]["sampling"], parts["tokens"]["token_latency"]]
        assert {row["conditions"].get("resumed", False) for row in rows} == {resume}
        assert schema.faults(json.loads(json.dumps(result))) == []
    measured = read(tmp_path / FILE)[1]
    assert result["resumed_rows"] == len(measured)
    for part in ("latency", "tokens"):
        before = sum(row["seconds"] for row in measured if row["key"].startswith(part))
        assert before - 0.001 < result["seconds"][part] < before + 0.5  # given to a millisecond


@pytest.mark.parametrize(
    ("where", "name", "parts"),
    [(suite, "check_decoder", ["tokens"]), (hardware, "run", ["hardware", "cpu"]), (suite.doctor, "examine", ["cpu"])],
    ids=["decoder check", "hardware", "doctor"],
)
def test_ctrl_c_in_what_has_no_rows_does_not_begin_it_again(where, name, parts, monkeypatch):
    calls = []

    def interrupted(*args, **options):
        calls.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, interrupted)
    result = suite.run(context(), parts)
    assert calls == [name]
    assert suite.exit_code(result) == 130
    assert (result["parts"], result["errors"]) == ({}, {})
    if name == "check_decoder":
        assert result["decoder_check"] == missing(INTERRUPTED)
    assert schema.faults(json.loads(json.dumps(result))) == []


def test_one_row_that_fails_costs_neither_its_part_nor_the_others(monkeypatch):
    real = tokens._batch

    def no_memory(ctx, batch, plan):
        if batch == 1:
            raise MemoryError("a batch of 1")
        return real(ctx, batch, plan)

    monkeypatch.setattr(tokens, "_batch", no_memory)
    result = suite.run(context(), ["tokens"])
    assert suite.exit_code(result) == 6
    assert list(result["errors"]) == ["tokens/batch 1"]
    figures = result["parts"]["tokens"]
    assert "a batch of 1" in figures["batches"][0]["tok_s"]["reason"]
    assert figures["throughput_tok_s"]["value"] > 0
    assert "a batch of 1" in figures["batch_tok_s"]["reason"]


def test_a_model_that_cannot_be_built_costs_no_count_and_no_version(monkeypatch):
    def no_memory(*args, **options):
        raise MemoryError("the model")

    monkeypatch.setattr(ec.reference, "TernaryTransformer", no_memory)
    result = suite.run(context(), ["transfer"])
    assert list(result["errors"]) == ["transfer/weight bytes"]
    transfer = result["parts"]["transfer"]
    assert transfer["weight_bytes_one_time"] == {"value": None, "unit": "bytes", "reason": "MemoryError: the model"}
    assert transfer["token_id_us"]["reason"] == "not asked for"

    monkeypatch.setattr(reproducibility, "_clock_locking", no_memory)
    monkeypatch.setattr(reproducibility, "_build_flags", lambda ctx: missing("no GPU in this test"))
    ctx = Context(Checkpoint.random(CONFIG), None, quick=True)
    figures = reproducibility.run(ctx)
    assert list(ctx.errors) == ["reproducibility/clock locking"]
    assert figures["clock_locking"] == missing("MemoryError: the model")
    assert figures["python"]["version"]


def test_a_doctor_that_fails_costs_its_findings(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.doctor, "examine", lambda no_gpu, folder: 1 / 0)
    result = suite.run(context(), ["cpu"])
    assert result["doctor"] == missing("ZeroDivisionError: division by zero")
    assert list(result["errors"]) == ["doctor"]
    assert result["parts"]["cpu"]
    assert schema.faults(json.loads(json.dumps(result))) == []
    assert report.markdown(result)


def test_the_doctor_looks_at_the_disk_of_the_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(suite.doctor, "examine", lambda no_gpu, folder: seen.append(folder) or [])
    suite.run(context(journal(tmp_path)), ["hardware"])
    assert seen == [tmp_path]


def test_every_row_has_its_boundary_and_conditions():
    result = suite.run(context(), ["tokens", "scaling", "cpu", "latency"])
    assert result["errors"] == {}
    parts = result["parts"]
    rows = [*parts["tokens"]["prompts"], *parts["tokens"]["batches"], *parts["scaling"]["rows"]]
    rows += [parts["tokens"]["first_token"], parts["tokens"]["token_latency"], parts["tokens"]["throughput_tok_s"]]
    assert {row["boundary"] for row in rows} == {"engine"}
    products = [row for product in parts["latency"]["products"].values() for row in product["rows"]]
    assert {row["boundary"] for row in products} == {"kernel"}
    for row in (*rows, *products):
        assert row["conditions"] == {"value": None, "reason": "not asked for"}


def test_strict_is_about_what_was_seen():
    result = suite.run(context(), ["cpu"])
    assert result["stability"] == []
    assert suite.exit_code(result, strict=True) == 0
    result["stability"] = ["the GPU held its clocks down during x"]
    assert suite.exit_code(result) == 0
    assert suite.exit_code(result, strict=True) == 5
