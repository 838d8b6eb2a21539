"""Reads the GPU checkpoint of microsoft/BitNet, ``model_state_int2.pt``: BitNet b1.58 2B4T with two bits a weight.

It is a file of torch.save (:mod:`.torch_file`) with these tensors, for each layer N of L:

    tok_embeddings.weight  float [V, H]         layers.N.attention_norm.weight              float [H]
    output.weight          float [V, H]         layers.N.attention.attn_sub_norm.weight     float [H]
    norm.weight            float [H]            layers.N.ffn_norm.weight                    float [H]
                                                layers.N.feed_forward.ffn_sub_norm.weight   float [F]
    layers.N.attention.wqkv     layers.N.attention.wo       .weight int8 [M, K / 4], .weight_scale bfloat16 [4]
    layers.N.feed_forward.w13   layers.N.feed_forward.w2

``output.weight`` may be missing, or repeat the embedding: a tied head.

**Scales** are multiplied: wqkv has one each for the rows of query, key and value, w13 for gate and up, the others
one; what is left of the four is not used. (microsoft's kernel divides the rows of wqkv in three equal parts instead,
so that half of the query is multiplied by the key's scale. The converter shows what is meant.)

**Codes** are one, two and three for the weights -1, 0 and 1. A matrix is cut into tiles of 16 rows and 32 columns, of
128 bytes each, one row of tiles after the other. A tile holds 32 words; word 16a + 8b + c has the 16 columns from 16b
on of row 8a + c, and inside a word byte y, bits 2x and 2x + 1, are column 4x + y. That is the order of
:mod:`.packing` too, whose codes are smaller by one: only words change their places.

**Rows** of query and key are stored for the rotation of adjacent pairs, as in GGUF.

The file says nothing of heads, rotation and epsilons. They come from a ``config.json`` (Hugging Face's names) or a
``params.json`` (Meta's names) beside it, and what that leaves out is as in 2B4T. Without such a file the model is 2B4T,
and the sizes must be its.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentValueError
from . import packing
from .checkpoint import Checkpoint, Layers, LayerWeights, Rows
from .checks import why_untrained
from .config import ModelConfig
from .gguf import halves_from_pairs
from .ternary import TernaryWeight
from .torch_file import TorchFile

_TILE_ROWS, _TILE_COLUMNS = 16, 32
_SCALES = 4
_FLOATS = ("bfloat16", "float16", "float32")
_PIECE = 1 << 20  # elements of the embedding that are checked at once
_ZEROS = 0x55  # four codes of the weight 0 in our packing; also a one in each of four codes


def read(path: str | Path) -> Checkpoint:
    """Read what such a file describes, all of it checked. Layers, embedding and head are read when they are asked for.

    Raises:
        CheckpointError: not such a file, or a damaged one; names the file and the tensor. Reading a layer, the
            embedding or the head may raise it too.
    """
    file = TorchFile(path)
    c = _config(file)
    _check_tensors(file, c)

    def layer(i: int) -> LayerWeights:
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        return LayerWeights(
            attn_norm=_vector(file, f"layers.{i}.attention_norm.weight"),
            qkv=_product(file, f"{attention}.wqkv", (c.q_rows, c.kv_rows, c.kv_rows), (c.num_heads, c.num_kv_heads)),
            out=_product(file, f"{attention}.wo", (c.hidden_size,)),
            ffn_norm=_vector(file, f"layers.{i}.ffn_norm.weight"),
            up=_product(file, f"{ffn}.w13", (c.intermediate_size, c.intermediate_size)),
            down=_product(file, f"{ffn}.w2", (c.hidden_size,)),
            attn_sub_norm=_vector(file, f"{attention}.attn_sub_norm.weight"),
            ffn_sub_norm=_vector(file, f"{ffn}.ffn_sub_norm.weight"),
        )

    def rows(name: str) -> Callable[[], Rows]:
        return lambda: _rows(file, name)

    return Checkpoint(
        config=c,
        layers=Layers(c.num_layers, layer),
        final_norm=_vector(file, "norm.weight"),
        source=file.path.name,
        read_embedding=rows("tok_embeddings.weight"),
        read_head=rows("tok_embeddings.weight" if c.tied_head else "output.weight"),
    )


# ---- the configuration ----------------------------------------------------------------------------------------------


def _config(file: TorchFile) -> ModelConfig:
    """From the tensors' shapes, and from the file beside them or 2B4T."""
    vocab, hidden = _shape(file, "tok_embeddings.weight")
    q_rows = 4 * _shape(file, "layers.0.attention.wo.weight")[1]
    qkv_rows = _shape(file, "layers.0.attention.wqkv.weight")[0]
    layers = 1
    while f"layers.{layers}.attention.wqkv.weight" in file.tensors:
        layers += 1
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 4 * _shape(file, "layers.0.feed_forward.w2.weight")[1],
        "vocab_size": vocab,
    }
    preset = ModelConfig.preset("bitnet-2b4t")
    source, beside = _beside(file)
    try:
        if beside is None:
            config = dataclasses.replace(preset, tied_head=_is_tied(file))
            for name, size in sizes.items():
                if getattr(config, name) != size:
                    raise file.error(
                        f"its tensors give {name} = {size}, not {getattr(config, name)} as BitNet b1.58 2B4T has, and "
                        "there is no config.json or params.json beside it"
                    )
        else:
            heads = beside.get("num_heads", preset.num_heads)
            if type(heads) is not int or heads < 1 or q_rows % heads:
                raise file.error(f"{source} gives {heads!r:.80} heads, which do not divide the {q_rows} rows of query")
            sizes["head_dim"] = q_rows // heads
            for name, size in sizes.items():
                if beside.get(name, size) != size:
                    raise file.error(f"{source} gives {name} = {beside[name]!r:.80}, but its tensors give {size}")
            values = {**beside, **sizes, "tied_head": _is_tied(file)}
            config = dataclasses.replace(preset, name=file.path.stem, **values)
    except ArgumentValueError as e:
        raise file.error(f"{source}: {e}") from e
    if (q_rows, qkv_rows) != (config.q_rows, config.q_rows + 2 * config.kv_rows):
        raise file.error(
            f"tensor layers.0.attention.wqkv.weight has {qkv_rows} rows, {q_rows} of them query, which "
            f"{config.num_heads} heads and {config.num_kv_heads} KV heads of {config.head_dim} do not give"
        )
    return config


