"""Hugging Face folders: what is read of them and written, and what becomes of damaged ones.

The files are made here from the format's definition, with the package safetensors and none of our own packing.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig, TernaryWeight
from edgellm_cupy.formats import compact, huggingface, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint, Rows
from edgellm_cupy.formats.rotary import RopeScaling
from tests.checkpoints import (
    TINY,
    assert_same,
    assert_same_array,
    assert_same_layers,
    damaged_json,
    fuzz,
    read_all,
    read_or_refused,
    written,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")

BF16 = ml_dtypes.bfloat16
BITNET = dataclasses.replace(TINY, ffn_activation="relu2", sub_norms=True)
MULTIPLY = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
DIVIDE = {"quant_method": "bitnet", "modules_to_not_convert": None}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}

# ---- making a checkpoint --------------------------------------------------------------------------------------------


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices of a layer and their [M, K]."""
    return {
        "self_attn.q_proj": (c.num_heads * c.head_dim, c.hidden_size),
        "self_attn.k_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
        "self_attn.v_proj": (c.num_kv_heads * c.head_dim, c.hidden_size),
        "self_attn.o_proj": (c.hidden_size, c.num_heads * c.head_dim),
        "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj": (c.hidden_size, c.intermediate_size),
    }


def pack(t: np.ndarray) -> np.ndarray:
    """The packed layout, one code at a time."""
    m, k = t.shape
    packed = np.zeros((m // 4, k), np.uint8)
    for row in range(m):
        for column in range(k):
            packed[row % (m // 4), column] += (int(t[row, column]) + 1) * 4 ** (row // (m // 4))
    return packed


def config_json(c: ModelConfig, quantisation: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["BitNetForCausalLM" if c.sub_norms else "LlamaForCausalLM"],
        "model_type": "bitnet" if c.sub_norms else "llama",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "vocab_size": c.vocab_size,
        "hidden_act": c.ffn_activation,
        "max_position_embeddings": c.max_context,
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_head,
        **({} if quantisation is None else {"quantization_config": quantisation}),
        **more,
    }


@dataclasses.dataclass
class Model:
    """Tensors by their names, and the ternary matrices and scales that they stand for."""

    tensors: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    scales: dict[str, np.float32]


def model(c: ModelConfig, body: str, dtype: Any = BF16) -> Model:
    """`body`: multiply, divide, or float for weights that absmean makes ternary."""
    rng = np.random.default_rng(5)
    made = Model({}, {}, {})

    def floats(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    made.tensors["model.embed_tokens.weight"] = floats(c.vocab_size, c.hidden_size)
    made.tensors["model.norm.weight"] = floats(c.hidden_size)
    if not c.tied_head:
        made.tensors["lm_head.weight"] = floats(c.vocab_size, c.hidden_size)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        made.tensors[f"{layer}.input_layernorm.weight"] = floats(c.hidden_size)
        made.tensors[f"{layer}.post_attention_layernorm.weight"] = floats(c.hidden_size)
        if c.sub_norms:
            made.tensors[f"{layer}.self_attn.attn_sub_norm.weight"] = floats(c.num_heads * c.head_dim)
            made.tensors[f"{layer}.mlp.ffn_sub_norm.weight"] = floats(c.intermediate_size)
        for name, shape in shapes(c).items():
            name = f"{layer}.{name}"
            if body == "float":
                w = made.tensors[f"{name}.weight"] = floats(*shape)
                absmean = np.abs(w.astype(np.float64)).mean()
                made.codes[name] = np.clip(np.rint(w.astype(np.float32) * np.float32(1 / absmean)), -1, 1).astype(
                    np.int8
                )
                made.scales[name] = np.float32(absmean)
                continue
            made.codes[name] = rng.integers(-1, 2, shape, dtype=np.int8)
            stored = np.array([rng.uniform(0.5, 3)], np.float32).astype(dtype)
            made.tensors[f"{name}.weight"] = pack(made.codes[name])
            made.tensors[f"{name}.weight_scale"] = stored
            value = stored.astype(np.float32)[0]
            made.scales[name] = value if body == "multiply" else np.float32(1) / value
    return made


def save(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(safetensors_numpy.save(tensors, {"format": "pt"}))
    return folder


def assert_is(checkpoint: Checkpoint, made: Model) -> None:
    """Each of the four products is the matrices that `made` has for it, one below the other."""
    stacks = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "out": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    norms = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_sub_norm": "self_attn.attn_sub_norm",
        "ffn_sub_norm": "mlp.ffn_sub_norm",
    }
    for i, layer in enumerate(checkpoint.layers):
        prefix = f"model.layers.{i}"
        for product, modules in stacks.items():
            weight: TernaryWeight = getattr(layer, product)
            codes = [made.codes[f"{prefix}.{module}"] for module in modules]
            scales = [np.full(len(t), made.scales[f"{prefix}.{m}"]) for t, m in zip(codes, modules, strict=True)]
            np.testing.assert_array_equal(weight.to_int8(), np.concatenate(codes))
            np.testing.assert_array_equal(np.broadcast_to(weight.scale, weight.shape[0]), np.concatenate(scales))
        for field, name in norms.items():
            stored = made.tensors.get(f"{prefix}.{name}.weight")
            if stored is None:
                assert getattr(layer, field) is None
            else:
                assert_same_array(getattr(layer, field), stored.astype(np.float32))
    assert_same_array(checkpoint.final_norm, made.tensors["model.norm.weight"].astype(np.float32))
    embedding = made.tensors["model.embed_tokens.weight"]
    assert_same_array(checkpoint.embedding.values, embedding)
    assert_same_array(
        checkpoint.head.values, embedding if checkpoint.config.tied_head else made.tensors["lm_head.weight"]
    )


# ---- reading --------------------------------------------------------------------------------------------------------


def test_the_packed_layout():
    """One column of eight weights, by hand: byte row 0 holds rows 0, 2, 4, 6, byte row 1 rows 1, 3, 5, 7."""
    t = np.array([[1], [-1], [0], [-1], [-1], [1], [1], [0]], np.int8)
    by_hand = [[2 | 1 << 2 | 0 << 4 | 2 << 6], [0 | 0 << 2 | 2 << 4 | 1 << 6]]
    np.testing.assert_array_equal(pack(t), by_hand)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize(
    ("body", "quantisation"), [("multiply", MULTIPLY), ("divide", DIVIDE), ("float", ONLINE), ("float", None)]
)
@pytest.mark.parametrize("config", [TINY, BITNET, dataclasses.replace(BITNET, tied_head=False)])
def test_read(tmp_path, config, body, quantisation, dtype):
    made = model(config, body, dtype)
    folder = save(tmp_path / "tiny", config_json(config, quantisation), made.tensors)
    for path in (folder, folder / "model.safetensors"):
        checkpoint = load_checkpoint(path)
        assert checkpoint.config == config
        assert checkpoint.source == "tiny"
        assert_is(checkpoint, made)


@pytest.mark.parametrize(
    ("quantisation", "factor"),
    [
        (MULTIPLY, 0.25),
        (DIVIDE, 4),
        ({"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}, 4),
        # transformers' BitLinear does not ask for the mode.
        ({"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "online"}, 4),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, 0.25),
    ],
)
def test_the_scale_trap(tmp_path, quantisation, factor):
    tensors = model(TINY, "multiply").tensors
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] = np.array([0.25], BF16)
    checkpoint = load_checkpoint(save(tmp_path, config_json(TINY, quantisation), tensors))
    assert {float(s) for layer in checkpoint.layers for s in (*layer.qkv.scale, *layer.down.scale)} == {factor}


@pytest.mark.parametrize("body", ["multiply", "float"])
def test_sharded(tmp_path, body):
    made = model(BITNET, body)
    quantisation = MULTIPLY if body == "multiply" else None
    index = shard(tmp_path / "tiny", config_json(BITNET, quantisation), made.tensors)
    for path in (tmp_path / "tiny", index):
        assert_is(load_checkpoint(path), made)


def shard(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Three shards of no order at all; returns the index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        part = {key: tensors[key] for n, key in enumerate(tensors) if n % 3 == i}
        (folder / name).write_bytes(safetensors_numpy.save(part))
        weight_map |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def test_what_config_leaves_out(tmp_path):
    """The defaults of transformers' LlamaConfig and BitNetConfig."""
    llama = config_json(dataclasses.replace(TINY, num_kv_heads=4, tied_head=False))
    optional = ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    for key in (*optional, "tie_word_embeddings", "architectures"):
        del llama[key]
    c = dataclasses.replace(TINY, num_kv_heads=4, tied_head=False)
    read = load_checkpoint(save(tmp_path / "tiny", llama, model(c, "float").tensors)).config
    assert read == dataclasses.replace(c, rms_eps=1e-6, rope_theta=1e4, max_context=2048)

    bitnet = llama | {"model_type": "bitnet", "head_dim": None, "rope_scaling": None, "num_key_value_heads": 4}
    c = dataclasses.replace(BITNET, num_kv_heads=4, tied_head=False)
    read = load_checkpoint(save(tmp_path / "tiny", bitnet, model(c, "float").tensors)).config
    assert read == dataclasses.replace(c, rms_eps=1e-5, rope_theta=5e5, max_context=2048)


def test_head_dim_of_its_own(tmp_path):
    c = dataclasses.replace(TINY, head_dim=32)
    made = model(c, "float")
    checkpoint = load_checkpoint(save(tmp_path / "tiny", config_json(c, head_dim=32), made.tensors))
    assert checkpoint.config == c
    assert_is(checkpoint, made)


def test_name_in_the_cache_of_the_hub(tmp_path):
    folder = tmp_path / "models--microsoft--bitnet-b1.58-2B-4T" / "snapshots" / "04c3b9ad"
    checkpoint = load_checkpoint(save(folder, config_json(TINY), model(TINY, "float").tensors))
    assert checkpoint.config.name == checkpoint.source == "bitnet-b1.58-2B-4T"


def test_saved_rotary_frequencies_are_left_out(tmp_path):
    made = model(TINY, "float")
    made.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert_is(load_checkpoint(save(tmp_path, config_json(TINY), made.tensors)), made)


def test_tied_with_a_head_in_the_file(tmp_path):
    made = model(TINY, "float")
    made.tensors["lm_head.weight"] = made.tensors["model.embed_tokens.weight"].copy()
    assert_is(load_checkpoint(save(tmp_path, config_json(TINY), made.tensors)), made)

    made.tensors["lm_head.weight"][39, 63] += 1
    checkpoint = load_checkpoint(save(tmp_path, config_json(TINY), made.tensors))
    for read in (checkpoint.read_embedding, checkpoint.read_head):
        with pytest.raises(
            CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight, but .*ties them"
        ):
            read()


# ---- the rotary embedding -------------------------------------------------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
FACTORS = {"short_factor": [1, 1.5, 2, 2, 2, 2, 2, 2], "long_factor": [1, 2, 3, 4, 5, 6, 7, 8.5]}
TUPLES = {"short_factor": (1.0, 1.5, *(2.0,) * 6), "long_factor": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.5)}


@pytest.mark.parametrize("layout", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4}, RopeScaling("linear", 4.0)),
        ({"type": "linear", "factor": 4.0, "finetuned": True}, RopeScaling("linear", 4.0)),
        ({"rope_type": "dynamic", "factor": 2.0}, RopeScaling("dynamic", 2.0, 512)),
        (
            {"rope_type": "llama3", **LLAMA3},
            RopeScaling("llama3", 8.0, 128, low_freq_factor=1.0, high_freq_factor=4.0),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": None},
            RopeScaling("yarn", 4.0, 128),
        ),
        (
            {
                "type": "yarn",
                "factor": 4.0,
                "beta_fast": 16,
                "beta_slow": 2,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
                "attention_factor": 1.5,
            },
            RopeScaling("yarn", 4.0, 512, 1.0, 4.0, 16.0, 2.0, 1.0, 0.5, False, 1.5),
        ),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0, **FACTORS},
            RopeScaling("longrope", 8.0, 64, **TUPLES),
        ),
    ],
)
def test_rotary(tmp_path, layout, rope, expected):
    config = config_json(TINY)
    if layout == "rope_parameters":
        rope = rope | {"rope_theta": config.pop("rope_theta")}
    folder = save(tmp_path, config | {layout: rope}, model(TINY, "float").tensors)
    read = load_checkpoint(folder).config
    assert read.rope_scaling == expected
    assert read.rope_theta == 5e4


def test_rotary_context_beside_the_scaling(tmp_path):
    """As Phi-3 has it; it counts more than what stands inside."""
    more = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64}
    read = load_checkpoint(save(tmp_path, config_json(TINY, **more), model(TINY, "float").tensors)).config
    assert read.rope_scaling == RopeScaling("yarn", 4.0, 64)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "su", "factor": 4.0}, "the rotary embedding is scaled by 'su', expected default, linear"),
        ({"rope_type": "linear"}, "rope_scaling.factor is missing"),
        ({"rope_type": "dynamic"}, "rope_scaling.factor is missing"),
        ({"rope_type": "linear", "factor": "4"}, "rope_scaling.factor is '4', expected float"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor is 0.0, expected above 0"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope_scaling.factor is nan, expected a finite number"),
        ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": None}, "rope_scaling.low_freq_factor is missing"),
        ({"rope_type": "longrope", **FACTORS, "long_factor": [1.0]}, "expected head_dim / 2 = 8 numbers above 0"),
        ({"rope_type": "longrope", **FACTORS, "long_factor": [0] * 8}, "expected head_dim / 2 = 8 numbers above 0"),
        ({"rope_type": "longrope"}, "rope_scaling.short_factor is missing"),
        ({"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}, "the whole of a head must turn"),
        ({"full_attention": {"rope_type": "default"}}, "the rotary embedding has the field full_attention"),
        (["linear", 4.0], "rope_scaling is ['linear', 4.0], expected dict"),
    ],
)
def test_rotary_refused(tmp_path, rope, message):
    folder = save(tmp_path, config_json(TINY, rope_scaling=rope), model(TINY, "float").tensors)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(folder)
    assert str(e.value).startswith(f"{folder / 'config.json'}: ")
    assert message in str(e.value)


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["multiply", "float"])
def test_streams(tmp_path, body):
    """Reading layer by layer holds less than twice the largest tensor, here the embedding; tracemalloc sees NumPy."""
    c = ModelConfig("wide", 12, 256, 512, 4, 2, 64, vocab_size=8192)
    made = model(dataclasses.replace(c, num_layers=1), "float")
    if body == "multiply":
        for name, (m, k) in shapes(c).items():
            tensor = f"model.layers.0.{name}.weight"
            made.tensors[tensor] = np.random.default_rng(1).choice([0x12, 0x61, 0x88], (m // 4, k)).astype(np.uint8)
            made.tensors[f"{tensor}_scale"] = np.ones(1, BF16)
    first = {name: t for name, t in made.tensors.items() if name.startswith("model.layers.0")}
    for i in range(1, c.num_layers):
        made.tensors |= {name.replace("layers.0", f"layers.{i}"): t for name, t in first.items()}
    config = config_json(c, MULTIPLY if body == "multiply" else None, head_dim=64)
    folder = save(tmp_path, config, made.tensors)
    largest = made.tensors["model.embed_tokens.weight"].nbytes
    assert largest == max(t.nbytes for t in made.tensors.values())
    if body == "float":
        assert sum(t.nbytes for t in made.tensors.values()) > 3 * largest

    tracemalloc.start()
    try:
        checkpoint = read_all(load_checkpoint(folder))
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
        tracemalloc.reset_peak()
        compact.write(checkpoint, tmp_path / "compact")
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_reading_a_large_product_makes_no_copy_of_it(tmp_path, dtype):
    c = ModelConfig("wide", 1, 64, 32_768, 4, 2, 16, vocab_size=40)
    tensors = {name: np.asarray(t, dtype) for name, t in model(c, "float").tensors.items()}
    folder = save(tmp_path, config_json(c, None, head_dim=16), tensors)
    largest = tensors["model.layers.0.mlp.down_proj.weight"].nbytes
    assert largest == max(t.nbytes for t in tensors.values())
    tracemalloc.start()
    try:
        read_all(load_checkpoint(folder))
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()


def test_the_embedding_is_not_copied(tmp_path):
    checkpoint = load_checkpoint(save(tmp_path, config_json(TINY), model(TINY, "float").tensors))
    assert not checkpoint.embedding.values.flags.owndata
    assert not checkpoint.embedding.values.flags.writeable


# ---- refused configurations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed() -> Model:
    return model(BITNET, "multiply")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "the architecture is 'MixtralForCausalLM', but only LlamaForCausalLM and BitNetForCausalLM are supported",
        ),
        ({"architectures": [["x"]]}, "the architecture is ['x'], but only"),
        ({"architectures": None, "model_type": "gpt2"}, "the architecture is 'gpt2', but only"),
        ({"architectures": [], "model_type": None}, "model_type is missing"),
        ({"attention_bias": True}, "attention_bias is True, expected False: biases are not supported"),
        ({"mlp_bias": True}, "mlp_bias is True, expected False: biases are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1.0: the whole of a head must turn"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected one of silu, relu2"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected int"),
        ({"hidden_size": True}, "hidden_size is True, expected int"),
        ({"hidden_size": 66}, "hidden_size is 66, expected a multiple of num_attention_heads = 4"),
        ({"num_attention_heads": 0}, "expected a multiple of num_attention_heads = 0"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3, expected a divisor"),
        ({"num_hidden_layers": 0}, "num_layers is 0, expected at least 1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected float"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a finite number"),
        ({"rope_theta": 10**400}, "expected a finite number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq', expected 'bitnet'"),
        ({"quantization_config": {"bits": 2}}, "quantization_config.quant_method is missing"),
        ({"quantization_config": []}, "quantization_config is [], expected dict"),
        ({"quantization_config": MULTIPLY | {"use_rms_norm": True}}, "use_rms_norm is True, expected False"),
        ({"quantization_config": MULTIPLY | {"linear_class": "x"}}, "has linear_class 'x' and quantization_mode"),
        ({"quantization_config": MULTIPLY | {"quantization_mode": "x"}}, "and quantization_mode 'x', expected"),
        (
            {"quantization_config": MULTIPLY | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"]}},
            "modules_to_not_convert lists 'model.layers.0.mlp.up_proj', but every product must be ternary",
        ),
    ],
)
def test_refused_configurations(tmp_path, packed, change, message):
    folder = save(tmp_path, config_json(BITNET, MULTIPLY) | change, packed.tensors)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(folder)
    assert str(e.value).startswith(f"{folder / 'config.json'}: ")
    assert message in str(e.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000, None])
def test_unreadable_configurations(tmp_path, packed, content):
    folder = save(tmp_path, {}, packed.tensors)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"config.json: (not a readable JSON file|expected a JSON object)"):
            load_checkpoint(path)


