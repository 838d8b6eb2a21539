"""Every kernel in the emulator on problems that hypothesis chooses, each in three orders of blocks and threads.

The orders have to agree to the bit, and each poisons the output with another value: an element that no thread wrote
differs between them, also where the right result is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import edgellm_cupy as ec
from edgellm_cupy.arguments import BFLOAT16, DTYPES, FLOAT16, FLOAT32
from edgellm_cupy.formats.config import PRESETS
from edgellm_cupy.ops.enqueue import DTYPE_TAGS
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.tuning import FLOOR_THREADS, floor_spec, specialisations
from edgellm_cupy.tuning import decoder as tuning
from edgellm_cupy.tuning.product import CONFIGS
from tests.emulated import H200, T4, TINY, emulated_gpu, new_emulator
from tests.emulator import ORDERS, Emulator, Output, compare_orders

FACTS = {"H200": H200, "T4": T4, "tiny": TINY}
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
ROUNDING = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT32: 2.0**-24}
SEEDS = st.integers(0, 2**32 - 1)
MODELS = {
    **PRESETS,  # 64 features a head, groups of three heads and of one
    # A part of a warp a head; and more outputs (g, d) than threads, the last turn incomplete.
    "narrow": ec.ModelConfig("narrow", 2, 72, 100, num_heads=6, num_kv_heads=2, head_dim=12, vocab_size=203),
    "wide": ec.ModelConfig("wide", 1, 64, 64, num_heads=4, num_kv_heads=2, head_dim=100, vocab_size=64),
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = new_emulator()
    emulator.build([spec for name in ("narrow", "wide") for spec in tuning.decoder_specs(MODELS[name])])
    return emulator


# ---- the operations -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One call of each operation. `shifted` arrays start one element into their memory: aligned for scalars only."""

    m: int
    n: int
    k: int
    flat: bool
    gamma_is_float32: bool
    scale_is_scalar: bool
    codes: str
    values: str
    eps: float
    strategy: str
    residual: str
    y_dtype: str
    shifted: frozenset[str]
    facts: str
    seed: int


