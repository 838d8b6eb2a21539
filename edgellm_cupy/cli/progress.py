"""How far a benchmark is and how long it will take: a bar on a terminal, a line a part elsewhere.

Nothing here runs beside what is measured: there is no thread, the bar is drawn where a step begins, at most twice a
second. Within a long step it stands still.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from .output import on_terminal, say

SECONDS: dict[str, dict[str, float]] = {
    "cuda": {
        "hardware": 0.3,
        "reproducibility": 1.2,
        "latency": 30,
        "transfer": 0.9,
        "tokens": 13,
        "scaling": 7,
        "power": 147,
        "utilisation": 6,
        "cpu": 2,
        "kernels": 17,
    },
    "numpy": {
        "hardware": 0.1,
        "reproducibility": 0.1,
        "latency": 1,
        "transfer": 0.1,
        "tokens": 24,
        "scaling": 30,
        "power": 0.1,
        "kernels": 0.1,
        "utilisation": 4,
        "cpu": 3.3,
    },
}
"""By backend, how long each part took in the reports of bench/results; a test compares them with the newest."""

QUICK = 0.2
"""Of a whole run's time: what a quick one takes, roughly."""

_TRUST = 0.1  # of the whole time: expectations weigh as much as that of measured time
_ALMOST = 0.99
_REDRAW_S = 0.5
_STEP_WIDTH = 34
_REST_WIDTH = 28  # of the times, and a bar that can be seen


class Remaining:
    """How much longer a run takes: what its parts are expected to take, times how much slower the machine has been.

    Args:
        expected: seconds of each part, in the order in which they run.
        learn: False: the parts behind do not tell anything, as when they were taken from an earlier run.
        clock: seconds.
    """

    def __init__(
        self, expected: Mapping[str, float], learn: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected, self._learn, self._clock = dict(expected), learn, clock
        self._started = self._began = clock()
        self._part: str | None = None
        self._behind: list[str] = []
        self._spent = 0.0  # seconds in the parts behind

    def begin(self, part: str) -> None:
        """The part before ends, `part` begins."""
        now = self._clock()
        if self._part is not None:
            self._behind.append(self._part)
            self._spent += now - self._began
        self._part, self._began = part, now

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._started

    def seconds(self) -> float | None:
        """What remains. None: not known: before the first part, and where it should have ended."""
        if self._part is None:
            return None
        here, inside = self._expected[self._part], self._clock() - self._began
        spent, planned = self._spent, sum(self._expected[part] for part in self._behind)
        ahead = sum(self._expected.values()) - planned - here
        if inside > here:  # and so counts as one that is behind, with a slow machine as the reason
            spent, planned = spent + inside, planned + here
        trust = _TRUST * sum(self._expected.values())
        pace = (spent + trust) / (planned + trust) if self._learn else 1.0
        left = pace * ahead + max(pace * here - inside, 0.0)
        return left if left >= 0.5 else None

    def fraction(self) -> float:
        """Of the whole, what is done: never all of it, since it is asked while something is."""
        left = self.seconds()
        if left is None:
            return 0.0 if self._part is None else _ALMOST
        return self.elapsed / (self.elapsed + left)


def expected(names: list[str], backend: str, quick: bool) -> dict[str, float]:
    """Seconds that each of these parts may take, before anything is known of the machine."""
    return {name: SECONDS[backend][name] * (QUICK if quick else 1.0) for name in names}


@contextmanager
def progress(
    remaining: Remaining, command: str = "edgellm bench"
) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two functions: one to call with a part's name as it begins, one with each step inside it.

    A bar on a terminal; elsewhere, and under NO_COLOR, one line a part that begins with `command`. Both on stderr.
    """
    if not on_terminal():

        def line(name: str) -> None:
            remaining.begin(name)
            left = remaining.seconds()
            say(f"{command}: {_clock(remaining.elapsed)} {name}{f', about {_clock(left)} left' if left else ''}")

        yield line, lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.fields[what]}", style="none"),
        BarColumn(None),
        TextColumn("{task.fields[times]}"),
        console=Console(stderr=True),
        auto_refresh=False,  # no thread
        transient=True,
        redirect_stdout=False,
    )
    task = bar.add_task("", total=1.0, what="", times="")
    part, drawn = "", float("-inf")

    def draw(step: str) -> None:
        nonlocal drawn
        if (now := time.monotonic()) - drawn < _REDRAW_S:
            return
        drawn, left = now, remaining.seconds()
        what = step if not part or step.startswith(part) else f"{part}: {step}"
        width = max(1, min(_STEP_WIDTH, bar.console.width - _REST_WIDTH))
        times = f"{_clock(remaining.elapsed)}, left {'about ' + _clock(left) if left else '?'}"
        bar.update(
            task,
            completed=remaining.fraction(),
            what=f"{what:{width}.{width}}",
            times=times,
            refresh=True,
        )

    def begin(name: str) -> None:
        nonlocal part
        remaining.begin(name)
        part = name
        draw(name)

    with bar:
        yield begin, draw


def _clock(seconds: float) -> str:
    """Minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
