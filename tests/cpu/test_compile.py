"""The compile matrix: every specialisation for every architecture that we promise, through NVRTC, without a GPU.

For sm_90, the reference machine's, all of them are compiled, always. For the others (marked slow) one of each kernel
file, which shows that the budget is a true record, and all that it does not tell: those that another NVRTC or another
source has made it of.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor
from typing import Any

import pytest

from edgellm_cupy.errors import GpuUnavailableError
from edgellm_cupy.kernels import KernelSpec, nvrtc
from edgellm_cupy.tuning import product, specialisations
from tests.update_kernel_budget import BUDGET_FILE, Report, compile_all, compilers, key_of, read_report

REGISTERS, STATIC_SHARED_BYTES = 65536, 48 * 1024  # of a multiprocessor; of a block: the same on every architecture
ALWAYS = (90,)
# Another NVRTC than the budget's allocates registers differently (12.9 against 13.5: up to 16 more in a small kernel,
# 8 % in a large one, and up to 80 bytes of local memory in five). A kernel that doubled is seen all the same.
OTHER_FACTOR, OTHER_REGISTERS, OTHER_LOCAL_BYTES = 1.25, 16, 128
HOW_TO_UPDATE = "if the change is worth it, run `python -m tests.update_kernel_budget` and commit the new budget"

Matrix = tuple[int, dict[KernelSpec, Report]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    try:
        nvrtc.require()
    except GpuUnavailableError as e:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI has to compile every kernel: {e}")
        pytest.skip(str(e))
    with compilers() as pool:
        yield pool


@pytest.fixture(scope="module")
def budget() -> dict[str, Any]:
    return json.loads(BUDGET_FILE.read_text())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(arch, marks=() if arch in ALWAYS else pytest.mark.slow, id=f"sm_{arch}")
        for arch in nvrtc.ARCHITECTURES
    ],
)
def matrix(request: pytest.FixtureRequest, pool: Executor, budget: dict[str, Any], exercised: Any) -> Matrix:
    """One architecture, and ptxas' report on each specialisation: of today, or of the budget."""
    arch = request.param
    known = {} if arch in ALWAYS else _recorded(budget, arch)
    one_each = {spec.file: spec for spec in known}.values()
    new = [spec for spec in specialisations() if spec not in known]
    reports = compile_all(arch, pool, [*new, *one_each])
    exercised.compiled[arch] = len(reports)
    return arch, known | reports


def test_nothing_spills(matrix: Matrix, budget: dict[str, Any]) -> None:
    arch, reports = matrix
    most = 0 if _is_of_this_nvrtc(budget) else OTHER_LOCAL_BYTES
    spilling = [f"{s.name}: {r}" for s, r in reports.items() if r.local > most]
    assert not spilling, _listing(f"kernels use local memory on sm_{arch}", spilling)


