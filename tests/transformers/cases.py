"""Small random models, made from a seed with NumPy alone, that Hugging Face transformers and our reference both run.

Shared by the script that records what transformers answers (tests/data/make_transformers_golden.py), the tests that
compare our answers with the record (tests/cpu/test_transformers.py) and those that run transformers itself
(test_live.py here).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_cupy import ModelConfig, TernaryWeight
from edgellm_cupy.formats.checkpoint import Checkpoint, LayerWeights, Rows
from edgellm_cupy.formats.rotary import RopeScaling
from edgellm_cupy.formats.ternary import concatenate

DATA = Path(__file__).parents[1] / "data"
SEED = 0
"""No int8 activation of a run lies so near a tie that float32 and float64 round it to different sides. With a seed
where one does, the logits of two right decoders differ by a thousandth."""

PROMPT_TOKENS, TOKENS = 20, 28  # a prompt, and the tokens that follow one by one


def _config(name: str, **changes: Any) -> ModelConfig:
    """Every size differs from every other that it could be mistaken for."""
    sizes: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 83,
        "rms_eps": 1e-3,  # large enough to be seen when it is left out
        "max_context": 128,
        "tied_head": False,
    }
    return ModelConfig(name=name, **{**sizes, **changes})


_FACTORS = tuple(1 + 0.25 * i for i in range(8)), tuple(1.5 + 2.0 * i for i in range(8))

# The original contexts are shorter than the tokens that are run, so that each scaling acts.
CONFIGS = {
    config.name: config
    for config in (
        _config("llama"),
        _config("llama-tied-wide-heads", tied_head=True, head_dim=24, rope_theta=5e5),
        _config("llama-linear", rope_scaling=RopeScaling("linear", 4.0)),
        # Dynamic: token by token the same; a prompt within the original context has no scaling yet.
        _config("llama-dynamic", rope_scaling=RopeScaling("dynamic", 2.0, PROMPT_TOKENS), max_context=PROMPT_TOKENS),
        _config("llama-llama3", rope_scaling=RopeScaling("llama3", 8.0, 16), rope_theta=5e5),
        _config("llama-yarn", rope_scaling=RopeScaling("yarn", 8.0, 16)),
        _config(
            "llama-longrope",
            rope_scaling=RopeScaling("longrope", 8.0, 16, short_factor=_FACTORS[0], long_factor=_FACTORS[1]),
        ),
        _config("bitnet", ffn_activation="relu2", sub_norms=True, rope_theta=5e5),
        _config("bitnet-tied", ffn_activation="relu2", sub_norms=True, tied_head=True, num_kv_heads=4),
    )
}

# What is run of them. "float": the dequantised matrices in ordinary linear layers. The others are transformers' own
# BitNet layers, with int8 activations, as a checkpoint on the disk selects them: "divide" BitLinear, "multiply"
# AutoBitLinear with packed weights, "online" AutoBitLinear that quantises float weights.
RUNS = [(name, "float") for name in CONFIGS] + [
    (name, mode) for name in ("llama", "bitnet") for mode in ("divide", "multiply", "online")
]


@dataclass(frozen=True)
class Tensors:
    """Weights by their names at Hugging Face.

    Attributes:
        floats: float32, norms, embedding and head.
        ternary: (int8 [M, K], scale) with W = scale * t.
        masters: float32 [M, K], what "online" quantises with absmean. Of the same names, and otherwise unrelated.
    """

    floats: dict[str, np.ndarray] = field(default_factory=dict)
    ternary: dict[str, tuple[np.ndarray, float]] = field(default_factory=dict)
    masters: dict[str, np.ndarray] = field(default_factory=dict)


def tensors(c: ModelConfig) -> Tensors:
    """Weights of unit gain; each matrix has a scale of its own, far from its reciprocal."""
    rng, made = np.random.default_rng(SEED), Tensors()

    def norm(name: str, k: int) -> None:
        made.floats[f"{name}.weight"] = rng.uniform(0.5, 1.5, k).astype(np.float32)

    def product(name: str, m: int, k: int) -> None:
        scale = float(np.float32(rng.uniform(0.7, 1.4) * np.sqrt(1.5 / k)))
        made.ternary[f"{name}.weight"] = rng.integers(-1, 2, (m, k), dtype=np.int8), scale
        made.masters[f"{name}.weight"] = (scale * rng.standard_normal((m, k))).astype(np.float32)

    def rows(name: str, size: float) -> None:
        made.floats[f"{name}.weight"] = (size * rng.standard_normal((c.vocab_size, c.hidden_size))).astype(np.float32)

    rows("model.embed_tokens", 1.0)
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm", c.hidden_size)
        norm(f"{layer}.post_attention_layernorm", c.hidden_size)
        product(f"{layer}.self_attn.q_proj", c.q_rows, c.hidden_size)
        product(f"{layer}.self_attn.k_proj", c.kv_rows, c.hidden_size)
        product(f"{layer}.self_attn.v_proj", c.kv_rows, c.hidden_size)
        product(f"{layer}.self_attn.o_proj", c.hidden_size, c.q_rows)
        product(f"{layer}.mlp.gate_proj", c.intermediate_size, c.hidden_size)
        product(f"{layer}.mlp.up_proj", c.intermediate_size, c.hidden_size)
        product(f"{layer}.mlp.down_proj", c.hidden_size, c.intermediate_size)
        if c.sub_norms:
            norm(f"{layer}.self_attn.attn_sub_norm", c.q_rows)
            norm(f"{layer}.mlp.ffn_sub_norm", c.intermediate_size)
    norm("model.norm", c.hidden_size)
    if not c.tied_head:
        rows("lm_head", c.hidden_size**-0.5)
    return made


def tokens(c: ModelConfig) -> np.ndarray:
    """int64 [TOKENS]."""
    return np.random.default_rng((SEED, 1)).integers(0, c.vocab_size, TOKENS)


def checkpoint(c: ModelConfig, made: Tensors, mode: str = "float") -> Checkpoint:
    """The model as ours."""

    def one(name: str) -> TernaryWeight:
        return (
            TernaryWeight.from_float(made.masters[name])
            if mode == "online"
            else TernaryWeight.from_int8(*made.ternary[name])
        )

    def weight(*names: str) -> TernaryWeight:
        return concatenate([one(f"{name}.weight") for name in names])

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            attn_norm=made.floats[f"{prefix}.input_layernorm.weight"],
            qkv=weight(*(f"{attention}.{part}_proj" for part in "qkv")),
            out=weight(f"{attention}.o_proj"),
            ffn_norm=made.floats[f"{prefix}.post_attention_layernorm.weight"],
            up=weight(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=weight(f"{mlp}.down_proj"),
            attn_sub_norm=made.floats.get(f"{attention}.attn_sub_norm.weight"),
            ffn_sub_norm=made.floats.get(f"{mlp}.ffn_sub_norm.weight"),
        )

    def rows(name: str) -> Any:
        return lambda: Rows(made.floats[name])

    embedding = rows("model.embed_tokens.weight")
    return Checkpoint(
        config=c,
        layers=[layer(i) for i in range(c.num_layers)],
        final_norm=made.floats["model.norm.weight"],
        source="random",
        read_embedding=embedding,
        read_head=embedding if c.tied_head else rows("lm_head.weight"),
    )


# ---- as Hugging Face has it on the disk -----------------------------------------------------------------------------


def hugging_face_config(c: ModelConfig, mode: str = "float") -> dict[str, Any]:
    """What config.json of such a model holds."""
    bitnet = c.sub_norms
    values: dict[str, Any] = {
        "architectures": ["BitNetForCausalLM" if bitnet else "LlamaForCausalLM"],
        "model_type": "bitnet" if bitnet else "llama",
        "hidden_act": c.ffn_activation,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "rms_norm_eps": c.rms_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_context,
        "tie_word_embeddings": c.tied_head,
        "dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if c.rope_scaling is not None:
        values["rope_scaling"] = rope_parameters(c.rope_scaling)
    if mode != "float":
        values["quantization_config"] = {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if mode == "divide" else "autobitlinear",
            "quantization_mode": "online" if mode == "online" else "offline",
        }
    return values


def rope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """`rope_scaling` of a config.json: only what differs from the default, and under Hugging Face's names."""
    default = RopeScaling(scaling.kind, original_context=1).to_dict()
    values = {name: value for name, value in scaling.to_dict().items() if value != default[name]}
    context = values.pop("original_context", 0)
    if scaling.kind in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = context
    if scaling.kind == "llama3":
        values.update(low_freq_factor=scaling.low_freq_factor, high_freq_factor=scaling.high_freq_factor)
    lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return {**values, **lists, "rope_type": scaling.kind}


