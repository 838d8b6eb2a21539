"""`edgellm doctor`: what makes results unsteady on this machine, and how its owner could change it.

It looks at the GPU by NVML (:mod:`.doctor_gpu`), at the host by the kernel's files (:mod:`.doctor_host`) and for the
libraries that baselines and tracing need. It takes less than a second and changes nothing: settings are the owner's.
What it cannot read is a note with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...errors import EdgeLLMError
from ..metrics import Metric
from ..parts import baselines, cupti, hardware
from . import doctor_gpu, doctor_host
from .finding import Finding, note, ok
from .nvml import NvmlDevice, current_nvml_device

Libraries = Mapping[str, tuple[Callable[[], Any], str]]

_STYLES = {"warning": "yellow", "note": "cyan", "ok": "green"}


def examine(
    no_gpu: str | None,
    root: Path = Path("/"),
    *,
    device: NvmlDevice | None = None,
    pcie: Callable[[], Mapping[str, Metric]] | None = None,
    libraries: Libraries | None = None,
    environment: Mapping[str, str] | None = None,
    cpus: int | None = None,
    folder: Path = Path(),
) -> list[Finding]:
    """Findings about GPU and host, warnings first.

    Args:
        no_gpu: why there is no GPU to look at, in one line; None when there is one.
        root: of the file system, with proc and sys below it.
        device: NVML's view of the GPU; the current one when None.
        pcie: measures the PCIe link under load; copies to the GPU when None.
        libraries: name -> (what loads it or raises an EdgeLLMError, what is missing without it).
        environment: variables of this process, `os.environ` when None.
        cpus: processors that this process may use.
        folder: where a run would put its files.
    """
    if cpus is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    host = doctor_host.Host(root, os.environ if environment is None else environment, cpus, folder)
    found = [*_gpu(no_gpu, device, pcie, libraries), *doctor_host.findings(host)]
    return sorted(found, key=lambda finding: list(_STYLES).index(finding.level))  # stable: the order of the checks


def _gpu(
    no_gpu: str | None,
    device: NvmlDevice | None,
    pcie: Callable[[], Mapping[str, Metric]] | None,
    libraries: Libraries | None,
) -> Iterator[Finding]:
    if no_gpu is not None:
        yield note("no GPU was examined", no_gpu)
        return
    nvml = device or current_nvml_device()
    yield from doctor_gpu.findings(nvml, pcie or (lambda: hardware.pcie_under_load(nvml)))
    yield from _libraries(_LIBRARIES if libraries is None else libraries)


_LIBRARIES: Libraries = {
    "cuBLAS": (baselines.load_library, "there is no baseline in float16 to compare with"),
    "CUPTI": (cupti.load_cupti, "kernels inside a token are not traced"),
}


def _libraries(libraries: Libraries) -> Iterator[Finding]:
    for name, (load, without) in libraries.items():
        yield _library(name, load, without)


def _library(name: str, load: Callable[[], Any], without: str) -> Finding:
    try:
        load()
    except EdgeLLMError as e:
        return note(f"no {name}: {without}", str(e))
    return ok(f"{name} is there")


# ---- what is made of them -------------------------------------------------------------------------------------------


def summary(findings: Sequence[Finding]) -> list[dict[str, str]]:
    """For a report: {level, what, why} of the warnings and notes."""
    return [{"level": f.level, "what": f.what, "why": f.why} for f in findings if f.level != "ok"]


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Every finding, and how many there are of each level."""
    return {**counts(findings), "findings": [asdict(finding) for finding in findings]}


def counts(findings: Sequence[Finding]) -> dict[str, int]:
    """Numbers of warnings, notes and good findings."""
    levels = [finding.level for finding in findings]
    return {"warnings": levels.count("warning"), "notes": levels.count("note"), "ok": levels.count("ok")}


def terminal(findings: Sequence[Finding]) -> Group:
    """For a terminal of 80 columns: warnings and notes with reason and remedy, then what is in order, in brief."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in (f for f in findings if f.level != "ok"):
        lines = Text(finding.what, style="bold" if finding.warns else "")
        if finding.why:
            lines.append(f"\n{finding.why}", style="dim")
        if finding.remedy:
            lines.append(f"\n-> {finding.remedy}")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), lines)
    number = counts(findings)
    good = [f.what for f in findings if f.level == "ok"]
    return Group(
        *((table, Text("")) if table.row_count else ()),
        *((Text(f"in order: {'; '.join(good)}", style=_STYLES["ok"]), Text("")) if good else ()),
        Text(
            f"warnings: {number['warnings']}, notes: {number['notes']}, in order: {number['ok']}; nothing was changed"
        ),
    )
