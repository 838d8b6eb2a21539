"""What a reported figure is: a value with its unit, or null with the reason. Nothing else goes into report.json.

A metric is a plain dictionary, so that the JSON is the data model:

    {"value": 1.93, "unit": "us", "n": 200, ...}          measured
    {"value": null, "unit": "us", "reason": "..."}        not measured, and why

Never a NaN, never the text "N/A", never a zero that stands for "unknown".
"""

from __future__ import annotations

import math
from typing import Any

Metric = dict[str, Any]


def measured(value: Any, unit: str | None = None, **detail: Any) -> Metric:
    """A figure with its unit; `detail` says how it came about (n, ci95, window, source, ...).

    Raises:
        ValueError: the value is NaN or infinite; a failed measurement is a :func:`missing`, with its reason.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a measurement")
    return {"value": value, **({"unit": unit} if unit else {}), **detail}


def missing(reason: str, unit: str | None = None) -> Metric:
    """A figure that could not be measured here, and why."""
    return {"value": None, **({"unit": unit} if unit else {}), "reason": reason}


def is_metric(x: Any) -> bool:
    return isinstance(x, dict) and "value" in x


def inner(figures: Any, *keys: str, unit: str | None = None) -> Any:
    """What lies under `keys` inside `figures`; where a null figure stands on the way, null with its reason."""
    for key in keys:
        if is_metric(figures) and figures["value"] is None:
            return missing(figures["reason"], unit)
        figures = figures[key]
    return figures


def fields(row: dict[str, Any]) -> dict[str, Any]:
    """What a row holds: nothing, where it is a null figure."""
    return {} if is_metric(row) and row["value"] is None else row
