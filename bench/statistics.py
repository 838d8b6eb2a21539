"""What samples are worth: medians, percentiles and their intervals, spread and gaps. Pure functions on the host.

Intervals of medians and percentiles are order statistics, which hold whatever the distribution. They would be too
narrow for samples that depend on each other: clocks and temperatures drift, and a replay resembles the one before it.
So they have the width that fewer, independent samples would give, as many as the series is worth
(:func:`effective_samples`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from .metrics import Metric, measured, missing

SMALLEST_TAIL = 10  # samples that must lie beyond a percentile before it is worth reporting
FEWEST = 6  # samples, for 95 %: the range of five holds the median in 93.75 % of all cases
FEWEST_FOR_DEPENDENCE = 20  # of fewer samples one cannot tell how far they depend on each other
_ONE_SIDE = 0.025
_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_STUDENT95 = (12.706, 4.303, 3.182, 2.776)  # of 1, 2, ... degrees of freedom

_TOO_FEW = f"fewer than {FEWEST} samples"


def effective_samples(values: Sequence[float] | np.ndarray) -> float:
    """How many independent samples would tell the mean of `values`, which are in order of time, as precisely.

    Their number over the integrated autocorrelation time, whose sum ends where the pairs of neighbouring lags are no
    longer positive (Geyer 1992, initial positive sequence); never more than their number. It errs to the low side: of
    independent samples a tenth or so is lost. Below :data:`FEWEST_FOR_DEPENDENCE` samples, and for samples that are all
    equal, their number.
    """
    v = np.asarray(values, dtype=np.float64)
    n = len(v)
    if n < FEWEST_FOR_DEPENDENCE or v.min() == v.max():
        return float(n)
    spectrum = np.fft.rfft(v - v.mean(), 2 * n)  # padded, or the end of the series would meet its beginning
    correlation = np.fft.irfft(spectrum * spectrum.conj(), 2 * n)[:n]
    pairs = (correlation[: n // 2 * 2] / correlation[0]).reshape(-1, 2).sum(axis=1)
    ends = np.flatnonzero(pairs <= 0)
    time = 2 * float(pairs[: ends[0] if len(ends) else None].sum()) - 1
    return n / max(time, 1.0)


def relative_standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Standard error of the mean of `values`, which are in order of time, over the mean.

    As many samples count as the series is worth: while clocks drift, more samples do not make it precise. Infinite
    below two samples or for a mean that is not positive and finite.
    """
    v = np.asarray(values, dtype=np.float64)
    mean = float(v.mean()) if len(v) > 1 else 0.0
    known = 0 < mean < math.inf
    return float(v.std(ddof=1)) / math.sqrt(effective_samples(v)) / mean if known else math.inf


@lru_cache(maxsize=1024)
def quantile_ranks(n: int, p: float) -> tuple[int | None, int | None]:
    """Ranks (1 = smallest) of the two of `n` samples between which the `p`-th percentile lies in 95 % of all cases.

    With B, the number of samples below the percentile, binomial: the largest `low` with P(B < low) <= 2.5 % and the
    smallest `high` with P(B >= high) <= 2.5 %. None where the smallest or the largest sample is not far enough out.
    """
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    q = p / 100
    log_mass = log_factorial[n] - log_factorial - log_factorial[::-1] + k * math.log(q) + (n - k) * math.log(1 - q)
    mass = np.exp(log_mass)
    low = int(np.searchsorted(np.cumsum(mass), _ONE_SIDE, side="right"))  # sums of B < 1, B < 2, ...
    high = n + 1 - int(np.searchsorted(np.cumsum(mass[::-1]), _ONE_SIDE, side="right"))  # of B >= n, B >= n - 1, ...
    return low or None, high if high <= n else None


def quantile_interval(values: Sequence[float], p: float, effective: float | None = None) -> tuple[float, float] | None:
    """A 95 % confidence interval of the `p`-th percentile (0 < p < 100) from order statistics.

    effective: how many independent samples `values` are worth, by default all of them; of fewer, the ranks are those
        of so many samples, spread over all. It counts as :data:`FEWEST` at least, or there would be none.

    None where the samples are too few for an end on either side: of the median below six.
    """
    n = len(values)
    worth = n if effective is None else min(n, max(FEWEST, int(effective)))
    low, high = quantile_ranks(worth, p) if worth else (None, None)
    if low is None or high is None:
        return None
    ordered = sorted(values)
    stretch = (n + 1) / (worth + 1)
    return ordered[math.floor(low * stretch) - 1], ordered[math.ceil(high * stretch) - 1]


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """:func:`quantile_interval` of the median, for independent samples; None below six, where the range covers less."""
    return quantile_interval(values, 50)


