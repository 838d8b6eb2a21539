"""The GPU decoder in the emulator against the NumPy decoder, over architectures, dtypes, heads, caches and batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import Sampling
from edgellm_cupy.formats.checkpoint import Checkpoint, Layers
from edgellm_cupy.formats.rotary import RopeScaling
from tests.emulated import GPUS, H200, TINY, emulated_gpu, new_emulator
from tests.emulator import Emulator

# No size is a multiple of what a kernel takes at a time, and no two are equal.
LLAMA = ec.ModelConfig(
    name="llama",
    num_layers=2,
    hidden_size=68,
    intermediate_size=100,
    num_heads=6,
    num_kv_heads=2,
    head_dim=20,
    vocab_size=203,
)
BITNET = replace(LLAMA, name="bitnet", ffn_activation="relu2", sub_norms=True, tied_head=False)
VARIANTS = {
    "llama": LLAMA,
    "bitnet": BITNET,
    "no gate": replace(LLAMA, gated=False, num_kv_heads=6),
    "squared, no norm behind it": replace(LLAMA, ffn_activation="relu2"),
    "squared, no gate": replace(BITNET, gated=False),
    "one key head for ten queries": replace(LLAMA, num_heads=10, num_kv_heads=1, head_dim=12),
    "odd": replace(LLAMA, hidden_size=33, intermediate_size=17, num_heads=1, num_kv_heads=1, head_dim=6),
    "head of 80": replace(LLAMA, num_heads=2, num_kv_heads=1, head_dim=80),
    "stretched": replace(
        LLAMA, rope_scaling=RopeScaling("yarn", factor=4.0, original_context=16), max_context=64, num_layers=1
    ),
}
# Largest error over the largest logit. A half-precision result that lies between two numbers may be rounded either way.
BOUND = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}
PROMPTS = [[3, 7, 200, 11, 5], [9, 9, 0, 202, 1]]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return new_emulator()


def pair(emulator, config, facts=H200, seed=3, rows="float16", activation="float", dtype="float32", head="auto"):
    """The two decoders of one checkpoint; the first only inside `emulated_gpu`."""
    checkpoint = Checkpoint.random(config, seed, head=rows)
    options = {"activation": activation, "dtype": dtype, "head": head}
    return ec.TernaryTransformer(checkpoint, **options), ec.reference.TernaryTransformer(checkpoint, **options)


def assert_close(cache, expected, dtype):
    error = np.abs(cache.logits - expected.logits).max() / np.abs(expected.logits).max()
    assert error <= BOUND[dtype], error
    assert cache.lengths == expected.lengths


def run_both(model, reference, prompts, dtype="float32", steps=3, **options):
    """A prompt and some tokens through both, the same tokens, compared after each step."""
    longest = max(map(len, prompts))
    cache = model.new_cache(longest + steps, len(prompts), **options)
    expected = reference.new_cache(longest + steps, len(prompts), **options)
    model.prefill(prompts, cache)
    reference.prefill(prompts, expected)
    for _ in range(steps):
        assert_close(cache, expected, dtype)
        np.testing.assert_array_equal(cache.token, np.argmax(cache.logits, axis=1))
        token = reference.sample(expected.logits)
        model.decode_one_token(token, cache)
        reference.decode_one_token(token, expected)
    assert_close(cache, expected, dtype)
    return cache, expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_architectures(emulator, variant):
    with emulated_gpu(emulator):
        run_both(*pair(emulator, VARIANTS[variant]), PROMPTS)


@pytest.mark.parametrize("variant", ["llama", "bitnet", "one key head for ten queries", "head of 80"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(emulator, variant, dtype):
    with emulated_gpu(emulator):
        run_both(*pair(emulator, VARIANTS[variant], dtype=dtype), PROMPTS, dtype)


@pytest.mark.parametrize("variant", ["llama", "bitnet"])
def test_int8_activations(emulator, variant):
    # Seeds with which no activation lies so close to a tie of the quantiser that float32 rounding tips it over.
    with emulated_gpu(emulator):
        run_both(*pair(emulator, VARIANTS[variant], activation="int8"), PROMPTS)


@pytest.mark.parametrize("gpu", ["T4", "A100", "H200"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gpus_take_the_kernels_that_they_can(emulator, gpu, dtype):
    # bfloat16 has no tensor cores on a T4, and clusters begin with sm_90.
    with emulated_gpu(emulator, GPUS[gpu]) as device:
        run_both(*pair(emulator, LLAMA, dtype=dtype), PROMPTS, dtype)
    files = {spec.file for spec in device.launched}
    cuda_cores = gpu == "T4" and dtype == "bfloat16"
    assert ("attention_prefill.cu" in files, "attention_decode.cu" in files) == (not cuda_cores, not cuda_cores)
    assert ("attention.cu" in files) == cuda_cores


@pytest.mark.parametrize("rows", ["int8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads(emulator, rows, tied):
    with emulated_gpu(emulator):
        config = replace(LLAMA, tied_head=tied, num_layers=1)
        model, reference = pair(emulator, config, rows="float32", head=rows)
        assert model.head_dtype == reference.head_dtype == rows
        assert model.head_bytes >= reference.head_bytes  # rows are padded to whole 16 bytes
        run_both(model, reference, PROMPTS[:1], steps=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_int8_cache(emulator, dtype):
    with emulated_gpu(emulator):
        model, reference = pair(emulator, LLAMA, dtype=dtype)
        cache, expected = model.new_cache(9, 2, dtype="int8"), reference.new_cache(9, 2, dtype="int8")
        for prompts in (PROMPTS, [[8], [199]]):
            model.prefill(prompts, cache)
            reference.prefill(prompts, expected)
        stored = cache.keys[..., :6, : LLAMA.head_dim] * cache.key_scales[..., :6, None]
        # One step of the quantiser, where a rounding to the dtype or of the division tips a tie.
        np.testing.assert_allclose(stored, expected.keys[..., :6, :], rtol=0, atol=1.1 * cache.key_scales.max())
        error = np.abs(cache.logits - expected.logits).max() / np.abs(expected.logits).max()
        assert error <= {"float32": 5e-3, "float16": 2e-2, "bfloat16": 4e-2}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sequences_of_different_length(emulator, dtype):
    prompts = [[5], list(range(70)), [1, 2, 3, 4, 5, 6, 7]]
    with emulated_gpu(emulator):
        model, reference = pair(emulator, LLAMA, dtype=dtype)
        cache, expected = run_both(model, reference, prompts, dtype)
        assert cache.lengths == (4, 73, 10)
        assert cache.length == 73
        for c in (cache, expected):
            c.truncate(7)
        assert cache.lengths == (4, 7, 7)
        for m, c in ((model, cache), (reference, expected)):
            m.decode_one_token([1, 2, 3], c)
        assert_close(cache, expected, dtype)


def test_a_sequence_does_not_see_its_neighbours(emulator):
    with emulated_gpu(emulator):
        model, _ = pair(emulator, LLAMA)
        together, alone = model.new_cache(80, 2), model.new_cache(80)
        model.prefill([list(range(66)), [7, 8, 9]], together)
        model.prefill([7, 8, 9], alone)
        for token in (11, 12):
            model.decode_one_token([token + 50, token], together)
            model.decode_one_token(token, alone)
    np.testing.assert_allclose(together.logits[1], alone.logits[0], rtol=0, atol=3e-6 * np.abs(alone.logits).max())


@pytest.mark.parametrize("facts", [H200, TINY], ids=["H200", "tiny"])
def test_context_over_many_blocks(emulator, facts):
    prompt = np.random.default_rng(1).integers(0, LLAMA.vocab_size, 300)
    with emulated_gpu(emulator, facts):
        run_both(*pair(emulator, replace(LLAMA, num_layers=1), facts, dtype="float16"), [prompt], "float16", steps=2)


SAMPLINGS = {
    "temperature": Sampling(temperature=0.9, seed=5),
    "filters": Sampling(temperature=1.2, top_k=20, top_p=0.9, min_p=0.02, seed=2**40 + 1),
    "penalty alone": Sampling(repetition_penalty=5.0),
    "everything": Sampling(temperature=0.7, top_k=50, top_p=0.95, repetition_penalty=1.3, seed=7),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=list(SAMPLINGS))
@pytest.mark.parametrize("prompts", [PROMPTS, [[1, 2, 3], [4], [5, 6]]], ids=["uniform", "ragged"])
def test_sampling_draws_the_same_tokens(emulator, sampling, prompts):
    with emulated_gpu(emulator):
        model, reference = pair(emulator, replace(LLAMA, num_layers=1))
        caches = [m.new_cache(12, len(prompts), sampling=sampling) for m in (model, reference)]
        drawn = []
        for m, cache in zip((model, reference), caches, strict=True):
            m.prefill(prompts, cache)
            tokens = [np.array(cache.token)]
            tokens += [np.array(m.decode_one_token(cache.token, cache)) for _ in range(4)]
            drawn.append(np.array(tokens))
        np.testing.assert_array_equal(*drawn)
        assert (drawn[0] < LLAMA.vocab_size).all()


def test_sampling_may_change_between_steps(emulator):
    with emulated_gpu(emulator):
        model, reference = pair(emulator, replace(LLAMA, num_layers=1))
        cache, expected = model.new_cache(9), reference.new_cache(9)
        for m, c in ((model, cache), (reference, expected)):
            m.prefill([1, 2, 3], c)
            c.sampling = Sampling(repetition_penalty=20.0)  # knows what came before it was set
            m.decode_one_token(c.token, c)
            m.decode_one_token(c.token, c)
            c.sampling = Sampling()
            m.decode_one_token(c.token, c)
        np.testing.assert_array_equal(cache.token, expected.token)
        assert cache._seen.sum() == expected.seen.sum()
        cache.truncate(0)
        assert cache._seen.sum() == 0
        with pytest.raises(ec.ArgumentTypeError, match="sampling: expected a Sampling"):
            cache.sampling = {"temperature": 1.0}


@pytest.mark.parametrize("seed", range(3))
def test_greedy_after_sampling_looks_at_this_step_alone(emulator, seed):
    with emulated_gpu(emulator):
        model, _ = pair(emulator, replace(LLAMA, num_layers=1))
        cache = model.new_cache(12, sampling=Sampling(temperature=1.0, seed=seed))
        model.prefill([1, 2], cache)
        for _ in range(6):
            model.decode_one_token(cache.token, cache)
        cache.sampling = Sampling()
        for _ in range(2):
            model.decode_one_token(cache.token, cache)
            assert cache.token[0] == np.argmax(cache.logits[0])


def test_the_penalty_knows_what_was_fed_not_what_was_proposed(emulator):
    with emulated_gpu(emulator):
        model, reference = pair(emulator, replace(LLAMA, num_layers=1))
        caches = [m.new_cache(12, sampling=Sampling(repetition_penalty=1.3)) for m in (model, reference)]
        for m, cache in zip((model, reference), caches, strict=True):
            m.prefill([3, 7], cache)
            m.prefill([9, 11], cache)
            m.decode_one_token(5, cache)
        np.testing.assert_array_equal(np.flatnonzero(caches[0]._seen), [3, 5, 7, 9, 11])
        np.testing.assert_array_equal(caches[0]._seen, caches[1].seen)


def test_a_refused_prompt_changes_nothing(emulator):
    with emulated_gpu(emulator):
        model, _ = pair(emulator, replace(LLAMA, num_layers=1))
        cache = model.new_cache(4)
        assert model.prefill(5, cache).shape == (LLAMA.vocab_size,)
        for prompt in ([1, 2, 3, 4], [], "ab", [203]):
            with pytest.raises((ec.ArgumentTypeError, ec.ArgumentValueError)):
                model.prefill(prompt, cache)
        assert cache.lengths == (1,)
        assert cache._seen.sum() == 1


def test_a_head_that_the_gpu_cannot_hold_is_refused(emulator):
    wide = replace(LLAMA, num_layers=1, hidden_size=16384, num_heads=1, num_kv_heads=1, head_dim=2, vocab_size=8)
    with emulated_gpu(emulator, GPUS["T4"]), pytest.raises(ec.ArgumentValueError, match="hidden_size is 16384"):
        ec.TernaryTransformer(Checkpoint.random(wide))


def test_generate_one_and_several(emulator):
    prompts = [[5, 6, 7, 8], [9]]
    with emulated_gpu(emulator):
        model, reference = pair(emulator, replace(LLAMA, num_layers=1))
        greedy = list(reference.generate(prompts[0], 6))
        assert list(model.generate(prompts[0], 6)) == greedy
        stop = greedy[3]
        assert list(model.generate(prompts[0], 6, stop_tokens=[stop])) == greedy[: greedy.index(stop)]
        assert list(model.generate(prompts[0], 0)) == []
        for stops in ((), (stop,)):
            ours, theirs = (np.array(list(m.generate(prompts, 6, stop_tokens=stops))) for m in (model, reference))
            np.testing.assert_array_equal(ours, theirs)
        assert (ours[-1] == -1).any()
        sampling = Sampling(temperature=1.0, seed=3)
        assert list(model.generate([1], 5, sampling)) == list(reference.generate([1], 5, sampling))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_ids": []}, ec.ArgumentValueError, "token_ids: expected at least one token"),
        ({"token_ids": "text"}, ec.ArgumentTypeError, "token_ids: expected integers"),
        ({"token_ids": [[1, 2], []]}, ec.ArgumentValueError, r"token_ids\[1\].shape is \(0,\)"),
        ({"token_ids": [1.5]}, ec.ArgumentTypeError, "expected integers, got float64"),
        ({"token_ids": [203]}, ec.ArgumentValueError, "vocabulary = 203"),
        ({"max_new_tokens": -1}, ec.ArgumentValueError, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.0}, ec.ArgumentTypeError, "max_new_tokens: expected an integer, got float"),
        ({"stop_tokens": 3}, ec.ArgumentTypeError, "stop_tokens: expected several integers, got int"),
        ({"stop_tokens": ["a"]}, ec.ArgumentTypeError, "stop_tokens: expected integers, got str"),
        ({"sampling": 0.7}, ec.ArgumentTypeError, "sampling: expected a Sampling, got float"),
        ({"kv_dtype": "int4"}, ec.ArgumentValueError, "dtype is 'int4', expected one of auto, float32, int8"),
    ],
    ids=str,
)
def test_generate_refuses_at_once(emulator, arguments, error, message):
    with emulated_gpu(emulator):
        for model in pair(emulator, replace(LLAMA, num_layers=1)):
            with pytest.raises(error, match=message):
                model.generate(**{"token_ids": [1], **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "int4"}, "activation is 'int4', expected one of float, int8"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of auto, float16"),
        ({"head": "int4"}, "head is 'int4', expected one of auto, int8"),
    ],
)
def test_model_refuses(emulator, options, message):
    checkpoint = Checkpoint.random(LLAMA)
    with emulated_gpu(emulator):
        for transformer in (ec.TernaryTransformer, ec.reference.TernaryTransformer):
            with pytest.raises(ec.ArgumentValueError, match=message):
                transformer(checkpoint, **options)


def test_a_damaged_layer_is_an_error_of_the_file(emulator):
    checkpoint = Checkpoint.random(LLAMA)

    def read(i):
        if i == 1:
            raise ec.CheckpointError("model.gguf: tensor blk.1.attn_q.weight is all zero")
        return checkpoint.layers[i]

    with emulated_gpu(emulator), pytest.raises(ec.CheckpointError, match=r"blk\.1"):
        ec.TernaryTransformer(replace(checkpoint, layers=Layers(2, read)))
