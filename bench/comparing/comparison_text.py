"""A comparison (:mod:`.compare`) as text: for a terminal of 80 columns, and as Markdown.

Both say the same in the same order: where the environments differ, what cannot be compared, which facts of the rows
differ, the rows, their geometric means, and which rows fail. A change is that of the cost: more time or energy is
positive, whatever way the unit of the row goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..reporting import document
from ..reporting.document import Heading, Paragraph
from ..reporting.markdown import write
from .verdict import AMBIGUOUS, FASTER, MARGINS, SAME, SLOWER

if TYPE_CHECKING:
    from .compare import Against, Comparison, Judged, Mean
    from .rows import Row

_COLOURS = {SAME: "", FASTER: "green", SLOWER: "red", AMBIGUOUS: "yellow"}
_PACES = {
    "gpu": "paced by the GPU",
    "host": "paced by the host",
    "server": "of a server",
    "board": "energy",
    "boards": "energy, of two boards",
}
_MEAN_NOTE = "interval: bootstrap over the rows, 1,000 draws, seeded; yardsticks are left out"
_COST = "cost is time or energy, for a rate its inverse: + is slower or dearer"


def terminal(comparison: Comparison, every_row: bool = False) -> Group:
    """For 80 columns and more. `every_row`: also those that are the same, and the names of those of one file only."""
    return Group(*(part for other in comparison.others for part in _terminal(comparison, other, every_row)))


def _terminal(comparison: Comparison, other: Against, every_row: bool) -> Iterable[RenderableType]:
    old, new = comparison.baseline, other.new
    yield Text(f"A  {old.path}  ({old.kind})\nB  {new.path}  ({new.kind})", style="bold")
    for name, source in (("A", old), ("B", new)):
        for warning in source.warnings:
            yield Text(f"{name}: {warning}", style="yellow")

    yield _heading("Environment")
    if other.differences:
        table = Table(box=None, pad_edge=False)
        table.add_column("differs", no_wrap=True)
        for column in "AB":
            table.add_column(column, overflow="fold")
        for name, a, b in other.differences:
            table.add_row(*map(Text, (name, a or "-", b or "-")))
        yield table
    else:
        yield Text("nothing differs")

    if left_out := _left_out(other, every_row):
        yield _heading("Not compared")
        yield from map(Text, left_out)
    if facts := _facts(other.judged):
        yield _heading("What differs between compared rows")
        yield from map(Text, facts)

    yield _heading(f"Rows ({_COST})")
    for group, rows in other.groups.items():
        shown = [row for row in rows if every_row or row.ratio.verdict != SAME or row.fails]
        same = len(rows) - len(shown)
        rest = f"{same} SAME" if same else ""
        if not shown:
            yield Text(f"{group}: {rest}")
            continue
        unit, titles = _unit(rows)
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column(Text(f"{group}{unit}"), overflow="fold")
        for column in ("A", "B", "cost", "95 %"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("")
        for row in shown:
            cells = [f"{titles(row)}{_marks(row)}", *_figures(row)]
            table.add_row(*map(Text, cells), Text(row.ratio.verdict, style=_COLOURS[row.ratio.verdict]))
        yield table
        if rest:
            yield Text(f"and {rest}", style="dim")
    yield Text("")
    for line in _counts(other):
        yield Text(line)

    if other.mean:
        yield _heading("Geometric mean of the costs, B over A")
        table = Table(box=None, pad_edge=False)
        for column in ("", "rows", "mean", "95 %"):
            table.add_column(column, justify="left" if not column else "right")
        for name, mean in {"all": other.mean, **other.means}.items():
            table.add_row(name, str(mean.n), *_mean(mean))
        yield table
        yield Text(_MEAN_NOTE, style="dim")
    for line in _outcome(comparison, other):
        yield Text(line, style="bold red" if other.failed else "bold")
    yield Text("")


def markdown(comparison: Comparison) -> str:
    """Everything, all rows of it."""
    lines: list[str] = []
    for other in comparison.others:
        lines += [*_markdown(comparison, other), ""]
    return "\n".join(lines)


def _markdown(comparison: Comparison, other: Against) -> Iterable[str]:
    old, new = comparison.baseline, other.new
    yield from ("# edgellm compare", "", f"- A: `{old.path}` ({old.kind})", f"- B: `{new.path}` ({new.kind})")
    for name, source in (("A", old), ("B", new)):
        yield from (f"- **{name}: {_line(warning)}**" for warning in source.warnings)
    differences = [[name, a or "-", b or "-"] for name, a, b in other.differences]
    yield from write([Heading(2, "Environment")])
    yield from write([document.Table(["differs", "A", "B"], differences)]) if differences else ("", "nothing differs")
    for title, found in (
        ("Not compared", _left_out(other, True)),
        ("What differs between compared rows", _facts(other.judged)),
    ):
        if found:
            yield from (*write([Heading(2, title)]), "", *(f"- {_line(line)}" for line in found))
    yield from write([Heading(2, "Rows"), Paragraph(f"{_COST}.")])
    for group, rows in other.groups.items():
        unit, titles = _unit(rows)
        lines = [[f"{titles(row)}{_marks(row)}", *_figures(row), _strong(row)] for row in rows]
        yield from write(
            [Heading(3, f"{group}{unit}"), document.Table(["row", "A", "B", "cost", "95 %", "verdict"], lines)]
        )
    yield from ("", *(f"- {line}" for line in _counts(other)))
    if other.mean:
        means = [[name, str(m.n), *_mean(m)] for name, m in {"all": other.mean, **other.means}.items()]
        yield from write([
            Heading(2, "Geometric mean of the costs, B over A"),
            document.Table(["", "rows", "mean", "95 %"], means),
            Paragraph(f"{_MEAN_NOTE}."),
        ])  # fmt: skip
    for line in _outcome(comparison, other):
        yield from write([Paragraph(f"**{line}**")])


# ---- shared ---------------------------------------------------------------------------------------------------------


def _heading(title: str) -> Text:
    return Text(f"\n{title}", style="bold")


def _left_out(other: Against, names: bool) -> list[str]:
    """One line for each reason, with the rows' names or their number."""
    by_reason: dict[str, list[Row]] = {}
    for refused in other.refused:
        by_reason.setdefault(refused.reason, []).append(refused.old)
    lines = []
    for reason, rows in by_reason.items():
        lines.append(f"{len(rows)}, {reason}: {_names(rows) if names or len(rows) < 4 else rows[0].name + ', ...'}")
    for rows, where in ((other.only_old, "A"), (other.only_new, "B")):
        if rows:
            lines.append(f"{len(rows)} only in {where}" + (f": {_names(rows)}" if names else ""))
    return lines


