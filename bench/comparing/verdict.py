"""Is one measurement slower than another? Intervals of a ratio, and the verdict that they allow.

Everything is a ratio of costs, new over old, on a log scale: above 1 is slower, or dearer.

**The interval of one ratio** (95 %) is the wider, on each side, of two:

    order statistics    each median's own interval (:func:`..statistics.median_interval`), joined by the method of
                        variance estimates recovery (Zou and Donner 2008). It takes the samples as independent.
    batches             the samples in up to :data:`BATCHES` stretches of time, the spread of the stretches' medians and
                        Student's t, widened where neighbouring stretches are alike: what drifts, or has two modes,
                        is not known better for having many samples. Where sample i is the same work in both runs
                        (token i of a growing context), the stretches are compared pair by pair, which takes the common
                        trend out; order statistics, blind to it, are then left out.

From 2 to 5 samples: Student's t of their logarithms. Without samples: the interval that the file gives. With neither:
unknown, and taken to be twice the margin. A metric other than the median: bootstrap of moving blocks, seeded.

**What two runs of the same thing differ by** is more than their intervals say: clocks, the placement of memory, the
state of the host. It is a margin of its own, and depends on what sets the row's pace (:data:`MARGINS`), which the row
declares: scatter does not change it, or a change that adds scatter would hide itself. But where single samples scatter,
so do the medians of runs: what two runs differ by is then at least the interquartile range. Interval and margin are
independent errors: their squares add.

**What the host paces** is compared by the fastest tenth of its samples (:data:`METRIC_OF_PACE`), if there are enough:
other work on the host only ever adds time, to a tenth of the calls in one run and to half of them in the next.

**The verdict**, with `total` the half-width of both together and `margin` that of :data:`MARGINS`:

    SLOWER, FASTER      the ratio lies beyond `total`: the difference is real
    SAME                ratio and `total` together stay within twice the `margin`: the ratio lies within the `margin`,
                        and there is no difference twice as large; of what the host or a server paces the interval is
                        also no wider than half the `margin`, which is wide
    AMBIGUOUS           neither: measured too coarsely, or a small difference
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from .. import statistics
from .rows import Row

SAME, FASTER, SLOWER, AMBIGUOUS = "SAME", "FASTER", "SLOWER", "AMBIGUOUS"

MARGINS = {"gpu": 0.025, "host": 0.40, "server": 0.10, "board": 0.05, "boards": 0.10}
"""By :func:`pace_of`: half the width of the range of 95 % of the ratios between two runs of the same thing.

From two pairs of runs of one command, each on one H200 of a virtual machine (one of them in bench/results/h200). What
the GPU paces differed by 0.2 and 0.5 % (root mean square, at most 1.8 %), energy by 0.2 and 2.5 %, and what the host
paces by 9 and 23 %: its speed changed from minute to minute. Sensors of two boards differ by up to 10 %, as their maker
says.

