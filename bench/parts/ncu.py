"""Occupancy as it was reached, not as it is possible: Nsight Compute's counters of every kernel of one token.

`ncu` profiles a child process (:mod:`.one_token`) that decodes one token of a model with one layer, the workload's
otherwise: the layers of a model launch the same kernels. It needs the program `ncu`, and the driver's leave to read
counters; where one is missing the figures are null with the reason. Kernels run one by one here, so that what
overlapping costs or gains is not in it.
"""

from __future__ import annotations

import csv
import math
import re
import shutil
from typing import Any

import edgellm_cupy as ec

from .. import statistics
from ..context import Context
from ..metrics import Metric, missing
from . import child
from .one_token import described
from .utilisation import CONTEXT

TIME_LIMIT_S = 90.0

_OCCUPANCY, _DURATION = "sm__warps_active.avg.pct_of_peak_sustained_active", "gpu__time_duration.sum"
_TO_US = {"n": 1e-3, "u": 1.0, "m": 1e3, "s": 1e6}  # by the first letter of nsecond, usecond, msecond, second
_HOW = (
    "Nsight Compute's sm__warps_active.avg.pct_of_peak_sustained_active, median over a kernel's launches for one token "
    "of a model with one layer; each kernel alone on the device, clocks and caches as they are"
)


class _NcuError(ec.EdgeLLMError):
    """Nsight Compute gave nothing; the message is the reason that the report shows."""


def achieved_occupancy(ctx: Context, time_limit_s: float = TIME_LIMIT_S) -> dict[str, Any]:
    """The counters of every kernel of one token at a context of :data:`.utilisation.CONTEXT`.

    Returns:
        `kernels`, a row a kernel and launch shape: name, grid and block as :mod:`.kernel_stats` writes them, launches,
        measured_occupancy_pct and duration_us as figures; `how`. One null figure with the reason instead where there is
        no GPU, no `ncu`, no leave to read counters, or no result within `time_limit_s` seconds.
    """
    if ctx.no_gpu:
        return missing(ctx.no_gpu, "%")
    program = shutil.which("ncu")
    if not program:
        return missing("no ncu (Nsight Compute) on the PATH", "%")
    ctx.progress("occupancy by Nsight Compute")
    try:
        rows = parse(_profile(program, ctx, time_limit_s))
    except _NcuError as e:
        return missing(str(e), "%")
    return {"kernels": rows, "context": CONTEXT, "how": _HOW}


def of_kernel(occupancy: dict[str, Any], name: str, grid: str) -> Metric:
    """measured_occupancy_pct of the kernel `name` in the launch shape `grid`, such as ``"60 x 1 x 1"``.

    The kernels of a token have their threads in their names, so that the block tells no more. Null with the reason
    where it was not measured. occupancy: from :func:`achieved_occupancy`.
    """
    if "kernels" not in occupancy:
        return missing(occupancy["reason"], "%")
    for row in occupancy["kernels"]:
        if (row["name"], row["grid"]) == (name, grid):
            return dict(row["measured_occupancy_pct"])
    return missing("the model with one layer that Nsight Compute saw does not launch it so", "%")


def parse(output: str) -> list[dict[str, Any]]:
    """The rows of :func:`achieved_occupancy` from what `ncu --csv` printed, in the order of the first launches.

    Raises:
        EdgeLLMError: there is no table in it, or one without the two metrics.
    """
    lines = output.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if header is None:
        raise _NcuError(f"ncu printed no table: {_complaint(output)}")
    launches: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    table = csv.DictReader(line for line in lines[header:] if line.startswith('"'))
    if lacking := {"Kernel Name", "Grid Size", "Block Size", "Metric Name"} - set(table.fieldnames or ()):
        raise _NcuError(f"ncu's table has no column {sorted(lacking)[0]!r}")
    for row in table:
        key = row["Kernel Name"], _shape(row["Grid Size"]), _shape(row["Block Size"])
        values = launches.setdefault(key, {_OCCUPANCY: [], _DURATION: []})
        if row["Metric Name"] in values:
            values[row["Metric Name"]].append(_number(row))
    if not launches or not all(all(values.values()) for values in launches.values()):
        raise _NcuError(f"ncu measured no {_OCCUPANCY} with {_DURATION}: {_complaint(output)}")
    return [
        {
            "name": name,
            "grid": grid,
            "block": block,
            "launches": len(values[_OCCUPANCY]),
            "measured_occupancy_pct": statistics.median(values[_OCCUPANCY], "%"),
            "duration_us": statistics.median(values[_DURATION], "us", under="Nsight Compute"),
        }
        for (name, grid, block), values in launches.items()
    ]


def _profile(program: str, ctx: Context, time_limit_s: float) -> str:
    """What `ncu` printed."""
    flags = (
        *("--csv", "--print-units", "base", "--metrics", f"{_OCCUPANCY},{_DURATION}"),
        *("--profile-from-start", "off", "--graph-profiling", "node"),
        *("--clock-control", "none", "--cache-control", "none"),
    )
    try:
        code, output = child.run("one_token", described(ctx), time_limit_s, under=(program, *flags))
    except OSError as e:
        raise _NcuError(f"{program}: {e.strerror}") from e
    if code is None:
        raise _NcuError(f"ncu was not done after {time_limit_s:g} s")
    if "ERR_NVGPUCTRPERM" in output:
        raise _NcuError(
            "ERR_NVGPUCTRPERM: only root may read the GPU's counters here: run as root, or load the driver with "
            "NVreg_RestrictProfilingToAdminUsers=0"
        )
    if code:
        raise _NcuError(f"ncu ended with {code}: {_complaint(output)}")
    return output


def _complaint(output: str) -> str:
    """The line that tells most: the first error of ncu, else its first warning, else the last line."""
    for mark in ("==ERROR==", "==WARNING=="):
        if found := [line for line in output.splitlines() if line.startswith(mark)]:
            return found[0].removeprefix(mark).strip()
    return child.last_words(output)


def _shape(size: str) -> str:
    """``"(60, 1, 1)"`` as ``"60 x 1 x 1"``."""
    return " x ".join(re.findall(r"\d+", size))


def _number(row: dict[str, str]) -> float:
    """The value of a row, times in microseconds."""
    try:
        value = float(row["Metric Value"].replace(",", ""))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _NcuError(f"ncu gave {row['Metric Value']!r} for {row['Metric Name']} of {row['Kernel Name']}")
    return value if row["Metric Unit"] == "%" else value * _to_us(row["Metric Unit"])


def _to_us(unit: str) -> float:
    if unit[:1] not in _TO_US:
        raise _NcuError(f"ncu gave a time in {unit!r}, expected seconds or a part of them")
    return _TO_US[unit[:1]]
