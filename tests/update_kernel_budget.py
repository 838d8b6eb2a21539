"""The compile matrix, every specialisation on every architecture, and the budget that it is held to.

tests/cpu/test_compile.py compares what ptxas reports with tests/cpu/kernel_budget.json. After a change that is worth
its registers, write the budget anew and commit it, so that the review sees what the change costs:

    python -m tests.update_kernel_budget
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edgellm_cupy.kernels import KernelSpec, nvrtc
from edgellm_cupy.tuning import specialisations

BUDGET_FILE = Path(__file__).parent / "cpu" / "kernel_budget.json"
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class Report(NamedTuple):
    """What ptxas says about one kernel: registers a thread, static shared bytes a block, local bytes a thread."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def read_report(log: str) -> Report:
    """The report in the log of one program. A function that was not inlined has a line of its own; the worst counts."""
    stack, stores, loads = (max(column) for column in zip(*(map(int, m) for m in _STACK.findall(log)), strict=True))
    shared = max(map(int, _SHARED.findall(log)), default=0)
    return Report(max(map(int, _REGISTERS.findall(log))), shared, stack, stores, loads)


# ---- the matrix -----------------------------------------------------------------------------------------------------


def compilers() -> Executor:
    """A process for each core: NVRTC compiles one program at a time in a process, however many threads ask."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def compile_all(arch: int, pool: Executor) -> dict[KernelSpec, Report]:
    """Every specialisation through NVRTC for sm_`arch`; what was compiled before comes from the user's cache folder.

    Raises:
        KernelCompileError: NVRTC refused one.
    """
    file = nvrtc.cache_folder() / "ptxas" / f"sm_{arch}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    keys = {spec: _key(spec, arch) for spec in specialisations()}
    new = [spec for spec, key in keys.items() if kept.get(spec.name, {}).get("key") != key]
    if new:
        reports = pool.map(partial(_compile, arch), new, chunksize=4)
        kept |= {spec.name: {"key": keys[spec], "report": report} for spec, report in zip(new, reports, strict=True)}
        _replace(file, json.dumps({spec.name: kept[spec.name] for spec in keys}))
    return {spec: Report(*kept[spec.name]["report"]) for spec in keys}


def _compile(arch: int, spec: KernelSpec) -> Report:
    return read_report(nvrtc.compile_to_cubin(spec, arch)[1])


def _key(spec: KernelSpec, arch: int) -> str:
    """A hash of everything that determines the report."""
    text = "\0".join(map(str, (spec.source(), spec.defines(), nvrtc.options(arch), nvrtc.version(), Report._fields)))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _replace(file: Path, text: str) -> None:
    """Another process may read or write the file at this moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as f:
        f.write(text)
    os.replace(f.name, file)


# ---- the budget -----------------------------------------------------------------------------------------------------


def write_budget(matrix: dict[int, dict[KernelSpec, Report]]) -> None:
    """One line a specialisation: its registers on each architecture, and the most static shared bytes on any."""
    rows = []
    for spec in sorted(specialisations(), key=lambda s: s.name):
        reports = [matrix[arch][spec] for arch in nvrtc.ARCHITECTURES]
        row = {"registers": [r.registers for r in reports], "shared": max(r.shared for r in reports)}
        rows.append(f"    {json.dumps(spec.name)}: {json.dumps(row)}")
    head = f'  "nvrtc": "{nvrtc.version()}",\n  "architectures": {list(nvrtc.ARCHITECTURES)},\n  "kernels": {{\n'
    BUDGET_FILE.write_text("{\n" + head + ",\n".join(rows) + "\n  }\n}\n")


def main() -> None:
    matrix = {}
    with compilers() as pool:
        for arch in nvrtc.ARCHITECTURES:
            print(f"sm_{arch}: {len(specialisations())} specialisations", file=sys.stderr)
            matrix[arch] = compile_all(arch, pool)
    write_budget(matrix)


if __name__ == "__main__":
    main()
