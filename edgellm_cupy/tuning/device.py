"""DeviceFacts: what a launch configuration may depend on, as plain numbers, so that tests can describe any GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class DeviceFacts:
    """One GPU.

    Attributes:
        arch: compute capability times ten.
        multiprocessors: their number.
        threads: resident threads a multiprocessor, at most.
        shared_bytes: shared memory of one multiprocessor.
        block_shared_bytes: shared memory that one block may be allowed, at most.
    """

    arch: int
    multiprocessors: int
    threads: int
    shared_bytes: int
    block_shared_bytes: int

    def __hash__(self) -> int:
        # Every call of an operation looks its launch up by the facts: two numbers tell GPUs apart well enough.
        return self.arch + self.multiprocessors


def current_facts() -> DeviceFacts:
    """The facts of the current CUDA device."""
    import cupy

    return _facts_of(cupy.cuda.runtime.getDevice())


@cache
def _facts_of(device: int) -> DeviceFacts:
    import cupy

    p: Any = cupy.cuda.runtime.getDeviceProperties(device)
    return DeviceFacts(
        arch=10 * p["major"] + p["minor"],
        multiprocessors=p["multiProcessorCount"],
        threads=p["maxThreadsPerMultiProcessor"],
        shared_bytes=p["sharedMemPerMultiprocessor"],
        block_shared_bytes=p["sharedMemPerBlockOptin"],
    )
