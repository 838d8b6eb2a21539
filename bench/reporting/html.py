"""The report as one HTML page, from its JSON alone.

The page is self-contained: style, script and plots are inside it, it loads nothing, and it can be sent as one file. It
follows the reader's light or dark theme, with a switch, and fits a phone. The headline figures come first, then
what a reader must know and what was measured on, the plots, the figures by subject, every figure of the summary with
its reason where it is null, and all parts as the Markdown has them. The samples are not in it: they are in report.json.
"""

from __future__ import annotations

import html as entities
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..metrics import Metric, is_metric, measured
from . import document, layout, plots, table_figures
from .document import Block, Heading, Paragraph, Table
from .layout import Report

_HERE = Path(__file__).parent


def html(report: Report, drawn: list[plots.Plot] | None = None) -> str:
    """The whole page. `drawn`: the plots of this report, where the caller has them already."""
    sections = [
        ("Headline figures", _headlines(report)),
        ("Run and machine", _environment(report)),
        ("Doctor", _blocks(document.doctor(report), known="Doctor")),
        ("Plots", _plots(plots.each(report) if drawn is None else drawn)),
        *_subjects(report),
        ("Conditions", _conditions(report)),
        ("Summary", _summary(report)),
        ("All parts", _parts(report)),
    ]
    shown = [(title, re.sub(r"\W+", "-", title.lower()), content) for title, content in sections if content]
    links = "".join(f'<li><a href="#{anchor}">{_escape(title)}</a></li>' for title, anchor, _ in shown)
    bodies = [
        f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{_escape(title)}</h2>\n{content}\n</section>'
        for title, anchor, content in shown
    ]
    name = f"{layout.subject(report)} on {layout.place(report)}"
    warnings = "".join(f"<li>{_escape(warning)}</li>" for warning in document.warnings(report))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>edgellm benchmark: {_escape(name)}</title>",
            f"<style>\n{_file('page.css')}</style>",
            "</head>",
            '<body><div class="page">',
            '<header><div class="top"><div>',
            f'<p class="kind">edgellm benchmark</p>\n<h1>{_escape(name)}</h1>\n<p class="meta">{_meta(report)}</p>',
            "</div>",
            '<button class="theme" type="button" aria-label="Switch between light and dark" hidden></button></div>',
            f'<ul class="warnings" aria-label="Warnings">{warnings}</ul>' if warnings else "",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>',
            "<main>",
            *bodies,
            "</main>",
            f"<footer><p>{_marked(document.INTERVALS)}</p></footer>",
            f"</div><script>\n{_file('page.js')}</script></body>",
            "</html>\n",
        ]
    )


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _meta(report: Report) -> str:
    workload = report["workload"]
    said = [
        layout.text(workload["timestamp"]),
        f"edgellm-cupy {layout.text(workload['benchmark_version'])}",
        f"schema {report['schema_version']}",
        f"parts {sum(report['seconds'].values()):.0f} s",
    ]
    return " · ".join(map(_escape, said))


# ---- sections -------------------------------------------------------------------------------------------------------

_TILES = (
    ("Generation", "tokens", "throughput_tok_s"),
    ("Time to the first token", "tokens", "time_to_first_token_ms"),
    ("Prompt", "tokens", "prompt_tok_s"),
    ("Batch, all sequences", "tokens", "batch_tok_s"),
    ("Token latency, median", "tokens", "p50_token_latency_ms"),
    ("Token latency, p99", "tokens", "p99_token_latency_ms"),
    ("Generation at 4k context", "scaling", "throughput_4k_ctx_tok_s"),
    ("Generation at 16k context", "scaling", "throughput_16k_ctx_tok_s"),
    ("Energy a token, gross", "power", "energy_per_token_j"),
    ("Energy a token, net", "power", "energy_per_token_net_j"),
    ("Power while decoding", "power", "avg_power_w"),
    ("Kernels a token", "kernels", "kernels_per_token"),
    ("GPU memory used", "utilisation", "vram_used_mb"),
    ("CPU of this process", "cpu", "cpu_utilization_pct"),
    ("Memory bandwidth", "latency", "bandwidth"),
    ("First token, at the client", "server", "client_first_token_ms"),
    ("Next token, at the client", "server", "client_token_ms"),
    ("Generation, at the client", "server", "client_tok_s"),
    ("Requests, at the client", "server", "client_requests_s"),
)
"""Label, part and key of the headline figures."""

