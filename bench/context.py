"""Context: the workload, the backend and the places to report to, handed to every part of the benchmark."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import edgellm_cupy as ec

from ..formats.checkpoint import Checkpoint
from ..sampling import Sampling
from .journal import Journal, JournalError
from .machine.telemetry import Telemetry
from .metrics import fields, missing

T = TypeVar("T")

INTERRUPTED = "interrupted before it was measured"


class WrongResultError(ec.EdgeLLMError):
    """A kernel's result differs from the reference: its speed must not be reported. The command ends with 4."""


def _silent(message: str) -> None:
    """Progress of a run that nobody watches."""


@dataclass
class Context:
    """One run.

    Attributes:
        checkpoint: configuration and host weights of the workload.
        no_gpu: why there is no GPU to measure, in one line; None when `backend` is ``"cuda"``.
        quick: shorter windows and fewer samples, for a first look; reports say so.
        progress: called with a line for each step that begins.
        tokens: measure the table of shapes for these numbers of tokens (:mod:`.parts.table`) in place of the workload's
            products; empty: the workload's.
        activation, dtype, head: of the decoder, as its constructor takes them.
        kv_dtype: of every cache, as its `new_cache` takes it.
        whole: all parts are measured; one that is measured alone may take longer and look closer.
        seed: of the order in which rows are measured, so that no row always follows the same other one.
        journal: keeps each finished row, and hands out those that an interrupted run has left.
        telemetry: watches the GPU.
        failures: one line for each kernel that failed its check against the reference.
        errors: row that could not be measured -> {reason, traceback}.
        interrupted: Ctrl-C was pressed; no further row is measured.
    """

    checkpoint: Checkpoint
    no_gpu: str | None
    quick: bool = False
    progress: Callable[[str], None] = _silent
    tokens: tuple[int, ...] = ()
    activation: str = "int8"
    dtype: str = "auto"
    head: str = "auto"
    kv_dtype: str = "auto"
    whole: bool = False
    seed: int = 0
    journal: Journal = field(default_factory=Journal)
    telemetry: Telemetry = field(init=False)
    failures: list[str] = field(default_factory=list)
    errors: dict[str, dict[str, str]] = field(default_factory=dict)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self.telemetry = Telemetry(None, self.no_gpu or "nothing watched the GPU")

    @property
    def backend(self) -> str:
        """``"cuda"`` or ``"numpy"``."""
        return "numpy" if self.no_gpu else "cuda"

    @property
    def config(self) -> ec.ModelConfig:
        return self.checkpoint.config

    @property
    def options(self) -> dict[str, str]:
        """For the constructor of a decoder."""
        return {"activation": self.activation, "dtype": self.dtype, "head": self.head}

    @cached_property
    def model(self) -> Any:
        """The workload's decoder on this run's backend, built once: every part measures the same model."""
        transformer = ec.reference.TernaryTransformer if self.no_gpu else ec.TernaryTransformer
        return transformer(self.checkpoint, **self.options)

    def new_cache(self, max_len: int, batch: int = 1, sampling: Sampling | None = None) -> Any:
        """A cache of :attr:`model`, of this run's dtype."""
        return self.model.new_cache(max_len, batch, self.kv_dtype, sampling)

    def row(self, key: str, boundary: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of one row, which the journal keeps, with its `boundary` and the `conditions` meanwhile.

        A row that the journal already has is not measured again; the conditions of one of an earlier process are marked
        ``resumed``, since they go wherever the row goes, and count the seconds of that process. After Ctrl-C, and where
        `measure` raises, the row is a null figure with the reason; the part makes of its other rows what it can.

        Args:
            key: names the row within the run.
            boundary: what the times include: ``"kernel"`` (operations on the device), ``"engine"`` (no tokeniser, no
                network), ``"server"`` or ``"client"``.
            measure: returns figures that JSON can hold.
        """
        if recorded := self.journal.recorded(key):
            self.failures += [line for line in recorded["failures"] if line not in self.failures]
            figures = recorded["figures"]
            if key in self.journal.taken:
                figures = {**figures, "conditions": {**figures["conditions"], "resumed": True}}
            return figures
        if self.interrupted:
            return missing(INTERRUPTED)
        known, start = len(self.failures), time.perf_counter()
        try:
            with self.telemetry.watch() as conditions:
                figures = measure()
            figures = {**figures, "boundary": boundary, "conditions": conditions}
            if fields(figures):  # one that is null may have a value when a resumed run tries again
                self.journal.record(key, time.perf_counter() - start, figures, self.failures[known:])
        except KeyboardInterrupt:
            self.interrupted = True
            return missing(INTERRUPTED)
        except JournalError:  # the disk is full: no later row could be kept either
            raise
        except Exception as e:  # whatever it is, the other rows are worth having
            if isinstance(e, WrongResultError) and str(e) not in self.failures:
                self.failures.append(str(e))
            self.errors[key] = failure(e)
            return missing(describe(e))
        return figures

    def shuffled(self, what: str, items: Iterable[T]) -> list[T]:
        """`items` in the order in which this run measures them: by :attr:`seed`, and for each `what` another one."""
        order = list(items)
        random.Random(f"{self.seed} {what}").shuffle(order)
        return order


def describe(e: BaseException) -> str:
    """An exception on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())}"


def failure(e: BaseException) -> dict[str, str]:
    """An exception as `errors` of a report keeps it."""
    return {"reason": describe(e), "traceback": "".join(traceback.format_exception(e))}
