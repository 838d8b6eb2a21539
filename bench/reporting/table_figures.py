"""The figures of the table of shapes (:mod:`..parts.table`) for readers, from JSON alone: lines, summary, text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from ..metrics import Metric, measured, missing

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

NOTES = (
    "Medians in microseconds, float16 x and gamma, of RMSNorm + ternary product in CUDA graphs with a cold L2; `warm` "
    "repeats one copy of the weight. `floor` is a kernel that only reads the packed weight, each launch after the end "
    "of the one before. Our launches may start before their predecessor has ended (programmatic dependent launch), so "
    "that a `ratio` to the floor below 1 would be no error; `alone` is the same launch without that. `cuBLAS` is "
    "RMSNorm, then cublasGemmEx in float16, `faster` how many times as long that takes, `GEMM` the latter alone. "
    "`/ best`: over the better of the strategies streaming and separate. `% bw`: of the bandwidth of this run. "
    "A graph has at least 50 launches, or fewer that take 5 ms."
)


def lines(table: dict[str, Any]) -> Iterator[Line]:
    """One for each shape, number of tokens and activation: what it is, its figures by the names of :data:`COLUMNS`,
    and `row`, the entry of the JSON that they come from. A figure that does not belong to the line is None."""
    for shape in table["shapes"]:
        for entry in shape["tokens"]:
            cublas, product = (entry["baselines"][f"cublas_fp16{name}"]["cold"] for name in ("", "_product"))
            for row in entry["rows"]:
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
                }


# ---- summary --------------------------------------------------------------------------------------------------------


def summary(table: dict[str, Any]) -> dict[str, Metric]:
    """The figures that the table is judged by. A `_max` or `_min` says in `where` which line it is of.

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
        one = [(line, line["ratio"]) for line in select(1, activation)]
        figures[f"ratio_to_floor_{activation}_geomean"] = _aggregate(one, _geomean)
        figures[f"ratio_to_floor_{activation}_max"] = _extreme(one, max)
        gain = [(line, quotient(line["alone"], line["time"])) for line in select(1, activation)]
        figures[f"alone_over_time_{activation}_geomean"] = _aggregate(gain, _geomean)
    alone = {line["shape"]: line["time"] for line in select(1, "int8")}
    for n in (2, 4, 8):
        several = [
            (line, quotient(line["time"], alone.get(line["shape"], missing("N = 1 was not measured"))))
            for line in select(n, "int8", MIDDLE)
        ]
        figures[f"time_{n}_tokens_over_1_geomean"] = _aggregate(several, _geomean)
    for activation in ("int8", "float"):
        rate = [(line, quotient(line["product"], line["time"])) for line in select(2048, activation, MIDDLE)]
        figures[f"rate_over_cublas_product_2048_{activation}_geomean"] = _aggregate(rate, _geomean)
        figures[f"rate_over_cublas_product_2048_{activation}_min"] = _extreme(rate, min)
    batches = [(line, line["over_cublas"]) for line in select(range(16, 257), "int8", MIDDLE)]
    figures["faster_than_cublas_16_to_256"] = _aggregate(batches, lambda values: sum(v > 1 for v in values), None) | {
        "of": len(batches)
    }
    figures["faster_than_cublas_16_to_256_min"] = _extreme(batches, min)
    figures["warm_over_cold_max"] = _extreme([(line, line["row"]["warm_over_cold"]) for line in all_lines], max)
    choices = [(line, line["over_better"]) for line in all_lines if line["over_better"] is not None]
    figures["adaptive_over_better_strategy_max"] = _extreme(choices, max)
    return figures


Figures = list[tuple[Line, Metric]]


def _aggregate(figures: Figures, how: Callable[[list[float]], float], unit: str | None = "x") -> Metric:
    """`how` of all values, or null with the reason of the first that is missing."""
    if not figures:
        return missing("none of its lines was measured", unit)
    if reason := next((metric["reason"] for _, metric in figures if metric["value"] is None), None):
        return missing(reason, unit)
    return measured(how([metric["value"] for _, metric in figures]), unit, n=len(figures))


def _extreme(figures: Figures, how: Callable[..., Any]) -> Metric:
    """The largest or smallest value and the line that has it; see :func:`_aggregate`."""
    found = _aggregate(figures, how)
    if found["value"] is None:
        return found
    line = how(figures, key=lambda figure: figure[1]["value"])[0]
    return found | {"where": f"{line['shape']}, N = {line['n']}, {line['activation']}"}


def _geomean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def quotient(above: Metric, below: Metric, unit: str = "x", factor: float = 1.0) -> Metric:
    """above / below * factor, or null with the reason of the one that is missing."""
    for figure in (above, below):
        if figure["value"] is None:
            return missing(figure["reason"], unit)
    return measured(factor * above["value"] / below["value"], unit)


# ---- text -----------------------------------------------------------------------------------------------------------


def cell(figure: Metric | None) -> str:
    """Four digits, ``null``, or nothing where a figure does not belong."""
    if figure is None:
        return ""
    return "null" if figure["value"] is None else f"{figure['value']:#.4g}".rstrip(".")


def text(table: dict[str, Any]) -> str:
    """The table and its summary in columns of fixed width, for a terminal of 140."""
    heads = ["shape", "M x K", "N", "", *COLUMNS.values()]
    rows = [
        [line["shape"], line["size"], str(line["n"]), line["activation"], *(cell(line[key]) for key in COLUMNS)]
        for line in lines(table)
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def joined(cells: list[str]) -> str:
        return "  ".join(
            f"{c:<{w}}" if i in (0, 3) else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    figures = summary(table)
    width = max(map(len, figures))
    found = [f"{key:<{width}}  {_said(figure)}" for key, figure in figures.items()]
    return "\n".join([joined(heads), *map(joined, rows), "", *found])


def _said(figure: Metric) -> str:
    if figure["value"] is None:
        return f"null ({figure['reason']})"
    value = figure["value"]
    where = f"  ({figure['where']})" if "where" in figure else ""
    return f"{value} of {figure['of']}" if "of" in figure else f"{value:.3f}{where}"
