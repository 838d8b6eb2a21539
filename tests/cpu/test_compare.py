"""Verdicts on series with known truth, and what `edgellm compare` says about files: ours, NumPy's, other engines'."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edgellm_cupy.bench import statistics
from edgellm_cupy.bench.comparing import compare as comparing
from edgellm_cupy.bench.comparing import verdict
from edgellm_cupy.bench.comparing.compare import compare, markdown, parse_fail, terminal, to_json
from edgellm_cupy.bench.comparing.imports import ImportFileError
from edgellm_cupy.bench.comparing.rows import YARDSTICKS, Row, rows_of
from edgellm_cupy.bench.comparing.verdict import AMBIGUOUS, FASTER, SAME, SLOWER
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.reporting import report
from edgellm_cupy.errors import ArgumentValueError
from tests.planted import changed, slower

RESULTS = Path(__file__).parents[2] / "bench" / "results"
H200 = RESULTS / "h200" / "smollm-135m" / "report.json"
TABLE = RESULTS / "h200" / "table" / "report.json"
NUMPY = RESULTS / "numpy" / "smollm-135m" / "report.json"
ENGINES = Path(__file__).parents[1] / "data" / "engines"


@pytest.fixture(scope="module")
def h200() -> dict:
    return report.load(H200)


# ---- synthetic series -----------------------------------------------------------------------------------------------


def series(samples, pace="gpu", metric="time", **detail) -> Row:
    values = tuple(float(s) for s in samples)
    middle = float(np.median(values)) if values else None
    return Row("group", "row", "kernel", metric, "us", middle, "group/row", samples=values, pace=pace, **detail)


def run(rng, truth=1.0, n=60, noise=0.003, alike=0.5, between=0.007, trend=None, pace="gpu", positional=False) -> Row:
    """A run of something that costs `truth`: samples with AR(1) noise around a level of this run's own.

    `between` is the spread of that level: the ratio of two runs varies by sqrt(2) times it, 1 % for 0.7 %.
    """
    errors = rng.standard_normal(n)
    for i in range(1, n):
        errors[i] = alike * errors[i - 1] + math.sqrt(1 - alike**2) * errors[i]
    level = truth * (1 + between * rng.standard_normal())
    growth = 1 if trend is None else np.asarray(trend)
    return series(level * growth * (1 + noise * errors), pace=pace, positional=positional)


SHAPES = {
    "few samples of a graph": {"n": 30, "noise": 0.001},
    "ten samples": {"n": 10, "noise": 0.002},
    "autocorrelated": {"n": 256, "noise": 0.01, "alike": 0.9},
    "many": {"n": 2000, "noise": 0.015, "alike": 0.3},
    "a growing context": {"n": 256, "trend": np.linspace(0.95, 1.05, 256), "positional": True},
    "a context that crosses a step": {"n": 256, "trend": np.repeat([0.95, 1.03], 128), "positional": True},
}


def verdicts(shape, truth: float, draws: int = 200) -> Counter:
    rng = np.random.default_rng(0)
    return Counter(verdict.ratio(run(rng, **shape), run(rng, truth, **shape)).verdict for _ in range(draws))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_two_runs_of_one_thing_are_the_same(shape):
    found = verdicts(shape, 1.0)
    assert found[SAME] >= 0.95 * found.total()
    assert found[SLOWER] + found[FASTER] <= 0.03 * found.total()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(("truth", "expected"), [(1.05, SLOWER), (1 / 1.05, FASTER)])
def test_five_per_cent_are_seen(shape, truth, expected):
    found = verdicts(shape, truth)
    assert found[expected] >= 0.9 * found.total()
    assert found[SAME] <= 0.02 * found.total()


def test_a_rate_is_slower_where_it_is_lower():
    rng = np.random.default_rng(1)
    old, new = (run(rng, truth) for truth in (1.0, 1.08))
    as_rates = [replace(series(1e3 / np.array(r.samples), metric="rate"), unit="tok/s") for r in (old, new)]
    times, rates = verdict.ratio(old, new), verdict.ratio(*as_rates)
    assert times.verdict == rates.verdict == SLOWER
    assert rates.value == pytest.approx(times.value)
    assert rates.interval == pytest.approx(times.interval)
    # The tail of a rate is its low end, that of a time its high one.
    assert as_rates[0].figure("min") == pytest.approx(1e3 / old.figure("min"))


def test_the_interval_covers_the_truth():
    rng = np.random.default_rng(2)
    for shape in ({"n": 100, "alike": 0.0}, {"n": 400, "alike": 0.6}):
        hits = 0
        for _ in range(400):
            one = verdict.ratio(*(run(rng, noise=0.02, between=0.0, **shape) for _ in range(2)))
            assert one.interval
            hits += one.interval[0] <= 1 <= one.interval[1]
        assert hits >= 0.93 * 400


def test_wide_intervals_are_ambiguous():
    rng = np.random.default_rng(3)
    noisy = Counter(
        verdict.ratio(*(run(rng, n=30, noise=0.3, alike=0.0) for _ in range(2))).verdict for _ in range(200)
    )
    assert noisy[SAME] == 0
    assert noisy[AMBIGUOUS] >= 190


def test_a_drift_or_two_modes_are_not_known_well_by_many_samples():
    """Order statistics alone would give an interval of 0.1 % here."""
    rng = np.random.default_rng(4)
    steady = series(1 + 0.002 * rng.standard_normal(2000))
    modes = np.repeat([1.0, 1.0, 1.4, 1.0, 1.4, 1.4, 1.0, 1.4, 1.0, 1.0], 200) + 0.002 * rng.standard_normal(2000)
    drift = np.linspace(1.0, 1.2, 2000) + 0.002 * rng.standard_normal(2000)
    for unsteady in (modes, drift):
        found = verdict.ratio(steady, series(unsteady))
        assert found.verdict == AMBIGUOUS
        assert found.interval
        assert found.interval[1] / found.interval[0] > 1.05


def test_a_common_trend_is_taken_out_only_where_the_work_is_the_same():
    rng = np.random.default_rng(5)
    trend = np.linspace(0.8, 1.2, 256)
    rows = [run(rng, trend=trend, positional=True, n=256, between=0.0) for _ in range(2)]
    paired = verdict.ratio(*rows)
    apart = verdict.ratio(*(replace(row, positional=False) for row in rows))
    assert paired.verdict == SAME
    assert apart.verdict == AMBIGUOUS
    shorter = replace(rows[1], samples=rows[1].samples[:200])  # no longer the same work at the same place
    assert verdict.ratio(rows[0], shorter).verdict != SAME


def test_few_samples_and_none():
    five = [series([1.0, 1.001, 0.999, 1.0, 1.0005]), series([1.08, 1.081, 1.079, 1.08, 1.0805])]
    assert verdict.ratio(*five).verdict == SLOWER
    assert verdict.ratio(five[0], five[0]).verdict == SAME
    scattered = series([1.0, 1.2, 0.9, 1.1, 1.0])
    assert verdict.ratio(scattered, series(1.08 * np.array(scattered.samples))).verdict == AMBIGUOUS

    def only(value, interval=None):
        return replace(series([]), value=value, interval=interval)

    assert verdict.ratio(only(1.0), only(1.0)).verdict == AMBIGUOUS  # nothing says how well it is known
    assert verdict.ratio(only(1.0), only(1.0)).interval is None
    assert verdict.ratio(only(1.0), only(1.05)).verdict == AMBIGUOUS
    assert verdict.ratio(only(1.0), only(1.08)).verdict == SLOWER
    assert verdict.ratio(only(1.0), only(0.92)).verdict == FASTER
    assert verdict.ratio(only(1.0, (0.99, 1.01)), only(1.0, (0.99, 1.01))).verdict == SAME
    assert verdict.ratio(only(1.0, (0.9, 1.1)), only(1.0, (0.99, 1.01))).verdict == AMBIGUOUS


def test_the_margin_depends_on_the_pace_and_can_be_given():
    rng = np.random.default_rng(6)
    old, new = (run(rng, truth, n=40, between=0.0) for truth in (1.0, 1.06))
    assert verdict.ratio(old, new).verdict == SLOWER
    assert verdict.ratio(replace(old, pace="host"), replace(new, pace="host")).verdict == SAME
    assert verdict.ratio(old, new, margin=0.10).verdict == SAME
    assert verdict.ratio(old, new, margin=0.055).verdict == SLOWER


def test_scatter_does_not_change_the_pace():
    rng = np.random.default_rng(10)
    steady, shaky = run(rng, n=200), run(rng, n=200, noise=0.05)
    assert verdict.pace_of(steady, shaky) == "gpu"
    assert verdict.pace_of(steady, replace(steady, pace="host")) == "host"
    assert verdict.pace_of(replace(steady, pace="server"), steady) == "server"
    one, other = (replace(shaky, pace="board", facts={"board": uuid}) for uuid in ("GPU-1", "GPU-2"))
    assert verdict.pace_of(one, one) == "board"
    assert verdict.pace_of(one, other) == verdict.pace_of(one, replace(one, facts={})) == "boards"
    # What differs between the positions of a run is the work, where both runs have it.
    pattern = np.tile([1.0, 1.2, 0.9, 1.1], 50)
    same = [run(rng, n=200, trend=pattern, positional=True) for _ in range(2)]
    assert verdict.ratio(*same).verdict == SAME


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.05, 0.2])
@pytest.mark.parametrize("n", [5, 60])
def test_a_slowdown_does_not_hide_behind_the_scatter_it_adds(n, noise):
    rng = np.random.default_rng(11)
    found = Counter(
        verdict.ratio(run(rng, n=n, noise=0.001, alike=0.0), run(rng, 1.3, n=n, noise=noise, alike=0.0)).verdict
        for _ in range(100)
    )
    assert not found[SAME]
    if noise < 0.1:
        assert found[SLOWER] >= 90


def test_throttling_is_no_regression():
    old, new = series(np.full(30, 1.0)), series(np.full(30, 1.2))
    assert verdict.ratio(old, new).verdict == SLOWER
    assert verdict.ratio(old, replace(new, throttled=True)).verdict == AMBIGUOUS
    assert verdict.ratio(replace(old, throttled=True), new).verdict == SLOWER  # it would have been faster still
    assert verdict.ratio(replace(new, throttled=True), old).verdict == AMBIGUOUS


def test_the_host_is_compared_by_its_fastest_tenth():
    """Other work on the host slows half of the calls of one run, and none of the other's."""
    rng = np.random.default_rng(7)
    quiet, busy = (1 + 0.01 * np.abs(rng.standard_normal(500)) for _ in range(2))
    busy[rng.random(500) < 0.6] *= 1.5
    old, new = series(quiet, pace="host"), series(busy, pace="host")
    metric = verdict.default_metric(old, new)
    assert metric == "p10"
    assert verdict.ratio(old, new, metric).verdict == SAME
    assert new.value / old.value > 1.4
    slower = series(1.6 * busy, pace="host")
    assert verdict.ratio(old, slower, metric).verdict == SLOWER
    assert verdict.default_metric(old, replace(new, samples=new.samples[:20])) == "median"