_TABLE_TILES = (
    ("Over the floor, one token, int8", "ratio_to_floor_int8_geomean"),
    ("Over the floor, the worst shape", "ratio_to_floor_int8_max"),
    ("Time of 8 tokens over one", "time_8_tokens_over_1_geomean"),
    ("Rate over cuBLAS, 2,048 tokens, int8", "rate_over_cublas_product_2048_int8_geomean"),
    ("Rate over cuBLAS, 2,048 tokens, float", "rate_over_cublas_product_2048_float_geomean"),
    ("Faster than cuBLAS, 16 to 256 tokens", "faster_than_cublas_16_to_256"),
    ("Least speed-up over cuBLAS, 16 to 256 tokens", "faster_than_cublas_16_to_256_min"),
)
"""Label and key of those of a table of shapes."""


def _headlines(report: Report) -> str:
    parts = report["parts"]
    latency = parts.get("latency", {})
    found = [(label, parts.get(part, {}).get(key)) for label, part, key in _TILES]
    if table := layout.shapes_table(report):
        summary = table_figures.summary(table)  # anew: with what ran throttled
        found += [(label, summary.get(key)) for label, key in _TABLE_TILES]
    found = [*_ratios(latency), *found]
    tiles = [_tile(label, figure) for label, figure in found if figure and not layout.is_null(figure)]
    if not tiles:
        return "<p>None of them was measured in this run; the summary says why.</p>"
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _ratios(latency: dict[str, Any]) -> Iterator[tuple[str, Metric | None]]:
    """Label and range of the fused products' ratios, and how many of these rest on something that ran throttled."""
    fused = list(layout.fused_rows(latency, "int8"))
    slowed = [document.throttled(row, latency["products"][layer], None) for layer, row in fused]
    over_floor = [row["ratio_to_floor"] for _, row in fused]
    over_cublas = [layout.one_l2(row.get("speedup_over"), "cublas_fp16") for _, row in fused]
    for label, other, pairs in (
        ("Fused product over its floor", "floor", over_floor),
        ("Fused product against cuBLAS", "cublas_fp16", over_cublas),
    ):
        count = sum(table_figures.OWN in names or other in names for names in slowed)
        figure = _range(pairs)
        yield label, {**figure, "throttled": f"{count} of {len(pairs)}"} if figure and count else figure


def _range(pairs: list[Any]) -> Metric | None:
    """From the smallest to the largest of these ratios with a cold L2, as one figure; None where one is missing."""
    cold = [layout.one_l2(pair, "cold") for pair in pairs]
    values = [figure["value"] for figure in cold if is_metric(figure) and figure["value"] is not None]
    if not values or len(values) < len(cold):
        return None
    text = " to ".join(dict.fromkeys(f"{value:.2f}" for value in (min(values), max(values))))
    return measured(text, "x", of=f"{len(values)} products, int8, cold L2")


