"""What in a report rests on an unstable machine: read off its JSON, after the run.

:mod:`..machine.doctor` says beforehand what could disturb; this says what did, and where that could not be told.
`edgellm bench --strict` ends with 5 where it finds anything. Without a GPU nothing is throttled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ..metrics import is_metric
from . import layout

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
    """Whether a disturbance of this kind was there, None where that is not known, and why not.

    place, name: its path in the JSON, and what a reader calls it. error: the relative one of a series.
    """

    kind: _Kind
    place: str
    name: str
    disturbed: bool | None
    reason: str = ""
    error: float | None = None


def findings(report: dict[str, Any]) -> list[str]:
    """One sentence for each kind of disturbance, seen or not to be told, with every place, the largest errors first.

    Empty when all was well.
    """
    return [sentence for _, sentence in _sentences(report, _everywhere)]


def banners(report: dict[str, Any]) -> list[str]:
    """The sentences of :func:`findings` for a reader: with names for the JSON's paths, and the worst few of them.

    Made anew from the figures: a report of before 1.3 was released has a shortened list.
    """
    return [
        f"Throttled: {sentence}. They are marked." if kind is _THROTTLED else f"Unstable: {sentence}."
        for kind, sentence in _sentences(report, _worst)
    ]


def _sentences(report: dict[str, Any], where: Callable[[list[_Reading]], str]) -> Iterator[tuple[_Kind | None, str]]:
    """Each sentence with the kind that was seen, None of all others. `where`: what is said of the readings' places."""
    readings = list(_readings(report))
    for kind in _KINDS:
        if seen := [r for r in readings if r.kind is kind and r.disturbed]:
            yield kind, kind.seen.format(where(sorted(seen, key=lambda r: -(r.error or 0))))
        unknown = [r for r in readings if r.kind is kind and r.disturbed is None]
        if unread := [r for r in unknown if not r.reason.startswith(_NOT_RECORDED)]:
            reason = f" ({unread[0].reason})" if unread[0].reason else ""
            yield None, kind.unknown.format(where(unread)) + reason
    counts = [
        (key, figure)
        for key, figure in report["parts"].get("kernels", {}).items()
        if is_metric(figure) and figure["value"] is not None and figure.get("counted", figure["value"]) is not None
    ]
    for key, figure in counts:
        if figure.get("counted", figure["value"]) != figure["value"]:
            yield (
                None,
                f"CUPTI traced {figure['value']:g} for kernels.{key}, the library counted {figure['counted']:g}",
            )


def ruled_out(report: dict[str, Any]) -> list[str]:
    """Which kinds of disturbance the report shows to be absent: all that could be disturbed was read, and was not."""
    readings = list(_readings(report))
    return [kind.none for kind in _KINDS if {r.disturbed for r in readings if r.kind is kind} == {False}]


def _readings(report: dict[str, Any]) -> Iterator[_Reading]:
    for place, name, value in layout.walk(report["parts"]):
        if not report.get("no_gpu"):
            told: Any
            for told in (value.get("throttled"), value.get("conditions")):  # conditions: null where nothing watched
                if is_metric(told):
                    yield _Reading(_THROTTLED, place, name, told["value"], told.get("reason", ""))
        if isinstance(samples := value.get("samples"), list):
            if len(samples) < 2:  # an error takes two
                yield _Reading(_NOISE, place, name, None)
            elif "relative_error" in value:
                error = value["relative_error"]
                yield _Reading(_NOISE, place, name, error > NOISY, error=error)
        if is_metric(value.get("joules")) and value["joules"]["value"] is not None:
            suspect: Any = value["suspect"]
            yield _Reading(_ENERGY, place, name, suspect["value"], suspect.get("reason", ""))


def _everywhere(readings: list[_Reading]) -> str:
    return ", ".join(f"{r.place}{_error(r)}" for r in readings)


def _worst(readings: list[_Reading]) -> str:
    shown = "; ".join(f"{r.name}{_error(r)}" for r in readings[:3])
    return shown if len(readings) <= 3 else f"{shown}; and {len(readings) - 3} more"


def _error(reading: _Reading) -> str:
    return "" if reading.error is None else f" ({reading.error:.1%})"