@pytest.mark.parametrize("metric", ["mean", "min", "max", "p10", "p90", "p95", "p99"])
def test_every_metric(metric):
    rng = np.random.default_rng(8)
    old = series(rng.lognormal(0, 0.02, 1500))
    expected = {"mean": np.mean, "min": np.min, "max": np.max}.get(
        metric, lambda values: np.percentile(values, float(metric[1:]))
    )(old.samples)
    assert old.figure(metric) == pytest.approx(expected)
    assert verdict.ratio(old, series(1.6 * np.array(old.samples)), metric).verdict == SLOWER
    assert verdict.ratio(old, old, metric).value == 1


def test_a_tail_of_few_samples_is_no_figure():
    assert series(np.ones(999)).figure("p99") is None
    assert series(np.ones(1000)).figure("p99") == 1
    assert series([]).figure("mean") is None
    with pytest.raises(ValueError, match="p99 is None"):
        verdict.ratio(series(np.ones(99)), series(np.ones(99)), "p99")


def test_geometric_mean():
    mean, interval = verdict.geometric_mean([1.1, 1 / 1.1])
    assert mean == pytest.approx(1)
    assert interval is None
    ratios = list(np.random.default_rng(9).lognormal(math.log(1.1), 0.05, 200))
    mean, interval = verdict.geometric_mean(ratios)
    assert mean == pytest.approx(math.exp(np.mean(np.log(ratios))))
    assert interval
    half = 1.96 * np.std(np.log(ratios)) / math.sqrt(200)
    assert np.log(interval) == pytest.approx([math.log(mean) - half, math.log(mean) + half], abs=0.15 * half)
    assert verdict.geometric_mean(ratios) == (mean, interval)  # seeded