def hugging_face_tensors(made: Tensors, mode: str) -> dict[str, np.ndarray]:
    """The tensors of model.safetensors, for each mode of :data:`RUNS`."""
    stored = dict(made.floats)
    for name, (t, scale) in made.ternary.items():
        if mode in ("divide", "multiply"):
            stored[name] = packed(t)
            stored[f"{name}_scale"] = np.array([scale if mode == "multiply" else 1 / scale], np.float32)
        else:
            stored[name] = made.masters[name] if mode == "online" else t * np.float32(scale)
    return stored


def packed(t: np.ndarray) -> np.ndarray:
    """uint8 [M / 4, K]: byte row r holds the rows r, r + M/4, r + M/2 and r + 3M/4, two bits each, lowest first."""
    quarters = (t + 1).astype(np.uint8).reshape(4, -1, t.shape[1])
    return sum((quarters[i] << 2 * i for i in range(4)), np.zeros_like(quarters[0]))


def write(folder: Path, c: ModelConfig, made: Tensors, mode: str) -> Path:
    """A folder that `from_pretrained` of either side reads."""
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps(hugging_face_config(c, mode)), encoding="utf-8")
    save_file(hugging_face_tensors(made, mode), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- running and comparing ------------------------------------------------------------------------------------------


def stepwise_logits(model: Any, ids: np.ndarray, prompt: int = PROMPT_TOKENS) -> np.ndarray:
    """float32 [1 + steps, V] of our reference: after the prompt, and after each token that follows it, one by one."""
    cache = model.new_cache(len(ids))
    logits = [model.prefill(ids[:prompt], cache).copy()]
    for token in ids[prompt:]:
        model.decode_one_token(int(token), cache)
        logits.append(cache.logits[0].copy())
    return np.stack(logits)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of a logit, of all steps, over the largest logit of its step."""
    return float((np.abs(ours - theirs).max(axis=-1) / np.abs(theirs).max(axis=-1)).max())
