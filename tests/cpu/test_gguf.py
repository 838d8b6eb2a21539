"""GGUF files: what is read of them, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig, TernaryWeight
from edgellm_cupy.formats import gguf, load_checkpoint
from edgellm_cupy.formats.checkpoint import Rows

gguf_package = pytest.importorskip("gguf", reason="the extra `models` is not installed")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")

from tests.checkpoints import TINY, fuzz, written

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
    embedding = Rows.from_float(floats["model.embed_tokens.weight"], "int8")
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
    first = gguf_package.GGUFReader(written(tmp_path / "whole.gguf", gguf_bytes)).tensors[0]
    kept = {
        "magic": 6,
        "header": 150,
        "tensor list": first.field.offset + 10,
        "first tensor": first.data_offset + 5,
        "last byte": len(gguf_bytes) - 1 - _padding(gguf_bytes),
    }[part]
    path = written(tmp_path / "short.gguf", gguf_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.gguf: not a readable GGUF file: truncated or damaged") as e:
        load_checkpoint(path)
    tensor = {"first tensor": "in tensor token_embd.weight", "last byte": "in tensor output_norm.weight"}
    assert tensor.get(part, "in the header") in str(e.value)


def _padding(data: bytes) -> int:
    """Bytes behind the last tensor, whose last float32 is not zero."""
    return len(data) - len(data.rstrip(b"\0"))


def test_gguf_with_a_length_that_is_not_there(tmp_path, gguf_bytes):
    """The package's own reader would walk this array for years."""
    key = b"tokenizer.ggml.scores"
    at = gguf_bytes.index(key) + len(key) + 4 + 4  # behind the field's type and the elements' type
    assert gguf_bytes[at : at + 8] == (3).to_bytes(8, "little")
    path = written(tmp_path / "damaged.gguf", gguf_bytes[:at] + (2**60).to_bytes(8, "little") + gguf_bytes[at + 8 :])
    with pytest.raises(CheckpointError, match="damaged in the header"):
        gguf.read(path)


def test_gguf_fuzzed(tmp_path, gguf_bytes):
    tensors = gguf_package.GGUFReader(written(tmp_path / "whole.gguf", gguf_bytes)).tensors
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the package multiplies damaged dimensions
        fuzz(tmp_path / "fuzzed.gguf", gguf_bytes, gguf.read, header=tensors[0].data_offset)
