"""Puts NumPy arrays into the emulator's device memory, and takes them out again."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIGNMENT = 256  # what cudaMalloc and CuPy's pool give every allocation
RED_ZONE = 1024  # between allocations
POISON = 0xCB

# States of a byte, as in runtime/memory.hpp.
ACCESSIBLE, INITIALISED, WRITABLE = 1, 2, 4

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Output:
    """An array that the kernel must fill: it comes poisoned, and a byte left unwritten is a fault."""

    array: Array


@dataclass(frozen=True)
class Scratch:
    """An array that the kernel may use as it likes: it comes poisoned, and may stay so."""

    array: Array


@dataclass(frozen=True)
class Placed:
    """One array argument in device memory."""

    index: int
    array: Array
    offset: int  # in the arena
    nbytes: int
    state: int
    is_output: bool

    def describe(self) -> str:
        return f"argument {self.index} ({self.array.dtype}{list(self.array.shape)})"


class DeviceMemory:
    """The arena and the shadow of the runtime, as NumPy arrays."""

    def __init__(self, arena: int, shadow: int, nbytes: int) -> None:
        self.address = arena
        self.arena = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(arena))
        self.shadow = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(shadow))
        self.used = 0

    def place(self, arguments: Sequence[tuple[int, Array | Output | Scratch, bool]]) -> list[Placed]:
        """Copies arrays in; each is (argument index, array, whether the kernel takes it as const).

        An array lies as CuPy would have it: the array that owns its memory starts at a multiple of 256 bytes, a
        view lies within. Only the bytes of the arrays passed can be touched, not the rest of their owner.
        """
        placed = []
        owners: dict[int, int] = {}  # address of an owner's memory -> arena offset of that address
        cursor = RED_ZONE
        for index, argument, is_const in arguments:
            array = argument if isinstance(argument, np.ndarray) else argument.array
            owner = _owner(array)
            low, high = np.lib.array_utils.byte_bounds(owner)
            if low not in owners:
                owners[low] = cursor
                cursor += -(-(high - low) // ALIGNMENT) * ALIGNMENT + RED_ZONE
                if cursor > self.arena.size:
                    raise MemoryError(f"the arguments need more than the emulator's {self.arena.size} bytes")
            first, last = np.lib.array_utils.byte_bounds(array)
            if array.size == 0:
                last = first
            poisoned = isinstance(argument, (Output, Scratch))
            writable = not is_const and array.flags.writeable
            state = ACCESSIBLE | (WRITABLE if writable else 0) | (0 if poisoned else INITIALISED)
            placed.append(
                Placed(index, array, owners[low] + first - low, last - first, state, isinstance(argument, Output))
            )
        self.used = cursor
        for item in placed:
            inside = slice(item.offset, item.offset + item.nbytes)
            self.shadow[inside] |= item.state
            if not item.state & INITIALISED:
                self.arena[inside] = POISON
        for item in placed:  # after the poison: an array may also come a second time, as an input
            if item.state & INITIALISED:
                ctypes.memmove(self.address + item.offset, _start(item), item.nbytes)
        return placed

    def take_back(self, placed: Sequence[Placed]) -> None:
        for item in placed:
            if item.state & WRITABLE:
                ctypes.memmove(_start(item), self.address + item.offset, item.nbytes)

    def unwritten(self, item: Placed) -> tuple[int, int]:
        """(elements with a byte that nothing wrote, the first of them)"""
        states = self.shadow[item.offset : item.offset + item.nbytes] & INITIALISED
        missing = np.flatnonzero(states == 0) // item.array.itemsize
        return (np.unique(missing).size, int(missing[0])) if missing.size else (0, -1)

    def describe(self, address: int, placed: Sequence[Placed]) -> str:
        """Where an address lies, seen from the nearest argument."""
        offset = address - self.address
        if not placed or not 0 <= offset < self.used:
            return ""

        def distance(item: Placed) -> int:
            return max(item.offset - offset, offset - (item.offset + item.nbytes) + 1, 0)

        nearest = min(placed, key=distance)
        at = offset - nearest.offset
        if at < 0:
            return f"{-at} bytes before {nearest.describe()}"
        if at >= nearest.nbytes:
            return f"{at - nearest.nbytes} bytes past the end of {nearest.describe()}"
        return f"element {at // nearest.array.itemsize} of {nearest.describe()}"

    def clear(self) -> None:
        self.shadow[: self.used] = 0
        self.used = 0


def _owner(array: Array) -> Array:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _start(item: Placed) -> int:
    return int(np.lib.array_utils.byte_bounds(item.array)[0])
