"""What samples are worth: on synthetic samples whose truth is known, intervals hold what they promise and no more.

Each rate of coverage comes from :data:`DRAWS` seeded draws. It may lie four binomial standard errors below 95 %, and
must not come near 100 %: an interval that always holds the truth says nothing. Hand-made series have exact answers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest

from edgellm_cupy.bench import statistics, timing
from edgellm_cupy.bench.parts import scaling

DRAWS = 1000
FEWEST_HITS = 0.95 - 4 * math.sqrt(0.95 * 0.05 / DRAWS)  # 92.2 %
MOST_HITS = 0.994  # order statistics of few samples reach 98 %; what always hits is too wide
TICK_US = 0.032  # of a clock of 32 ns

Draw = Callable[[np.random.Generator, int], np.ndarray]


def bimodal(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two clocks: three samples in ten are fast."""
    return np.where(rng.random(n) < 0.3, rng.normal(5, 0.1, n), rng.normal(8, 0.2, n))


def ticks(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.floor(rng.normal(2.0, 0.04, n) / TICK_US) * TICK_US


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, n: rng.normal(10, 1, n),
    "lognormal": lambda rng, n: np.exp(rng.normal(0, 0.5, n)),
    "bimodal": bimodal,
    "uniform": lambda rng, n: rng.random(n),
    "heavy tail": lambda rng, n: 1 + rng.pareto(2.5, n),
    "ticks": ticks,
}


def autoregressive(rng: np.random.Generator, n: int, rho: float) -> np.ndarray:
    """Standard normal samples of which each resembles the one before it, by `rho`."""
    noise = rng.normal(size=n) * math.sqrt(1 - rho * rho)
    values = np.empty(n)
    values[0] = rng.normal()
    for i in range(1, n):
        values[i] = rho * values[i - 1] + noise[i]
    return values


def truth(draw: Draw, p: float) -> float:
    return float(np.percentile(draw(np.random.default_rng(99), 1_000_000), p))


def covered(intervals: list[list[float] | None], value: float) -> float:
    """Share of the intervals, of which there must be one from nearly every draw, that hold `value`."""
    there = [interval for interval in intervals if interval]
    assert len(there) >= 0.97 * DRAWS
    assert all(low <= high for low, high in there)
    return sum(low <= value <= high for low, high in there) / len(there)


# ---- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [12, 50, 400])
def test_interval_of_the_median_covers_it(name: str, n: int) -> None:
    draw, rng = DISTRIBUTIONS[name], np.random.default_rng(n)
    intervals = [statistics.median(draw(rng, n), "us")["ci95"] for _ in range(DRAWS)]
    rate = covered(intervals, truth(draw, 50))
    assert rate >= FEWEST_HITS
    if name != "ticks":  # there an interval may end on the truth itself, and then always holds it
        assert rate <= MOST_HITS


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(("p", "n"), [(90, 200), (95, 300), (99, 1500)])
def test_interval_of_a_percentile_covers_it(name: str, p: int, n: int) -> None:
    draw, rng = DISTRIBUTIONS[name], np.random.default_rng(p)
    intervals = [statistics.percentile(draw(rng, n), p, "us")["ci95"] for _ in range(DRAWS)]
    rate = covered(intervals, truth(draw, p))
    assert rate >= FEWEST_HITS
    if name != "ticks":
        assert rate <= MOST_HITS


@pytest.mark.parametrize(("n", "most"), [(50, 1.4), (2000, 1.15)])
def test_interval_of_the_median_is_as_wide_as_theory_says(n: int, most: float) -> None:
    rng = np.random.default_rng(1)
    widths = [np.diff(statistics.median(rng.normal(size=n), "us")["ci95"])[0] for _ in range(200)]
    asymptotic = 2 * 1.96 * math.sqrt(math.pi / 2 / n)
    assert 1.0 < np.mean(widths) / asymptotic < most


def test_interval_on_a_coarse_clock_is_a_tick_or_two_wide() -> None:
    rng = np.random.default_rng(2)
    widths = [np.diff(statistics.median(ticks(rng, 400), "us")["ci95"])[0] for _ in range(200)]
    assert max(widths) < 1.01 * TICK_US


