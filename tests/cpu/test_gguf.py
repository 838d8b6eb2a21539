"""GGUF files: what is read of them, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig, TernaryWeight
from edgellm_cupy.formats import gguf, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint, Rows
from edgellm_cupy.formats.rotary import RopeScaling
from tests.checkpoints import TINY, fuzz, real_smollm2, written

gguf_package = pytest.importorskip("gguf", reason="the extra `models` is not installed")


def read_all(path: Path) -> Checkpoint:
    """As somebody who runs the model reads it: every layer, the embedding and the head."""
    checkpoint = gguf.read(path)
    assert len(list(checkpoint.layers)) == checkpoint.config.num_layers
    assert checkpoint.embedding.values.shape == checkpoint.head.values.shape
    return checkpoint


# ---- models of floats and of the package's own types ----------------------------------------------------------------


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
    embedding = floats["model.embed_tokens.weight"]
    expected = Rows(embedding.astype(np.float16)) if kind == "F16" else Rows.from_float(embedding, "int8")
    np.testing.assert_array_equal(checkpoint.embedding.values, expected.values)
    np.testing.assert_array_equal(checkpoint.embedding.scale, expected.scale)
    np.testing.assert_array_equal(checkpoint.head.values, expected.values)
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
    embedding = tensors["token_embd.weight"]
    write_gguf(path, {**tensors, "output.weight": embedding})
    assert gguf.read(path).config == TINY
    assert "lm_head.weight" not in dict(gguf.read_float(path))

    write_gguf(path, {**tensors, "output.weight": embedding[::-1].copy()})
    checkpoint = gguf.read(path)
    assert checkpoint.config == dataclasses.replace(TINY, tied_head=False)
    np.testing.assert_array_equal(checkpoint.embedding.values, embedding)
    np.testing.assert_array_equal(checkpoint.head.values, embedding[::-1])
    np.testing.assert_array_equal(dict(gguf.read_float(path))["lm_head.weight"], embedding[::-1])


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_gguf_rows_of_floats_are_the_files_memory(tmp_path, kind, dtype):
    path = tmp_path / "tiny.gguf"
    held = write_gguf(path, stored_tensors(tiny_floats()), kind)
    rows = gguf.read(path).embedding
    assert rows.dtype == dtype
    assert rows.scale is None
    assert not rows.values.flags.writeable
    np.testing.assert_array_equal(rows.to_float(), held["token_embd.weight"])


def test_gguf_int8_rows_in_pieces(tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), "Q8_0")
    whole = gguf.read(path).embedding
    monkeypatch.setattr(gguf, "_PIECE", 7 * TINY.hidden_size)  # 40 rows: five pieces of 7, one of 5
    pieces = gguf.read(path).embedding
    np.testing.assert_array_equal(pieces.values, whole.values)
    np.testing.assert_array_equal(pieces.scale, whole.scale)


@pytest.mark.parametrize(("kind", "tensors_worth"), [("F16", 0.5), ("Q8_0", 2)])
def test_gguf_memory_for_a_large_embedding(tmp_path, monkeypatch, kind, tensors_worth):
    """Rows of floats stay in the file; others need the int8 result and a piece."""
    monkeypatch.setattr(gguf, "_PIECE", 1 << 14)
    config = dataclasses.replace(TINY, vocab_size=40_000)
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats(config))
    write_gguf(path, tensors, kind)
    checkpoint = gguf.read(path)
    size = gguf.GgufFile(path).tensors["token_embd.weight"].nbytes
    tracemalloc.start()
    rows = checkpoint.embedding
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.values.shape == (40_000, TINY.hidden_size)
    assert peak < tensors_worth * size


def test_gguf_layers_are_read_when_they_are_asked_for(tmp_path):
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats())
    tensors["blk.1.ffn_down.weight"][:] = 0
    write_gguf(path, tensors)
    checkpoint = gguf.read(path)
    assert checkpoint.layers[0].down.shape == (TINY.hidden_size, TINY.intermediate_size)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tensor blk.1.ffn_down.weight is all zero"):
        _ = checkpoint.layers[1]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tiny.gguf: tensor blk.0.attn_norm.weight cannot be read any more"):
        _ = checkpoint.layers[0]


def test_gguf_memory_for_a_large_product(tmp_path):
    """The floats of the file, and no further copy of them."""
    config = dataclasses.replace(TINY, intermediate_size=32_768)
    path = tmp_path / "tiny.gguf"
    metadata = {"llama.feed_forward_length": config.intermediate_size}
    write_gguf(path, stored_tensors(tiny_floats(config)), metadata=metadata)
    checkpoint = gguf.read(path)
    size = gguf.GgufFile(path).tensors["blk.0.ffn_down.weight"].nbytes
    tracemalloc.start()
    try:
        _ = checkpoint.layers[0]
        assert tracemalloc.get_traced_memory()[1] < 2 * size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["F32", "F16"])
@pytest.mark.parametrize("value", [0.5, -0.5])
def test_gguf_refuses_a_constant_matrix(tmp_path, kind, value):
    tensors = stored_tensors(tiny_floats())
    tensors["blk.1.ffn_down.weight"][:] = value
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tensors, kind)
    with pytest.raises(CheckpointError, match=rf"blk.1.ffn_down.weight: every weight is {int(2 * value)}, which no"):
        _ = gguf.read(path).layers[1]


def test_gguf_ternary_weights_stored_as_floats_are_taken_as_they_are(tmp_path):
    """Absmean would multiply them by the share that is not zero."""
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats())
    codes = np.random.default_rng(1).integers(-1, 2, (TINY.hidden_size, TINY.intermediate_size))
    tensors["blk.1.ffn_down.weight"] = (codes * 0.75).astype(np.float32)
    write_gguf(path, tensors, "F16")
    down = gguf.read(path).layers[1].down
    np.testing.assert_array_equal(down.to_int8(), codes)
    np.testing.assert_array_equal(down.scale, np.float32([0.75]))


def _without(name):
    return lambda tensors, metadata: tensors.pop(name)


def _replaced(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def _metadata(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


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
        (_replaced("rope_freqs.weight", np.ones(7, np.float32)), "rope_freqs.weight is F32 [7], expected F32 [8]"),
        (_replaced("rope_freqs.weight", np.zeros(8, np.float32)), "rope_freqs.weight: expected factors above 0"),
        (_replaced("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long.weight: this decoder has"),
        (_replaced("blk.0.attn_sub_norm.weight", np.ones(64, np.float32)), "attn_sub_norm.weight: this decoder has no"),
        (_replaced("blk.0.ffn_up.scale", np.ones(2, np.float32)), "blk.0.ffn_up.scale has shape (2,), expected one"),
        (_replaced("blk.0.ffn_up.scale", np.zeros(1, np.float32)), "tensor blk.0.ffn_up.scale is all zero"),
        (_replaced("output.weight", np.ones((41, 64), np.float32)), "tensor output.weight has shape (41, 64)"),
        (_replaced("token_embd.weight", np.ones(64, np.float32)), "tensor token_embd.weight is missing, or is no"),
        (_nan, "tensor blk.1.ffn_up.weight: element [3, 5] is nan, expected a finite number"),
        (_replaced("blk.1.ffn_down.weight", np.zeros((64, 96), np.float32)), "blk.1.ffn_down.weight is all zero"),
        (_replaced("blk.1.ffn_norm.weight", np.full(64, np.inf, np.float32)), "blk.1.ffn_norm.weight: element [0]"),
        (_metadata("llama.rope.dimension_count", 8), "dimension_count is 8, expected the head dimension, 16"),
        (_metadata("llama.attention.value_length", 8), "value_length is 8, expected the head dimension, 16"),
        (_metadata("llama.rope.scaling.type", "cubic"), "the rotary embedding is scaled (cubic, factor 1.0), expected"),
        (_metadata("llama.rope.scaling.type", "longrope"), "longrope, but tensor rope_factors_short or _long is miss"),
        (_metadata("llama.rope.scaling.factor", -4.0), "rope_scaling.factor is -4.0"),
        (_metadata("llama.rope.scaling.attn_factor", 2.0), "attn_factor is 2.0, which is not supported without yarn"),
        (_metadata("llama.rope.scaling.yarn_ext_factor", 0.5), "yarn_ext_factor is 0.5, which is not supported"),
        (_metadata("general.alignment", 24), "general.alignment is 24, expected a power of two"),
        (_metadata("llama.block_count", None), "the header field llama.block_count is missing"),
        (_metadata("llama.block_count", 3), "tensor blk.2.attn_norm.weight is missing"),
        (_metadata("llama.block_count", 2**32 - 1), "tensor blk.2.attn_norm.weight is missing"),
        (_metadata("llama.block_count", 1), "tensor blk.1.attn_k.weight: this decoder has no place for it"),
        (_metadata("llama.block_count", "two"), "the header field llama.block_count is 'two', expected int"),
        (_metadata("llama.attention.head_count", 0), "llama.attention.head_count is 0, expected at least 1"),
        (_metadata("llama.attention.head_count_kv", [2, 2]), "llama.attention.head_count_kv is array([2, 2]"),
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
        read_all(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


SCALING = "llama.rope.scaling"
EIGHT = tuple(float(x) for x in range(1, 9))


@pytest.mark.parametrize(
    ("metadata", "factors", "expected"),
    [
        ({f"{SCALING}.type": "none", f"{SCALING}.factor": 4.0}, {}, None),
        ({f"{SCALING}.type": "linear", f"{SCALING}.factor": 1.0}, {}, None),
        ({"llama.rope.scale_linear": 1.0}, {}, None),
        ({f"{SCALING}.type": "yarn"}, {}, None),
        ({"llama.rope.scale_linear": 2.0}, {}, RopeScaling("linear", 2.0)),
        ({f"{SCALING}.factor": 4.0}, {}, RopeScaling("linear", 4.0)),
        (
            {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0, f"{SCALING}.original_context_length": 128},
            {},
            RopeScaling("yarn", 4.0, 128),
        ),
        (
            {
                f"{SCALING}.type": "yarn",
                f"{SCALING}.factor": 4.0,
                f"{SCALING}.attn_factor": 0.5,
                f"{SCALING}.yarn_beta_fast": 16.0,
                f"{SCALING}.yarn_beta_slow": 2.0,
            },
            {},
            RopeScaling(
                "yarn", 4.0, 512, beta_fast=16.0, beta_slow=2.0, attention_factor=0.5 * (1 + 0.1 * math.log(4))
            ),
        ),
        (
            {f"{SCALING}.type": "longrope", f"{SCALING}.original_context_length": 128},
            {"rope_factors_short": EIGHT, "rope_factors_long": EIGHT[::-1]},
            RopeScaling("longrope", 4.0, 128, attention_factor=1.0, short_factor=EIGHT, long_factor=EIGHT[::-1]),
        ),
        (
            {},
            {"rope_freqs": EIGHT},
            RopeScaling("longrope", 1.0, 512, attention_factor=1.0, short_factor=EIGHT, long_factor=EIGHT),
        ),
        (
            {f"{SCALING}.factor": 2.0},
            {"rope_freqs": EIGHT},
            RopeScaling(
                "longrope",
                1.0,
                512,
                attention_factor=1.0,
                short_factor=tuple(2 * x for x in EIGHT),
                long_factor=tuple(2 * x for x in EIGHT),
            ),
        ),
    ],
)
def test_gguf_rope_scaling(tmp_path, metadata, factors, expected):
    path, tensors = tmp_path / "tiny.gguf", stored_tensors(tiny_floats())
    tensors |= {f"{name}.weight": np.array(values, np.float32) for name, values in factors.items()}
    write_gguf(path, tensors, metadata=metadata)
    assert gguf.read(path).config == dataclasses.replace(TINY, rope_scaling=expected)


def test_gguf_metadata(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), metadata={"tokenizer.ggml.pre": "smollm"})
    got = gguf.read_metadata(path, "tokenizer.")
    scores = got.pop("tokenizer.ggml.scores")
    np.testing.assert_array_equal(scores, np.float32([0, -1, -2]))
    assert got == {"tokenizer.ggml.tokens": ["a", "bc", "def"], "tokenizer.ggml.pre": "smollm"}
    assert gguf.read_metadata(path)["general.architecture"] == "llama"


def test_gguf_of_another_architecture(tmp_path):
    path = tmp_path / "other.gguf"
    write_gguf(path, stored_tensors(tiny_floats()), architecture="qwen2")
    with pytest.raises(CheckpointError, match=r"other.gguf: architecture is 'qwen2', expected one of llama, bitnet"):
        gguf.read(path)


def test_gguf_real_file_gives_the_packages_values():
    path = real_smollm2()
    tensors = {tensor.name: tensor for tensor in gguf_package.GGUFReader(path).tensors}
    checkpoint, floats = gguf.read(path), gguf.read_float(path)
    assert (checkpoint.config.num_layers, checkpoint.config.rope_theta, checkpoint.config.max_context) == (
        30,
        1e5,
        8192,
    )
    compared = 0
    for name, got in floats:
        if name.startswith("model.layers.2"):
            break  # two layers tell; the embedding comes first
        stored = tensors[stored_name(name)]
        expected = gguf_package.quants.dequantize(stored.data, stored.tensor_type)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            got = pairs_from_halves(got, 9 if "q_proj" in name else 3)
        np.testing.assert_array_equal(got, expected, err_msg=name)
        compared += 1
    assert compared == 1 + 2 * 9


# ---- the ternary types ----------------------------------------------------------------------------------------------

# Rows of 256 weights, the longest block; every size another one.
WIDE = dataclasses.replace(TINY, hidden_size=256, num_heads=8, num_kv_heads=4, head_dim=32, intermediate_size=512)
TERNARY = ("TQ1_0", "TQ2_0", "Q2_0", "I2_S")
IDS = {"F32": 0, "F16": 1, "Q8_0": 8, "TQ1_0": 34, "TQ2_0": 35, "I2_S": 36, "Q2_0": 42}
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def pack_q2_0(codes: np.ndarray, d: np.ndarray) -> bytes:
    """Codes 0 to 3 [M, K], scales [M, K / 64]: weight by weight, as formats.md has it."""
    out = b""
    for row, scales in zip(codes.tolist(), d, strict=True):
        for b, scale in enumerate(scales):
            data = bytearray(16)
            for j in range(64):
                data[j // 4] |= row[64 * b + j] << 2 * (j % 4)
            out += np.float16(scale).tobytes() + bytes(data)
    return out


def pack_i2_s(codes: np.ndarray, scale: float) -> bytes:
    q, data = codes.ravel().tolist(), bytearray(codes.size // 4)
    for start in range(0, len(q), 128):
        for m in range(32):
            a, b, c, d = (q[start + m + step] for step in (0, 32, 64, 96))
            data[start // 4 + m] = a << 6 | b << 4 | c << 2 | d
    return bytes(data) + np.float32(scale).tobytes() + bytes(28)


def pack(kind: str, t: np.ndarray, scales: np.ndarray) -> bytes:
    """Ternary t [M, K] with a scale a row: TQ1_0 and TQ2_0 by the package's own quantiser."""
    if kind == "I2_S":
        return pack_i2_s(t + 1, scales[0])
    if kind == "Q2_0":
        return pack_q2_0(t + 1, np.repeat(scales[:, None], t.shape[1] // 64, axis=1))
    w = (t * scales[:, None]).astype(np.float32)
    return gguf_package.quants.quantize(w, getattr(gguf_package.GGMLQuantizationType, kind)).tobytes()


def container(fields: dict, tensors: dict[str, tuple[tuple[int, ...], str, bytes]], version: int = 3) -> bytes:
    """A GGUF file of types that the package cannot write; tensors: name -> (shape, rows first, type, bytes)."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text.encode())) + text.encode()

    def value(x) -> bytes:
        if isinstance(x, str):
            return struct.pack("<I", 8) + string(x)
        return struct.pack("<If", 6, x) if isinstance(x, float) else struct.pack("<II", 4, x)

    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(string(key) + value(x) for key, x in fields.items())
    data = b""
    for name, (shape, kind, content) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], IDS[kind], len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def wide_model(
    kind: str, architecture: str = "bitnet-b1.58", seed: int = 0
) -> tuple[dict, dict[str, tuple[tuple[int, ...], str, bytes]], dict[str, tuple[np.ndarray, float]]]:
    """Header fields and stored tensors of a ternary model, and its ternary matrices, in the order of the file."""
    c, rng = WIDE, np.random.default_rng(seed)
    fields: dict = {"general.architecture": architecture}
    fields |= {
        f"{architecture}.{key}": value
        for key, value in {
            "block_count": c.num_layers,
            "embedding_length": c.hidden_size,
            "feed_forward_length": c.intermediate_size,
            "attention.head_count": c.num_heads,
            "attention.head_count_kv": c.num_kv_heads,
            "context_length": c.max_context,
            "rope.freq_base": c.rope_theta,
            "attention.layer_norm_rms_epsilon": c.rms_eps,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 1.0,
        }.items()
    }
    norms = {"attn_norm": c.hidden_size, "ffn_norm": c.hidden_size}
    if architecture != "llama":
        norms |= {"attn_sub_norm": c.q_rows, "ffn_sub_norm": c.intermediate_size}
    sizes = [c.q_rows, c.kv_rows, c.kv_rows, c.hidden_size, c.intermediate_size, c.intermediate_size, c.hidden_size]
    columns = [c.hidden_size] * 3 + [c.q_rows] + [c.hidden_size] * 2 + [c.intermediate_size]
    embedding = rng.standard_normal((c.vocab_size, c.hidden_size)).astype(np.float16)
    tensors = {"token_embd.weight": (embedding.shape, "F16", embedding.tobytes())}
    ternary = {}
    for i in range(c.num_layers):
        for name, k in norms.items():
            tensors[f"blk.{i}.{name}.weight"] = ((k,), "F32", rng.random(k, np.float32).tobytes())
        for name, m, k in zip(MATRICES, sizes, columns, strict=True):
            t = rng.integers(-1, 2, (m, k))
            scale = float(np.float16(rng.uniform(0.01, 0.1)))
            tensors[f"blk.{i}.{name}.weight"] = ((m, k), kind, pack(kind, t, np.full(m, scale)))
            ternary[f"blk.{i}.{name}"] = t, scale
    tensors["output_norm.weight"] = ((c.hidden_size,), "F32", np.ones(c.hidden_size, np.float32).tobytes())
    return fields, tensors, ternary


def assert_ternary(weight: TernaryWeight, parts: list[tuple[np.ndarray, float]]) -> None:
    np.testing.assert_array_equal(weight.to_int8(), np.concatenate([t for t, _ in parts]))
    scales = np.concatenate([np.full(len(t), scale, np.float32) for t, scale in parts])
    np.testing.assert_array_equal(np.broadcast_to(weight.scale, scales.shape), scales)


@pytest.mark.parametrize("kind", TERNARY)
def test_gguf_ternary_model_is_read_exactly(tmp_path, kind):
    fields, tensors, ternary = wide_model(kind)
    path = written(tmp_path / "tiny.gguf", container(fields, tensors))
    checkpoint = load_checkpoint(path)
    assert checkpoint.config == dataclasses.replace(WIDE, sub_norms=True, ffn_activation="relu2")
    for i, layer in enumerate(checkpoint.layers):
        for got, names in (
            (layer.qkv, ("attn_q", "attn_k", "attn_v")),
            (layer.out, ("attn_output",)),
            (layer.up, ("ffn_gate", "ffn_up")),
            (layer.down, ("ffn_down",)),
        ):
            assert_ternary(got, [ternary[f"blk.{i}.{name}"] for name in names])
        assert layer.out.scale.shape == (1,)
        for name in ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm"):
            stored = np.frombuffer(tensors[f"blk.{i}.{name}.weight"][2], np.float32)
            np.testing.assert_array_equal(getattr(layer, name), stored)
    floats = dict(gguf.read_float(path))
    for part, name in (("self_attn.k_proj", "attn_k"), ("mlp.down_proj", "ffn_down")):
        t, scale = ternary[f"blk.1.{name}"]
        np.testing.assert_array_equal(floats[f"model.layers.1.{part}.weight"], t * np.float32(scale))
    assert "model.layers.1.mlp.ffn_sub_norm.weight" in floats
    assert "model.layers.0.self_attn.attn_sub_norm.weight" in floats


@pytest.mark.parametrize("kind", TERNARY)
def test_gguf_ternary_query_and_key_of_llama_are_turned_back(tmp_path, kind):
    """Codes and the scales of rows: K = 256 holds whole blocks of each type."""
    fields, tensors, ternary = wide_model(kind, "llama")
    scales = np.full(WIDE.q_rows, 0.5) if kind == "I2_S" else 2.0 ** -(np.arange(WIDE.q_rows) % 11)
    t = ternary["blk.0.attn_q"][0]
    turned, turned_scales = pairs_from_halves(t, WIDE.num_heads), pairs_from_halves(scales, WIDE.num_heads)
    tensors["blk.0.attn_q.weight"] = (t.shape, kind, pack(kind, turned, turned_scales))
    t_k, scale_k = ternary["blk.0.attn_k"]
    stored = pack(kind, pairs_from_halves(t_k, WIDE.num_kv_heads), np.full(len(t_k), scale_k))
    tensors["blk.0.attn_k.weight"] = (t_k.shape, kind, stored)
    path = written(tmp_path / "tiny.gguf", container(fields, tensors, version=2))
    assert gguf.read(path).config == WIDE
    qkv = gguf.read(path).layers[0].qkv
    np.testing.assert_array_equal(qkv.to_int8(), np.concatenate([t, t_k, ternary["blk.0.attn_v"][0]]))
    np.testing.assert_array_equal(qkv.scale[: len(t)], scales.astype(np.float32))
    np.testing.assert_array_equal(qkv.scale[len(t) : len(t) + len(t_k)], np.float32(scale_k))


def read_down(path: Path, stored: bytes, kind: str) -> TernaryWeight:
    """The product down of a model whose file has `stored` there."""
    fields, tensors, _ = wide_model("TQ2_0")
    tensors["blk.0.ffn_down.weight"] = (tensors["blk.0.ffn_down.weight"][0], kind, stored)
    return gguf.read(written(path, container(fields, tensors))).layers[0].down


SHAPE = (WIDE.hidden_size, WIDE.intermediate_size)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q2_0"])
def test_gguf_scales_of_rows(tmp_path, kind):
    t = np.random.default_rng(5).integers(-1, 2, SHAPE)
    t[3] = 0  # a row without a weight has no scale of its own
    scales = 2.0 ** -(np.arange(SHAPE[0]) % 9)
    down = read_down(tmp_path / "tiny.gguf", pack(kind, t, scales), kind)
    np.testing.assert_array_equal(down.to_int8(), t)
    np.testing.assert_array_equal(np.delete(down.scale, 3), np.delete(scales, 3))


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q2_0"])
def test_gguf_blocks_of_zeros_agree_with_every_scale(tmp_path, kind):
    t = np.random.default_rng(6).integers(-1, 2, SHAPE)
    t[5, :256] = 0
    t[9] = 0
    stored = pack(kind, t, np.full(SHAPE[0], 0.25))
    if kind == "Q2_0":  # the package's quantiser gives them the scale 0; here 8
        stored = pack_q2_0(t + 1, np.where(t.reshape(SHAPE[0], -1, 64).any(axis=2), 0.25, 8))
    down = read_down(tmp_path / "tiny.gguf", stored, kind)
    np.testing.assert_array_equal(down.to_int8(), t)
    np.testing.assert_array_equal(down.scale, np.float32([0.25]))


def test_gguf_a_block_scaled_by_zero_is_zero(tmp_path):
    t = np.random.default_rng(7).integers(-1, 2, SHAPE)
    d = np.full((SHAPE[0], SHAPE[1] // 64), 0.25)
    d[2, 3] = 0
    down = read_down(tmp_path / "tiny.gguf", pack_q2_0(t + 1, d), "Q2_0")
    t[2, 192:256] = 0
    np.testing.assert_array_equal(down.to_int8(), t)
    np.testing.assert_array_equal(down.scale, np.float32([0.25]))


def test_gguf_different_scales_in_a_row_are_quantised_with_absmean(tmp_path):
    t, rng = np.random.default_rng(8).integers(-1, 2, SHAPE), np.random.default_rng(9)
    d = rng.uniform(0.1, 3, (SHAPE[0], SHAPE[1] // 64)).astype(np.float16)
    down = read_down(tmp_path / "tiny.gguf", pack_q2_0(t + 1, d), "Q2_0")
    expected = TernaryWeight.from_float((t.reshape(SHAPE[0], -1, 64) * d[:, :, None].astype(np.float32)).reshape(SHAPE))
    assert (expected.to_int8() != t).any()
    np.testing.assert_array_equal(down.to_int8(), expected.to_int8())
    np.testing.assert_array_equal(down.scale, expected.scale)


def test_gguf_scale_of_a_product(tmp_path):
    fields, tensors, ternary = wide_model("I2_S")
    for name, shape, scale in (("blk.0.ffn_gate", (1,), 0.5), ("blk.0.attn_output", (), 4.0)):
        tensors[f"{name}.scale"] = (shape, "F32", np.float32(scale).tobytes())
    path = written(tmp_path / "tiny.gguf", container(fields, tensors))
    layer = gguf.read(path).layers[0]
    (gate, gate_scale), up, out = (ternary[f"blk.0.{name}"] for name in ("ffn_gate", "ffn_up", "attn_output"))
    assert_ternary(layer.up, [(gate, gate_scale * 0.5), up])
    assert_ternary(layer.out, [(out[0], out[1] * 4)])
    floats = dict(gguf.read_float(path))["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(floats, gate * np.float32(gate_scale * 0.5))


@pytest.mark.parametrize("kind", ["I2_S", "F16"])
def test_gguf_refuses_a_scale_beyond_float32(tmp_path, kind):
    fields, tensors, _ = wide_model("I2_S")
    if kind == "F16":
        shape = tensors["blk.0.ffn_up.weight"][0]
        tensors["blk.0.ffn_up.weight"] = (shape, "F16", np.full(shape, 1e3, np.float16).tobytes())
    else:
        shape, _, stored = tensors["blk.0.ffn_up.weight"]
        tensors["blk.0.ffn_up.weight"] = (shape, "I2_S", stored[:-32] + np.float32(1e3).tobytes() + stored[-28:])
    tensors["blk.0.ffn_up.scale"] = ((1,), "F32", np.float32(1e37).tobytes())
    with pytest.raises(CheckpointError, match=r"tensor blk.0.ffn_up.weight: element \[.*\] is inf, expected a finite"):
        read_all(written(tmp_path / "tiny.gguf", container(fields, tensors)))


@pytest.mark.parametrize(
    ("architecture", "activation"), [("bitnet", "silu"), ("bitnet-25", "relu2"), ("bitnet-b1.58", "relu2")]
)
def test_gguf_activation_of_bitnet(tmp_path, architecture, activation):
    fields, tensors, _ = wide_model("I2_S", architecture)
    config = gguf.read(written(tmp_path / "tiny.gguf", container(fields, tensors))).config
    assert (config.ffn_activation, config.sub_norms) == (activation, True)


def test_gguf_llama_cpps_bitnet_of_the_sizes_of_2b4t_has_squared_relu(tmp_path):
    c = dataclasses.replace(ModelConfig.preset("bitnet-2b4t"), num_layers=1, vocab_size=8)
    fields, _, _ = wide_model("I2_S", "bitnet")
    sizes = {"block_count": 1, "embedding_length": 2560, "feed_forward_length": 6912}
    sizes |= {"attention.head_count": 20, "attention.head_count_kv": 5}
    fields |= {f"bitnet.{key}": value for key, value in sizes.items()}
    shapes = {"token_embd": (8, 2560), "output_norm": (2560,)}
    shapes |= {f"blk.0.{name}": (2560,) for name in ("attn_norm", "ffn_norm", "attn_sub_norm")}
    shapes |= {"blk.0.ffn_sub_norm": (6912,), "blk.0.attn_q": (2560, 2560), "blk.0.attn_output": (2560, 2560)}
    shapes |= {"blk.0.attn_k": (640, 2560), "blk.0.attn_v": (640, 2560), "blk.0.ffn_down": (2560, 6912)}
    shapes |= {"blk.0.ffn_gate": (6912, 2560), "blk.0.ffn_up": (6912, 2560)}
    tensors = {
        f"{name}.weight": (shape, "F32", np.ones(shape, np.float32).tobytes())
        if len(shape) == 1
        else (shape, "I2_S", bytes(math.prod(shape) // 4 + 32))
        for name, shape in shapes.items()
    }
    got = gguf.read(written(tmp_path / "bitnet-2b4t.gguf", container(fields, tensors))).config
    assert got == dataclasses.replace(c, rope_theta=WIDE.rope_theta, max_context=WIDE.max_context)


@pytest.mark.parametrize("kind", TERNARY)
def test_gguf_ternary_embedding_is_int8(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(gguf, "_PIECE", 7 * WIDE.hidden_size)
    fields, tensors, _ = wide_model("TQ2_0")
    t = np.random.default_rng(1).integers(-1, 2, (WIDE.vocab_size, WIDE.hidden_size))
    tensors["token_embd.weight"] = (t.shape, kind, pack(kind, t, np.full(len(t), 0.5)))
    rows = gguf.read(written(tmp_path / "tiny.gguf", container(fields, tensors))).embedding
    np.testing.assert_array_equal(rows.values, t * 127)
    np.testing.assert_array_equal(rows.scale, np.float32(0.5 / 127))


def _changed(data: bytes, at: int, byte: int) -> bytes:
    return data[:at] + bytes([byte]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("kind", "row", "byte", "value", "message"),
    [
        # Byte 7 of a block: in TQ1_0 the elements 7, 39, ...; 1 is the byte of no five digits.
        ("TQ1_0", 4, 7, 1, "tensor blk.0.ffn_down.weight: the code of element [4, 7] is no ternary weight in TQ1_0"),
        ("TQ1_0", 4, 54 + 33, 1, "the code of element [4, 417] is no ternary weight in TQ1_0"),
        ("TQ1_0", 4, 54 + 50, 1, "the code of element [4, 498] is no ternary weight in TQ1_0"),
        ("TQ2_0", 4, 66 + 33, 0b00110000, "the code of element [4, 449] is no ternary weight in TQ2_0"),
        ("Q2_0", 4, 18 + 2 + 5, 0b00001100, "the code of element [4, 85] is no ternary weight in Q2_0"),
        ("I2_S", 4, 32 + 5, 0b00110000, "the code of element [4, 165] is no ternary weight in I2_S"),
        ("TQ1_0", 6, 54 + 53, 0x7E, "the scale of row 6, block 1 is nan, expected a finite number"),
        ("TQ2_0", 6, 66 + 65, 0x7E, "the scale of row 6, block 1 is nan, expected a finite number"),
        ("Q2_0", 6, 18 + 1, 0x7E, "the scale of row 6, block 1 is nan, expected a finite number"),
        ("I2_S", 256, 3, 0x7F, "the scale of row 0, block 0 is nan, expected a finite number"),
    ],
)
def test_gguf_refuses_codes_and_scales_that_are_none(tmp_path, kind, row, byte, value, message):
    t = np.random.default_rng(2).integers(-1, 2, SHAPE)
    stored = pack(kind, t, np.full(SHAPE[0], 0.3))
    row_bytes = (len(stored) - (32 if kind == "I2_S" else 0)) // SHAPE[0]
    if value == 0x7F:  # the high half of the float32 nan
        stored = _changed(stored, row * row_bytes + 2, 0xC0)
    with pytest.raises(CheckpointError) as e:
        read_down(tmp_path / "tiny.gguf", _changed(stored, row * row_bytes + byte, value), kind)
    assert str(e.value).startswith(f"{tmp_path / 'tiny.gguf'}: ")
    assert message in str(e.value)


@pytest.mark.parametrize("kind", TERNARY)
def test_gguf_refuses_a_ternary_matrix_of_zeros(tmp_path, kind):
    stored = pack(kind, np.zeros(SHAPE, np.int64), np.full(SHAPE[0], 0.3))
    with pytest.raises(CheckpointError, match=r"tensor blk.0.ffn_down.weight is all zero"):
        read_down(tmp_path / "tiny.gguf", stored, kind)


def test_gguf_refuses_what_nobody_can_decode(tmp_path, monkeypatch):
    fields, tensors, _ = wide_model("TQ2_0")
    shape, _, _ = tensors["blk.0.ffn_down.weight"]
    path = tmp_path / "tiny.gguf"
    for type_id, message in ((99, "has the unknown type 99"), (24, "of type I8: ")):
        monkeypatch.setitem(IDS, "F32", type_id)
        data = container(fields, {**tensors, "blk.0.ffn_down.weight": (shape, "F32", bytes(math.prod(shape)))})
        monkeypatch.undo()
        # Only ffn_down may have it: the norms keep their own id.
        for name, (_, kind, _) in tensors.items():
            if kind == "F32":
                at = data.index(name.encode()) + len(name) + 12
                data = data[:at] + struct.pack("<I", 0) + data[at + 4 :]
        with pytest.raises(CheckpointError, match=rf"tensor blk.0.ffn_down.weight {message}"):
            read_all(written(path, data))


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ternary_bytes() -> bytes:
    fields, tensors, _ = wide_model("Q2_0")
    return container(fields, tensors)


@pytest.mark.parametrize("part", ["nothing", "magic", "header", "tensor list", "first tensor", "last byte"])
def test_gguf_truncated(tmp_path, gguf_bytes, part):
    first = gguf_package.GGUFReader(written(tmp_path / "whole.gguf", gguf_bytes)).tensors[0]
    kept = {
        "nothing": 0,
        "magic": 6,
        "header": 150,
        "tensor list": first.field.offset + 10,
        "first tensor": first.data_offset + 5,
        "last byte": len(gguf_bytes) - 1 - _padding(gguf_bytes),
    }[part]
    path = written(tmp_path / "short.gguf", gguf_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.gguf: not a readable GGUF file: ") as e:
        gguf.read(path)
    where = {
        "nothing": "empty file",
        "magic": "truncated or damaged in the header: 8 bytes are needed, 6 are there",
        "header": "truncated or damaged in header field 3",
        "tensor list": "truncated or damaged in the description of tensor",
        "first tensor": "truncated or damaged in tensor token_embd.weight",
        "last byte": "truncated or damaged in tensor output_norm.weight",
    }
    assert where[part] in str(e.value)


def test_gguf_truncated_anywhere_in_the_header(tmp_path, ternary_bytes):
    """Also at every border: each prefix is refused, and named."""
    path = tmp_path / "short.gguf"
    data_start = ternary_bytes.index(b"output_norm.weight") + 18 + 4 + 8 + 4 + 8
    for kept in range(4, data_start):
        with pytest.raises(CheckpointError, match=r"short.gguf: not a readable GGUF file: truncated or damaged in"):
            gguf.read(written(path, ternary_bytes[:kept]))


def _padding(data: bytes) -> int:
    """Bytes behind the last tensor, whose last float32 is not zero."""
    return len(data) - len(data.rstrip(b"\0"))


def test_gguf_with_a_length_that_is_not_there(tmp_path, gguf_bytes):
    """Such an array must be walked by nobody, and such a count believed by nobody."""
    path = tmp_path / "damaged.gguf"
    key = b"tokenizer.ggml.scores"
    at = gguf_bytes.index(key) + len(key) + 4 + 4  # behind the field's type and the elements' type
    assert gguf_bytes[at : at + 8] == (3).to_bytes(8, "little")
    for count in (2**60, 2**64 - 1, len(gguf_bytes) // 4):
        written(path, gguf_bytes[:at] + count.to_bytes(8, "little") + gguf_bytes[at + 8 :])
        with pytest.raises(CheckpointError, match=f"damaged in the header field {key.decode()}"):
            gguf.read(path)
    for at in (8, 16):  # tensors, fields
        written(path, gguf_bytes[:at] + (2**63).to_bytes(8, "little") + gguf_bytes[at + 8 :])
        with pytest.raises(CheckpointError, match="not a readable GGUF file"):
            gguf.read(path)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 1000, "arrays more than 2 deep"),
        (struct.pack("<I", 13), "there is no kind 13 of values"),
        (struct.pack("<IQ", 8, 2) + b"\xff\xfe", "damaged in the header field x: 'utf-8' codec"),
        (struct.pack("<IB", 7, 1) + struct.pack("<Q", 1) + b"x" + struct.pack("<IB", 7, 1), "field x is there twice"),
    ],
)
def test_gguf_with_a_damaged_field(tmp_path, field, message):
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + struct.pack("<Q", 1) + b"x" + field
    with pytest.raises(CheckpointError) as e:
        gguf.read(written(tmp_path / "damaged.gguf", data))
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("at", "old", "new", "message"),
    [
        (4, struct.pack("<I", 3), struct.pack(">I", 3), "it has the other byte order"),
        (4, struct.pack("<I", 3), struct.pack("<I", 1), "its version is 1, expected 2 or 3"),
        (0, b"GGUF", b"GGML", "it does not begin with GGUF"),
    ],
)
def test_gguf_of_another_kind(tmp_path, ternary_bytes, at, old, new, message):
    assert ternary_bytes[at : at + 4] == old
    with pytest.raises(CheckpointError, match=f"not a readable GGUF file: {message}"):
        gguf.read(written(tmp_path / "x.gguf", ternary_bytes[:at] + new + ternary_bytes[at + 4 :]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: (t[0], t[1], t[2][:-64]), "blk.1.ffn_down.weight"),  # the next tensor's bytes are not its own
        (lambda t: ((2**40, 2**40), *t[1:]), "truncated or damaged in tensor blk.1.ffn_down.weight"),
        (lambda t: ((256, 500), *t[1:]), "blk.1.ffn_down.weight has shape (256, 500), but Q2_0 stores 64 at a time"),
        (lambda t: ((1, 1, 1, 256, 512), *t[1:]), "blk.1.ffn_down.weight has 5 dimensions, expected at most 4"),
        (lambda t: ((0, 512), *t[1:]), "blk.1.ffn_down.weight has shape (0, 512), but the header's sizes need"),
    ],
)
def test_gguf_with_a_damaged_tensor_description(tmp_path, edit, message):
    fields, tensors, _ = wide_model("Q2_0")
    tensors["blk.1.ffn_down.weight"] = edit(tensors["blk.1.ffn_down.weight"])
    if message == "blk.1.ffn_down.weight":
        tensors = {name: tensors[name] for name in (*(tensors.keys() - {message}), message)}  # at the end of the file
    with pytest.raises(CheckpointError) as e:
        gguf.read(written(tmp_path / "damaged.gguf", container(fields, tensors)))
    assert message in str(e.value)


def test_gguf_fuzzed(tmp_path, gguf_bytes):
    tensors = gguf_package.GGUFReader(written(tmp_path / "whole.gguf", gguf_bytes)).tensors
    fuzz(tmp_path / "fuzzed.gguf", gguf_bytes, gguf.read, header=tensors[0].data_offset)


def test_gguf_ternary_fuzzed(tmp_path, ternary_bytes):
    """Header and codes: half of the bytes that are changed belong to a layer."""
    header = 2 * ternary_bytes.index(b"output_norm.weight")
    fuzz(tmp_path / "fuzzed.gguf", ternary_bytes, read_all, header=header, runs=100)
