"""The report: its JSON, the Markdown made from it, and the summary for a terminal.

report.json is one object:

    schema_version      semver of this layout. A reader of 1.x can read every later 1.y: keys are added, never renamed,
                        and never change their meaning or unit; what does that makes 2.0.0.
    workload            figures that say what was run (model_name, batch_size, ...), and when
    backend             "cuda" or "numpy"
    no_gpu              null, or why no GPU was measured, and what to do about it
    quick               true: shorter windows and fewer samples than a quotable report needs
    command             the command line
    environment         commit, GPU, driver, CUDA and CPU, also of the report of a single part; `tuned`: how many
                        choices of `edgellm tune` were in use, and their file or null (since 1.1)
    model               {config, weights, body_bytes, head_bytes, decoder}; `decoder`: {activation, dtype, head,
                        kv_cache} of what was measured (since 1.2). It and head_bytes are null when no part decodes
    parts               name of a part -> its figures; see the module of that name in edgellm_cupy.bench. `latency` of a
                        table of shapes has no products, but `table` and `summary` of :mod:`.table` (since 1.1)
    seconds             name of a part -> how long it took
    errors              name of a part that failed -> {reason, traceback}
    decoder_check       how far the GPU's logits lie from the reference; null on NumPy, which is the reference
    failures            one line for each result that was wrong; no speed that rests on one is reported
    interrupted         true: Ctrl-C ended the run before its last part
    summary             the keys of :data:`KEYS`, in that order, each one a figure

A figure is ``{value, unit, ...}`` or ``{value: null, reason}`` (see :mod:`.metrics`). Markdown and terminal text are
made from this object alone, so that they can be made again later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..errors import EdgeLLMError
from . import table_figures
from .metrics import Metric, is_metric, missing

SCHEMA_VERSION = "1.2.0"

Report = dict[str, Any]

KEYS = {
    "timestamp": "workload",
    "benchmark_version": "workload",
    "gpu_model": "hardware",
    "driver_version": "hardware",
    "cuda_version": "hardware",
    "compute_capability": "hardware",
    "vram_total_mb": "hardware",
    "power_limit_w": "hardware",
    "avg_power_w": "power",
    "peak_power_w": "power",
    "energy_per_token_j": "power",
    "vram_used_mb": "utilisation",
    "host_ram_used_mb": "utilisation",
    "pcie_h2d_per_token_bytes": "transfer",
    "pcie_d2h_per_token_bytes": "transfer",
    "mean_token_latency_ms": "tokens",
    "p50_token_latency_ms": "tokens",
    "p90_token_latency_ms": "tokens",
    "p95_token_latency_ms": "tokens",
    "p99_token_latency_ms": "tokens",
    "max_token_latency_ms": "tokens",
    "token_gap_variance_ms2": "tokens",
    "throughput_tok_s": "tokens",
    "throughput_1k_ctx_tok_s": "scaling",
    "throughput_4k_ctx_tok_s": "scaling",
    "throughput_8k_ctx_tok_s": "scaling",
    "throughput_16k_ctx_tok_s": "scaling",
    "throughput_degradation_slope_pct_per_1k": "scaling",
    "kernels_per_token": "kernels",
    "avg_kernel_exec_time_ms": "kernels",
    "gpu_utilization_pct": "utilisation",
    "cpu_utilization_pct": "cpu",
    "cpu_peak_pct": "cpu",
    "threads_used": "cpu",
    "host_sync_calls_per_token": "kernels",
    "model_name": "workload",
    "batch_size": "workload",
    "num_layers": "workload",
    "hidden_size": "workload",
    "quantization": "workload",
    "sampling_method": "workload",
    "temperature": "workload",
    "kv_cache_enabled": "workload",
    "os": "hardware",
    "os_version": "hardware",
    "nvcc_version": "reproducibility",
    "gcc_version": "reproducibility",
    "build_flags": "reproducibility",
    "clock_locking": "reproducibility",
    "persistence_mode": "hardware",
}
"""Every key of the summary, in its order, and the section of the report that measures it."""


class ReportError(EdgeLLMError):
    """A report cannot be read or written; the message names the file."""


def summary(report: Report) -> dict[str, Metric]:
    """The figures of :data:`KEYS` from the report's sections; null with the reason where a section lacks one."""
    sections = {"workload": report["workload"], **report["parts"]}
    environment = report.get("environment", {})

    def figure(key: str, section: str) -> Metric:
        if section in report["errors"]:
            return missing(f"part {section} failed: {report['errors'][section]['reason']}")
        if section not in sections and key in environment:
            return environment[key]
        if section not in sections:
            return missing(
                f"interrupted in or before part {section}" if report["interrupted"] else f"part {section} not run"
            )
        return sections[section].get(key) or missing(f"part {section} does not measure it")

    return {key: figure(key, section) for key, section in KEYS.items()}


