"""What in a report rests on an unstable machine: read off its JSON, after the run.

:mod:`..machine.doctor` says beforehand what could disturb; this says what did. `edgellm bench --strict` ends with 5
where it finds anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..metrics import is_metric

NOISY = 0.02
"""Relative standard error above which a series is called noisy: it ended at its time limit, far from precise."""


def findings(report: dict[str, Any]) -> list[str]:
    """One sentence for each kind of disturbance, with where it was seen; empty when there was none."""
    walked = list(_walk(report["parts"], ""))
    throttled = [place for place, value in walked if _is_true(value.get("throttled"))]
    noisy = [place for place, value in walked if "samples" in value and value.get("relative_error", 0) > NOISY]
    counts = [
        (key, figure)
        for key, figure in report["parts"].get("kernels", {}).items()
        if is_metric(figure) and figure["value"] is not None and figure.get("counted", figure["value"]) is not None
    ]
    suspect = [place for place, value in walked if "joules" in value and _is_true(value.get("suspect"))]
    said = []
    if throttled:
        said.append(f"the GPU held its clocks down during {_some(throttled)}")
    if noisy:
        said.append(f"a relative standard error above {NOISY:.0%} was left in {_some(noisy)}")
    if suspect:
        said.append(f"energy counter and sampled power disagree in {_some(suspect)}")
    said += [
        f"CUPTI traced {figure['value']:g} for kernels.{key}, the library counted {figure['counted']:g}"
        for key, figure in counts
        if figure.get("counted", figure["value"]) != figure["value"]
    ]
    return said


def _some(places: list[str]) -> str:
    shown = ", ".join(places[:3])
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more"


def _is_true(figure: Any) -> bool:
    return is_metric(figure) and figure["value"] is True


def _walk(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary inside `value` with the path to it; conditions count for the row that they belong to."""
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{place}[{i}]")
    elif isinstance(value, dict):
        yield place, value
        for key, inner in value.items():
            yield from _walk(inner, place if key == "conditions" else f"{place}.{key}".strip("."))
