"""The decoder on a real GPU: graphs, tokens and the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import count_launches

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.random(replace(ec.ModelConfig.preset("smollm-135m"), num_layers=4, vocab_size=4000), seed=3)


def test_sixty_four_greedy_tokens_equal_the_reference(checkpoint):
    prompt = np.random.default_rng(0).integers(0, 4000, 20)
    model = ec.TernaryTransformer(checkpoint, dtype="float32", activation="float")
    reference = ec.reference.TernaryTransformer(checkpoint, activation="float")
    assert list(model.generate(prompt, 64)) == list(reference.generate(prompt, 64))


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
    assert counter.graph_kernels == 4 * 8 + 5
    assert cache.length == 5


def test_batch_equals_single_sequences(checkpoint):
    model = ec.TernaryTransformer(checkpoint, dtype="float32")
    prompts = np.random.default_rng(1).integers(0, 4000, (3, 12))
    together = model.new_cache(40, batch=3)
    model.prefill(prompts, together)
    token = together.token
    for _ in range(4):
        token = model.decode_one_token(token, together)
    for row, prompt in enumerate(prompts):
        alone = model.new_cache(40)
        model.prefill(prompt, alone)
        token = alone.token
        for _ in range(4):
            token = model.decode_one_token(token, alone)
        np.testing.assert_allclose(together.logits[row].get(), alone.logits[0].get(), rtol=0, atol=1e-4)


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
