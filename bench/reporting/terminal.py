"""The summary of a report for a terminal of 80 columns, from its JSON alone."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..metrics import Metric, is_metric
from . import document, layout, stability, table_figures
from .layout import Report


def summary(report: Report) -> Group:
    """A summary for a terminal of 80 columns: warnings first, then the figures that were measured, then the verdict."""
    known = {key: figure for key, figure in report["summary"].items() if figure["value"] is not None}
    shown = known | _beside_the_summary(report)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(overflow="fold")  # gives way in a narrow terminal; a figure never does
    table.add_column("value", justify="right", style="bold", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("95 % interval", justify="right", style="dim", header_style="dim", no_wrap=True)
    rows = _products(report) | {key: shown[key] for key in _HEADLINES if key in shown}
    rows = {key: layout.rescaled(figure) for key, figure in rows.items()}
    for (key, figure), interval in zip(rows.items(), _intervals(rows.values()), strict=True):
        table.add_row(key, layout.short(figure), figure.get("unit", ""), interval)
    return Group(
        Text(f"{layout.subject(report)} on {layout.place(report)}", style="bold"),
        *(Text(warning, style="yellow") for warning in document.warnings(report)),
        *((Text(""), table) if table.row_count else ()),
        Text(""),
        Text(f"{len(known)} of {len(report['summary'])} figures measured, the others are null with the reason."),
        *((Text(stable),) if table.row_count and (stable := _stable(report)) else ()),
    )


def _stable(report: Report) -> str:
    """What disturbed no figure; only what was read, and nothing where something else was disturbed."""
    none = stability.ruled_out(report) if report.get("stability") == [] else []
    return f"Stable: {', '.join(none)}." if none else ""


def _intervals(figures: Iterable[Metric]) -> list[str]:
    """Those of all rows, with their ends below each other where the column is set to the right."""
    ends = [[layout.short(end) for end in figure.get("ci95") or ()] for figure in figures]
    width = max((len(pair[1]) for pair in ends if pair), default=0)
    return [f"{pair[0]} to {pair[1]:>{width}}" if pair else "" for pair in ends]


def _products(report: Report) -> dict[str, Metric]:
    """Median of each fused product where no token was measured: by kernel with a cold L2, or on the host end to end."""
    if "latency" not in report["parts"] or "tokens" in report["parts"]:
        return {}
    found: dict[str, Metric] = {}
    latency = report["parts"]["latency"]
    for layer, row in layout.fused_rows(latency, "int8"):
        slowed = document.throttled(row, latency["products"][layer], None)
        cold = layout.one_l2(row["kernel"], "cold")
        for name, series in (("cold L2", cold), ("end to end", row["end_to_end"])):
            if layout.is_series(series) and series["median"]["value"] is not None:
                found[f"{layer}, fused, int8, {name}"] = series["median"]
                break
        ratio = layout.one_l2(row.get("ratio_to_floor"), "cold")
        if is_metric(ratio) and ratio["value"] is not None:
            mark = table_figures.mark([name for name in slowed if name in (table_figures.OWN, "floor")])
            found[f"{layer}, over its floor{f' ({mark})' if mark else ''}"] = ratio
    return found


def _beside_the_summary(report: Report) -> dict[str, Metric]:
    """The headlines that the original's summary has not, those that were measured."""
    found = {key: report["parts"].get(part, {}).get(key) for key, part in _NEW_HEADLINES.items()}
    return {key: figure for key, figure in found.items() if figure and figure["value"] is not None}


_HEADLINES = (
    "client_tok_s",
    "client_requests_s",
    "client_first_token_ms",
    "client_token_ms",
    "throughput_tok_s",
    "batch_tok_s",
    "prompt_tok_s",
    "time_to_first_token_ms",
    "p50_token_latency_ms",
    "p99_token_latency_ms",
    "throughput_1k_ctx_tok_s",
    "throughput_4k_ctx_tok_s",
    "throughput_8k_ctx_tok_s",
    "throughput_16k_ctx_tok_s",
    "time_16k_over_0",
    "throughput_degradation_slope_pct_per_1k",
    "energy_per_token_j",
    "avg_power_w",
    "peak_power_w",
    "kernels_per_token",
    "avg_kernel_exec_time_ms",
    "host_sync_calls_per_token",
    "gpu_utilization_pct",
    "cpu_utilization_pct",
    "vram_used_mb",
    "host_ram_used_mb",
)
"""What the terminal shows, where it was measured."""

_NEW_HEADLINES = {
    "batch_tok_s": "tokens",
    "prompt_tok_s": "tokens",
    "time_to_first_token_ms": "tokens",
    "time_16k_over_0": "scaling",
    "client_tok_s": "server",
    "client_requests_s": "server",
    "client_first_token_ms": "server",
    "client_token_ms": "server",
}
"""Those that are not in the summary, whose keys are the original's, and the part that measures them."""