# ---- rows of reports ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*/report.json")), ids=lambda p: f"{p.parts[-3]}-{p.parts[-2]}")
def test_every_row_of_a_report_has_a_name_of_its_own(path):
    rows = rows_of(report.load(path))
    assert rows
    assert len({(row.group, row.name) for row in rows}) == len(rows)
    assert len({(row.match, row.boundary) for row in rows}) == len(rows)
    for row in rows:
        assert row.unit
        assert (row.value is None) == (row.reason is not None)
        assert row.interval is None or row.value is None or row.interval[0] <= row.value <= row.interval[1]
        if row.samples and row.metric != "rate":
            assert np.median(row.samples) == pytest.approx(row.value, rel=1e-4)


def test_rows_of_a_whole_report(h200):
    rows = {(row.group, row.name): row for row in rows_of(h200)}
    groups = Counter(group for group, _ in rows)
    products = h200["parts"]["latency"]["products"]
    count = sum(len(product["rows"]) for product in products.values())
    for group in ("kernel cold", "kernel warm", "device", "end_to_end"):
        assert groups[group] == count
    assert groups[YARDSTICKS] == 10 * len(products) + 1
    assert all(row.yardstick == (row.group == YARDSTICKS) for row in rows.values())

    cold = rows["kernel cold", "qkv rmsnorm+matmul int8"]
    source = products["qkv"]["rows"][0]["kernel"]["cold"]
    assert (cold.value, cold.samples) == (source["median"]["value"], tuple(source["samples"]))
    assert (cold.boundary, cold.pace, cold.unit) == ("kernel", "gpu", "us")
    assert rows["device", "qkv rmsnorm+matmul int8"].pace == "host"

    tokens = h200["parts"]["tokens"]
    assert rows["tokens", "pp512"].value == tokens["prompts"][1]["tok_s"]["value"]
    assert rows["tokens", "tg128"].value == tokens["throughput_tok_s"]["value"]
    assert {row.boundary for row in rows.values() if row.group in ("tokens", "depth", "cpu")} == {"engine"}
    deep = rows["depth", "tg256 @ d4096"]
    assert (deep.match, deep.unit, deep.facts["kv_type"]) == ("tg @ d4096", "tok/s", "float16")
    assert rows["tokens", "tg batch 8"].facts["batch"] == 8
    assert rows["energy", "token gross"].value == h200["parts"]["power"]["energy_per_token_j"]["value"]
    assert rows["energy", "qkv gross"].interval


