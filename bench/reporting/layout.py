"""What every rendering of a report shares: what it is about, the kinds of its values, and how each fits in a cell.

Markdown, HTML page, plots and terminal text are made with it, from the JSON of :mod:`.report` alone. No text is escaped
here: that is for whoever writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..metrics import Metric, is_metric

Report = dict[str, Any]


def place(report: Report) -> str:
    """What was measured: the GPU's name, the NumPy backend with the CPU's name where that is known, or the server."""
    if report["backend"] == "server":
        return f"the server at {text(report['environment']['server_url'])}"
    if not report["no_gpu"]:
        return report["summary"]["gpu_model"]["value"] or "the GPU"
    facts = {**report.get("environment", {}), **report["parts"].get("hardware", {})}
    cpu = facts.get("cpu_model", {}).get("value")
    return f"the NumPy backend ({cpu})" if cpu else "the NumPy backend"


def subject(report: Report) -> str:
    """What was run: the model's name, or the table of shapes."""
    table = shapes_table(report)
    return f"a table of {len(table['shapes'])} shapes" if table else text(report["workload"]["model_name"])


def shapes_table(report: Report) -> dict[str, Any] | None:
    """The `table` of :mod:`..parts.table`, if this report has one."""
    return report["parts"].get("latency", {}).get("table")


def count_throttled(value: Any) -> int:
    """How many measurements inside `value` ran throttled."""
    if isinstance(value, list):
        return sum(map(count_throttled, value))
    if not isinstance(value, dict):
        return 0
    return is_throttled(value) + sum(map(count_throttled, value.values()))


def overlap(trace: dict[str, Any]) -> str:
    """Why the traced times of a token's kernels add up to more than the token; `trace`: see :mod:`..parts.cupti`."""
    times = [row["us"]["value"] if is_metric(row["us"]) else row["us"] for row in measured_rows(trace["kernels"])]
    said = f"Kernels overlap: their times add up to {number(float(sum(filter(None, times))))} us"
    busy: Any = trace.get("gpu_busy_us")
    known = is_metric(busy) and busy["value"] is not None
    return f"{said}, but the GPU is busy for {with_unit(busy)} of a token only." if known else f"{said}."


def is_throttled(conditions: dict[str, Any]) -> bool:
    """Do these conditions (see :mod:`..machine.telemetry`) say so?"""
    throttled: Any = conditions.get("throttled")
    return is_metric(throttled) and throttled["value"] is True


def one_l2(pair: Any, l2: str) -> Any:
    """One of a cold and a warm figure; or what stands in their place."""
    return pair[l2] if isinstance(pair, dict) and not is_metric(pair) else pair


def measured_rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a list that were measured: an interrupted run leaves null figures in the place of the others."""
    return [row for row in value if not is_null(row)] if isinstance(value, list) else []


def measured_products(latency: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The products of the part `latency` that were measured, by layer; none of a table of shapes."""
    products = latency.get("products", {})
    return {} if is_null(products) else {layer: p for layer, p in products.items() if not is_null(p)}