def test_every_block_can_be_launched(matrix: Matrix) -> None:
    """As many blocks as the launch configuration counts on fit a multiprocessor."""
    arch, reports = matrix
    wrong = []
    for spec, report in reports.items():
        macros = dict(spec.macros)
        warps = int(macros["WARPS"]) if "WARPS" in macros else int(macros["THREADS"]) // 32
        blocks = int(macros.get("RESIDENT", _resident(spec.file, macros)))
        # Registers are handed out to warps, 256 at a time.
        registers = -(-report.registers * 32 // 256) * 256 * warps * blocks
        shared = STATIC_SHARED_BYTES if "RESIDENT" not in macros else product._STATIC_SHARED_BYTES
        if registers > REGISTERS or report.shared > shared:
            wrong.append(f"{spec.name}: {registers} of {REGISTERS} registers, {report.shared} of {shared} shared bytes")
    assert not wrong, _listing(f"blocks do not fit on sm_{arch}", wrong)


def test_registers_and_shared_memory_stay_within_the_budget(matrix: Matrix, budget: dict[str, Any]) -> None:
    arch, reports = matrix
    column = budget["architectures"].index(arch)
    over = []
    for spec, report in reports.items():
        allowed = budget["kernels"].get(spec.name)
        if allowed is None:
            continue  # the next test names it
        registers, shared = allowed["registers"][column], allowed["shared"]
        most = registers if _is_of_this_nvrtc(budget) else max(registers * OTHER_FACTOR, registers + OTHER_REGISTERS)
        if report.registers > most or report.shared > shared:
            over.append(
                f"{spec.name}: {report.registers} registers (budget {registers}), "
                f"{report.shared} shared bytes ({shared})"
            )
    made_with = f"NVRTC {nvrtc.version()}, the budget is of {budget['nvrtc']}"
    assert not over, _listing(f"over the budget on sm_{arch} ({made_with}); {HOW_TO_UPDATE}", over)


def test_the_budget_is_a_true_record(matrix: Matrix, budget: dict[str, Any]) -> None:
    """Of these sources; so what is not compiled today is known all the same."""
    arch, reports = matrix
    recorded = _recorded(budget, arch)
    old = [spec.name for spec in reports if spec not in recorded]
    assert not (old and _is_of_this_nvrtc(budget)), _listing(f"are of another source; {HOW_TO_UPDATE}", old)
    wrong = [
        f"{spec.name}: {reports[spec].registers} registers, recorded {was.registers}"
        for spec, was in recorded.items()
        if reports[spec].registers != was.registers or reports[spec].shared > was.shared
    ]
    assert not wrong, _listing(f"records of sm_{arch} are wrong; {HOW_TO_UPDATE}", wrong)


def test_the_budget_names_every_specialisation_and_architecture(budget: dict[str, Any]) -> None:
    assert budget["architectures"] == list(nvrtc.ARCHITECTURES), HOW_TO_UPDATE
    names = {spec.name for spec in specialisations()}
    wrong = [f"missing: {name}" for name in sorted(names - set(budget["kernels"]))]
    wrong += [f"not reachable any more: {name}" for name in sorted(set(budget["kernels"]) - names)]
    assert not wrong, _listing(f"the budget is out of date; {HOW_TO_UPDATE}", wrong)


def test_a_report_takes_the_worst_function_of_the_log() -> None:
    log = """\
ptxas info    : Compiling entry function 'edgellm_x' for 'sm_90'
ptxas info    : Function properties for helper
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for edgellm_x
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 64 bytes smem, 400 bytes cmem[0]
"""
    assert read_report(log) == Report(registers=30, shared=64, local=16)
    assert read_report(re.sub(", 64 bytes smem", "", log)).shared == 0


def _resident(file: str, macros: dict[str, str]) -> int:
    """Blocks a multiprocessor of the kernels that know it without being told: their __launch_bounds__."""
    two = {
        "attention.cu": int(macros.get("WARPS", 0)) <= 4,
        "attention_prefill.cu": True,
        "lm_head.cu": macros.get("TOKENS") == "1",
    }
    return 2 if two.get(file) else 1


def _recorded(budget: dict[str, Any], arch: int) -> dict[KernelSpec, Report]:
    """The reports of the specialisations that are still what the budget was made of."""
    column = budget["architectures"].index(arch)
    rows = {spec: budget["kernels"].get(spec.name, {}) for spec in specialisations()}
    return {
        spec: Report(row["registers"][column], row["shared"], row["local"])
        for spec, row in rows.items()
        if row.get("key") == key_of(spec)
    }


def _is_of_this_nvrtc(budget: dict[str, Any]) -> bool:
    return nvrtc.version() == budget["nvrtc"]


def _listing(what: str, lines: list[str]) -> str:
    more = f"\n  ... and {len(lines) - 20} more" if len(lines) > 20 else ""
    return f"{len(lines)} {what}:\n  " + "\n  ".join(lines[:20]) + more
