"""Hugging Face transformers itself, beside our reference: runs where torch, transformers and accelerate are installed.

Elsewhere tests/cpu/test_transformers.py compares with what transformers answered when tests/data was recorded.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_cupy import TernaryWeight, reference
from edgellm_cupy.formats import load_checkpoint
from tests.cpu.test_transformers import GOLDEN_LOGITS
from tests.transformers import cases, models

REASON = "not installed; tests/cpu/test_transformers.py compares with its recorded answers"
torch = pytest.importorskip("torch", reason=f"torch is {REASON}")
transformers = pytest.importorskip("transformers", reason=f"transformers is {REASON}")
pytest.importorskip("accelerate", reason=f"accelerate, which loads quantised models, is {REASON}")
layers = transformers.integrations.bitnet


@pytest.fixture(params=cases.RUNS, ids=" ".join)
def run(request, tmp_path):
    """(config, mode, transformers' model) of a checkpoint on the disk."""
    name, mode = request.param
    config = cases.CONFIGS[name]
    folder = cases.write(tmp_path, config, cases.tensors(config), mode)
    return config, mode, models.load(folder)


def test_logits(run, tmp_path):
    config, mode, theirs = run
    expected = models.stepwise_logits(theirs, cases.tokens(config))
    activation = "float" if mode == "float" else "int8"
    made = cases.checkpoint(config, cases.tensors(config), mode)
    ours = cases.stepwise_logits(reference.TernaryTransformer(made, activation), cases.tokens(config))
    assert cases.relative_error(ours, expected) <= 1e-4
    if mode != "float":  # of float matrices our loader makes ternary ones
        ours = reference.TernaryTransformer(load_checkpoint(tmp_path), activation)
        assert cases.relative_error(cases.stepwise_logits(ours, cases.tokens(config)), expected) <= 1e-4


def test_the_record_is_what_transformers_answers(run):
    config, mode, theirs = run
    expected = models.stepwise_logits(theirs, cases.tokens(config))
    assert cases.relative_error(np.load(GOLDEN_LOGITS)[f"{config.name} {mode}"], expected) <= 1e-5


def test_the_quantised_layers_are_transformers_own(run):
    """So that the runs above compare with what they say, not with ordinary linear layers."""
    config, mode, theirs = run
    kind = {"float": torch.nn.Linear, "divide": layers.BitLinear}.get(mode, layers.AutoBitLinear)
    products = [module for name, module in theirs.named_modules() if name.endswith("_proj")]
    assert len(products) == 7 * config.num_layers
    assert {type(product) for product in products} == {kind}
    kind = transformers.BitNetForCausalLM if config.sub_norms else transformers.LlamaForCausalLM
    assert type(theirs) is kind


def test_packing():
    t = np.random.default_rng(0).integers(-1, 2, (24, 10), dtype=np.int8)
    np.testing.assert_array_equal(cases.packed(t), layers.pack_weights(torch.tensor(t)).numpy())


@pytest.mark.parametrize("k", [64, 1000])
def test_the_quantisers(k):
    """One token and one matrix at a time, in float32 on both sides: a value at a tie may differ by one unit."""
    rng = np.random.default_rng(k)
    w = rng.standard_normal((48, k)).astype(np.float32)
    weight = TernaryWeight.from_float(w)
    theirs = layers.WeightQuant.apply(torch.tensor(w)).numpy()
    np.testing.assert_allclose(weight.to_int8() * weight.scale, theirs, rtol=1e-5)
    x = rng.standard_normal((5, k)).astype(np.float32)
    y = reference.ternary_matmul(x, weight, "int8")
    expected = layers.ActQuant.apply(torch.tensor(x)).numpy() @ theirs.T
    one_unit = np.abs(x).max(axis=1, keepdims=True) / 127 * weight.scale
    assert (np.abs(y - expected) <= 1e-5 * np.abs(expected).max() + (one_unit if k > 64 else 0)).all()
