"""Checkpoint files: our compact safetensors, GGUF of architecture llama, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import CheckpointError, MissingDependencyError, ModelConfig, TernaryWeight
from edgellm_cupy.formats import compact, gguf, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint, Int8Rows

gguf_package = pytest.importorskip("gguf", reason="the extra `models` is not installed")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")

# Every size differs from every other, so that a mixed-up shape cannot pass. All are multiples of 32, Q8_0's block.
TINY = ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=40,
    rope_theta=5e4,
    rms_eps=1e-5,
    max_context=512,
)
PRODUCTS = ("qkv", "out", "up", "down")


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.config == b.config
    assert a.source == b.source
    np.testing.assert_array_equal(a.embedding.values, b.embedding.values)
    np.testing.assert_array_equal(a.embedding.scale, b.embedding.scale)
    np.testing.assert_array_equal(a.final_norm, b.final_norm)
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        np.testing.assert_array_equal(x.attn_norm, y.attn_norm)
        np.testing.assert_array_equal(x.ffn_norm, y.ffn_norm)
        for name in PRODUCTS:
            v, w = getattr(x, name), getattr(y, name)
            assert v.shape == w.shape
            np.testing.assert_array_equal(v.packed, w.packed)
            np.testing.assert_array_equal(v.scale, w.scale)


# ---- compact safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, gated=False, num_kv_heads=4, hidden_size=72, intermediate_size=65, vocab_size=3),
        dataclasses.replace(TINY, name='größer ≥ 1 "x"', rope_theta=1e5 / 3, rms_eps=0.0, num_layers=1),
    ],
)
def test_compact_round_trip(tmp_path, config):
    checkpoint = Checkpoint.random(config, seed=3)
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    assert_same(compact.read(path), checkpoint)
    assert_same(load_checkpoint(str(path)), checkpoint)


def test_compact_is_two_bits_a_weight(tmp_path):
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, num_heads=16, num_kv_heads=4)
    checkpoint = Checkpoint.random(config)
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    weights = sum(m * k for m, k in config.products().values()) * config.num_layers
    embedding = config.vocab_size * config.hidden_size
    assert path.stat().st_size < 1.02 * (weights / 4 + embedding) + 10_000


def test_compact_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    first, second = Checkpoint.random(TINY, 1), Checkpoint.random(TINY, 2)
    compact.write(first, path)
    compact.write(second, path)
    assert_same(compact.read(path), second)

    def disk_full(self, data):
        with self.open("wb") as f:
            f.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be written: .*No space left"):
        compact.write(first, path)
    monkeypatch.undo()
    assert_same(compact.read(path), second)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_compact_into_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.model.safetensors: cannot be written"):
        compact.write(Checkpoint.random(TINY), tmp_path / "nowhere" / "model.safetensors")


@pytest.fixture(scope="module")
def compact_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("compact") / "model.safetensors"
    compact.write(Checkpoint.random(TINY), path)
    return path.read_bytes()


def rewrite(data: bytes, path: Path, edit) -> None:
    """Write the file `data` to `path` after `edit(tensors, metadata)` changed the two dictionaries."""
    path.write_bytes(data)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata())  # noqa: SIM118
    edit(tensors, metadata)
    path.write_bytes(safetensors_numpy.save(tensors, metadata or None))


def _set(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def _poke(name, index, value):
    return lambda tensors, metadata: tensors[name].__setitem__(index, value)


def _metadata(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t.pop("layers.1.up.packed"), "tensor layers.1.up.packed is missing"),
        (lambda t, m: t.pop("embedding.scale"), "tensor embedding.scale is missing"),
        (_poke("layers.1.down.packed", (3, 0, 5), 0xFF), "tensor layers.1.down: packed row 3, byte 5 holds the code 3"),
        (_poke("layers.0.qkv.scale", 0, np.nan), "tensor layers.0.qkv.scale holds a value that is not finite"),
        (_poke("layers.0.ffn_norm", 7, np.inf), "tensor layers.0.ffn_norm holds a value that is not finite"),
        (_poke("embedding.scale", 7, -np.inf), "tensor embedding.scale holds a value that is not finite"),
        (_set("layers.0.out.packed", np.zeros((3, 1, 16), np.uint8)), "tensor layers.0.out: packed.shape is"),
        (_set("layers.0.out.packed", np.zeros((64, 1, 16), np.int8)), "tensor layers.0.out.packed is int8 [64, 1, 16]"),
        (_set("layers.0.out.scale", np.ones(3, np.float32)), "tensor layers.0.out: scale.shape is (3,)"),
        (_set("final_norm", np.ones(3, np.float32)), "tensor final_norm is float32 [3]"),
        (_set("final_norm", np.ones(64)), "tensor final_norm is float64 [64]"),
        (_set("embedding.values", np.zeros((40, 63), np.int8)), "tensor embedding.values is int8 [40, 63]"),
        (_set("layers.2.bias", np.ones(3)), "tensor layers.2.bias: the configuration has no place for it"),
        (_metadata("format", "edgellm-ternary-v9"), "its format is 'edgellm-ternary-v9', but this version reads"),
        (_metadata("format", "pt"), "not one that edgellm wrote (its metadata gives the format 'pt'"),
        (lambda t, m: m.clear(), "not one that edgellm wrote (its metadata gives no format"),
        (lambda t, m: m.pop("config"), "its metadata holds no model configuration"),
        (_metadata("config", "{"), "its metadata holds no model configuration"),
        (_metadata("config", "[]"), "expected a JSON object"),
        (_metadata("config", '{"name": "x"}'), "the model field 'num_layers' is missing"),
    ],
)
def test_compact_refuses(tmp_path, compact_bytes, edit, message):
    path = tmp_path / "damaged.safetensors"
    rewrite(compact_bytes, path, edit)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_compact_with_a_dtype_that_numpy_lacks(tmp_path, compact_bytes):
    end = 8 + int.from_bytes(compact_bytes[:8], "little")
    header = json.loads(compact_bytes[8:end])
    header["embedding.values"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path = _written(tmp_path / "damaged.safetensors", len(text).to_bytes(8, "little") + text + compact_bytes[end:])
    with pytest.raises(CheckpointError, match=r"damaged.safetensors: tensor embedding.values"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [9, 100, 2000, -1])
def test_compact_truncated(tmp_path, compact_bytes, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(compact_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


def test_compact_fuzzed(tmp_path, compact_bytes):
    fuzz(tmp_path / "fuzzed.safetensors", compact_bytes, compact.read, header=3500)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def pairs_from_halves(w: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key, row by row: (0, d/2), (1, d/2 + 1), ... become neighbours."""
    d = w.shape[0] // heads
    order = [head * d + half * (d // 2) + i for head in range(heads) for i in range(d // 2) for half in (0, 1)]
    return w[order]


def tiny_floats(config: ModelConfig = TINY) -> dict[str, np.ndarray]:
    """Dense float32 weights by their Hugging Face names, in Hugging Face's order of rows."""
    c, rng = config, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (c.vocab_size, c.hidden_size)}
    for i in range(c.num_layers):
        shapes |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "input_layernorm": (c.hidden_size,),
                "self_attn.q_proj": (c.num_heads * c.head_dim, c.hidden_size),
                "self_attn.k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
                "self_attn.v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
                "self_attn.o_proj": (c.hidden_size, c.num_heads * c.head_dim),
                "post_attention_layernorm": (c.hidden_size,),
                "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
                "mlp.up_proj": (c.intermediate_size, c.hidden_size),
                "mlp.down_proj": (c.hidden_size, c.intermediate_size),
            }.items()
        }
    shapes["model.norm"] = (c.hidden_size,)
    return {f"{name}.weight": rng.standard_normal(s, dtype=np.float32) for name, s in shapes.items()}


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}
TYPES = {
    "F32": gguf_package.GGMLQuantizationType.F32,
    "F16": gguf_package.GGMLQuantizationType.F16,
    "BF16": gguf_package.GGMLQuantizationType.BF16,
    "Q8_0": gguf_package.GGMLQuantizationType.Q8_0,
    "Q4_1": gguf_package.GGMLQuantizationType.Q4_1,
}
METADATA = {
    "llama.block_count": TINY.num_layers,
    "llama.embedding_length": TINY.hidden_size,
    "llama.feed_forward_length": TINY.intermediate_size,
    "llama.attention.head_count": TINY.num_heads,
    "llama.attention.head_count_kv": TINY.num_kv_heads,
    "llama.rope.dimension_count": TINY.head_dim,
    "llama.context_length": TINY.max_context,
    "llama.rope.freq_base": TINY.rope_theta,
    "llama.attention.layer_norm_rms_epsilon": TINY.rms_eps,
}