def _tile(label: str, figure: Metric) -> str:
    figure = layout.rescaled(figure)
    notes = []
    if figure.get("ci95"):
        notes.append(f"95 %: {_interval(figure)}")
    for key, said in (("context", "context {}"), ("batch", "batch {}"), ("prompt_tokens", "{} tokens")):
        if key in figure:
            notes.append(said.format(layout.number(figure[key])))
    notes += [figure[key] for key in ("of", "where", "scope") if isinstance(figure.get(key), str)]
    if isinstance(of := figure.get("of"), int):
        notes.append(f"of {layout.number(of)}")
    if figure.get("synthetic"):
        notes.append("beyond the model's context")
    unit = f" <small>{_escape(_unit(figure))}</small>" if figure.get("unit") else ""
    if "throttled" in figure:
        notes.append(f"**throttled: {figure['throttled']}**")
    note = "".join(f'<dd class="note">{_marked(note)}</dd>' for note in notes)
    value = _escape(layout.number(figure["value"]))
    return f'<div><dt>{_escape(label)}</dt><dd class="value">{value}{unit}</dd>{note}</div>'


def _unit(figure: Metric) -> str:
    return figure["unit"].replace("us", "µs").replace("uJ", "µJ")


_MACHINE = (
    "gpu_model", "compute_capability", "sm_count", "l2_bytes", "vram_total_mb", "power_limit_w", "max_sm_clock_mhz",
    "max_memory_clock_mhz", "driver_version", "cuda_version", "persistence_mode", "cpu_model", "cpu_threads",
    "host_ram_total_mb", "os_detail",
)  # fmt: skip


def _environment(report: Report) -> str:
    known = {**report.get("environment", {}), **report["parts"].get("hardware", {})}
    machine = [[key, layout.with_unit(known[key])] for key in _MACHINE if key in known]
    run = [[key, value] for key, value in document.facts(report).items()]
    tables = _table(Table(["Run", ""], run), "What was run")
    if machine:
        tables += _table(Table(["Figure", "Value"], machine), "What it was measured on")
    return f'<div class="pair">{tables}</div>'


def _plots(drawn: list[plots.Plot]) -> str:
    shown = [
        f"<figure>\n{plots.inline_svg(plot, _escape(plot.title))}\n"
        f"<figcaption>{_escape(plot.says)}</figcaption></figure>"
        for plot in drawn
        if plot.figure is not None
    ]
    absent = "; ".join(f"{plot.title} ({plot.reason})" for plot in drawn if plot.figure is None)
    return (f'<div class="plots">\n{"".join(shown)}\n</div>' if shown else "") + (
        f'<p class="absent">Not drawn: {_escape(absent)}</p>' if absent else ""
    )


def _subjects(report: Report) -> Iterator[tuple[str, str]]:
    """Title and content of the sections of figures: what was measured, or why it was not."""
    own = {"latency": ("Products", _products), "tokens": ("Tokens", _tokens), "scaling": ("Context", _scaling),
           "power": ("Energy", _energy), "kernels": ("Kernels", _kernels)}  # fmt: skip
    if layout.shapes_table(report):
        own["latency"] = ("Shapes", _products)
    for part, (title, content) in own.items():
        if part in report["errors"]:
            yield title, f"<p>Part {part} failed: {_escape(report['errors'][part]['reason'])}</p>"
        elif part in report["parts"]:
            figures = report["parts"][part]
            yield title, ("" if part == "latency" else _slowed(figures)) + content(figures)  # its lines are marked
    for part, figures in report["parts"].items():
        if part not in own and part not in _BEHIND:
            yield document.title(part), _blocks(document.section(part, figures))


def _slowed(figures: dict[str, Any]) -> str:
    """How many of these figures were measured on held clocks; nothing where none was."""
    count = layout.count_throttled(figures)
    return f"<p>{_marked(f'**throttled: {count}**')} of the measurements below, see Conditions.</p>" if count else ""


_BEHIND = ("hardware", "reproducibility", "transfer", "utilisation", "cpu")
"""Parts without a section of figures: they are under All parts."""


def _products(latency: dict[str, Any]) -> str:
    if "table" in latency:
        return _blocks(document.shapes(latency["table"], latency.get("bandwidth")), known="Shapes")
    if layout.is_null(latency["products"]):
        return _blocks(document.reasons(latency))
    return _blocks(document.products(latency["products"], latency.get("bandwidth")), known="Products")


