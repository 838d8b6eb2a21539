"""The kernels in the emulator, through the package's own dispatch, against the reference.

Each case runs in one order of blocks and warps; test_kernel_properties.py runs each of its examples in three.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import verify
from edgellm_cupy.arguments import ACTIVATIONS, DTYPES, FLOAT16, FLOAT32, LARGEST_K
from edgellm_cupy.formats.checkpoint import ROW_DTYPES, Checkpoint
from edgellm_cupy.formats.config import SQUARED_UNIT
from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.ops import enqueue
from edgellm_cupy.reference.accuracy import Bound, bound, check
from edgellm_cupy.tuning import dispatch, specialisations
from edgellm_cupy.tuning.decoder import head_launch
from edgellm_cupy.tuning.gemm import gemm_specs
from edgellm_cupy.tuning.product import product_launch, product_specs
from tests.emulated import GPUS, H200, T4, TINY, emulated_gpu, new_emulator, poisoned
from tests.emulator import ORDERS, Emulator, Output

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
    return new_emulator()


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


def ffn_bound(products: Bound, activation: str, gated: bool, dtype: Any) -> Bound:
    """What f(gate) * up may be, where gate and up (rows in turns) lie within the bound of their float32 products.

    Between `low` and `high` f takes its extremes at the ends, or at SiLU's minimum; a product of two intervals takes
    them at the corners. f and the product are a few float32 roundings themselves, and expf overflows below -88.7.
    """

    unit = SQUARED_UNIT if activation == "relu2 scaled" else 1.0

    def f(v: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return v / (1 + np.exp(-v)) if activation == "silu" else np.maximum(v, 0) ** 2 * unit

    low, high, reference = products.low, products.high, f(products.reference)
    ends = np.stack([f(low), f(high)])
    if activation == "silu":
        ends = np.concatenate([ends, f(np.clip(-1.27846, low, high))[None]])
    slack = 2.0**-120
    if gated:
        ups = np.stack([low, high])[..., 1::2]
        ends, reference = ends[..., ::2], reference[..., ::2] * products.reference[..., 1::2]
        ends = (ends[:, None] * ups[None]).reshape(-1, *reference.shape)
        slack = slack * (1 + np.abs(ups).max(axis=0))
    slack = slack + 10 * 2.0**-24 * np.abs(ends).max(axis=0)
    low, high = ((ends.min(axis=0) - slack), (ends.max(axis=0) + slack))
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = (v.astype(dtype).astype(np.float64) for v in (low, high))
    return Bound(reference, low, high, f"{activation}, {gated=}, {products.what}, y {np.dtype(dtype)}")


def check_ffn(emulator: Emulator, case: verify.Case, activation: str, gated: bool) -> set[KernelSpec]:
    """Products of this problem behind a norm, and the activation of an FFN behind them."""
    case = replace(case, m=case.m + case.m % 2 if gated else case.m)
    rng = np.random.default_rng(case.m * case.k + case.n)
    p = verify.random_problem(case, rng)
    weight = ec.TernaryWeight.from_int8(p["t"], p["scale"])
    emulator.order = ORDERS[(case.k + case.n + gated) % len(ORDERS)]
    y_dtype = case.dtype if case.n % 2 else FLOAT32 if case.dtype != FLOAT32 else FLOAT16
    x = p["x"]
    with emulated_gpu(emulator) as gpu:
        for gamma, residual in ((p["gamma"], None), (p["gamma"], p["residual"])):
            out = poisoned((case.n, case.m // 2 if gated else case.m), y_dtype)
            ffn = enqueue.FFN[activation] + enqueue.FFN_GATED * gated
            enqueue.product(gpu.cupy, x, gamma, weight, 1e-5, case.activation, residual, case.choice, out, ffn)
            products = bound(x, gamma, weight, eps=1e-5, activation=case.activation, residual=residual, dtype=FLOAT32)
            message = ffn_bound(products, activation, gated, y_dtype).check(out)
            assert message is None, message
            if case.n > 2:
                assert np.isnan(out[2].astype(np.float32)).all()  # of a token that is not a number
    return gpu.launched


@pytest.mark.parametrize(("ffn", "gated"), [(ffn, gated) for ffn in enqueue.FFN for gated in (False, True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("strategy", ["streaming", "separate"])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 40])
def test_ffn_behind_a_product(emulator, n, strategy, activation, ffn, gated):
    dtype = DTYPES[(n + gated + (ffn == "silu")) % 3]
    gamma_dtype = FLOAT32 if n % 2 else dtype
    # Pairs of rows end in the middle of what a thread of either kernel stores, and at its end.
    case = verify.Case(37 if n % 2 else 39, n, 301 if n == 9 else 300, dtype, gamma_dtype, activation, strategy)
    check_ffn(emulator, case, ffn, gated)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ffn_behind_every_configuration_of_the_products(emulator, activation):
    """Where a row's neighbour is depends on how a warp's rows and columns are dealt out. Several tiles, the last one
    begun only."""
    reached = set()
    problems = [dispatch.Problem(70, n, 300, "float16", "float16", True, activation) for n in (1, 2, 3, 40)]
    configs = {config: p.n for p in reversed(problems) for config in dispatch.candidates(p, H200)}
    for i, (config, n) in enumerate(configs.items()):
        rows = 2 * config.tile + 2 if isinstance(config, dispatch.ProductConfig) else config.rows + 6
        case = verify.Case(rows, n, 300, FLOAT16, FLOAT16, activation, config)
        reached |= check_ffn(emulator, case, ("silu", "relu2", "relu2 scaled")[i % 3], True)
    shapes = {tuple(m for m in s.macros if m[0] not in ("X_T", "GAMMA_F32", "ALIGNED")) for s in reached}
    assert len(shapes) >= len(configs)


def test_ffn_values_by_hand(emulator):
    """Gate and up in turns, in every strategy."""
    t = np.array([[1, 0], [0, 1], [0, 1], [1, 0], [-1, 0], [1, 1]], np.int8)  # gate 3, 5, -3; up 5, 3, 8
    x = np.array([[3, 5]], np.float32)
    weight = ec.TernaryWeight.from_int8(t)
    silu = [v / (1 + np.exp(-v)) for v in (3, 5, -3)]
    gamma = np.full(2, np.sqrt(17), np.float32)  # which the norm divides by
    expected = {
        ("relu2 scaled", True): [9 * 5 / 256, 25 * 3 / 256, 0],
        ("relu2", True): [9 * 5, 25 * 3, 0],
        ("relu2", False): [9, 25, 25, 9, 0, 64],
        ("silu", True): [silu[0] * 5, silu[1] * 3, silu[2] * 8],
        ("silu", False): [silu[0], silu[1], silu[1], silu[0], silu[2], 8 / (1 + np.exp(-8))],
    }
    with emulated_gpu(emulator) as gpu:
        for strategy in ("streaming", "separate"):
            for (activation, gated), values in expected.items():
                out = poisoned((1, len(values)))
                ffn = enqueue.FFN[activation] + enqueue.FFN_GATED * gated
                enqueue.product(gpu.cupy, x, gamma, weight, 0.0, "float", None, strategy, out, ffn)
                np.testing.assert_allclose(out[0], values, rtol=3e-6)


@pytest.mark.parametrize("rows", sorted(ROW_DTYPES))
def test_greedy_ties_take_the_lowest_index(emulator, rows):
    """Equal rows of the head make equal logits, and -0 equals 0, as in NumPy. The second token turns the signs, the
    third has none."""
    vocabulary, hidden = 1000, 32
    values = np.full((vocabulary, hidden), -5.0)
    values[[700, 311, 999]] = 2.5 if rows != "int8" else 2
    values[0] = 7.0
    scale = np.ones(vocabulary, np.float32)
    scale[0] = -0.0
    x = np.array([[1.0], [-1.0], [0.0]], np.float32) * np.ones(hidden, np.float32)
    best, logits = np.zeros(3, np.uint64), np.empty((3, vocabulary), np.float32)
    launch = head_launch(hidden, vocabulary, 3, rows, "float32", H200)
    emulator.build([launch.spec])
    args = [x, np.int64(hidden), np.ones(hidden, np.float32), values.astype(ROW_DTYPES[rows]), scale, Output(logits)]
    args += [best, *(np.int32(v) for v in (vocabulary, hidden, 3)), np.float32(1e-5)]
    emulator.launch(launch.spec.name, launch.grid, launch.block, args, shared=launch.shared_bytes)
    assert list(np.signbit(logits[2, :2])) == [True, False]
    np.testing.assert_array_equal(~best.astype(np.uint32), [311, 1, 0])
    np.testing.assert_array_equal(~best.astype(np.uint32), logits.argmax(axis=1))


def test_specialisations_are_few():
    assert len(specialisations()) <= 330


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


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(71, 1, 12), (18, 2, 256)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_groups_of_any_size_share_a_key(emulator, heads, kv_heads, head_dim, dtype):
    config = ec.ModelConfig("wide", 1, 16, 16, heads, kv_heads, head_dim, 8)
    checkpoint, logits = Checkpoint.random(config), []
    with emulated_gpu(emulator):
        for transformer in (ec.TernaryTransformer, ec.reference.TernaryTransformer):
            model = transformer(checkpoint, activation="float", dtype=dtype)
            cache = model.new_cache(8)
            model.prefill([1, 2, 3], cache)
            model.decode_one_token([4], cache)
            logits.append(np.array(cache.logits))
    largest = np.abs(logits[1]).max()
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=largest * {"float32": 3e-6, "float16": 4e-3}[dtype])


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
