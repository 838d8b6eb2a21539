"""The line through token times: known answers, and intervals that hold what they promise. And no token time without a
check of the decoder that made it."""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import Context, WrongResultError
from edgellm_cupy.bench.metrics import measured
from edgellm_cupy.bench.parts import scaling, tokens
from edgellm_cupy.formats.checkpoint import Checkpoint

DEPTHS = np.array(scaling.DEPTHS)


def times(ms_at_1k: float, ms_per_1k: float) -> np.ndarray:
    return ms_at_1k + ms_per_1k * (DEPTHS - 1024) / 1024


def test_points_on_a_line_give_that_line():
    fit = scaling.fit_line(scaling.DEPTHS, times(2.0, 0.05))
    assert fit.ms_at_1k == pytest.approx(2.0)
    assert fit.ms_per_1k == pytest.approx(0.05)
    assert fit.pct_per_1k == pytest.approx(2.5)
    assert fit.ms_per_1k_ci95 == pytest.approx((0.05, 0.05))
    assert fit.degrees_of_freedom == len(DEPTHS) - 2


def test_every_point_counts_not_only_the_ends():
    bent = times(2.0, 0.05)
    bent[2] += 1.0
    fit = scaling.fit_line(scaling.DEPTHS, bent)
    assert fit.ms_per_1k != pytest.approx(0.05, rel=1e-3)
    assert fit.ms_per_1k_ci95[0] < 0.05 < fit.ms_per_1k_ci95[1]


def test_agrees_with_a_textbook_example():
    # y = 1, 3, 4 at x = 0, 1, 2: slope 1.5, intercept 7/6, residual sum of squares 1/6, one degree of freedom.
    fit = scaling.fit_line([1024, 2048, 3072], [1, 3, 4])
    half = 12.706 * np.sqrt((1 / 6) / 2)
    assert fit.ms_per_1k == pytest.approx(1.5)
    assert fit.ms_at_1k == pytest.approx(7 / 6)
    assert fit.ms_per_1k_ci95 == pytest.approx((1.5 - half, 1.5 + half), rel=1e-4)


def test_intervals_cover_the_truth_19_times_in_20():
    rng = np.random.default_rng(0)
    runs, covered_ms, covered_pct = 2000, 0, 0
    for _ in range(runs):
        fit = scaling.fit_line(scaling.DEPTHS, times(2.0, 0.05) + rng.normal(0, 0.02, len(DEPTHS)))
        covered_ms += fit.ms_per_1k_ci95[0] <= 0.05 <= fit.ms_per_1k_ci95[1]
        covered_pct += fit.pct_per_1k_ci95[0] <= 2.5 <= fit.pct_per_1k_ci95[1]
    assert 0.935 < covered_ms / runs < 0.965
    assert 0.935 < covered_pct / runs < 0.965


@pytest.mark.parametrize("points", [0, 2, 7])
def test_refuses_a_number_of_points_that_it_has_no_interval_for(points):
    with pytest.raises(ValueError, match=f"{points} contexts"):
        scaling.fit_line(range(1024, 1024 * (points + 1), 1024), [1.0] * points)


def test_refuses_times_that_make_no_line():
    with pytest.raises(ValueError, match="fitted time at 1k"):
        scaling.fit_line([1024, 2048, 3072], [-1, 0, 1])


def test_run_reports_every_context_and_marks_those_beyond_the_model(monkeypatch):
    def steady(ctx, cache, depth, n):
        return [2 + depth / 1e4 + 0.01 * (depth == 4096)] * n

    monkeypatch.setattr(scaling, "times_at_depth", steady)
    monkeypatch.setattr(scaling, "short_times", lambda ctx, caches, runs: [[1.25] * 16 * runs])
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256, max_context=4096)
    figures = scaling.run(Context(Checkpoint.random(config), "not asked for", quick=True))
    rows = {row["context"]: row for row in figures["rows"]}
    assert tuple(rows) == (12, *scaling.DEPTHS)
    # At a depth of 4096 the tokens that are timed lie behind the 4096 that the model was made for.
    assert [depth for depth, row in rows.items() if row["synthetic"]] == [4096, 8192, 12288, 16384]
    assert [rows[d]["tok_s"]["synthetic"] for d in (2048, 4096)] == [False, True]
    # Keys and values of two layers, two KV heads of 16 features, four bytes each.
    assert rows[1024]["kv_cache_bytes"]["value"] == 2 * 2 * 2 * 16 * 4 * 1024
    for name, depth in scaling.REPORTED.items():
        figure = figures[f"throughput_{name}_ctx_tok_s"]
        assert figure["value"] == pytest.approx(1e3 / rows[depth]["latency"]["median"]["value"])
        assert figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]
    slope = figures["throughput_degradation_slope_pct_per_1k"]
    assert slope["ci95"][0] < slope["value"] < slope["ci95"][1]
    assert "least squares" in slope["definition"]
    assert slope["n"] == len(scaling.DEPTHS)
    growth = figures["time_16k_over_0"]
    assert growth["value"] == pytest.approx((2 + 1.6384) / 1.25)
    assert growth["of"] == "time a token at context 16384 over 12"
    assert figures["conditions"] == {"value": None, "reason": "not asked for"}


