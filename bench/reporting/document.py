"""The report as headings, paragraphs and tables, from its JSON alone.

Markdown and the HTML page write the same blocks, each in its own syntax. Text and cells may hold two marks: `code`
between backticks, and what stands out between ``**``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..metrics import Metric, is_metric, measured
from . import layout, stability, table_figures
from .layout import Report


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Text whose line breaks stay."""

    text: str


@dataclass(frozen=True)
class Table:
    """Every row has as many cells as there are columns."""

    columns: list[str]
    rows: list[list[str]]


Block = Heading | Paragraph | Table


INTERVALS = (
    "Intervals are 95 % confidence intervals. `null` is followed by the reason. A series of samples is given by its "
    "median, the main ones also by their statistics; those of all others, and the samples, are in report.json."
)


def warnings(report: Report) -> list[str]:
    """What a reader must know before any figure, one sentence each."""
    found = []
    if report["no_gpu"]:
        found.append(f"No GPU was measured, everything ran in NumPy on the host: {report['no_gpu']}")
    if report["quick"]:
        found.append("Quick run: short windows and few samples. Do not quote it.")
    if report["interrupted"]:
        found.append("Interrupted: the parts that are missing did not run.")
    found += [f"Wrong result: {failure}" for failure in report["failures"]]
    found += stability.banners(report)
    for name, error in report["errors"].items():
        found.append(f"{'Row' if '/' in name else 'Part'} {name} failed: {error['reason']}")
    return found


def facts(report: Report) -> dict[str, str]:
    """What was run, with what, and when: a line for each."""
    workload, environment = report["workload"], report.get("environment", {})
    return {
        **({} if layout.shapes_table(report) else _decoder(report)),
        "When": f"{layout.text(workload['timestamp'])}, parts {sum(report['seconds'].values()):.0f} s",
        "Command": f"`{report['command']}`",
        "Program": f"edgellm-cupy {layout.text(workload['benchmark_version'])}, schema {report['schema_version']}",
        **({"Source": _source(environment)} if environment else {}),
        **({"Server": layout.with_unit(environment["server_engine"])} if "server_engine" in environment else {}),
        **({"Tuned choices": _tuned(environment["tuned"])} if "tuned" in environment and not report["no_gpu"] else {}),
    }


def _decoder(report: Report) -> dict[str, str]:
    """What decodes; nothing of a server, which does not tell."""
    model, check = report["model"], report["decoder_check"]
    if model is None:
        return {}
    head = "" if model["head_bytes"] is None else f", head {_bytes(model['head_bytes'])}"
    stored = model["decoder"]  # null when no part decodes
    return {
        "Model": _shape(model["config"]),
        "Weights": f"{model['weights']}; body {_bytes(model['body_bytes'])}{head}",
        **({"Decoder": layout.with_unit(stored) if is_metric(stored) else layout.inline(stored)} if stored else {}),
        "Decoder against the reference": "; ".join(filter(None, [layout.with_unit(check), layout.detail(check)])),
    }


def _bytes(size: int) -> str:
    return layout.with_unit(measured(size, "bytes"))


def doctor(report: Report) -> list[Block]:
    """What `edgellm doctor` found as the run began; nothing where it was not asked (before 1.3, and of a server)."""
    rows = [
        [f"**{found['level']}**" if found["level"] == "warning" else found["level"], found["what"], found["why"]]
        for found in layout.measured_rows(report.get("doctor"))
    ]
    return [Heading(2, "Doctor"), Table(["Level", "Finding", "Why it matters"], rows)] if rows else []


def _shape(config: dict[str, Any]) -> str:
    return (
        f"{config['num_layers']} layers, hidden {config['hidden_size']}, {config['num_heads']} heads, "
        f"{config['num_kv_heads']} KV heads, intermediate {config['intermediate_size']}"
        f"{' gated' if config['gated'] else ''}, vocabulary {config['vocab_size']}, context {config['max_context']}"
    )


def _source(environment: dict[str, Any]) -> str:
    """The commit, and whether files differ from it."""
    modified = environment["git_modified"]["value"] is True
    return f"commit {layout.text(environment['git_commit'])}{', with changes' if modified else ''}"


def _tuned(tuned: Metric) -> str:
    """How many choices of `edgellm tune` this run used, and from where."""
    return f"{layout.text(tuned)}, of `{tuned['file']}`" if tuned.get("file") else layout.text(tuned)


# ---- parts ----------------------------------------------------------------------------------------------------------


def title(part: str) -> str:
    """The heading of a part."""
    return _TITLES.get(part, part.capitalize())


_TITLES = {
    "cpu": "CPU",
    "kernels": "Kernels and launches",
    "utilisation": "Utilisation and memory",
    "power": "Power and energy",
}


