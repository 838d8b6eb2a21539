"""The kernels in the emulator, through the package's own dispatch, against the reference.

Each case runs in one order of blocks and warps; test_kernel_properties.py runs each of its examples in three.
"""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import verify
from edgellm_cupy.arguments import FLOAT16, FLOAT32, LARGEST_K
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.ops import enqueue
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.tuning import specialisations
from edgellm_cupy.tuning.decoder import ARGMAX, decoder_specs
from edgellm_cupy.tuning.gemm import gemm_specs
from edgellm_cupy.tuning.product import product_launch, product_specs
from tests.emulated import GPUS, H200, T4, TINY, emulated_gpu, new_emulator, poisoned
from tests.emulator import ORDERS, Emulator

TINY_MODEL = ec.ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=72,
    intermediate_size=100,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=203,
)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = new_emulator()
    emulator.build(list(decoder_specs(TINY_MODEL, H200)))
    return emulator


@pytest.fixture(scope="module")
def reached() -> set[KernelSpec]:
    """Specialisations that the tests of this file have run."""
    return set()


@pytest.mark.parametrize("case", list(verify.cases(H200)), ids=str)
def test_operations(emulator, reached, case):
    rng = np.random.default_rng(case.m * case.k + case.n)
    p = verify.random_problem(case, rng)
    weight = ec.TernaryWeight.from_int8(p["t"], p["scale"])
    # One order of blocks and warps a case, another for the next: all are used over the file.
    emulator.order = ORDERS[case.k % len(ORDERS)] if case.m < 2000 else ORDERS[0]
    y_dtype = FLOAT16 if case.dtype == FLOAT32 else FLOAT32
    with emulated_gpu(emulator) as gpu:
        out = poisoned((case.n, case.m), y_dtype)
        x, gamma = p["x"], p["gamma"]
        enqueue.product(gpu.cupy, x, gamma, weight, 1e-5, case.activation, p["residual"], case.choice, out)
        product = poisoned((case.n, case.m), x.dtype)
        enqueue.product(gpu.cupy, x, None, weight, 0.0, case.activation, None, case.choice, product)
        normed = ec.rmsnorm(x, gamma, 1e-5)
    reached |= gpu.launched
    message = check(out, x, gamma, weight, eps=1e-5, activation=case.activation, residual=p["residual"])
    assert message is None, message
    message = check(product, x, None, weight, activation=case.activation)
    assert message is None, message
    message = check(normed, x, gamma, eps=1e-5)
    assert message is None, message


def test_the_cases_reach_every_specialisation_of_the_operations(reached):
    missing = {*product_specs(), *gemm_specs()} - reached
    assert not missing, f"{len(missing)} not run, such as {next(iter(missing)).name}"


@pytest.mark.parametrize("facts", [T4, TINY], ids=["T4", "tiny"])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(70, 1, 1100), (40, 1, 4300), (5, 1, 70_001), (33, 5, 700), (9, 11, 2100), (4, 3, 9000)]
)
def test_small_devices_take_persistent_loops_and_slices(emulator, facts, activation, m, n, k):
    rng = np.random.default_rng(0)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (m, k), dtype=np.int8), 0.5)
    x = rng.standard_normal((n, k)).astype(np.float32)
    gamma = rng.uniform(0.5, 1.5, k).astype(np.float32)
    with emulated_gpu(emulator, facts):
        for strategy in ("streaming", "separate"):
            y = ec.rmsnorm_ternary_matmul(x, gamma, weight, 1e-5, activation, strategy=strategy)
            message = check(y, x, gamma, weight, eps=1e-5, activation=activation)
            assert message is None, message


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize(("facts", "k"), [(T4, 14336), (T4, 12804), (H200, 14336)], ids=str)
def test_a_token_in_registers_is_staged_whole(emulator, facts, k, activation):
    rng = np.random.default_rng(0)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (5, k), dtype=np.int8), 0.5)
    x, gamma = rng.standard_normal((1, k)).astype(np.float16), np.ones(k, np.float16)
    with emulated_gpu(emulator, facts):
        y = ec.rmsnorm_ternary_matmul(x, gamma, weight, 1e-5, activation)
    message = check(y, x, gamma, weight, eps=1e-5, activation=activation)
    assert message is None, message


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_sums_over_the_longest_rows(emulator, activation):
    """Every product at its largest, and all of one sign."""
    k = LARGEST_K
    weight = ec.TernaryWeight.from_int8(np.ones((1, k), np.int8))
    with emulated_gpu(emulator):
        for dtype in (np.float16, np.float32):
            y = ec.ternary_matmul(np.full((1, k), -1, dtype), weight, activation, np.empty((1, 1), np.float32))
            np.testing.assert_allclose(y, -k, rtol=1e-5)
    with pytest.raises(ec.ArgumentValueError, match="K = 4000001"), emulated_gpu(emulator):
        ec.ternary_matmul(
            np.ones(k + 1, np.float32), ec.TernaryWeight.from_int8(np.ones((1, k + 1), np.int8)), activation
        )