def test_any_value_in_the_configuration(tmp_path, packed):
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 8.0, **FACTORS}
    folder = save(tmp_path, {}, packed.tensors)
    configs = list(damaged_json(config_json(BITNET, MULTIPLY, rope_scaling=longrope, head_dim=16)))
    refused = 0
    for damaged in configs:
        (folder / "config.json").write_text(json.dumps(damaged))
        refused += read_or_refused(lambda: read_all(load_checkpoint(folder)), folder)
    assert 0.5 * len(configs) < refused < len(configs)


def test_no_code_is_run(tmp_path, packed):
    """Remote code beside the weights, as transformers would run it when told to."""
    config = config_json(BITNET, MULTIPLY, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    folder = save(tmp_path, config, packed.tensors)
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    read_all(load_checkpoint(folder))
    assert not (tmp_path / "ran").exists()


# ---- refused tensors ------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{DOWN}.weight": None}, f"tensor {DOWN}.weight is missing"),
        ({f"{DOWN}.weight_scale": None}, f"tensor {DOWN}.weight_scale is missing"),
        ({"model.norm.weight": None}, "tensor model.norm.weight is missing"),
        ({"model.embed_tokens.weight": None}, "tensor model.embed_tokens.weight is missing"),
        (
            {"model.layers.1.mlp.ffn_sub_norm.weight": None},
            "tensor model.layers.1.mlp.ffn_sub_norm.weight is missing",
        ),
        (
            {f"{Q}.weight": np.zeros((64, 64), np.uint8)},
            f"tensor {Q}.weight is uint8 [64, 64], but the configuration needs uint8 [16, 64]",
        ),
        (
            {f"{Q}.weight": np.zeros((64, 64), BF16)},
            f"tensor {Q}.weight is bfloat16 [64, 64], but the configuration needs uint8 [16, 64]",
        ),
        ({f"{Q}.weight_scale": np.ones(2, BF16)}, f"tensor {Q}.weight_scale has shape [2], expected one element"),
        ({f"{Q}.weight_scale": np.ones(1)}, f"tensor {Q}.weight_scale is float64 [1], but the configuration needs"),
        ({"model.norm.weight": np.ones(64, np.int8)}, "tensor model.norm.weight is int8 [64], but the configuration"),
        ({f"{Q}.bias": np.ones(64, BF16)}, f"tensor {Q}.bias: this decoder has no place for it"),
        ({f"{Q}.rms_norm.weight": np.ones(64, BF16)}, f"tensor {Q}.rms_norm.weight: this decoder has no place"),
        (
            {"model.layers.2.mlp.up_proj.weight": np.ones((16, 16), np.uint8)},
            "tensor model.layers.2.mlp.up_proj.weight: this decoder has no place for it",
        ),
        ({"evil\x1b[2J\ntensor": np.ones(1)}, r"tensor 'evil\x1b[2J\ntensor': this decoder has no place for it"),
    ],
)
def test_refused_headers(tmp_path, packed, change, message):
    """Before anything is returned, whether in one file or in shards."""
    tensors = {name: t for name, t in (packed.tensors | change).items() if t is not None}
    one = save(tmp_path / "one", config_json(BITNET, MULTIPLY), tensors)
    index = shard(tmp_path / "shards", config_json(BITNET, MULTIPLY), tensors)
    for folder in (one, index.parent):
        with pytest.raises(CheckpointError) as e:
            load_checkpoint(folder)
        assert str(e.value).startswith(f"{folder / 'model'}")
        assert message in str(e.value)