# ---- files ----------------------------------------------------------------------------------------------------------


def write(report: Report, folder: Path) -> list[Path]:
    """Write report.json and report.md into `folder`, which is made when it is missing. Returns their paths.

    Raises:
        ReportError: the folder cannot be made, or a file cannot be written.
    """
    return [_replace(folder / "report.json", _json(report)), _replace(folder / "report.md", markdown(report))]


def remake(path: Path, folder: Path) -> Path:
    """Write report.md into `folder` from the report.json at `path`. Returns its path.

    Raises:
        ReportError: see :func:`load` and :func:`write`.
    """
    report = load(path)
    try:
        text = markdown(report)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ReportError(f"{path}: not as this program writes it: {type(e).__name__} {e}") from e
    return _replace(folder / "report.md", text)


def make_folder(folder: Path) -> None:
    """Make the folder of a report, and its parents, and see that files can be made in it.

    Raises:
        ReportError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ReportError(f"{folder}: cannot be made: {e.strerror}") from e
    probe = folder / f".edgellm.{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise ReportError(f"{folder}: cannot be written to: {e.strerror}") from e


def load(path: Path) -> Report:
    """Read a report.json.

    Raises:
        ReportError: the file is unreadable, is no report, or has a schema_version of another major number.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ReportError(f"{path}: not a readable report: {e}") from e
    found = report.get("schema_version") if isinstance(report, dict) else None
    if not isinstance(found, str):
        raise ReportError(f"{path}: not a report: it has no schema_version")
    if found.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ReportError(f"{path}: schema_version is {found}, this program reads {SCHEMA_VERSION.split('.')[0]}.x")
    if lacking := [key for key in _SECTIONS if key not in report]:
        raise ReportError(f"{path}: not a whole report: {lacking[0]!r} is missing")
    return report


def _json(report: Report) -> str:
    """The report with one key a line, and each list of numbers on one line."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    # No string matches: a line break inside one is written as \\n.
    return re.sub(r'\[\n([^][{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)


def _replace(path: Path, text: str) -> Path:
    """Write beside and rename: a reader sees the old file or the new one, never a half."""
    make_folder(path.parent)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as e:
        raise ReportError(f"{path}: cannot be written: {e.strerror}") from e
    return path


# ---- Markdown -------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The whole report as text; it ends with the table of the summary."""
    lines = _header(report)
    for name, figures in report["parts"].items():
        lines += ["", f"## {_TITLES.get(name, name.capitalize())}", *_section(name, figures)]
    lines += ["", "## Summary", ""]
    lines += _table(["Metric", "Value"], [[key, _value(figure)] for key, figure in report["summary"].items()])
    return "\n".join(lines) + "\n"


def place(report: Report) -> str:
    """What was measured: the GPU's name, or the NumPy backend with the CPU's name where that is known."""
    if not report["no_gpu"]:
        return report["summary"]["gpu_model"]["value"] or "the GPU"
    facts = {**report.get("environment", {}), **report["parts"].get("hardware", {})}
    cpu = facts.get("cpu_model", {}).get("value")
    return f"the NumPy backend ({cpu})" if cpu else "the NumPy backend"


def subject(report: Report) -> str:
    """What was run: the model's name, or the table of shapes."""
    table = shapes_table(report)
    return f"a table of {len(table['shapes'])} shapes" if table else report["model"]["config"]["name"]


def shapes_table(report: Report) -> dict[str, Any] | None:
    """The `table` of :mod:`.table`, if this report has one."""
    return report["parts"].get("latency", {}).get("table")


def warnings(report: Report) -> list[str]:
    """What a reader must know before any figure, one sentence each."""
    found = []
    if report["no_gpu"]:
        found.append(f"No GPU was measured, everything ran in NumPy on the host: {report['no_gpu']}")
    if report["quick"]:
        found.append("Quick run: short windows and few samples. Do not quote it.")
    if report["interrupted"]:
        found.append("Interrupted: the parts that are missing did not run.")
    slowed = {name: count for name, figures in report["parts"].items() if (count := _count_throttled(figures))}
    if slowed:
        where = ", ".join(f"{name} ({count})" for name, count in slowed.items())
        found.append(f"Throttled: the GPU held its clocks down during measurements of {where}. They are marked.")
    found += [f"Wrong result: {failure}" for failure in report["failures"]]
    found += [f"Part {name} failed: {error['reason']}" for name, error in report["errors"].items()]
    return found