def test_numpy_has_no_rows_for_what_it_never_measures():
    rows = rows_of(report.load(NUMPY))
    assert rows
    assert not [row for row in rows if row.group.startswith("kernel") or row.group == "transfer"]


def test_a_part_that_failed_or_did_not_run_has_no_rows(h200):
    parts = {name: h200["parts"][name] for name in ("hardware", "tokens")}
    assert {row.group for row in rows_of({**h200, "parts": parts})} == {"tokens"}
    nothing = {"value": None, "reason": "interrupted"}
    parts["tokens"] = {**parts["tokens"], "batches": nothing, "prompts": [nothing, *parts["tokens"]["prompts"]]}
    rows = rows_of({**h200, "parts": parts})
    assert not [row for row in rows if "batch" in row.name]
    assert [row.name for row in rows if row.name.startswith("pp")] == ["pp128", "pp512"]


def test_numpy_is_paced_by_the_host():
    assert {row.pace for row in rows_of(report.load(NUMPY))} == {"host"}


def test_a_prompt_is_paced_by_the_host_while_its_launches_take_as_long(h200):
    paces = {row.name: row.pace for row in rows_of(h200) if row.name.startswith("pp")}
    assert paces.pop("pp512 @ d16384") == "gpu"
    assert len(paces) == 5
    assert set(paces.values()) == {"host"}


def test_rows_of_a_server(h200):
    """Its client's and its own clock are two boundaries of one name; see :mod:`edgellm_cupy.bench.serving.server`."""
    latency, unknown = statistics.summarise([8.0, 8.1, 7.9], "ms"), missing("no usage", "ms")
    rate = measured(125.0, "tok/s", ci95=None)
    part = {
        "boundary": "client",
        "model": "some-model",
        "weights": {"bytes": measured(1000, "bytes"), "quantisation": missing("not told")},
        "plan": {"concurrency": 2, "prompt_tokens": 512, "max_tokens": 64},
        "rows": [
            {"name": name, "boundary": boundary, "latency": latency, "tok_s": rate}
            for boundary in ("client", "server")
            for name in ("pp512", "tg64")
        ],
        "time_to_first_token": latency,
        "inter_token": unknown,
        "throughput": {"output_tok_s": measured(200.0, "tok/s")},
        "requests": [{"error": "no answer"}]
        + [
            {"completion_tokens": measured(64), "first_token_ms": measured(50 + i), "first_to_last_ms": measured(450)}
            for i in range(20)
        ],
    }
    rows = rows_of({**h200, "parts": {"server": part}})
    found = [(row.name, row.boundary, row.value) for row in rows]
    assert found == [
        ("tg64", "client", 125.0),
        ("pp512", "server", 125.0),
        ("tg64", "server", 125.0),
        ("ttft", "client", 8.0),
        ("inter-token latency", "client", None),
        ("output throughput", "client", 200.0),
    ]
    assert rows[0].samples == pytest.approx([1e3 / ms for ms in latency["samples"]])
    work = {"prompt_tokens": 512, "output_tokens": 64, "concurrency": 2}
    assert rows[0].facts == {"model": "some-model", "weight_bytes": 1000, **work}
    assert {row.pace for row in rows} == {"server"}
    assert rows[4].reason == "no usage"
    low, high = rows[5].interval
    assert 190 < low < 200 < high < 210
    assert high - low == pytest.approx(200 * 9 / 509, rel=0.15)  # the median of 20 lies between the 6th and the 15th


# ---- files ----------------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, document) -> Path:
    path = folder / name / "report.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def with_parts(document, parts, **other):
    return {**document, "parts": {**document["parts"], **parts}, **other}


def shown(comparison, **options) -> str:
    text = io.StringIO()
    Console(width=80, no_color=True, file=text).print(terminal(comparison, **options))
    return text.getvalue()


def test_a_report_against_itself(h200):
    comparison = compare([H200.parent, H200], fail="median:5%")
    [other] = comparison.others
    assert comparison.exit_code == 0
    assert not other.differences
    assert not other.only_old
    assert not other.only_new
    assert other.mean
    assert other.mean.value == 1
    assert other.mean.interval == (1, 1)
    counts = other.counts()
    assert set(counts) <= {SAME, AMBIGUOUS}
    assert counts[SAME] > 0.9 * counts.total()


