"""Statistics and stop rules of edgellm_cupy.bench.timing, against plain formulas and simulated clocks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_cupy.bench import statistics, timing
from edgellm_cupy.bench.metrics import is_metric

samples = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=300)


class Clock:
    """Stands in for the module `time`: every look at it takes `step` seconds."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now


@pytest.mark.parametrize(("n", "rank"), [(5, None), (6, 1), (8, 1), (9, 2), (20, 6), (50, 18), (100, 40)])
def test_median_interval_has_the_ranks_of_the_tables(n: int, rank: int | None) -> None:
    # Conover, Practical Nonparametric Statistics: order-statistic intervals of the median for 95 %.
    interval = statistics.median_interval([float(i) for i in range(1, n + 1)])
    assert interval == (None if rank is None else (rank, n + 1 - rank))


@given(st.integers(6, 400))
def test_median_interval_covers_95_per_cent_and_no_rank_more_would(n: int) -> None:
    low, _ = statistics.median_interval([float(i) for i in range(1, n + 1)]) or (math.nan, math.nan)

    def outside(rank: int) -> float:
        return 2 * sum(math.comb(n, i) for i in range(rank)) / 2**n

    assert outside(int(low)) <= 0.05 < outside(int(low) + 1)


def test_median_interval_covers_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    true_median = math.log(2)
    intervals = [statistics.median_interval(list(rng.exponential(size=31))) for _ in range(2000)]
    hits = sum(low <= true_median <= high for low, high in intervals)
    assert 0.94 <= hits / 2000 <= 0.985


@given(samples)
def test_summary_agrees_with_plain_formulas(values: list[float]) -> None:
    s = statistics.summarise(values, "us", stop="test")
    assert s["n"] == len(values)
    assert s["median"]["value"] == pytest.approx(np.median(values))
    assert s["mean"]["value"] == pytest.approx(np.mean(values))
    assert s["min"]["value"] == min(values)
    assert s["max"]["value"] == max(values)
    assert s["longest_stall"]["value"] == pytest.approx(max(values) - np.median(values))
    assert values[s["longest_stall"]["index"]] == max(values)
    assert s["stop"] == "test"
    if len(values) > 2:
        assert s["variance"]["value"] == pytest.approx(np.var(values, ddof=1))
        assert s["gap_variance"]["value"] == pytest.approx(np.var(np.diff(values), ddof=1))
    json.dumps(s, allow_nan=False)


@given(samples)
def test_every_null_has_a_reason_and_every_figure_a_unit(values: list[float]) -> None:
    for key, figure in statistics.summarise(values, "us").items():
        if is_metric(figure):
            assert figure["unit"] in ("us", "us^2"), key
            assert figure["value"] is not None or figure["reason"], key


@pytest.mark.parametrize(
    ("p", "fewest"),
    [("p90", 100), ("p95", 200), ("p99", 1000)],
)
def test_a_percentile_needs_ten_samples_beyond_it(p: str, fewest: int) -> None:
    too_few = statistics.summarise(list(np.arange(1.0, fewest)), "us")[p]
    assert too_few["value"] is None
    assert "fewer than 10" in too_few["reason"]
    values = np.arange(1.0, fewest + 1)
    assert statistics.summarise(list(values), "us")[p]["value"] == pytest.approx(np.percentile(values, float(p[1:])))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_a_failed_measurement_is_no_figure(values: list[float]) -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        statistics.summarise(values, "us")


def test_the_stall_carries_its_time() -> None:
    s = statistics.summarise([1.0, 9.0, 1.0], "us", at_s=[0.1, 0.2, 0.3])
    assert s["longest_stall"] == {"value": 8.0, "unit": "us", "index": 1, "at_s": 0.2}


def test_a_gap_does_not_cross_the_end_of_a_run() -> None:
    s = statistics.summarise([1.0, 2.0, 4.0, 10.0, 11.0, 13.0], "ms", run=3)
    assert s["gap_variance"]["value"] == pytest.approx(np.var([1, 2, 1, 2], ddof=1))
    assert statistics.summarise([1.0, 2.0, 3.0], "ms", run=1)["gap_variance"]["value"] is None


def test_a_rate_turns_the_interval_round() -> None:
    times = statistics.median([2.0, 4.0, 4.0, 4.0, 4.0, 5.0], "ms")
    rate = statistics.rate(times, 100, "tok/s", context=7)
    assert rate == {"value": 25.0, "unit": "tok/s", "n": 6, "ci95": [20.0, 50.0], "context": 7}
    few = statistics.rate(statistics.median([4.0], "ms"), 100, "tok/s")
    assert few["ci95"] is None
    assert few["ci95_reason"] == "fewer than 6 samples"


