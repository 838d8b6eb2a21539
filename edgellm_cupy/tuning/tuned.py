"""What `edgellm tune` found on this machine: configurations that beat the default, and looking them up.

There is one JSON file for each GPU, driver and package version, in the folder `tuned` of the kernel cache:

    {"gpu": ..., "driver": ..., "version": ..., "entries": [{"problem": {the fields of dispatch.Problem},
     "strategy": "streaming" or "separate", "config": {the fields of its configuration}, "us": ..., "default_us": ...}]}

An entry serves exactly its problem: one for N = 4 says nothing about N = 5, nor one for float16 about bfloat16. The
file is read once a process; EDGELLM_TUNED=0 leaves it unread. It is a cache: what is wrong with it costs a warning and
speed, never an operation.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EdgeLLMError
from ..kernels.nvrtc import cache_folder
from ..runtime import device_name
from ..version import __version__
from .device import DeviceFacts, _facts_of
from .dispatch import Config, Problem, candidates
from .gemm import GemmConfig
from .product import ProductConfig

CONFIGS: dict[str, type[ProductConfig] | type[GemmConfig]] = {"streaming": ProductConfig, "separate": GemmConfig}
"""The type of configuration by the name of its strategy."""

# What a file that somebody else has written, or half of one, can make of the code that reads it.
_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)


class Key(NamedTuple):
    """What a choice holds for: name of the GPU, version of its driver, version of this package."""

    gpu: str
    driver: str
    version: str


class Tuned(NamedTuple):
    """The fastest configuration for a problem.

    Attributes:
        us: its time in microseconds, cold L2, in a CUDA graph.
        default_us: that of the configuration that is chosen without it.
    """

    config: Config
    us: float
    default_us: float


class _Entry(NamedTuple):
    """As the file has it."""

    problem: dict[str, Any]
    strategy: str
    config: dict[str, Any]
    us: float
    default_us: float


def strategy(config: Config) -> str:
    """The name of a configuration's strategy."""
    return next(name for name, kind in CONFIGS.items() if isinstance(config, kind))


# ---- the file -------------------------------------------------------------------------------------------------------


def folder() -> Path:
    """Where the files are: beside the compiled kernels, in the user's cache."""
    return cache_folder() / "tuned"


def file(folder: Path, key: Key) -> Path:
    """The file for a key, which holds the key too: two may share a sanitised name."""
    return folder / (re.sub(r"[^A-Za-z0-9.+]+", "-", " ".join(key)) + ".json")


def load(folder: Path, key: Key, facts: DeviceFacts) -> dict[Problem, Tuned]:
    """The tuned choices for a GPU. Never raises: one warning a file tells of what is ignored, which is a file that is
    no such file, and entries with unknown fields or a configuration that cannot serve their problem (any more)."""
    path = file(folder, key)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := Key(*(content[name] for name in Key._fields))) != key:
            raise ValueError(f"it is of {', '.join(map(str, found))}")
        entries = list(content["entries"])
    except FileNotFoundError:
        return {}
    except (OSError, *_MALFORMED) as e:
        warnings.warn(f"{path}: ignored: {type(e).__name__}: {e}", stacklevel=2)
        return {}
    choices: dict[Problem, Tuned] = {}
    refused = []
    for raw in entries:
        entry = _read(raw, facts)
        if isinstance(entry, str):
            refused.append(entry)
        else:
            choices |= entry
    if refused:
        count = f"{len(refused)} of {len(entries)} entries ignored"
        warnings.warn(f"{path}: {count}, the first: {refused[0]}", stacklevel=2)
    return choices


def _read(raw: Any, facts: DeviceFacts) -> dict[Problem, Tuned] | str:
    """One entry of the file, or what is wrong with it."""
    try:
        entry = _Entry(**raw)
        problem, config = Problem(**entry.problem), CONFIGS[entry.strategy](**entry.config)
        if config not in candidates(problem, facts):
            return f"{config} is no candidate for {problem}"
        return {problem: Tuned(config, float(entry.us), float(entry.default_us))}
    except _MALFORMED as e:
        return f"{type(e).__name__}: {e}"


def save(folder: Path, key: Key, facts: DeviceFacts, found: Mapping[Problem, Tuned | None]) -> Path:
    """Write what was found for some problems, None where the default is best; what the file says of others stays.

    Raises:
        EdgeLLMError: the file cannot be written.
    """
    choices = {**load(folder, key, facts), **found}
    entries = [
        _Entry(
            problem._asdict(), strategy(choice.config), asdict(choice.config), choice.us, choice.default_us
        )._asdict()
        for problem, choice in choices.items()
        if choice
    ]
    path = file(folder, key)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # and renamed: another process may read at this moment
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps({**key._asdict(), "entries": entries}, indent=1) + "\n", encoding="utf-8")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as e:
        raise EdgeLLMError(f"{path}: cannot be written: {e.strerror}") from e
    _tables.cache_clear()
    return path


# ---- this process ---------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    path: Path
    choices: dict[Problem, Config]


def key_of(device: int) -> Key:
    """The key of CUDA device number `device`.

    Raises:
        GpuUnavailableError: no usable GPU.
    """
    return Key(device_name(device), _driver(), __version__)


def lookup(problem: Problem) -> Config | None:
    """The tuned choice for the current device; None where there is none. Costs next to nothing if nothing was tuned."""
    tables = _tables()
    if not tables:
        return None
    table = tables.get(_current_device())
    return table.choices.get(problem) if table else None


def in_use() -> tuple[int, Path | None]:
    """How many tuned choices serve the current device, and the file that they are from."""
    tables = _tables()
    table = tables.get(_current_device()) if tables else None
    return (len(table.choices), table.path) if table else (0, None)


@cache
def _tables() -> dict[int, _Table]:
    """By device number, only those with a choice; of all devices, so that without any none need be asked for again."""
    try:
        if os.environ.get("EDGELLM_TUNED") == "0" or not folder().is_dir():
            return {}
    except (OSError, RuntimeError) as e:  # a cache that cannot be looked at, or no home
        warnings.warn(f"tuned choices are not used: {e}", stacklevel=2)
        return {}
    import cupy

    tables = {}
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        key = key_of(device)
        choices = {problem: choice.config for problem, choice in load(folder(), key, _facts_of(device)).items()}
        if choices:
            tables[device] = _Table(file(folder(), key), choices)
    return tables


def _current_device() -> int:
    import cupy

    return int(cupy.cuda.runtime.getDevice())


def _driver() -> str:
    """The driver's version; where NVML does not tell, that of the newest CUDA it runs."""
    import cupy
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return f"CUDA {cupy.cuda.runtime.driverGetVersion()}"