def test_more_layers_than_there_are(tmp_path, packed):
    folder = save(tmp_path, config_json(BITNET, MULTIPLY, num_hidden_layers=2**60), packed.tensors)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.input_layernorm.weight is missing"):
        load_checkpoint(folder)


def test_a_head_that_is_missing(tmp_path, packed):
    folder = save(tmp_path, config_json(BITNET, MULTIPLY, tie_word_embeddings=False), packed.tensors)
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight is missing"):
        load_checkpoint(folder)


def test_rows_that_cannot_be_packed(tmp_path):
    c = dataclasses.replace(TINY, intermediate_size=94)
    folder = save(tmp_path, config_json(c, MULTIPLY), model(TINY, "multiply").tensors)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight: 94 rows cannot be packed by four"):
        load_checkpoint(folder)


def poked(t: np.ndarray, index: Any, value: Any) -> np.ndarray:
    t = t.copy()
    t[index] = value
    return t


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        (
            f"{Q}.weight",
            (3, 5),
            0b00_11_01_00,
            f"tensor {Q}.weight: byte [3, 5] holds the code 3 for weight [35, 5], expected 0, 1 or 2",
        ),
        (f"{Q}.weight", ..., 0x00, f"tensor {Q}.weight: every weight is -1, which no trained model has"),
        (f"{Q}.weight", ..., 0x55, f"tensor {Q}.weight: every weight is 0, which no trained model has"),
        (f"{Q}.weight_scale", 0, 0, f"tensor {Q}.weight_scale is 0.0, expected a finite number that is not 0"),
        (f"{Q}.weight_scale", 0, np.nan, f"tensor {Q}.weight_scale is nan, expected a finite number"),
        (f"{Q}.weight_scale", 0, np.inf, f"tensor {Q}.weight_scale is inf, expected a finite number"),
        (
            "model.layers.1.mlp.ffn_sub_norm.weight",
            95,
            -np.inf,
            "ffn_sub_norm.weight holds a value that is not finite, -inf at [95]",
        ),
    ],
)
@pytest.mark.parametrize("quantisation", [MULTIPLY, DIVIDE])
def test_refused_values(tmp_path, packed, name, index, value, message, quantisation):
    """When the layer is read; the one in front of it is readable."""
    tensors = packed.tensors | {name: poked(packed.tensors[name], index, value)}
    folder = save(tmp_path, config_json(BITNET, quantisation), tensors)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.layers[0].qkv.shape == (128, 64)
    with pytest.raises(CheckpointError) as e:
        checkpoint.layers[1]
    assert str(e.value).startswith(f"{folder / 'model.safetensors'}: ")
    assert message in str(e.value)