@st.composite
def problems(draw: st.DrawFn, x_dtype: str) -> Problem:
    # Where dispatch changes its mind, and where a step ends: what registers hold, what a block's warps take in turn.
    thresholds = sorted({c.longest for c in CONFIGS if c.longest} | {256 * c.step for c in CONFIGS})
    near = st.builds(lambda k, d: k + d, st.sampled_from(thresholds), st.integers(-2, 2))
    k = draw(st.one_of(st.integers(1, 1500), near))
    n = draw(st.one_of(st.just(1), st.integers(1, 12)))
    residual = draw(st.sampled_from(["none", "separate", "out"]))
    return Problem(
        m=draw(st.integers(1, min(90, max(3, 200_000 // (n * k))))),
        n=n,
        k=k,
        flat=n == 1 and draw(st.booleans()),
        gamma_is_float32=draw(st.booleans()),
        scale_is_scalar=draw(st.booleans()),
        codes=draw(st.sampled_from(["random", "random", "ones", "zeros"])),
        values=draw(st.sampled_from(["normal", "outlier", "zero", "nan", "inf", "tiny", "huge", "subnormal"])),
        eps=draw(st.sampled_from([0.0, 1e-6, 1e-5])),
        strategy=draw(st.sampled_from(["streaming", "separate", "adaptive"])),
        residual=residual,
        y_dtype=x_dtype if residual == "out" else draw(st.sampled_from(sorted(BY_NAME))),
        shifted=draw(st.frozensets(st.sampled_from(["x", "gamma", "residual", "out"]))),
        facts=draw(st.sampled_from(sorted(FACTS))),
        seed=draw(SEEDS),
    )


def random_activations(p: Problem, dtype: np.dtype, rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal((p.n, p.k))
    token, column = rng.integers(p.n), rng.integers(p.k)
    if p.values == "outlier":
        x[token, column] = 1e4
    elif p.values == "zero":
        x[token] = 0
    elif p.values in ("nan", "inf"):
        x[token, column] = float(p.values)
    elif p.values == "tiny":
        x *= 1e-6 if dtype == FLOAT16 else 1e-20
    elif p.values == "huge":
        x *= 1e4 if dtype == FLOAT16 else 1e30
    elif p.values == "subnormal":
        subnormal = float(ml_dtypes.finfo(dtype).smallest_subnormal) * rng.integers(-9, 10, x.shape)
        where = rng.random(x.shape) < 0.3
        if dtype != FLOAT16:
            where[..., 0] = False  # float32's subnormals count as zero (-ftz=true): not where a token has nothing else
        x = np.where(where, subnormal, x)
    return x.astype(dtype)


def random_codes(p: Problem, rng: np.random.Generator) -> np.ndarray:
    if p.codes == "random":
        return rng.integers(-1, 2, (p.m, p.k), dtype=np.int8)
    return np.full((p.m, p.k), int(p.codes == "ones"), np.int8)


def place(values: np.ndarray, shifted: bool) -> np.ndarray:
    """A copy that starts at its memory's first element, or at the second."""
    memory = np.empty(values.size + 1, values.dtype)
    array = memory[int(shifted) :][: values.size].reshape(values.shape)
    array[...] = values
    return array


def poisoned(shape: tuple[int, ...], dtype: np.dtype, order: Any) -> np.ndarray:
    return np.full(shape, np.nan if order == ORDERS[0] else -7.0).astype(dtype)


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("x_dtype", sorted(BY_NAME))
@settings(max_examples=25)
@given(data=st.data())
def test_operations(emulator: Emulator, x_dtype: str, activation: str, data: st.DataObject) -> None:
    p = data.draw(problems(x_dtype))
    rng = np.random.default_rng(p.seed)
    dtype, y_dtype = BY_NAME[x_dtype], BY_NAME[p.y_dtype]
    scale = 0.37 if p.scale_is_scalar else rng.uniform(0.5, 2.0, p.m).astype(np.float32)
    weight = ec.TernaryWeight.from_int8(random_codes(p, rng), scale)
    x = place(random_activations(p, dtype, rng), "x" in p.shifted)
    gamma = rng.uniform(-1.5, 1.5, p.k).astype(FLOAT32 if p.gamma_is_float32 else dtype)
    gamma = place(gamma, "gamma" in p.shifted)
    residual = place(rng.standard_normal((p.n, p.m)).astype(dtype), "residual" in p.shifted)
    if p.flat:
        x, residual = x[0], residual[0]

    def run(order: Any) -> list[np.ndarray]:
        emulator.order = order
        out = place(poisoned(residual.shape, y_dtype, order), "out" in p.shifted)
        if p.residual == "out":
            out[...] = residual
        added = {"none": None, "separate": residual, "out": out}[p.residual]
        product, normed = poisoned(residual.shape, y_dtype, order), poisoned(x.shape, y_dtype, order)
        with emulated_gpu(emulator, FACTS[p.facts]):
            ec.rmsnorm_ternary_matmul(x, gamma, weight, p.eps, activation, added, p.strategy, out)
            ec.ternary_matmul(x, weight, activation, product)
            ec.rmsnorm(x, gamma, p.eps, normed)
        return [out, product, normed]

    out, product, normed = compare_orders(run)
    added = None if p.residual == "none" else residual
    for message in (
        check(out, x, gamma, weight, eps=p.eps, activation=activation, residual=added),
        check(product, x, None, weight, activation=activation),
        check(normed, x, gamma, eps=p.eps),
    ):
        assert message is None, message


# ---- the decoder's own kernels --------------------------------------------------------------------------------------


def assert_close(y: np.ndarray, expected: np.ndarray, magnitude: Any, relative: float = 1e-6) -> None:
    """abs(y - expected) is within float32 arithmetic on terms of `magnitude`, and one rounding to y's dtype."""
    assert not np.isnan(y.astype(np.float64)).any()
    smallest = float(ml_dtypes.finfo(y.dtype).smallest_normal)
    slack = relative * magnitude + ROUNDING[y.dtype] * (np.abs(expected) + relative * magnitude) + smallest
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= slack).all(), f"off by {(error / slack).max():.3g} times what is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(n=st.integers(1, 5), hidden=st.integers(1, 600), padding=st.integers(0, 20), seed=SEEDS)
def test_embed(emulator: Emulator, dtype: np.dtype, n: int, hidden: int, padding: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = 50
    values = rng.integers(-128, 128, (vocabulary, hidden + padding), dtype=np.int8)
    scale = rng.uniform(1e-3, 2.0, vocabulary).astype(np.float32)
    ids = rng.choice([0, vocabulary - 1, *rng.integers(0, vocabulary, 3)], n).astype(np.int32)
    x = np.empty((n, hidden), dtype)
    args = [ids, values, np.int32(hidden + padding), scale, Output(x), DTYPE_TAGS[dtype], np.int32(hidden)]
    emulator.launch_in_orders(tuning.EMBED.name, n, tuning.THREADS, args)
    expected = values[ids, :hidden].astype(np.float32) * scale[ids, None]
    np.testing.assert_array_equal(x.view(np.uint8), expected.astype(dtype).view(np.uint8))


@dataclass(frozen=True)
class Context:
    """Tokens of a call, and a cache that holds `length` positions before it."""

    batch: int
    tokens: int  # a sequence
    length: int
    spare: int  # positions of the cache beyond the call's
    seed: int

    @property
    def max_len(self) -> int:
        return self.length + self.tokens + self.spare

    @property
    def positions(self) -> np.ndarray:
        return self.length + np.arange(self.tokens)


def contexts(longest: int) -> st.SearchStrategy[Context]:
    return st.builds(Context, st.integers(1, 2), st.integers(1, 3), st.integers(0, longest), st.integers(0, 9), SEEDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=10)
@given(c=contexts(40), model=st.sampled_from(sorted(MODELS)))
def test_rope_append(emulator: Emulator, dtype: np.dtype, c: Context, model: str) -> None:
    rng = np.random.default_rng(c.seed)
    heads, kv_heads, dim = MODELS[model].num_heads, MODELS[model].num_kv_heads, MODELS[model].head_dim
    before = rng.standard_normal((c.batch, c.tokens, heads + 2 * kv_heads, dim)).astype(dtype)
    qkv = before.reshape(c.batch * c.tokens, -1).copy()
    cache_before = rng.standard_normal((2, c.batch, kv_heads, c.max_len, dim)).astype(dtype)
    keys, values = cache_before.copy()
    angles = rng.uniform(-np.pi, np.pi, (c.max_len, dim // 2))
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    sizes = [np.int32(v) for v in (c.tokens, heads, kv_heads, dim, c.max_len)]
    args = [qkv, keys, values, turns, np.array([c.length], np.int32), *sizes]
    emulator.launch_in_orders(tuning.rope_spec(dtype.name).name, c.batch * c.tokens, tuning.THREADS, args)

    cos, sin = np.moveaxis(turns.astype(np.float64)[c.positions, None], -1, 0)
    first, second = np.split(before.astype(np.float64), 2, axis=-1)
    turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    after, largest = qkv.reshape(before.shape), np.abs(before.astype(np.float64)).max() * 2
    assert_close(after[:, :, :heads], turned[:, :, :heads], largest)
    # Keys and values leave for the cache; in qkv they stay as they were.
    np.testing.assert_array_equal(after[:, :, heads:], before[:, :, heads:])
    new = (slice(None), slice(None), c.positions)
    assert_close(keys[new], turned[:, :, heads : heads + kv_heads].swapaxes(1, 2), largest)
    np.testing.assert_array_equal(values[new], before[:, :, heads + kv_heads :].swapaxes(1, 2))
    for cache, old in zip((keys, values), cache_before, strict=True):
        cache[new] = old[new]
        np.testing.assert_array_equal(cache, old)  # nowhere else


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6)
@given(c=contexts(200), splits=st.integers(1, 6), sharpness=st.sampled_from([0.0, 1.0, 20.0]))
@example(c=Context(batch=2, tokens=3, length=126, spare=0, seed=0), splits=3, sharpness=1.0)
def test_attention(emulator: Emulator, dtype: np.dtype, model: str, c: Context, splits: int, sharpness: float) -> None:
    config, rng = MODELS[model], np.random.default_rng(c.seed)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    n, group = c.batch * c.tokens, heads // kv_heads
    qkv = rng.standard_normal((n, heads + 2 * kv_heads, dim)).astype(dtype).reshape(n, -1)
    keys, values = rng.standard_normal((2, c.batch, kv_heads, c.max_len, dim)).astype(dtype)
    keys[:, :, c.length + c.tokens :] = np.nan  # nobody has been there
    values[:, :, c.length + c.tokens :] = np.nan
    length, softmax_scale = np.array([c.length], np.int32), np.float32(sharpness * dim**-0.5)
    # Shares that are not in use are not written, and combining must not look at them.
    partial = np.full((n, heads, splits, dim + 2), np.nan, np.float32)
    attended = np.empty((n, heads * dim), dtype)
    i32 = np.int32
    sizes = [i32(c.tokens), i32(kv_heads), i32(c.max_len)]
    emulator.launch_in_orders(
        tuning.attention_spec(config, dtype.name).name,
        (splits, kv_heads, n),
        tuning.ATTENTION_THREADS,
        [qkv, i32(qkv.shape[1]), keys, values, length, *sizes, softmax_scale, partial],
    )
    emulator.launch_in_orders(
        tuning.combine_spec(config, dtype.name).name,
        (heads, n),
        dim,
        [partial, length, i32(c.tokens), i32(splits), Output(attended)],
    )

    q = qkv[:, : heads * dim].reshape(c.batch, c.tokens, kv_heads, group, dim).astype(np.float64)
    seen = c.length + c.tokens
    k, v = keys[:, :, :seen].astype(np.float64), values[:, :, :seen].astype(np.float64)
    scores = np.einsum("bshgd,bhkd->bshgk", q, k) * float(softmax_scale)
    future = np.arange(seen) > c.positions[:, None]
    scores[np.broadcast_to(future[None, :, None, None], scores.shape)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bshgk,bhkd->bshgd", weights, v).reshape(n, -1)
    assert_close(attended, expected, np.abs(v).max(), relative=1e-6 * (4 + sharpness))


@pytest.mark.parametrize("model", sorted(PRESETS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=8)
@given(n=st.integers(1, 4), features=st.integers(1, 600), seed=SEEDS)
def test_silu(emulator: Emulator, dtype: np.dtype, model: str, n: int, features: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    gated = PRESETS[model].gated
    up = rng.standard_normal((n, features * (1 + gated)))
    up[:, : min(features, 3)] = (0, -1e4, 1e4)[: min(features, 3)]  # exp(1e4) is infinite
    up, h = up.astype(dtype), np.empty((n, features), dtype)
    grid = (-(-features // tuning.THREADS), n)
    args = [up, Output(h), np.int32(features)]
    emulator.launch_in_orders(tuning.silu_spec(PRESETS[model], dtype.name).name, grid, tuning.THREADS, args)
    gate = up[:, :features].astype(np.float64)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * (up[:, features:].astype(np.float64) if gated else 1.0)
    assert_close(h, expected, np.abs(expected))


@settings(max_examples=25)
@given(
    n=st.integers(1, 3),
    vocabulary=st.integers(1, 700),
    hidden=st.integers(1, 300),
    facts=st.sampled_from(sorted(FACTS)),
    seed=SEEDS,
)
def test_lm_head(emulator: Emulator, n: int, vocabulary: int, hidden: int, facts: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, hidden)).astype(np.float32)
    chunks = -(-hidden // 16)
    values = np.zeros((vocabulary, 16 * chunks), np.int8)
    values[:, :hidden] = rng.integers(-128, 128, (vocabulary, hidden))
    scale = rng.uniform(1e-3, 2.0, vocabulary).astype(np.float32)
    logits = np.empty((n, vocabulary), np.float32)
    config = replace(PRESETS["smollm-135m"], vocab_size=vocabulary, hidden_size=hidden)
    args = [x, values, scale, Output(logits), np.int32(vocabulary), np.int32(hidden)]
    grid = tuning.head_grid(config, n, FACTS[facts])
    emulator.launch_in_orders(tuning.LM_HEAD.name, grid, tuning.THREADS, args, shared=(chunks | 1) * 64)
    terms = x.astype(np.float64), values[:, :hidden].astype(np.float64).T
    assert_close(logits, (terms[0] @ terms[1]) * scale, (np.abs(terms[0]) @ np.abs(terms[1])) * scale, 2e-6)


@settings(max_examples=25)
@given(
    n=st.integers(1, 40),
    vocabulary=st.integers(1, 2500),
    levels=st.sampled_from([1, 3, 10_000]),
    sign=st.sampled_from([-1, 0, 1]),
    count=st.integers(1, 5),
    seed=SEEDS,
)
def test_argmax_and_next_token(
    emulator: Emulator, n: int, vocabulary: int, levels: int, sign: int, count: int, seed: int
) -> None:
    """Few levels make ties, of which the lowest index wins."""
    rng = np.random.default_rng(seed)
    rows = min(n, 3)
    logits = (rng.integers(-levels, levels + 1, (rows, vocabulary)) + sign * (levels + 1)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    keys = np.zeros(rows, np.uint64)
    grid = (-(-vocabulary // (4 * tuning.THREADS)), rows)
    emulator.launch_in_orders(tuning.ARGMAX.name, grid, tuning.THREADS, [logits, keys, np.int32(vocabulary)])

    best = np.resize(keys, n)  # more sequences than next_token has threads
    token, length = np.empty(n, np.int32), np.array([7], np.int32)
    args = [best, Output(token), length, np.int32(n), np.int32(count)]
    emulator.launch_in_orders(tuning.NEXT_TOKEN.name, 1, 32, args)
    np.testing.assert_array_equal(token, np.resize(np.argmax(logits, axis=1), n))
    assert not best.any()
    assert length[0] == 7 + count


@pytest.mark.parametrize("threads", FLOOR_THREADS)
@settings(max_examples=6)
@given(blocks=st.integers(1, 3), words=st.integers(1, 15_000), seed=SEEDS)
def test_read_floor(emulator: Emulator, threads: int, blocks: int, words: int, seed: int) -> None:
    """Every 16-byte word is read once, by the variant that is timed as by the one that says so."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 2**32, (words, 4), dtype=np.uint32)
    total = np.zeros(1, np.uint32)
    args = [data, np.int64(words), total]
    emulator.launch_in_orders(floor_spec(threads, check=True).name, blocks, threads, args)
    assert total[0] == np.bitwise_xor.reduce(data, axis=None)

    # The other writes only a thread's exclusive or that happens to be this one. One thread's words add up to it.
    magic, thread = 0x9E3779B9, int(rng.integers(min(words, blocks * threads)))
    mine = data[thread :: blocks * threads]
    mine[-1, 3] ^= np.bitwise_xor.reduce(mine, axis=None) ^ np.uint32(magic)
    sink = np.zeros(1, np.uint32)
    emulator.launch_in_orders(floor_spec(threads).name, blocks, threads, [data, np.int64(words), sink])
    assert sink[0] == magic


# ---- coverage -------------------------------------------------------------------------------------------------------


def test_every_kernel_and_specialisation_was_launched(request: pytest.FixtureRequest, exercised: Any) -> None:
    """Runs last (tests/conftest.py): what the tests of the emulator launched, against everything there is."""
    if reason := exercised.incomplete("test_kernels.py", "test_kernel_properties.py"):
        pytest.skip(reason)
    kernels = {path.name for path in Path(__file__).parents[2].glob("kernels_cu/*.cu")}
    specs = specialisations()
    assert kernels == {spec.file for spec in specs}, "a kernel file that no specialisation compiles, or the reverse"
    missing = [spec.name for spec in specs if spec.name not in exercised.launched]
    assert not missing, f"{len(missing)} of {len(specs)} specialisations were not launched, such as {missing[:5]}"