def stored_name(name: str) -> str:
    """``model.layers.1.self_attn.q_proj.weight`` -> ``blk.1.attn_q.weight``."""
    base = name.removesuffix(".weight")
    if base in GGUF_NAMES:
        return f"{GGUF_NAMES[base]}.weight"
    _, _, layer, rest = base.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def stored_tensors(floats: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By GGUF names, query and key in GGUF's order of rows."""
    heads = {"q_proj": TINY.num_heads, "k_proj": TINY.num_kv_heads}
    return {
        stored_name(name): pairs_from_halves(w, heads[part]) if (part := name.split(".")[-2]) in heads else w
        for name, w in floats.items()
    }


def write_gguf(path: Path, tensors, kind="F32", metadata=None, architecture="llama") -> dict[str, np.ndarray]:
    """Write a GGUF file; matrices have type `kind`, norms F32. Returns the values as they come back from that type."""
    writer = gguf_package.GGUFWriter(path, architecture)
    for key, value in {**METADATA, **(metadata or {})}.items():
        if value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "def"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.0, -2.0])
    held = {}
    for name, tensor in tensors.items():
        t = TYPES["F32" if tensor.ndim == 1 else kind]
        data = gguf_package.quants.quantize(tensor, t)
        writer.add_tensor(name, data, raw_dtype=t)
        held[name] = np.asarray(gguf_package.quants.dequantize(data, t), np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), "Q8_0")
    return path.read_bytes()


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_floats_come_back(tmp_path, kind):
    floats, path = tiny_floats(), tmp_path / "tiny.gguf"
    write_gguf(path, stored_tensors(floats), kind)
    got = dict(gguf.read_float(path))
    assert set(got) == set(floats)
    step = {"F32": 0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 127, "Q4_1": 1 / 15}[kind]
    for name, expected in floats.items():
        assert got[name].dtype == np.float32
        largest = 0 if expected.ndim == 1 else step * np.abs(expected).max()
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=largest, err_msg=name)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_gguf_read_is_absmean_of_the_floats(tmp_path, kind):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), kind)
    floats = dict(gguf.read_float(path))
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == TINY
    assert checkpoint.source == "tiny.gguf"
    embedding = Int8Rows.from_float(floats["model.embed_tokens.weight"])
    np.testing.assert_array_equal(checkpoint.embedding.values, embedding.values)
    np.testing.assert_array_equal(checkpoint.embedding.scale, embedding.scale)
    np.testing.assert_array_equal(checkpoint.final_norm, floats["model.norm.weight"])
    parts = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    for i, layer in enumerate(checkpoint.layers):
        np.testing.assert_array_equal(layer.attn_norm, floats[f"model.layers.{i}.input_layernorm.weight"])
        np.testing.assert_array_equal(layer.ffn_norm, floats[f"model.layers.{i}.post_attention_layernorm.weight"])
        for (product, names), shape in zip(parts.items(), TINY.products().values(), strict=True):
            expected = [TernaryWeight.from_float(floats[f"model.layers.{i}.{name}.weight"]) for name in names]
            weight = getattr(layer, product)
            assert weight.shape == shape
            np.testing.assert_array_equal(weight.to_int8(), np.concatenate([w.to_int8() for w in expected]))
            scales = np.concatenate([np.full(w.shape[0], w.scale[0]) for w in expected])
            np.testing.assert_array_equal(np.broadcast_to(weight.scale, scales.shape), scales)


