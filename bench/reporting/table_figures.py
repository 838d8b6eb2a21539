"""The figures of the table of shapes (:mod:`..parts.table`) for readers, from JSON alone: lines, summary, text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from .. import statistics
from ..metrics import Metric, measured, missing
from . import layout

MIDDLE = ("2B4T", "Llama-8B")
"""Models that the figures of several tokens at once are judged by."""

Line = dict[str, Any]

COLUMNS = {
    "time": "time",
    "floor": "floor",
    "ratio": "ratio",
    "alone": "alone",
    "gb_per_s": "GB/s",
    "bandwidth_pct": "% bw",
    "warm": "warm",
    "cublas": "cuBLAS",
    "over_cublas": "faster",
    "product": "GEMM",
    "tera_ops": "TOP/s",
    "over_better": "/ best",
}
"""Figures of a line and their headings."""

BELOW_THE_FLOOR = (
    "Our launches may start before their predecessor has ended (programmatic dependent launch), the floor's never do: "
    "a ratio to the floor below 1 is no error."
)

NOTES = (
    "Medians in microseconds, float16 x and gamma, of RMSNorm + ternary product in CUDA graphs with a cold L2; `warm` "
    "repeats one copy of the weight. `floor` is a kernel that only reads the packed weight, each launch after the end "
    f"of the one before. {BELOW_THE_FLOOR} `alone` is our launch without that. `cuBLAS` is RMSNorm, then cublasGemmEx "
    "in float16, `faster` how many times as long that takes, `GEMM` the latter alone. "
    "`/ best`: over the better of the strategies streaming and separate. `% bw`: of the bandwidth of this run. "
    "A graph has at least 50 launches, or fewer that take 5 ms."
)


def lines(table: dict[str, Any], bandwidth: Metric | None = None) -> Iterator[Line]:
    """One for each shape, number of tokens and activation: what it is, its figures by the names of :data:`COLUMNS`,
    `row`, the entry of the JSON that they come from, and `throttled`, see :func:`throttled`. A figure that does not
    belong to the line is None.

    bandwidth: what `bandwidth_pct` refers to, for the mark of what ran throttled.
    """
    for shape in table["shapes"]:
        for entry in shape["tokens"]:
            cublas, product = (entry["baselines"][f"cublas_fp16{name}"]["cold"] for name in ("", "_product"))
            for row in entry["rows"]:
                alike = {"conditions": row["conditions"]}  # before 1.3 was released, the baselines ran in the same row
                yield {
                    "shape": f"{shape['model']} {shape['layer']}",
                    "model": shape["model"],
                    "size": f"{shape['m']} x {shape['k']}",
                    "n": entry["n"],
                    "activation": row["activation"],
                    "time": row["kernel"]["cold"],
                    "floor": shape["floor"]["cold"],
                    "ratio": row["ratio_to_floor"]["cold"],
                    "alone": row["kernel"].get("alone"),
                    "gb_per_s": row["gb_per_s"],
                    "bandwidth_pct": row["bandwidth_pct"],
                    "warm": row["kernel"]["warm"],
                    "cublas": cublas,
                    "over_cublas": row["speedup_over"]["cublas_fp16"]["cold"],
                    "product": product,
                    "tera_ops": row["tera_ops"] if entry["n"] >= 16 else None,
                    "over_better": row.get("over_better_strategy"),
                    "row": row,
                    "throttled": throttled(
                        {
                            OWN: row,
                            "floor": shape["floor"]["cold"],
                            "cuBLAS": {**alike, **cublas},
                            "GEMM": {**alike, **product},
                            "bandwidth": bandwidth,
                        }
                    ),
                }


# ---- throttling -----------------------------------------------------------------------------------------------------

OWN = "time"
"""The name, for :func:`throttled`, of what a line is about, beside what it is compared with."""


def throttled(measurements: Mapping[str, Any]) -> list[str]:
    """The names of those that ran while the GPU held its clocks down.

    measurements: name -> the figure, series or row, with its `conditions`; what has none, or is None, did not.
    """
    return [name for name, m in measurements.items() if m and layout.is_throttled(m.get("conditions") or {})]


def mark(names: Collection[str]) -> str:
    """What is said of a line whose :func:`throttled` are these: of what, unless it is its own time; empty for none."""
    if not names or OWN in names:
        return "throttled" if names else ""
    return f"throttled: {', '.join(names)}"


# ---- summary --------------------------------------------------------------------------------------------------------


def summary(table: dict[str, Any]) -> dict[str, Metric]:
    """The figures that the table is judged by. A `_max` or `_min` says in `where` which line it is of.

    `throttled` of a figure: how many of the lines that it is made of rest on something that ran throttled.

    One that rests on lines that were not measured is null.
    """
    all_lines = list(lines(table))

    def select(n: int | range | None = None, activation: str | None = None, models: Iterable[str] = ()) -> list[Line]:
        numbers = range(n, n + 1) if isinstance(n, int) else n
        return [
            line
            for line in all_lines
            if (numbers is None or line["n"] in numbers)
            and activation in (None, line["activation"])
            and (not models or line["model"] in models)
        ]

    figures: dict[str, Metric] = {}
    for activation in ("int8", "float"):
        first = select(1, activation)
        floor = [_of(line["ratio"], line, OWN, "floor") for line in first]
        figures[f"ratio_to_floor_{activation}_geomean"] = _aggregate(floor, statistics.geometric_mean)
        figures[f"ratio_to_floor_{activation}_max"] = _extreme(floor, max)
        gain = [_of(statistics.ratio(line["alone"], line["time"]), line, OWN) for line in first]
        figures[f"alone_over_time_{activation}_geomean"] = _aggregate(gain, statistics.geometric_mean)
    one = {line["shape"]: line for line in select(1, "int8")}
    unknown = {"time": missing("N = 1 was not measured"), "throttled": []}
    for n in (2, 4, 8):
        several = []
        for line in select(n, "int8", MIDDLE):
            beside = one.get(line["shape"], unknown)
            slowed = {OWN} & {*line["throttled"], *beside["throttled"]}
            several.append((line, statistics.ratio(line["time"], beside["time"]), bool(slowed)))
        figures[f"time_{n}_tokens_over_1_geomean"] = _aggregate(several, statistics.geometric_mean)
    for activation in ("int8", "float"):
        rate = [
            _of(statistics.ratio(line["product"], line["time"]), line, OWN, "GEMM")
            for line in select(2048, activation, MIDDLE)
        ]
        figures[f"rate_over_cublas_product_2048_{activation}_geomean"] = _aggregate(rate, statistics.geometric_mean)
        figures[f"rate_over_cublas_product_2048_{activation}_min"] = _extreme(rate, min)
    batches = [_of(line["over_cublas"], line, OWN, "cuBLAS") for line in select(range(16, 257), "int8", MIDDLE)]
    figures["faster_than_cublas_16_to_256"] = _aggregate(batches, _above_one, None)
    figures["faster_than_cublas_16_to_256_min"] = _extreme(batches, min)
    warm = [_of(line["row"]["warm_over_cold"], line, OWN) for line in all_lines]
    figures["warm_over_cold_max"] = _extreme(warm, max)
    choices = [_of(line["over_better"], line, OWN) for line in all_lines if line["over_better"] is not None]
    figures["adaptive_over_better_strategy_max"] = _extreme(choices, max)
    return figures


Figure = tuple[Line, Metric, bool]
"""A figure, its line, and whether something that it is made of ran throttled."""


def _of(figure: Metric, line: Line, *names: str) -> Figure:
    """The figure of a line that is made of what :func:`throttled` calls by these names."""
    return line, figure, any(name in line["throttled"] for name in names)


def _aggregate(figures: list[Figure], how: Callable[[list[Metric]], Metric], unit: str | None = "x") -> Metric:
    """`how` of all, or null with the reason of the first that is missing; `throttled`: how many rest on what was."""
    if not figures:
        return missing("none of its lines was measured", unit)
    if reason := next((metric["reason"] for _, metric, _ in figures if metric["value"] is None), None):
        return missing(reason, unit)
    slowed = sum(throttled for _, _, throttled in figures)
    found = how([metric for _, metric, _ in figures])
    return found | ({"throttled": f"{slowed} of {len(figures)}"} if slowed else {})


def _extreme(figures: list[Figure], how: Callable[..., Any]) -> Metric:
    """The largest or smallest value and the line that has it; see :func:`_aggregate`."""

    def value(metric: Metric) -> float:
        return float(metric["value"])

    found = _aggregate(figures, lambda metrics: measured(how(map(value, metrics)), "x", n=len(metrics)))
    if found["value"] is None:
        return found
    line, _, slowed = how(figures, key=lambda figure: value(figure[1]))
    where = f"{line['shape']}, N = {line['n']}, {line['activation']}"
    return found | {"where": f"{where}, throttled" if slowed else where}


def _above_one(metrics: list[Metric]) -> Metric:
    return measured(sum(metric["value"] > 1 for metric in metrics), n=len(metrics), of=len(metrics))


THROTTLED_LINES = "*: the GPU held its clocks down in something that the line rests on."


# ---- text -----------------------------------------------------------------------------------------------------------


def cell(figure: Metric | None) -> str:
    """Four digits and their zeros, ``null``, or nothing where a figure does not belong."""
    if figure is None:
        return ""
    value = figure["value"]
    if value is None or value >= 999.5:
        return layout.number(value)
    return f"{value:#.4g}".rstrip(".")


def text(table: dict[str, Any], bandwidth: Metric | None = None) -> str:
    """The table and its summary in columns of fixed width, for a terminal of 140. `bandwidth`: see :func:`lines`."""
    heads = ["shape", "M x K", "N", "", *COLUMNS.values()]
    all_lines = list(lines(table, bandwidth))
    rows = [
        [
            *(line["shape"], line["size"], str(line["n"]), line["activation"] + (" *" if line["throttled"] else "")),
            *(cell(line[key]) for key in COLUMNS),
        ]
        for line in all_lines
    ]
    note = ["", THROTTLED_LINES] if any(line["throttled"] for line in all_lines) else []
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def joined(cells: list[str]) -> str:
        return "  ".join(
            f"{c:<{w}}" if i in (0, 3) else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    figures = summary(table)
    width = max(map(len, figures))
    found = [f"{key:<{width}}  {_said(figure)}" for key, figure in figures.items()]
    return "\n".join([joined(heads), *map(joined, rows), *note, "", *found])


def _said(figure: Metric) -> str:
    if figure["value"] is None:
        return f"null ({figure['reason']})"
    value = figure["value"]
    said = f"{value} of {figure['of']}" if "of" in figure else f"{value:.3f}"
    throttled = [f"throttled: {figure['throttled']}"] if "throttled" in figure else []
    about = "; ".join([figure["where"], *throttled] if "where" in figure else throttled)
    return f"{said}  ({about})" if about else said