def test_a_scale_whose_inverse_is_infinite(tmp_path):
    tensors = model(TINY, "multiply", np.float32).tensors
    tensors[f"{DOWN}.weight_scale"] = np.array([9e-41], np.float32)
    checkpoint = load_checkpoint(save(tmp_path, config_json(TINY, DIVIDE), tensors))
    with pytest.raises(CheckpointError, match=r"down_proj.weight_scale is .*e-41, expected a finite number"):
        checkpoint.layers[0]


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ((7, 9), np.nan, r"w\[7, 9\] is nan, expected a finite float32"),
        (..., 0, "every weight is 0, which no trained model has"),
        (..., 1e-9, "every weight is 0, which no trained model has"),
    ],
)
def test_refused_master_weights(tmp_path, index, value, message):
    tensors = model(TINY, "float").tensors
    tensors[f"{Q}.weight"] = poked(tensors[f"{Q}.weight"], index, value)
    checkpoint = load_checkpoint(save(tmp_path, config_json(TINY, ONLINE), tensors))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: tensor {Q}.weight: {message}"):
        checkpoint.layers[1]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_refused_rows(tmp_path, name):
    c = dataclasses.replace(TINY, tied_head=False)
    tensors = model(c, "float").tensors
    tensors[name] = poked(tensors[name], (39, 1), np.inf)
    checkpoint = load_checkpoint(save(tmp_path, config_json(c), tensors))
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds a value that is not finite, inf at \[39, 1\]"):
        read_all(checkpoint)


