"""What the commands share: the choices of their options, and what becomes of them."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .. import runtime
from ..errors import ArgumentValueError, GpuUnavailableError
from ..formats.config import ModelConfig

DEFAULT_MODEL = "smollm-135m"
MOST_TOKENS = 65_535


class Backend(str, Enum):
    """Where a model runs; `auto` takes the GPU where there is one."""

    auto = "auto"
    cuda = "cuda"
    numpy = "numpy"


class Shapes(str, Enum):
    """Which products are measured or tuned in place of the model's."""

    table = "table"


class Activation(str, Enum):
    """Which activations to tune for."""

    int8 = "int8"
    float = "float"
    both = "both"


class Dtype(str, Enum):
    """Dtype of x and y."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class ModelActivation(str, Enum):
    """How activations enter the products of a model."""

    int8 = "int8"
    float = "float"


class ModelDtype(str, Enum):
    """Dtype that a model computes in; `auto` leaves it to the model."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class HeadDtype(str, Enum):
    """What embedding and head are stored as; `auto`: as they come."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    float32 = "float32"


class CacheDtype(str, Enum):
    """What keys and values are stored as; `auto`: in the model's dtype."""

    auto = "auto"
    int8 = "int8"


def _or(choices: type[Enum]) -> str:
    *some, last = (choice.value for choice in choices)
    return f"{', '.join(some)} or {last}"


ModelOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A preset, or a JSON file with a configuration.", show_default=DEFAULT_MODEL),
]
BackendOption = Annotated[Backend, typer.Option(help="auto: the GPU where there is one.")]
ActivationOption = Annotated[ModelActivation, typer.Option(help="int8: quantised per token.")]
DtypeOption = Annotated[ModelDtype, typer.Option(metavar="DTYPE", help=f"The model computes in it: {_or(ModelDtype)}.")]
HeadOption = Annotated[
    HeadDtype, typer.Option(metavar="DTYPE", help=f"The output head is stored as it: {_or(HeadDtype)}.")
]
CacheOption = Annotated[CacheDtype, typer.Option(help="What keys and values are stored as.")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def chosen(**options: Enum) -> dict[str, str]:
    """The options that are not left to the model."""
    return {name: option.value for name, option in options.items() if option.value != "auto"}


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of tokens in "1,2,4", each once, rising."""
    try:
        found = sorted({int(number) for number in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1 or found[-1] > MOST_TOKENS:
        raise ArgumentValueError(f"--tokens is {text!r}, expected numbers of 1 to {MOST_TOKENS} such as 1,4,16")
    return tuple(found)


def config_of(model: str | None) -> ModelConfig:
    """Of a preset or of a JSON file."""
    name = model or DEFAULT_MODEL
    return ModelConfig.from_json(name) if name.endswith(".json") else ModelConfig.preset(name)


def why_no_gpu(backend: Backend) -> tuple[str | None, str | None]:
    """Why the GPU is not used, in one line (None: it is), and what to do about it, where that was not the wish.

    Raises:
        GpuUnavailableError: `backend` demands a GPU and none is usable.
    """
    if backend is Backend.numpy:
        return "the NumPy backend was asked for", None
    try:
        runtime.require_gpu()
    except GpuUnavailableError as e:
        if backend is Backend.cuda:
            raise
        return f"no usable GPU: {e.layer}: {e.reason}", e.remedy
    return None, None