def percentile(values: Sequence[float], p: float, unit: str) -> Metric:
    """The p-th percentile (50 < p < 100) of `values`, which are in order of time, with its interval as `ci95`.

    Null where fewer than :data:`SMALLEST_TAIL` samples lie beyond it.

    Raises:
        ValueError: a sample is not finite.
    """
    n = len(values)
    beyond = int(n * (100 - p) / 100 + 1e-9)
    if beyond < SMALLEST_TAIL:
        return missing(f"{n} samples put {beyond} beyond p{p:g}, fewer than {SMALLEST_TAIL}", unit)
    return _quantile(values, p, unit)


def median(values: Sequence[float], unit: str, **detail: Any) -> Metric:
    """The median of `values`, which are in order of time, with its interval as `ci95`.

    `ci95` is null with `ci95_reason` below six samples. `n_effective`: where the series is worth fewer samples than it
    has.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    return _quantile(values, 50, unit, **detail)


def _quantile(values: Sequence[float], p: float, unit: str, **detail: Any) -> Metric:
    v = _finite(values)
    value = float(np.percentile(v, p))
    # Whether a sample lies above or below is all that moves a quantile: how far out an outlier lies does not matter.
    effective = effective_samples(np.sign(v - value))
    interval = quantile_interval(list(map(float, v)), p, effective)
    reason = _TOO_FEW if len(v) < FEWEST else f"{len(v)} samples are worth {int(effective)} independent ones, too few"
    return measured(value, unit, n=len(v), **_worth(len(v), effective), **_interval(interval, reason), **detail)


def _finite(values: Sequence[float]) -> np.ndarray:
    """The samples as float64; of a failed measurement nothing may become a figure."""
    v = np.asarray(values, dtype=np.float64)
    if not len(v) or not np.isfinite(v).all():
        raise ValueError(f"{len(v)} samples, of which {int(np.isfinite(v).sum())} finite: nothing to report")
    return v


def _mean(v: np.ndarray, unit: str) -> Metric:
    """With a t interval: right for a mean of many, too narrow where rare and long stalls make the mean."""
    effective = effective_samples(v)
    value, interval = float(v.mean()), None
    if len(v) >= FEWEST:
        half = student95(max(FEWEST, effective) - 1) * float(v.std(ddof=1)) / math.sqrt(max(FEWEST, effective))
        interval = (value - half, value + half)
    return measured(value, unit, n=len(v), **_worth(len(v), effective), **_interval(interval, _TOO_FEW))


def student95(degrees: float) -> float:
    """Two-sided 95 % point of Student's t, for 1 degree of freedom or more.

    A table for whole numbers below 5, to 0.1 % from there on (Abramowitz and Stegun 26.7.5).
    """
    if degrees < 5:
        return _STUDENT95[math.floor(degrees) - 1]  # of fewer degrees: never too narrow
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**i for i, term in enumerate(terms, 1))


def _worth(n: int, effective: float) -> dict[str, int]:
    return {"n_effective": int(effective)} if int(effective) < n else {}


def _interval(interval: tuple[float, float] | None, reason: str) -> dict[str, Any]:
    return {"ci95": list(interval)} if interval else {"ci95": None, "ci95_reason": reason}


def rate(time: Metric, amount: float, unit: str, **detail: Any) -> Metric:
    """`amount` over a median time, the interval of the time turned into one of the rate.

    Null where the time is, and for a time that is not positive: the clock was too coarse for it.
    """
    if time["value"] is None:
        return missing(time["reason"], unit)
    if time["value"] <= 0:
        return missing(f"a time of {time['value']:g} {time.get('unit', '')}: shorter than the clock can tell", unit)
    interval, reason = None, time.get("ci95_reason")
    if time["ci95"] and time["ci95"][0] > 0:
        interval = (amount / time["ci95"][1], amount / time["ci95"][0])
    elif time["ci95"]:
        reason = "the interval of the time reaches zero: shorter than the clock can tell"
    worth = {"n_effective": time["n_effective"]} if "n_effective" in time else {}
    return measured(amount / time["value"], unit, n=time["n"], **worth, **_interval(interval, str(reason)), **detail)


def ratio(above: Metric, below: Metric, unit: str = "x", factor: float = 1.0, **detail: Any) -> Metric:
    """Ratio of two medians of series that were taken apart, times `factor`, with its interval where both have one.

    The distances of both values to the ends of their intervals are added as squares of logarithms (MOVER, Donner and
    Zou 2012): 95 % again, which quotients of opposite ends would overshoot. Null where `below` or `above` is null, or
    not positive.
    """
    for figure in (above, below):
        if figure["value"] is None:
            return missing(figure["reason"], unit)
        if figure["value"] <= 0:
            return missing(f"a value of {figure['value']:g} has no ratio", unit)
    value = factor * above["value"] / below["value"]
    interval = None
    if (a := _log_distances(above)) and (b := _log_distances(below)):
        interval = (value * math.exp(-math.hypot(a[0], b[1])), value * math.exp(math.hypot(a[1], b[0])))
    return measured(value, unit, **_interval(interval, "no interval of both"), **detail)


def geometric_mean(ratios: Sequence[Metric], unit: str = "x", **detail: Any) -> Metric:
    """Of at least one ratio, none null; with its interval, by the method of :func:`ratio`, where all have one.

    The interval says how well the ratios were measured, as ratios that were measured apart, not how far the mean
    depends on which ratios there are.
    """
    value = math.exp(sum(math.log(figure["value"]) for figure in ratios) / len(ratios))
    interval = None
    if all(distances := [_log_distances(figure) for figure in ratios]):
        down, up = (math.hypot(*side) / len(ratios) for side in zip(*filter(None, distances), strict=True))
        interval = (value * math.exp(-down), value * math.exp(up))
    return measured(value, unit, n=len(ratios), **_interval(interval, "no interval of all"), **detail)


def _log_distances(figure: Metric) -> tuple[float, float] | None:
    """How far down and up the interval of a positive figure reaches, on logarithms; None without a positive one."""
    ends = figure.get("ci95")
    if not ends or ends[0] <= 0:
        return None
    return abs(math.log(ends[0] / figure["value"])), abs(math.log(ends[1] / figure["value"]))


def summarise(
    values: Sequence[float], unit: str, at_s: Sequence[float] = (), run: int | None = None, **detail: Any
) -> dict[str, Any]:
    """Every figure that a report may want of one series, and the raw samples; `detail` is added as it is.

    `run`: the series is made of runs of so many samples, with a break after each; a gap is a difference within a run.

    Keys: unit, n, median and p50 (with ci95), mean (with ci95), std, min, max, p90, p95, p99 (with ci95),
    p99_minus_p50, variance, iqr, mad (median absolute deviation), gap_variance (of the differences of neighbours),
    longest_stall (how far the largest sample lies above the median, with its index and, where `at_s` tells it, the
    seconds since the series began), relative_error (:func:`relative_standard_error`, where it is finite), samples (all
    of them, in order).

    Raises:
        ValueError: no samples, or one that is not finite: a failed measurement must not become a figure.
    """
    v = _finite(values)
    n, square = len(v), f"{unit}^2"

    def spread(value: float, u: str) -> Metric:
        return measured(float(value), u) if n > 1 else missing(f"needs 2 samples, has {n}", u)

    gaps = np.diff(v)
    if run:
        gaps = gaps[np.arange(1, n) % run != 0]
    mid = float(np.median(v))
    p50, p99 = median(values, unit), percentile(values, 99, unit)
    error = relative_standard_error(v)
    worst = int(v.argmax())
    return {
        "unit": unit,
        "n": n,
        "median": p50,
        "mean": _mean(v, unit),
        "std": spread(v.std(ddof=1) if n > 1 else 0.0, unit),
        "min": measured(float(v.min()), unit),
        "max": measured(float(v.max()), unit),
        "p50": p50,
        "p90": percentile(values, 90, unit),
        "p95": percentile(values, 95, unit),
        "p99": p99,
        "p99_minus_p50": missing(p99["reason"], unit) if p99["value"] is None else measured(p99["value"] - mid, unit),
        "variance": spread(v.var(ddof=1) if n > 1 else 0.0, square),
        "iqr": spread(float(np.subtract(*np.percentile(v, [75, 25]))), unit),
        "mad": spread(float(np.median(np.abs(v - mid))), unit),
        "gap_variance": (
            measured(float(gaps.var(ddof=1)), square)
            if len(gaps) > 1
            else missing(f"needs 2 gaps, has {len(gaps)}", square)
        ),
        "longest_stall": measured(
            float(v[worst]) - mid, unit, index=worst, **({"at_s": round(at_s[worst], 6)} if len(at_s) else {})
        ),
        **({"relative_error": error} if math.isfinite(error) else {}),
        **detail,
        "samples": [float(f"{s:.6g}") for s in v],
    }