@pytest.mark.parametrize("seed", range(2))
def test_two_runs_and_a_planted_slowdown_of_real_reports(h200, tmp_path, seed):
    rng = np.random.default_rng(seed)
    again, worse = (
        written(tmp_path, name, slower(h200, cost, rng=rng)) for name, cost in (("again", 1.0), ("worse", 1.05))
    )
    same, slow = compare([H200, again, worse]).others
    found = same.counts("gpu")
    assert found[SAME] >= 0.95 * found.total()
    assert found[SLOWER] + found[FASTER] == 0
    found = slow.counts("gpu")
    assert found[SLOWER] >= 0.9 * found.total()
    assert not found[FASTER]
    assert slow.mean
    assert slow.mean.value == pytest.approx(1.05, abs=0.005)


def test_fail(h200, tmp_path):
    bad = written(tmp_path, "bad", slower(h200, 1.08, ["scaling"]))
    comparison = compare([H200, bad], fail="median:5%")
    assert comparison.exit_code == 1
    failed = comparison.others[0].failed
    assert sum(name.startswith("depth: tg256 @ d") for name in failed) == 7
    assert [name for name in failed if "tg256" not in name] == ["depth: pp512 @ d16384"]  # which the GPU paces
    assert f"median:5%: {len(failed)} failed: depth: " in " ".join(shown(comparison).split())
    assert compare([H200, bad], fail="median:10%").exit_code == 0
    assert compare([H200, bad]).exit_code == 0  # without a rule nothing fails
    assert compare([bad, H200], fail="median:5%").exit_code == 0  # faster


def test_a_yardstick_never_fails(h200, tmp_path):
    document = copy.deepcopy(h200)
    for product in document["parts"]["latency"]["products"].values():
        product["baselines"] = changed(product["baselines"], 1.5)
    comparison = compare([H200, written(tmp_path, "cublas", document)], fail="median:5%")
    [other] = comparison.others
    assert comparison.exit_code == 0
    assert other.mean
    assert other.mean.value == 1
    assert list(other.groups)[-1] == YARDSTICKS
    assert Counter(row.ratio.verdict for row in other.groups[YARDSTICKS])[SLOWER] == 8 * 4


def test_a_wrong_result_has_no_speed_and_fails(h200, tmp_path):
    document = copy.deepcopy(h200)
    row = document["parts"]["latency"]["products"]["qkv"]["rows"][0]
    row["correct"] = False
    row["kernel"]["cold"] = {"value": None, "unit": "us", "reason": "wrong result: y[3] is 7, expected 1"}
    wrong = written(tmp_path, "wrong", document)
    comparison = compare([H200, wrong], fail="median:5%")
    assert comparison.exit_code == 1
    assert comparison.others[0].failed == ["kernel cold: qkv rmsnorm+matmul int8 (wrong result)"]
    assert "wrong result: y[3] is 7, expected 1" in " ".join(shown(comparison).split())
    assert compare([wrong, H200], fail="median:5%").exit_code == 0  # mended


def test_a_wrong_result_fails_by_every_metric(h200, tmp_path):
    """Also where the baseline has too few samples for the metric."""
    document = copy.deepcopy(h200)
    row = document["parts"]["latency"]["products"]["qkv"]["rows"][0]
    row["kernel"]["cold"] = {"value": None, "unit": "us", "reason": "wrong result: y[3] is 7, expected 1"}
    comparison = compare([H200, written(tmp_path, "wrong", document)], fail="p99:5%")
    assert comparison.exit_code == 1
    assert comparison.others[0].failed == ["kernel cold: qkv rmsnorm+matmul int8 (wrong result)"]


def without(document, *parts, **other):
    return {**document, "parts": {k: v for k, v in document["parts"].items() if k not in parts}, **other}


def test_a_wrong_decoder_or_a_part_that_crashed_fails(h200, tmp_path):
    def outcome(name, *parts, **other):
        comparison = compare([H200, written(tmp_path, name, without(h200, *parts, **other))], fail="median:5%")
        assert comparison.exit_code == bool(comparison.others[0].failed)
        return comparison.others[0].failed

    def error(reason):
        return {"reason": reason, "traceback": ""}

    decoding = ("tokens", "scaling", "power", "cpu")
    doubt = {part: error("not measured: a result was wrong") for part in decoding}
    failed = outcome("wrong", *decoding, failures=["decoder: logits lie 0.7 away"], errors=doubt)
    assert failed[0] == "wrong result: decoder: logits lie 0.7 away"
    assert [line.partition(":")[0] for line in failed[1:]] == list(decoding)
    assert outcome("check", errors={"decoder_check": error("out of memory")}) == ["decoder_check: out of memory"]
    assert outcome("part", "transfer", errors={"transfer": error("it crashed")}) == [
        "transfer: 16 rows missing: it crashed"
    ]
    tokens = copy.deepcopy(h200["parts"]["tokens"])
    tokens["batches"] = [{"value": None, "reason": "it crashed"}, *tokens["batches"][1:]]
    crashed = with_parts(h200, {"tokens": tokens}, errors={"tokens/batch 1": error("it crashed")})
    comparison = compare([H200, written(tmp_path, "row", crashed)], fail="median:5%")
    assert comparison.others[0].failed == ["tokens: 1 row missing: it crashed"]
    assert "1 failed: tokens: 1 row missing: it crashed" in " ".join(shown(comparison).split())
    assert outcome("not run", "transfer") == []  # left out by whom started it
    both = written(
        tmp_path, "both", without(h200, "transfer", failures=["x"], errors={"transfer": error("it crashed")})
    )
    assert compare([both, both], fail="median:5%").exit_code == 0  # nothing new


