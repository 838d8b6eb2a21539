"""Hugging Face checkpoints: config.json and safetensors, of the architectures Llama and BitNet b1.58.

What the body holds, config.json says, in ``quantization_config``:

    quant_method bitnet, linear_class autobitlinear, quantization_mode offline     packed; W = t * weight_scale
    quant_method bitnet, linear_class bitlinear (the default), any mode            packed; W = t / weight_scale
    quant_method bitnet, linear_class autobitlinear, quantization_mode online      master weights
    no quantization_config                                                         ordinary weights

The first two are the scale trap: the same tensors under the same names, and what one writer multiplies by, the other
divides by. Master and ordinary weights (float16, bfloat16, float32) are quantised with absmean, each matrix by itself.

Packed: ``weight`` is uint8 [M / 4, K]; byte row r holds the codes t + 1 of the output rows r, r + M/4, r + M/2 and
r + 3M/4, from the lowest two bits to the highest; 3 never occurs. ``weight_scale`` is one number.

Only JSON and safetensors are read; a Python file beside them (``auto_map``) is never looked at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import ml_dtypes
import numpy as np

from ..errors import ArgumentValueError, CheckpointError
from . import packing
from .checkpoint import Checkpoint, Layers, LayerWeights, Rows
from .checks import not_finite, why_untrained
from .config import FFN_ACTIVATIONS, ModelConfig
from .rotary import KINDS, RopeScaling
from .safetensors_file import Add, Pieces, SafetensorsFile, create, shown
from .ternary import TernaryWeight, concatenate, row_blocks

_FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_INDEX = "model.safetensors.index.json"

Body = Literal["multiply", "divide", "float"]
"""Packed, with one of the two meanings of weight_scale; or weights to quantise."""


def _products(c: ModelConfig) -> dict[str, dict[str, tuple[int, int]]]:
    """The matrices that make up each of our four products, from top to bottom, with their shapes [M, K]."""
    h, q, kv, ffn = c.hidden_size, c.q_rows, c.kv_rows, c.intermediate_size
    return {
        "qkv": {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)},
        "out": {"self_attn.o_proj": (h, q)},
        "up": {"mlp.gate_proj": (ffn, h), "mlp.up_proj": (ffn, h)},
        "down": {"mlp.down_proj": (h, ffn)},
    }


def _norms(c: ModelConfig) -> dict[str, tuple[str, int]]:
    """Name and size of each of a layer's norms, by the names that `LayerWeights` has for them."""
    norms = {
        "attn_norm": ("input_layernorm.weight", c.hidden_size),
        "ffn_norm": ("post_attention_layernorm.weight", c.hidden_size),
    }
    if c.sub_norms:
        norms["attn_sub_norm"] = ("self_attn.attn_sub_norm.weight", c.q_rows)
        norms["ffn_sub_norm"] = ("mlp.ffn_sub_norm.weight", c.intermediate_size)
    return norms


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Checkpoint:
    """Read a folder, one safetensors file with config.json beside it, or the index of a sharded checkpoint.

    config.json and the headers are checked here; values when a layer, the embedding or the head is read. Embedding and
    head keep the file's dtype and are views of the mapped file.

    Raises:
        CheckpointError: no such checkpoint, one that this decoder cannot run, or a damaged one; names the file, and
            the tensor where there is one.
    """
    path = Path(path)
    weights = find_weights(path) if path.is_dir() else path
    if weights is None:
        raise CheckpointError(f"{path}: no safetensors file in this folder")
    config_path = weights.parent / "config.json"
    config, body = _read_config(config_path)
    files = _open_shards(weights) if weights.suffix == ".json" else _open_file(weights)
    _check_headers(weights, files, config, body)

    def floats(name: str) -> np.ndarray:
        values = files[name].tensor(name)
        if (at := not_finite(values)) is not None:
            raise files[name].error(f"tensor {name} holds a value that is not finite, {values[at]} at {list(at)}")
        return values

    def vector(name: str) -> np.ndarray:
        return floats(name).astype(np.float32)

    def ternary(module: str) -> TernaryWeight:
        name = f"{module}.weight"
        file = files[name]
        if body == "float":
            try:
                weight = TernaryWeight.from_float(file.tensor(name))
            except ArgumentValueError as e:
                raise file.error(f"tensor {name}: {e}") from e
        else:
            scale_name = f"{module}.weight_scale"
            weight = _unpack(file, name, _scale(files[scale_name], scale_name, body))
        if why := why_untrained(weight):
            raise file.error(f"tensor {name}: {why}")
        return weight

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}"
        fields: dict[str, Any] = {field: vector(f"{prefix}.{name}") for field, (name, _) in _norms(config).items()}
        for product, modules in _products(config).items():
            parts = [ternary(f"{prefix}.{module}") for module in modules]
            fields[product] = parts[0] if len(parts) == 1 else concatenate(parts)
        return LayerWeights(**fields)

    def embedding() -> Rows:
        values = floats(_EMBEDDING)
        # transformers 4 ties them all the same, 5 does not: there is no right guess.
        if config.tied_head and _HEAD in files and not _same(values, files[_HEAD].tensor(_HEAD)):
            raise files[_HEAD].error(
                f"tensor {_HEAD} differs from {_EMBEDDING}, but {config_path} ties them (tie_word_embeddings)"
            )
        return Rows(values)

    return Checkpoint(
        config=config,
        layers=Layers(config.num_layers, layer),
        final_norm=vector(_FINAL_NORM),
        source=config.name,
        read_embedding=embedding,
        read_head=embedding if config.tied_head else lambda: Rows(floats(_HEAD)),
    )


