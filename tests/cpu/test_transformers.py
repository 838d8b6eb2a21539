"""The reference decoder against what Hugging Face transformers answered (tests/data/make_transformers_golden.py).

Small random models: the logits after a prompt and after each of the tokens that follow, of transformers' Llama and
BitNet classes with ordinary linear layers that hold the ternary matrices, and with its own quantised layers. And a real
one: the next tokens of SmolLM2-135M as it is in its GGUF file, not ternary.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import reference
from edgellm_cupy.formats import gguf, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint, Layers, LayerWeights, Rows
from tests.checkpoints import real_smollm2
from tests.transformers import cases

GOLDEN_LOGITS = cases.DATA / "transformers_logits.npz"


def error_of(model, name, mode):
    """Relative error of our logits, step by step."""
    with np.load(GOLDEN_LOGITS) as golden:
        expected = golden[f"{name} {mode}"]
    return cases.relative_error(cases.stepwise_logits(model, cases.tokens(cases.CONFIGS[name])), expected)


def model_of(name, mode, **changes):
    """`changes`: of the configuration, to what it is not."""
    config = cases.CONFIGS[name]
    checkpoint = cases.checkpoint(config, cases.tensors(config), mode)
    checkpoint = dataclasses.replace(checkpoint, config=dataclasses.replace(config, **changes))
    return reference.TernaryTransformer(checkpoint, "float" if mode == "float" else "int8")


def test_every_run_is_recorded():
    with np.load(GOLDEN_LOGITS) as golden:
        assert sorted(golden) == sorted(" ".join(run) for run in cases.RUNS)
        for run in golden.values():
            assert run.shape == (1 + cases.TOKENS - cases.PROMPT_TOKENS, 83)


@pytest.mark.parametrize(("name", "mode"), cases.RUNS)
def test_logits_are_those_of_transformers(name, mode):
    assert error_of(model_of(name, mode), name, mode) <= 1e-4


@pytest.mark.parametrize(("name", "mode"), [run for run in cases.RUNS if run[1] != "float"])
def test_logits_of_a_checkpoint_on_the_disk(name, mode, tmp_path):
    """Through our loader, which has to tell from config.json alone whether weight_scale multiplies or divides."""
    pytest.importorskip("safetensors", reason="the extra `models` is not installed")
    config = cases.CONFIGS[name]
    folder = cases.write(tmp_path, config, cases.tensors(config), mode)
    assert error_of(reference.TernaryTransformer(load_checkpoint(folder), "int8"), name, mode) <= 1e-4


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_the_configuration_of_a_checkpoint_on_the_disk(name, tmp_path):
    """Packed, of any of the configurations: also of the ones that are only run with float matrices."""
    pytest.importorskip("safetensors", reason="the extra `models` is not installed")
    config = cases.CONFIGS[name]
    read = load_checkpoint(cases.write(tmp_path, config, cases.tensors(config), "multiply")).config
    assert dataclasses.replace(read, name=config.name) == config


@pytest.mark.parametrize("name", [name for name, c in cases.CONFIGS.items() if c.rope_scaling is not None])
def test_the_comparison_sees_a_scaling_that_is_left_out(name):
    assert error_of(model_of(name, "float", rope_scaling=None), name, "float") > 1e-3


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rms_eps": 1e-5}),
        ("llama", {"rope_theta": 1.1e4}),
        ("llama", {"ffn_activation": "relu2"}),
        ("llama-tied-wide-heads", {"rope_theta": 4e5}),
        ("bitnet", {"rms_eps": 1e-5}),
        ("bitnet", {"ffn_activation": "silu"}),
    ],
)
def test_the_comparison_sees_a_wrong_configuration(name, changes):
    assert error_of(model_of(name, "float", **changes), name, "float") > 3e-4


def test_the_comparison_sees_activations_of_the_other_kind():
    for name in ("llama", "bitnet"):
        config = cases.CONFIGS[name]
        model = reference.TernaryTransformer(cases.checkpoint(config, cases.tensors(config)), "float")
        assert error_of(model, name, "multiply") > 2e-3


# ---- a real model ---------------------------------------------------------------------------------------------------


def dense_checkpoint(path: Path) -> Checkpoint:
    """A Llama with the very matrices of a GGUF file, dequantised, in place of ternary ones."""
    config, weights = gguf.read(path).config, dict(gguf.read_float(path))

    def layer(i: int) -> LayerWeights:
        prefix = f"model.layers.{i}"

        def stacked(*names):
            return np.concatenate([weights[f"{prefix}.{name}_proj.weight"] for name in names])

        return LayerWeights(
            attn_norm=weights[f"{prefix}.input_layernorm.weight"],
            qkv=stacked("self_attn.q", "self_attn.k", "self_attn.v"),
            out=stacked("self_attn.o"),
            ffn_norm=weights[f"{prefix}.post_attention_layernorm.weight"],
            up=stacked("mlp.gate", "mlp.up"),
            down=stacked("mlp.down"),
        )

    def rows() -> Rows:
        return Rows(weights["model.embed_tokens.weight"])

    layers = Layers(config.num_layers, layer)
    return Checkpoint(config, layers, weights["model.norm.weight"], path.name, rows, rows)


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf", reason="the extra `models` is not installed")
    return reference.TernaryTransformer(dense_checkpoint(real_smollm2()), activation="float")


@pytest.fixture(scope="module")
def records():
    return json.loads((cases.DATA / "smollm2_greedy.json").read_text(encoding="utf-8"))["records"]


@pytest.mark.slow
def test_real_weights_give_the_tokens_of_transformers(smollm2, records):
    """Five prompts of different length in one batch, sixteen tokens each."""
    assert len(records) == 5
    prompts = [record["prompt_ids"] for record in records]
    assert len({len(prompt) for prompt in prompts}) > 2
    steps = list(smollm2.generate(prompts, max_new_tokens=16))
    assert np.stack(steps, axis=1).tolist() == [record["greedy_ids"] for record in records]


@pytest.mark.slow
def test_real_weights_give_the_logits_of_transformers(smollm2, records):
    for record in records:
        logits = smollm2.prefill(record["prompt_ids"], smollm2.new_cache(64))
        ids, values = np.array(record["largest_logits"]).T
        np.testing.assert_array_equal(np.argsort(-logits)[: len(ids)], ids)
        np.testing.assert_allclose(logits[ids.astype(int)], values, atol=1e-4 * np.abs(values).max())
