"""One report against others: what is the same, what is faster or slower, and what cannot be compared.

    comparison = compare([baseline, other, ...], fail="median:5%")
    print(markdown(comparison)); sys.exit(comparison.exit_code)

The first path is the baseline; each other one is compared with it alone. Files of other engines are read too
(:mod:`.imports`). Rows are the same quantity if their `match` is (:mod:`.rows`); of several rows of one `match` in a
file, the `options` by which those of either file differ tell which belong together. The verdict is :mod:`.verdict`'s.
What a reader must know comes first: where the environments differ, then what cannot be compared, then the rows.

**Boundaries**: a ratio of times that do not hold the same work (a kernel, an engine, a client with its network; or
requests of other lengths) is refused; `force` computes it, marks it, and keeps it out of every mean and of `fail`.
Weight bits, KV type and batch may differ: they are shown.

**fail**: ``METRIC:PERCENT%``, for example ``median:5%``. The comparison fails where a row that is no yardstick is
SLOWER and its cost has grown by more than that; where a row that the baseline measured has a wrong result now, or is
missing because its part failed; and where the run has wrong results, or its decoder was not checked, unlike the
baseline's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ArgumentValueError, EdgeLLMError
from ...exit_codes import EXIT_DONE, EXIT_REGRESSION
from ..metrics import is_metric
from ..reporting import report
from ..reporting.document import warnings
from . import imports, verdict
from .comparison_text import markdown, terminal
from .rows import METRICS, WORK, YARDSTICKS, Row, rows_of

__all__ = ["Comparison", "compare", "markdown", "parse_fail", "terminal", "to_json"]


class CompareError(EdgeLLMError, ValueError):
    """Files that cannot be compared; the message names them."""


class FailRuleError(ArgumentValueError):
    """A `fail` that is no rule: wrong usage."""


@dataclass(frozen=True)
class Fail:
    """``METRIC:PERCENT%``: the metric that is compared, and by how much a cost may grow (0.05 for 5 %)."""

    metric: str
    by: float


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        kind: which program wrote it, see :mod:`.imports`.
        environment: what it says about itself: name -> text.
        warnings: what must be known before any figure.
        failures: one line for each result that was wrong.
        errors: part that failed, or "PART/ROW" of a row -> why.
    """

    path: Path
    kind: str
    rows: list[Row]
    environment: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """Two rows of the same quantity and their ratio, by `metric`.

    Attributes:
        forced: why the ratio would be refused; empty where it would not.
        facts: those that differ, name -> the old and the new one.
        fails: by the rule of the comparison.
        undecided: the cost has grown by more than the rule allows, but is not known to have.
    """

    old: Row
    new: Row
    metric: str
    ratio: verdict.Ratio
    forced: str
    facts: dict[str, tuple[Any, Any]]
    fails: bool
    undecided: bool

    @property
    def counts(self) -> bool:
        """Does it belong into means and counts? Not a yardstick, nor a ratio across boundaries."""
        return not self.forced and not self.old.yardstick


@dataclass(frozen=True)
class Refused:
    """Two rows that are not compared, and why. `wrong`: because the new one's result is wrong."""

    old: Row
    new: Row
    reason: str
    wrong: bool = False