def section(name: str, figures: dict[str, Any]) -> list[Block]:
    """A part: what its own layout or the general one makes of it, then the statistics of its main series."""
    if name == "kernels":
        figures = kernels(figures)
    blocks = _latency(figures) if name == "latency" else body(layout.without_windows(figures), 3)
    if name != "latency" and (count := layout.count_throttled(figures)):  # its lines are marked one by one
        blocks.insert(
            0,
            Paragraph(
                f"**throttled: {count} of the measurements below.** The GPU held its clocks down meanwhile, as their "
                "conditions say. Ratios, per cents, sums and fits that are made of them rest on them too."
            ),
        )
    if windows := list(layout.windows(figures, "")):
        blocks += [Heading(3, "Windows"), table(windows), *reasons(windows)]
    if rows := statistics(name, figures):
        blocks += [Heading(3, "Statistics"), rows]
    return blocks


def kernels(figures: dict[str, Any]) -> dict[str, Any]:
    """The part `kernels` for a reader: of what each share is, and what overlaps.

    In the JSON `share_pct` is of time in the trace and of launches elsewhere.
    """

    def renamed(rows: Any, share: str) -> Any:
        if not isinstance(rows, list):
            return rows
        return [{share if key == "share_pct" else key: value for key, value in row.items()} for row in rows]

    found = {
        key: renamed(value, "% of launches") if key in ("launch_share", "kernels") else value
        for key, value in figures.items()
    }
    trace, times = found.get("trace"), found.get("where_the_time_goes")
    if isinstance(trace, dict) and layout.measured_rows(trace.get("kernels")):
        rows = renamed(trace["kernels"], "% of summed time")
        found["trace"] = {**trace, "overlap": layout.overlap(trace), "kernels": rows}
    if isinstance(times, dict) and "meaning" in times:
        found["where_the_time_goes"] = {**times, "meaning": _costs(times)}
    return found


def _costs(times: dict[str, Any]) -> str:
    """How to read the table of :mod:`..parts.ablation`, with its sum; what 1.2 said of it was wrong."""
    total, token = (layout.with_unit(times[key]) for key in ("sum_us", "token_us"))
    return (
        "time: what a token gains when these launches are left out of its graph; floor: what their bytes alone take. "
        f"The times add up to {total}, the token takes {token}: kernels overlap, so that the two need not agree, and "
        "where they do it is by chance. Below 0: the token takes longer without these launches, as those that are left "
        "can overlap less."
    )


_PRODUCT_COLUMNS = [
    "product", "M x K", "operation", "activation", "cold", "x vs cuBLAS", "x vs unfused", "/ floor", "GB/s cold",
    "% bandwidth cold", "warm", "/ floor warm", "device", "end to end",
]  # fmt: skip
_PRODUCT_NOTE = (
    "Medians in microseconds, batch 1. `x vs`, with a cold L2: how many times as long the same takes otherwise, by "
    "RMSNorm and float16 cuBLAS (a product alone: by cuBLAS), or in separate launches of ours. `/ floor`: over a "
    f"kernel that only reads the packed weight. {table_figures.BELOW_THE_FLOOR}"
)
_THROTTLED_NOTE = (
    "**throttled**: the GPU held its clocks down meanwhile, or while it measured what the mark names; ratios and per "
    "cents that are made of it rest on it too. See `conditions` in report.json."
)


def _latency(figures: dict[str, Any]) -> list[Block]:
    rest = {key: value for key, value in figures.items() if key not in ("products", "table", "summary")}
    bandwidth = figures.get("bandwidth")
    if "points" in (figures.get("roofline") or {}):
        rest["roofline"] = _roofline(figures, bandwidth)
    if "table" in figures:
        return [*body(rest, 3), *shapes(figures["table"], bandwidth)]
    return [*body(rest, 3), *products(figures["products"], bandwidth)]


def _roofline(figures: dict[str, Any], bandwidth: Metric | None) -> dict[str, Any]:
    """The roofline, its points marked as the lines are that they come from (:func:`..parts.roofline.roofline`)."""
    found = [
        (f"{layer}, {row['op']}", row["activation"], throttled(row, product, bandwidth))
        for layer, product in layout.measured_products(figures).items()
        for row in layout.measured_rows(product["rows"])
    ]
    if "table" in figures:
        found += [
            (f"{line['shape']}, N = {line['n']}", line["activation"], line["throttled"])
            for line in table_figures.lines(figures["table"], bandwidth)
        ]
    of_points = (table_figures.OWN, "bandwidth")
    marks = {(name, activation): _mark([n for n in names if n in of_points]) for name, activation, names in found}
    points = [
        {**point, "name": f"{point['name']}{marks.get((point['name'], point['activation']), '')}"}
        for point in figures["roofline"]["points"]
    ]
    return {**figures["roofline"], "points": points}