@pytest.mark.parametrize("name", ["normal", "uniform", "bimodal", "lognormal"])
def test_interval_of_the_mean_covers_it(name: str) -> None:
    draw, rng = DISTRIBUTIONS[name], np.random.default_rng(3)
    mean = float(draw(np.random.default_rng(99), 1_000_000).mean())
    intervals = [statistics.summarise(draw(rng, 100), "us")["mean"]["ci95"] for _ in range(DRAWS)]
    assert FEWEST_HITS <= covered(intervals, mean) <= MOST_HITS


def test_interval_of_the_mean_by_hand() -> None:
    # Six samples, mean 3.5, variance 3.5: Student's t with five degrees of freedom is 2.5706.
    figure = statistics.summarise([1, 2, 3, 4, 5, 6], "us")["mean"]
    half = 2.5706 * math.sqrt(3.5 / 6)
    assert figure["ci95"] == pytest.approx([3.5 - half, 3.5 + half], rel=1e-3)
    assert statistics.summarise([1, 2, 3, 4, 5], "us")["mean"]["ci95"] is None


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_interval_of_the_slope_covers_it(noise: str) -> None:
    draw, rng = DISTRIBUTIONS[noise], np.random.default_rng(4)
    centre = truth(draw, 50)
    thousands = (np.array(scaling.DEPTHS) - 1024) / 1024
    fits = [
        scaling.fit_line(scaling.DEPTHS, 3 + 0.05 * thousands + 0.02 * (draw(rng, len(thousands)) - centre))
        for _ in range(DRAWS)
    ]
    assert FEWEST_HITS <= covered([list(fit.ms_per_1k_ci95) for fit in fits], 0.05) <= 0.98


def test_interval_of_a_ratio_covers_it() -> None:
    rng, slow, fast = np.random.default_rng(5), DISTRIBUTIONS["lognormal"], DISTRIBUTIONS["normal"]
    intervals = [
        statistics.ratio(statistics.median(slow(rng, 80), "us"), statistics.median(fast(rng, 40), "us"))["ci95"]
        for _ in range(DRAWS)
    ]
    assert FEWEST_HITS <= covered(intervals, truth(slow, 50) / truth(fast, 50)) <= MOST_HITS


@pytest.mark.parametrize("p", [50, 90, 95, 99])
@pytest.mark.parametrize("n", [1, 5, 6, 7, 29, 100, 368, 369, 1000])
def test_ranks_are_the_innermost_of_which_each_side_misses_one_in_forty(p: int, n: int) -> None:
    q = Fraction(p, 100)
    mass = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
    allowed = Fraction(1, 40)
    low, high = statistics.quantile_ranks(n, p)
    assert sum(mass[: low or 0]) <= allowed < sum(mass[: (low or 0) + 1])
    high = n + 1 if high is None else high
    assert sum(mass[high:]) <= allowed < sum(mass[high - 1 :])


def test_no_interval_below_six_samples_and_the_reason() -> None:
    five, six = (statistics.median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0][:n], "us") for n in (5, 6))
    assert five == {"value": 3.0, "unit": "us", "n": 5, "ci95": None, "ci95_reason": "fewer than 6 samples"}
    assert six == {"value": 3.5, "unit": "us", "n": 6, "ci95": [1.0, 6.0]}


@pytest.mark.parametrize(("p", "fewest"), [(90, 100), (95, 200), (99, 1000)])
def test_a_tail_under_ten_samples_is_null(p: int, fewest: int) -> None:
    values = np.random.default_rng(6).random(fewest)
    assert statistics.percentile(values[1:], p, "us") == {
        "value": None,
        "unit": "us",
        "reason": f"{fewest - 1} samples put 9 beyond p{p}, fewer than 10",
    }
    enough = statistics.percentile(values, p, "us")
    assert sum(values > enough["value"]) == 10
    low, high = enough["ci95"]
    assert low < enough["value"] < high
    assert {low, high} <= set(values)


# ---- samples that depend on each other -------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_intervals_cover_the_truth_of_dependent_samples_too(rho: float) -> None:
    rng = np.random.default_rng(7)
    series = [autoregressive(rng, 1500, rho) for _ in range(DRAWS)]
    naive = [list(statistics.median_interval(values) or ()) for values in series]
    honest = [statistics.median(values, "us")["ci95"] for values in series]
    tail = [statistics.percentile(values, 90, "us")["ci95"] for values in series]
    mean = [statistics.summarise(values, "us")["mean"]["ci95"] for values in series]
    assert covered(naive, 0.0) < 0.87  # the same samples taken for independent ones
    assert FEWEST_HITS <= covered(honest, 0.0) <= MOST_HITS
    assert FEWEST_HITS <= covered(mean, 0.0) <= MOST_HITS
    assert FEWEST_HITS <= covered(tail, 1.2816) <= MOST_HITS


