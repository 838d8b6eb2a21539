"""Reads GGUF files of architecture ``llama``: the container and its quantised types through the `gguf` package.

Every matrix is dequantised to float32, one at a time. :func:`read` quantises them to ternary with absmean;
:func:`read_float` hands them out as they are, by the names that Hugging Face gives them.

The one thing that GGUF changes is the order of the rows of query and key. A Llama file rotates adjacent pairs of a
head's features, (0, 1), (2, 3), ...; Hugging Face and our decoder rotate the first half against the second,
(0, d/2), (1, d/2 + 1), ... :func:`_halves_from_pairs` undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentValueError, CheckpointError, MissingDependencyError
from .checkpoint import Checkpoint, Layers, LayerWeights, Rows
from .config import ModelConfig
from .ternary import TernaryWeight, concatenate


def read(path: str | Path) -> Checkpoint:
    """Read a GGUF file and quantise its products to ternary, each matrix with its own absmean scale.

    The embedding, which is also the head, becomes int8 with a scale a row. Beside the result no more than one matrix
    is held in float32.

    Raises:
        CheckpointError: not a complete GGUF file of a Llama with a tied head; names the file and the tensor.
        MissingDependencyError: the package `gguf` is not installed.
    """
    model = _LlamaFile(Path(path))

    def ternary(*names: str) -> TernaryWeight:
        parts = [TernaryWeight.from_float(model.tensor(name)) for name in names]
        return parts[0] if len(parts) == 1 else concatenate(parts)

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            attn_norm=model.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=ternary(*(f"{attention}.{part}_proj.weight" for part in "qkv")),
            out=ternary(f"{attention}.o_proj.weight"),
            ffn_norm=model.tensor(f"{prefix}.post_attention_layernorm.weight"),
            up=ternary(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            down=ternary(f"{mlp}.down_proj.weight"),
        )

    def embedding() -> Rows:
        return Rows.from_float(model.tensor("model.embed_tokens.weight"), "int8")

    return Checkpoint(
        config=model.config,
        layers=Layers(model.config.num_layers, layer),
        final_norm=model.tensor("model.norm.weight"),
        source=model.path.name,
        read_embedding=embedding,
        read_head=embedding,
    )


def read_float(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of such a file without quantising them: (name, float32 array), one at a time.

    Names are Hugging Face's, such as ``model.layers.0.self_attn.q_proj.weight``; matrices are [M, K], the rows of
    query and key in Hugging Face's order.

    Raises:
        CheckpointError, MissingDependencyError: as :func:`read`.
    """
    model = _LlamaFile(Path(path))
    for name, _, _ in _layout(model.config):
        yield name, model.tensor(name)