# ---- damaged containers ---------------------------------------------------------------------------------------------


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(first: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - first] if shape is None else shape, "data_offsets": [first, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (container({}, length=2**63), "a header of 9223372036854775808 bytes does not fit a file of 10"),
        (container({}, length=3), "a header of 3 bytes does not fit a file of 10"),
        (container(b"{" + b" " * 20), "its header is not JSON"),
        (container(b'{"a' + b"\xff" * 20), "its header is not JSON"),
        (container(b'{"a":' + b"[" * 100_000), "its header is not JSON"),
        (container(b'{"a": {}, "a": {}}'), "its header is not JSON: a key stands there twice"),
        (container({"__metadata__": {"a": 1}}), "its __metadata__ is not an object of texts"),
        (container({"a": entry(0, 4) | {"more": 1}}, bytes(4)), "tensor a: expected dtype, shape and data_offsets"),
        (container({"a": 3}), "tensor a: expected dtype, shape and data_offsets"),
        (container({"a": entry(0, 4, dtype="U9")}, bytes(4)), "tensor a: unknown dtype 'U9'"),
        (container({"a": entry(0, 4, [2, -2])}, bytes(4)), "tensor a: shape [2, -2] or data_offsets [0, 4] make no"),
        (container({"a": entry(0, 4, [2.0, 2])}, bytes(4)), "tensor a: shape [2.0, 2] or data_offsets [0, 4] make no"),
        (container({"a": entry(0, 4, [1] * 65)}, bytes(4)), "make no sense"),
        (
            container({"a": entry(0, 4, [0] * 2)}, bytes(4)),
            "tensor a: U8 [0, 0] is 0 bytes, but its offsets are [0, 4]",
        ),
        (container({"a": entry(-4, 0)}, bytes(4)), "make no sense"),
        (container({"a": entry(4, 0, [1])}, bytes(4)), "tensor a: U8 [1] is 1 bytes, but its offsets are [4, 0]"),
        (container({"a": entry(0, 2**70, [2**35, 2**35])}, bytes(4)), "make no sense"),
        (container({"a": entry(0, 2**60)}, bytes(4)), "truncated: tensor a ends at byte"),
        (container({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)), "tensor b overlaps the one in front of it"),
        (container({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "tensor b overlaps the one in front of it"),
        (container({"a": entry(0, 4), "b": entry(5, 6)}, bytes(6)), "tensor b leaves a gap in front of it"),
        (container({"a": entry(0, 4)}, bytes(6)), "2 bytes at its end belong to no tensor"),
        (container({"a": entry(0, 4)}, bytes(3)), "truncated: tensor a ends at byte"),
    ],
)
def test_broken_containers(tmp_path, content, message):
    path = written(tmp_path / "broken.safetensors", content)
    for read in (load_checkpoint, compact.read):
        with pytest.raises(CheckpointError) as e:
            read(path)
        assert str(e.value).startswith(f"{path}: not a readable safetensors file: ")
        assert message in str(e.value)


@pytest.mark.parametrize("body", ["multiply", "float"])
def test_fuzzed(tmp_path, body):
    c = dataclasses.replace(BITNET, num_layers=1)
    folder = save(tmp_path, config_json(c, MULTIPLY if body == "multiply" else None), model(c, body).tensors)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    fuzz(path, data, lambda p: read_all(huggingface.read(p)), header=2 * header)


# ---- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.clear(), "weight_map is missing, or not an object"),
        (
            lambda m: m.update({f"{Q}.weight": "../model.safetensors"}),
            "'../model.safetensors', expected a file in this",
        ),
        (lambda m: m.update({f"{Q}.weight": "/etc/passwd"}), "is in '/etc/passwd', expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": ".."}), "is in '..', expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": ""}), "is in '', expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": "a\0b"}), "expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": "\ud800"}), "expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": 3}), "is in 3, expected a file in this folder"),
        (lambda m: m.update({f"{Q}.weight": "model-9.safetensors"}), "the shard model-9.safetensors is missing"),
        (
            lambda m: m.update({"more": "model-00001-of-00003.safetensors"}),
            "tensor more is missing, but model.safetens",
        ),
        (
            lambda m: m.pop(f"{Q}.weight"),
            f"tensor {Q}.weight is here, but model.safetensors.index.json does not say so",
        ),
    ],
)
def test_wrong_indices(tmp_path, packed, change, message):
    index = shard(tmp_path / "tiny", config_json(BITNET, MULTIPLY), packed.tensors)
    values = json.loads(index.read_text())
    change(values["weight_map"])
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(tmp_path / "tiny")
    assert str(e.value).startswith(str(tmp_path / "tiny" / "model"))
    assert message in str(e.value)