@pytest.mark.parametrize(("rho", "share"), [(0.0, 1.0), (0.5, 1 / 3), (0.9, 1 / 19)])
def test_effective_samples_are_those_of_theory(rho: float, share: float) -> None:
    rng = np.random.default_rng(8)  # of an autoregressive series, n (1 - rho) / (1 + rho)
    found = np.mean([statistics.effective_samples(autoregressive(rng, 2000, rho)) for _ in range(50)]) / 2000
    assert 0.75 * share <= found <= 1.1 * share


def test_a_drift_is_worth_few_samples_and_what_alternates_all() -> None:
    noise = np.random.default_rng(9).normal(size=1000)
    assert statistics.effective_samples(np.linspace(0, 20, 1000) + noise) < 10
    assert statistics.effective_samples(np.resize([1.0, 2.0], 1000)) == 1000
    assert statistics.effective_samples([4.1] * 1000) == 1000
    assert statistics.effective_samples(range(19)) == 19  # too few to tell
    assert statistics.effective_samples(range(20)) < 6


def test_a_figure_says_how_many_samples_it_is_worth() -> None:
    rng = np.random.default_rng(10)
    values = autoregressive(rng, 2000, 0.9) + 10
    figure = statistics.median(values, "ms")
    assert 50 <= figure["n_effective"] <= 200
    assert statistics.rate(figure, 1e3, "tok/s")["n_effective"] == figure["n_effective"]
    assert "n_effective" not in statistics.median([1.0, 2.0] * 10, "ms")


def test_a_pure_trend_keeps_an_interval_as_wide_as_of_six_samples() -> None:
    figure = statistics.median(np.arange(1.0, 700.0), "ms")  # ranks 1 and 6 of 6, spread over 699
    assert figure["n_effective"] < 6
    assert figure["ci95"] == [100.0, 600.0]


def test_a_tail_that_is_one_burst_has_no_interval_and_says_why() -> None:
    values = np.random.default_rng(11).random(1000)
    values[500:] += 1
    figure = statistics.percentile(values, 99, "ms")
    spread = statistics.percentile(np.random.default_rng(11).permutation(values), 99, "ms")
    assert spread["ci95"]
    assert figure["value"] == spread["value"]
    values[480:500] = 5.0
    burst = statistics.percentile(values, 99, "ms")
    assert burst["ci95"] is None
    assert re.fullmatch(r"1000 samples are worth \d+ independent ones, too few", burst["ci95_reason"])


# ---- the rule that stops a series -----------------------------------------------------------------------------------