def find_weights(folder: Path) -> Path | None:
    """What holds the weights of a folder: model.safetensors, else the index of its shards, else its one safetensors
    file; None without any.

    Raises:
        CheckpointError: several files and no index.
    """
    for name in ("model.safetensors", _INDEX):
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    if len(found) > 1:
        raise CheckpointError(f"{folder}: {len(found)} safetensors files, {found[0].name} and others, but no {_INDEX}")
    return found[0] if found else None


def _open_file(path: Path) -> dict[str, SafetensorsFile]:
    file = SafetensorsFile(path)
    return dict.fromkeys(file.entries, file)


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    """The file that holds each tensor, by the tensor's name."""
    places = _json_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: weight_map is missing, or not an object of tensors and files")
    shards: dict[str, SafetensorsFile] = {}
    for name, place in places.items():
        # A shard stands beside its index; what may be a path elsewhere is not even opened.
        if (
            not isinstance(place, str)
            or place in ("", ".", "..")
            or not place.isprintable()
            or set(place) & set("/\\:")
        ):
            raise CheckpointError(f"{index}: tensor {shown(name)} is in {place!r:.80}, expected a file in this folder")
        if place not in shards:
            if not (index.parent / place).is_file():
                raise CheckpointError(f"{index}: the shard {shown(place)} is missing")
            shards[place] = SafetensorsFile(index.parent / place)
        if name not in shards[place].entries:
            raise shards[place].error(f"tensor {shown(name)} is missing, but {index.name} says that it is here")
    for place, shard in shards.items():
        for name in shard.entries:
            if places.get(name) != place:
                raise shard.error(f"tensor {shown(name)} is here, but {index.name} does not say so")
    return {name: shards[place] for name, place in places.items()}


