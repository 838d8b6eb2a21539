"""Tests that came out of the mutation check (tests/mutation): faults that the other tests let pass."""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.arguments import ACTIVATIONS
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.tuning.decoder import ARGMAX, ATTENTION_THREADS, LM_HEAD, THREADS, attention_spec, combine_spec
from edgellm_cupy.tuning.product import norm_spec, product_launch
from tests.emulated import H200, emulated_gpu
from tests.emulator import Emulator, Output, Scratch

MODEL = ec.ModelConfig("tiny", 1, 72, 8, num_heads=6, num_kv_heads=2, head_dim=12, vocab_size=8)
ATTENTION, COMBINE = (spec(MODEL, "float32").name for spec in (attention_spec, combine_spec))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    specs = [ARGMAX, LM_HEAD, attention_spec(MODEL, "float32"), combine_spec(MODEL, "float32"), norm_spec("float16")]
    specs += [
        product_launch(20, 1, 772, "float16", "float16", True, activation, H200).launch.spec
        for activation in ACTIVATIONS
    ]
    emulator.build(specs)
    return emulator


@pytest.mark.parametrize("sign", [1, -1])
def test_the_greedy_choice_sees_the_last_bit(emulator, sign):
    """Two logits that are neighbours as floats, the larger one behind: not a tie."""
    logits = np.full((1, 2 * THREADS), sign, np.float32)
    logits[0, 400] = np.nextafter(logits[0, 400], np.float32(np.inf))
    best = np.zeros(1, np.uint64)
    emulator.launch_in_orders(ARGMAX.name, (2, 1), THREADS, [logits, best, np.int32(logits.shape[1])])
    assert ~best.astype(np.uint32) == 400


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("length", [63, 130, 290])
def test_contexts_that_need_more_splits_than_the_grid_has_or_fewer(emulator, length, splits):
    """A block also takes more keys than it has threads; shares beyond those in use stay poisoned."""
    rng = np.random.default_rng(length)
    heads, kv_heads, dim = MODEL.num_heads, MODEL.num_kv_heads, MODEL.head_dim
    q = rng.standard_normal((1, heads * dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, 1, kv_heads, length + 1, dim)).astype(np.float32)
    keys *= np.linspace(0.1, 4, length + 1, dtype=np.float32)[:, None]  # the running maximum keeps rising
    device_length, one = np.array([length], np.int32), np.int32(1)
    partial, out = np.empty((1, heads, splits, dim + 2), np.float32), np.empty((1, heads * dim), np.float32)
    sizes = [np.int32(kv_heads), np.int32(length + 1), np.float32(0.5)]
    args = [q, np.int32(heads * dim), keys, values, device_length, one, *sizes, Scratch(partial)]
    emulator.launch(ATTENTION, (splits, kv_heads), ATTENTION_THREADS, args)
    emulator.launch(COMBINE, heads, dim, [partial, device_length, one, np.int32(splits), Output(out)])

    scores = 0.5 * np.einsum("hgd,hkd->hgk", q.reshape(kv_heads, -1, dim).astype(np.float64), keys[0])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hgk,hkd->hgd", weights / weights.sum(-1, keepdims=True), values[0])
    np.testing.assert_allclose(out.reshape(expected.shape), expected, rtol=0, atol=1e-5)


def test_one_block_computes_all_rows_of_the_head(emulator):
    """So it is with more tokens than blocks fit the GPU at a time."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16)).astype(np.float32)
    values = rng.integers(-127, 128, (THREADS, 16), dtype=np.int8)
    scale, logits = np.ones(THREADS, np.float32), np.empty((1, THREADS), np.float32)
    args = [x, values, scale, Output(logits), np.int32(THREADS), np.int32(16)]
    emulator.launch(LM_HEAD.name, 1, THREADS, args, shared=64)
    np.testing.assert_allclose(logits, x @ values.T.astype(np.float32), rtol=0, atol=1e-3)


@pytest.mark.parametrize("start", [1, 2, 4])
def test_gamma_aligned_for_four_halves_and_not_for_four_floats(emulator, start):
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((2, 128)).astype(np.float16), rng.uniform(0.5, 1.5, 132).astype(np.float32)
    gamma = gamma[start : start + 128]
    with emulated_gpu(emulator):
        y = ec.rmsnorm(x, gamma, 1e-5)
    message = check(y, x, gamma, eps=1e-5)
    assert message is None, message


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registers_beyond_the_token_add_nothing_to_its_squares(emulator, activation):
    """Threads beyond K hold zeros; were it float16's smallest number, this token would show it."""
    rng = np.random.default_rng(0)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (20, 772), dtype=np.int8))
    x, gamma = np.zeros((1, 772), np.float16), np.ones(772, np.float16)
    x[0, 7] = 1e-6
    with emulated_gpu(emulator):
        y = ec.rmsnorm_ternary_matmul(x, gamma, weight, 0.0, activation)
    message = check(y, x, gamma, weight, eps=0.0, activation=activation)
    assert message is None, message
