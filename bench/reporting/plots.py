"""The plots of a report, from its JSON alone: drawn with matplotlib, written as SVG and PNG, or put into the HTML page.

:func:`each` gives the plots of :data:`PLOTS`, in that order: a figure with a sentence that says what it shows, or the
reason why there is none. matplotlib is imported when the first plot is drawn; without it every plot has that reason,
and the report is whole but for them.

The colours are those of :data:`COLOURS`, which can be told apart by the colour-blind; line styles, markers and hatches
say the same in grey. A figure is :data:`WIDTH` inches wide, so that its text can be read on a phone.
"""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import EdgeLLMError
from . import layout, table_figures
from .layout import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 4.7
"""Of a figure, in inches."""

COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#d1d9e0",
    "band": "#eef1f4",
    "ground": "#ffffff",
    "a": "#0072b2",
    "b": "#d55e00",
    "c": "#009e73",
    "d": "#a8568a",
    "e": "#3c9bd6",
    "f": "#8a6d00",
}
"""Name -> colour on white. `a` to `f` are of series: after Okabe and Ito, darker where theirs are too light."""

_Drawn = tuple["Figure", str, str]
"""A figure, which series it shows (for its title), and what it says in a sentence."""

_SERIES = [COLOURS[name] for name in "abcdef"]
_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
_MARKERS = "osD^vP"

_RC: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.edgecolor": COLOURS["muted"],
    "axes.facecolor": COLOURS["ground"],
    "figure.facecolor": COLOURS["ground"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": False,
    "axes.formatter.use_mathtext": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text stays text: small, can be searched, and takes the page's colour
    "svg.hashsalt": "edgellm",  # the same report gives the same file
    "path.simplify": True,
    "savefig.dpi": 200,
}


class PlotError(EdgeLLMError):
    """A plot cannot be written; the message names the file."""


class _NothingToDrawError(Exception):
    """The report lacks what a plot shows; the message is the reason."""


@dataclass(frozen=True)
class Plot:
    """One plot: `figure` and `says`, what it shows in a sentence; or `reason`, why there is no figure."""

    name: str
    title: str
    figure: Figure | None
    says: str
    reason: str | None = None


def each(report: Report) -> list[Plot]:
    """Every plot of this kind of report, drawn, or with the reason why not."""
    names = _names(report)
    try:
        import matplotlib
    except ImportError as e:
        return [Plot(name, PLOTS[name][0], None, "", f"no plots without matplotlib: {e}") for name in names]
    with matplotlib.rc_context(_RC):
        return [_drawn(report, name) for name in names]


def _names(report: Report) -> list[str]:
    """Those of :data:`PLOTS` that may belong to this kind of report: of a server, of a table of shapes, of a model."""
    of_a_server = [name for name in PLOTS if name.startswith("server_")]
    if report["backend"] == "server":
        return of_a_server
    return [name for name in PLOTS if name not in of_a_server and (name != "shapes" or layout.shapes_table(report))]


def _drawn(report: Report, name: str) -> Plot:
    title, draw_one = PLOTS[name]
    try:
        figure, series, says = draw_one(report)
    except _NothingToDrawError as e:
        return Plot(name, title, None, "", str(e))
    lines = [f"{title}: {series}", f"{layout.subject(report)}, {layout.place(report)}"]
    heading = "\n".join(wrapped for line in lines for wrapped in textwrap.wrap(line, 62))
    figure.suptitle(heading, fontsize=9, ha="left", x=0.01)
    return Plot(name, title, figure, says)


def draw(report: Report) -> dict[str, Figure]:
    """Name -> figure of the plots that this report has the data for."""
    return {plot.name: plot.figure for plot in each(report) if plot.figure is not None}


def write(report: Report, folder: Path, drawn: list[Plot] | None = None) -> list[Path]:
    """Write NAME.svg and NAME.png of each plot into `folder`, made when missing. Returns their paths.

    Files of plots that this report does not have, left there by an earlier one, are removed. `drawn`: what
    :func:`each` gives, where the caller has it already.

    Raises:
        PlotError: the folder cannot be made, or a file cannot be written or removed.
    """
    written = []
    for plot in each(report) if drawn is None else drawn:
        for kind in ("svg", "png"):
            path = folder / f"{plot.name}.{kind}"
            try:
                if plot.figure is None:
                    path.unlink(missing_ok=True)
                else:
                    folder.mkdir(parents=True, exist_ok=True)
                    _replace(path, svg(plot.figure).encode() if kind == "svg" else _png(plot.figure))
                    written.append(path)
            except OSError as e:
                raise PlotError(f"{path}: cannot be written: {e.strerror}") from e
    return written


