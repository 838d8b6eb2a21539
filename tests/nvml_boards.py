"""Boards as NVML shows them: recorded answers of tests/data/nvml played back through the names of `pynvml`.

A file holds for each call of the suite the value or the error code of one board; its `source` says whether it was
recorded or put together by hand, and `documented` beside an answer where that answer is written down. Constants and
errors are those of the real `pynvml`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml

from edgellm_cupy.bench.machine.nvml import NvmlDevice

FOLDER = Path(__file__).parent / "data" / "nvml"
BOARDS = sorted(path.stem for path in FOLDER.glob("*.json"))
FIRST_INSTANCE = "MIG-00000000-0000-0000-0000-000000000091"
"""What CUDA_VISIBLE_DEVICES names on the board `h100-mig`."""


def load(board: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{board}.json").read_text())


def calls_of(board: str) -> list[str]:
    """Everything that can be refused alone: the device's calls, the fields, and the system's functions."""
    data = load(board)
    devices = [data["device"], *(instance["device"] for instance in data.get("instances", []))]
    return sorted({*data["system"], *data["fields"], *(call.split("[")[0] for device in devices for call in device)})


class RecordedNvml:
    """Plays the part of the module `pynvml` on a machine with these boards.

    Attributes:
        calls: names of the functions that were called, in order; for a handle's look-up its bus id.
    """

    NVMLError = pynvml.NVMLError

    def __init__(
        self,
        *boards: str,
        refuse: Iterable[str] = (),
        error: int = pynvml.NVML_ERROR_NOT_SUPPORTED,
        lacks: Iterable[str] = (),
        watts: float | None = None,
        tick_s: float = 0.01,
        **answers: Any,
    ):
        """The machine with these boards (names of files); one H200 when none is named.

        Args:
            refuse: calls (`PowerUsage`), fields and functions that answer `error` instead.
            lacks: names that this `pynvml` is too old for.
            watts: power and an energy counter of such a board that steps every `tick_s`, in place of the recorded ones.
            answers: other answers to calls, `PowerUsage=5`; a function is called with the arguments.
        """
        self._boards = [load(board) for board in boards or ("h200",)]
        self._refuse, self._error, self._lacks, self._answers = set(refuse), error, set(lacks), answers
        self._watts, self._tick_s, self._start = watts, tick_s, time.perf_counter()
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(f"module 'pynvml' has no attribute '{name}'")
        if name.startswith("nvmlDeviceGet"):
            return lambda handle, *args: self._answer(name, handle, *args)
        return getattr(pynvml, name)

    # ---- functions that ask about no device -------------------------------------------------------------------------

    def nvmlInit(self) -> None:
        self.calls.append("nvmlInit")

    def nvmlSystemGetDriverVersion(self) -> str:
        return self._system("nvmlSystemGetDriverVersion")

    def nvmlDeviceGetCount(self) -> int:
        return max(self._system("nvmlDeviceGetCount"), len(self._boards))

    def _system(self, name: str) -> Any:
        self._check(name)
        return self._value(self._boards[0]["system"][name])

    # ---- handles: the data of a board or of an instance -------------------------------------------------------------

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> dict[str, Any]:
        self.calls.append(bus_id)
        for board in self._boards:
            if board["bus_id"] == bus_id:
                return board
        raise self.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> dict[str, Any]:
        instances = handle.get("instances", [])
        if index >= len(instances):
            raise self.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return {**handle, **instances[index], "fields": {}, "energy_steps": []}

    # ---- questions --------------------------------------------------------------------------------------------------

    def nvmlDeviceGetFieldValues(self, handle: dict[str, Any], fields: list[int]) -> list[Any]:
        self._check("FieldValues")
        return [self._field(handle, field) for field in fields]

    def _field(self, handle: dict[str, Any], field: int) -> Any:
        known = {getattr(pynvml, name): (name, answer) for name, answer in handle["fields"].items()}
        name, answer = known.get(field, ("", {"nvmlReturn": pynvml.NVML_ERROR_NOT_SUPPORTED}))
        answer = dict(answer) | ({"value": round(self._watts * 1e3)} if self._watts and "value" in answer else {})
        answer |= self._answers.get(name, {})
        if name in self._refuse:
            answer["nvmlReturn"] = self._error
        value = pynvml.c_nvmlValue_t()  # its members share their bytes, as in nvml.h
        value.ullVal = answer.get("value", 0)
        return SimpleNamespace(nvmlReturn=answer["nvmlReturn"], valueType=answer.get("valueType", 0), value=value)

    def _answer(self, name: str, handle: dict[str, Any], *args: Any) -> Any:
        what = name.removeprefix("nvmlDeviceGet")
        self.calls.append(name)
        self._check(what)
        if what in self._answers:
            answer = self._answers[what]
            return answer(*args) if callable(answer) else answer
        call = f"{what}[{', '.join(map(str, args))}]" if args else what
        assert call in handle["device"], f"{handle['board']} has no answer for {call}"
        value = self._value(handle["device"][call])
        if what == "TotalEnergyConsumption":
            return self._millijoules(handle["energy_steps"])
        return round(self._watts * 1e3) if what == "PowerUsage" and self._watts else value

    def _check(self, what: str) -> None:
        if what in self._refuse:
            raise self.NVMLError(self._error)

    def _value(self, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            raise self.NVMLError(answer["error"])
        return _structure(answer["value"])

    def _millijoules(self, steps: list[list[float]]) -> int:
        """The counter: of a board that draws `watts`, else the recorded steps again and again."""
        elapsed = time.perf_counter() - self._start
        if self._watts is not None:
            return 7_000_000 + int(elapsed / self._tick_s) * round(self._tick_s * self._watts * 1e3)
        (begin, first), (end, last) = steps[0], steps[-1]
        rounds, into = divmod(elapsed, end - begin)
        reached = [energy for t, energy in steps if t - begin <= into]
        return int(reached[-1] + rounds * (last - first))


def _structure(value: Any) -> Any:
    """pynvml returns structures with attributes, and lists of them."""
    if isinstance(value, dict):
        return SimpleNamespace(**value)
    return [_structure(one) for one in value] if isinstance(value, list) else value


class NoDriver(RecordedNvml):
    """A machine without NVIDIA's driver."""

    def nvmlInit(self) -> None:
        raise self.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def device(board: str = "h200", nvml: Callable[..., RecordedNvml] = RecordedNvml, **options: Any) -> NvmlDevice:
    """The board as the suite reads it; `options` as :class:`RecordedNvml` takes them."""
    return NvmlDevice(load(board)["bus_id"], nvml(board, **options), visible=FIRST_INSTANCE)
