"""The compile matrix, every specialisation on every architecture, and the budget that it is held to.

tests/cpu/test_compile.py compares what ptxas reports with tests/cpu/kernel_budget.json. After a change of a kernel,
write the budget anew and commit it, so that the review sees what the change costs:

    python -m tests.update_kernel_budget

The budget is the record of that compilation, too: what the same NVRTC made of the same source (its key) need not be
compiled again to be known, and the whole matrix takes minutes. To see that the record is true, compile all of it anew:

    EDGELLM_CACHE_DIR=$(mktemp -d) python -m tests.update_kernel_budget && git diff --exit-code tests/cpu
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from edgellm_cupy.kernels import KernelSpec, nvrtc
from edgellm_cupy.kernels.spec import without_comments
from edgellm_cupy.tuning import specialisations

BUDGET_FILE = Path(__file__).parent / "cpu" / "kernel_budget.json"
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


class Report(NamedTuple):
    """What ptxas says about one kernel: registers a thread, static shared bytes a block, local bytes a thread.

    Local bytes are the largest of the stack frame, the stores and the loads of spills.
    """

    registers: int
    shared: int
    local: int


def read_report(log: str) -> Report:
    """The report in the log of one program. A function that was not inlined has a line of its own; the worst counts."""
    local = max(int(number) for numbers in _LOCAL.findall(log) for number in numbers)
    shared = max(map(int, _SHARED.findall(log)), default=0)
    return Report(max(map(int, _REGISTERS.findall(log))), shared, local)


# ---- the matrix -----------------------------------------------------------------------------------------------------


def compilers() -> Executor:
    """A process for each core: NVRTC compiles one program at a time in a process, however many threads ask."""
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def compile_all(arch: int, pool: Executor, specs: Collection[KernelSpec] | None = None) -> dict[KernelSpec, Report]:
    """All specialisations, or these, through NVRTC for sm_`arch`; the user's cache folder keeps what was compiled.

    Raises:
        KernelCompileError: NVRTC refused one.
    """
    file = nvrtc.cache_folder() / "ptxas" / f"sm_{arch}.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    keys = {spec: " ".join((key_of(spec), *Report._fields)) for spec in specialisations()}
    wanted = list(keys) if specs is None else list(specs)
    if new := [spec for spec in wanted if kept.get(spec.name, {}).get("key") != keys[spec]]:
        reports = pool.map(partial(_compile, arch), new, chunksize=4)
        kept |= {spec.name: {"key": keys[spec], "report": report} for spec, report in zip(new, reports, strict=True)}
        _replace(file, json.dumps({spec.name: kept[spec.name] for spec in keys if spec.name in kept}))
    return {spec: Report(*kept[spec.name]["report"]) for spec in wanted}


def _compile(arch: int, spec: KernelSpec) -> Report:
    return read_report(nvrtc.compile_to_cubin(spec, arch)[1])


def key_of(spec: KernelSpec) -> str:
    """A hash of everything that determines the reports of a specialisation, on every architecture."""
    options = [nvrtc.options(arch) for arch in nvrtc.ARCHITECTURES]
    text = "\0".join(map(str, (without_comments(spec.source()), spec.defines(), options, nvrtc.version())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _replace(file: Path, text: str) -> None:
    """Another process may read or write the file at this moment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as f:
        f.write(text)
    os.replace(f.name, file)


# ---- the budget -----------------------------------------------------------------------------------------------------


def write_budget(matrix: dict[int, dict[KernelSpec, Report]]) -> None:
    """A line a specialisation: its key, registers on each architecture, the most shared and local bytes on any."""
    rows = []
    for spec in sorted(specialisations(), key=lambda s: s.name):
        reports = [matrix[arch][spec] for arch in nvrtc.ARCHITECTURES]
        row = {
            "key": key_of(spec),
            "registers": [r.registers for r in reports],
            "shared": max(r.shared for r in reports),
            "local": max(r.local for r in reports),
        }
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