@dataclass(frozen=True)
class Mean:
    """Geometric mean of the cost ratios of `n` rows; see :func:`.verdict.geometric_mean`."""

    n: int
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Against:
    """The baseline and one other file.

    Attributes:
        differences: what differs between the environments: (name, old, new), None where one file does not tell.
        refused: rows of both files that are not compared.
        only_old, only_new: rows of one file only.
        broken: a line for each thing that went wrong in the new run, and not in the baseline's.
        groups: group -> its rows, the worst first; the group with the worst row first, yardsticks last.
        mean: of all rows that count; None if there are none. `means`: of each group.
    """

    new: Source
    differences: list[tuple[str, str | None, str | None]]
    refused: list[Refused]
    only_old: list[Row]
    only_new: list[Row]
    broken: list[str]
    groups: dict[str, list[Judged]]
    mean: Mean | None
    means: dict[str, Mean]

    @property
    def judged(self) -> list[Judged]:
        return [row for rows in self.groups.values() for row in rows]

    @property
    def failed(self) -> list[str]:
        """For what the comparison fails: names of rows, and what is broken."""
        wrong = [f"{r.old.group}: {r.old.name} (wrong result)" for r in self.refused if r.wrong]
        return [f"{row.old.group}: {row.old.name}" for row in self.judged if row.fails] + wrong + self.broken

    @property
    def undecided(self) -> list[Judged]:
        """Rows over the limit of the rule that do not fail."""
        return [row for row in self.judged if row.undecided]

    def counts(self, pace: str | None = None) -> Counter[str]:
        """How many rows have which verdict: those that count, of one pace if that is given."""
        return Counter(row.ratio.verdict for row in self.judged if row.counts and pace in (None, row.ratio.pace))


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. `metric` and `margin` are None where each row has its own."""

    baseline: Source
    others: list[Against]
    fail: Fail | None
    metric: str | None
    margin: float | None

    @property
    def exit_code(self) -> int:
        """:data:`EXIT_REGRESSION` if there is a rule and something fails it."""
        failed = self.fail is not None and any(against.failed for against in self.others)
        return EXIT_REGRESSION if failed else EXIT_DONE


def compare(
    paths: Sequence[Path | str],
    *,
    fail: str | None = None,
    force: bool = False,
    margin: float | None = None,
    metric: str | None = None,
) -> Comparison:
    """Compare the files at `paths` with the first of them. A folder stands for the report.json in it.

    Args:
        fail: a rule, see the module; its metric is then compared.
        force: compare across boundaries too.
        margin: what two runs of the same thing may differ by (0.025 for 2.5 %), instead of :data:`.verdict.MARGINS`.
        metric: one of :data:`.rows.METRICS`, instead of :data:`.verdict.METRIC_OF_PACE`.

    Raises:
        ArgumentValueError: fewer than two paths, an unknown metric, a margin that is none; FailRuleError, which is one:
            `fail` is no rule.
        ReportError, ImportFileError: a file cannot be read, or is no result that is known.
        CompareError: no row of a file is in the baseline, or a file has rows that nothing tells apart.
    """
    rule = parse_fail(fail) if fail is not None else None
    if rule and metric not in (None, rule.metric):
        raise ArgumentValueError(f"metric is {metric!r}, but fail is {fail!r}: expected the same metric")
    metric = rule.metric if rule else metric
    if metric not in (None, *METRICS):
        raise ArgumentValueError(f"metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if margin is not None and not 0 < margin < 1:
        raise ArgumentValueError(f"margin is {margin}, expected a fraction above 0 and below 1, for example 0.025")
    if len(paths) < 2:
        raise ArgumentValueError(f"{len(paths)} file to compare, expected a baseline and at least one other")
    baseline, *others = [read(Path(path)) for path in paths]
    found = [_against(baseline, other, rule, metric, margin, force) for other in others]
    return Comparison(baseline, found, rule, metric, margin)


def parse_fail(text: str) -> Fail:
    """The rule ``METRIC:PERCENT%``.

    Raises:
        FailRuleError: it is none.
    """
    expected = "expected METRIC:PERCENT%, for example median:5%"
    metric, colon, amount = text.partition(":")
    if not colon:
        raise FailRuleError(f"fail is {text!r}, which names no metric: {expected}")
    if metric not in METRICS:
        raise FailRuleError(f"fail is {text!r}: the metric is {metric!r}, expected one of {', '.join(METRICS)}")
    if not re.fullmatch(r"\d+(\.\d+)?%", amount):
        raise FailRuleError(f"fail is {text!r}: the amount is {amount!r}, {expected}")
    return Fail(metric, float(amount[:-1]) / 100)


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> Source:
    """Read a report of ours, of any version that :func:`..reporting.report.load` reads, or a file of another engine.

    Raises:
        ReportError, ImportFileError: it cannot be read, or is no result that is known.
    """
    if path.is_dir():
        path = path / "report.json"
    value = imports.read_json(path)
    kind = imports.kind_of(value)
    try:
        if kind != imports.EDGELLM:
            other = imports.imported(value, path)
            return Source(path, other.kind, other.rows, other.environment)
        ours = report.checked(value, path)
        errors = {key: error["reason"] for key, error in ours["errors"].items()}
        return Source(path, kind, rows_of(ours), environment(ours), warnings(ours), ours["failures"], errors)
    except EdgeLLMError:
        raise
    except report.MALFORMED as e:
        error = report.ReportError if kind == imports.EDGELLM else imports.ImportFileError
        raise error(f"{path}: not as {kind} writes it: {type(e).__name__} {e}") from e


def environment(report: dict[str, Any]) -> dict[str, str]:
    """What a report says about its program, machine and options, as text; nothing for what it does not know."""
    parts = report["parts"]
    reproducibility = parts.get("reproducibility", {})
    known = {**report.get("environment", {}), **parts.get("hardware", {}), **reproducibility.get("source", {})}
    model = report["model"] or {}
    found: dict[str, Any] = {
        "commit": known.get("git_commit"),
        "modified files": known.get("git_modified"),
        "program": report["workload"].get("benchmark_version"),
        "backend": report["backend"],
        "gpu": known.get("gpu_model"),
        "gpu uuid": known.get("gpu_uuid"),
        "driver": known.get("driver_version"),
        "cuda": known.get("cuda_version"),
        "nvrtc": known.get("nvrtc_version"),
        "build flags": reproducibility.get("build_flags"),
        "max SM clock": known.get("max_sm_clock_mhz"),
        "max memory clock": known.get("max_memory_clock_mhz"),
        "SM clock at work": _of_conditions(parts, "sm_clock_mhz"),
        "temperature at work": _of_conditions(parts, "temperature_c"),
        "clock locking": reproducibility.get("clock_locking"),
        "power limit": known.get("power_limit_w"),
        "persistence mode": known.get("persistence_mode"),
        "MIG": known.get("mig_mode"),
        "cpu": known.get("cpu_model"),
        "cpu threads": known.get("cpu_threads_usable"),
        "os": known.get("os_version"),
        "python": reproducibility.get("python", {}).get("version"),
        **reproducibility.get("versions", {}),
        "server": known.get("server_engine"),
        "url": known.get("server_url"),
        "tuned choices": known.get("tuned"),
        "model": report["workload"].get("model_name"),
        "weights": model.get("weights"),
        **{f"decoder {key}": value for key, value in (model.get("decoder") or {}).items()},
        "quick": report["quick"],
        "interrupted": report["interrupted"],
        "options": _options(report["command"]),
    }
    return {key: text for key, value in found.items() if (text := _text(value))}


def _of_conditions(parts: dict[str, Any], key: str) -> Any:
    """Of the GPU while it decoded, the first part that tells."""
    for name in ("tokens", "scaling", "utilisation"):
        conditions = parts.get(name, {}).get("conditions", parts.get(name, {}))
        if isinstance(conditions, dict) and is_metric(conditions.get(key)):
            return conditions[key]
    return None


def _options(command: str) -> str:
    """The command line without what says where the report goes."""
    return re.sub(r"\s+--out[ =]\S+", "", command)


def _text(value: Any) -> str:
    if is_metric(value):
        if value["value"] is None:
            return ""
        return " ".join(filter(None, [_text(value["value"]), value.get("unit")]))
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- comparing ------------------------------------------------------------------------------------------------------


def _against(
    old: Source, new: Source, rule: Fail | None, metric: str | None, margin: float | None, force: bool
) -> Against:
    partners = _partners(old, new)
    judged: list[Judged] = []
    refused: list[Refused] = []
    only_old: list[Row] = []
    used: set[int] = set()
    for row in old.rows:
        other = partners.get(id(row))
        if other is None:
            only_old.append(row)
            continue
        used.add(id(other))
        found = _pair(row, other, rule, metric, margin, force)
        if isinstance(found, Judged):
            judged.append(found)
        else:
            refused.append(found)
    if not used:
        raise CompareError(
            f"{new.path} ({new.kind}) has no row that {old.path} ({old.kind}) has: "
            f"the first has {_some(new.rows)}; the second has {_some(old.rows)}"
        )
    groups = _grouped(judged)
    means = {name: mean for name, rows in groups.items() if (mean := _mean(rows))}
    return Against(
        new,
        _differences(old.environment, new.environment),
        refused,
        only_old,
        [row for row in new.rows if id(row) not in used],
        _broken(old, new, [*only_old, *(pair.old for pair in refused if pair.new.value is None and not pair.wrong)]),
        groups,
        _mean(judged),
        means,
    )


def _partners(old: Source, new: Source) -> dict[int, Row]:
    """`id` of a row of `old` -> the row of `new` that is the same quantity.

    Raises:
        CompareError: rows of one file that nothing tells apart, where the other file has the quantity too.
    """
    found = {}
    news = _by_match(new)
    for match, mine in _by_match(old).items():
        others = news.get(match, [])
        keys = [*_telling(mine), *_telling(others)] if others else []
        there = _identified(new, others, keys)
        here = _identified(old, mine, keys) if others else {}
        for (boundary, settings), row in here.items():
            # Across boundaries only what has no partner of its own.
            other = there.get((boundary, settings)) or next(
                (each for of, each in there.items() if of[1] == settings and of not in here), None
            )
            if other is not None:
                found[id(row)] = other
    return found


def _by_match(source: Source) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in source.rows:
        found.setdefault(row.match, []).append(row)
    return found


def _telling(rows: Sequence[Row]) -> list[str]:
    """The options by which rows of one file differ."""
    keys = dict.fromkeys(key for row in rows for key in row.options)
    return [key for key in keys if len({row.options.get(key) for row in rows}) > 1]


_Identity = tuple[str, tuple[str | None, ...]]


def _identified(source: Source, rows: Sequence[Row], keys: Sequence[str]) -> dict[_Identity, Row]:
    """Boundary and values of the options `keys` -> the row."""
    found: dict[_Identity, Row] = {}
    for row in rows:
        twin = found.setdefault((row.boundary, tuple(row.options.get(key) for key in keys)), row)
        if twin is not row:
            raise CompareError(
                f"{source.path}: has {row.group}: {row.name} more than once, expected one, or options that differ"
            )
    return found


def _broken(old: Source, new: Source, lost: Iterable[Row]) -> list[str]:
    """`lost`: rows of the old run that have no figure in the new one."""
    found = [] if old.failures else [f"wrong result: {failure}" for failure in new.failures]
    check = "decoder_check"
    if not found and check in new.errors and check not in old.errors:
        found.append(f"{check}: {new.errors[check]}")
    counts = Counter(row.part for row in lost if row.value is not None and not row.yardstick)
    for part, count in counts.items():
        reasons = [reason for key, reason in new.errors.items() if key.partition("/")[0] == part]
        if reasons:
            found.append(f"{part}: {count} row{'s' * (count > 1)} missing: {reasons[0]}")
    return found


def _some(rows: Sequence[Row]) -> str:
    return ", ".join(row.name for row in rows[:3]) + (", ..." if len(rows) > 3 else "") if rows else "no row"


def _pair(
    old: Row, new: Row, rule: Fail | None, metric: str | None, margin: float | None, force: bool
) -> Judged | Refused:
    forced = _other_work(old, new)
    if forced and not force:
        return Refused(old, new, forced)
    chosen = metric or verdict.default_metric(old, new)
    if new.value is None and new.wrong and old.value is not None:  # also where the baseline has too few samples
        return Refused(old, new, f"new: {new.reason}", wrong=True)
    for which, row in (("baseline", old), ("new", new)):
        value = row.figure(chosen)
        if row.value is None:
            return Refused(old, new, f"{which}: {row.reason or 'not measured'}")
        if value is None:
            return Refused(old, new, f"{which}: too few samples for {chosen}")
        if not (value > 0 and math.isfinite(value)):
            return Refused(old, new, f"{which}: {value:g} {row.unit}, of which there is no ratio")
    if old.unit != new.unit:
        return Refused(old, new, f"unit {old.unit} against {new.unit}")
    ratio = verdict.ratio(old, new, chosen, margin)
    facts = {
        key: (old.facts[key], new.facts[key])
        for key in old.facts
        if key in new.facts and old.facts[key] != new.facts[key]
    }
    over = rule is not None and not forced and not old.yardstick and ratio.value > 1 + rule.by
    slower = ratio.verdict == verdict.SLOWER
    return Judged(old, new, chosen, ratio, forced, facts, over and slower, over and not slower)


def _other_work(old: Row, new: Row) -> str:
    """Why the times of two rows do not hold the same work; empty where they do, as far as the files tell."""
    if old.boundary != new.boundary:
        return f"boundary {old.boundary} against {new.boundary}"
    for key in WORK:
        a, b = old.facts.get(key), new.facts.get(key)
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            continue
        # Lengths are means in some files: what is closer than two runs of one server are is no other work.
        if max(a, b) > min(a, b) * (1 + verdict.MARGINS["server"]):
            return f"{key} {a:g} against {b:g}"
    return ""


def _grouped(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for row in judged:
        groups.setdefault(row.old.group, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: -row.ratio.value)
    return dict(sorted(groups.items(), key=lambda item: (item[0] == YARDSTICKS, -item[1][0].ratio.value)))


def _mean(judged: Iterable[Judged]) -> Mean | None:
    ratios = [row.ratio.value for row in judged if row.counts]
    return Mean(len(ratios), *verdict.geometric_mean(ratios)) if ratios else None


def _differences(old: dict[str, str], new: dict[str, str]) -> list[tuple[str, str | None, str | None]]:
    names = dict.fromkeys([*old, *new])
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Everything as plain values, for :func:`json.dumps`. Ratios are costs, new over old: above 1 is slower."""

    def side(row: Row, metric: str) -> dict[str, Any]:
        return {
            "value": row.figure(metric),
            "interval": row.interval if metric == "median" else None,
            "n": len(row.samples) or None,
            "throttled": row.throttled,
        }

    def names(rows: Iterable[Row]) -> list[dict[str, str]]:
        return [{"group": row.group, "name": row.name, "boundary": row.boundary} for row in rows]

    def judged(row: Judged) -> dict[str, Any]:
        return {
            "group": row.old.group,
            "name": row.old.name,
            "boundary": [row.old.boundary, row.new.boundary] if row.forced else row.old.boundary,
            "forced": bool(row.forced),
            "yardstick": row.old.yardstick,
            "metric": row.metric,
            "unit": row.old.unit,
            "better": row.old.better,
            "old": side(row.old, row.metric),
            "new": side(row.new, row.metric),
            "cost_ratio": row.ratio.value,
            "interval": row.ratio.interval,
            "pace": row.ratio.pace,
            "margin": row.ratio.margin,
            "verdict": row.ratio.verdict,
            "facts": row.facts,
            "fails": row.fails,
            "undecided": row.undecided,
        }

    def against(other: Against) -> dict[str, Any]:
        return {
            "path": str(other.new.path),
            "kind": other.new.kind,
            "warnings": other.new.warnings,
            "environment_differences": [{"name": name, "old": old, "new": new} for name, old, new in other.differences],
            "refused": [
                {"group": r.old.group, "name": r.old.name, "reason": r.reason, "wrong": r.wrong} for r in other.refused
            ],
            "only_old": names(other.only_old),
            "only_new": names(other.only_new),
            "rows": [judged(row) for row in other.judged],
            "counts": dict(other.counts()),
            "geometric_mean": asdict(other.mean) if other.mean else None,
            "geometric_means": {name: asdict(mean) for name, mean in other.means.items()},
            "failed": other.failed if comparison.fail else [],
        }

    return {
        "baseline": {
            "path": str(comparison.baseline.path),
            "kind": comparison.baseline.kind,
            "warnings": comparison.baseline.warnings,
        },
        "metric": comparison.metric,
        "margin": comparison.margin,
        "fail": asdict(comparison.fail) if comparison.fail else None,
        "exit_code": comparison.exit_code,
        "others": [against(other) for other in comparison.others],
    }
