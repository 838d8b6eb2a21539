"""Record what NVML answers about a GPU, for tests/nvml_boards.py:

    python tests/data/nvml/record.py 0000:1b:00.0 tests/data/nvml/BOARD.json

It asks what the suite asks, as h200.json lists it, and follows the energy counter for some seconds. UUIDs are replaced.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pynvml


def record(bus_id: str, nvml: Any = pynvml, seconds: float = 3.0) -> dict[str, Any]:
    """The content of a board's file: every answer as its value or its error code."""
    nvml.nvmlInit()
    handle = nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
    asked = json.loads((Path(__file__).parent / "h200.json").read_text())
    device = {call: _answer(nvml, call, handle) for call in asked["device"]}
    if "value" in device["UUID"]:
        device["UUID"]["value"] = "GPU-anonymous"
    return {
        "board": "",
        "source": f"recorded on {time.strftime('%Y-%m-%d')}; UUID replaced",
        "bus_id": bus_id,
        "system": {name: _guarded(nvml, getattr(nvml, name)) for name in asked["system"]},
        "device": device,
        "fields": {name: _field(nvml, handle, name) for name in asked["fields"]},
        "energy_steps": _energy_steps(nvml, handle, seconds) if "value" in device["TotalEnergyConsumption"] else [],
    }


def _answer(nvml: Any, call: str, handle: Any) -> dict[str, Any]:
    """Of a call such as ``"ClockInfo[1]"``."""
    what, _, argument = call.rstrip("]").partition("[")
    arguments = [int(argument)] if argument else []
    return _guarded(nvml, getattr(nvml, f"nvmlDeviceGet{what}"), handle, *arguments)


def _guarded(nvml: Any, function: Any, *arguments: Any) -> dict[str, Any]:
    try:
        return {"value": _plain(function(*arguments))}
    except nvml.NVMLError as e:
        return {"error": e.value}


def _plain(value: Any) -> Any:
    """JSON of what pynvml returns: numbers, text, lists, and structures of ctypes or of Python."""
    if hasattr(value, "_fields_"):
        return {name: _plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {name: _plain(one) for name, one in vars(value).items()} if hasattr(value, "__dict__") else value


def _field(nvml: Any, handle: Any, name: str) -> dict[str, Any]:
    answer = nvml.nvmlDeviceGetFieldValues(handle, [getattr(nvml, name)])[0]
    if answer.nvmlReturn:
        return {"nvmlReturn": answer.nvmlReturn}
    return {"nvmlReturn": 0, "valueType": answer.valueType, "value": answer.value.ullVal}


def _energy_steps(nvml: Any, handle: Any, seconds: float) -> list[list[float]]:
    """Seconds and millijoules of each new reading."""
    begin, steps = time.perf_counter(), []
    while (at := time.perf_counter() - begin) < seconds:
        energy = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        if not steps or energy != steps[-1][1]:
            steps.append([round(at, 5), energy])
    return steps


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(record(sys.argv[1]), indent=2) + "\n")
