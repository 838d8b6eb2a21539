"""The finished rows of a run, one line each in rows.jsonl: what an interrupted run keeps, and what a resumed one takes.

The first line is a header, {schema_version, identity}: what the rows belong to. Each line behind it is a row:

    key        names the row within the run, such as "scaling/context 1024"
    seconds    how long it took
    figures    what was measured; the part of that name in :mod:`.suite` puts it into the report
    failures   one line for each result in it that was wrong

A line is on the disk before the next row begins. Rows that could not be measured are no lines: a resumed run tries them
again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..errors import EdgeLLMError

FILE = "rows.jsonl"

_SCHEMA_VERSION = "1.0.0"
_ROW = {"key", "seconds", "figures", "failures"}
_LONGEST_SHOWN = 60  # characters of a value that differs


class JournalError(EdgeLLMError):
    """Rows cannot be read or written, or belong to another run; the message names the file."""


class Journal:
    """Rows by key, and the file that keeps them; without one they last as long as the process.

    Attributes:
        path: of rows.jsonl, or None.
        taken: key -> seconds of each row of an earlier process that :meth:`recorded` found: what a resumed run did not
            measure.
    """

    def __init__(self, path: Path | None = None, rows: Mapping[str, dict[str, Any]] | None = None):
        self.path, self.taken = path, dict[str, float]()
        self._earlier, self._rows = frozenset(rows or ()), dict(rows or {})
        self._file: TextIO | None = None

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], resume: bool = False) -> Journal:
        """The journal of the run in `folder`, which exists: a new one, or with `resume` the one that is there.

        identity: what must be the same for rows to belong together; plain JSON values.

        Raises:
            JournalError: with `resume`: there is none, it cannot be read, or it is of another run. Else: it cannot be
                written.
        """
        path = folder / FILE
        header = {"schema_version": _SCHEMA_VERSION, "identity": json.loads(json.dumps(identity))}
        if resume:
            lines, whole = _read(path)
            _check_identity(path, lines[0].get("identity"), header["identity"])
            journal = cls(path, {line["key"]: line for line in lines[1:]})
            journal._append_to(whole)
        else:
            journal = cls(path)
            journal._append_to(0)
            journal._write(header)
        return journal

    def recorded(self, key: str) -> dict[str, Any] | None:
        """The line of a row that is already there, or None."""
        line = self._rows.get(key)
        if line and key in self._earlier:
            self.taken[key] = line["seconds"]
        return line

    def record(self, key: str, seconds: float, figures: Mapping[str, Any], failures: Sequence[str]) -> None:
        """Keep a finished row."""
        line = {"key": key, "seconds": round(seconds, 6), "figures": figures, "failures": list(failures)}
        if self._file:
            self._write(line)
        self._rows[key] = line

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # of a disk that is full, which the row has said
                self._file.close()
            self._file = None

    def _append_to(self, length: int) -> None:
        """Go on behind the first `length` bytes; what follows is a line that was cut off."""
        assert self.path
        try:
            self._file = self.path.open("r+" if length else "w", encoding="utf-8")
            self._file.truncate(length)
            self._file.seek(length)
        except OSError as e:
            raise JournalError(f"{self.path}: cannot be written: {e.strerror}") from e

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._file
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise JournalError(f"{self.path}: cannot be written: {e.strerror}") from e


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a rows.jsonl; a last line that was cut off is left out.

    Raises:
        JournalError: it cannot be read, or is not one.
    """
    lines, _ = _read(path)
    return lines[0], lines[1:]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Also the number of bytes that are whole lines."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise JournalError(f"{path}: cannot be read: {e.strerror}") from e
    whole = data[: data.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        good = bool(lines) and "identity" in lines[0] and all(line.keys() >= _ROW for line in lines[1:])
    except (ValueError, TypeError, AttributeError) as e:
        raise JournalError(f"{path}: not the rows of a run: {e}") from e
    if not good:
        raise JournalError(f"{path}: not the rows of a run: expected a header, then rows of {', '.join(sorted(_ROW))}")
    major = str(lines[0].get("schema_version")).split(".")[0]
    if major != _SCHEMA_VERSION.split(".")[0]:
        raise JournalError(f"{path}: schema_version is {lines[0].get('schema_version')}, expected {_SCHEMA_VERSION}")
    return lines, len(whole)


def _check_identity(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    found = found if isinstance(found, dict) else {}
    for key in wanted:
        was, now, name = found.get(key), wanted[key], key
        if isinstance(was, dict) and isinstance(now, dict):  # such as the model: which of its fields
            inside = next((k for k in {**now, **was} if was.get(k) != now.get(k)), None)
            was, now, name = (was.get(inside), now.get(inside), f"{key} {inside}") if inside else (now, now, key)
        if was != now:
            raise JournalError(f"{path}: cannot be resumed: {name} was {_short(was)}, and is {_short(now)} now")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]} ..."