def _check_headers(weights: Path, files: dict[str, SafetensorsFile], c: ModelConfig, body: Body) -> None:
    """Every tensor is there, of the right dtype and shape, and no other one."""
    known = set()

    def expect(name: str, shape: tuple[int, ...] | None, *dtypes: Any) -> tuple[int, ...]:
        if name not in files:
            raise CheckpointError(f"{weights}: tensor {name} is missing")
        known.add(name)
        return files[name].expect(name, shape, *dtypes).shape

    expect(_EMBEDDING, (c.vocab_size, c.hidden_size), *_FLOATS)
    expect(_FINAL_NORM, (c.hidden_size,), *_FLOATS)
    if not c.tied_head or _HEAD in files:
        expect(_HEAD, (c.vocab_size, c.hidden_size), *_FLOATS)
    # Ends at the first missing tensor, however many layers a damaged config promises.
    for i in range(c.num_layers):
        prefix = f"model.layers.{i}"
        for name, size in _norms(c).values():
            expect(f"{prefix}.{name}", (size,), *_FLOATS)
        for modules in _products(c).values():
            for module, (m, k) in modules.items():
                name = f"{prefix}.{module}.weight"
                if body == "float":
                    expect(name, (m, k), *_FLOATS)
                    continue
                if m % 4:
                    raise CheckpointError(f"{weights}: tensor {name}: {m} rows cannot be packed by four")
                expect(name, (m // 4, k), np.uint8)
                shape = expect(f"{name}_scale", None, *_FLOATS)
                if math.prod(shape) != 1:
                    raise files[name].error(f"tensor {name}_scale has shape {list(shape)}, expected one element")
        # What older writers saved of the rotary embedding follows from config.json, so nothing is lost with it.
        known.add(f"{prefix}.self_attn.rotary_emb.inv_freq")
    if unknown := files.keys() - known:
        name = min(unknown)
        raise files[name].error(f"tensor {shown(name)}: this decoder has no place for it")


def _scale(file: SafetensorsFile, name: str, body: Body) -> float:
    """What the codes are multiplied by."""
    stored = file.tensor(name).astype(np.float32).reshape(())
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.float32(1) / stored if body == "divide" else stored
    if not (np.isfinite(stored) and np.isfinite(scale) and stored != 0):
        raise file.error(f"tensor {name} is {stored}, expected a finite number that is not 0")
    return float(scale)


def _unpack(file: SafetensorsFile, name: str, scale: float) -> TernaryWeight:
    stored = file.tensor(name)
    quarter, k = stored.shape
    parts = []
    for i in range(4):
        codes = (stored >> 2 * i) & 3
        if (bad := codes == 3).any():
            row, column = divmod(int(bad.argmax()), k)
            raise file.error(
                f"tensor {name}: byte [{row}, {column}] holds the code 3 for weight [{row + i * quarter}, {column}], "
                "expected 0, 1 or 2"
            )
        parts.append(packing.pack(codes.view(np.int8) - np.int8(1), np))
    return TernaryWeight(np.concatenate(parts), np.full(1, scale, np.float32), (4 * quarter, k))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables hold the same bits, some rows at a time."""
    if a.dtype != b.dtype:
        return False
    return all(a[i : i + 1024].tobytes() == b[i : i + 1024].tobytes() for i in range(0, len(a), 1024))


# ---- config.json ----------------------------------------------------------------------------------------------------


class _Values:
    """A JSON object whose fields are asked for by type; null counts as absent."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self._prefix = path, values, prefix

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A field of type bool, int, float, str, list or dict. It is required when there is no default."""
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise self.error(f"{self._prefix}{key} is missing")
            return default
        if kind is float and type(value) in (int, float):
            # An integer may be too large for a float; JSON in Python knows infinity and NaN.
            if not -1e300 < value < 1e300:
                raise self.error(f"{self._prefix}{key} is {value!r:.80}, expected a finite number")
            return float(value)
        if type(value) is not kind:
            raise self.error(f"{self._prefix}{key} is {value!r:.80}, expected {kind.__name__}")
        return value

    def object(self, key: str) -> _Values:
        return _Values(self.path, self.get(key, dict, {}), f"{self._prefix}{key}.")

    def require(self, key: str, expected: Any, why: str) -> None:
        """Refuse any value of a field but `expected`, which is also its default."""
        if (value := self.get(key, type(expected), expected)) != expected:
            raise self.error(f"{self._prefix}{key} is {value!r:.80}, expected {expected!r}: {why}")

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not a readable JSON file: {getattr(e, 'strerror', None) or e}") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return values


# By what config.json calls them: whether they have sub-norms, and what their configurations leave out.
_ARCHITECTURES: dict[str, tuple[bool, dict[str, Any]]] = {
    "LlamaForCausalLM": (False, {"hidden_act": "silu", "rope_theta": 1e4, "rms_norm_eps": 1e-6}),
    "BitNetForCausalLM": (True, {"hidden_act": "relu2", "rope_theta": 5e5, "rms_norm_eps": 1e-5}),
}
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "bitnet": "BitNetForCausalLM"}


def _read_config(path: Path) -> tuple[ModelConfig, Body]:
    config = _Values(path, _json_object(path))
    sub_norms, defaults = _ARCHITECTURES[_architecture(config)]
    config.require("attention_bias", False, "biases are not supported")
    config.require("mlp_bias", False, "biases are not supported")
    activation = config.get("hidden_act", str, defaults["hidden_act"])
    if activation not in FFN_ACTIVATIONS:
        raise config.error(f"hidden_act is {activation!r:.80}, expected one of {', '.join(FFN_ACTIVATIONS)}")

    hidden, heads = config.get("hidden_size", int), config.get("num_attention_heads", int)
    if config.values.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise config.error(f"hidden_size is {hidden}, expected a multiple of num_attention_heads = {heads}")
    head_dim = config.get("head_dim", int, hidden // max(1, heads))
    max_context = config.get("max_position_embeddings", int, 2048)
    theta, scaling = _rotary(config, head_dim, max_context, defaults["rope_theta"])
    try:
        model = ModelConfig(
            name=_model_name(path.parent),
            num_layers=config.get("num_hidden_layers", int),
            hidden_size=hidden,
            intermediate_size=config.get("intermediate_size", int),
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads", int, heads),
            head_dim=head_dim,
            vocab_size=config.get("vocab_size", int),
            rope_theta=theta,
            rms_eps=config.get("rms_norm_eps", float, defaults["rms_norm_eps"]),
            max_context=max_context,
            ffn_activation=activation,
            sub_norms=sub_norms,
            tied_head=config.get("tie_word_embeddings", bool, False),
            rope_scaling=scaling,
        )
    except ArgumentValueError as e:
        raise config.error(str(e)) from e
    return model, _body(config)


def _architecture(config: _Values) -> str:
    """The first of `architectures`; files without that list have a `model_type`."""
    listed = config.get("architectures", list, [])
    name = listed[0] if listed else _MODEL_TYPES.get(kind := config.get("model_type", str), kind)
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise config.error(f"the architecture is {name!r:.80}, but only {' and '.join(_ARCHITECTURES)} are supported")
    return name


def _model_name(folder: Path) -> str:
    """The folder's name, or the repository's in the cache of the Hub: models--ORGANISATION--NAME/snapshots/COMMIT."""
    folder = Path(os.path.abspath(folder))
    repository = folder.parents[1].name if folder.parent.name == "snapshots" else ""
    return repository.split("--")[-1] or folder.name or "model"


def _body(config: _Values) -> Body:
    if config.values.get("quantization_config") is None:
        return "float"
    quantisation = config.object("quantization_config")
    quantisation.require("quant_method", "bitnet", "no other quantisation is supported")
    if "quant_method" not in quantisation.values:
        raise config.error("quantization_config.quant_method is missing")
    quantisation.require("use_rms_norm", False, "an RMSNorm inside each product is not supported")
    kept = quantisation.get("modules_to_not_convert", list, [])
    # Without the head's: in every architecture that is read here the head is not ternary anyway.
    if others := [m for m in kept if m not in ("lm_head", "lm_head.weight", "model.embed_tokens", "embed_tokens")]:
        raise config.error(
            f"quantization_config.modules_to_not_convert lists {others[0]!r:.80}, but every product must be ternary"
        )
    linear = quantisation.get("linear_class", str, "bitlinear")
    mode = quantisation.get("quantization_mode", str, "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise config.error(
            f"quantization_config has linear_class {linear!r:.80} and quantization_mode {mode!r:.80}, "
            "expected bitlinear or autobitlinear, and offline or online"
        )
    if linear == "bitlinear":
        return "divide"
    return "multiply" if mode == "offline" else "float"


# Fields of RopeScaling that Hugging Face has under the same names, and what it has under another.
_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)
_ROPE_LISTS = ("short_factor", "long_factor")
_ROPE_CONTEXT = "original_max_position_embeddings"
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
    "longrope": _ROPE_LISTS,
}
_ROPE_OTHERS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned", "truncate", _ROPE_CONTEXT}


def _rotary(config: _Values, head_dim: int, max_context: int, default: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling: from `rope_theta` and `rope_scaling`, or from the `rope_parameters` of transformers 5."""
    config.require("partial_rotary_factor", 1.0, "the whole of a head must turn")
    rope = config.object("rope_scaling" if config.values.get("rope_scaling") else "rope_parameters")
    rope.require("partial_rotary_factor", 1.0, "the whole of a head must turn")
    theta = rope.get("rope_theta", float, config.get("rope_theta", float, default))
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind not in ("default", *KINDS):
        raise rope.error(f"the rotary embedding is scaled by {kind!r:.80}, expected default, {', '.join(KINDS)}")
    if unknown := rope.values.keys() - _ROPE_OTHERS - {*_ROPE_NUMBERS, *_ROPE_LISTS}:
        raise rope.error(f"the rotary embedding has the field {shown(min(unknown))}, which is not supported")
    if kind == "default":
        return theta, None

    fields: dict[str, Any] = {name: rope.get(name, float) for name in _ROPE_REQUIRED[kind] if name in _ROPE_NUMBERS}
    fields |= {name: rope.get(name, float) for name in _ROPE_NUMBERS if rope.values.get(name) is not None}
    fields["truncate"] = rope.get("truncate", bool, True)
    if kind == "longrope":
        for name in _ROPE_LISTS:
            factors = rope.get(name, list)
            if len(factors) != head_dim // 2 or any(type(n) not in (int, float) or not 0 < n < 1e300 for n in factors):
                raise rope.error(
                    f"{name} of the rotary embedding: expected head_dim / 2 = {head_dim // 2} numbers above 0"
                )
            fields[name] = tuple(map(float, factors))
    if kind != "linear":
        # Beside the scaling it counts more than inside; "dynamic" measures lengths by the model's own context.
        inside = rope.get(_ROPE_CONTEXT, int, max_context)
        fields["original_context"] = max_context if kind == "dynamic" else config.get(_ROPE_CONTEXT, int, inside)
    try:
        return theta, RopeScaling(kind=kind, **fields)
    except ArgumentValueError as e:
        raise rope.error(str(e)) from e


# ---- writing --------------------------------------------------------------------------------------------------------


def write(checkpoint: Checkpoint, folder: str | Path, files: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write `checkpoint` as a folder of config.json and model.safetensors in the packed layout, one layer at a time.

    Reading it back gives the same codes and the same scales: weight_scale is float32, and multiplies. Norms are
    float32. Embedding and head keep their dtype; int8 rows, which this format does not have, become float32, times
    their scales, because nothing smaller holds them exactly.

    A new folder appears in one step, an empty one is filled when everything is written.

    Args:
        files: what else belongs into the folder, such as a tokenizer's files, by name.

    Raises:
        CheckpointError: the folder is not empty or cannot be written; the format has no place for something: an FFN
            without a gate, rows that four does not divide, different scales in one matrix, a constant matrix; or
            reading `checkpoint` failed.
    """
    folder, config = Path(folder), checkpoint.config
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise CheckpointError(f"{folder}: cannot be written: it exists already and is not an empty folder")
    description = _describe(folder, config)
    whole = Path(os.path.realpath(folder))  # which has a name, even for "."
    partial = whole.with_name(f".{whole.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        weights = "model.safetensors"
        with create(partial / weights, _names(config), {"format": "pt"}, folder / weights) as add:
            description["torch_dtype"] = _write_tensors(folder, checkpoint, add)
        (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for name, data in files.items():
            (partial / name).write_bytes(data)
        if whole.exists():  # and may be where someone stands
            for path in partial.iterdir():
                path.rename(whole / path.name)
        else:
            partial.rename(whole)
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _names(c: ModelConfig) -> Iterator[str]:
    yield from (_EMBEDDING, _FINAL_NORM, _HEAD)
    for i in range(c.num_layers):
        yield from (f"model.layers.{i}.{name}" for name, _ in _norms(c).values())
        for modules in _products(c).values():
            yield from (
                f"model.layers.{i}.{module}.{part}" for module in modules for part in ("weight", "weight_scale")
            )


def _write_tensors(folder: Path, checkpoint: Checkpoint, add: Add) -> str:
    """Returns the dtype of the embedding, by name."""
    config = checkpoint.config
    for i, layer in enumerate(checkpoint.layers):
        prefix = f"model.layers.{i}"
        for field, (name, _) in _norms(config).items():
            add(f"{prefix}.{name}", getattr(layer, field))
        for product, modules in _products(config).items():
            weight: TernaryWeight = getattr(layer, product).to_host()
            scales = np.broadcast_to(weight.scale, weight.shape[:1])
            start = 0
            for module, (m, k) in modules.items():
                rows = slice(start, start + m)
                part, start = TernaryWeight(weight.packed[rows], scales[rows], (m, k)), start + m
                why = why_untrained(part)
                if (part.scale != part.scale[0]).any():
                    why = "its rows have different scales, and the format has one a matrix"
                if why:
                    raise CheckpointError(f"{folder}: cannot be written: {prefix}.{module}: {why}")
                add(f"{prefix}.{module}.weight_scale", part.scale[:1])
                add(f"{prefix}.{module}.weight", _pack(part))
    add(_FINAL_NORM, checkpoint.final_norm)
    embedding = _floats(checkpoint.embedding)
    add(_EMBEDDING, embedding)
    if not config.tied_head:
        add(_HEAD, _floats(checkpoint.head))
    return embedding.dtype.name


def _pack(weight: TernaryWeight) -> np.ndarray:
    """uint8 [M / 4, K] as the top of this file has it."""
    m, k = weight.shape
    packed = np.zeros((m // 4, k), np.uint8)
    for i in range(4):
        t = packing.unpack(weight.packed[i * m // 4 : (i + 1) * m // 4], k, np)
        packed |= (t + 1).view(np.uint8) << 2 * i
    return packed


def _floats(rows: Rows) -> np.ndarray | Pieces:
    if rows.scale is None:
        return rows.values
    parts = (rows.to_float(part) for part in row_blocks(rows.values))
    return Pieces(np.dtype(np.float32), rows.values.shape, parts)


def _describe(folder: Path, c: ModelConfig) -> dict[str, Any]:
    """config.json, in the terms of transformers 4, which 5 reads too."""
    if not c.gated:
        raise CheckpointError(
            f"{folder}: cannot be written: no Hugging Face architecture that we know has an FFN without a gate"
        )
    for modules in _products(c).values():
        for module, (m, _) in modules.items():
            if m % 4:
                raise CheckpointError(f"{folder}: cannot be written: {module}: {m} rows cannot be packed by four")
    architecture = next(name for name, (sub_norms, _) in _ARCHITECTURES.items() if sub_norms == c.sub_norms)
    return {
        "architectures": [architecture],
        "model_type": next(kind for kind, name in _MODEL_TYPES.items() if name == architecture),
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "hidden_act": c.ffn_activation,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": float(c.rms_eps),
        "rope_theta": float(c.rope_theta),
        "rope_scaling": None if c.rope_scaling is None else _describe_rotary(folder, c.rope_scaling, c.max_context),
        "tie_word_embeddings": c.tied_head,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
            "modules_to_not_convert": ["lm_head"],
        },
    }


def _describe_rotary(folder: Path, scaling: RopeScaling, max_context: int) -> dict[str, Any]:
    if scaling.kind == "dynamic" and scaling.original_context != max_context:
        raise CheckpointError(
            f"{folder}: cannot be written: dynamic rotary scaling from {scaling.original_context} tokens in a model of "
            f"{max_context}; the format has one number for both"
        )
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": float(scaling.factor)}
    if scaling.kind in ("yarn", "longrope", "llama3"):
        values[_ROPE_CONTEXT] = scaling.original_context
    if scaling.kind == "llama3":
        values |= {name: float(getattr(scaling, name)) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":
        values |= {name: float(getattr(scaling, name)) for name in ("beta_fast", "beta_slow")}
        values["truncate"] = scaling.truncate
    if scaling.kind == "longrope":
        values |= {name: list(getattr(scaling, name)) for name in _ROPE_LISTS}
    # 0 stands for a formula of the variant's own.
    for name in ("mscale", "mscale_all_dim", "attention_factor"):
        if getattr(scaling, name):
            values[name] = float(getattr(scaling, name))
    return values
