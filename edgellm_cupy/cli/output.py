"""How a command speaks and ends: exit codes, stdout and stderr that may be closed or full, colours, signals.

stdout carries the result, stderr progress and errors. Nothing is coloured or drawn over itself where the stream is no
terminal, where the terminal is a dumb one, and under NO_COLOR (https://no-color.org).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from textwrap import wrap
from types import FrameType
from typing import Any, NoReturn, TextIO

from ..errors import EdgeLLMError, GpuUnavailableError
from ..exit_codes import EXIT_INTERRUPTED, EXIT_NO_GPU, EXIT_TERMINATED, EXIT_USAGE

WIDTH = 80
"""Columns that every table fits into."""

_NO_COLOR = bool(os.environ.get("NO_COLOR"))
_DUMB = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
_NOTICE = b"stopping: what is finished is kept; once more ends at once\n"
_SHOW_CURSOR = b"\x1b[?25h"


class Terminated(KeyboardInterrupt):
    """SIGTERM came: ends a run as Ctrl-C does, with an exit code of its own."""


# ---- how a command ends ---------------------------------------------------------------------------------------------


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and an exit code, never a traceback."""
    try:
        yield
    except GpuUnavailableError as e:
        fail(str(e), EXIT_NO_GPU)
    except EdgeLLMError as e:
        fail(str(e), EXIT_USAGE)
    except MemoryError as e:  # CuPy's is one, too
        fail(f"out of memory: {e}", EXIT_USAGE)
    except BrokenPipeError:
        raise
    except OSError as e:  # such as of a path that is too long, or of a folder that must not be read
        fail(": ".join(str(part) for part in (e.filename, e.strerror or e) if part is not None), EXIT_USAGE)
    except Terminated:
        fail("terminated", EXIT_TERMINATED)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    say(f"error: {message.splitlines()[0]}")
    sys.exit(code)


@contextmanager
def interruptible() -> Iterator[Callable[[], int | None]]:
    """Within, the first Ctrl-C or SIGTERM raises and says so on stderr; a second one ends the process at once.

    Yields a function that returns the exit code of the signal that came, None before one came.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # Not through sys.stderr, which the signal may have found in the middle of a write. A bar hides the cursor, and
        # the second signal leaves no time to show it again.
        with suppress(OSError):
            os.write(2, (_SHOW_CURSOR + b"\n" if on_terminal() else b"") + _NOTICE)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def code() -> int | None:
        return 128 + came[0] if came else None

    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield code
        return
    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# ---- stdout and stderr ----------------------------------------------------------------------------------------------


@contextmanager
def _writing_to(stream: TextIO) -> Iterator[None]:
    """A stdout that is full or broken ends the command with one line on stderr.

    A reader that has gone away (`edgellm bench | head`) is no error of ours, and with stderr there is no one to tell.
    """
    try:
        yield
    except OSError as e:
        # The interpreter flushes its streams once more at exit; give this one somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(e, BrokenPipeError):
            fail(f"stdout: cannot be written: {e.strerror}", EXIT_USAGE)


def show(text: str) -> None:
    """Write the result to stdout."""
    put(f"{text}\n")


def put(text: str) -> bool:
    """Write a piece of the result to stdout, to be seen at once. False: the reader has gone away."""
    with _writing_to(sys.stdout):
        print(text, end="", flush=True)
        return True
    return False


def say(text: str) -> None:
    """Write progress to stderr."""
    with _writing_to(sys.stderr):
        print(text, file=sys.stderr, flush=True)


def rendered(content: Any) -> str:
    """Rich content as text for stdout: at most 80 columns, coloured only on a terminal that wants it."""
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, color_system=None if _NO_COLOR else "auto", force_terminal=sys.stdout.isatty() or None)
    console.width = min(console.width, WIDTH)
    console.print(content)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").splitlines())


def files(folder: Path, paths: Sequence[Path]) -> str:
    """Where files are: the folder on a line of its own to copy, names below it, those of inner folders counted."""
    names = [path.relative_to(folder) for path in paths]
    below = Counter(name.parts[0] for name in names if len(name.parts) > 1)
    listed = [str(name) for name in names if len(name.parts) == 1]
    listed += [f"{inner}/ ({count} file{'s' * (count > 1)})" for inner, count in below.items()]
    return "\n".join(
        [f"written: {folder}", *wrap(", ".join(listed), WIDTH, initial_indent="  ", subsequent_indent="  ")]
    )


# ---- progress -------------------------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """May progress be drawn over itself?"""
    return sys.stderr.isatty() and not _NO_COLOR and not _DUMB


def _nothing(step: str) -> None:
    """Progress that is not shown."""


@contextmanager
def status(elsewhere: Callable[[str], None] = _nothing) -> Iterator[Callable[[str], None]]:
    """A function that shows the current step on a terminal; `elsewhere` takes it where there is none.

    A step is drawn when it begins and by no thread: nothing takes time from what is measured meanwhile.
    """
    if not on_terminal():
        yield elsewhere
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False) as live:
        yield lambda step: live.update(Text(step, overflow="ellipsis", no_wrap=True), refresh=True)