`server`: from ten runs of `edgellm bench server` (20 requests of 64 tokens) against llama-cpp-python's server on two
cores that other programs used too: of the 45 pairs 95 % differed by at most 9 %, in tokens/s and in the time to the
first token. Of 18 more runs, while others took both cores, some took up to 2.7 times as long: no margin covers that.
"""

METRIC_OF_PACE = {"gpu": "median", "host": "p10", "server": "median", "board": "median", "boards": "median"}
"""What is compared unless a metric is asked for; the median where a file has too few samples for it."""

BATCHES = 16
_FEWEST_BATCHES = 5
_BATCH_SAMPLES = 4
_DRAWS = 400
_BLOCKS = 16


@dataclass(frozen=True)
class Ratio:
    """Cost of the new over that of the old.

    Attributes:
        value: above 1: slower.
        interval: 95 %, of these two runs alone; None where it is unknown.
        pace: what sets it: ``"gpu"``, ``"host"``, ``"server"``, ``"board"`` or ``"boards"``, see :func:`pace_of`.
        margin: of that pace.
        total: half-width, as a logarithm, of interval and margin together, on the lower and on the upper side.
        verdict: one of SAME, FASTER, SLOWER, AMBIGUOUS.
    """

    value: float
    interval: tuple[float, float] | None
    pace: str
    margin: float
    total: tuple[float, float]
    verdict: str


def ratio(old: Row, new: Row, metric: str = "median", margin: float | None = None) -> Ratio:
    """Compare two rows that have the `metric` (:meth:`.rows.Row.figure` is positive).

    A slowdown of a row that ran throttled is AMBIGUOUS, and so is what looks faster than one that did.

    Args:
        margin: instead of that of :data:`MARGINS`.
    """
    a, b = old.figure(metric), new.figure(metric)
    if a is None or b is None or a <= 0 or b <= 0:
        raise ValueError(f"{old.name}: {metric} is {a} and {b}, expected two positive numbers")
    value = math.log(b / a) * (-1 if old.better == "higher" else 1)
    pace = pace_of(old, new)
    if margin is None:
        margin = MARGINS[pace]
    allowed = math.log1p(margin)
    interval = _interval(old, new, metric, value)
    below, above = (value - interval[0], interval[1] - value) if interval else (2 * allowed, 2 * allowed)
    between = max(allowed, _scatter(old, new) if metric == "median" else 0.0)
    total = math.hypot(below, between), math.hypot(above, between)
    verdict = _verdict(value, total, allowed)
    if verdict == SAME and pace in ("host", "server") and above + below > allowed / 2:
        verdict = AMBIGUOUS
    if (verdict == SLOWER and new.throttled) or (verdict == FASTER and old.throttled):
        verdict = AMBIGUOUS
    limits = (math.exp(interval[0]), math.exp(interval[1])) if interval else None
    return Ratio(math.exp(value), limits, pace, margin, total, verdict)


def pace_of(old: Row, new: Row) -> str:
    """What sets the pace of two rows of one quantity: the less steady one of what they declare.

    Energy: ``"board"`` if both are of one board, else ``"boards"``.
    """
    if "board" in (old.pace, new.pace):
        boards = {row.facts.get("board") for row in (old, new)}
        return "board" if len(boards) == 1 and None not in boards else "boards"
    return max(old.pace, new.pace, key=MARGINS.__getitem__)


def default_metric(old: Row, new: Row) -> str:
    """The metric by which two rows are compared when none is asked for; see :data:`METRIC_OF_PACE`."""
    metric = METRIC_OF_PACE[pace_of(old, new)]
    return metric if old.figure(metric) is not None and new.figure(metric) is not None else "median"


def _verdict(value: float, total: tuple[float, float], allowed: float) -> str:
    if value - total[0] > 0:
        return SLOWER
    if value + total[1] < 0:
        return FASTER
    return SAME if value - total[0] > -2 * allowed and value + total[1] < 2 * allowed else AMBIGUOUS


def geometric_mean(ratios: list[float], seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Of at least one ratio; with the 95 % interval of a bootstrap over the rows (1,000 draws), None below 3 rows.

    The interval says how far the mean rests on which rows there are, not how well each was measured.
    """
    logs = np.log(ratios)
    mean = float(np.exp(logs.mean()))
    if len(logs) < 3:
        return mean, None
    draws = np.random.default_rng(seed).choice(logs, (1000, len(logs))).mean(axis=1)
    low, high = np.exp(np.percentile(draws, [2.5, 97.5]))
    return mean, (float(low), float(high))


# ---- intervals ------------------------------------------------------------------------------------------------------


def _logs(row: Row) -> np.ndarray:
    """Logarithms of the costs; empty without usable samples."""
    if not row.samples or min(row.samples) <= 0:
        return np.empty(0)
    return np.log(row.costs())


def _interval(old: Row, new: Row, metric: str, value: float) -> tuple[float, float] | None:
    """Lower and upper limit of the log ratio."""
    a, b = _logs(old), _logs(new)
    paired = _is_paired(old, new, a, b)
    if metric != "median":
        return _bootstrap(a, b, paired, metric, zlib.crc32(old.match.encode()))
    batches = _batches(a, b, paired)
    if paired and batches is not None:
        return value - batches, value + batches
    one, other = _own(old, a), _own(new, b)
    if one is None or other is None:
        return None
    below, above = math.hypot(one[1], other[0]), math.hypot(one[0], other[1])
    return value - max(below, batches or 0.0), value + max(above, batches or 0.0)