# ---- stop rule ------------------------------------------------------------------------------------------------------


def test_stops_when_precise_and_not_before_the_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", Clock(0.01))
    rule = timing.StopRule(relative_error=0.01, min_samples=5, min_seconds=0.2, max_seconds=9)
    series = timing.take(lambda: 1.0, "us", rule)
    assert series.stop.startswith("relative standard error 0.00%")
    assert 20 <= len(series.values) <= 23
    assert series.at_s[-1] >= 0.2


def test_stops_at_the_time_limit_and_says_how_precise_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", Clock(0.1))
    noisy = iter(np.random.default_rng(0).exponential(size=1000))
    rule = timing.StopRule(relative_error=1e-6, min_samples=2, min_seconds=0, max_seconds=3)
    series = timing.take(lambda: next(noisy), "us", rule)
    assert "limit of 3 s" in series.stop
    assert len(series.values) == 30


def test_stops_at_the_sample_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", Clock(1e-9))
    rule = timing.StopRule(min_samples=3, min_seconds=1, max_seconds=2, max_samples=50)
    series = timing.take(lambda: 1.0, "us", rule)
    assert "limit of 50 samples" in series.stop
    assert len(series.values) == 50


def test_one_slow_sample_is_a_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", Clock(10.0))
    series = timing.take(lambda: 1.0, "ms", timing.StopRule())
    assert series.summary()["n"] == 1
    assert "unknown" in series.stop


def test_the_time_limit_waits_for_the_samples_of_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = timing.StopRule(relative_error=0.0, min_samples=10, min_seconds=0, max_seconds=1)
    for sample_s, expected in ((0.4, statistics.FEWEST), (0.7, statistics.FEWEST), (1.5, 3), (5.0, 1)):
        monkeypatch.setattr(timing, "time", Clock(sample_s))
        noisy = iter(np.random.default_rng(0).exponential(size=100))
        assert len(timing.take(lambda noisy=noisy: next(noisy), "us", rule).values) == expected
    glance = timing.StopRule(relative_error=0.0, min_samples=3, min_seconds=0, max_seconds=1)
    monkeypatch.setattr(timing, "time", Clock(0.9))
    assert len(timing.take(lambda: 1.0, "us", glance).values) == 3


def test_wall_clock_counts_what_the_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(timing, "time", clock)

    def call() -> None:
        clock.now += 0.002

    series = timing.wall_clock(call, timing.StopRule(min_samples=3, min_seconds=0, max_seconds=1))
    assert series.unit == "us"
    assert series.values == pytest.approx([2000.0] * len(series.values))


def test_what_is_prepared_stays_outside_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(0.0), []
    monkeypatch.setattr(timing, "time", clock)

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    rule = timing.StopRule(min_samples=3, min_seconds=0, max_seconds=10)
    series = timing.wall_clock(lambda: work("call", 0.002), rule, prepare=lambda: work("prepare", 0.5))
    assert series.values == pytest.approx([2000.0] * len(series.values))
    assert order == ["prepare", "call"] * (len(series.values) + 2)


# ---- rotations ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 30), st.integers(1, 1 << 27))
def test_cold_copies_exceed_three_times_the_l2(copy_bytes: int, l2: int) -> None:
    copies = timing.cold_copies(copy_bytes, l2)
    assert copies * copy_bytes > 3 * l2
    assert (copies - 1) * copy_bytes <= 3 * l2


@settings(max_examples=50)
@given(st.integers(1, 3000))
def test_a_graph_is_whole_rounds_and_at_least_fifty_launches(copies: int) -> None:
    rotation = timing.Rotation([lambda: None] * copies, 1, "cold")
    assert rotation.launches >= max(50, copies)
    assert rotation.launches % copies == 0
    assert rotation.launches - copies < 50


def test_a_warm_graph_has_as_many_launches_as_a_cold_one() -> None:
    calls = [lambda: None] * 416
    cold, warm = (timing.Rotation(calls, 100, l2) for l2 in ("cold", "warm"))
    assert cold.launches == warm.launches == 416
    assert (cold.bytes_touched, warm.bytes_touched) == (41600, 100)
    assert warm.used == calls[:1]


@pytest.mark.parametrize("touched", [0, 1])
def test_a_rotation_that_fits_the_l2_is_not_cold(monkeypatch: pytest.MonkeyPatch, touched: int) -> None:
    monkeypatch.setattr(timing, "l2_bytes", lambda: 100)
    rotation = timing.Rotation([lambda: None] * 3, 100 - touched, "cold")
    with pytest.raises(ValueError, match="not cold"):
        timing.kernel(rotation, timing.QUICK)