def test_gguf_defaults_of_the_header(tmp_path):
    """Without them: every head has its own keys and values, theta 1e4, rotation of the whole head."""
    config = dataclasses.replace(TINY, num_kv_heads=4, rope_theta=1e4)
    floats = tiny_floats(config)
    tensors = {
        stored_name(n): pairs_from_halves(w, 4) if "q_proj" in n or "k_proj" in n else w for n, w in floats.items()
    }
    path = tmp_path / "tiny.gguf"
    absent = ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count")
    write_gguf(path, tensors, metadata=dict.fromkeys(absent))
    assert gguf.read(path).config == config
    assert all(np.array_equal(got, floats[name]) for name, got in gguf.read_float(path))


def test_gguf_head(tmp_path):
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats())
    write_gguf(path, {**tensors, "output.weight": tensors["token_embd.weight"]})
    assert gguf.read(path).config == TINY
    write_gguf(path, {**tensors, "output.weight": tensors["token_embd.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tensor output.weight is not token_embd.weight: separate heads"):
        gguf.read(path)


def test_gguf_keeps_nothing_of_the_file(tmp_path, gguf_bytes):
    """The file may go away, or be overwritten, after reading."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes)
    checkpoint = gguf.read(path)
    before = checkpoint.final_norm.copy()
    with path.open("r+b") as f:
        f.write(bytes(len(gguf_bytes)))
    np.testing.assert_array_equal(checkpoint.final_norm, before)


def _without(name):
    return lambda tensors, metadata: tensors.pop(name)


def _replaced(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def _nan(tensors, metadata):
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_without("blk.1.attn_k.weight"), "tensor blk.1.attn_k.weight is missing"),
        (_without("token_embd.weight"), "tensor token_embd.weight is missing"),
        (_without("output_norm.weight"), "tensor output_norm.weight is missing"),
        (
            _replaced("blk.0.attn_v.weight", np.ones((33, 64), np.float32)),
            "tensor blk.0.attn_v.weight has shape (33, 64), but the header's sizes need (32, 64)",
        ),
        (_replaced("blk.0.ffn_norm.weight", np.ones((64, 1), np.float32)), "blk.0.ffn_norm.weight has shape (64, 1)"),
        (_replaced("blk.0.attn_q.bias", np.ones(64, np.float32)), "tensor blk.0.attn_q.bias: this decoder has"),
        (_replaced("rope_freqs.weight", np.ones(8, np.float32)), "tensor rope_freqs.weight: this decoder has no place"),
        (_nan, "tensor blk.1.ffn_up.weight: element [3, 5] is nan, expected a finite number"),
        (_replaced("blk.1.ffn_down.weight", np.zeros((64, 96), np.float32)), "blk.1.ffn_down.weight is all zero"),
        (_replaced("blk.1.ffn_norm.weight", np.full(64, np.inf, np.float32)), "blk.1.ffn_norm.weight: element [0]"),
        (_metadata("llama.rope.dimension_count", 8), "dimension_count is 8, expected the head dimension, 16"),
        (_metadata("llama.attention.value_length", 8), "value_length is 8, expected the head dimension, 16"),
        (_metadata("llama.rope.scaling.type", "yarn"), "the rotary embedding is scaled (yarn)"),
        (_metadata("llama.rope.scaling.factor", 4.0), "the rotary embedding is scaled (linear)"),
        (_metadata("llama.block_count", None), "the header field llama.block_count is missing"),
        (_metadata("llama.block_count", 3), "tensor blk.2.attn_norm.weight is missing"),
        (_metadata("llama.block_count", 2**32 - 1), "tensor blk.2.attn_norm.weight is missing"),
        (_metadata("llama.block_count", 1), "tensor blk.1.attn_k.weight: this decoder has no place for it"),
        (_metadata("llama.block_count", "two"), "the header field llama.block_count is 'two', expected int"),
        (_metadata("llama.attention.head_count", 0), "llama.attention.head_count is 0, expected at least 1"),
        (_metadata("llama.attention.head_count_kv", [2, 2]), "llama.attention.head_count_kv is [2, 2], expected int"),
        (_metadata("llama.attention.head_count_kv", 3), "num_kv_heads is 3, expected a divisor of num_heads = 4"),
        (_metadata("llama.attention.layer_norm_rms_epsilon", -1.0), "rms_eps is -1.0"),
        (_metadata("llama.rope.freq_base", float("nan")), "llama.rope.freq_base is nan, expected a finite number"),
        (_metadata("llama.rope.freq_base", 10000), "the header field llama.rope.freq_base is 10000, expected float"),
    ],
)
def test_gguf_refuses(tmp_path, edit, message):
    path, tensors, metadata = tmp_path / "damaged.gguf", stored_tensors(tiny_floats()), {}
    edit(tensors, metadata)
    write_gguf(path, tensors, metadata=metadata)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_gguf_rope_scaling_none_is_taken(tmp_path):
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats())
    unscaled = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    for metadata in (unscaled, {"llama.rope.scale_linear": 1.0}):
        write_gguf(path, tensors, metadata=metadata)
        assert gguf.read(path).config == TINY


def test_gguf_of_another_architecture(tmp_path):
    path = tmp_path / "other.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"other.gguf: architecture is 'qwen2', but only 'llama' is supported"):
        gguf.read(path)


@pytest.mark.parametrize("part", ["magic", "header", "tensor list", "first tensor", "last byte"])
def test_gguf_truncated(tmp_path, gguf_bytes, part):
    first = gguf_package.GGUFReader(_written(tmp_path / "whole.gguf", gguf_bytes)).tensors[0]
    kept = {
        "magic": 6,
        "header": 150,
        "tensor list": first.field.offset + 10,
        "first tensor": first.data_offset + 5,
        "last byte": len(gguf_bytes) - 1 - _padding(gguf_bytes),
    }[part]
    path = _written(tmp_path / "short.gguf", gguf_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.gguf: not a readable GGUF file: truncated or damaged") as e:
        load_checkpoint(path)
    tensor = {"first tensor": "in tensor token_embd.weight", "last byte": "in tensor output_norm.weight"}
    assert tensor.get(part, "in the header") in str(e.value)


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _padding(data: bytes) -> int:
    """Bytes behind the last tensor, whose last float32 is not zero."""
    return len(data) - len(data.rstrip(b"\0"))


def test_gguf_with_a_length_that_is_not_there(tmp_path, gguf_bytes):
    """The package's own reader would walk this array for years."""
    key = b"tokenizer.ggml.scores"
    at = gguf_bytes.index(key) + len(key) + 4 + 4  # behind the field's type and the elements' type
    assert gguf_bytes[at : at + 8] == (3).to_bytes(8, "little")
    path = _written(tmp_path / "damaged.gguf", gguf_bytes[:at] + (2**60).to_bytes(8, "little") + gguf_bytes[at + 8 :])
    with pytest.raises(CheckpointError, match="damaged in the header"):
        gguf.read(path)


def fuzz(path: Path, data: bytes, read, header: int, runs: int = 400) -> None:
    """Change one to four bytes of the header, or cut the file: it is read, or refused with our own error, soon."""
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(runs):
        damaged = bytearray(data)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        if rng.random() < 0.1:
            damaged = damaged[: rng.integers(9, len(data))]
        path.write_bytes(damaged)
        start, refusal = time.perf_counter(), None
        try:
            read(path)
        except CheckpointError as e:
            refusal = str(e)
        outcomes["read" if refusal is None else "refused"] += 1
        assert refusal is None or refusal.startswith(f"{path}: ")
        assert time.perf_counter() - start < 5
    assert min(outcomes.values()) > 10, f"the mutations test one outcome only: {outcomes}"


def test_gguf_fuzzed(tmp_path, gguf_bytes):
    tensors = gguf_package.GGUFReader(_written(tmp_path / "whole.gguf", gguf_bytes)).tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the package multiplies damaged dimensions
        fuzz(tmp_path / "fuzzed.gguf", gguf_bytes, gguf.read, header=tensors[0].data_offset)


# ---- whatever file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither GGUF nor safetensors"),
        (b"GG", "neither GGUF nor safetensors"),
        (b"PK\x03\x04 some other file", "neither GGUF nor safetensors"),
        (b"GGUF", "not a readable GGUF file"),
        (b"GGUF" + bytes(range(256)), "not a readable GGUF file"),
        (b"\x10\0\0\0\0\0\0\0{not JSON at all", "not a readable safetensors file"),
    ],
)
def test_garbage(tmp_path, content, message):
    path = _written(tmp_path / "garbage", content)
    with pytest.raises(CheckpointError, match=f"garbage: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("read", [load_checkpoint, gguf.read, compact.read, lambda p: list(gguf.read_float(p))])
def test_no_file(tmp_path, read):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing", "empty", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}: n"):  # "not a readable ...", "neither ..."
            read(tmp_path / name)


@pytest.mark.parametrize(("module", "read"), [("gguf", gguf.read), ("safetensors", compact.read)])
def test_without_the_package(tmp_path, monkeypatch, module, read):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"package {module}: pip install 'edgellm-cupy\[models\]'"):
        read(tmp_path / "model")