@pytest.mark.parametrize(("exponent", "eps"), [(30, 1e-6), (-30, 0.0), (-30, 1e-6), (0, 0.0)])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("n", [1, 3])
def test_squares_that_float32_cannot_hold(emulator, exponent, eps, activation, n):
    rng = np.random.default_rng(3)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (20, 300), dtype=np.int8))
    gamma = np.ones(300, np.float32)
    x = (rng.standard_normal((n, 300)) * 10.0**exponent).astype(np.float32)
    if n > 1:
        x[1] = 0
    with emulated_gpu(emulator):
        y = ec.rmsnorm_ternary_matmul(x, gamma, weight, eps, activation)
        normed = ec.rmsnorm(x, gamma, eps)
    message = check(y, x, gamma, weight, eps=eps, activation=activation) or check(normed, x, gamma, eps=eps)
    assert message is None, message


def test_rows_that_start_anywhere(emulator):
    """A view that starts one element into its memory is aligned for scalars only."""
    rng = np.random.default_rng(4)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (20, 128), dtype=np.int8))
    memory = rng.standard_normal(2 * 128 + 1).astype(np.float16)
    x, gamma = memory[1:].reshape(2, 128), np.ones(129, np.float16)[1:]
    with emulated_gpu(emulator):
        y = ec.rmsnorm_ternary_matmul(x, gamma, weight, 1e-5, "int8")
    message = check(y, x, gamma, weight, eps=1e-5, activation="int8")
    assert message is None, message


@pytest.mark.parametrize(
    ("dtype", "activation"), [("float32", "float"), ("float32", "int8"), ("float16", "int8"), ("bfloat16", "float")]
)
def test_decoder_equals_the_reference(emulator, dtype, activation):
    # With some seeds (1, 10) float32 rounding tips an activation over a tie, which moves it by 1 / 127 of the absmax.
    checkpoint = Checkpoint.random(TINY_MODEL, seed=3)
    reference = ec.reference.TernaryTransformer(checkpoint, activation=activation, dtype=dtype)
    for order in ORDERS:
        emulator.order = order
        with emulated_gpu(emulator):
            model = ec.TernaryTransformer(checkpoint, activation=activation, dtype=dtype)
            cache, expected = model.new_cache(30, batch=2), reference.new_cache(30, batch=2)
            prompt = [[3, 7, 200, 11, 5], [9, 9, 0, 202, 1]]
            model.prefill(prompt, cache)
            reference.prefill(prompt, expected)
            for _ in range(3):
                error = np.abs(cache.logits - expected.logits).max() / np.abs(expected.logits).max()
                assert error <= 2e-6
                np.testing.assert_array_equal(cache.token, np.argmax(cache.logits, axis=1))
                token = reference.sample(expected.logits)
                model.decode_one_token(token, cache)
                reference.decode_one_token(token, expected)


def test_greedy_ties_take_the_lowest_index(emulator):
    logits = np.full((2, 1000), -5.0, np.float32)
    logits[0, [700, 311, 999]] = 2.5
    logits[1, [600, 999]] = -0.0, 0.0  # equals, as in NumPy
    best = np.zeros(2, np.uint64)
    emulator.launch(ARGMAX.name, (3, 2), (256,), [logits, best, np.int32(1000)])
    np.testing.assert_array_equal(~best.astype(np.uint32), [311, 600])