def _count_throttled(value: Any) -> int:
    """How many measurements inside `value` ran throttled."""
    if isinstance(value, list):
        return sum(map(_count_throttled, value))
    if not isinstance(value, dict):
        return 0
    return _is_throttled(value) + sum(map(_count_throttled, value.values()))


def _is_throttled(conditions: dict[str, Any]) -> bool:
    """Do these conditions (see :func:`.utilisation.conditions`) say so?"""
    throttled: Any = conditions.get("throttled")
    return is_metric(throttled) and throttled["value"] is True


def _header(report: Report) -> list[str]:
    model, workload, environment = report["model"], report["workload"], report.get("environment", {})
    config = model["config"]
    lines = [f"# edgellm benchmark: {subject(report)} on {place(report)}", ""]
    for warning in warnings(report):
        lines += [f"> **{_escape(warning)}**", ""]
    shape = (
        f"{config['num_layers']} layers, hidden {config['hidden_size']}, {config['num_heads']} heads, "
        f"{config['num_kv_heads']} KV heads, intermediate {config['intermediate_size']}"
        f"{' gated' if config['gated'] else ''}, vocabulary {config['vocab_size']}, context {config['max_context']}"
    )
    check = report["decoder_check"]
    head = "" if model["head_bytes"] is None else f", head {model['head_bytes']} bytes"
    stored = model.get("decoder")  # not in reports before 1.2
    decoder = {
        "Model": shape,
        "Weights": f"{_escape(model['weights'])}; body {model['body_bytes']} bytes{head}",
        **({"Decoder": _inline(stored)} if stored else {}),
        "Decoder against the reference": "; ".join(filter(None, [with_unit(check), _detail(check)])),
    }
    facts = {
        **({} if shapes_table(report) else decoder),
        "When": f"{_value(workload['timestamp'])}, parts {sum(report['seconds'].values()):.0f} s",
        "Command": f"`{_escape(report['command'])}`",
        "Program": f"edgellm-cupy {_value(workload['benchmark_version'])}, schema {report['schema_version']}",
        **({"Source": _source(environment)} if environment else {}),
        **({"Tuned choices": _tuned(environment["tuned"])} if "tuned" in environment and not report["no_gpu"] else {}),
    }
    return [
        *lines,
        *_table(["Run", ""], [[key, value] for key, value in facts.items()]),
        "",
        "Intervals are 95 % confidence intervals. `null` is followed by the reason. A series of samples is given by "
        "its median, the main ones also by their statistics; those of all others, and the samples, are in report.json.",
    ]


def _source(environment: dict[str, Any]) -> str:
    """The commit, and whether files differ from it."""
    modified = environment["git_modified"]["value"] is True
    return f"commit {_value(environment['git_commit'])}{', with changes' if modified else ''}"


def _tuned(tuned: Metric) -> str:
    """How many choices of `edgellm tune` this run used, and from where."""
    return f"{_value(tuned)}, of `{_escape(tuned['file'])}`" if tuned.get("file") else _value(tuned)


def _section(name: str, figures: dict[str, Any]) -> list[str]:
    """A part: what its own layout or the general one makes of it, then the statistics of its main series."""
    lines = _latency(figures) if name == "latency" else _body(_without_windows(figures), "###")
    if windows := list(_windows(figures, "")):
        lines += ["", "### Windows", "", *_rows(windows), *_null_reasons(_reasons(windows))]
    if series := [(label, value) for label, value in _main_series(name, figures) if _is_series(value)]:
        lines += ["", "### Statistics", "", *_statistics(series)]
    return lines


_PRODUCT_COLUMNS = [
    "product", "M x K", "operation", "activation", "cold", "x vs cuBLAS", "x vs unfused", "/ floor", "GB/s cold",
    "% bandwidth cold", "warm", "/ floor warm", "device", "end to end",
]  # fmt: skip
_PRODUCT_NOTE = (
    "Medians in microseconds, batch 1. `x vs`, with a cold L2: how many times as long the same takes otherwise, by "
    "RMSNorm and float16 cuBLAS (a product alone: by cuBLAS), or in separate launches of ours. `/ floor`: over a "
    "kernel that only reads the same bytes."
)


