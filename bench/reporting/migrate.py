"""Reports of older 1.x layouts, brought to the newest one, so that whatever reads a report knows only that one.

    python -m edgellm_cupy.bench.reporting.migrate FILE...     rewrites report.json files, and what is made from them

What a layout added is a null figure in a report that is older, with the reason "not recorded before 1.y"; what can be
told from the rest of the report is taken from there. No figure is computed again. See :mod:`.report` for the layout,
and `bench/METHOD.md` for what a version number promises.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import EdgeLLMError
from ..metrics import Metric, is_metric, missing
from . import stability

Report = dict[str, Any]

_ORDER = (
    "schema_version", "workload", "backend", "no_gpu", "quick", "seed", "command", "environment", "model",
    "decoder_check", "parts", "seconds", "errors", "failures", "interrupted", "doctor", "resumed_rows", "telemetry",
    "stability",
)  # fmt: skip
"""Of the top level; behind it what a later version adds, and at the end the summary."""


def upgrade(report: Report) -> Report:
    """A copy of a 1.x report in the newest layout; one that is as new, or newer, is copied as it is.

    `report` is whole: it has the sections that 1.0 had.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is no report.
    """
    result = copy.deepcopy(report)
    for version, step in _STEPS.items():
        if _number(result["schema_version"]) < _number(version):
            step(result)
            result["schema_version"] = version
    order = [key for key in _ORDER if key in result]
    others = [key for key in result if key not in order and key != "summary"]
    return {key: result[key] for key in (*order, *others, "summary")}


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


# ---- one step for each version --------------------------------------------------------------------------------------


def _to_1_1(report: Report) -> None:
    """`environment`: from the parts that say the same, where they ran."""
    hardware = _part(report, "hardware")
    source = _part(report, "reproducibility").get("source", {})
    unknown = _not_before("1.1")
    report.setdefault(
        "environment",
        {
            **{key: source.get(key, unknown) for key in ("git_commit", "git_modified")},
            **{key: hardware.get(key, unknown) for key in ("gpu_model", "driver_version", "cuda_version")},
            "tuned": unknown,
            "cpu_model": hardware.get("cpu_model", unknown),
        },
    )


def _to_1_2(report: Report) -> None:
    """`model.decoder`, which stays null where no part decoded; several sequences, ways to choose a token."""
    model = report["model"]
    model.setdefault("decoder", None if model["head_bytes"] is None else _not_before("1.2"))
    _add(report, "scaling", "1.2", time_16k_over_0="x")
    _add(report, "tokens", "1.2", sampling=None, batch_tok_s="tok/s")
    if tokens := _part(report, "tokens"):
        tokens.setdefault("batches", [])


_HARDWARE_1_3 = {
    "application_memory_clock_mhz": "MHz",
    "application_sm_clock_mhz": "MHz",
    "board_model": None,
    "compute_mode": None,
    "cpu_architecture": None,
    "ecc_mode": None,
    "gpus_in_machine": None,
    "memory_bus_bits": "bits",
    "power_limit_default_w": "W",
    "power_min_w": "W",
    "slowdown_temperature_c": "C",
    "vbios_version": None,
    "virtualisation": None,
}


_KERNELS_1_3 = {
    "graph_launches_per_token": "launches",
    "token_streamed_ms": "ms",
    "gpu_idle_share_pct": "%",
    "launch_share": None,
    "occupancy_how": None,
    "trace": None,
    "where_the_time_goes": None,
}


def _to_1_3(report: Report) -> None:
    """Boundary and conditions of each row, the GPU over the whole run, the order of rows, and what disturbed them."""
    report.setdefault("seed", _not_before("1.3"))
    report.setdefault("doctor", _not_before("1.3"))
    report.setdefault("telemetry", _not_before("1.3"))
    report.setdefault("resumed_rows", 0)  # no run could be resumed
    _add(report, "hardware", "1.3", **_HARDWARE_1_3)
    _add(report, "latency", "1.3", roofline=None)
    _add(report, "kernels", "1.3", **_KERNELS_1_3)
    _add(report, "cpu", "1.3", enqueue_launch_us="us")
    _add(report, "power", "1.3", idle_after=None)
    _add(report, "scaling", "1.3", prompts=None)
    for part in ("scaling", "utilisation", "cpu"):
        if figures := _part(report, part):
            figures.setdefault("boundary", "engine")
            figures.setdefault("conditions", _not_before("1.3"))
    for row, boundary in _rows(report):
        row.setdefault("boundary", boundary)
        row.setdefault("conditions", _not_before("1.3"))
    for product in _groups(_part(report, "power").get("products")):
        if "window" in product:
            product.setdefault("windows", [product["window"]])
    _complete(report["parts"])
    report.setdefault("stability", stability.findings(report))


_STEPS: dict[str, Callable[[Report], None]] = {"1.1.0": _to_1_1, "1.2.0": _to_1_2, "1.3.0": _to_1_3}

NEWEST = list(_STEPS)[-1]
"""The layout that :func:`upgrade` makes, and that reports are written in."""


def _not_before(version: str, unit: str | None = None) -> Metric:
    return missing(f"not recorded before {version}", unit)


def _part(report: Report, name: str) -> dict[str, Any]:
    """The figures of a part; empty where it did not run, or failed as a whole."""
    part = report["parts"].get(name, {})
    return {} if is_metric(part) else part


def _add(report: Report, part: str, version: str, **units: str | None) -> None:
    """Null figures for the keys that a part has not, if it ran."""
    if figures := _part(report, part):
        for key, unit in units.items():
            figures.setdefault(key, _not_before(version, unit))


def _rows(report: Report) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of the parts, with what their times include."""
    for product in _groups(_part(report, "latency").get("products")):
        yield from ((row, "kernel") for row in product["rows"])
    for shape in _part(report, "latency").get("table", {}).get("shapes", ()):
        for tokens in shape["tokens"]:
            yield from ((row, "kernel") for row in tokens["rows"])
    for part, key in (("tokens", "prompts"), ("tokens", "batches"), ("scaling", "rows")):
        yield from ((row, "engine") for row in _part(report, part).get(key, ()))