def test_specialisations_are_few():
    assert len(specialisations()) <= 300


def test_truncated_cache_goes_on_where_it_was_cut(emulator):
    checkpoint = Checkpoint.random(TINY_MODEL, seed=2)
    with emulated_gpu(emulator):
        for transformer in (ec.TernaryTransformer, ec.reference.TernaryTransformer):
            model = transformer(checkpoint)
            cache = model.new_cache(12)
            model.prefill([1, 2, 3, 4], cache)
            once = np.array(model.decode_one_token(7, cache)), np.array(cache.logits)
            cache.truncate(4)
            assert cache.length == 4
            again = np.array(model.decode_one_token(7, cache)), np.array(cache.logits)
            np.testing.assert_array_equal(once[0], again[0])
            np.testing.assert_array_equal(once[1], again[1])
            with pytest.raises(ec.ArgumentValueError, match="length is 6"):
                cache.truncate(6)


def test_a_cache_serves_its_own_model_only(emulator):
    with emulated_gpu(emulator):
        a, b = (ec.TernaryTransformer(Checkpoint.random(TINY_MODEL, seed)) for seed in (1, 2))
        cache = a.new_cache(8)
        with pytest.raises(ec.ArgumentValueError, match="another model"):
            b.prefill([1], cache)
        with pytest.raises(ec.ArgumentValueError, match="another model"):
            b.decode_one_token([1], cache)


def test_a_refused_step_changes_nothing(emulator):
    with emulated_gpu(emulator):
        model = ec.TernaryTransformer(Checkpoint.random(TINY_MODEL, 1))
        cache = model.new_cache(2)
        model.prefill([1, 2], cache)
        before = cache.token.copy()
        for token, error in ((np.array([7], np.int32), ValueError), (np.array([7.5]), (TypeError, ValueError))):
            with pytest.raises(error):
                model.decode_one_token(token, cache)
        assert cache.length == 2
        np.testing.assert_array_equal(cache.token, before)
        with pytest.raises(ec.ArgumentValueError, match="vocabulary"):
            model.generate([TINY_MODEL.vocab_size])  # at once, not at the first token


def test_a_long_prompt_goes_in_pieces(emulator, monkeypatch):
    checkpoint = Checkpoint.random(TINY_MODEL, seed=3)
    prompt = np.random.default_rng(0).integers(0, TINY_MODEL.vocab_size, (2, 23))
    with emulated_gpu(emulator):
        model = ec.TernaryTransformer(checkpoint, activation="float", dtype="float32")
        whole, pieces = model.new_cache(30, batch=2), model.new_cache(30, batch=2)
        model.prefill(prompt, whole)
        monkeypatch.setattr("edgellm_cupy.model.decoder._PREFILL_TOKENS", 10)
        model.prefill(prompt, pieces)
    assert pieces.length == whole.length == 23
    np.testing.assert_allclose(pieces.logits, whole.logits, rtol=0, atol=1e-5 * np.abs(whole.logits).max())
    np.testing.assert_array_equal(pieces.token, whole.token)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(64, 1, 128), (32, 1, 256), (71, 1, 64)])
def test_a_group_that_attention_cannot_hold_is_refused_when_the_model_is_made(emulator, heads, kv_heads, head_dim):
    config = ec.ModelConfig("wide", 1, 16, 16, heads, kv_heads, head_dim, 8)
    with emulated_gpu(emulator), pytest.raises(ec.ArgumentValueError, match="num_heads / num_kv_heads"):
        ec.TernaryTransformer(Checkpoint.random(config))


def test_every_launch_fits_every_promised_gpu():
    """Shared memory of one block, over many shapes; the registers are the compile matrix's part."""
    for facts in GPUS.values():
        for n in (1, 2, 3, 5, 9, 300):
            for k in (1, 576, 1985, 2560, 8193, 16385, 28672, 200_001):
                for activation in ("float", "int8"):
                    for dtype in ("float16", "float32"):
                        plan = product_launch(576, n, k, dtype, "float32", k % 4 == 0, activation, facts)
                        assert plan.launch.shared_bytes + 2048 <= facts.block_shared_bytes, (facts, n, k, activation)
                        assert plan.launch.block[0] * plan.config.resident <= facts.threads
