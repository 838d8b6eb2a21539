"""Reads GGUF files of the architectures ``llama`` and BitNet, quantised to ternary already or not.

:func:`read` makes a checkpoint of ternary products, :func:`read_float` hands all tensors out as floats, by the names
that Hugging Face gives them.

**What becomes of a matrix.** Of a product, whatever the file can say exactly stays as it is:

- A ternary type (TQ1_0, TQ2_0, Q2_0, I2_S) keeps its codes. Its block scales become one scale where they are all
  equal, one a row where those of each row are. A block without weights other than zero agrees with every scale.
- A type of floats, or one that stands for them, is taken as it is where all its weights other than zero have one
  magnitude: a ternary model stored as floats. Absmean would scale it by the share of weights that are not zero.
- Everything else, also a ternary type with different scales in a row, is quantised with absmean.

Embedding and head stay what they are when they are float16, bfloat16 or float32, and are int8 otherwise. An output
head that repeats the embedding byte by byte is a tied one.

**The order of the rows of query and key.** A file of architecture ``llama`` rotates adjacent pairs of a head's
features, (0, 1), (2, 3), ...; Hugging Face and our decoder rotate the first half against the second, (0, d/2),
(1, d/2 + 1), ... :func:`halves_from_pairs` undoes it. BitNet files rotate halves, and need nothing.

**BitNet files.** ``bitnet-b1.58`` and ``bitnet-25`` (bitnet.cpp) are 2B4T: sub-norms and a squared ReLU. ``bitnet``
(llama.cpp) has sub-norms too; it was made for the 1bitLLM reproductions, whose FFN has SiLU, and its converter now
takes 2B4T as well without noting the activation. So the sizes decide: those of 2B4T mean a squared ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentValueError, CheckpointError
from . import packing
from .checkpoint import Checkpoint, Layers, LayerWeights, Rows
from .checks import why_untrained
from .config import PRESETS, ModelConfig
from .gguf_file import GgufFile, GgufTensor
from .gguf_types import I2_S, dequantize, ternary_rows
from .rotary import RopeScaling
from .ternary import TernaryWeight, concatenate, row_blocks

_PIECE = 1 << 20
"""Elements of an embedding or head that are converted at once."""


def read(path: str | Path) -> Checkpoint:
    """Read the header of a GGUF file, all of it checked. Layers, embedding and head are read when they are asked for.

    Raises:
        CheckpointError: not a complete GGUF file of a model that this decoder runs; names the file and the tensor.
            Reading a layer, the embedding or the head may raise it too.
        MissingDependencyError: the package `gguf` is not installed, and a tensor has one of its types.
    """
    model = _ModelFile(Path(path))

    def layer(i: int) -> LayerWeights:
        block = f"blk.{i}"
        sub = model.config.sub_norms
        return LayerWeights(
            attn_norm=model.floats(f"{block}.attn_norm.weight"),
            qkv=concatenate([model.product(f"{block}.attn_{part}") for part in "qkv"]),
            out=model.product(f"{block}.attn_output"),
            ffn_norm=model.floats(f"{block}.ffn_norm.weight"),
            up=concatenate([model.product(f"{block}.ffn_{part}") for part in ("gate", "up")]),
            down=model.product(f"{block}.ffn_down"),
            attn_sub_norm=model.floats(f"{block}.attn_sub_norm.weight") if sub else None,
            ffn_sub_norm=model.floats(f"{block}.ffn_sub_norm.weight") if sub else None,
        )

    def rows(name: str) -> Callable[[], Rows]:
        return lambda: model.rows(name)

    return Checkpoint(
        config=model.config,
        layers=Layers(model.config.num_layers, layer),
        final_norm=model.floats("output_norm.weight"),
        source=model.path.name,
        read_embedding=rows("token_embd.weight"),
        read_head=rows("token_embd.weight" if model.config.tied_head else "output.weight"),
    )


def read_float(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of such a file without quantising them: (name, float32 array), one at a time.

    Names are Hugging Face's, such as ``model.layers.0.self_attn.q_proj.weight``; matrices are [M, K], the rows of
    query and key in Hugging Face's order. There is no ``lm_head.weight`` when the head is tied.

    Raises:
        CheckpointError, MissingDependencyError: as :func:`read`.
    """
    model = _ModelFile(Path(path))
    for name, stored, _ in _layout(model.config):
        yield name, model.floats(stored)