def svg(figure: Figure) -> str:
    """The figure as an SVG document, always the same for the same figure."""
    return _saved(figure, "svg", {"Date": None, "Creator": None, "Format": None, "Type": None}).decode()


def inline_svg(plot: Plot, title: str) -> str:
    """A drawn plot as an element of an HTML page: ids of its own, colours as `var(--plot-NAME)`, see :data:`COLOURS`.

    `title` is what a screen reader says; it is the caller's to escape.
    """
    assert plot.figure is not None
    text = svg(plot.figure)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    head = f'<svg class="plot" viewBox="0 0 {size[1]} {size[2]}" role="img" aria-label="{title}">' if size else "<svg>"
    text = re.sub(r"<svg[^>]*>", head, text, count=1)
    text = re.sub(r'\bid="', f'id="{plot.name}-', text)
    text = re.sub(r'\b(?:xlink:)?href="#', f'href="#{plot.name}-', text)
    text = re.sub(r"url\(#", f"url(#{plot.name}-", text)
    names = {colour: name for name, colour in COLOURS.items()}
    text = re.sub(r'\b(fill|stroke)="(#[0-9a-f]{6})"', r'style="\1: \2"', text)  # of a hatch's ground
    text = re.sub(r": (#[0-9a-f]{6})\b", lambda m: f": var(--plot-{names[m[1]]})" if m[1] in names else m[0], text)
    text = text.replace("'DejaVu Sans', ", "").replace("'DejaVu Sans'", "sans-serif")
    return re.sub(r"\n\s*", "\n", text)