def products(by_layer: dict[str, Any], bandwidth: Metric | None = None) -> list[Block]:
    """A line for each operation on each product, and one for what each product is compared with.

    bandwidth: of the run, for the mark of what ran throttled.
    """
    rows, yardsticks = [], []
    for layer, product in layout.measured_products({"products": by_layer}).items():
        size = f"{product['m']} x {product['k']}"
        for row in layout.measured_rows(product["rows"]):
            name, *cells = _product_row(row)
            rows.append([layer, size, f"{name}{_mark(throttled(row, product, bandwidth))}", *cells])
        baselines = {f"{name} cold": layout.one_l2(series, "cold") for name, series in product["baselines"].items()}
        floor = {f"floor {l2}": series for l2, series in product["floor"].items()}
        yardsticks.append({"product": layer, "M x K": size, **floor, **baselines})
    blocks: list[Block] = [Heading(3, "Products"), Paragraph(_PRODUCT_NOTE), _without_nulls(_PRODUCT_COLUMNS, rows)]
    if layout.count_throttled([by_layer, bandwidth]):
        blocks.append(Paragraph(_THROTTLED_NOTE))
    blocks += reasons(by_layer)
    if any(layout.is_series(value) for row in yardsticks for value in row.values()):  # none on NumPy
        blocks += [Heading(3, "What they are compared with"), table(yardsticks)]
    return blocks


def _without_nulls(columns: list[str], rows: list[list[str]]) -> Table:
    """Without the columns that are null in every row, as on NumPy those of the GPU; the reasons stand below."""
    kept = [i for i in range(len(columns)) if not rows or {row[i] for row in rows} - {"null", ""}]
    return Table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def throttled(row: dict[str, Any], product: dict[str, Any], bandwidth: Metric | None) -> list[str]:
    """What of a row of a product, and of what it is compared with, ran throttled: see :func:`.table_figures.throttled`.

    product: that of the row, with floor and baselines.
    bandwidth: of the run.
    """
    baselines = {name: layout.one_l2(product["baselines"].get(name), "cold") for name in row.get("speedup_over", {})}
    floor = layout.one_l2(product["floor"], "cold")
    return table_figures.throttled({table_figures.OWN: row, "floor": floor, **baselines, "bandwidth": bandwidth})


def shapes(figures: dict[str, Any], bandwidth: Metric | None = None) -> list[Block]:
    """The table of shapes: its summary, then a line for each shape, number of tokens and activation.

    The summary is made anew: what the report has, and the marks of what ran throttled, which one of before 1.3 was
    released lacks.

    bandwidth: of the run, for the mark of what ran throttled.
    """
    columns = ["shape", "M x K", "N", "activation", *table_figures.COLUMNS.values()]
    rows = []
    for line in table_figures.lines(figures, bandwidth):
        cells = [table_figures.cell(line[key]) for key in table_figures.COLUMNS]
        name = f"{line['shape']}{_wrong(line['row'])}{_mark(line['throttled'])}"
        rows.append([name, line["size"], layout.number(line["n"]), line["activation"], *cells])
    notes = [Paragraph(table_figures.NOTES)]
    if layout.count_throttled([figures, bandwidth]):
        notes.append(Paragraph(_THROTTLED_NOTE))
    lines = [Heading(3, "Shapes"), *notes, Table(columns, rows), *reasons(figures)]
    return [Heading(3, "Summary of the shapes"), *body(table_figures.summary(figures), 3), *lines]


def _mark(names: list[str]) -> str:
    said = table_figures.mark(names)
    return f" **{said}**" if said else ""


def _wrong(row: dict[str, Any]) -> str:
    return "" if row["correct"] else " **wrong**"


def _product_row(row: dict[str, Any]) -> list[str]:
    fused = row["op"] == "rmsnorm_ternary_matmul"
    faster = row.get("speedup_over", {})  # none on NumPy
    kernel, floor = row["kernel"], row["ratio_to_floor"]
    figures = [
        kernel["cold"],
        layout.one_l2(faster.get("cublas_fp16" if fused else "cublas_fp16_product"), "cold"),
        layout.one_l2(faster.get(f"unfused_ternary_{row['activation']}"), "cold") if fused else "",
        *(floor["cold"], row["gb_per_s"], row["bandwidth_pct"]),
        *(kernel["warm"], floor["warm"], row["device"], row["end_to_end"]),
    ]
    return [row["op"] + _wrong(row), row["activation"], *map(layout.short, figures)]


