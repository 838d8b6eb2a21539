"""Programs of this package in processes of their own: what hangs or crashes costs its own figures, nobody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import edgellm_cupy as ec


def run(
    module: str, arguments: Sequence[str], time_limit_s: float, under: Sequence[str] = ()
) -> tuple[int | None, str]:
    """Run ``python -m edgellm_cupy.bench.parts.MODULE ARGUMENTS``, behind the words of `under`.

    Returns:
        The exit code, and what was printed on both streams. At the time limit the program and all that it started are
        ended, and the code is None.

    Raises:
        OSError: it did not start.
    """
    command = [*under, sys.executable, "-m", f"{__package__}.{module}", *arguments]
    process = subprocess.Popen(
        command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:  # Ctrl-C: a session of its own does not hear it
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return process.returncode, output


def last_words(output: str) -> str:
    """The last line that is not empty: of a traceback, the error."""
    return ([line.strip() for line in output.splitlines() if line.strip()] or ["it printed nothing"])[-1]


def _environment() -> dict[str, str]:
    """Ours, in which the child finds the packages that this process finds."""
    package = str(Path(ec.__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(p for p in (package, *sys.path) if p))}
