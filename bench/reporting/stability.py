"""What in a report rests on an unstable machine: read off its JSON, after the run.

:mod:`..machine.doctor` says beforehand what could disturb; this says what did, and where that could not be told.
`edgellm bench --strict` ends with 5 where it finds anything. Without a GPU nothing is throttled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..metrics import is_metric

NOISY = 0.02
"""Relative standard error above which a series is called noisy: it ended at its time limit, far from precise."""


class _Kind(NamedTuple):
    """Of disturbance: what is said where there was some, where it could not be told, and where there was none."""

    seen: str
    unknown: str
    none: str


_THROTTLED = _Kind(
    "the GPU held its clocks down during {}",
    "it could not be told whether the GPU held its clocks down during {}",
    "nothing was throttled",
)
_NOISE = _Kind(
    f"a relative standard error above {NOISY:.0%} was left in {{}}",
    "one sample does not tell its error in {}",
    "no series stayed noisy",
)
_ENERGY = _Kind(
    "energy counter and sampled power disagree in {}",
    "it could not be told whether energy counter and sampled power agree in {}",
    "no energy is in doubt",
)
_KINDS = (_THROTTLED, _NOISE, _ENERGY)

_NOT_RECORDED = "not recorded before"
"""How :mod:`.migrate` begins its reasons: what an old report lacks does not disturb its run, but rules nothing out."""


class _Reading(NamedTuple):
    """Whether a disturbance of this kind was there, None where that is not known, and why not."""

    kind: _Kind
    place: str
    disturbed: bool | None
    reason: str = ""


def findings(report: dict[str, Any]) -> list[str]:
    """One sentence for each kind of disturbance, seen or not to be told, with where; empty when all was well."""
    readings = list(_readings(report))
    said = []
    for kind in _KINDS:
        if seen := [r.place for r in readings if r.kind is kind and r.disturbed]:
            said.append(kind.seen.format(_some(seen)))
        unknown = [r for r in readings if r.kind is kind and r.disturbed is None]
        if unread := [r for r in unknown if not r.reason.startswith(_NOT_RECORDED)]:
            reason = f" ({unread[0].reason})" if unread[0].reason else ""
            said.append(kind.unknown.format(_some([r.place for r in unread])) + reason)
    counts = [
        (key, figure)
        for key, figure in report["parts"].get("kernels", {}).items()
        if is_metric(figure) and figure["value"] is not None and figure.get("counted", figure["value"]) is not None
    ]
    said += [
        f"CUPTI traced {figure['value']:g} for kernels.{key}, the library counted {figure['counted']:g}"
        for key, figure in counts
        if figure.get("counted", figure["value"]) != figure["value"]
    ]
    return said


def ruled_out(report: dict[str, Any]) -> list[str]:
    """Which kinds of disturbance the report shows to be absent: all that could be disturbed was read, and was not."""
    readings = list(_readings(report))
    return [kind.none for kind in _KINDS if {r.disturbed for r in readings if r.kind is kind} == {False}]


def _readings(report: dict[str, Any]) -> Iterator[_Reading]:
    for place, value in _walk(report["parts"], ""):
        if not report.get("no_gpu"):
            told: Any
            for told in (value.get("throttled"), value.get("conditions")):  # conditions: null where nothing watched
                if is_metric(told):
                    yield _Reading(_THROTTLED, place, told["value"], told.get("reason", ""))
        if isinstance(samples := value.get("samples"), list):
            if len(samples) < 2:  # an error takes two
                yield _Reading(_NOISE, place, None)
            elif "relative_error" in value:
                yield _Reading(_NOISE, place, value["relative_error"] > NOISY)
        if is_metric(value.get("joules")) and value["joules"]["value"] is not None:
            suspect: Any = value["suspect"]
            yield _Reading(_ENERGY, place, suspect["value"], suspect.get("reason", ""))


def _some(places: list[str]) -> str:
    shown = ", ".join(places[:3])
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more"


def _walk(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary inside `value` with the path to it; conditions count for the row that they belong to."""
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{place}[{i}]")
    elif isinstance(value, dict):
        yield place, value
        for key, inner in value.items():
            yield from _walk(inner, place if key == "conditions" else f"{place}.{key}".strip("."))