def test_any_index(tmp_path, packed):
    index = shard(tmp_path / "tiny", config_json(BITNET, MULTIPLY), packed.tensors)
    values = json.loads(index.read_text())
    last = {f"{Q}.weight": values["weight_map"].pop(f"{Q}.weight")}
    indices = [{"weight_map": values["weight_map"] | odd} for odd in damaged_json(last)]
    for odd in [*indices, [], {}, {"weight_map": []}, {"weight_map": {"x": "tiny"}}]:
        index.write_text(json.dumps(odd))
        assert read_or_refused(lambda: load_checkpoint(tmp_path / "tiny"), tmp_path)
    index.write_bytes(b"{" * 50)
    with pytest.raises(CheckpointError, match=r"index.json: not a readable JSON file"):
        load_checkpoint(index)


def test_a_tensor_in_two_shards(tmp_path, packed):
    index = shard(tmp_path / "tiny", config_json(BITNET, MULTIPLY), packed.tensors)
    place = json.loads(index.read_text())["weight_map"][f"{Q}.weight"]
    other = next(p for p in index.parent.glob("*.safetensors") if p.name != place)
    tensors = safetensors_numpy.load_file(other) | {f"{Q}.weight": packed.tensors[f"{Q}.weight"]}
    other.write_bytes(safetensors_numpy.save(tensors))
    with pytest.raises(CheckpointError, match=rf"{other.name}: tensor {Q}.weight is here, but"):
        load_checkpoint(index)