def _latency(figures: dict[str, Any]) -> list[str]:
    """A line for each operation on each product, and one for what each product is compared with."""
    lines = _body({key: value for key, value in figures.items() if key not in ("products", "table", "summary")}, "###")
    if "table" in figures:
        return lines + _shapes(figures["table"], figures["summary"])
    rows, yardsticks = [], []
    for layer, product in figures["products"].items():
        size = f"{product['m']} x {product['k']}"
        rows += [[layer, size, *_product_row(row)] for row in product["rows"]]
        baselines = {f"{name} cold": _l2(series, "cold") for name, series in product["baselines"].items()}
        floor = {f"floor {l2}": series for l2, series in product["floor"].items()}
        yardsticks.append({"product": layer, "M x K": size, **floor, **baselines})
    lines += ["", "### Products", "", _PRODUCT_NOTE, "", *_table(_PRODUCT_COLUMNS, rows)]
    if _count_throttled(figures["products"]):
        lines += ["", "**throttled**: the GPU held its clocks down meanwhile, see `conditions` in report.json."]
    lines += _null_reasons(_reasons(figures["products"]))
    if any(_is_series(value) for row in yardsticks for value in row.values()):  # none on NumPy
        lines += ["", "### What they are compared with", "", *_rows(yardsticks)]
    return lines


def _shapes(table: dict[str, Any], summary: dict[str, Metric]) -> list[str]:
    """The table of shapes: its summary, then a line for each shape, number of tokens and activation."""
    columns = ["shape", "M x K", "N", "activation", *table_figures.COLUMNS.values()]
    rows = []
    for line in table_figures.lines(table):
        cells = [table_figures.cell(line[key]) for key in table_figures.COLUMNS]
        rows.append([line["shape"] + _marks(line["row"]), line["size"], str(line["n"]), line["activation"], *cells])
    shapes = [table_figures.NOTES, "", *_table(columns, rows), *_null_reasons(_reasons(table))]
    return ["", "### Summary of the shapes", *_body(summary, "###"), "", "### Shapes", "", *shapes]


def _marks(row: dict[str, Any]) -> str:
    return f"{'' if row['correct'] else ' **wrong**'}{' **throttled**' if _is_throttled(row['conditions']) else ''}"


def _product_row(row: dict[str, Any]) -> list[str]:
    fused = row["op"] == "rmsnorm_ternary_matmul"
    faster = row.get("speedup_over", {})  # none on NumPy
    kernel, floor = row["kernel"], row["ratio_to_floor"]
    figures = [
        kernel["cold"],
        _l2(faster.get("cublas_fp16" if fused else "cublas_fp16_product"), "cold"),
        _l2(faster.get(f"unfused_ternary_{row['activation']}"), "cold") if fused else "",
        *(floor["cold"], row["gb_per_s"], row["bandwidth_pct"]),
        *(kernel["warm"], floor["warm"], row["device"], row["end_to_end"]),
    ]
    return [row["op"] + _marks(row), row["activation"], *map(_short, figures)]


def _l2(pair: Any, l2: str) -> Any:
    """One of a cold and a warm figure; or what stands in their place."""
    return pair[l2] if isinstance(pair, dict) and not is_metric(pair) else pair