def test_times_that_make_no_line_cost_the_slope_and_nothing_else():
    falling = [{"latency": {"median": measured(ms)}} for ms in (9.0, 1.0, 9.0, 9.0, 9.0, 99.0)]
    figures = scaling._fit_figures(falling)
    for figure in (figures["fit"], figures["throughput_degradation_slope_pct_per_1k"]):
        assert figure["value"] is None
        assert "do not grow like a line" in figure["reason"]


# ---- the decoder is checked before it is timed ----------------------------------------------------------------------


class Array(np.ndarray):
    """Stands in for a CuPy array."""

    def get(self):
        return np.array(self)


class Device(ec.reference.TernaryTransformer):
    """Stands in for the decoder on the GPU. `mistake(projected, cache)` may spoil what the attention sees."""

    @staticmethod
    def mistake(projected, cache):
        return projected

    @staticmethod
    def choose(logits):
        return logits.argmax(axis=-1)

    def _forward(self, ids, cache):
        logits = super()._forward(ids, cache)
        cache.logits, cache.token = logits.view(Array), self.choose(logits).view(Array)
        return logits

    def _attention(self, projected, cache, layer, positions):
        return super()._attention(self.mistake(projected, cache), cache, layer, positions)


@pytest.fixture
def on_the_device(monkeypatch):
    monkeypatch.setattr(scaling, "DEPTHS", (1024, 2048))
    monkeypatch.setattr(
        suite,
        "DECODER_CHECKS",
        tuple(c._replace(depths=tuple(min(d, 2048) for d in c.depths)) for c in suite.DECODER_CHECKS),
    )
    monkeypatch.setattr(suite, "_examined", lambda ctx: {"found": []})
    monkeypatch.setattr(suite, "_telemetry", lambda ctx: ctx.telemetry)
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256)
    ctx = Context(Checkpoint.random(config), None, quick=True)
    ctx.model = Device(ctx.checkpoint)
    return ctx


def test_a_right_decoder_passes_at_every_depth(on_the_device):
    steps = []
    on_the_device.progress = steps.append
    figure = suite.check_decoder(on_the_device)
    assert figure["value"] == 0
    assert [step.rpartition("checking the decoder against the reference: ")[2] for step in steps] == [
        "int8 activations, context 0",
        "float activations, context 0",
        "float activations, context 1024",
        "float activations, context 2048",
    ]


def test_attention_that_is_only_wrong_at_depth_is_found(on_the_device, monkeypatch):
    def loses_a_split(projected, cache):
        if cache.length > 2000:
            cache.values[..., :64, :] = 0
        return projected

    monkeypatch.setattr(Device, "mistake", staticmethod(loses_a_split))
    with pytest.raises(WrongResultError, match="float activations, token at position 2048: logits differ by"):
        suite.check_decoder(on_the_device)


def test_a_token_that_is_not_the_largest_logit_is_found(on_the_device, monkeypatch):
    monkeypatch.setattr(Device, "choose", staticmethod(lambda logits: logits.argmin(axis=-1)))
    with pytest.raises(WrongResultError, match="the next token is"):
        suite.check_decoder(on_the_device)


def test_logits_that_are_not_finite_are_found(on_the_device, monkeypatch):
    monkeypatch.setattr(Device, "mistake", staticmethod(lambda projected, cache: projected * np.nan))
    with pytest.raises(WrongResultError, match="256 logits are not finite"), np.errstate(invalid="ignore"):
        suite.check_decoder(on_the_device)


@pytest.mark.parametrize("error", [WrongResultError("off by one"), RuntimeError("out of memory")])
def test_no_speed_of_a_decoder_whose_check_failed(on_the_device, monkeypatch, error):
    def check(ctx):
        raise error

    monkeypatch.setattr(suite, "check_decoder", check)
    monkeypatch.setattr(tokens, "run", lambda ctx: pytest.fail("an unchecked decoder was timed"))
    result = suite.run(on_the_device, ["tokens"])
    assert result["parts"] == {}
    assert "not measured: " in result["summary"]["throughput_tok_s"]["reason"]
    assert str(error) in result["errors"]["decoder_check"]["reason"]
    assert suite.exit_code(result) == (4 if isinstance(error, WrongResultError) else 6)