def _layout(c: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of a Llama: its name at Hugging Face, its name in GGUF, its shape."""
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
    yield "model.norm.weight", "output_norm.weight", (hidden,)


def _halves_from_pairs(w: np.ndarray, num_heads: int) -> np.ndarray:
    """[heads * head_dim, K]: the rows of each head, stored for pairs, in the order 0, 2, 4, ..., then 1, 3, 5, ..."""
    rows, k = w.shape
    return w.reshape(num_heads, rows // num_heads // 2, 2, k).swapaxes(1, 2).reshape(rows, k)


class _LlamaFile:
    """An open GGUF file whose header describes a whole Llama: every tensor is there, in the right shape.

    Attributes:
        path, config: the file, and the sizes that its header gives.
    """

    def __init__(self, path: Path):
        self.path = path
        reader = _open(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._read_config()
        self._stored: dict[str, str] = {}
        # Ends at the first missing tensor, however many layers a damaged header promises.
        for name, stored, expected in _layout(self.config):
            if (shape := self._shape(stored)) != expected:
                raise self._error(f"tensor {stored} has shape {shape}, but the header's sizes need {expected}")
            self._stored[name] = stored
        self._check_head()
        # Biases, experts or rotary factors, left out in silence, would make another model.
        if unknown := sorted(self._tensors.keys() - self._stored.values() - {"output.weight"}):
            raise self._error(f"tensor {unknown[0]}: this decoder has no place for it")

    def tensor(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, as float32 of its own: finite, not all zero."""
        from gguf.quants import dequantize

        stored = self._stored[name]
        data, kind = self._tensors[stored].data, self._tensors[stored].tensor_type
        try:
            # Damaged block scales overflow or are NaN; the result is checked below. A copy, because an F32 tensor
            # would be a view that keeps the file mapped.
            with np.errstate(all="ignore"):
                values = np.array(dequantize(data, kind), dtype=np.float32)
        except Exception as e:  # whatever the package raises for a type that it cannot dequantise
            raise self._error(f"tensor {stored} of type {kind.name}: {e}") from e
        finite = np.isfinite(values)
        if not finite.all():
            at = tuple(int(i) for i in np.unravel_index(int(finite.argmin()), values.shape))
            raise self._error(f"tensor {stored}: element {list(at)} is {values[at]}, expected a finite number")
        if not values.any():
            raise self._error(f"tensor {stored} is all zero, which no trained model is")
        if name.endswith(".q_proj.weight"):
            return _halves_from_pairs(values, self.config.num_heads)
        if name.endswith(".k_proj.weight"):
            return _halves_from_pairs(values, self.config.num_kv_heads)
        return values

    # ---- the header -------------------------------------------------------------------------------------------------

    def _read_config(self) -> ModelConfig:
        architecture = self._metadata("general.architecture", str)
        if architecture != "llama":
            raise self._error(f"architecture is {architecture!r}, but only 'llama' is supported")
        self._check_rotary_scaling()
        hidden = self._metadata("llama.embedding_length", int)
        heads = self._metadata("llama.attention.head_count", int)
        if heads < 1:
            raise self._error(f"llama.attention.head_count is {heads}, expected at least 1")
        head_dim = self._metadata("llama.attention.key_length", int, hidden // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if (size := self._metadata(key, int, head_dim)) != head_dim:
                raise self._error(f"{key} is {size}, expected the head dimension, {head_dim}")
        try:
            return ModelConfig(
                name=self.path.stem,
                num_layers=self._metadata("llama.block_count", int),
                hidden_size=hidden,
                intermediate_size=self._metadata("llama.feed_forward_length", int),
                num_heads=heads,
                num_kv_heads=self._metadata("llama.attention.head_count_kv", int, heads),
                head_dim=head_dim,
                vocab_size=self._shape("token_embd.weight")[0],
                rope_theta=self._metadata("llama.rope.freq_base", float, 1e4),
                rms_eps=self._metadata("llama.attention.layer_norm_rms_epsilon", float),
                max_context=self._metadata("llama.context_length", int),
            )
        except ArgumentValueError as e:
            raise self._error(str(e)) from e

    def _check_rotary_scaling(self) -> None:
        # A factor without a type means linear scaling, and 0 no factor.
        factors = [self._metadata(f"llama.rope.{key}", float, 0.0) for key in ("scaling.factor", "scale_linear")]
        linear = any(factor not in (0, 1) for factor in factors)
        kind = self._metadata("llama.rope.scaling.type", str, "linear" if linear else "none")
        if kind != "none":
            raise self._error(f"the rotary embedding is scaled ({kind}), which is not supported yet")

    def _check_head(self) -> None:
        head, embedding = self._tensors.get("output.weight"), self._tensors["token_embd.weight"]
        if head is not None and not (
            head.tensor_type == embedding.tensor_type
            and np.array_equal(head.data.view(np.uint8), embedding.data.view(np.uint8))
        ):
            raise self._error("tensor output.weight is not token_embd.weight: separate heads are not supported yet")

    def _metadata(self, key: str, kind: type, default: Any = None) -> Any:
        """A header field of type `kind`; it is required when there is no default."""
        field = self._fields.get(key)
        if field is None and default is not None:
            return default
        if field is None:
            raise self._error(f"the header field {key} is missing")
        try:
            value = field.contents()
        except Exception as e:  # a damaged field: not UTF-8, an empty array, ...
            raise self._error(f"the header field {key} cannot be read: {e}") from e
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._error(f"the header field {key} is {value!r:.80}, expected {kind.__name__}")
        if isinstance(value, float):
            with np.errstate(over="ignore"):
                value = float(str(np.float32(value)))  # the shortest decimal: 1e-05, not 9.999999747378752e-06
            if not math.isfinite(value):
                raise self._error(f"the header field {key} is {value}, expected a finite number")
        return value

    def _shape(self, stored: str) -> tuple[int, ...]:
        """Of a tensor by its GGUF name, rows first (GGUF writes the fastest dimension first)."""
        if stored not in self._tensors:
            raise self._error(f"tensor {stored} is missing")
        return tuple(int(n) for n in reversed(self._tensors[stored].shape))

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")


def _open(path: Path) -> Any:
    """A `gguf.GGUFReader` of a file that is as long as its header says."""
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise MissingDependencyError(
            f"reading {path} needs the package gguf: pip install 'edgellm-cupy[models]' ({e})"
        ) from e

    class Reader(GGUFReader):
        """Refuses to read past the end of the file.

        The package's own reader returns what there is instead, and then believes a damaged length: it would walk an
        array of 2**60 elements that are not there.
        """

        data: Any
        _tensor = ""  # the one being read, for the message

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            self.data = np.asarray(self.data)  # still the mapped file, without the slow slicing of np.memmap
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > self.data.size:
                what = f"in tensor {self._tensor}" if self._tensor else "in the header"
                raise ValueError(f"truncated or damaged {what}: {end} bytes are needed, {self.data.size} are there")
            return super()._get(int(offset), dtype, count, override_order)

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            def noted() -> Iterator[Any]:
                for field in fields:
                    self._tensor = field.name
                    yield field

            super()._build_tensors(start_offs, noted())

    try:
        reader = Reader(path)
    except Exception as e:  # a damaged header makes the package raise anything, from KeyError to RecursionError
        raise CheckpointError(f"{path}: not a readable GGUF file: {str(e) or type(e).__name__}") from e
    if reader.byte_order != "I":
        raise CheckpointError(f"{path}: the file has the other byte order, which is not supported")
    return reader
