"""Our own checkpoint file: safetensors with two bits a weight, and an int8 embedding.

Metadata: ``format`` is :data:`FORMAT`, ``config`` the fields of ModelConfig as JSON, ``source`` where the weights came
from. Tensors, for each layer i and each of its products P in qkv, out, up, down:

    embedding.values     int8    [V, H]            layers.i.attn_norm   float32 [H]
    embedding.scale      float32 [V]               layers.i.ffn_norm    float32 [H]
    final_norm           float32 [H]               layers.i.P.packed    uint8   [M, ceil(K / 64), 16]
                                                   layers.i.P.scale     float32 [M] or [1]

:mod:`edgellm_cupy.formats.packing` defines the packed codes, `ModelConfig.products` gives M and K.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ArgumentValueError, CheckpointError, MissingDependencyError
from .checkpoint import Checkpoint, LayerWeights, Rows
from .config import ModelConfig
from .ternary import TernaryWeight

FORMAT = "edgellm-ternary-v1"
_FAMILY = FORMAT.rpartition("v")[0]
_PRODUCTS = ("qkv", "out", "up", "down")


def write(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write `checkpoint` to `path`. A file that stands there is replaced in one step, and only by a complete one.

    Raises:
        CheckpointError: the file cannot be written.
        MissingDependencyError: the package `safetensors` is not installed.
    """
    path = Path(path)
    safetensors = _require_safetensors(path)
    embedding = checkpoint.embedding.astype("int8")
    tensors = {
        "embedding.values": embedding.values,
        "embedding.scale": embedding.scale,
        "final_norm": checkpoint.final_norm,
    }
    for i, layer in enumerate(checkpoint.layers):
        tensors[f"layers.{i}.attn_norm"] = layer.attn_norm
        tensors[f"layers.{i}.ffn_norm"] = layer.ffn_norm
        for name in _PRODUCTS:
            weight: TernaryWeight = getattr(layer, name).to_host()
            tensors[f"layers.{i}.{name}.packed"] = weight.packed
            tensors[f"layers.{i}.{name}.scale"] = weight.scale
    # safetensors writes the memory of an array, whatever its strides are.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "config": json.dumps(checkpoint.config.to_dict()), "source": checkpoint.source}

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # Not save_file, which makes a file that only its owner may read.
        partial.write_bytes(safetensors.numpy.save(tensors, metadata))
        partial.replace(path)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be written: {e}") from e
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> Checkpoint:
    """Read a file that :func:`write` made; every tensor is checked.

    Raises:
        CheckpointError: not such a file, or a damaged one; names the file and the tensor.
        MissingDependencyError: the package `safetensors` is not installed.
    """
    path = Path(path)
    safetensors = _require_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return _read(path, file)
    except (OSError, safetensors.SafetensorError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file: {e}") from e


def _read(path: Path, file: Any) -> Checkpoint:
    metadata = file.metadata() or {}
    stated = metadata.get("format", "")
    if stated != FORMAT:
        if stated.startswith(_FAMILY):
            raise CheckpointError(f"{path}: its format is {stated!r}, but this version reads {FORMAT!r}")
        raise CheckpointError(
            f"{path}: a safetensors file, but not one that edgellm wrote "
            f"(its metadata gives {f'the format {stated!r}' if stated else 'no format'}, expected {FORMAT!r})"
        )
    try:
        values = json.loads(metadata.get("config", ""))
    except ValueError as e:
        raise CheckpointError(f"{path}: its metadata holds no model configuration: {e}") from e
    config = ModelConfig.from_dict(values, str(path))
    unread = set(file.keys())

    def tensor(name: str, dtype: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
        if name not in unread:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        unread.remove(name)
        try:
            array = file.get_tensor(name)
        except Exception as e:  # a dtype that NumPy lacks: safetensors raises anything, even AttributeError
            raise CheckpointError(f"{path}: tensor {name} cannot be read: {e}") from e
        if array.dtype != dtype or shape not in (None, array.shape):
            expected = np.dtype(dtype).name + ("" if shape is None else f" {list(shape)}")
            raise CheckpointError(
                f"{path}: tensor {name} is {array.dtype} {list(array.shape)}, but the configuration needs {expected}"
            )
        if array.dtype == np.float32 and not np.isfinite(array).all():
            raise CheckpointError(f"{path}: tensor {name} holds a value that is not finite")
        return array

    def ternary(name: str, shape: tuple[int, int]) -> TernaryWeight:
        packed, scale = tensor(f"{name}.packed", np.uint8), tensor(f"{name}.scale", np.float32)
        try:
            return TernaryWeight.from_packed(packed, scale, shape)
        except (ArgumentTypeError, ArgumentValueError) as e:
            raise CheckpointError(f"{path}: tensor {name}: {e}") from e

    hidden = (config.hidden_size,)
    shapes = dict(zip(_PRODUCTS, config.products().values(), strict=True))

    def layer(prefix: str) -> LayerWeights:
        return LayerWeights(
            attn_norm=tensor(f"{prefix}.attn_norm", np.float32, hidden),
            ffn_norm=tensor(f"{prefix}.ffn_norm", np.float32, hidden),
            **{name: ternary(f"{prefix}.{name}", shape) for name, shape in shapes.items()},
        )

    embedding = Rows(
        tensor("embedding.values", np.int8, (config.vocab_size, config.hidden_size)),
        tensor("embedding.scale", np.float32, (config.vocab_size,)),
    )
    final_norm = tensor("final_norm", np.float32, hidden)
    layers = tuple(layer(f"layers.{i}") for i in range(config.num_layers))
    if unread:
        raise CheckpointError(f"{path}: tensor {min(unread)}: the configuration has no place for it")
    return Checkpoint(
        config, layers, final_norm, metadata.get("source", path.name), lambda: embedding, lambda: embedding
    )


def _require_safetensors(path: Path) -> Any:
    """The `safetensors` package with its `numpy` module."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as e:
        raise MissingDependencyError(
            f"{path} needs the package safetensors: pip install 'edgellm-cupy[models]' ({e})"
        ) from e
    return safetensors
