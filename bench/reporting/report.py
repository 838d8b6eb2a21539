"""The report: its JSON, its summary and its files.

report.json is one object:

    schema_version      semver of this layout. A reader of 1.x can read every later 1.y: keys are added, never renamed,
                        and never change their meaning or unit; what does that makes 2.0.0.
    workload            figures that say what was run (model_name, batch_size, ...), and when
    backend             "cuda", "numpy", or "server" (since 1.3)
    no_gpu              null, or why no GPU was measured, and what to do about it
    quick               true: shorter windows and fewer samples than a quotable report needs
    command             the command line
    environment         commit, GPU, driver, CUDA and CPU, also of the report of a single part; `tuned`: how many
                        choices of `edgellm tune` were in use, and their file or null (since 1.1)
    model               {config, weights, body_bytes, head_bytes, decoder}; `decoder`: {activation, dtype, head,
                        kv_cache} of what was measured (since 1.2). It and head_bytes are null when no part decodes.
                        Null when a server was measured (since 1.3)
    parts               name of a part -> its figures; see the module of that name in edgellm_cupy.bench.parts (kernels:
                        kernel_stats). `latency` of a table of shapes has no products, but `table` and `summary` of
                        :mod:`..parts.table` (since 1.1)
    seconds             name of a part -> how long it took; of a resumed run, with what its taken rows took before
    errors              name of a part that failed, or "PART/ROW" of a row (since 1.3) -> {reason, traceback}
    decoder_check       how far the GPU's logits lie from the reference; null on NumPy, which is the reference
    failures            one line for each result that was wrong; no speed that rests on one is reported
    interrupted         true: Ctrl-C ended the run before its last part
    doctor              [{level, what, why}]: what `edgellm doctor` found as the run began, or a null figure (since 1.3)
    seed                of the order in which rows were measured (since 1.3)
    resumed_rows        how many rows a resumed run took from rows.jsonl (since 1.3)
    telemetry           null figure, or {every_s, power_sensor, series, parts}: what NVML said over the whole run.
                        series: name -> {unit, at_s, values}; parts: [{name, begin_s, end_s}]; seconds since the run
                        began (since 1.3)
    stability           one line for each kind of thing that made this run unstable, with every place,
                        see :mod:`.stability` (since 1.3)
    summary             the keys of :data:`KEYS`, in that order, each one a figure

A figure is ``{value, unit, ...}`` or ``{value: null, reason}`` (see :mod:`..metrics`). A row says under which
`conditions` it was measured (see :mod:`..machine.telemetry`) and its `boundary`: kernel, engine, server or client
(since 1.3). Markdown, HTML page, plots and terminal text are made from this object alone, so that they can be made
again later.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ...errors import EdgeLLMError
from ..metrics import Metric, missing
from . import migrate, plots
from .html import html
from .layout import Report
from .markdown import markdown

SCHEMA_VERSION = migrate.NEWEST

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


MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""What reading a report raises where it is JSON, but not as this program writes it."""


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
    """Write report.json, report.md, report.html and plots/ into `folder`, made when missing. Returns their paths.

    Raises:
        ReportError: the folder cannot be made, or a file cannot be written.
        PlotError: a plot cannot be.
    """
    return [replace(folder / "report.json", _json(report)), *_made_from(report, folder)]


def remake(path: Path, folder: Path) -> list[Path]:
    """Write report.md, report.html and plots/ into `folder` from the report.json at `path`. Returns their paths.

    Raises:
        ReportError, PlotError: see :func:`load` and :func:`write`.
    """
    report = load(path)
    try:
        return _made_from(report, folder)
    except MALFORMED as e:
        raise ReportError(f"{path}: not as this program writes it: {type(e).__name__} {e}") from e


def _made_from(report: Report, folder: Path) -> list[Path]:
    """The files that are made from the JSON."""
    drawn = plots.each(report)
    return [
        replace(folder / "report.md", markdown(report)),
        replace(folder / "report.html", html(report, drawn)),
        *plots.write(report, folder / "plots", drawn),
    ]


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
    """Read a report.json, also one of an older 1.x (:mod:`.migrate`).

    Raises:
        ReportError: the file is unreadable, is no report, or has a schema_version of another major number.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ReportError(f"{path}: not a readable report: {e}") from e
    return checked(value, path)


def checked(report: Any, path: Path) -> Report:
    """The JSON value of the file at `path` as a report of the newest layout.

    Raises:
        ReportError: it is no report, or has a schema_version of another major number.
    """
    found = report.get("schema_version") if isinstance(report, dict) else None
    if not isinstance(found, str):
        raise ReportError(f"{path}: not a report: it has no schema_version")
    if found.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ReportError(f"{path}: schema_version is {found}, this program reads {SCHEMA_VERSION.split('.')[0]}.x")
    if lacking := [key for key in _SECTIONS if key not in report]:
        raise ReportError(f"{path}: not a whole report: {lacking[0]!r} is missing")
    try:
        return migrate.upgrade(report)
    except MALFORMED as e:
        raise ReportError(f"{path}: not as this program writes it: {type(e).__name__} {e}") from e


def _json(report: Report) -> str:
    """The report with one key a line, and each list of numbers on one line."""
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    # No string matches: a line break inside one is written as \\n.
    return re.sub(r'\[\n([^][{}"]*)\]', lambda numbers: f"[{' '.join(numbers[1].split())}]", text)


def replace(path: Path, text: str) -> Path:
    """Write beside and rename: a reader sees the old file or the new one, never a half. Returns `path`.

    A link stays one: the file behind it is replaced. What is no file, such as a pipe or /dev/stdout, is written to.

    Raises:
        ReportError: its folder cannot be made, or it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return path
        target = path.resolve()
        make_folder(target.parent)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: Path.resolve of links in a circle, before Python 3.13
        raise ReportError(f"{path}: cannot be written: {getattr(e, 'strerror', None) or e}") from e
    return path


_SECTIONS = (
    "workload", "backend", "no_gpu", "quick", "command", "model", "decoder_check", "parts", "seconds", "errors",
    "failures", "interrupted", "summary",
)  # fmt: skip