def test_rows_over_the_limit_that_are_not_decided_are_counted(h200, tmp_path):
    worse = written(tmp_path, "worse", slower(h200, 1.08, ["transfer"]))
    comparison = compare([H200, worse], fail="median:5%")
    assert comparison.exit_code == 0
    said = "median:5%: no row fails 16 rows are over 5 %, but no more than two runs of one thing may differ by"
    assert said in " ".join(shown(comparison).split())
    assert said.partition(" rows are ")[2] in markdown(comparison)
    assert sum(row["undecided"] for row in to_json(comparison)["others"][0]["rows"]) == 16
    assert "are over" not in shown(compare([H200, worse], fail="median:9%"))


def test_a_throttled_row_is_marked_and_does_not_fail(h200, tmp_path):
    document = slower(h200, 1.3, ["scaling"])
    document["parts"]["scaling"]["conditions"]["throttled"] = {"value": True}
    comparison = compare([H200, written(tmp_path, "hot", document)], fail="median:5%")
    assert comparison.exit_code == 0
    depth = comparison.others[0].groups["depth"]
    assert {row.ratio.verdict for row in depth if row.ratio.pace == "gpu"} == {AMBIGUOUS}
    assert not [row for row in depth if row.ratio.verdict == SLOWER]
    assert "throttled" in markdown(comparison)


def test_numpy_against_cuda():
    comparison = compare([NUMPY, H200])
    [other] = comparison.others
    assert ("backend", "numpy", "cuda") in other.differences
    assert {row.old.match for row in other.judged} >= {"pp128", "tg @ d1024"}
    assert other.only_new
    assert "No GPU was measured" in shown(comparison)


def test_the_table_of_shapes_and_a_report_have_nothing_in_common():
    with pytest.raises(comparing.CompareError, match="has no row that"):
        compare([TABLE, ENGINES / "llama-bench.json"])
    assert compare([TABLE, TABLE]).others[0].mean.n > 500


# ---- other engines and boundaries -----------------------------------------------------------------------------------


def test_llama_bench_matches_by_name(h200):
    comparison = compare([H200, ENGINES / "llama-bench.json"])
    [other] = comparison.others
    assert {row.old.match for row in other.judged} == {"pp512", "tg128", "tg @ d4096", "tg @ d16384"}
    assert [row.name for row in other.only_new] == ["pp512+tg128"]
    facts = other.judged[0].facts
    assert facts["weight_bits"] == (2, 3.49)
    assert "kv_type" not in facts
    assert "weight_bits: 2 -> 3.49 (4 rows)" in shown(comparison)
    [tg] = [row for row in other.judged if row.old.match == "tg128"]
    assert tg.ratio.value == pytest.approx(tg.old.value / tg.new.value)
    assert tg.ratio.verdict == SLOWER


def test_a_server_that_takes_twice_as_long_fails(tmp_path):
    """Medians alone: no samples, so no interval."""
    values = json.loads((ENGINES / "vllm-serve.json").read_text())
    values = {key: value for key, value in values.items() if key not in ("ttfts", "itls")}
    worse = {key: 2 * value if key.startswith("median") else value for key, value in values.items()}
    paths = [tmp_path / "fast.json", tmp_path / "slow.json"]
    for path, of in zip(paths, (values, worse), strict=True):
        path.write_text(json.dumps(of))
    comparison = compare(paths, fail="median:5%")
    assert comparison.others[0].failed == ["server: ttft", "server: tg32", "server: inter-token latency"]


def a_client(tmp_path: Path) -> Path:
    """vLLM's client, 128 tokens a request: the same name as an engine's row, another boundary."""
    values = json.loads((ENGINES / "vllm-serve.json").read_text())
    values["total_output_tokens"] = 128 * values["completed"]
    path = tmp_path / "serve.json"
    path.write_text(json.dumps(values))
    return path


def test_boundaries_are_refused_and_can_be_forced(tmp_path):
    paths = [ENGINES / "llama-bench.json", a_client(tmp_path)]
    [other] = compare(paths, fail="median:1%").others
    assert not other.judged
    assert other.mean is None
    [refused] = other.refused
    assert (refused.old.name, refused.reason) == ("tg128", "boundary engine against client")
    assert "boundary engine against client" in shown(compare(paths))
    assert "median:1%: no row was compared" in shown(compare(paths, fail="median:1%"))

    forced = compare(paths, fail="median:1%", force=True)
    [row] = forced.others[0].judged
    assert row.forced
    assert row.ratio.verdict == SLOWER
    assert row.ratio.value > 2
    assert forced.exit_code == 0
    assert forced.others[0].mean is None
    assert "engine against client" in shown(forced).replace("\n", " ")
    assert "engine against client" in markdown(forced)


