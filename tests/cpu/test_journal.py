"""Rows of a run: kept as they finish, null when they fail or are interrupted, taken again by a resumed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import INTERRUPTED, Context, WrongResultError
from edgellm_cupy.bench.journal import FILE, Journal, JournalError, read
from edgellm_cupy.bench.parts import scaling, tokens
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
    assert ctx.journal.taken == ["first"]
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


@pytest.mark.parametrize("text", [None, "", "\n", "[]\n", "{}\n", '{"identity": {}}\n{"figures": 1}\n', "no JSON\n"])
def test_what_is_no_journal_is_one_error_that_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / FILE).write_text(text)
    with pytest.raises(JournalError, match=r"rows\.jsonl: "):
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
