"""The folders of runs: where one is kept that was given no --out, which there are, and what became of each.

    .edgellm/runs/<gpu>/<number>_<commit>_<time>/     such as .edgellm/runs/nvidia-h200/0007_4b4b672_20261123T0027

`gpu` is the GPU's name, or ``numpy-`` and the CPU's, in letters, digits and hyphens; `commit` its first seven digits or
``nogit``; `time` is UTC. Numbers go on over all GPUs of a root, so that one names a run. Nothing is ever overwritten.

A run's state is `running` while a process holds its folder (:func:`held`), then by its report `finished`, `partial` (a
part failed), `wrong` (a result was), `interrupted` or `unreadable`. Without a report it was interrupted, too: killed.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...errors import EdgeLLMError
from .. import journal
from . import layout, report

try:
    import fcntl
except ImportError:  # Windows, where a folder cannot be held
    fcntl = None  # type: ignore[assignment]

ROOT = Path(".edgellm/runs")
REPORT = "report.json"

_NAME = re.compile(r"(\d{4,})_([^_]+)_(\d{8}T\d{4})")
_TIME = "%Y%m%dT%H%M"
_COMMIT_DIGITS = 7
_LONGEST_SLUG = 60  # a folder's name may have 255 bytes
_KINDS: dict[str, Any] = {"rows": int, "tok_s": (int, float)}  # of what files say of a run; else text


class RunsError(EdgeLLMError):
    """A run's folder cannot be made, is in use, or there is no such run; the message names it."""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: its folder.
        number: of a folder that :func:`new_folder` made, else None.
        state: see the module.
        time: when it began, ISO 8601 in UTC; None where that is not known.
        gpu: what it ran on. Without a report: the folder above.
        model: what it measured, None where that is not known.
        commit: of this package, None where that is not known.
        tok_s: tokens a second, None where they were not measured.
        rows: finished rows in its rows.jsonl.
    """

    path: Path
    number: int | None
    state: str
    time: str | None
    gpu: str
    model: str | None
    commit: str | None
    tok_s: float | None
    rows: int

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path)}


# ---- making them ----------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """`name` as a folder's name: small letters and digits, hyphens between them.

    What tells no two processors apart is left out: ``"Intel(R) Xeon(R) CPU @ 2.20GHz"`` is ``"intel-xeon-2-20ghz"``.
    """
    plain = re.sub(r"\((r|tm|c)\)|\b(cpu|processor)\b", " ", name.lower())
    return "-".join(re.findall("[a-z0-9]+", plain))[:_LONGEST_SLUG].strip("-") or "unknown"


def new_folder(root: Path, gpu: str, commit: str | None) -> Path:
    """Make the folder of a new run under `root`, with the next number, also when another run does the same just now.

    Args:
        gpu: the GPU's name, or ``"numpy "`` and the CPU's.
        commit: of this package; None: unknown.

    Raises:
        ReportError: it cannot be made.
    """
    parent = root / slug(gpu)
    report.make_folder(parent)
    short = re.sub("[^0-9A-Za-z]", "", commit or "")[:_COMMIT_DIGITS] or "nogit"
    while True:
        number = max(_numbers(root), default=0) + 1
        path = parent / f"{number:04d}_{short}_{datetime.now(timezone.utc).strftime(_TIME)}"
        try:
            path.mkdir()
        except FileExistsError:
            pass
        except OSError as e:
            raise report.ReportError(f"{path}: cannot be made: {e.strerror}") from e
        else:
            # Of two runs that took the same number, the one whose folder came later sees both here, and yields.
            if _numbers(root).count(number) == 1:
                return path
            path.rmdir()
        time.sleep(random.uniform(0.001, 0.02))


@contextmanager
def kept(root: Path, gpu: str, commit: str | None) -> Iterator[Path]:
    """:func:`new_folder`, and within :func:`held`. If nothing was measured and an error ends it, no trace is left."""
    folder = new_folder(root, gpu, commit)
    try:
        with held(folder):
            yield folder
    except BaseException:
        rows = folder / journal.FILE
        if list(folder.iterdir()) in ([], [rows]) and not (rows.exists() and journal.read(rows)[1]):
            rows.unlink(missing_ok=True)
            folder.rmdir()
            with suppress(OSError):  # other runs are in there
                folder.parent.rmdir()
        raise


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """`folder`, which this process alone writes to within. The system lets go when the process ends, however it does.

    Raises:
        RunsError: another process holds it.
    """
    if fcntl is None:
        yield folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunsError(f"{folder}: another run is writing to it") from None
        except OSError:  # a file system without locks
            pass
        yield folder
    finally:
        os.close(handle)


def _is_held(folder: Path) -> bool:
    try:
        with held(folder):
            return False
    except RunsError:
        return True
    except OSError:  # a folder that must not be read
        return False


def _numbers(root: Path) -> list[int]:
    """Of all folders of runs under `root`, one that two have twice."""
    return [int(match[1]) for path in root.glob("*/*") if (match := _NAME.fullmatch(path.name))]


# ---- finding them ---------------------------------------------------------------------------------------------------


def listing(root: Path) -> list[Run]:
    """Every run in a folder below `root` or below one of its folders, the oldest first.

    Raises:
        RunsError: there is no such folder.
    """
    if not root.is_dir():
        raise RunsError(f"{root}: no such folder: no run is kept here")
    files = [file for name in (REPORT, journal.FILE) for depth in ("*", "*/*") for file in root.glob(f"{depth}/{name}")]
    folders = {file.parent for file in files}
    return sorted(
        (read(folder) for folder in folders), key=lambda run: ((run.time or "")[:16], run.number or 0, run.path)
    )


def find(root: Path, which: str | None = None) -> Run:
    """The run of a number, of a folder, or of a report.json; the newest one by default.

    Raises:
        RunsError: there is none.
    """
    if which and not which.isdecimal():
        path = Path(which)
        folder = path.parent if path.is_file() else path
        if any((folder / name).is_file() for name in (REPORT, journal.FILE)):
            return read(folder)
        raise RunsError(f"{which}: neither the number of a run nor a folder with one")
    found = [run for run in listing(root) if not which or run.number == int(which)]
    if not found:
        raise RunsError(f"{root}: no run {which}" if which else f"{root}: no run is kept here")
    return found[-1]


def unfinished(root: Path, gpu: str) -> Path:
    """The folder of the newest interrupted run on this GPU (as :func:`new_folder` takes it) that has rows.

    Raises:
        RunsError: there is none.
    """
    folder = root / slug(gpu)
    runs = [read(file.parent) for file in folder.glob(f"*/{journal.FILE}")]
    runs = sorted((run for run in runs if run.state == "interrupted"), key=lambda run: run.number or 0)
    if not runs:
        raise RunsError(f"{folder}: no interrupted run here: nothing to resume")
    return runs[-1].path


def read(folder: Path) -> Run:
    """The run in `folder`, which has a report.json or a rows.jsonl. One that cannot be read has the state
    ``unreadable``."""
    match = _NAME.fullmatch(folder.name)
    number, began, commit = (int(match[1]), _began(match[3]), match[2]) if match else (None, None, None)
    run = Run(folder, number, "interrupted", began, folder.parent.name, None, commit, None, 0)
    running = _is_held(folder)
    try:
        found = _of_rows(folder)
        if (folder / REPORT).is_file() and not running:
            found |= _of_report(folder)
        for key, value in found.items():
            if value is not None and not isinstance(value, _KINDS.get(key, str)):
                raise TypeError(key)
    except (EdgeLLMError, KeyError, TypeError, AttributeError):
        found = {"state": "unreadable"}
    return Run(**{**vars(run), **found, **({"state": "running"} if running else {})})


def _began(stamp: str) -> str | None:
    """ISO 8601 of the time in a folder's name; None of one that no clock shows, as somebody's renaming leaves it."""
    try:
        return datetime.strptime(stamp, _TIME).replace(tzinfo=timezone.utc).isoformat()
    except ValueError:
        return None


def _of_rows(folder: Path) -> dict[str, Any]:
    """What rows.jsonl says of a run."""
    if not (folder / journal.FILE).is_file():
        return {}
    header, rows = journal.read(folder / journal.FILE)
    model = header["identity"].get("model")  # its shape, or a server's name for it
    return {"rows": len(rows), "model": model.get("name") if isinstance(model, dict) else model}


def _of_report(folder: Path) -> dict[str, Any]:
    """What report.json says of a run."""
    found = report.load(folder / REPORT)
    commit = found.get("environment", {}).get("git_commit", {}).get("value")
    return {
        "state": _state(found),
        "time": found["workload"]["timestamp"]["value"],
        "gpu": layout.place(found).removeprefix("the "),
        "model": layout.subject(found),
        "commit": commit and commit[:_COMMIT_DIGITS],
        "tok_s": found["summary"]["throughput_tok_s"]["value"],
    }


def _state(found: layout.Report) -> str:
    if found["interrupted"]:
        return "interrupted"
    if found["failures"]:
        return "wrong"
    return "partial" if found["errors"] else "finished"
