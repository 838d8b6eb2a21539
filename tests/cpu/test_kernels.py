"""The kernels in the emulator, through the package's own dispatch, against the reference."""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import verify
from edgellm_cupy.arguments import FLOAT16, FLOAT32
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.tuning import specialisations
from edgellm_cupy.tuning.decoder import decoder_specs
from edgellm_cupy.tuning.product import product_specs
from tests.emulated import H200, T4, TINY, emulated_gpu, new_emulator, poisoned
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
    emulator.build(list(decoder_specs(TINY_MODEL)))
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
        ec.rmsnorm_ternary_matmul(p["x"], p["gamma"], weight, 1e-5, case.activation, p["residual"], case.strategy, out)
        product = ec.ternary_matmul(p["x"], weight, case.activation)
        normed = ec.rmsnorm(p["x"], p["gamma"], 1e-5)
    reached |= gpu.launched
    x, gamma = p["x"], p["gamma"]
    message = check(out, x, gamma, weight, eps=1e-5, activation=case.activation, residual=p["residual"])
    assert message is None, message
    message = check(product, x, None, weight, activation=case.activation)
    assert message is None, message
    message = check(normed, x, gamma, eps=1e-5)
    assert message is None, message


def test_the_cases_reach_every_specialisation_of_the_operations(reached):
    missing = set(product_specs()) - reached
    assert not missing, f"{len(missing)} not run, such as {next(iter(missing)).name}"


@pytest.mark.parametrize("facts", [T4, TINY], ids=["T4", "tiny"])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize(("m", "n", "k"), [(70, 1, 1100), (40, 1, 4300), (33, 5, 700), (9, 11, 2100)])
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
    ("dtype", "activation", "tolerance"),
    [("float32", "float", 2e-6), ("float32", "int8", 2e-5), ("float16", "float", 2e-3), ("bfloat16", "float", 2e-2)],
)
def test_decoder_equals_the_reference(emulator, dtype, activation, tolerance):
    checkpoint = Checkpoint.random(TINY_MODEL, seed=1)
    reference = ec.reference.TernaryTransformer(checkpoint, activation=activation)
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
                assert error <= tolerance
                np.testing.assert_array_equal(cache.token, np.argmax(cache.logits, axis=1))
                token = reference.sample(expected.logits)
                model.decode_one_token(token, cache)
                reference.decode_one_token(token, expected)


def test_greedy_ties_take_the_lowest_index(emulator):
    from edgellm_cupy.tuning.decoder import ARGMAX

    logits = np.full((2, 1000), -5.0, np.float32)
    logits[0, [700, 311, 999]] = 2.5
    logits[1, [0, 999]] = -1.0
    best = np.zeros(2, np.uint64)
    emulator.launch(ARGMAX.name, (3, 2), (256,), [logits, best, np.int32(1000)])
    np.testing.assert_array_equal(~best.astype(np.uint32), [311, 0])


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