def _own(row: Row, logs: np.ndarray) -> tuple[float, float] | None:
    """How far the interval of one row's log cost reaches below and above it."""
    if 2 <= len(logs) < 6:
        half = statistics.student95(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
        return half, half
    if len(logs):
        limits = statistics.median_interval(logs.tolist())
        middle = float(np.median(logs))
    elif row.interval and row.value and min(*row.interval, row.value) > 0:
        sign = -1 if row.better == "higher" else 1
        limits = sorted(sign * math.log(limit) for limit in row.interval)  # type: ignore[assignment]
        middle = sign * math.log(row.value)
    else:
        return None
    return None if limits is None else (max(middle - limits[0], 0.0), max(limits[1] - middle, 0.0))


def _batches(a: np.ndarray, b: np.ndarray, paired: bool) -> float | None:
    """Half-width from the medians of stretches of time; None where a row has too few samples."""
    counts = [min(BATCHES, len(logs) // _BATCH_SAMPLES) for logs in (a, b)]
    if min(counts) < _FEWEST_BATCHES:
        return None
    medians = [_stretches(logs, count) for logs, count in zip((a, b), counts, strict=True)]
    if paired:
        return _batch_half(medians[1] - medians[0])
    return math.hypot(*map(_batch_half, medians))


def _stretches(logs: np.ndarray, count: int) -> np.ndarray:
    return np.array([np.median(stretch) for stretch in np.array_split(logs, count)])


def _batch_half(medians: np.ndarray) -> float:
    n, spread = len(medians), float(medians.std(ddof=1))
    if not spread:
        return 0.0
    centred = medians - medians.mean()
    alike = float(centred[:-1] @ centred[1:]) / float(centred @ centred)
    alike = min(max(alike, 0.0), 0.9)  # negative: chance; close to 1: a drift, of which n stretches tell no more
    return statistics.student95(n - 1) * spread / math.sqrt(n) * math.sqrt((1 + alike) / (1 - alike))


def _scatter(old: Row, new: Row) -> float:
    """Interquartile range of the log costs of single samples, the larger of both; without the pattern of the work."""
    found, (a, b) = 0.0, (_logs(old), _logs(new))
    if _is_paired(old, new, a, b):
        return _range(b - a) / math.sqrt(2)
    for row, logs in ((old, a), (new, b)):
        # Differences of neighbours have no trend, and sqrt(2) times the spread of what has none.
        found = max(found, _range(np.diff(logs)) / math.sqrt(2) if row.positional else _range(logs))
    return found


def _range(values: np.ndarray) -> float:
    return float(np.subtract(*np.percentile(values, [75, 25]))) if len(values) > 1 else 0.0


def _is_paired(old: Row, new: Row, a: np.ndarray, b: np.ndarray) -> bool:
    return old.positional and new.positional and len(a) == len(b) > 0


def _bootstrap(a: np.ndarray, b: np.ndarray, paired: bool, metric: str, seed: int) -> tuple[float, float] | None:
    """Of moving blocks, each a sixteenth of the series: what follows on each other stays together."""
    if min(len(a), len(b)) < 6:
        return None
    rng = np.random.default_rng(seed)
    first = _resampled(rng, len(a))
    second = first if paired else _resampled(rng, len(b))
    low, high = np.percentile(_of_each(b[second], metric) - _of_each(a[first], metric), [2.5, 97.5])
    return float(low), float(high)


def _resampled(rng: np.random.Generator, n: int) -> np.ndarray:
    """Indices [_DRAWS, n]."""
    length = max(1, n // _BLOCKS)
    starts = rng.integers(0, n - length + 1, (_DRAWS, -(-n // length)))
    return (starts[:, :, None] + np.arange(length)).reshape(_DRAWS, -1)[:, :n]


def _of_each(logs: np.ndarray, metric: str) -> np.ndarray:
    """The metric of each row [draws, n], as a logarithm."""
    if metric == "mean":
        return np.log(np.exp(logs).mean(axis=1))
    quantile = {"min": 0, "max": 100}.get(metric)
    return np.percentile(logs, float(metric[1:]) if quantile is None else quantile, axis=1)
