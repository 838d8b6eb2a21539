"""Our own checkpoint file: safetensors with two bits a weight.

Metadata: ``format`` is :data:`FORMAT`, ``config`` the fields of ModelConfig as JSON, ``source`` where the weights came
from. Tensors, for each layer i and each of its products P in qkv, out, up, down:

    layers.i.attn_norm      float32 [H]            layers.i.P.packed   uint8   [M, ceil(K / 64), 16]
    layers.i.ffn_norm       float32 [H]            layers.i.P.scale    float32 [M] or [1]
    layers.i.attn_sub_norm  float32 [K of out]     final_norm          float32 [H]
    layers.i.ffn_sub_norm   float32 [K of down]    embedding.values    int8, float16, bfloat16 or float32 [V, H]
                                                   embedding.scale     float32 [V], where the values are int8

The sub-norms are there when the configuration has them; ``head.values`` and ``head.scale``, like the embedding's, when
its head is not tied. :mod:`edgellm_cupy.formats.packing` defines the packed codes, `ModelConfig.products` gives M and
K. Files of version 1 are those that have an int8 embedding and neither sub-norms nor a head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentValueError, CheckpointError
from .checkpoint import ROW_DTYPES, Checkpoint, Layers, LayerWeights, Rows
from .checks import not_finite, why_untrained
from .config import ModelConfig
from .packing import CHUNK_BYTES, chunks
from .safetensors_file import SafetensorsFile, create, shown
from .ternary import TernaryWeight

FORMAT = "edgellm-ternary-v2"
FAMILY = FORMAT.rpartition("v")[0]
_READABLE = (f"{FAMILY}v1", FORMAT)
_PRODUCTS = ("qkv", "out", "up", "down")


def _norms(c: ModelConfig) -> dict[str, int]:
    """A layer's norm weights and their sizes."""
    norms = {"attn_norm": c.hidden_size, "ffn_norm": c.hidden_size}
    return norms | ({"attn_sub_norm": c.q_rows, "ffn_sub_norm": c.intermediate_size} if c.sub_norms else {})


def _tables(c: ModelConfig) -> tuple[str, ...]:
    return ("embedding",) if c.tied_head else ("embedding", "head")


# ---- writing --------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, path: str | Path) -> None:
    """Write `checkpoint` to `path`, one layer at a time. A file that stands there is replaced in one step, and only by
    a complete one.

    Raises:
        CheckpointError: the file cannot be written, a matrix is constant, or reading `checkpoint` failed.
    """
    path, config = Path(path), checkpoint.config
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict()), "source": checkpoint.source}
    with create(path, _names(config), metadata) as add:
        # Four-byte values and whole chunks first: what stands at the end may have any length, and all is aligned.
        for i, layer in enumerate(checkpoint.layers):
            for name in _norms(config):
                add(f"layers.{i}.{name}", getattr(layer, name))
            for name in _PRODUCTS:
                weight: TernaryWeight = getattr(layer, name).to_host()
                if why := why_untrained(weight):
                    raise CheckpointError(f"{path}: cannot be written: layer {i}, {name}: {why}")
                add(f"layers.{i}.{name}.scale", weight.scale)
                add(f"layers.{i}.{name}.packed", weight.packed)
        add("final_norm", checkpoint.final_norm)
        for name in _tables(config):
            rows = checkpoint.embedding if name == "embedding" else checkpoint.head
            if rows.scale is not None:
                add(f"{name}.scale", rows.scale)
            add(f"{name}.values", rows.values)


def _names(c: ModelConfig) -> Iterator[str]:
    for i in range(c.num_layers):
        yield from (f"layers.{i}.{name}" for name in _norms(c))
        yield from (f"layers.{i}.{name}.{part}" for name in _PRODUCTS for part in ("scale", "packed"))
    yield "final_norm"
    yield from (f"{name}.{part}" for name in _tables(c) for part in ("scale", "values"))


# ---- reading --------------------------------------------------------------------------------------------------------


def is_compact(path: str | Path) -> bool:
    """Whether a safetensors file says that edgellm wrote it, in whatever version.

    Raises:
        CheckpointError: not a complete safetensors file.
    """
    return SafetensorsFile(Path(path)).metadata.get("format", "").startswith(FAMILY)