def _beside(file: TorchFile) -> tuple[str, dict[str, Any] | None]:
    """The file beside the checkpoint, and what it says, by the names of ModelConfig."""
    for name, keys in _CONFIG_FILES.items():
        path = file.path.with_name(name)
        if not path.exists():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as e:
            raise file.error(f"{path}: not a readable JSON file: {e}") from e
        if not isinstance(values, dict):
            raise file.error(f"{path}: expected a JSON object")
        rope = [values.get(key) for key in ("rope_parameters", "rope_scaling")]
        if values.get("hidden_act", "relu2") != "relu2" or values.get("use_scaled_rope") or not all(map(_plain, rope)):
            raise file.error(
                f"{path}: only the activation relu2 without rotary scaling is what such a checkpoint holds"
            )
        values |= rope[0] or {}  # where transformers 5 has the base
        return str(path), {ours: values[theirs] for theirs, ours in keys.items() if values.get(theirs) is not None}
    return "2B4T", None


def _plain(rope: Any) -> bool:
    """Whether `rope_parameters` or `rope_scaling` says no more than a base."""
    if rope is None:
        return True
    if not isinstance(rope, dict) or rope.keys() - {"type", "rope_type", "rope_theta"}:
        return False
    return all(rope.get(key, "default") == "default" for key in ("type", "rope_type"))


_CONFIG_FILES = {
    "config.json": {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "head_dim": "head_dim",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rope_theta": "rope_theta",
        "rms_norm_eps": "rms_eps",
        "max_position_embeddings": "max_context",
    },
    "params.json": {
        "n_layers": "num_layers",
        "dim": "hidden_size",
        "n_heads": "num_heads",
        "n_kv_heads": "num_kv_heads",
        "rope_theta": "rope_theta",
        "norm_eps": "rms_eps",
        "max_seq_len": "max_context",
    },
}


def _shape(file: TorchFile, name: str) -> tuple[int, ...]:
    """Of a matrix."""
    if name not in file.tensors:
        raise file.error(f"tensor {name} is missing")
    shape = file.tensors[name].shape
    if len(shape) != 2:
        raise file.error(f"tensor {name} has shape {shape}, expected a matrix")
    return shape


def _is_tied(file: TorchFile) -> bool:
    """Whether there is no head beside the embedding, or one that repeats it."""
    head, embedding = file.tensors.get("output.weight"), file.tensors["tok_embeddings.weight"]
    if head is None or head == embedding:
        return True
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    a, b = (file.array(name).reshape(-1).view(np.uint8) for name in ("output.weight", "tok_embeddings.weight"))
    return all(np.array_equal(a[i : i + _PIECE], b[i : i + _PIECE]) for i in range(0, len(a), _PIECE))