def _main_series(name: str, figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The series whose spread a reader asks for, as the original benchmark printed it."""
    if name == "latency":  # of a table of shapes there are none
        fused = [
            (layer, row)
            for layer, product in figures["products"].items()
            for row in product["rows"]
            if (row["op"], row["activation"]) == ("rmsnorm_ternary_matmul", "int8")
        ]
        for layer, row in fused:
            yield f"{layer} fused int8, kernel cold", row["kernel"]["cold"]
            yield f"{layer} fused int8, device", row["device"]
            yield f"{layer} fused int8, end to end", row["end_to_end"]
    elif name == "tokens":
        yield "time to the first token", figures.get("first_token")
        yield "token latency", figures.get("token_latency")
    elif name == "scaling":
        for row in figures.get("rows", []):
            yield f"token latency at context {row['context']}", row["latency"]


_STATISTICS = ("mean", "std", "min", "max", "p50", "p90", "p95", "p99", "variance", "gap_variance", "longest_stall")


def _statistics(series: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Percentiles whose tail holds too few samples are left as `null` here; report.json says why."""
    columns = ["series", "unit", "n", *(key.replace("_", " ") for key in _STATISTICS)]
    rows = [
        [label, s["unit"], str(s["n"]), *(_number(s[key]["value"], 5) for key in _STATISTICS)] for label, s in series
    ]
    return _table(columns, rows)


# ---- the general layout ---------------------------------------------------------------------------------------------


def _body(figures: dict[str, Any], heading: str) -> list[str]:
    """Any figures. Single ones and plain groups are lines of one table, those that are null are listed by reason.

    Rows, and plain groups side by side, become tables of their own; what is nested deeper gets a heading.
    """
    known: list[list[str]] = []
    nulls: dict[str, list[str]] = {}
    nested: list[str] = []
    for key, value in figures.items():
        if _is_null(value):
            nulls.setdefault(value["reason"], []).append(f"`{key}`")
        elif _is_series(value):
            known.append([key, with_unit(value["median"]), f"median; {_detail(value['median'])}"])
        elif is_metric(value) or _is_scalar(value):
            known.append([key, with_unit(value), _detail(value)])
        elif _is_plain(value):
            known.append([key, _inline(value), ""])
        elif _is_rows(value):
            nested += ["", f"{heading} {key}", "", *_rows(value), *_null_reasons(_reasons(value))]
        elif _is_plain_groups(value):
            rows = [{"name": name, **group} for name, group in value.items() if not _is_null(group)]
            rest = {name: group for name, group in value.items() if _is_null(group)}
            nested += ["", f"{heading} {key}", "", *_rows(rows), *_null_reasons(_reasons(rows)), *_body(rest, heading)]
        elif isinstance(value, dict) and value:
            nested += ["", f"{heading} {key}", *_body(value, heading + "#")]
    lines = ["", *_table(["Figure", "Value", "Detail"], known)] if known else []
    for reason, keys in nulls.items():
        lines += ["", f"null: {', '.join(keys)} ({_escape(reason)})"]
    return lines + nested


def _rows(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each row; what is nested in it becomes columns of their own, a series its median."""
    flat = [dict(_leaves(row)) for row in rows]
    columns: dict[str, str] = {}  # name -> heading: with the unit, if any row has one
    for name, value in (leaf for row in flat for leaf in row.items()):
        unit = value.get("unit") if isinstance(value, dict) else None
        if unit or name not in columns:
            columns[name] = f"{name} ({unit})" if unit else name
    return _table(list(columns.values()), [[_short(row.get(name, "")) for name in columns] for row in flat])


def _leaves(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        whole = not isinstance(value, dict) or is_metric(value) or _is_series(value) or "throttled" in value
        yield from [(f"{prefix}{key}", value)] if whole else _leaves(value, f"{prefix}{key} ")


def _windows(value: Any, label: str) -> Iterator[dict[str, Any]]:
    """The windows of :mod:`.power` anywhere inside `value`, as rows that begin with their place."""
    if isinstance(value, list):
        for i, inner in enumerate(value, 1):
            yield from _windows(inner, f"{label} {i}")
    elif _is_window(value):
        yield {"window": label, **value}
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _windows(inner, f"{label} {key}".strip())


def _without_windows(value: Any) -> Any:
    if not isinstance(value, dict) or is_metric(value) or _is_series(value):
        return value
    return {
        key: _without_windows(inner)
        for key, inner in value.items()
        if not _is_window(inner) and not (_is_rows(inner) and all(map(_is_window, inner)))
    }


def _reasons(value: Any) -> list[str]:
    """Why figures are null, anywhere inside `value`, each reason once. Not those inside a series."""
    if _is_null(value):
        return [value["reason"]]
    if _is_series(value) or not isinstance(value, (dict, list)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return list(dict.fromkeys(reason for x in inner for reason in _reasons(x)))


def _null_reasons(reasons: list[str]) -> list[str]:
    return ["", *(f"null: {_escape(reason)}  " for reason in reasons)] if reasons else []


# ---- cells ----------------------------------------------------------------------------------------------------------


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def _is_null(value: Any) -> bool:
    return is_metric(value) and value["value"] is None


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _is_series(value: Any) -> bool:
    """What :func:`.timing.summarise` returns."""
    return isinstance(value, dict) and "samples" in value and "median" in value


def _is_plain(value: Any) -> bool:
    """A group of single figures and nothing else."""
    if not isinstance(value, dict) or not value or is_metric(value):
        return False
    return all(is_metric(inner) or _is_scalar(inner) for inner in value.values())


def _is_plain_groups(value: Any) -> bool:
    """Plain groups by name, of which some may be null."""
    if not isinstance(value, dict) or not any(map(_is_plain, value.values())):
        return False
    return all(_is_plain(inner) or _is_null(inner) for inner in value.values())


def _is_window(value: Any) -> bool:
    return isinstance(value, dict) and "joules" in value and "conditions" in value


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return f"| {' | '.join(cells)} |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: Any, digits: int = 6) -> str:
    """A scalar or a list as text, a float with that many significant digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    if not isinstance(value, list):
        return _escape(str(value))
    if not all(map(_is_scalar, value)):
        return f"{len(value)} in report.json"
    sizes = all(isinstance(inner, int) for inner in value)  # of a grid or a block
    return (" x " if sizes else ", ").join(_number(inner, digits) for inner in value) or "none"


def _value(x: Any) -> str:
    """The bare value of a figure or a scalar, or ``null (reason)``."""
    if _is_null(x):
        return f"null ({_escape(x['reason'])})"
    return _number(x["value"] if is_metric(x) else x)


def _short(x: Any) -> str:
    """A cell of a wide table: four digits, a series its median, the reasons of nulls below the table."""
    if _is_plain(x):
        return _inline(x)
    if _is_series(x):
        x = x["median"]
    return _number(x["value"] if is_metric(x) else x, 4)


def _inline(group: dict[str, Any]) -> str:
    """A plain group on one line."""

    def cell(x: Any) -> str:
        return f"{with_unit(x)} ({_interval(x)})" if is_metric(x) and x.get("ci95") else with_unit(x)

    return "; ".join(f"{key}: {cell(value)}" for key, value in group.items())


def _interval(figure: Metric) -> str:
    return f"interval {' to '.join(map(_number, figure['ci95']))}"


def with_unit(x: Any) -> str:
    """A figure as text: its value with the unit, or ``null (reason)``."""
    unit = x.get("unit") if is_metric(x) and x["value"] is not None else None
    return f"{_value(x)} {unit}" if unit else _value(x)


def _detail(x: Any) -> str:
    """Everything that a figure says about itself beside value, unit and reason."""
    if not is_metric(x):
        return ""
    said = []
    for key, value in x.items():
        if key == "ci95" and value:
            said.append(_interval(x))
        elif key not in ("value", "unit", "reason", "ci95") and _is_scalar(value):
            said.append(f"{key}: {_number(value)}")
    return "; ".join(said)


# ---- terminal -------------------------------------------------------------------------------------------------------


def terminal(report: Report) -> Group:
    """A summary for a terminal of 80 columns: warnings first, then the figures that were measured."""
    known = {key: figure for key, figure in report["summary"].items() if figure["value"] is not None}
    shown = known | _beside_the_summary(report)
    table = Table(box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", style="bold")
    table.add_column("95 % interval", style="dim", header_style="dim")
    for key in (key for key in _HEADLINES if key in shown):
        figure = shown[key]
        interval = " to ".join(map(_short, figure.get("ci95") or ()))
        table.add_row(key, f"{_short(figure)} {figure.get('unit', '')}".rstrip(), interval)
    nulls = len(report["summary"]) - len(known)
    return Group(
        Text(f"{subject(report)} on {place(report)}", style="bold"),
        *(Text(warning, style="yellow") for warning in warnings(report)),
        *((Text(""), table) if table.row_count else ()),
        Text(""),
        Text(f"{len(known)} of {len(report['summary'])} figures measured, {nulls} null with their reason."),
    )


def _beside_the_summary(report: Report) -> dict[str, Metric]:
    """The headlines that the original's summary has not, those that were measured."""
    found = {key: report["parts"].get(part, {}).get(key) for key, part in _NEW_HEADLINES.items()}
    return {key: figure for key, figure in found.items() if figure and figure["value"] is not None}


_TITLES = {
    "cpu": "CPU",
    "kernels": "Kernels and launches",
    "utilisation": "Utilisation and memory",
    "power": "Power and energy",
}

_HEADLINES = (
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
}
"""Those that are not in the summary, whose keys are the original's, and the part that measures them."""

_SECTIONS = (
    "workload", "backend", "no_gpu", "quick", "command", "model", "decoder_check", "parts", "seconds", "errors",
    "failures", "interrupted", "summary",
)  # fmt: skip
