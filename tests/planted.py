"""Slowdowns planted in a report, to see whether a comparison finds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def changed(value: Any, cost: float, rng: Any = None) -> Any:
    """A report's section with every time and energy multiplied by `cost`, and every rate divided by it.

    With `rng` each series by another factor around it, with a spread of 0.6 %: that of two reports of one H200.
    """
    if isinstance(value, list):
        return [changed(inner, cost, rng) for inner in value]
    if not isinstance(value, dict):
        return value
    leaf = "samples" in value or isinstance(value.get("value"), (int, float))
    if rng is not None and (leaf or "latency" in value):  # a latency and the rate made from it move together
        cost, rng = cost * (1 + 0.006 * rng.standard_normal()), None
    found = {key: changed(inner, cost, rng) for key, inner in value.items()}
    factor = {"us": cost, "ms": cost, "J": cost, "tok/s": 1 / cost, "GB/s": 1 / cost}.get(value.get("unit"), 1)
    for key in ("value", "samples", "ci95") if leaf else ():
        if isinstance(value.get(key), list):
            found[key] = [x * factor for x in value[key]]
        elif value.get(key) is not None:
            found[key] = value[key] * factor
    return found


PARTS = ("latency", "transfer", "tokens", "scaling", "power", "cpu")


def slower(document: dict[str, Any], cost: float, names: Sequence[str] = PARTS, rng: Any = None) -> dict[str, Any]:
    """The report with the parts `names` made slower by `cost`, see :func:`changed`."""
    return {
        **document,
        "parts": {**document["parts"], **{name: changed(document["parts"][name], cost, rng) for name in names}},
    }