def test_a_boundary_of_its_own_comes_first(tmp_path):
    """A row with a partner in its own boundary is not compared across, forced or not."""
    client = a_client(tmp_path)
    [other] = compare([client, client], force=True).others
    assert not any(row.forced for row in other.judged)
    assert len(other.judged) == 4


def test_vllm_against_itself(tmp_path):
    for name in ("vllm-serve.json", "vllm-serve-appended.json", "vllm-latency.json"):
        [other] = compare([ENGINES / name, ENGINES / name]).others
        assert {row.ratio.value for row in other.judged} == {1.0}
        assert not other.refused


def test_requests_of_other_lengths_are_refused_and_can_be_forced(tmp_path):
    values = json.loads((ENGINES / "vllm-serve.json").read_text())
    long = tmp_path / "long.json"
    long.write_text(json.dumps({**values, "total_input_tokens": 2 * values["total_input_tokens"]}))
    paths = [ENGINES / "vllm-serve.json", long]
    comparison = compare(paths, fail="median:5%")
    assert {refused.reason for refused in comparison.others[0].refused} == {"prompt_tokens 512 against 1024"}
    assert "prompt_tokens 512 against 1024" in " ".join(shown(comparison).split())
    forced = compare(paths, force=True)
    assert len(forced.others[0].judged) == 4
    assert forced.others[0].mean is None
    long.write_text(json.dumps({**values, "total_input_tokens": values["total_input_tokens"] + values["completed"]}))
    assert len(compare(paths).others[0].judged) == 4  # a mean that lies one token away


# ---- options --------------------------------------------------------------------------------------------------------


def benches(path: Path, *options: dict) -> Path:
    """A file of llama-bench: one test, once for each of `options`, at a speed of its number of threads."""
    line = (ENGINES / "llama-bench.jsonl").read_text().splitlines()[0]
    tests = [{**json.loads(line), **changed} for changed in options]
    for test in tests:
        test |= {"avg_ts": 10.0 * test["n_threads"], "samples_ts": [10.0 * test["n_threads"]] * 5}
    path.write_text(json.dumps(tests))
    return path


def test_several_rows_of_one_name_are_told_apart_by_what_differs_in_either_file(tmp_path):
    eight = benches(tmp_path / "8.json", {"n_threads": 8})
    sweep = benches(tmp_path / "sweep.json", {"n_threads": 4}, {"n_threads": 8}, {"n_threads": 16})
    less = benches(tmp_path / "less.json", {"n_threads": 16, "poll": 0}, {"n_threads": 8, "poll": 0})
    for paths, pairs in (((eight, sweep), 1), ((sweep, eight), 1), ((sweep, less), 2)):
        [other] = compare(paths).others
        assert [row.ratio.value for row in other.judged] == [1.0] * pairs
    one = benches(tmp_path / "one.json", {"n_threads": 4})
    [row] = compare([one, eight]).others[0].judged  # one test each: the option may be what is compared
    assert row.ratio.value == pytest.approx(0.5)
    with pytest.raises(comparing.CompareError, match="has no row that"):
        compare([one, less])


def test_rows_that_nothing_tells_apart_are_refused(tmp_path):
    twice = benches(tmp_path / "twice.json", {}, {})
    for paths in ((twice, ENGINES / "llama-bench.json"), (ENGINES / "llama-bench.json", twice)):
        with pytest.raises(comparing.CompareError, match=r"twice\.json: has tokens: tg128 more than once"):
            compare(paths)


# ---- arguments ------------------------------------------------------------------------------------------------------


def test_the_rule():
    assert parse_fail("median:5%") == comparing.Fail("median", 0.05)
    assert parse_fail("p99:2.5%") == comparing.Fail("p99", 0.025)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5%", "names no metric"),
        ("median", "names no metric"),
        ("median:5", "the amount is '5'"),
        ("median:-5%", "the amount is '-5%'"),
        ("median:%", "the amount is '%'"),
        ("p42:5%", "the metric is 'p42'"),
        ("", "names no metric"),
    ],
)
def test_no_rule(text, said):
    with pytest.raises(comparing.FailRuleError, match=r"^fail is ") as error:
        parse_fail(text)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ArgumentValueError, match="1 file to compare"):
        compare([H200])
    with pytest.raises(ArgumentValueError, match="metric is 'p42'"):
        compare([H200, H200], metric="p42")
    with pytest.raises(ArgumentValueError, match="expected the same metric"):
        compare([H200, H200], metric="mean", fail="p99:5%")
    for margin in (0, 1.5, -0.1):
        with pytest.raises(ArgumentValueError, match="margin is "):
            compare([H200, H200], margin=margin)
    with pytest.raises(ImportFileError, match=r"none/report.json: cannot be read|none: cannot be read"):
        compare([H200, tmp_path / "none"])
    newer = written(tmp_path, "newer", {**json.loads(H200.read_text()), "schema_version": "2.0.0"})
    with pytest.raises(report.ReportError, match=r"2\.0\.0"):
        compare([H200, newer])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tokens: tokens["prompts"][0].update(tok_s=missing("none")) or tokens["prompts"][0]["latency"][
            "median"].update(value=0.0, ci95=[1.0, 0.0]),
        lambda tokens: tokens["throughput_tok_s"].update(ci95=[1.0]),
        lambda tokens: tokens["token_latency"].update(samples=["x"]),
        lambda tokens: tokens.update(batches=[{}]),
    ],
    ids=["a median of zero", "an interval of one end", "samples of text", "a row without keys"],
)  # fmt: skip
def test_a_spoilt_report_is_one_line(h200, tmp_path, spoil):
    document = copy.deepcopy(h200)
    spoil(document["parts"]["tokens"])
    with pytest.raises(report.ReportError, match=r"spoilt/report\.json: not as edgellm writes it: \w+Error") as error:
        compare([H200, written(tmp_path, "spoilt", document)])
    assert "\n" not in str(error.value)