def read(path: str | Path) -> Checkpoint:
    """Read a file that :func:`write` made. The header is checked here; values when a layer, the embedding or the head
    is read. Arrays are views of the mapped file.

    Raises:
        CheckpointError: not such a file, or a damaged one; names the file and the tensor.
    """
    file = SafetensorsFile(Path(path))
    config = _config(file)
    shapes = dict(zip(_PRODUCTS, config.products().values(), strict=True))
    _check_header(file, config, shapes)

    def vector(name: str) -> np.ndarray:
        values = file.tensor(name)
        if (at := not_finite(values)) is not None:
            raise file.error(f"tensor {name} holds a value that is not finite, {values[at]} at {list(at)}")
        return values

    def ternary(name: str, shape: tuple[int, int]) -> TernaryWeight:
        try:
            weight = TernaryWeight.from_packed(file.tensor(f"{name}.packed"), vector(f"{name}.scale"), shape)
        except ArgumentValueError as e:
            raise file.error(f"tensor {name}: {e}") from e
        if why := why_untrained(weight):
            raise file.error(f"tensor {name}.packed: {why}")
        return weight

    def layer(i: int) -> LayerWeights:
        fields: dict[str, Any] = {name: vector(f"layers.{i}.{name}") for name in _norms(config)}
        fields |= {name: ternary(f"layers.{i}.{name}", shape) for name, shape in shapes.items()}
        return LayerWeights(**fields)

    def rows(name: str) -> Rows:
        values = file.tensor(f"{name}.values")
        if values.dtype == np.int8:
            return Rows(values, vector(f"{name}.scale"))
        return Rows(vector(f"{name}.values"))

    return Checkpoint(
        config=config,
        layers=Layers(config.num_layers, layer),
        final_norm=vector("final_norm"),
        source=file.metadata.get("source", file.path.name),
        read_embedding=lambda: rows("embedding"),
        read_head=lambda: rows(_tables(config)[-1]),
    )


def _config(file: SafetensorsFile) -> ModelConfig:
    stated = file.metadata.get("format", "")
    if stated not in _READABLE:
        if stated.startswith(FAMILY):
            raise file.error(f"its format is {shown(stated)!r}, but this version reads {' and '.join(_READABLE)}")
        raise file.error(
            "a safetensors file, but not one that edgellm wrote "
            f"(its metadata gives {f'the format {shown(stated)!r}' if stated else 'no format'}, expected {FORMAT!r})"
        )
    try:
        values = json.loads(file.metadata.get("config", ""))
    except (ValueError, RecursionError) as e:
        raise file.error(f"its metadata holds no model configuration: {e}") from e
    return ModelConfig.from_dict(values, str(file.path))


def _check_header(file: SafetensorsFile, c: ModelConfig, shapes: dict[str, tuple[int, int]]) -> None:
    """Every tensor is there, of the right dtype and shape, and no other one."""
    known = {"final_norm"}
    file.expect("final_norm", (c.hidden_size,), np.float32)
    for name in _tables(c):
        entry = file.expect(f"{name}.values", (c.vocab_size, c.hidden_size), *ROW_DTYPES.values())
        known.add(f"{name}.values")
        if entry.dtype == np.int8:
            file.expect(f"{name}.scale", (c.vocab_size,), np.float32)
            known.add(f"{name}.scale")
    # Ends at the first missing tensor, however many layers a damaged header promises.
    for i in range(c.num_layers):
        for name, size in _norms(c).items():
            file.expect(f"layers.{i}.{name}", (size,), np.float32)
            known.add(f"layers.{i}.{name}")
        for name, (m, k) in shapes.items():
            product = f"layers.{i}.{name}"
            file.expect(f"{product}.packed", (m, chunks(k), CHUNK_BYTES), np.uint8)
            scale = file.expect(f"{product}.scale", None, np.float32)
            if scale.shape not in ((m,), (1,)):
                raise file.error(f"tensor {product}.scale is {scale}, but the configuration needs float32 [{m}] or [1]")
            known |= {f"{product}.packed", f"{product}.scale"}
    if unknown := file.entries.keys() - known:
        raise file.error(f"tensor {shown(min(unknown))}: the configuration has no place for it")