_STATISTICS = ("mean", "std", "min", "max", "p50", "p90", "p95", "p99", "variance", "gap_variance", "longest_stall")


def statistics(name: str, figures: dict[str, Any]) -> Table | None:
    """Those of the main series of a part; None where it has none.

    Percentiles whose tail holds too few samples are left as `null` here; report.json says why.
    """
    series = [(label, value) for label, value in _main_series(name, figures) if layout.is_series(value)]
    columns = ["series", "unit", "n", *(key.replace("_", " ") for key in _STATISTICS)]
    rows = [
        [label, s["unit"], layout.number(s["n"]), *(layout.number(s[key]["value"]) for key in _STATISTICS)]
        for label, s in series
    ]
    return Table(columns, rows) if rows else None


def _main_series(name: str, figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The series whose spread a reader asks for, as the original benchmark printed it."""
    if name == "latency":  # of a table of shapes there are none
        for layer, row in layout.fused_rows(figures, "int8"):
            yield f"{layer} fused int8, kernel cold", row["kernel"]["cold"]
            yield f"{layer} fused int8, device", row["device"]
            yield f"{layer} fused int8, end to end", row["end_to_end"]
    elif name == "tokens":
        yield "time to the first token", figures.get("first_token")
        yield "token latency", figures.get("token_latency")
    elif name == "scaling":
        for row in layout.measured_rows(figures.get("rows")):
            yield f"token latency at context {layout.number(row['context'])}", row["latency"]


# ---- the general layout ---------------------------------------------------------------------------------------------


def body(figures: dict[str, Any], level: int) -> list[Block]:
    """Any figures. Single ones and plain groups are lines of one table, those that are null are listed by reason.

    Rows, and plain groups side by side, become tables of their own under a heading of `level`; what is nested deeper
    gets a heading too.
    """
    known: list[list[str]] = []
    nulls: dict[str, list[str]] = {}
    nested: list[Block] = []
    for key, value in figures.items():
        if layout.is_null(value):
            nulls.setdefault(value["reason"], []).append(f"`{key}`")
        elif layout.is_series(value):
            median = value["median"]
            known.append([key, layout.with_unit(median), f"median; {layout.detail(median)}"])
        elif is_metric(value) or layout.is_scalar(value):
            known.append([key, layout.with_unit(value), layout.detail(value)])
        elif layout.is_plain(value):
            known.append([key, layout.inline(value), ""])
        elif layout.is_rows(value):
            rows = layout.measured_rows(value)
            nested += [Heading(level, key), *([table(rows)] if rows else []), *reasons(value)]
        elif layout.is_plain_groups(value):
            rows = [{"name": name, **group} for name, group in value.items() if not layout.is_null(group)]
            rest = {name: group for name, group in value.items() if layout.is_null(group)}
            nested += [Heading(level, key), table(rows), *reasons(rows), *body(rest, level)]
        elif isinstance(value, dict) and value:
            nested += [Heading(level, key), *body(value, level + 1)]
    blocks: list[Block] = [Table(["Figure", "Value", "Detail"], known)] if known else []
    blocks += [Paragraph(f"null: {', '.join(keys)} ({reason})") for reason, keys in nulls.items()]
    return blocks + nested


def table(rows: list[dict[str, Any]]) -> Table:
    """One line for each row; what is nested in it becomes columns of their own, a series its median."""
    flat = [dict(layout.leaves(row)) for row in rows]
    columns: dict[str, str] = {}  # name -> heading: with the unit, if any row has one
    factors: dict[str, float] = {}
    for name in dict.fromkeys(key for row in flat for key in row):
        values = [row[name] for row in flat if name in row]
        unit = next((found for value in values if isinstance(value, dict) and (found := value.get("unit"))), None)
        unit, factors[name] = layout.scaled(unit, map(_bare, values))
        columns[name] = f"{name} ({unit})" if unit else name
    cells = [[_multiplied(row.get(name, ""), factors[name]) for name in columns] for row in flat]
    return Table(list(columns.values()), cells)


def _bare(x: Any) -> Any:
    """The number that a cell shows."""
    figure = x["median"] if layout.is_series(x) else x
    return figure["value"] if is_metric(figure) else figure


def _multiplied(x: Any, factor: float) -> str:
    """A cell in the unit of its column."""
    value = _bare(x)
    return layout.number(value * factor) if factor != 1 and isinstance(value, (int, float)) else layout.short(x)


def reasons(value: Any) -> list[Block]:
    """Why figures inside `value` are null, a line for each reason; nothing where there is none."""
    found = layout.reasons(value)
    return [Paragraph("\n".join(f"null: {reason}" for reason in found))] if found else []