def read_metadata(path: str | Path, prefix: str = "") -> dict[str, Any]:
    """The header fields whose keys begin with `prefix`, such as ``"tokenizer."``, by their whole keys.

    Numbers are Python's, strings str, arrays of strings lists, and arrays of numbers NumPy arrays.

    Raises:
        CheckpointError, MissingDependencyError: as :func:`read`.
    """
    return {key: value for key, value in GgufFile(path).fields.items() if key.startswith(prefix)}


def _layout(c: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor that such a model must have: its name at Hugging Face, its name in GGUF, its shape."""
    hidden, ffn = c.hidden_size, c.intermediate_size
    yield "model.embed_tokens.weight", "token_embd.weight", (c.vocab_size, hidden)
    for i in range(c.num_layers):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        yield f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", f"{block}.attn_q.weight", (c.q_rows, hidden)
        yield f"{layer}.self_attn.k_proj.weight", f"{block}.attn_k.weight", (c.kv_rows, hidden)
        yield f"{layer}.self_attn.v_proj.weight", f"{block}.attn_v.weight", (c.kv_rows, hidden)
        yield f"{layer}.self_attn.o_proj.weight", f"{block}.attn_output.weight", (hidden, c.q_rows)
        yield f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", f"{block}.ffn_gate.weight", (ffn, hidden)
        yield f"{layer}.mlp.up_proj.weight", f"{block}.ffn_up.weight", (ffn, hidden)
        yield f"{layer}.mlp.down_proj.weight", f"{block}.ffn_down.weight", (hidden, ffn)
        if c.sub_norms:
            yield f"{layer}.self_attn.attn_sub_norm.weight", f"{block}.attn_sub_norm.weight", (c.q_rows,)
            yield f"{layer}.mlp.ffn_sub_norm.weight", f"{block}.ffn_sub_norm.weight", (ffn,)
    yield "model.norm.weight", "output_norm.weight", (hidden,)
    if not c.tied_head:
        yield "lm_head.weight", "output.weight", (c.vocab_size, hidden)


def halves_from_pairs(w: np.ndarray, num_heads: int) -> np.ndarray:
    """[heads * head_dim, K]: the rows of each head, stored for pairs, in the order 0, 2, 4, ..., then 1, 3, 5, ..."""
    rows, k = w.shape
    return w.reshape(num_heads, rows // num_heads // 2, 2, k).swapaxes(1, 2).reshape(rows, k)


def _from_floats(w: np.ndarray) -> TernaryWeight:
    """Exactly `w` where it has one magnitude beside zero, else quantised with absmean."""
    largest = max(float(w.max()), -float(w.min()))

    def has_one_magnitude(rows: np.ndarray) -> bool:
        magnitude = np.abs(rows)
        return bool(((magnitude == 0) | (magnitude == largest)).all())

    if not all(has_one_magnitude(w[rows]) for rows in row_blocks(w)):
        return TernaryWeight.from_float(w)
    packed = [packing.pack(np.sign(w[rows]).astype(np.int8), np) for rows in row_blocks(w)]
    return TernaryWeight.from_packed(np.concatenate(packed), largest, w.shape)


def _row_scales(codes: np.ndarray, d: np.ndarray) -> np.ndarray | None:
    """The scales of ternary blocks as float32 [1] or [M]; None where a row has different ones.

    Args:
        codes: int8 [M, K].
        d: float16 [M, blocks of a row], or float32 [1, 1] for the whole matrix.
    """
    if d.size == 1:
        return d.reshape(1).astype(np.float32)
    used = np.asarray(codes.reshape((*d.shape, -1)).any(axis=2))
    low, high = np.where(used, d, np.inf).min(axis=1), np.where(used, d, -np.inf).max(axis=1)
    rows = used.any(axis=1)
    if (low[rows] != high[rows]).any():
        return None
    scales = np.where(rows, high, high[rows][:1]).astype(np.float32)  # a row of zeros agrees with every scale
    return scales[rows][:1] if (scales[rows] == scales[rows][:1]).all() else scales


@dataclass(frozen=True)
class _Architecture:
    """What a value of general.architecture says, beside the sizes."""

    pairs: bool  # whether query and key are stored for rotation of adjacent pairs
    sub_norms: bool
    activation: str


_ARCHITECTURES = {
    "llama": _Architecture(pairs=True, sub_norms=False, activation="silu"),
    "bitnet": _Architecture(pairs=False, sub_norms=True, activation="silu"),  # or 2B4T: _read_config
    "bitnet-25": _Architecture(pairs=False, sub_norms=True, activation="relu2"),
    "bitnet-b1.58": _Architecture(pairs=False, sub_norms=True, activation="relu2"),
}


class _ModelFile:
    """A GGUF file whose header describes a whole model: every tensor is there, in the right shape.

    Attributes:
        path, config: the file, and the sizes that its header gives.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = GgufFile(path)
        self._tensors = self._file.tensors
        name = self._metadata("general.architecture", str)
        if name not in _ARCHITECTURES:
            raise self._error(f"architecture is {name!r}, expected one of {', '.join(_ARCHITECTURES)}")
        self._name, self._architecture = name, _ARCHITECTURES[name]
        self.config = self._read_config()
        self._check_tensors()
        self._file.fields.clear()  # a vocabulary is large, and nobody here needs it any more

    # ---- tensors, by their GGUF names -------------------------------------------------------------------------------

    def floats(self, name: str) -> np.ndarray:
        """Any tensor as float32 of its own: finite, not all zero; query and key in Hugging Face's order of rows."""
        tensor = self._tensors[name]
        values = self._decode(tensor, self._file.bytes_of(tensor)).reshape(tensor.shape)
        with np.errstate(over="ignore"):  # refused below, by name
            values *= self._product_scale(name.removesuffix(".weight"))
        return self._in_halves(tensor, self._require_sound(tensor, values))

    def product(self, name: str) -> TernaryWeight:
        """The ternary matrix `name`.weight, times `name`.scale."""
        tensor = self._tensors[f"{name}.weight"]
        weight = self._ternary(name, tensor)
        if why := why_untrained(weight):
            raise self._error(f"tensor {tensor.name}: {why}")
        return weight

    def _ternary(self, name: str, tensor: GgufTensor) -> TernaryWeight:
        if not tensor.type.is_ternary:
            return _from_floats(self.floats(tensor.name))
        codes, d = self._codes(tensor, self._file.bytes_of(tensor))
        self._require_some(tensor, codes)
        scales = _row_scales(codes, d)
        if scales is None:
            return _from_floats(self.floats(tensor.name))
        with np.errstate(over="ignore"):
            scales = scales * self._product_scale(name)
        self._require_sound(tensor, scales)
        if scales.size > 1:
            scales = self._in_halves(tensor, scales[:, None])[:, 0]
        return TernaryWeight.from_int8(self._in_halves(tensor, codes), scales)

    def rows(self, name: str) -> Rows:
        """An embedding or a head: the file's own memory where it holds floats, else int8, a few rows at a time."""
        tensor = self._tensors[name]
        data, (v, h) = self._file.bytes_of(tensor), tensor.shape
        at_once = v if tensor.type is I2_S else max(1, _PIECE // h)
        as_stored = tensor.type.dtype is not None
        values, scale = np.empty((0 if as_stored else v, h), np.int8), np.empty(0 if as_stored else v, np.float32)
        some = False
        for start in range(0, v, at_once):
            stop = min(v, start + at_once)
            stored = data[start * tensor.nbytes // v : stop * tensor.nbytes // v]
            piece = self._require_finite(tensor, self._decode(tensor, stored, start).reshape(-1, h), start)
            some = some or bool(piece.any())
            if not as_stored:
                converted = Rows.from_float(piece, "int8")
                values[start:stop], scale[start:stop] = converted.values, converted.scale
        self._require_some(tensor, np.bool_(some))
        return Rows(data.view(tensor.type.dtype).reshape(v, h)) if as_stored else Rows(values, scale)

    def _decode(self, tensor: GgufTensor, data: np.ndarray, first_row: int = 0) -> np.ndarray:
        """The stored bytes of whole rows, from `first_row` on, as float32 of its own, flat."""
        if tensor.type.is_ternary:
            codes, d = self._codes(tensor, data, first_row)
            return (codes.reshape((*d.shape, -1)) * d.astype(np.float32)[:, :, None]).ravel()
        if tensor.type.dtype:
            return data.view(tensor.type.dtype).astype(np.float32)
        try:
            return dequantize(tensor.type, data, tensor.shape[-1], self.path).ravel()
        except Exception as e:  # whatever the package raises for a type that it cannot dequantise
            raise self._error(f"tensor {tensor.name} of type {tensor.type.name}: {e}") from e

    def _codes(self, tensor: GgufTensor, data: np.ndarray, first_row: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """:func:`ternary_rows`, with finite scales. What a block scaled by zero holds is zero."""
        codes, d = ternary_rows(tensor.type, data, tensor.shape[-1])
        if codes.max() > 1:
            row, column = divmod(int((codes > 1).argmax()), codes.shape[1])
            raise self._error(
                f"tensor {tensor.name}: the code of element [{first_row + row}, {column}] is no ternary weight "
                f"in {tensor.type.name}"
            )
        if not np.isfinite(d).all():
            row, block = divmod(int(np.isfinite(d).argmin()), d.shape[1])
            raise self._error(
                f"tensor {tensor.name}: the scale of row {first_row + row}, block {block} is {d[row, block]}, "
                "expected a finite number"
            )
        if not d.all():
            codes = (codes.reshape((*d.shape, -1)) * (d != 0)[:, :, None]).reshape(codes.shape)
        return codes, d

    def _product_scale(self, name: str) -> np.float32:
        """What the product's output is multiplied by: a tensor of one element, in some ternary files."""
        tensor = self._tensors.get(f"{name}.scale")
        if tensor is None:
            return np.float32(1)
        return np.float32(self._require_sound(tensor, self._decode(tensor, self._file.bytes_of(tensor)))[0])

    def _in_halves(self, tensor: GgufTensor, values: np.ndarray) -> np.ndarray:
        """The rows of query and key in the order that rotates halves; anything else as it is."""
        part = tensor.name.rpartition(".attn_")[2]
        heads = {"q.weight": self.config.num_heads, "k.weight": self.config.num_kv_heads}.get(part)
        return halves_from_pairs(values, heads) if heads and self._architecture.pairs else values

    def _require_sound(self, tensor: GgufTensor, values: np.ndarray) -> np.ndarray:
        self._require_some(tensor, values)
        return self._require_finite(tensor, values)

    def _require_finite(self, tensor: GgufTensor, values: np.ndarray, first_row: int = 0) -> np.ndarray:
        finite = np.isfinite(values)
        if not finite.all():
            at = [int(i) for i in np.unravel_index(int(finite.argmin()), values.shape)]
            value = values[tuple(at)]
            at[0] += first_row
            raise self._error(f"tensor {tensor.name}: element {at} is {value}, expected a finite number")
        return values

    def _require_some(self, tensor: GgufTensor, values: Any) -> None:
        if not values.any():
            raise self._error(f"tensor {tensor.name} is all zero, which no trained model is")

    # ---- the header -------------------------------------------------------------------------------------------------

    def _read_config(self) -> ModelConfig:
        arch = self._name
        hidden = self._metadata(f"{arch}.embedding_length", int)
        ffn = self._metadata(f"{arch}.feed_forward_length", int)
        heads = self._metadata(f"{arch}.attention.head_count", int)
        if heads < 1:
            raise self._error(f"{arch}.attention.head_count is {heads}, expected at least 1")
        head_dim = self._metadata(f"{arch}.attention.key_length", int, hidden // heads)
        for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
            if (size := self._metadata(key, int, head_dim)) != head_dim:
                raise self._error(f"{key} is {size}, expected the head dimension, {head_dim}")
        preset = PRESETS["bitnet-2b4t"]
        is_2b4t = self._architecture.sub_norms and (hidden, ffn) == (preset.hidden_size, preset.intermediate_size)
        context = self._metadata(f"{arch}.context_length", int)
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self._error("tensor token_embd.weight is missing, or is no matrix")
        try:
            return ModelConfig(
                name=self.path.stem,
                num_layers=self._metadata(f"{arch}.block_count", int),
                hidden_size=hidden,
                intermediate_size=ffn,
                num_heads=heads,
                num_kv_heads=self._metadata(f"{arch}.attention.head_count_kv", int, heads),
                head_dim=head_dim,
                vocab_size=embedding.shape[0],
                rope_theta=self._metadata(f"{arch}.rope.freq_base", float, 1e4),
                rms_eps=self._metadata(f"{arch}.attention.layer_norm_rms_epsilon", float),
                max_context=context,
                ffn_activation="relu2" if is_2b4t else self._architecture.activation,
                sub_norms=self._architecture.sub_norms,
                tied_head=self._is_tied(),
                rope_scaling=self._read_rope_scaling(head_dim, context),
            )
        except ArgumentValueError as e:
            raise self._error(str(e)) from e

    def _read_rope_scaling(self, head_dim: int, context: int) -> RopeScaling | None:
        """What stretches the rotary embedding, by Hugging Face's meaning of the same words.

        Three things differ from there. A type that is missing is linear, and its factor 1 or 0 stands for none. The
        attention factor of yarn is one on top of yarn's own formula, and that of longrope is 1 when it is missing. And
        a tensor rope_freqs.weight divides the frequencies (Llama 3.1 has it): that is longrope with short factors
        equal to the long ones.
        """
        prefix = f"{self._name}.rope.scaling"
        kind = self._metadata(f"{prefix}.type", str, "linear")
        factor = self._metadata(f"{prefix}.factor", float, 0.0) or 1.0
        if kind == "linear" and factor == 1:
            factor = self._metadata(f"{self._name}.rope.scale_linear", float, 0.0) or 1.0  # its name in old files
        original = self._metadata(f"{prefix}.original_context_length", int, context)
        attention = self._metadata(f"{prefix}.attn_factor", float, 1.0)
        for key, expected in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
            if (value := self._metadata(f"{prefix}.{key}", float, expected)) != expected:
                raise self._error(f"{prefix}.{key} is {value}, which is not supported")
        if attention != 1 and kind not in ("yarn", "longrope"):
            raise self._error(f"{prefix}.attn_factor is {attention}, which is not supported without yarn or longrope")
        divisors = self._rope_factors("rope_freqs", head_dim)
        if divisors is not None:
            if kind not in ("none", "linear"):
                raise self._error(f"tensor rope_freqs.weight in a file whose {prefix}.type is {kind}: not supported")
            scaled = tuple(x * (factor if kind == "linear" else 1.0) for x in divisors)
            return RopeScaling("longrope", 1.0, context, attention_factor=1.0, short_factor=scaled, long_factor=scaled)
        if kind == "none" or (kind in ("linear", "yarn") and factor == attention == 1):
            return None
        if kind == "linear":
            return RopeScaling("linear", factor)
        if kind == "yarn" and factor != 1:
            return RopeScaling(
                "yarn",
                factor,
                original,
                beta_fast=self._metadata(f"{prefix}.yarn_beta_fast", float, 32.0),
                beta_slow=self._metadata(f"{prefix}.yarn_beta_slow", float, 1.0),
                attention_factor=0.0 if attention == 1 else attention * (1 + 0.1 * math.log(max(factor, 1.0))),
            )
        if kind == "longrope":
            short, long = (self._rope_factors(f"rope_factors_{which}", head_dim) for which in ("short", "long"))
            if short is None or long is None:
                raise self._error("the rotary embedding is longrope, but tensor rope_factors_short or _long is missing")
            return RopeScaling(
                "longrope",
                context / max(original, 1),
                original,
                attention_factor=attention,
                short_factor=short,
                long_factor=long,
            )
        raise self._error(
            f"the rotary embedding is scaled ({kind:.80}, factor {factor}), expected none, linear, yarn or longrope"
        )

    def _rope_factors(self, name: str, head_dim: int) -> tuple[float, ...] | None:
        """The tensor `name`.weight, one factor above 0 a frequency; None where there is none."""
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None:
            return None
        if tensor.shape != (head_dim // 2,) or tensor.type.name != "F32":
            raise self._error(
                f"tensor {tensor.name} is {tensor.type.name} {list(tensor.shape)}, expected F32 [{head_dim // 2}]"
            )
        values = self._require_finite(tensor, self._decode(tensor, self._file.bytes_of(tensor)))
        if not (values > 0).all():
            raise self._error(f"tensor {tensor.name}: expected factors above 0")
        return tuple(float(x) for x in values)

    def _is_tied(self) -> bool:
        """Whether there is no head beside the embedding, or one that repeats it."""
        head, embedding = self._tensors.get("output.weight"), self._tensors["token_embd.weight"]
        if head is None:
            return True
        if (head.type, head.shape) != (embedding.type, embedding.shape):
            return False
        a, b = self._file.bytes_of(head), self._file.bytes_of(embedding)
        return all(np.array_equal(a[i : i + _PIECE], b[i : i + _PIECE]) for i in range(0, len(a), _PIECE))

    def _check_tensors(self) -> None:
        known = {"output.weight", "rope_freqs.weight"}
        if self.config.rope_scaling is not None and self.config.rope_scaling.kind == "longrope":
            known |= {"rope_factors_short.weight", "rope_factors_long.weight"}
        # Ends at the first missing tensor, however many layers a damaged header promises.
        for _, name, expected in _layout(self.config):
            if name not in self._tensors:
                raise self._error(f"tensor {name} is missing")
            if (shape := self._tensors[name].shape) != expected:
                raise self._error(f"tensor {name} has shape {shape}, but the header's sizes need {expected}")
            known.add(name)
            scale = name.removesuffix("weight") + "scale"
            if len(expected) == 2 and name.startswith("blk.") and scale in self._tensors:
                if (shape := self._tensors[scale].shape) not in ((), (1,)):
                    raise self._error(f"tensor {scale} has shape {shape}, expected one element")
                known.add(scale)
        # Biases, experts or rotary factors, left out in silence, would make another model.
        if unknown := sorted(self._tensors.keys() - known):
            raise self._error(f"tensor {unknown[0]}: this decoder has no place for it")

    def _metadata(self, key: str, kind: type, default: Any = None) -> Any:
        """A header field of type `kind`; it is required when there is no default."""
        value = self._file.fields.get(key, default)
        if value is None:
            raise self._error(f"the header field {key} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._error(f"the header field {key} is {value!r:.80}, expected {kind.__name__}")
        if isinstance(value, float):
            with np.errstate(over="ignore"):
                value = float(str(np.float32(value)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06
            if not math.isfinite(value):
                raise self._error(f"the header field {key} is {value}, expected a finite number")
        return value

    def _error(self, message: str) -> CheckpointError:
        return self._file.error(message)