def fused_rows(latency: dict[str, Any], activation: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Layer and row of each fused product that was measured with this activation."""
    for layer, product in measured_products(latency).items():
        for row in measured_rows(product["rows"]):
            if (row["op"], row["activation"]) == ("rmsnorm_ternary_matmul", activation):
                yield layer, row


def leaves(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each cell that a row fills; what is nested in it is named after its place."""
    for key, value in row.items():
        whole = not isinstance(value, dict) or is_metric(value) or is_series(value) or "throttled" in value
        yield from [(f"{prefix}{key}", value)] if whole else leaves(value, f"{prefix}{key} ")


def windows(value: Any, label: str) -> Iterator[dict[str, Any]]:
    """The windows of :mod:`..parts.power` anywhere inside `value`, as rows that begin with their place."""
    if isinstance(value, list):
        for i, inner in enumerate(value, 1):
            yield from windows(inner, f"{label} {i}")
    elif is_window(value):
        yield {"window": label, **value}
    elif isinstance(value, dict):
        for key, inner in value.items():
            if not (key == "window" and "windows" in value):  # the first of those
                yield from windows(inner, f"{label} {key}".strip())


def walk(value: Any, place: str = "", name: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every dictionary inside `value`, with its path in the JSON and the name that a reader knows it by.

    Conditions have path and name of the row that they belong to.
    """
    if isinstance(value, list):
        for i, inner in enumerate(value):
            if isinstance(inner, (dict, list)):
                called = _called(inner) or str(i + 1)
                yield from walk(inner, f"{place}[{i}]", f"{name}{', ' if ' ' in name else ' '}{called}")
    elif isinstance(value, dict):
        yield place, name, value
        for key, inner in value.items():
            if key == "conditions":
                yield from walk(inner, place, name)
            elif isinstance(inner, (dict, list)):
                named = name if name and key in _LISTS else f"{name}{', ' if ' ' in name else ' '}{key}".strip()
                yield from walk(inner, f"{place}.{key}".strip("."), named)


_LISTS = ("products", "rows", "table", "shapes", "tokens")
"""Keys that add nothing to the name of what is in them."""


def _called(row: Any) -> str:
    """What tells a row from its neighbours."""
    if not isinstance(row, dict):
        return ""
    keys = ("model", "layer", "op", "activation", "n", "context", "batch", "tokens", "sampling", "direction", "bytes")
    found = {key: row[key] for key in keys if isinstance(row.get(key), (str, int))}
    return " ".join(
        (f"N = {x}" if key == "n" else f"{key} {x}") if isinstance(x, int) else x for key, x in found.items()
    )


def without_windows(value: Any) -> Any:
    """`value` without what :func:`windows` finds in it."""
    if not isinstance(value, dict) or is_metric(value) or is_series(value):
        return value
    return {
        key: without_windows(inner)
        for key, inner in value.items()
        if not is_window(inner) and not (is_rows(inner) and all(map(is_window, inner)))
    }


def reasons(value: Any) -> list[str]:
    """Why figures are null, anywhere inside `value`, each reason once. Not those inside a series."""
    if is_null(value):
        return [value["reason"]]
    if is_series(value) or not isinstance(value, (dict, list)):
        return []
    inner = value.values() if isinstance(value, dict) else value
    return list(dict.fromkeys(reason for x in inner for reason in reasons(x)))


# ---- kinds of values ------------------------------------------------------------------------------------------------


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float))


def is_null(value: Any) -> bool:
    return is_metric(value) and value["value"] is None


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def is_series(value: Any) -> bool:
    """What :func:`..timing.summarise` returns."""
    return isinstance(value, dict) and "samples" in value and "median" in value


def is_plain(value: Any) -> bool:
    """A group of single figures and nothing else."""
    if not isinstance(value, dict) or not value or is_metric(value):
        return False
    return all(is_metric(inner) or is_scalar(inner) for inner in value.values())


def is_plain_groups(value: Any) -> bool:
    """Plain groups by name, of which some may be null."""
    if not isinstance(value, dict) or not any(map(is_plain, value.values())):
        return False
    return all(is_plain(inner) or is_null(inner) for inner in value.values())


def is_window(value: Any) -> bool:
    return isinstance(value, dict) and "joules" in value and "conditions" in value


# ---- cells ----------------------------------------------------------------------------------------------------------


_DIGITS = 4
"""Significant digits of a figure; report.json has all of them."""

_SMALLER = {"s": ("ms", 1e3), "ms": ("us", 1e3), "us": ("ns", 1e3), "J": ("mJ", 1e3), "mJ": ("uJ", 1e3),
            "ms^2": ("us^2", 1e6), "us^2": ("ns^2", 1e6)}  # fmt: skip
_LARGER = {"bytes": "KiB", "KiB": "MiB", "MiB": "GiB"}


def scaled(unit: str | None, values: Iterable[Any]) -> tuple[str | None, float]:
    """The unit that suits the middle one of values that all have `unit`, and what to multiply them by.

    Times and energies get a smaller unit, bytes a larger one; all others keep theirs.
    """
    sizes = sorted(abs(x) for x in values if isinstance(x, (int, float)) and x)
    if not sizes or unit is None:
        return unit, 1.0
    middle, factor, sized = sizes[len(sizes) // 2], 1.0, unit == "bytes"
    while middle < 0.01 and unit in _SMALLER and middle * factor < 1:
        unit, step = _SMALLER[unit]
        factor *= step
    while sized and unit in _LARGER and middle * factor >= 1024:  # what is given in MiB has that in its name
        unit = _LARGER[unit]
        factor /= 1024
    return unit, factor


def rescaled(figure: Metric) -> Metric:
    """The figure in the unit that :func:`scaled` gives for its value, its interval too."""
    unit, factor = scaled(figure.get("unit"), [figure["value"]])
    if factor == 1:
        return figure
    ends = {"ci95": [end * factor for end in figure["ci95"]]} if figure.get("ci95") else {}
    return {**figure, **ends, "value": figure["value"] * factor, "unit": unit}


def number(value: Any, digits: int = _DIGITS) -> str:
    """A scalar or a list as text: a float with that many significant digits, commas between thousands."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 999.5 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return _conditions(value) if "throttled" in value else f"{len(value)} in report.json"
    if not isinstance(value, list):
        return " ".join(str(value).split())
    if not all(map(is_scalar, value)):
        return f"{len(value)} in report.json"
    sizes = all(isinstance(inner, int) for inner in value)  # of a grid or a block
    return (" x " if sizes else ", ").join(number(inner, digits) for inner in value) or "none"


def _conditions(conditions: dict[str, Any]) -> str:
    """Clock and temperature meanwhile, or before where nothing was read meanwhile; and what held the clocks down."""
    before = conditions.get("before", {})
    said = []
    for key, unit in (("sm_clock_mhz", "MHz"), ("temperature_c", "C")):
        found = [place[key]["value"] for place in (conditions, before) if key in place]
        said += [f"{number(round(value))} {unit}" for value in found if value is not None][:1]
    if is_throttled(conditions):
        said.append(f"throttled: {number(conditions['throttle_reasons']['value'])}")
    return ", ".join(said) or "not read"


def text(x: Any) -> str:
    """The bare value of a figure or a scalar, or ``null (reason)``."""
    if is_null(x):
        return f"null ({' '.join(x['reason'].split())})"
    return number(x["value"] if is_metric(x) else x)


def short(x: Any) -> str:
    """A cell of a wide table: a series its median, the reasons of nulls below the table."""
    if is_plain(x):
        return inline(x)
    if is_series(x):
        x = x["median"]
    return number(x["value"] if is_metric(x) else x)


def inline(group: dict[str, Any]) -> str:
    """A plain group on one line."""

    def cell(x: Any) -> str:
        return f"{with_unit(x)} ({interval(rescaled(x))})" if is_metric(x) and x.get("ci95") else with_unit(x)

    return "; ".join(f"{key}: {cell(value)}" for key, value in group.items())


def interval(figure: Metric) -> str:
    return f"interval {' to '.join(map(number, figure['ci95']))}"


def with_unit(x: Any) -> str:
    """A figure as text: its value with the unit that suits it, or ``null (reason)``."""
    x = rescaled(x) if is_metric(x) else x
    unit = x.get("unit") if is_metric(x) and x["value"] is not None else None
    return f"{text(x)} {unit}" if unit else text(x)


def detail(x: Any) -> str:
    """Everything that a figure says about itself beside value, unit and reason."""
    if not is_metric(x):
        return ""
    x, said = rescaled(x), []
    for key, value in x.items():
        if key == "ci95" and value:
            said.append(interval(x))
        elif key not in ("value", "unit", "reason", "ci95") and is_scalar(value):
            said.append(f"{key}: {number(value)}")
    return "; ".join(said)