def _layout(c: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Every tensor that the model must have: its name, the dtypes that it may have, its shape."""
    hidden, ffn = c.hidden_size, c.intermediate_size

    def norm(name: str, k: int) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        return f"{name}.weight", _FLOATS, (k,)

    yield "tok_embeddings.weight", _FLOATS, (c.vocab_size, hidden)
    if not c.tied_head:
        yield "output.weight", _FLOATS, (c.vocab_size, hidden)
    yield norm("norm", hidden)
    for i in range(c.num_layers):
        attention, feed_forward = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        yield norm(f"layers.{i}.attention_norm", hidden)
        yield norm(f"layers.{i}.ffn_norm", hidden)
        yield norm(f"{attention}.attn_sub_norm", c.q_rows)
        yield norm(f"{feed_forward}.ffn_sub_norm", ffn)
        names = (f"{attention}.wqkv", f"{attention}.wo", f"{feed_forward}.w13", f"{feed_forward}.w2")
        for name, (m, k) in zip(names, c.products().values(), strict=True):
            yield f"{name}.weight", ("int8", "uint8"), (m, k // 4)
            yield f"{name}.weight_scale", _FLOATS, (_SCALES,)


def _check_tensors(file: TorchFile, c: ModelConfig) -> None:
    for name, (m, k) in c.products().items():
        if m % _TILE_ROWS or k % _TILE_COLUMNS:
            raise file.error(f"the product {name} is {m} x {k}, not tiles of {_TILE_ROWS} x {_TILE_COLUMNS}")
    known = {"output.weight"}
    for name, dtypes, shape in _layout(c):
        if name not in file.tensors:
            raise file.error(f"tensor {name} is missing")
        tensor = file.tensors[name]
        if tensor.dtype.name not in dtypes or tensor.shape != shape:
            found, expected = f"{tensor.dtype.name} {list(tensor.shape)}", f"{' or '.join(dtypes)} {list(shape)}"
            raise file.error(f"tensor {name} is {found}, expected {expected}")
        known.add(name)
    if unknown := sorted(file.tensors.keys() - known):
        raise file.error(f"tensor {unknown[0]}: this decoder has no place for it")


# ---- tensors --------------------------------------------------------------------------------------------------------


def _product(file: TorchFile, name: str, parts: tuple[int, ...], pair_heads: tuple[int, ...] = ()) -> TernaryWeight:
    """A ternary matrix with a scale for each part of its rows.

    Args:
        parts: the rows of each part.
        pair_heads: heads in the first parts, whose rows are stored for the rotation of pairs.
    """
    codes = _untiled(file.array(f"{name}.weight").view(np.uint8))
    invalid = (codes | (codes >> 1)) & _ZEROS != _ZEROS
    if invalid.any():
        row, byte = divmod(int(invalid.argmax()), codes.shape[1])
        raise file.error(f"tensor {name}.weight: row {row}, columns {_columns(byte)}: a code is 0, no ternary weight")
    codes -= _ZEROS
    start = 0
    for rows, heads in zip(parts, pair_heads, strict=False):
        codes[start : start + rows] = halves_from_pairs(codes[start : start + rows], heads)
        start += rows
    m, k = len(codes), 4 * codes.shape[1]
    packed = np.full((m, packing.chunks(k) * packing.CHUNK_BYTES), _ZEROS, np.uint8)
    packed[:, : k // 4] = codes
    scale = _scales(file, f"{name}.weight_scale", len(parts))
    chunks = packed.reshape(m, packing.chunks(k), packing.CHUNK_BYTES)
    start = 0
    for rows, s in zip(parts, scale, strict=True):
        if why := why_untrained(TernaryWeight(chunks[start : start + rows], s, (rows, k))):
            raise file.error(f"tensor {name}.weight, rows {start} to {start + rows - 1}: {why}")
        start += rows
    return TernaryWeight.from_packed(chunks, scale if len(parts) == 1 else scale.repeat(parts), (m, k))


def _untiled(tiles: np.ndarray) -> np.ndarray:
    """uint8 [M, K / 4] as it is stored to uint8 [M, K / 4] whose rows are the matrix's, word after word."""
    m, row_bytes = tiles.shape
    # [row of tiles, column of tiles, a, b, c, byte of a word] to [row of tiles, a, c, column of tiles, b, byte]
    words = tiles.reshape(m // _TILE_ROWS, 4 * row_bytes // _TILE_COLUMNS, 2, 2, 8, 4)
    return words.transpose(0, 2, 4, 1, 3, 5).reshape(m, row_bytes)


def _columns(byte: int) -> str:
    """The four columns that share a byte of a row."""
    word, y = divmod(byte, 4)
    return ", ".join(str(16 * word + 4 * x + y) for x in range(4))


def _scales(file: TorchFile, name: str, count: int) -> np.ndarray:
    """float32 [count]: the scales that are used."""
    scales = file.array(name)[:count].astype(np.float32)
    if not (np.isfinite(scales) & (scales != 0)).all():
        raise file.error(f"tensor {name} is {scales.tolist()}, expected finite numbers other than 0")
    return scales


def _vector(file: TorchFile, name: str) -> np.ndarray:
    """float32 [K] of its own: a norm's weights."""
    values = file.array(name).astype(np.float32)
    _require_sound(file, name, values)
    return values


def _rows(file: TorchFile, name: str) -> Rows:
    """The embedding or the head: the file's own memory, checked in pieces."""
    values = file.array(name)
    _require_sound(file, name, values)
    return Rows(values)


def _require_sound(file: TorchFile, name: str, values: np.ndarray) -> None:
    """Refuse what is not finite, or all zero."""
    flat, some = values.reshape(-1), False
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float32)
        finite = np.isfinite(piece)
        if not finite.all():
            at = np.unravel_index(start + int(finite.argmin()), values.shape)
            raise file.error(f"tensor {name}: element {[int(i) for i in at]} is not a finite number")
        some = some or bool(piece.any())
    if not some:
        raise file.error(f"tensor {name} is all zero, which no trained model is")