def _tokens(tokens: dict[str, Any]) -> str:
    keys = (
        "throughput_tok_s", "time_to_first_token_ms", "mean_token_latency_ms", "p50_token_latency_ms",
        "p90_token_latency_ms", "p95_token_latency_ms", "p99_token_latency_ms", "max_token_latency_ms",
        "token_gap_variance_ms2",
    )  # fmt: skip
    lines = _by_key(tokens, keys)
    lines += [(f"prompt of {row['tokens']} tokens", row["tok_s"]) for row in _rows(tokens, "prompts")]
    lines += [(f"batch of {row['batch']}", row["tok_s"]) for row in _rows(tokens, "batches")]
    for row in _rows(tokens, "sampling"):
        lines.append((f"token latency, {row['sampling']}", row["latency"]))
    spread = document.statistics("tokens", tokens)
    content = _figures(lines, "Generation and prompts")
    return content + (_table(spread, "Spread of the samples") if spread else "") + _reasons(tokens)


_KEYS_AND_VALUES = (
    "Keys and values are random in all rows but the shortest; they cost as much as real ones. The model was never made "
    "for what lies beyond its own context: only the cost is real there."
)


def _scaling(scaling: dict[str, Any]) -> str:
    lines = _by_key(scaling, ("throughput_degradation_slope_pct_per_1k", "time_16k_over_0"))
    rows = [
        {
            "context": row["context"],
            "model's context": "beyond it" if row["synthetic"] else "within",
            "tok/s": row["tok_s"]["value"],
            "95 % interval": _interval(row["tok_s"]),
            "a token": row["latency"],
            "KV cache": row.get("kv_cache_bytes", ""),
        }
        for row in _rows(scaling, "rows")
    ]
    content = ""
    if rows:
        content = f"<p>{_KEYS_AND_VALUES}</p>{_table(document.table(rows), 'Speed against the tokens in the context')}"
    return content + _figures(lines, "What more context costs") + _reasons(scaling)


def _energy(power: dict[str, Any]) -> str:
    keys = ("energy_per_token_j", "energy_per_token_net_j", "avg_power_w", "peak_power_w", "min_power_w")
    lines = _by_key(power, keys)
    idle = power.get("idle")
    if isinstance(idle, dict) and not layout.is_null(idle):
        lines.append(("idle power", idle.get("mean_power_w")))
    products = power.get("products")
    if isinstance(products, dict) and not layout.is_null(products):
        for layer, product in products.items():
            lines += [(f"{layer}, {kind}", product.get(f"{kind}_j")) for kind in ("gross", "net")]
    windows = list(layout.windows(power, ""))
    content = _figures(lines, "Energy and power")
    if windows:
        content += _table(document.table(windows), "Windows of the energy counter")
    note = power.get("note")
    return content + (f"<p>{_marked(note)}</p>" if isinstance(note, str) else "") + _reasons(power)


def _kernels(kernels: dict[str, Any]) -> str:
    kernels = document.kernels(kernels)
    keys = (
        "kernels_per_token", "graph_launches_per_token", "host_sync_calls_per_token", "avg_kernel_exec_time_ms",
        "token_gpu_ms",
    )  # fmt: skip
    content = _figures(_by_key(kernels, keys), "Launches of a token")
    trace, times = kernels.get("trace"), kernels.get("where_the_time_goes")
    if isinstance(trace, dict) and (rows := _rows(trace, "kernels")):
        lines = [{key: value for key, value in row.items() if key != "names"} for row in rows]
        content += _table(document.table(lines), "Kernels of a token, traced")
        content += f"<p>{_marked(trace['overlap'])}</p>"
    if isinstance(times, dict) and (rows := _rows(times, "kernels")):
        lines = [{key: value for key, value in row.items() if key not in ("kernels", "files")} for row in rows]
        content += _table(document.table(lines), "Where the time goes")
        content += f"<p>{_marked(times['meaning'])}</p>" if "meaning" in times else ""
    if rows := _rows(kernels, "kernels"):
        content += _table(document.table(rows), "Resources of each kernel")
    return content + _reasons(kernels)