def _names(rows: Iterable[Row]) -> str:
    return ", ".join(f"{row.group} {row.name}" for row in rows)


def _facts(judged: Sequence[Judged]) -> list[str]:
    found = Counter((key, str(a), str(b)) for row in judged for key, (a, b) in row.facts.items())
    return [f"{key}: {a} -> {b} ({n} row{'s' * (n > 1)})" for (key, a, b), n in found.items()]


def _unit(rows: Sequence[Judged]) -> tuple[str, Any]:
    """The unit for the heading, and what a row is called: with its unit, where they differ."""
    units = {row.old.unit for row in rows}
    if len(units) == 1:
        return f" ({units.pop()})", lambda row: row.old.name
    return "", lambda row: f"{row.old.name}, {row.old.unit}"


def _marks(row: Judged) -> str:
    marks = [row.metric] if row.metric != "median" else []
    if row.old.throttled or row.new.throttled:
        marks.append("throttled")
    if row.forced:
        marks.append(row.forced)
    if row.fails:
        marks.append("fails")
    return f" [{', '.join(marks)}]" if marks else ""


def _figures(row: Judged) -> list[str]:
    interval = row.ratio.interval
    return [
        *(_number(side.figure(row.metric)) for side in (row.old, row.new)),
        _change(row.ratio.value),
        f"{_change(interval[0])}..{_change(interval[1])}" if interval else "unknown",
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1e4 else f"{value:#.4g}".rstrip(".")


def _change(ratio: float) -> str:
    """In per cent; beyond a factor of 10 as that factor."""
    return f"x{ratio:.3g}" if ratio >= 10 else f"{100 * (ratio - 1):+.1f}%"


def _mean(mean: Mean) -> list[str]:
    low_high = " to ".join(map(_change, mean.interval)) if mean.interval else "unknown"
    return [_change(mean.value), low_high]


def _counts(other: Against) -> list[str]:
    lines = []
    for pace, title in _PACES.items():
        if counts := other.counts(pace):
            said = ", ".join(f"{counts[v]} {v}" for v in (SAME, FASTER, SLOWER, AMBIGUOUS) if counts[v])
            margins = sorted({row.ratio.margin for row in other.judged if row.counts and row.ratio.pace == pace})
            allowed = " or ".join(f"{100 * margin:g}" for margin in margins or [MARGINS[pace]])
            lines.append(f"{title}, runs differ by {allowed} %: {said}")
    return lines


def _outcome(comparison: Comparison, other: Against) -> list[str]:
    if not comparison.fail:
        return []
    limit = f"{100 * comparison.fail.by:g}"
    rule = f"{comparison.fail.metric}:{limit}%"
    failed = f"{len(other.failed)} failed: " + "; ".join(other.failed) if other.failed else "no row fails"
    lines = [f"{rule}: {failed if other.judged or other.failed else 'no row was compared'}"]
    if undecided := len(other.undecided):
        rows = "row is" if undecided == 1 else "rows are"
        lines.append(f"{undecided} {rows} over {limit} %, but no more than two runs of one thing may differ by")
    return lines


def _strong(row: Judged) -> str:
    return row.ratio.verdict if row.ratio.verdict == SAME else f"**{row.ratio.verdict}**"


def _line(text: str) -> str:
    return " ".join(text.split())
