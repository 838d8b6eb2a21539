"""A finding of `edgellm doctor`: what was seen, why it matters, and how the owner could change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..metrics import Metric


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        level: ``"ok"``; ``"note"``: good to know, or not readable; ``"warning"``: it makes results unsteady or wrong.
        what: was seen, in one sentence without a full stop.
        why: it matters, or why it could not be read; empty where `what` says it.
        remedy: what the owner could do; empty where nothing is to be done.
    """

    level: Literal["ok", "note", "warning"]
    what: str
    why: str = ""
    remedy: str = ""

    @property
    def warns(self) -> bool:
        return self.level == "warning"


def ok(what: str) -> Finding:
    return Finding("ok", what)


def note(what: str, why: str = "", remedy: str = "") -> Finding:
    return Finding("note", what, why, remedy)


def warning(what: str, why: str, remedy: str) -> Finding:
    return Finding("warning", what, why, remedy)


def unread(subject: str, figure: Metric) -> Finding:
    """A note with the reason of a null figure."""
    return note(f"{subject}: not readable", figure["reason"])
