"""The tensor-core product for many tokens and its prepass, in the emulator, against NumPy and the reference."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.arguments import DTYPES, FLOAT16, FLOAT32
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.reference.ops import normalise, quantise
from edgellm_cupy.tuning import gemm
from edgellm_cupy.tuning.device import DeviceFacts
from tests.emulated import GPUS, H200
from tests.emulator import ORDERS, Emulator, compare_orders

TAGS = {dtype: np.int32(tag) for tag, dtype in enumerate(("float16", "bfloat16", "float32"))}
ACTIVATIONS = ("int8", "float")
EPS = 1e-5


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    emulator.build(list(gemm.gemm_specs()))
    return emulator


def planes_of(x_dtype: Any, activation: str) -> int:
    return 1 if activation == "int8" else gemm.PLANES[x_dtype.name]


def prepass(emulator: Emulator, x: np.ndarray, gamma: np.ndarray | None, activation: str) -> tuple[Any, Any, Any]:
    """Workspace, dequant and q_sums as the kernel leaves them. What it does not write stays poisoned."""
    (n, k), planes = x.shape, planes_of(x.dtype, activation)
    tiles = np.full(gemm.tile_shape(n, k, activation, planes), 0xA5, np.uint8)
    dequant, q_sums = np.empty(n, np.float32), np.empty(n, np.int32)
    plan = gemm.quantise_tiles_launch(n, k, x.dtype.name, gamma is not None, activation)
    gamma_is_float32 = np.int32(gamma is not None and gamma.dtype == FLOAT32)
    sums = q_sums if activation == "int8" else None
    args = [x, gamma, gamma_is_float32, tiles, dequant, sums, np.int32(k), np.float32(EPS)]
    emulator.launch(plan.spec.name, plan.grid, plan.block, args, shared=plan.shared_bytes)
    return tiles, dequant, sums


def separate(
    emulator: Emulator,
    x: np.ndarray,
    gamma: np.ndarray | None,
    weight: ec.TernaryWeight,
    activation: str,
    residual: np.ndarray | None,
    out: np.ndarray,
    config: gemm.GemmConfig | None = None,
    facts: DeviceFacts = H200,
) -> None:
    """out = scale * (t @ a) + residual by the two kernels. Activations behind it: test_kernels.py."""
    tiles, dequant, q_sums = prepass(emulator, x, gamma, activation)
    (m, k), n = weight.shape, x.shape[0]
    plan = gemm.gemm_launch(m, n, k, activation, planes_of(x.dtype, activation), facts, config)
    args = [
        *(tiles, dequant, q_sums, weight.packed, weight.scale, np.int32(weight.scale.size > 1)),
        *(residual, TAGS["float32" if residual is None else residual.dtype.name], out, TAGS[out.dtype.name]),
        *(np.int32(v) for v in (0, m, k, n, plan.stages)),
    ]
    emulator.launch(plan.launch.spec.name, plan.launch.grid, plan.launch.block, args, shared=plan.launch.shared_bytes)


def random_weight(rng: np.random.Generator, m: int, k: int) -> ec.TernaryWeight:
    scale = 0.37 if m % 2 else rng.uniform(0.5, 2.0, m).astype(np.float32)
    return ec.TernaryWeight.from_int8(rng.integers(-1, 2, (m, k), dtype=np.int8), scale)


def random_tokens(rng: np.random.Generator, n: int, k: int, dtype: Any) -> np.ndarray:
    """Ordinary tokens, and among them one with NaN, one of zeros and one with an outlier."""
    x = rng.standard_normal((n, k))
    x[n // 3, k // 2] = 1e4
    if n > 4:
        x[n // 2] = 0
        x[n - 2, k // 3] = np.nan
    return x.astype(dtype)


# ---- the prepass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 65), (9, 700), (2, 2816), (2, 9000), (1, 17000)])
def test_prepass(emulator, dtype, activation, n, k):
    rng = np.random.default_rng(n * k)
    x = random_tokens(rng, n, k, dtype)
    gamma = rng.uniform(0.5, 1.5, k).astype(dtype) if k % 2 else None
    emulator.order = ORDERS[k % len(ORDERS)]
    tiles, dequant, q_sums = prepass(emulator, x, gamma, activation)
    planes = planes_of(dtype, activation)
    values = columns_of(tiles, activation)[: n * planes]
    finite = np.isfinite(x.astype(np.float64)).all(axis=1)
    assert (np.isnan(dequant) == ~finite).all()

    normed = x.astype(np.float64) if gamma is None else normalise(x, gamma, EPS)
    if activation == "int8":
        q, step, exact = quantise(normed[finite])
        at_a_tie = np.abs(np.abs(exact) % 1.0 - 0.5) < 1e-4
        off = np.abs(values[finite, :k] - q)
        assert (off <= at_a_tie).all()
        np.testing.assert_allclose(dequant[finite], step[..., 0], rtol=2e-6)
        np.testing.assert_array_equal(q_sums[finite], values[finite].sum(axis=1))
    else:
        value = values[::planes] if planes == 1 else values[::2] + values[1::2] / 4096
        largest = np.abs(values[::planes][finite]).max(axis=1)
        assert ((largest == 0) | ((largest >= 2**14) & (largest <= 2**15))).all()
        error = np.abs(value[finite, :k] * dequant[finite, None] - normed[finite])
        floor = np.abs(normed[finite]).max(axis=1, keepdims=True) * 2.0 ** -(39 if planes == 1 else 50)
        assert (error <= np.abs(normed[finite]) * (2.0**-11 if planes == 1 else 2.0**-20) * 1.01 + floor).all()
    assert (values[np.repeat(finite, planes), k:] == 0).all()


def columns_of(tiles: np.ndarray, activation: str) -> np.ndarray:
    """The workspace as [column, k] in float64; the inverse of the layout that fragments.cuh describes."""
    dtype = np.int8 if activation == "int8" else np.float16
    # column tile, block, piece, column, chunk, field of the piece, k of the field
    pieces = tiles.view(dtype).reshape(*tiles.shape[:5], -1, 4)
    if activation == "float":
        pieces = pieces[..., [0, 2, 1, 3]]
    return pieces.transpose(0, 3, 1, 4, 2, 5, 6).reshape(tiles.shape[0] * tiles.shape[3], -1).astype(np.float64)


# ---- both kernels ---------------------------------------------------------------------------------------------------

# (M, N, K), none of which a tile divides; every tile shape meets two of them.
SHAPES = [
    (5, 1, 1),
    (17, 2, 63),
    (33, 7, 64),
    (70, 9, 65),
    (130, 16, 576),
    (20, 33, 700),
    (9, 70, 1100),
    (270, 130, 65),
]
CASES = [
    (config, activation, dtype, *SHAPES[(3 * i + j + turn) % len(SHAPES)])
    for j, (activation, dtype) in enumerate(product(ACTIVATIONS, DTYPES))
    for i, config in enumerate(gemm.GEMM_CONFIGS[activation])
    for turn in (0, 5)
    if config.serves(planes_of(dtype, activation)) and (activation == "float" or turn == 0 or j == 0)
]


@pytest.mark.parametrize(("config", "activation", "dtype", "m", "n", "k"), CASES, ids=str)
def test_product(emulator, config, activation, dtype, m, n, k):
    rng = np.random.default_rng(m * n + k)
    weight, x = random_weight(rng, m, k), random_tokens(rng, n, k, dtype)
    gamma = rng.uniform(0.5, 1.5, k).astype(dtype if k % 2 else FLOAT32) if m % 4 else None
    residual = rng.standard_normal((n, m)).astype(dtype)
    in_place, y_dtype = n % 2 == 0, DTYPES[(m + n + k) % 3]
    out = residual.copy() if in_place else np.full((n, m), np.nan).astype(y_dtype)
    emulator.order = ORDERS[(m + n) % len(ORDERS)]
    added = out if in_place else residual if k % 3 else None
    separate(emulator, x, gamma, weight, activation, added, out, config)
    added = None if added is None else residual
    message = check(out, x, gamma, weight, eps=EPS, activation=activation, residual=added)
    assert message is None, message


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("config", "m", "n", "k"), [(0, 20, 75, 130), (1, 36, 10, 2500), (2, 70, 37, 1100), (4, 66, 9, 600)]
)
def test_orders_agree(emulator, config, activation, dtype, m, n, k):
    rng = np.random.default_rng(1)
    weight, x = random_weight(rng, m, k), random_tokens(rng, n, k, dtype)
    residual = rng.standard_normal((n, m)).astype(dtype)

    def run(order: Any) -> list[np.ndarray]:
        emulator.order = order
        out = np.full((n, m), np.nan if order == ORDERS[0] else -7.0, np.float32)
        separate(emulator, x, None, weight, activation, residual, out, gemm.GEMM_CONFIGS[activation][config])
        return [out]

    (out,) = compare_orders(run)
    message = check(out, x, None, weight, activation=activation, residual=residual)
    assert message is None, message


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("facts", GPUS.values(), ids=GPUS)
def test_what_a_device_chooses(emulator, activation, facts):
    rng = np.random.default_rng(2)
    weight, x = random_weight(rng, 40, 300), random_tokens(rng, 18, 300, FLOAT16)
    out = np.empty((18, 40), FLOAT16)
    emulator.order = ORDERS[facts.arch % len(ORDERS)]
    separate(emulator, x, None, weight, activation, None, out, facts=facts)
    message = check(out, x, None, weight, activation=activation)
    assert message is None, message


def test_rows_that_start_anywhere(emulator):
    """Views that start one element into their memory are aligned for scalars only."""
    rng = np.random.default_rng(4)
    weight = random_weight(rng, 20, 128)
    x = rng.standard_normal(3 * 128 + 1).astype(FLOAT16)[1:].reshape(3, 128)
    gamma, out = np.ones(129, FLOAT16)[1:], np.zeros(61, FLOAT16)[1:].reshape(3, 20)
    emulator.order = ORDERS[0]
    separate(emulator, x, gamma, weight, "int8", out, out)
    message = check(out, x, gamma, weight, eps=EPS, activation="int8")
    assert message is None, message


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("exponent", [30, -30])
def test_squares_that_float32_cannot_hold(emulator, exponent, activation):
    rng = np.random.default_rng(3)
    weight, gamma = random_weight(rng, 20, 300), np.ones(300, np.float32)
    x = (rng.standard_normal((3, 300)) * 10.0**exponent).astype(np.float32)
    x[1] = 0
    out = np.empty((3, 20), np.float32)
    emulator.order = ORDERS[0]
    separate(emulator, x, gamma, weight, activation, None, out)
    message = check(out, x, gamma, weight, eps=EPS, activation=activation)
    assert message is None, message


# ---- the choice, and the compiler -----------------------------------------------------------------------------------


def test_every_choice_is_enumerated_and_fits():
    rng = np.random.default_rng(0)
    specs = set(gemm.gemm_specs())
    for _ in range(2000):
        m, n, k = (int(v) for v in 2 ** rng.uniform(0, [17, 14, 15]))
        facts = GPUS[rng.choice(list(GPUS))]
        activation, planes = (("int8", 1), ("float", 1), ("float", 2))[rng.integers(3)]
        plan = gemm.gemm_launch(m, n, k, activation, planes, facts)
        assert plan.launch.spec in specs
        assert plan.config in gemm.gemm_candidates(activation, planes, facts)
        assert 2 <= plan.stages <= 4
        static = 4 * (plan.config.rows + 2 * plan.config.columns)
        assert plan.launch.shared_bytes + static <= facts.block_shared_bytes
        assert plan.launch.grid[0] * plan.config.rows * plan.config.columns >= m * n * planes


def test_a_multiprocessor_takes_no_more_blocks_than_its_share():
    rng = np.random.default_rng(5)
    for _ in range(500):
        m, n, k = (int(v) for v in 2 ** rng.uniform(4, [16, 12, 14]))
        facts = GPUS[rng.choice(list(GPUS))]
        activation, planes = (("int8", 1), ("float", 1), ("float", 2))[rng.integers(3)]
        plan = gemm.gemm_launch(m, n, k, activation, planes, facts)
        launch = plan.launch
        share = -(-launch.grid[0] // facts.multiprocessors)
        reserved = launch.shared_bytes + 1024
        assert reserved * (share + 1) > facts.shared_bytes
        held = facts.shared_bytes // (reserved + 2048)
        assert held >= 1


# y[N, M] of layers of a 2-billion- and an 8-billion-parameter model: the tile that measurements on an H200 found best,
# or within 4 % of it.
MEASURED = [
    ("int8", 2560, 64, 2560, 32, 16),
    ("int8", 3840, 256, 2560, 128, 32),
    ("int8", 6144, 64, 4096, 64, 32),
    ("int8", 28672, 32, 4096, 128, 32),
    ("int8", 4096, 512, 14336, 128, 64),
    ("int8", 28672, 2048, 4096, 256, 64),
    ("float", 4096, 16, 4096, 32, 16),
    ("float", 4096, 32, 14336, 64, 16),
    ("float", 28672, 16, 4096, 128, 16),
    ("float", 2560, 64, 2560, 64, 32),
    ("float", 6144, 64, 4096, 128, 32),
    ("float", 4096, 256, 4096, 128, 64),
    ("float", 13824, 2048, 2560, 256, 64),
]


@pytest.mark.parametrize(("activation", "m", "n", "k", "rows", "columns"), MEASURED)
def test_the_choice_is_what_was_measured_best(activation, m, n, k, rows, columns):
    config = gemm.choose_gemm(m, n, k, activation, 1, H200)
    assert (config.rows, config.columns) == (rows, columns)


def test_a_thread_of_the_prepass_for_each_16_features():
    for k, threads in [(1, 32), (257, 32), (2560, 160), (14336, 896), (16384, 1024), (50000, 1024)]:
        launch = gemm.quantise_tiles_launch(7, k, "float16", True, "int8")
        assert (launch.grid, launch.block) == ((7, 1, 1), (threads, 1, 1))


def test_few_specialisations():
    assert len(set(gemm.gemm_specs())) <= 34