def test_a_report_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(NUMPY.read_text()), daemon=True)
    writer.start()
    assert compare([pipe, NUMPY]).others[0].mean.value == 1


def test_margin_and_metric_are_used(h200, tmp_path):
    worse = written(tmp_path, "worse", slower(h200, 1.06, ["scaling"]))
    [strict], [lax] = (compare([H200, worse], margin=margin).others for margin in (0.025, 0.10))
    assert {row.ratio.verdict for row in strict.groups["depth"] if row.ratio.pace == "gpu"} == {SLOWER}
    assert {row.ratio.verdict for row in lax.groups["depth"] if row.ratio.pace == "gpu"} == {SAME}
    [p99] = compare([H200, H200], fail="p99:5%").others
    assert {row.metric for row in p99.judged} == {"p99"}
    assert all(len(row.old.samples) >= 1000 for row in p99.judged)
    assert [r for r in p99.refused if r.reason == "baseline: too few samples for p99"]


# ---- texts ----------------------------------------------------------------------------------------------------------

_SECTIONS = ("Environment", "Not compared", "What differs between compared rows", "Rows", "Geometric mean")


@pytest.mark.parametrize("every_row", [False, True])
def test_terminal_fits_and_keeps_its_order(h200, tmp_path, every_row):
    document = slower(h200, 1.2, ["latency"])
    del document["parts"]["transfer"]
    document["environment"]["driver_version"] = {"value": "999.1 [brackets are no markup]"}
    document["parts"]["hardware"]["driver_version"] = document["environment"]["driver_version"]
    document["model"]["decoder"]["kv_cache"] = "int8"
    comparison = compare([H200, written(tmp_path, "other", document), H200], fail="median:5%")
    text = shown(comparison, every_row=every_row)
    assert max(map(len, text.splitlines())) <= 80
    first = text[: text.index("\nA  ", 5)]
    places = [first.index(f"\n{section}") for section in _SECTIONS]
    assert places == sorted(places)
    assert first.index("median:5%:") > places[-1]
    assert "[brackets are no markup]" in first
    assert "kv_type: float16 -> int8" in first
    assert "16 only in A" in first
    assert ("transfer h2d 4 bytes device" in " ".join(first.split())) == every_row
    assert ("tg batch 8" in first) == every_row  # a row that is the same
    document = markdown(comparison)
    places = [document.index(f"\n## {section}") for section in _SECTIONS]
    assert places == sorted(places)
    assert document.count("# edgellm compare") >= 2


def test_rows_are_sorted_worst_first(h200, tmp_path):
    parts = copy.deepcopy(h200["parts"])
    parts["scaling"]["rows"][2] = changed(parts["scaling"]["rows"][2], 1.4)
    parts["scaling"]["rows"][4] = changed(parts["scaling"]["rows"][4], 1.2)
    parts["tokens"]["batches"][0] = changed(parts["tokens"]["batches"][0], 1.1)
    [other] = compare([H200, written(tmp_path, "other", with_parts(h200, parts))]).others
    assert list(other.groups)[:2] == ["depth", "tokens"]
    ratios = [row.ratio.value for row in other.groups["depth"]]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[:2] == pytest.approx([1.4, 1.2])
    assert other.means["depth"].value == pytest.approx((1.4 * 1.2) ** (1 / len(ratios)))


def test_json(h200, tmp_path):
    worse = written(tmp_path, "worse", slower(h200, 1.2, ["scaling"]))
    comparison = compare([H200, worse], fail="median:5%")
    document = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert document["exit_code"] == 1
    assert document["fail"] == {"metric": "median", "by": 0.05}
    [other] = document["others"]
    assert other["failed"]
    assert len(other["rows"]) == len(comparison.others[0].judged)
    [row] = [row for row in other["rows"] if row["name"] == "tg256 @ d4096"]
    assert row["cost_ratio"] == pytest.approx(1.2)
    assert row["verdict"] == SLOWER
    assert row["fails"]
    assert row["old"]["value"] / row["new"]["value"] == pytest.approx(1.2)
    assert row["interval"][0] <= row["cost_ratio"] <= row["interval"][1]