class Clock:
    """Stands in for the module `time`: every look at it takes a millisecond."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time", Clock())


RULE = timing.StopRule(relative_error=0.01, min_samples=30, min_seconds=0.05, max_seconds=1.5, max_samples=5000)


def feed(values: np.ndarray, rule: timing.StopRule = RULE) -> timing.Samples:
    stream: Iterator[float] = iter(values.tolist())
    return timing.take(lambda: next(stream), "us", rule)


def error_in(words: str) -> float:
    return float(re.findall(r"relative standard error (\S+)%", words)[0]) / 100


def test_independent_samples_stop_as_soon_as_they_are_precise() -> None:
    # 10 % of noise needs 100 samples for 1 %.
    rng = np.random.default_rng(12)
    ends = [feed(rng.normal(10, 1, 2000)) for _ in range(20)]
    assert all(series.stop.startswith("relative standard error") for series in ends)
    assert all(error_in(series.stop) <= 0.01 for series in ends)
    assert 90 <= np.median([len(series.values) for series in ends]) <= 170


def test_samples_that_drift_do_not_stop_early_and_are_no_more_precise_than_said() -> None:
    rng = np.random.default_rng(13)
    series = [feed(10 + autoregressive(rng, 2000, 0.95)) for _ in range(100)]  # 10 % of noise, worth 1 in 39
    assert np.median([len(one.values) for one in series]) >= 1400
    limits = [one for one in series if "limit of 1.5 s reached" in one.stop]
    assert len(limits) >= 50
    true_error = float(np.sqrt(np.mean([(np.mean(one.values) / 10 - 1) ** 2 for one in limits])))
    said = float(np.median([error_in(one.stop) for one in limits]))
    assert 0.7 * true_error <= said <= 1.5 * true_error
    naive = np.median([np.std(one.values) / math.sqrt(len(one.values)) / 10 for one in limits])
    assert naive < 0.4 * said


def test_no_series_has_fewer_samples_than_its_rule_asks_for() -> None:
    rule = timing.StopRule(relative_error=0.01, min_samples=30, min_seconds=0.0, max_seconds=1.0)
    assert len(feed(np.full(100, 2.0), rule).values) == 30


def test_a_small_drift_may_stop() -> None:
    # All of it is less than the bound.
    series = feed(np.linspace(10, 10.01, 2000))
    assert series.stop.startswith("relative standard error")
    assert len(series.values) < 100


def test_what_never_becomes_precise_ends_at_its_limit_and_says_how_far_it_came() -> None:
    series = feed(np.random.default_rng(14).pareto(1.0, 5000) + 1)
    assert "limit of 1.5 s reached" in series.stop
    assert error_in(series.stop) > 0.01
    assert series.at_s[-1] >= 1.5
    assert series.at_s[-2] < 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_series_that_failed_is_no_figure(value: float) -> None:
    values = np.full(5000, value)
    series = feed(values)
    assert series.stop == "limit of 1.5 s reached, relative standard error inf%"
    with pytest.raises(ValueError, match="0 finite: nothing to report"):
        series.summary()


def test_a_mean_of_zero_is_never_precise() -> None:
    assert timing.Samples("us", [0.0] * 50).relative_error == math.inf
    assert timing.Samples("us", [1.0]).relative_error == math.inf
    assert timing.Samples("us", [2.0] * 50).relative_error == 0


# ---- refused, and exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf] * 30, [1.0] * 30 + [-math.inf]])
def test_nothing_and_what_is_not_finite_is_refused(values: list[float]) -> None:
    for function in (statistics.summarise, statistics.median):
        with pytest.raises(ValueError, match="nothing to report"):
            function(values, "us")


def test_spread_of_a_series_by_hand() -> None:
    s = statistics.summarise([3.0, 1.0, 100.0, 2.0, 4.0], "us", at_s=[0.5, 1.0, 1.5, 2.0, 2.5])
    exact = {"median": 3.0, "mean": 22.0, "min": 1.0, "max": 100.0, "iqr": 2.0, "mad": 1.0, "longest_stall": 97.0}
    assert {key: s[key]["value"] for key in exact} == exact
    assert s["longest_stall"] == {"value": 97.0, "unit": "us", "index": 2, "at_s": 1.5}
    assert s["variance"]["value"] == pytest.approx((19**2 + 21**2 + 78**2 + 20**2 + 18**2) / 4)
    assert s["std"]["value"] == pytest.approx(math.sqrt(s["variance"]["value"]))
    # Gaps -2, 99, -98, 2: mean 0.25.
    assert s["gap_variance"]["value"] == pytest.approx((2.25**2 + 98.75**2 + 98.25**2 + 1.75**2) / 3)
    assert s["samples"] == [3.0, 1.0, 100.0, 2.0, 4.0]
    assert s["p99_minus_p50"]["value"] is None


def test_quartiles_lie_between_samples() -> None:
    s = statistics.summarise([1.0, 2.0, 4.0, 8.0], "us")  # quartiles 1.75 and 5
    assert s["iqr"]["value"] == pytest.approx(3.25)
    assert s["mad"]["value"] == pytest.approx(1.5)  # of 2, 1, 1, 5
    assert s["median"]["value"] == 3.0


def test_p99_above_the_median_by_hand() -> None:
    values = np.random.default_rng(15).permutation(np.arange(1001.0))
    s = statistics.summarise(values, "us")
    assert (s["p50"]["value"], s["p99"]["value"], s["p99_minus_p50"]["value"]) == (500.0, 990.0, 490.0)


def test_one_sample_has_no_spread_and_says_why() -> None:
    s = statistics.summarise([2.0], "us")
    for key in ("std", "variance", "iqr", "mad"):
        assert s[key]["value"] is None
        assert s[key]["reason"] == "needs 2 samples, has 1"
    assert s["median"]["value"] == s["max"]["value"] == 2.0
    json.dumps(s, allow_nan=False)


def test_a_rate_is_the_time_turned_round() -> None:
    time = {"value": 4.0, "unit": "ms", "n": 30, "ci95": [2.0, 5.0]}
    assert statistics.rate(time, 100, "tok/s") == {"value": 25.0, "unit": "tok/s", "n": 30, "ci95": [20.0, 50.0]}


def test_the_interval_of_a_rate_covers_it_as_often_as_that_of_the_time() -> None:
    rng, draw = np.random.default_rng(16), DISTRIBUTIONS["lognormal"]
    times = [statistics.median(draw(rng, 40), "ms") for _ in range(DRAWS)]
    of_times = covered([time["ci95"] for time in times], 1.0)
    assert covered([statistics.rate(time, 1e3, "tok/s")["ci95"] for time in times], 1e3) == of_times


def test_a_time_of_zero_has_no_rate() -> None:
    zero = statistics.rate(statistics.median([0.0] * 10, "us"), 1, "GB/s")
    assert zero == {"value": None, "unit": "GB/s", "reason": "a time of 0 us: shorter than the clock can tell"}
    unknown = statistics.rate({"value": None, "unit": "us", "reason": "no GPU"}, 1, "GB/s")
    assert unknown == {"value": None, "unit": "GB/s", "reason": "no GPU"}
    partly = statistics.rate({"value": 1.0, "unit": "us", "n": 9, "ci95": [0.0, 2.0]}, 1, "GB/s")
    assert partly["value"] == 1.0
    assert partly["ci95"] is None
    assert "reaches zero" in partly["ci95_reason"]


def test_a_ratio_by_hand() -> None:
    above = {"value": 8.0, "unit": "us", "n": 9, "ci95": [4.0, 32.0]}
    exact = {"value": 2.0, "unit": "us", "n": 9, "ci95": [2.0, 2.0]}
    assert statistics.ratio(above, exact, of="a over b") == {
        "value": 4.0, "unit": "x", "ci95": pytest.approx([2.0, 16.0]), "of": "a over b",
    }  # fmt: skip
    assert statistics.ratio(exact, above)["ci95"] == pytest.approx([1 / 16, 1 / 2])
    both = statistics.ratio(above, {**above, "ci95": [1.0, 16.0]})["ci95"]  # binary logarithms -1, 2 over -3, 1
    assert both == pytest.approx([2 ** -math.hypot(1, 1), 2 ** math.hypot(2, 3)])


def test_a_ratio_in_per_cent_has_its_interval_in_per_cent() -> None:
    part = {"value": 1.0, "ci95": [0.5, 2.0]}
    whole = {"value": 4.0, "ci95": [4.0, 4.0]}
    share = statistics.ratio(part, whole, "%", 100)
    assert share == {"value": 25.0, "unit": "%", "ci95": pytest.approx([12.5, 50.0])}


def test_a_geometric_mean_by_hand() -> None:
    ratios = [{"value": 1.0, "ci95": [0.5, 4.0]}, {"value": 4.0, "ci95": [4.0, 4.0]}]
    mean = statistics.geometric_mean(ratios)
    assert mean == {"value": pytest.approx(2.0), "unit": "x", "n": 2, "ci95": pytest.approx([2**0.5, 4.0])}
    alike = statistics.geometric_mean(ratios[:1] * 4)["ci95"]  # four of one width: half as wide, on logarithms
    assert alike == pytest.approx([0.5**0.5, 2.0])
    without = statistics.geometric_mean([*ratios, {"value": 1.0}])
    assert (without["ci95"], without["ci95_reason"]) == (None, "no interval of all")


def test_a_ratio_without_its_parts_is_null_or_has_no_interval() -> None:
    known = {"value": 8.0, "unit": "us", "n": 9, "ci95": [4.0, 16.0]}
    null = {"value": None, "unit": "us", "reason": "no cuBLAS"}
    for pair in ((known, null), (null, known)):
        assert statistics.ratio(*pair) == {"value": None, "unit": "x", "reason": "no cuBLAS"}
    few = statistics.ratio(known, {**known, "ci95": None, "ci95_reason": "fewer than 6 samples"})
    assert (few["value"], few["ci95"]) == (1.0, None)
    assert few["ci95_reason"]
    assert statistics.ratio(known, {**known, "value": 0.0, "ci95": [0.0, 1.0]})["value"] is None


@pytest.mark.parametrize(
    ("degrees", "exact"), [(1, 12.706), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (15, 2.131)]
)
def test_student(degrees, exact):
    assert statistics.student95(degrees) == pytest.approx(exact, rel=0.001)
