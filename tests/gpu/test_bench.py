"""The benchmark on a real GPU: everything is measured or says why not, and nothing wrong gets a speed."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.arguments import BFLOAT16
from edgellm_cupy.bench import suite, timing, tune
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.parts import latency, table
from edgellm_cupy.bench.parts.shapes import Shape
from edgellm_cupy.bench.reporting import report, table_figures
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import count_launches
from edgellm_cupy.tuning import dispatch, floor_spec, tuned
from edgellm_cupy.tuning.device import current_facts

pytestmark = pytest.mark.gpu

# Few layers, but matrices that are large enough for a cold rotation of some hundred copies.
CONFIG = ec.ModelConfig("small", 2, 1024, 2048, 16, 4, 64, 4000)
SHORT = timing.StopRule(relative_error=0.05, min_samples=6, min_seconds=0.0, max_seconds=0.05)

# What may be null in a quick run: tails of few samples, absent tools, clocks that tell nothing, boards that do not say.
MAY_BE_NULL = {
    r"p9\d_token_latency_ms": r"\d+ samples put \d+ beyond p9\d, fewer than 10",
    r"n?[vg]cc_version": r"no n?[vg]cc on the PATH",
    r"clock_locking": r"the SM clock ",
    r"host_sync_calls_per_token": r"the device was done before",
    r"throughput_degradation_slope_pct_per_1k": r"the fitted time at 1k",
    r"energy_per_token_j": r"(\d+ steps of the energy counter|the energy counter did not step|nvmlDeviceGet)",
    r"(power_limit_w|avg_power_w|peak_power_w|gpu_utilization_pct|persistence_mode)": r"nvmlDeviceGet",
}


@pytest.fixture
def ctx(monkeypatch):
    monkeypatch.setattr(timing, "QUICK", SHORT)
    monkeypatch.setattr(latency, "BANDWIDTH_BYTES", 1 << 28)
    return Context(Checkpoint.random(CONFIG), None, quick=True)


def test_a_quick_run_measures_everything_or_says_why_not(ctx):
    result = suite.run(ctx)
    assert result["errors"] == {}
    assert result["failures"] == []
    assert suite.exit_code(result) == 0
    assert result["decoder_check"]["value"] <= result["decoder_check"]["bound"]
    for key, figure in result["summary"].items():
        if figure["value"] is None:
            allowed = [reason for name, reason in MAY_BE_NULL.items() if re.fullmatch(name, key)]
            assert any(re.match(reason, figure["reason"]) for reason in allowed), (key, figure["reason"])
    assert report.markdown(result)

    figures = result["parts"]["latency"]
    assert figures["bandwidth"]["value"] > 0
    for product in figures["products"].values():
        cold, warm = product["floor"]["cold"], product["floor"]["warm"]
        assert cold["launches_per_sample"] == warm["launches_per_sample"]
        assert cold["bytes_touched"] > 3 * cold["l2_bytes"]
        for row in product["rows"]:
            assert row["correct"]
            assert row["gb_per_s"]["value"] > 0
    tokens, scaling = result["parts"]["tokens"], result["parts"]["scaling"]
    assert [row["batch"] for row in tokens["batches"]] == [1, 4]
    assert tokens["batches"][1]["tok_s"]["value"] > tokens["batches"][0]["tok_s"]["value"]
    assert all(row["latency"]["median"]["value"] > 0 for row in tokens["sampling"])
    assert scaling["time_16k_over_0"]["value"] > 0.9
    ablated = result["parts"]["kernels"]["where_the_time_goes"]
    kinds = {row["kind"]: row for row in ablated["kernels"]}
    assert set(CONFIG.products()) < set(kinds)
    launches = sum(row["launches_per_token"] for row in kinds.values())
    assert launches == result["summary"]["kernels_per_token"]["value"]
    assert 0 < ablated["sum_us"]["value"] < 2 * ablated["token_us"]["value"]
    for kind in (*CONFIG.products(), "lm_head"):
        assert kinds[kind]["time_us"]["value"] > 0
        assert kinds[kind]["floor_us"]["value"] > 0
    assert any(kind.startswith("attention") and row["floor_us"]["value"] for kind, row in kinds.items())
    for row in result["parts"]["kernels"]["kernels"]:
        assert row["launches_per_token"] > 0
        assert 0 < row["occupancy_pct"] <= 100

    # The same keys, whatever the backend.
    host = suite.run(
        Context(
            Checkpoint.random(replace(CONFIG, hidden_size=64, intermediate_size=64, num_heads=1, num_kv_heads=1)),
            "host",
            quick=True,
        )
    )
    assert {name: list(part) for name, part in host["parts"].items()} == {
        name: list(part) for name, part in result["parts"].items()
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_decoder_that_was_asked_for_is_measured(dtype):
    options = {"activation": "float", "dtype": dtype, "head": "int8", "kv_dtype": "int8"}
    result = suite.run(Context(Checkpoint.random(CONFIG), None, quick=True, **options), ["tokens"])
    assert result["failures"] == []
    assert result["errors"] == {}
    assert result["model"]["decoder"] == {"activation": "float", "dtype": dtype, "head": "int8", "kv_cache": "int8"}
    assert "int8 keys and values" in result["summary"]["quantization"]["value"]


def test_of_a_large_model_the_first_layers_are_checked(ctx, monkeypatch):
    ctx.checkpoint = Checkpoint.random(replace(CONFIG, num_layers=3))
    monkeypatch.setattr(suite, "_REFERENCE_WEIGHTS", 1)
    figure = suite.check_decoder(ctx)
    assert figure["layers"] == "the first 2 of 3"
    assert figure["value"] <= figure["bound"]


def test_a_wrong_operation_has_no_speed(ctx, monkeypatch):
    right = ec.rmsnorm_ternary_matmul
    monkeypatch.setattr(ec, "rmsnorm_ternary_matmul", lambda *args, **options: right(*args, **{**options, "eps": 9.0}))
    figures = latency.run(ctx, {"qkv": CONFIG.products()["qkv"]})
    fused, products = [], []
    for row in figures["products"]["qkv"]["rows"]:
        (fused if row["op"] == "rmsnorm_ternary_matmul" else products).append(row)
    for row in fused:
        assert not row["correct"]
        for figure in (
            *row["kernel"].values(),
            row["device"],
            row["end_to_end"],
            row["gb_per_s"],
            row["bandwidth_pct"],
        ):
            assert figure["value"] is None
            assert figure["reason"].startswith("wrong result: ")
    assert all(row["correct"] and row["device"]["n"] for row in products)
    assert ctx.failures
    assert all(failure.startswith("qkv: rmsnorm_ternary_matmul, ") for failure in ctx.failures)


def test_a_floor_that_skips_bytes_is_a_failure(ctx, monkeypatch):
    import cupy as cp

    monkeypatch.setattr(
        latency, "floor_spec", lambda threads, check=False: floor_spec(threads)
    )  # leaves the sink as it is
    data = cp.asarray(np.arange(1, 4097, dtype=np.uint32))
    series = latency.measure_floor(ctx, [data], "warm", SHORT)
    assert series["value"] is None
    assert "exclusive or" in series["reason"]
    assert len(ctx.failures) == 1


def test_the_table_of_shapes_measures_every_line(ctx, monkeypatch):
    monkeypatch.setattr(table, "TABLE", (Shape("2B4T", "qkv", 1000, 2048), Shape("SmolLM", "down", 576, 1536)))
    ctx.tokens = (1, 3, 16, 300)
    result = suite.run(ctx, ["latency"])
    assert result["errors"] == {}
    assert result["failures"] == []
    found = list(table_figures.lines(result["parts"]["latency"]["table"]))
    assert len(found) == 2 * 4 * 2
    for line in found:
        assert line["row"]["correct"]
        assert (line["alone"] is not None) == (line["n"] == 1)
        assert (line["over_better"] is not None) == (line["n"] in table.STRATEGY_TOKENS)
        ours = [line[key] for key in ("time", "floor", "ratio", "gb_per_s", "bandwidth_pct", "warm")]
        assert all(figure["value"] > 0 for figure in ours)
    assert result["environment"]["gpu_model"]["value"] == ec.device_name()
    assert report.markdown(result)


def test_the_table_refuses_a_wrong_operation(ctx, monkeypatch):
    right = ec.rmsnorm_ternary_matmul
    monkeypatch.setattr(ec, "rmsnorm_ternary_matmul", lambda *args, **options: right(*args, **{**options, "eps": 9.0}))
    monkeypatch.setattr(table, "TABLE", (Shape("SmolLM", "down", 576, 1536),))
    ctx.tokens = (1,)
    assert suite.exit_code(suite.run(ctx, ["latency"])) == 4
    assert len(ctx.failures) == 6  # two activations, each with three strategies


def test_what_was_tuned_is_what_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_TUNED", "1")
    monkeypatch.setattr(tuned, "folder", lambda: tmp_path)
    product = tune.Product(Shape("SmolLM", "down", 576, 1536), "float32")
    outcome = tune.run([product], (1, 3), ("int8", "float"), "bfloat16")
    assert outcome.failures == []
    assert len(outcome.rows) == 4
    for row in outcome.rows:
        assert row.default_us > 0
        assert tuned.lookup(row.problem) == (row.best and row.best.config)
    assert tune.text(outcome)

    # Whatever was faster here: another configuration than the default, as if it had been.
    import cupy as cp

    problem, facts = outcome.rows[0].problem, current_facts()
    other = next(c for c in dispatch.candidates(problem, facts) if c != outcome.rows[0].default)
    tuned.save(tmp_path, tuned.key_of(cp.cuda.runtime.getDevice()), facts, {problem: tuned.Tuned(other, 1.0, 2.0)})
    W = ec.TernaryWeight.from_int8(cp.ones((576, 1536), cp.int8), 1.0)
    x, gamma = cp.ones(1536, BFLOAT16), cp.ones(1536, cp.float32)
    with count_launches() as counter:
        y = ec.rmsnorm_ternary_matmul(x, gamma, W, activation="int8")
    assert dispatch.launch(problem, other, facts).launch.spec.name in counter.by_name
    assert (y.get() == 1536).all()
    monkeypatch.undo()
    tuned._tables.cache_clear()