def _saved(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(out, format=kind, metadata=metadata)
    return out.getvalue()


def _png(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def _replace(path: Path, data: bytes) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never a half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ---- what the plots need --------------------------------------------------------------------------------------------


def _part(report: Report, name: str) -> dict[str, Any]:
    """The figures of a part.

    Raises:
        _NothingToDrawError: the report has none; with the reason.
    """
    if name in report["errors"]:
        raise _NothingToDrawError(f"part {name} failed: {report['errors'][name]['reason']}")
    if name not in report["parts"]:
        raise _NothingToDrawError(f"part {name} not run")
    return report["parts"][name]


def _needed(figures: dict[str, Any], key: str, what: str) -> Any:
    """What stands under `key`.

    Raises:
        _NothingToDrawError: nothing does, or a null figure; with its reason.
    """
    value: Any = figures.get(key)
    if layout.is_null(value):
        raise _NothingToDrawError(value["reason"])
    if value is None:
        raise _NothingToDrawError(f"the report has no {what}")
    return value


def _figure(height: float, panels: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as New

    figure = New(figsize=(WIDTH, height))
    return figure, list(np.atleast_1d(figure.subplots(panels, 1, **options)))


def _legend(figure: Figure, ncols: int = 2) -> None:
    """Below all panels; an entry that several of them have is there once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(list(entries.values()), list(entries), loc="outside lower left", ncols=ncols)


def _plain(axis: Any, minor: bool = False) -> None:
    """Numbers as they are said, 0.5 or 2000, never 2 x 10^3; labels of minor ticks only if asked for."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))
    if not minor:
        axis.set_minor_formatter(NullFormatter())


# ---- distributions --------------------------------------------------------------------------------------------------


def _steps(samples: Sequence[float], most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution function: sorted samples and the share in per cent that is no larger.

    Of more than `most` samples that many are taken at even ranks, the smallest and the 20 largest always.
    """
    ordered = np.sort(np.asarray(samples, float))
    share = 100 * np.arange(1, ordered.size + 1) / ordered.size
    if ordered.size > most:
        ranks = np.unique(
            np.concatenate([np.linspace(0, ordered.size - 1, most).astype(int), np.arange(-20, 0) % ordered.size])
        )
        return ordered[ranks], share[ranks]
    return ordered, share


def _shown(all_samples: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """From where to where an axis runs that a few far samples shall not squash, and how many lie beyond its end."""
    merged = np.concatenate([np.asarray(samples, float) for samples in all_samples])
    low, high = float(merged.min()), float(merged.max())
    end = float(np.percentile(merged, 99.5))
    if high - low > 3 * (end - low) > 0:
        high = end + 0.25 * (end - low)
    room = 0.04 * (high - low) or 0.02 * abs(high) or 1.0
    return low - room, high + room, int((merged > high + room).sum())


def _distribution(series: Mapping[str, Sequence[float]]) -> tuple[Figure, str]:
    """Histogram above, distribution function below, of samples by their label.

    Returns the figure, and a sentence about the samples beyond the axis, or nothing where there are none.
    """
    figure, (above, below) = _figure(4.3, 2, sharex=True, height_ratios=(1, 1.25))
    start, end, beyond = _shown(list(series.values()))
    inside = np.concatenate([[x for x in samples if x <= end] for samples in series.values()])
    bins = np.histogram_bin_edges(inside, bins=int(np.clip(1.5 * np.sqrt(inside.size), 10, 60))).tolist()
    for i, (label, samples) in enumerate(series.items()):
        weights = np.full(len(samples), 100 / len(samples))
        look: dict[str, Any] = {"color": _SERIES[i % 6], "linestyle": _STYLES[i % 6]}
        if i == 0:
            above.hist(samples, bins=bins, weights=weights, color=_SERIES[0], alpha=0.2)
        above.hist(samples, bins=bins, weights=weights, histtype="step", linewidth=1.2, **look)
        below.step(*_steps(samples), where="post", label=f"{label} (n = {len(samples):,})", **look)
    above.set_ylabel("samples (%)")
    below.set_ylabel("no larger than x (%)")
    below.set_ylim(0, 102)
    below.set_xlim(start, end)
    _plain(below.xaxis)
    most = max(max(samples) for samples in series.values())
    return figure, f" {beyond} samples lie beyond the axis, up to {layout.number(most)}." if beyond else ""


def _token_latency(report: Report) -> _Drawn:
    tokens = _part(report, "tokens")
    main = _needed(tokens, "token_latency", "token latency")
    series = {"token latency": main["samples"]}
    streamed: Any = tokens.get("token_latency_streamed")
    if layout.is_series(streamed):
        series["read by the host, token by token"] = streamed["samples"]
    figure, beyond = _distribution(series)
    below = figure.axes[1]
    marks = [(p, main[p]["value"]) for p in ("p50", "p90", "p99") if main[p]["value"] is not None]
    for p, value in marks:
        share = float(p[1:])
        below.plot([value], [share], marker="o", markersize=4, color=COLOURS["ink"])
        below.annotate(f"{p} {value:.4g}", (value, share), xytext=(5, -10), textcoords="offset points", fontsize=8)
    below.set_xlabel(f"time a token ({main['unit']})")
    _legend(figure, ncols=1)
    said = ", ".join(f"{p} {value:.4g} {main['unit']}" for p, value in marks)
    return figure, "greedy decoding, batch 1", f"Histogram and distribution of the time a token takes: {said}.{beyond}"


def _kernel_latency(report: Report) -> _Drawn:
    latency = _part(report, "latency")
    if "table" in latency:
        raise _NothingToDrawError("a table of shapes takes too few samples of each kernel for a distribution")
    rows = list(layout.fused_rows(latency, "int8"))
    what = "kernel, cold L2"
    series = {layer: s for layer, row in rows if layout.is_series(s := row["kernel"]["cold"])}
    if not series:
        what = "end to end, from and to the host"
        series = {layer: s for layer, row in rows if layout.is_series(s := row["end_to_end"])}
    if not series:
        raise _NothingToDrawError(_first_reason(latency, "no fused product was measured"))
    # The products differ by far more than a product's samples do: each is drawn about its own median.
    about = {
        f"{layer}: {s['median']['value']:.4g} {_unit(s)}": [100 * (x / s["median"]["value"] - 1) for x in s["samples"]]
        for layer, s in series.items()
    }
    figure, beyond = _distribution(about)
    figure.axes[1].set_xlabel("time over the product's median - 1 (%)")
    _legend(figure, ncols=2)
    return (
        figure,
        f"int8, {what}",
        (
            f"Histogram and distribution of how far the samples lie from the median of their product, in per cent. "
            f"Medians: {', '.join(about)}.{beyond}"
        ),
    )


def _server_first_token(report: Report) -> _Drawn:
    series = _needed(_part(report, "server"), "time_to_first_token", "time to the first token")
    return _seen_by_client(series, "time to the first token", "one of each request")


def _server_tokens(report: Report) -> _Drawn:
    server = _part(report, "server")
    if layout.is_series(server.get("inter_token")):
        return _seen_by_client(server["inter_token"], "time between tokens", "each chunk one token")
    series = _needed(server, "inter_chunk", "time between chunks")
    return _seen_by_client(series, "time between chunks", "of one or more tokens")


def _seen_by_client(series: dict[str, Any], what: str, each_is: str) -> _Drawn:
    figure, beyond = _distribution({what: series["samples"]})
    figure.axes[1].set_xlabel(f"{what} ({series['unit']}, clock of the client)")
    _legend(figure)
    median = f"{series['median']['value']:.4g} {series['unit']}"
    return figure, each_is, f"Histogram and distribution of the {what}: median {median}, n = {series['n']}.{beyond}"


def _unit(series: dict[str, Any]) -> str:
    return series["unit"].replace("us", "µs")


def _first_reason(value: Any, otherwise: str) -> str:
    return next(iter(layout.reasons(value)), otherwise)


# ---- roofline -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    name: str
    l2: str
    activation: str
    intensity: float  # operations a byte
    tera_ops: float  # operations a second, in 1e12
    n: int


def _points(latency: dict[str, Any]) -> list[_Point]:
    """Every fused product that was measured: operations are 2 M K N, bytes those that it must move at least."""
    lines: list[tuple[str, int, dict[str, Any], float, float]] = []
    if "table" in latency:
        for shape in layout.measured_rows(latency["table"]["shapes"]):
            for entry in layout.measured_rows(shape["tokens"]):
                name, size = f"{shape['model']} {shape['layer']}", 2.0 * shape["m"] * shape["k"]
                lines += [
                    (name, entry["n"], row, entry["bytes"]["value"], size)
                    for row in layout.measured_rows(entry["rows"])
                ]
    else:
        for activation in ("int8", "float"):
            for layer, row in layout.fused_rows(latency, activation):
                product = latency["products"][layer]
                lines.append((layer, row["n"], row, row["bytes"]["value"], 2.0 * product["m"] * product["k"]))
    found = []
    for name, n, row, size, operations in lines:
        for l2 in ("cold", "warm"):
            median = row["kernel"][l2].get("median", row["kernel"][l2])  # a series, or in the table a figure
            if median["value"] is not None:
                rate = operations * n / median["value"] / 1e6
                found.append(_Point(name, l2, row["activation"], operations * n / size, rate, n))
    return found


def _roofline(report: Report) -> _Drawn:
    latency = _part(report, "latency")
    given = latency.get("roofline")
    peaks: dict[str, Any] = {}
    if isinstance(given, dict) and "points" in given:
        points = [
            _Point(
                p["name"],
                p["l2"],
                p["activation"],
                _of(p["intensity_ops_per_byte"]),
                _of(p["tera_ops_per_s"]),
                p.get("n", 1),
            )
            for p in given["points"]
            if _of(p["tera_ops_per_s"]) is not None and _of(p["intensity_ops_per_byte"]) is not None
        ]
        bandwidth, peaks = given["bandwidth_gb_s"], given["peak"]
    else:
        points, bandwidth = _points(latency), _needed(latency, "bandwidth", "bandwidth")
    if layout.is_null(bandwidth) or bandwidth is None:
        raise _NothingToDrawError(bandwidth["reason"] if bandwidth else "the report has no bandwidth")
    if not points:
        raise _NothingToDrawError(_first_reason(latency, "no fused product was measured"))
    gb_s = _of(bandwidth)
    figure, (axes,) = _figure(3.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    tops = {
        name: (value, unit)
        for key, name, unit in (("int8_tops", "int8", "TOP/s"), ("float16_tflops", "float16", "TFLOP/s"))
        if (value := _of(peaks.get(key))) is not None
    }
    left = min(p.intensity for p in points) / 8
    right = max(max(p.intensity for p in points) * 8, *(1.8e3 * value / gb_s for value, _ in tops.values()), 1)
    roof = max((value for value, _ in tops.values()), default=float("inf"))
    end = min(right, 1e3 * roof / gb_s)
    axes.plot(
        [left, end], [left * gb_s / 1e3, end * gb_s / 1e3], color=COLOURS["ink"],
        label=f"memory: {gb_s:,.0f} GB/s, measured",
    )  # fmt: skip
    for (name, (value, unit)), style in zip(tops.items(), ("--", ":"), strict=False):
        axes.plot(
            [1e3 * value / gb_s, right], [value, value], color=COLOURS["ink"], linestyle=style,
            label=f"peak {name}: {value:,.0f} {unit}",
        )  # fmt: skip
    for i, activation in enumerate(("int8", "float")):
        for l2 in ("cold", "warm") if len(points) <= 40 else ("cold",):
            some = [p for p in points if (p.activation, p.l2) == (activation, l2)]
            axes.plot(
                [p.intensity for p in some], [p.tera_ops for p in some], linestyle="", marker=_MARKERS[i],
                color=_SERIES[i], markersize=4.5 if len(points) < 40 else 3, markeredgewidth=1,
                zorder=3 - 0.5 * i,  # int8 above float where both lie in one place
                markerfacecolor=_SERIES[i] if l2 == "cold" else "none", label=f"{activation}, {l2} L2",
            )  # fmt: skip
    shown = [p for p in points if (p.activation, p.l2) == ("int8", "cold")]
    if len(shown) <= 8:
        _name_points(axes, shown)
    axes.set_xlim(left, right)
    axes.set_xlabel("operations a byte that must be moved (2 M K N / bytes)")
    axes.set_ylabel("10¹² operations a second")
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    _legend(figure, ncols=2)
    best = max(p.tera_ops * 1e3 / (gb_s * p.intensity) for p in shown or points)
    peak_text = "" if tops else " The peaks of the arithmetic units are not in this report."
    return (
        figure,
        "RMSNorm + product, adaptive",
        (
            f"Roofline of RMSNorm + ternary product: {len(points)} measured points under the line of the measured "
            f"bandwidth; the best with a cold L2 reaches {100 * best:.0f} % of it.{peak_text}"
        ),
    )


def _name_points(axes: Axes, points: list[_Point]) -> None:
    """Each product's name once, beside the highest of its points: its operations lie close together.

    A name goes up where it would lie on the one below.
    """
    highest = {p.name.partition(",")[0]: p for p in sorted(points, key=lambda p: p.tera_ops)}
    bottom, top = np.log(axes.get_ylim())
    at = -np.inf
    for name, p in sorted(highest.items(), key=lambda item: item[1].tera_ops):
        at = max(np.log(p.tera_ops), at + _LINE * (top - bottom))
        axes.annotate(
            name, (p.intensity, np.exp(at)), xytext=(9, 0), textcoords="offset points", va="center", fontsize=8,
            color=COLOURS["ink"],
        )  # fmt: skip


_LINE = 0.065
"""What a line of text takes of the height of the axes."""


def _of(x: Any) -> Any:
    """The value of a figure, or a bare number."""
    return x["value"] if isinstance(x, dict) else x


# ---- shapes ---------------------------------------------------------------------------------------------------------


def _shapes(report: Report) -> _Drawn:
    table = layout.shapes_table(report)
    assert table is not None  # else it is no plot of this report
    times: dict[tuple[str, str, int], list[float]] = {}
    for line in table_figures.lines(table):
        if line["over_cublas"]["value"] is not None:
            times.setdefault((line["model"], line["activation"], line["n"]), []).append(line["over_cublas"]["value"])
    if not times:
        raise _NothingToDrawError(_first_reason(table, "nothing to compare with was measured"))
    models = list(dict.fromkeys(model for model, _, _ in times))
    figure, panels = _figure(5.2, 2, sharex=True, sharey=True)
    for axes, activation in zip(panels, ("int8", "float"), strict=True):
        axes.axhline(1, color=COLOURS["ink"], linewidth=1)
        for i, model in enumerate(models):
            numbers = sorted(n for m, a, n in times if (m, a) == (model, activation))
            means = [float(np.exp(np.mean(np.log(times[model, activation, n])))) for n in numbers]
            axes.plot(
                numbers, means, color=_SERIES[i % 6], linestyle=_STYLES[i % 6], marker=_MARKERS[i % 6], markersize=3.5,
                label=model,
            )  # fmt: skip
        axes.set_title(f"{activation} activations", loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("times as fast as cuBLAS (x)")
        _plain(axes.yaxis)
    panels[-1].set_xticks(sorted({n for _, _, n in times}))
    panels[-1].set_xlabel("tokens at once (N)")
    _plain(panels[-1].xaxis)
    _legend(figure, ncols=4)
    first = [value for (_, a, n), values in times.items() if (a, n) == ("int8", 1) for value in values]
    said = f" One token, int8: {min(first):.2f} to {max(first):.2f} times as fast." if first else ""
    return (
        figure,
        "RMSNorm + product, cold L2",
        (
            "How many times as long RMSNorm and float16 cuBLAS take as the fused ternary product with a cold L2, "
            f"geometric mean over the layers of each model, against the number of tokens.{said}"
        ),
    )


# ---- context --------------------------------------------------------------------------------------------------------


def _scaling(report: Report) -> _Drawn:
    scaling = _part(report, "scaling")
    rows = [row for row in layout.measured_rows(_needed(scaling, "rows", "depths")) if _of(row["tok_s"]) is not None]
    if not rows:
        raise _NothingToDrawError(_first_reason(scaling["rows"], "no depth was measured"))
    x = np.array([row["context"] for row in rows])
    y = np.array([row["tok_s"]["value"] for row in rows])
    figure, (axes,) = _figure(3.5)
    synthetic = [row["context"] for row in rows if row["synthetic"]]
    if synthetic:
        before = [c for c in x if c < min(synthetic)]
        start = (max(before) + min(synthetic)) / 2 if before else 0
        axes.axvspan(
            start, x.max() * 1.06, facecolor=COLOURS["band"], edgecolor=COLOURS["grid"], hatch="///", linewidth=0,
            zorder=0, label="beyond the model's context",
        )  # fmt: skip
    fit = scaling.get("fit")
    if isinstance(fit, dict) and not layout.is_null(fit) and _of(fit["ms_per_1k"]) is not None:
        along = np.linspace(0, x.max(), 200)
        ms = fit["ms_at_1k"]["value"] + fit["ms_per_1k"]["value"] * (along - 1024) / 1024
        axes.plot(
            along[ms > 0], 1000 / ms[ms > 0], color=COLOURS["b"], linestyle="--",
            label="fitted: ms a token = straight line",
        )  # fmt: skip
    intervals = [row["tok_s"].get("ci95") or [row["tok_s"]["value"]] * 2 for row in rows]
    spread = np.array([[value - low, high - value] for value, (low, high) in zip(y, intervals, strict=True)]).T
    axes.errorbar(
        x, y, yerr=np.maximum(spread, 0), color=COLOURS["a"], marker="o", markersize=4, capsize=3, linewidth=1,
        label="median, 95 % interval",
    )  # fmt: skip
    axes.set_ylim(0, None)
    axes.set_xlim(-0.02 * x.max() - 1, x.max() * 1.06 + 1)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("tokens a second")
    if x.max() >= 4096:
        axes.set_xticks(np.arange(0, x.max() + 1, 4096 if x.max() <= 32768 else 16384))
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    _legend(figure, ncols=2)
    slope = scaling.get("throughput_degradation_slope_pct_per_1k")
    return (
        figure,
        "greedy decoding, batch 1",
        (
            f"Tokens a second of one sequence against the length of its context: {layout.number(y[0])} at {x[0]:,}, "
            f"{layout.number(y[-1])} at {x[-1]:,}{_cost_of_context(slope)}."
        ),
    )


def _cost_of_context(slope: Any) -> str:
    """What 1,024 more tokens cost, with the interval; that it cannot be told where that includes zero."""
    if not slope or slope["value"] is None:
        return ""
    cost = f"{layout.number(slope['value'], 3)} %"
    if not slope.get("ci95"):
        return f"; each 1,024 tokens cost {cost}"
    low, high = slope["ci95"]
    ends = f"95 % interval {layout.number(low, 3)} to {layout.number(high, 3)}"
    if low <= 0 <= high:
        return f"; no slope can be told: {cost} for each 1,024 tokens, {ends}, which includes 0"
    return f"; each 1,024 tokens cost {cost} ({ends})"


# ---- energy ---------------------------------------------------------------------------------------------------------


def _energy(report: Report) -> _Drawn:
    power = _part(report, "power")
    token = _needed(power, "token", "energy of a token")
    groups = [("a token", token, layout.measured_rows(_needed(token, "windows", "windows of a token")), 1.0, "J")]
    products = power.get("products", {})
    if isinstance(products, dict) and not layout.is_null(products):
        groups += [
            (layer, p, [p["window"]], 1e6, "µJ")
            for layer, p in products.items()
            if not layout.is_null(p) and _of(p["gross_j"]) is not None and layout.is_window(p.get("window"))
        ]
    if _of(token.get("gross_j")) is None:
        raise _NothingToDrawError(_needed(token, "gross_j", "energy of a token"))
    figure, panels = _figure(2.4 + (0.7 + 0.3 * len(groups[1:]) if groups[1:] else 0), 2 if groups[1:] else 1, **(
        {"height_ratios": (1.2, 0.5 + 0.4 * len(groups[1:]))} if groups[1:] else {}
    ))  # fmt: skip
    for axes, some in zip(panels, (groups[:1], groups[1:]), strict=False):
        unit = some[0][4]
        for place, (_, figures, windows, factor, _) in enumerate(some):
            _energy_rows(axes, place, figures, windows, factor, first=place == 0)
        axes.set_yticks(range(len(some)), [name for name, *_ in some])
        axes.set_ylim(len(some) - 0.4, -0.6)
        axes.set_xlim(0, None)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"energy of one {'token' if unit == 'J' else 'fused product, int8, cold L2'} ({unit})")
        _plain(axes.xaxis)
    _legend(figure, ncols=3)
    net = token.get("net_j")
    said = f", {net['value']:.3g} J above idle" if net and net["value"] is not None else ""
    return (
        figure,
        "gross and net of idle",
        (
            f"Energy of a generated token: {token['gross_j']['value']:.3g} J in all{said}, from "
            f"{len(groups[0][2])} windows. Boards measure with about 10 % of error."
        ),
    )


def _energy_rows(
    axes: Axes, place: int, figures: dict[str, Any], windows: list[dict[str, Any]], factor: float, first: bool
) -> None:
    """Gross above, net below: a bar to the median with its interval, and a dot for each window."""
    net = figures.get("net_j")
    kinds: list[tuple[str, Any, str, str, float | None]] = [("gross", figures["gross_j"], COLOURS["a"], "", 0.0)]
    if net and net["value"] is not None:
        kinds.append(("net (idle subtracted)", net, COLOURS["b"], "////", net.get("idle_w")))
    for i, (label, figure, colour, hatch, idle) in enumerate(kinds):
        y = place - 0.19 + 0.38 * i
        value = figure["value"] * factor
        axes.barh(
            y, value, height=0.32, facecolor=(colour, 0.3), edgecolor=colour, hatch=hatch, linewidth=0,
            label=label if first else None,
        )  # fmt: skip
        if figure.get("ci95"):
            low, high = (end * factor for end in figure["ci95"])
            axes.errorbar(value, y, xerr=[[value - low], [high - value]], color=COLOURS["ink"], capsize=3, linewidth=1)
        dots = [
            factor * (w["joules"]["value"] - idle * w["seconds"]) / w["calls"]
            for w in windows
            if idle is not None and w["joules"]["value"] is not None and w["calls"]
        ]
        beside = np.linspace(-0.1, 0.1, len(dots)) if len(dots) > 1 else 0  # in their order
        axes.plot(
            dots, y + beside, linestyle="", marker="o", markersize=3.5, color=colour,
            markeredgecolor=COLOURS["ground"], markeredgewidth=0.4,
            label="one window" if first and i == 0 else None,
        )  # fmt: skip


# ---- the run over time ----------------------------------------------------------------------------------------------


def _telemetry(report: Report) -> _Drawn:
    telemetry = _needed(report, "telemetry", "record of power, clocks and temperature over the run")
    series = {key: s for key, s in telemetry["series"].items() if not layout.is_null(s) and s.get("values")}
    panels = [
        (axis, [(label, series[key]) for key, label in keys if key in series])
        for axis, keys in (
            ("power (W)", [("power_w", "power")]),
            ("clock (MHz)", [("sm_clock_mhz", "SM clock"), ("memory_clock_mhz", "memory clock")]),
            ("temp. (°C)", [("temperature_c", "temperature")]),
        )
    ]
    panels = [(axis, some) for axis, some in panels if some]
    if not panels:
        raise _NothingToDrawError(_first_reason(telemetry["series"], "nothing was sampled over the run"))
    end = max(s["at_s"][-1] for _, some in panels for _, s in some)
    figure, all_axes = _figure(1.4 + 1.15 * len(panels), len(panels), sharex=True)
    for axes, (label, some) in zip(all_axes, panels, strict=True):
        for i, part in enumerate(telemetry.get("parts", [])):
            axes.axvspan(
                part["begin_s"], part["end_s"], facecolor=COLOURS["band"] if i % 2 == 0 else COLOURS["ground"],
                linewidth=0, zorder=0,
            )  # fmt: skip
        for i, (name, s) in enumerate(some):
            at, low, mean, high = _thinned(s["at_s"], s["values"])
            axes.fill_between(at, low, high, color=_SERIES[i], alpha=0.25, linewidth=0)
            axes.plot(at, mean, color=_SERIES[i], linestyle=_STYLES[i], linewidth=1, label=name)
        axes.set_ylabel(label)
        _plain(axes.yaxis)
        if len(some) > 1:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=len(some), borderaxespad=0.1
            )  # between two panels
    for part in telemetry.get("parts", []):
        if part["end_s"] - part["begin_s"] > 0.035 * end:  # one that is too narrow has no room for its name
            middle = (part["begin_s"] + part["end_s"]) / 2
            all_axes[0].annotate(
                part["name"], (middle, 1.02), xycoords=("data", "axes fraction"), rotation=30, ha="left", va="bottom",
                fontsize=8, rotation_mode="anchor",
            )  # fmt: skip
    all_axes[-1].set_xlim(0, end)
    all_axes[-1].set_xlabel("seconds since the run began; bands are its parts")
    _plain(all_axes[-1].xaxis)
    said = [f"{name} {_from_to(s['values'])} {s['unit'].replace('C', '°C')}" for _, some in panels for name, s in some]
    return (
        figure,
        "sampled with NVML",
        f"Power, clocks and temperature of the GPU over the {end:.0f} s of the run: {', '.join(said)}.",
    )


def _from_to(values: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(map(layout.number, (min(values), max(values)))))


def _thinned(at: Sequence[float], values: Sequence[float], most: int = 400) -> tuple[np.ndarray, ...]:
    """Time, smallest, mean and largest of each of at most `most` pieces of a series."""
    pieces = np.array_split(np.arange(len(values)), min(most, len(values)))
    v, t = np.asarray(values, float), np.asarray(at, float)
    columns = [(t[p].mean(), v[p].min(), v[p].mean(), v[p].max()) for p in pieces]
    return tuple(np.array(columns).T)


# ---- kernels of a token ---------------------------------------------------------------------------------------------


def _kernels(report: Report) -> _Drawn:
    kernels = _part(report, "kernels")
    trace = kernels.get("trace")
    times = kernels.get("where_the_time_goes")
    kinds = layout.measured_rows(times.get("kernels")) if isinstance(times, dict) else []
    overlap = ""
    if isinstance(trace, dict) and layout.measured_rows(trace.get("kernels")):
        overlap = f" {layout.overlap(trace)}"
        rows = [
            (k["name"].removeprefix("edgellm_"), _of(k["us"]), None, _floor_of(k["name"], kinds), _of(k["launches"]))
            for k in trace["kernels"]
        ]
        how = "GPU time, traced"
    else:
        _needed(kernels, "where_the_time_goes", "time of each kernel")
        rows = [
            (k["kind"], _of(k["time_us"]), k["time_us"].get("ci95"), _of(k["floor_us"]), k["launches_per_token"])
            for k in kinds
        ]
        how = "what the token gains without it"
    rows = [row for row in rows if row[1] is not None]
    if not rows:
        raise _NothingToDrawError("no kernel of a token was timed")
    rows.sort(key=lambda row: -row[1])
    hidden = len(rows) - 14
    rows = rows[:14]
    total = sum(row[1] for row in rows)
    figure, (axes,) = _figure(1.5 + 0.27 * len(rows))
    most = max(max(row[1], row[3] or 0) for row in rows)
    for i, (_, us, interval, floor, launches) in enumerate(rows):
        axes.barh(i, us, height=0.62, color=COLOURS["a"], alpha=0.8, linewidth=0, label=how if i == 0 else None)
        if interval:
            axes.errorbar(us, i, xerr=[[us - interval[0]], [interval[1] - us]], color=COLOURS["ink"], linewidth=0.8)
        if floor is not None:
            known = any(row[3] is not None for row in rows[:i])
            axes.plot(
                [floor, floor], [i - 0.42, i + 0.42], color=COLOURS["b"], linewidth=2.2,
                label=None if known else "floor: its bytes only read",
            )  # fmt: skip
        axes.annotate(
            f"{100 * us / total:.1f} %  ({launches:g} x)", (max(us, floor or 0, (interval or [0, 0])[1]), i),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.28)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("µs of a token (its launches in brackets)")
    _plain(axes.xaxis)
    _legend(figure, ncols=2)
    more = f" {hidden} smaller ones are not shown." if hidden > 0 else ""
    return (
        figure,
        how,
        (
            f"Share of each kernel in a token ({how}): "
            f"{', '.join(f'{name} {100 * us / total:.1f} %' for name, us, *_ in rows[:4])}.{more}{overlap}"
        ),
    )


def _floor_of(kernel: str, kinds: list[dict[str, Any]]) -> float | None:
    """The floors in microseconds of all that this traced kernel does in a token; None where one of them has none."""
    floors = [_of(kind["floor_us"]) for kind in kinds if f"{kernel}.cu" in kind["files"] or kernel in kind["kernels"]]
    return sum(floors) if floors and None not in floors else None


PLOTS: dict[str, tuple[str, Callable[[Report], _Drawn]]] = {
    "token_latency": ("Token latency", _token_latency),
    "kernel_latency": ("Spread of the fused products", _kernel_latency),
    "roofline": ("Roofline", _roofline),
    "shapes": ("Against cuBLAS", _shapes),
    "scaling": ("Tokens a second against context", _scaling),
    "energy": ("Energy", _energy),
    "kernels": ("Kernels of a token", _kernels),
    "telemetry": ("GPU over the run", _telemetry),
    "server_first_token": ("First token", _server_first_token),
    "server_tokens": ("Next tokens", _server_tokens),
}
"""Name -> title and how it is drawn."""