def test_a_truncated_shard(tmp_path, packed):
    index = shard(tmp_path / "tiny", config_json(BITNET, MULTIPLY), packed.tensors)
    path = index.parent / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003.safetensors: not a readable .*: truncated: tensor"
    ):
        load_checkpoint(index.parent)


# ---- writing --------------------------------------------------------------------------------------------------------


def random(config: ModelConfig, head: str = "bfloat16") -> Checkpoint:
    """With a scale for each part of a stacked product, as quantised checkpoints have it."""
    checkpoint = Checkpoint.random(config, seed=2, head=head)
    parts = {"qkv": (config.q_rows, config.kv_rows, config.kv_rows), "up": (config.intermediate_size,) * 2}
    layers = []
    for i, layer in enumerate(checkpoint.layers):
        fields = {}
        for name, rows in parts.items():
            weight: TernaryWeight = getattr(layer, name)
            scale = np.repeat(np.float32([1 / 3, 0.7, 1e-3])[: len(rows)] * np.float32(i + 1), rows)
            fields[name] = TernaryWeight.from_packed(weight.packed, scale, weight.shape)
        layers.append(dataclasses.replace(layer, **fields))
    return dataclasses.replace(checkpoint, layers=layers)


SCALINGS = [
    None,
    RopeScaling("linear", 2.5),
    RopeScaling("dynamic", 2.0, 512),
    RopeScaling("llama3", 8.0, 128, low_freq_factor=1.5, high_freq_factor=5.0),
    RopeScaling("yarn", 4.0, 128),
    RopeScaling("yarn", 4.0, 128, 1.0, 4.0, 16.0, 2.0, 1.0, 0.5, False, 1.5),
    RopeScaling("longrope", 8.0, 64, **TUPLES),
    RopeScaling("longrope", 8.0, 64, attention_factor=1.25, **TUPLES),
]