def _groups(named: Any) -> list[dict[str, Any]]:
    """What lies in a dictionary by name, without null figures."""
    if not isinstance(named, dict) or is_metric(named):
        return []
    return [group for group in named.values() if not is_metric(group)]


_STATE = {"sm_clock_mhz": "MHz", "memory_clock_mhz": "MHz", "temperature_c": "C", "throttle_reasons": None}


def _complete(value: Any) -> None:
    """Give every `conditions` inside `value` the times and the states around them."""
    if isinstance(value, list):
        for inner in value:
            _complete(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key == "conditions" and not is_metric(inner) and "before" not in inner:
                then = {name: _not_before("1.3", unit) for name, unit in _STATE.items()}
                times = {name: _not_before("1.3", "s") for name in ("begin_s", "end_s")}
                value[key] = {**times, "before": then, "after": copy.deepcopy(then), **inner}
            else:
                _complete(inner)


# ---- command --------------------------------------------------------------------------------------------------------


def rewrite(path: Path) -> tuple[str, str]:
    """Bring the report.json at `path` to the newest layout, beside and renamed, and make again what is made from it.

    Returns its schema_version before and after.

    Raises:
        EdgeLLMError: it is not called report.json, cannot be read, is no report, or cannot be written.
    """
    import json

    from . import report as documents  # which reads through this module

    if path.name != "report.json":
        raise EdgeLLMError(f"{path}: expected a file called report.json")
    newest = documents.load(path)
    before = json.loads(path.read_text(encoding="utf-8"))["schema_version"]
    documents.write(newest, path.parent)
    return before, newest["schema_version"]


def main(files: list[str]) -> int:
    """Rewrite each file; 0 done, 2 wrong usage or a file that could not be rewritten."""
    if not files:
        print("usage: python -m edgellm_cupy.bench.reporting.migrate FILE...", file=sys.stderr)
        return 2
    for file in files:
        try:
            before, after = rewrite(Path(file))
        except EdgeLLMError as e:
            print(e, file=sys.stderr)
            return 2
        print(f"{file}: {before} -> {after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