def _rows(figures: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return layout.measured_rows(figures.get(key))


def _by_key(figures: dict[str, Any], keys: tuple[str, ...]) -> list[tuple[str, Any]]:
    return [(key, figures[key]) for key in keys if key in figures]


def _figures(lines: list[tuple[str, Any]], caption: str) -> str:
    """A table of single figures, a series by its median: value, unit, interval and number."""
    rows = []
    for label, x in lines:
        figure = x["median"] if layout.is_series(x) else x
        if not is_metric(figure) or figure["value"] is None:
            continue  # its reason stands below
        figure = layout.rescaled(figure)
        said = [layout.number(figure["value"]), figure.get("unit", ""), _interval(figure)]
        rows.append([label, *said, layout.number(figure.get("n", ""))])
    return _table(Table(["figure", "value", "unit", "95 % interval", "n"], rows), caption) if rows else ""


def _interval(figure: Metric) -> str:
    return " to ".join(map(layout.number, figure.get("ci95") or ()))


def _reasons(figures: dict[str, Any]) -> str:
    """Which figures are null, by their reason."""
    by_reason: dict[str, dict[str, None]] = {}
    for key, reason in _nulls(figures, ""):
        by_reason.setdefault(reason, {})[f"`{key}`"] = None
    return _blocks([Paragraph(f"null: {', '.join(keys)} ({reason})") for reason, keys in by_reason.items()])


def _nulls(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Key and reason of each null figure, not of those inside a series."""
    if layout.is_null(value):
        yield key, value["reason"]
    elif isinstance(value, list):
        for inner in value:
            yield from _nulls(inner, key)
    elif isinstance(value, dict) and not layout.is_series(value):
        for name, inner in value.items():
            yield from _nulls(inner, name)


# ---- conditions, summary, parts -------------------------------------------------------------------------------------


_CONDITIONS = ("sm_clock_mhz", "memory_clock_mhz", "temperature_c", "throttle_reasons", "throttled")


def _conditions(report: Report) -> str:
    measurements = [
        (name, found)
        for _, name, found in layout.walk(report["parts"])
        if is_metric(found.get("throttled")) and "sm_clock_mhz" in found
    ]
    if not measurements:
        return ""
    reasons = _reasons({place: {key: c.get(key) for key in _CONDITIONS} for place, c in measurements})
    if all(layout.is_null(c[key]) for _, c in measurements for key in ("sm_clock_mhz", "throttled")):
        return reasons
    columns = {
        "measurement": [place for place, _ in measurements],
        **{
            f"{key.removesuffix('_s')} (s)": [_short(c.get(key)) for _, c in measurements]
            for key in ("begin_s", "end_s")
        },
        "SM clock (MHz)": [_spread(c.get("sm_clock_mhz")) for _, c in measurements],
        "memory clock (MHz)": [_spread(c.get("memory_clock_mhz")) for _, c in measurements],
        "temperature (C)": [_spread(c.get("temperature_c")) for _, c in measurements],
        "throttled": ["**true**" if layout.is_throttled(c) else layout.short(c["throttled"]) for _, c in measurements],
        "reasons": [_short(c.get("throttle_reasons")) for _, c in measurements],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}  # begin and end: not before 1.3
    rows = [list(row) for row in zip(*filled.values(), strict=True)]
    return _table(Table(list(filled), rows), "Clocks and temperature while each figure was measured") + reasons


def _short(x: Any) -> str:
    return "" if x is None else layout.short(x)


def _spread(figure: Any) -> str:
    """Mean and, where they differ, the smallest and largest."""
    if not is_metric(figure):
        return ""
    low, high = figure.get("min"), figure.get("max")
    ends = f" ({layout.number(low)} to {layout.number(high)})" if low != high else ""
    return layout.number(figure["value"]) + ends


def _summary(report: Report) -> str:
    rows = []
    for key, figure in report["summary"].items():
        interval = f"; {layout.interval(layout.rescaled(figure))}" if figure.get("ci95") else ""
        rows.append([key, layout.with_unit(figure) + interval])
    return _table(Table(["Metric", "Value"], rows), "The keys of the original benchmark")


def _parts(report: Report) -> str:
    return "\n".join(
        f"<details><summary>{_escape(document.title(name))}</summary>\n"
        f"{_blocks(document.section(name, figures))}</details>"
        for name, figures in report["parts"].items()
    )


# ---- blocks ---------------------------------------------------------------------------------------------------------


def _blocks(blocks: list[Block], known: str = "") -> str:
    """`known`: the heading that stands above these already."""
    found, title = [], ""
    for block in blocks:
        if isinstance(block, Heading):
            title = block.text
            if title != known:
                found.append(f"<h{block.level}>{_marked(title)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            found.append(f"<p>{'<br>'.join(map(_marked, block.text.splitlines()))}</p>")
        else:
            found.append(_table(block, title or "Figures", named=bool(title)))
            title = ""
    return "\n".join(found)


_NUMBER = re.compile(r"-?[\d.,]+(e[+-]?\d+)?%?( \(-?[\d.,]+ to -?[\d.,]+\))?|null|")
_SHORT = 14
"""Characters of a cell that stays on one line, such as a value with its unit."""
_TALL = 60
"""Rows that a table shows without a scroll bar of its own."""


def _table(table: Table, caption: str, named: bool = False) -> str:
    """A table that scrolls inside the page where it is wider; columns of numbers are set to the right.

    `named`: a heading above says already what it is, its caption is for screen readers only.
    """
    numeric = [
        all(_NUMBER.fullmatch(row[i]) for row in table.rows) and any(row[i] for row in table.rows)
        for i in range(len(table.columns))
    ]
    wide = len(table.columns) > 4
    heads = "".join(
        f'<th scope="col"{" class=n" if right and i else ""}>{_breakable(_marked(name)) or "Value"}</th>'
        for i, (name, right) in enumerate(zip(table.columns, numeric, strict=True))
    )
    lines = []
    for first, *rest in table.rows:
        cells = "".join(_cell(text, right, wide) for text, right in zip(rest, numeric[1:], strict=True))
        lines.append(f'<tr><th scope="row">{_breakable(_marked(first))}</th>{cells}</tr>')
    long = any(len(row[0]) > 24 for row in table.rows)
    kinds = {"sorts": len(lines) > 3, "wide": wide, "named": wide and long}
    label = _escape(caption)
    return (
        f'<div class="scroll{" tall" if len(lines) > _TALL else ""}" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="{" ".join(kind for kind, is_so in kinds.items() if is_so)}">'
        f"<caption{' class=unseen' if named else ''}>{label}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "</tbody></table></div>"
    )


def _cell(text: str, right: bool, wide: bool) -> str:
    long = len(text) > 40 if wide else any(len(word) > 24 for word in text.split())
    short = len(text) <= _SHORT and not wide
    kind = "n" if right else "long" if long else "short" if short else ""
    content = f'<span class="null">{_marked(text)}</span>' if text.startswith("null") else _marked(text)
    return f"<td{f' class={kind}' if kind else ''}>{content}</td>"


def _breakable(marked: str) -> str:
    """Long names may break behind an underscore."""
    return marked.replace("_", "_<wbr>")


def _escape(text: str) -> str:
    return entities.escape(text)


def _marked(text: str) -> str:
    """Escaped, with the two marks of :mod:`.document`."""
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", _escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r'<strong class="mark">\1</strong>', text)