@pytest.mark.parametrize("head", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("config", [TINY, BITNET, dataclasses.replace(TINY, head_dim=6, hidden_size=65 * 4)])
def test_round_trip(tmp_path, config, tied, head):
    config = dataclasses.replace(config, tied_head=tied)
    checkpoint = random(config, head)
    huggingface.write(checkpoint, folder := tmp_path / "tiny")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    read = load_checkpoint(folder)
    assert read.config == config
    assert read.source == "tiny"
    assert_same_layers(read, checkpoint, one_scale_is_many=True)
    assert_same_array(read.final_norm, checkpoint.final_norm)
    assert_same_array(read.embedding.values, checkpoint.embedding.values)
    assert_same_array(read.head.values, checkpoint.head.values)

    huggingface.write(read, tmp_path / "tiny2")
    assert (tmp_path / "tiny2" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # And through the other format.
    compact.write(read, tmp_path / "compact")
    assert_same(compact.read(tmp_path / "compact"), read)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: "none" if s is None else s.kind)
def test_round_trip_of_the_rotary_embedding(tmp_path, scaling):
    config = dataclasses.replace(TINY, rope_scaling=scaling)
    huggingface.write(random(config), tmp_path / "tiny")
    assert load_checkpoint(tmp_path / "tiny").config == config


def test_what_is_written(tmp_path):
    """By name and byte, as transformers reads it."""
    checkpoint = random(BITNET)
    huggingface.write(checkpoint, tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["quantization_config"] == MULTIPLY | {"modules_to_not_convert": ["lm_head"]}
    assert config["torch_dtype"] == "bfloat16"
    assert config.items() >= config_json(BITNET).items()
    tensors = safetensors_numpy.load_file(tmp_path / "tiny" / "model.safetensors")
    assert tensors.keys() == model(BITNET, "multiply").tensors.keys()
    t = checkpoint.layers[1].qkv.to_int8()[64:96]
    name = "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(tensors[f"{name}.weight"], pack(t))
    assert_same_array(tensors[f"{name}.weight_scale"], np.float32([0.7]) * np.float32(2))


def test_int8_rows_become_float32(tmp_path):
    checkpoint = random(TINY, "int8")
    huggingface.write(checkpoint, tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["torch_dtype"] == "float32"
    assert_same_array(load_checkpoint(tmp_path / "tiny").embedding.values, checkpoint.embedding.to_float())


def test_int8_rows_are_written_in_pieces(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=40_000)
    checkpoint = Checkpoint.random(config, head="int8")
    rows = checkpoint.embedding
    checkpoint = dataclasses.replace(checkpoint, read_embedding=lambda: rows, read_head=lambda: rows)
    tracemalloc.start()
    try:
        huggingface.write(checkpoint, tmp_path / "tiny")
        assert tracemalloc.get_traced_memory()[1] < 2 * rows.nbytes
    finally:
        tracemalloc.stop()
    assert_same_array(load_checkpoint(tmp_path / "tiny").embedding.values, rows.to_float())


def test_messages_name_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "tiny/.partial/x")

    monkeypatch.setattr(huggingface, "_write_tensors", full)
    with pytest.raises(CheckpointError) as e:
        huggingface.write(random(TINY), tmp_path / "tiny")
    assert str(e.value) == f"{tmp_path / 'tiny' / 'model.safetensors'}: cannot be written: No space left on device"
    assert not any(tmp_path.iterdir())


def test_other_files_come_into_the_folder_too(tmp_path):
    (tmp_path / "tiny").mkdir()
    inode = (tmp_path / "tiny").stat().st_ino
    huggingface.write(random(TINY), tmp_path / "tiny", {"tokenizer.json": b"{}"})
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == names
    assert (tmp_path / "tiny" / "tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "tiny").stat().st_ino == inode  # whoever stands in it still does
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(TINY, gated=False), "an FFN without a gate"),
        (dataclasses.replace(TINY, intermediate_size=98), "mlp.gate_proj: 98 rows cannot be packed by four"),
        (
            dataclasses.replace(TINY, rope_scaling=RopeScaling("dynamic", 2.0, 64)),
            "dynamic rotary scaling from 64 tokens in a model of 512",
        ),
    ],
)
def test_configurations_that_have_no_place(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=f"tiny: cannot be written: .*{message}"):
        huggingface.write(Checkpoint.random(config, head="float16"), tmp_path / "tiny")
    assert not any(tmp_path.iterdir())


def test_scales_that_have_no_place(tmp_path):
    checkpoint = random(TINY)
    scale = checkpoint.layers[1].qkv.scale.copy()
    scale[95] *= 2  # the last row of the keys
    qkv = TernaryWeight.from_packed(checkpoint.layers[1].qkv.packed, scale, (128, 64))
    layers = [checkpoint.layers[0], dataclasses.replace(checkpoint.layers[1], qkv=qkv)]
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_proj: its rows have different scales"):
        huggingface.write(dataclasses.replace(checkpoint, layers=layers), tmp_path / "tiny")
    assert not any(tmp_path.iterdir())


def test_a_constant_matrix_is_not_written(tmp_path):
    checkpoint = random(TINY)
    down = TernaryWeight.from_int8(np.zeros((64, 96), np.int8))
    layers = [checkpoint.layers[0], dataclasses.replace(checkpoint.layers[1], down=down)]
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj: every weight is 0, which no trained model has"):
        huggingface.write(dataclasses.replace(checkpoint, layers=layers), tmp_path / "tiny")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "tiny").mkdir()
    huggingface.write(random(TINY), tmp_path / "tiny")  # empty: fine
    before = {p.name: p.read_bytes() for p in (tmp_path / "tiny").iterdir()}
    for path in (tmp_path / "tiny", written(tmp_path / "file", b"x")):
        with pytest.raises(CheckpointError, match="exists already and is not an empty folder"):
            huggingface.write(random(BITNET), path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "tiny").iterdir()} == before
    with pytest.raises(CheckpointError, match=r"tiny: cannot be written: .*No such file"):
        huggingface.write(random(TINY), tmp_path / "nowhere" / "tiny")
    shutil.rmtree(tmp_path / "tiny")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_writing_holds_one_layer(tmp_path):
    config = ModelConfig("wide", 24, 512, 1024, 8, 4, 64, vocab_size=2048)
    checkpoint = Checkpoint.random(dataclasses.replace(config, num_layers=1), head="bfloat16")
    layer, rows = checkpoint.layers[0], Rows(checkpoint.embedding.values)
    largest = rows.nbytes
    checkpoint = dataclasses.replace(
        checkpoint, config=config, layers=[layer] * 24, read_embedding=lambda: rows, read_head=lambda: rows
    )
    assert checkpoint.body_bytes > 5 * largest
    tracemalloc.start()
    try:
        huggingface.write(checkpoint, tmp_path / "wide")
        assert tracemalloc.get_traced_memory()[1] < 2 * largest
    finally:
        tracemalloc.stop()
