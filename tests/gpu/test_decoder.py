"""The decoder on a real GPU: graphs, tokens and the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import Sampling
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import count_launches

pytestmark = pytest.mark.gpu

PRESETS = ("smollm-135m", "smollm-135m-notebook", "bitnet-2b4t")


def small(name: str, **changes) -> Checkpoint:
    """A preset with four layers (two of the large one) and a small vocabulary."""
    config = ec.ModelConfig.preset(name)
    layers = 2 if config.hidden_size > 1000 else 4
    return Checkpoint.random(replace(config, num_layers=layers, vocab_size=4000, **changes), seed=3)


@pytest.fixture(scope="module")
def checkpoint():
    return small("smollm-135m")


@pytest.mark.parametrize("name", PRESETS)
def test_sixty_four_greedy_tokens_equal_the_reference(name):
    checkpoint = small(name)
    prompt = np.random.default_rng(0).integers(0, 4000, 20)
    model = ec.TernaryTransformer(checkpoint, dtype="float32", activation="float")
    reference = ec.reference.TernaryTransformer(checkpoint, activation="float")
    assert list(model.generate(prompt, 64)) == list(reference.generate(prompt, 64))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_behind_prompts_on_both_sides_of_every_threshold(name, dtype):
    """Prompts through tensor cores, then tokens; contexts in one block, in a cluster, and over many blocks."""
    model = ec.TernaryTransformer(small(name), dtype=dtype, activation="float")
    reference = ec.reference.TernaryTransformer(small(name), dtype=dtype, activation="float")
    prompt = np.random.default_rng(4).integers(0, 4000, 2600)
    cache, expected = model.new_cache(2700), reference.new_cache(2700)
    for end in (1, 5, 60, 1100, 2600):
        part = prompt[expected.length : end]
        model.prefill(part, cache)
        reference.prefill(part, expected)
        for token in (5, 1000):
            error = np.linalg.norm(cache.logits.get() - expected.logits) / np.linalg.norm(expected.logits)
            assert error <= {"float16": 5e-3, "bfloat16": 4e-2}[dtype], (end, error)
            model.decode_one_token(token, cache)
            reference.decode_one_token(token, expected)


def test_a_token_is_one_graph_launch_and_stays_on_the_device(checkpoint):
    model = ec.TernaryTransformer(checkpoint)
    cache = model.new_cache(64)
    model.prefill([1, 2, 3], cache)
    token = model.decode_one_token(cache.token, cache)
    with count_launches() as counter:
        again = model.decode_one_token(token, cache)
    assert again is token is cache.token
    assert counter.graph_launches == 1
    assert not counter.by_name
    # Four products and attention, which may have a second kernel; embedding, head, next token.
    assert counter.graph_kernels in (4 * 5 + 3, 4 * 6 + 3)
    assert cache.length == 5


def test_a_long_prompt_is_a_few_launches_a_layer_and_no_square_matrix(checkpoint):
    import cupy

    model = ec.TernaryTransformer(checkpoint)
    cache = model.new_cache(32_768)
    model.prefill(np.arange(4096) % 4000, cache)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    model.prefill(np.arange(28_000) % 4000, cache)
    # A 28,000 x 28,000 matrix of float16 for one head is 1.6 GB.
    assert pool.total_bytes() - before < 200e6
    assert cache.length == 32_096
    assert np.isfinite(model.decode_one_token(cache.token, cache).get()).all()


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_batch_equals_single_sequences(checkpoint, kv_dtype):
    model = ec.TernaryTransformer(checkpoint, dtype="float32", activation="float")
    prompts = [np.random.default_rng(n).integers(0, 4000, n) for n in (12, 1, 200)]
    together = model.new_cache(240, batch=3, dtype=kv_dtype)
    model.prefill(prompts, together)
    tokens = [together.token.get()]
    tokens += [model.decode_one_token(together.token, together).get() for _ in range(4)]
    assert together.lengths == (16, 5, 204)
    for row, prompt in enumerate(prompts):
        alone = model.new_cache(240, dtype=kv_dtype)
        model.prefill(prompt, alone)
        for step in range(4):
            model.decode_one_token(int(tokens[step][row]), alone)
        largest = np.abs(alone.logits.get()).max()
        np.testing.assert_allclose(together.logits[row].get(), alone.logits[0].get(), rtol=0, atol=1e-4 * largest)


def test_sixty_four_sequences(checkpoint):
    model = ec.TernaryTransformer(checkpoint)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 4000, n) for n in rng.integers(1, 40, 64)]
    steps = list(model.generate(prompts, 5))
    assert len(steps) == 5
    assert all(tokens.shape == (64,) and (tokens >= 0).all() for tokens in steps)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=11),
        Sampling(temperature=1.0, min_p=0.05, repetition_penalty=1.2, seed=2**63),
        Sampling(temperature=1.5),
    ],
    ids=str,
)
def test_sampling_draws_what_the_reference_draws(checkpoint, sampling):
    model = ec.TernaryTransformer(checkpoint, dtype="float32", activation="float")
    reference = ec.reference.TernaryTransformer(checkpoint, activation="float")
    prompt = [7, 8, 9]
    ours, theirs = (list(m.generate(prompt, 24, sampling)) for m in (model, reference))
    assert ours == theirs
    assert ours == list(model.generate(prompt, 24, sampling))
    other = replace(sampling, seed=sampling.seed ^ 1)
    assert ours != list(model.generate(prompt, 24, other))


def test_streaming_reads_tokens_without_disturbing_them(checkpoint):
    model = ec.TernaryTransformer(checkpoint)
    streamed = list(model.generate([1, 2, 3], 40))
    cache = model.new_cache(64)
    model.prefill([1, 2, 3], cache)
    tokens = [int(cache.token[0])]
    tokens += [int(model.decode_one_token(cache.token, cache)[0]) for _ in range(39)]
    assert streamed == tokens
    assert list(model.generate([1, 2, 3], 40, stop_tokens=[tokens[5]])) == tokens[: tokens.index(tokens[5])]


def test_a_full_cache_is_an_error_and_changes_nothing(checkpoint):
    model = ec.TernaryTransformer(checkpoint)
    cache = model.new_cache(4)
    model.prefill([1, 2, 3], cache)
    model.decode_one_token(cache.token, cache)
    with pytest.raises(ec.ArgumentValueError, match="max_len = 4"):
        model.decode_one_token(cache.token, cache)
    assert cache.length == 4
    with pytest.raises(ec.ArgumentValueError, match="vocabulary = 4000"):
        model.prefill([4000], model.new_cache(4))
