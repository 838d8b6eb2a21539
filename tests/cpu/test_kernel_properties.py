"""Every kernel in the emulator on problems that hypothesis chooses, each in three orders of blocks and threads.

The orders have to agree to the bit, and each poisons the output with another value: an element that no thread wrote
differs between them, also where the right result is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgellm_cupy as ec
from edgellm_cupy.arguments import BFLOAT16, DTYPES, FLOAT16, FLOAT32
from edgellm_cupy.formats.checkpoint import ROW_DTYPES
from edgellm_cupy.formats.config import PRESETS
from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.ops.enqueue import DTYPE_TAGS
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.reference.ops import normalise
from edgellm_cupy.tuning import FLOOR_THREADS, floor_spec, specialisations
from edgellm_cupy.tuning import decoder as tuning
from edgellm_cupy.tuning.attention import cached_dim
from edgellm_cupy.tuning.product import CONFIGS
from tests.emulated import H200, T4, TINY, emulated_gpu, new_emulator
from tests.emulator import ORDERS, Emulator, Output, compare_orders

FACTS = {"H200": H200, "T4": T4, "tiny": TINY}
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
ROUNDING = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT32: 2.0**-24}
SEEDS = st.integers(0, 2**32 - 1)
MODELS = {
    **PRESETS,  # 64 features a head, groups of three heads and of one
    # Vectors that lanes do not divide: a part of the last, and several lanes without one.
    "narrow": ec.ModelConfig("narrow", 2, 72, 100, num_heads=6, num_kv_heads=2, head_dim=12, vocab_size=203),
    "wide": ec.ModelConfig("wide", 1, 64, 64, num_heads=4, num_kv_heads=2, head_dim=100, vocab_size=64),
    # Two blocks share a key/value head, the second has a query less.
    "many": ec.ModelConfig("many", 1, 64, 64, num_heads=11, num_kv_heads=1, head_dim=6, vocab_size=64),
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = new_emulator()
    specs = [tuning.embed_spec(rows) for rows in ROW_DTYPES] + [spec for spec, _, _ in HEADS.values()]
    for model, dtype, kv_dtype in ATTENTIONS:
        specs += [
            tuning.attention_launch(MODELS[model], dtype, kv_dtype, rotate, 1, 1).spec for rotate in (False, True)
        ]
        specs.append(tuning.combine_launch(MODELS[model], dtype, 1).spec)
    specs += [tuning.combine_launch(config, dtype, 1).spec for config in PRESETS.values() for dtype in BY_NAME]
    emulator.build(specs)
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


I32, F32 = np.int32, np.float32


@pytest.mark.parametrize("rows", sorted(ROW_DTYPES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=6)
@given(n=st.integers(1, 5), hidden=st.integers(1, 600), padding=st.integers(0, 20), scaled=st.booleans(), seed=SEEDS)
def test_embed(
    emulator: Emulator, dtype: np.dtype, rows: str, n: int, hidden: int, padding: int, scaled: bool, seed: int
) -> None:
    check_embed(emulator, dtype, rows, n, hidden, padding, scaled, seed)


def check_embed(
    emulator: Emulator, dtype: np.dtype, rows: str, n: int, hidden: int, padding: int, scaled: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = 50
    values = random_rows(rng, rows, (vocabulary, hidden + padding))
    scale = rng.uniform(1e-3, 2.0, vocabulary).astype(F32) if scaled else None
    ids = rng.choice([0, vocabulary - 1, *rng.integers(0, vocabulary, 3)], n).astype(I32)
    x = np.empty((n, hidden), dtype)
    # The tokens of as many sequences as divide them.
    tokens = next(s for s in (3, 2, 1) if n % s == 0)
    seen = (rng.random((n // tokens, vocabulary)) < 0.2).astype(np.uint8)
    marked = seen.copy()
    marked[np.arange(n) // tokens, ids] = 1
    args = [ids, values, I32(hidden + padding), scale, Output(x), I32(DTYPE_TAGS[dtype]), I32(hidden)]
    args += [seen, I32(tokens), I32(vocabulary)]
    emulator.launch_in_orders(tuning.embed_spec(rows).name, n, tuning.THREADS, args)
    np.testing.assert_array_equal(seen, marked)
    expected = values[ids, :hidden].astype(F32) * (1 if scale is None else scale[ids, None])
    np.testing.assert_array_equal(x.view(np.uint8), expected.astype(dtype).view(np.uint8))


def random_rows(rng: np.random.Generator, rows: str, shape: tuple[int, ...]) -> np.ndarray:
    if rows == "int8":
        return rng.integers(-128, 128, shape, dtype=np.int8)
    return rng.standard_normal(shape).astype(ROW_DTYPES[rows])


# ---- the head -------------------------------------------------------------------------------------------------------


def head_specs() -> dict[str, tuple[KernelSpec, str, str]]:
    """What the presets use, then other rows than x's dtype, then rows of less than eight vectors; (spec, rows, x)."""
    found: dict[KernelSpec, tuple[str, str]] = {}
    for config in PRESETS.values():
        for dtype in BY_NAME:
            for rows in (dtype, "int8"):
                for n in (1, 4):
                    launch = tuning.head_launch(config.hidden_size, config.vocab_size, n, rows, dtype, H200)
                    found[launch.spec] = rows, dtype
    for i, (rows, dtype) in enumerate(product(sorted(ROW_DTYPES), sorted(BY_NAME))):
        if rows not in ("int8", dtype):
            found[tuning.head_launch(300, 1, 1 + i % 2 * 3, rows, dtype, H200).spec] = rows, dtype
        elif dtype == "float16" or rows != "int8":
            found[tuning.head_launch(20, 1, 1 + i % 2 * 3, rows, dtype, H200).spec] = rows, dtype
    return {"-".join(v for _, v in spec.macros): (spec, *names) for spec, names in found.items()}


HEADS = head_specs()


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=5)
@given(data=st.data())
def test_lm_head(emulator: Emulator, head: str, data: st.DataObject) -> None:
    draw, integers = data.draw, st.integers
    several = dict(HEADS[head][0].macros)["TOKENS"] != "1"
    check_head(
        emulator,
        *HEADS[head],
        n=draw(integers(1, 9 if several else 3)),
        vocabulary=draw(integers(1, 150)),
        hidden=draw(integers(1, 260)),
        spare=draw(integers(0, 9)),
        blocks=draw(integers(1, 4)),
        different=draw(st.sampled_from([1, 3, 100])),
        exponent=draw(st.sampled_from([0, -2, 3])),
        outlier=draw(st.booleans()),
        eps=draw(st.sampled_from([0.0, 1e-5])),
        scaled=draw(st.booleans()),
        seed=draw(SEEDS),
    )


def check_head(
    emulator: Emulator,
    spec: KernelSpec,
    rows: str,
    x_dtype: str,
    *,
    n: int,
    vocabulary: int,
    hidden: int,
    spare: int = 0,
    blocks: int = 1,
    different: int = 100,
    exponent: int = 0,
    outlier: bool = False,
    eps: float = 1e-5,
    scaled: bool = True,
    seed: int = 0,
) -> None:
    """Logits and greedy choice. `different`: so many rows of the head are, all others are copies of them, and tie.
    `outlier`: an element is 2^20 times the others, and the head ignores it.

    Each logit may be off by, u = 2^-24, of the sum of the magnitudes: 16 u for the norm (accuracy.py), u for every term
    that a lane adds, 8 u for the lanes' sums and the scales. With int8 rows nothing but four sums of digits is rounded,
    each less than 2^-6 of (the token's largest x the row's sum) above those magnitudes; and a digit ends at 2^-29.
    """
    rng = np.random.default_rng(seed)
    macros = {name: value for name, value in spec.macros if value.isdigit()}
    lanes, tokens, threads = (int(macros[name]) for name in ("LANES", "TOKENS", "THREADS"))
    elements = 16 // ROW_DTYPES[rows].itemsize
    vectors = -(-hidden // elements)
    turns = -(-vectors // lanes)
    kinds = rng.integers(0, different, vocabulary)
    values = np.zeros((vocabulary, vectors * elements), ROW_DTYPES[rows])
    values[:, :hidden] = random_rows(rng, rows, (different, hidden))[kinds]
    scale = rng.uniform(1e-3, 2.0, different).astype(F32)[kinds] if scaled else None
    x = np.full((n, hidden + spare), np.nan).astype(BY_NAME[x_dtype])  # nobody's business beyond `hidden`
    x[:, :hidden] = rng.standard_normal((n, hidden)) * 10.0**exponent
    if outlier:
        x[:, :hidden] = rng.standard_normal((n, hidden)) * 2.0**-7
        x[:, hidden // 2], values[:, hidden // 2] = 2.0**13, 0
    if n > 2:
        x[1, :hidden] = 0
    gamma = rng.uniform(-1.5, 1.5, hidden).astype(F32)
    logits, best = np.empty((n, vocabulary), F32), np.zeros(n, np.uint64)
    args: list[Any] = [x, np.int64(x.shape[1]), gamma, values, scale, Output(logits), best]
    args += [I32(vocabulary), I32(hidden), I32(n), F32(eps)]
    shared = tokens * turns * lanes * (elements // 4) * 16
    emulator.launch_in_orders(spec.name, (blocks, -(-n // tokens)), threads, args, shared=shared)

    normed = normalise(x[:, :hidden], gamma, float(F32(eps)))
    factor = 1.0 if scale is None else scale.astype(np.float64)
    weights = values[:, :hidden].astype(np.float64)
    expected, magnitude = (normed @ weights.T) * factor, (np.abs(normed) @ np.abs(weights).T) * factor
    added = 8 if rows == "int8" else turns * elements
    slack = (24 + added) * 2.0**-24 * magnitude + 2.0**-100
    if rows == "int8":
        slack += 2.0**-26 * np.abs(normed).max(axis=1, keepdims=True) * np.abs(weights).sum(axis=1) * factor
    error = np.abs(logits - expected)
    assert (error <= slack).all(), f"off by {(error / slack).max():.3g} times what is allowed"
    np.testing.assert_array_equal(~best.astype(np.uint32), logits.argmax(axis=1))
    # The upper half is in the order of the floats, zero below all of them.
    bits = (logits.max(axis=1) + F32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    np.testing.assert_array_equal(best >> np.uint64(32), ordered)


@settings(max_examples=20)
@given(
    batch=st.integers(1, 40), vocabulary=st.integers(1, 300), count=st.integers(1, 5), head=st.booleans(), seed=SEEDS
)
def test_next_token(emulator: Emulator, batch: int, vocabulary: int, count: int, head: bool, seed: int) -> None:
    check_next_token(emulator, batch, vocabulary, count, head, seed)


def check_next_token(emulator: Emulator, batch: int, vocabulary: int, count: int, head: bool, seed: int = 0) -> None:
    """More sequences than the block has threads; `head`: there was one, so that there are next tokens."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, vocabulary, batch)
    best = rng.integers(1, 2**32, batch, dtype=np.uint64) << np.uint64(32) | (~chosen.astype(np.uint32))
    token = np.full(batch, -5, I32)
    length = rng.integers(0, 100, batch, dtype=I32)
    expected = token.copy(), length + count
    if head:
        expected[0][:] = chosen
    args = [best if head else None, token, length, I32(batch), I32(count)]
    emulator.launch_in_orders(tuning.NEXT_TOKEN.name, 1, 32, args)
    for array, right in zip((token, length), expected, strict=True):
        np.testing.assert_array_equal(array, right)
    assert not head or not best.any()


# ---- attention of single tokens -------------------------------------------------------------------------------------


# Model, dtypes of x and of the cache. Presets serve float32 only with this kernel.
ATTENTIONS = [
    *((model, "float32", kv) for model in sorted(PRESETS) for kv in ("float32", "int8")),
    ("narrow", "float16", "float16"),
    ("narrow", "bfloat16", "int8"),
    ("narrow", "float32", "float32"),
    ("wide", "bfloat16", "bfloat16"),
    ("wide", "float16", "int8"),
    ("many", "float16", "float16"),
    ("many", "float32", "int8"),
]


@dataclass(frozen=True)
class Attention:
    """`tokens` of each sequence attend to themselves and to the `lengths` positions before them.

    rotate: there is one token, neither rotated nor in the cache.
    """

    model: str
    dtype: str
    kv_dtype: str
    rotate: bool
    lengths: tuple[int, ...]
    tokens: int = 1
    spare: int = 0  # positions of the cache beyond the call's
    splits: int = 1
    sharpness: float = 1.0
    seed: int = 0


@pytest.mark.parametrize("rotate", [True, False], ids=["rotate", "rotated"])
@pytest.mark.parametrize(("model", "dtype", "kv_dtype"), ATTENTIONS)
@settings(max_examples=6)
@given(data=st.data())
def test_attention(
    emulator: Emulator, model: str, dtype: str, kv_dtype: str, rotate: bool, data: st.DataObject
) -> None:
    draw = data.draw
    longest = draw(st.sampled_from([4, 64, 200]))
    a = Attention(
        *(model, dtype, kv_dtype, rotate),
        lengths=tuple(draw(st.lists(st.integers(0, longest), min_size=1, max_size=2))),
        tokens=1 if rotate else draw(st.integers(1, 2)),
        spare=draw(st.integers(0, 9)),
        splits=draw(st.integers(1, 5)),
        sharpness=draw(st.sampled_from([0.0, 1.0, 20.0])),
        seed=draw(SEEDS),
    )
    check_attention(emulator, a)


@pytest.mark.parametrize("rotate", [True, False], ids=["rotate", "rotated"])
@pytest.mark.parametrize(("model", "dtype", "kv_dtype"), ATTENTIONS)
def test_attention_where_shares_end(emulator: Emulator, model: str, dtype: str, kv_dtype: str, rotate: bool) -> None:
    """Contexts of 64, 65 and 131 keys: of one share, two and three, one of which is the last key alone."""
    check_attention(emulator, Attention(model, dtype, kv_dtype, rotate, (63, 130, 64), splits=4))


@pytest.mark.parametrize(("model", "length", "splits"), [("bitnet-2b4t", 390, 7), ("smollm-135m", 620, 11)])
def test_more_shares_than_a_block_combines_at_a_time(emulator: Emulator, model: str, length: int, splits: int) -> None:
    check_attention(emulator, Attention(model, "float32", "int8", True, (length,), splits=splits, sharpness=4.0))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("dtype", "kv"), [(d, kv) for d in ("bfloat16", "float32") for kv in (d, "int8")])
@pytest.mark.parametrize("model", sorted(PRESETS))
def test_attention_without_tensor_cores(emulator: Emulator, model: str, dtype: str, kv: str, rotate: bool) -> None:
    check_attention(emulator, Attention(model, dtype, kv, rotate, (3, 70), splits=2, sharpness=1.0))


def check_attention(emulator: Emulator, a: Attention) -> None:
    """Both kernels, against softmax in float64. Each output may be off by, of the weighted values' magnitudes: what
    scores are off by (float32 sums, their differences), in the weight and in their sum, and the float32 arithmetic of a
    softmax of so many keys; and by its own rounding."""
    config, rng = MODELS[a.model], np.random.default_rng(a.seed)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    batch, n, group = len(a.lengths), len(a.lengths) * a.tokens, heads // kv_heads
    dtype, width, max_len = BY_NAME[a.dtype], (heads + 2 * kv_heads) * dim, max(a.lengths) + a.tokens + a.spare
    qkv = np.full((n, width + 6), np.nan).astype(dtype)  # a pitch of its own
    qkv[:, :width] = rng.standard_normal((n, width))
    lengths, tokens = np.array(a.lengths, I32), I32(a.tokens)
    present = np.arange(max_len) < lengths[:, None] + (0 if a.rotate else a.tokens)
    caches = [random_cache(rng, a.kv_dtype, present, kv_heads, dim) for _ in range(2)]
    (keys, key_scales), (values, value_scales) = before = [(c.copy(), s if s is None else s.copy()) for c, s in caches]
    angles = rng.uniform(-np.pi, np.pi, (max_len, dim // 2))
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(F32)
    softmax_scale = F32(a.sharpness * dim**-0.5)
    # Shares that are not in use are not written, and combining must not look at them.
    partial = np.full((n, heads, a.splits, dim), np.nan, F32)
    stats = np.full((n, heads, a.splits, 2), np.nan, F32)
    launch = tuning.attention_launch(config, a.dtype, a.kv_dtype, a.rotate, n, a.splits)
    args = [qkv, I32(qkv.shape[1]), keys, values, key_scales, value_scales, turns, lengths, tokens]
    args += [*map(I32, (heads, kv_heads, keys.shape[-1], max_len)), softmax_scale, partial, stats]
    emulator.launch_in_orders(launch.spec.name, launch.grid, launch.block, args)
    outputs = []
    for y_dtype in BY_NAME if a.model in PRESETS else (a.dtype,):  # the shares are float32 in any case
        outputs.append(np.empty((n, heads * dim), BY_NAME[y_dtype]))
        launch = tuning.combine_launch(config, y_dtype, n)
        args = [partial, stats, lengths, tokens, I32(a.splits), Output(outputs[-1])]
        emulator.launch_in_orders(launch.spec.name, launch.grid, launch.block, args)

    queries = qkv[:, : heads * dim].reshape(batch, a.tokens, heads, dim)
    if a.rotate:
        queries = turned(queries.astype(F32), turns[lengths][:, None]).astype(dtype)
        new = qkv[:, heads * dim : width].astype(F32).reshape(batch, 2, kv_heads, dim)
        new[:, 0] = turned(new[:, 0], turns[lengths])
        for i, ((cache, scales), vectors) in enumerate(zip(caches, new.swapaxes(0, 1), strict=True)):
            for b, length in enumerate(lengths):
                if scales is None:
                    cache[b, :, length, :dim] = vectors[b]
                else:
                    cache[b, :, length, :dim], scales[b, :, length] = quantised(vectors[b])
            for array, right in zip(before[i], (cache, scales), strict=True):
                if right is not None:  # bytes: nowhere else
                    np.testing.assert_array_equal(array.view(np.uint8), right.view(np.uint8))
    for b, length in enumerate(a.lengths):
        context = length + a.tokens
        future = np.arange(context)[None, :] > length + np.arange(a.tokens)[:, None]
        k, v = (meant(cache, scales, b, context, dim) for cache, scales in caches)
        for h in range(heads):
            q = queries[b, :, h].astype(np.float64)
            scores = np.where(future, -np.inf, q @ k[h // group].T * float(softmax_scale))
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            weights /= weights.sum(axis=1, keepdims=True)
            expected, magnitude = weights @ v[h // group], weights @ np.abs(v[h // group])
            error = np.abs(q) @ np.abs(k[h // group]).T * float(softmax_scale) * (dim + 8) * 2.0**-24
            # A difference of scores is rounded three times. Where it is beyond 100 there is no weight left.
            error = np.where(future, 0.0, error + np.minimum(top - scores, 100.0) * 2.0**-22)
            relative = np.expm1(2 * error.max(axis=1, keepdims=True)) + context * 2.0**-23 + 2.0**-20
            for y in outputs:
                bound = relative * magnitude + float(ml_dtypes.finfo(y.dtype).smallest_normal)
                bound += ROUNDING[y.dtype] * (np.abs(expected) + bound)
                off = np.abs(y.reshape(batch, a.tokens, heads, dim)[b, :, h].astype(np.float64) - expected)
                assert (off <= bound).all(), (
                    f"{a}: {y.dtype}, sequence {b}, head {h}: off by {(off / bound).max():.3g} times what is allowed"
                )


def random_cache(rng: np.random.Generator, kv_dtype: str, present: np.ndarray, kv_heads: int, dim: int) -> Any:
    """Keys or values and their scales; NaN where nobody has been, zero beyond `dim`."""
    (batch, max_len), scaled = present.shape, kv_dtype == "int8"
    cache = np.zeros((batch, kv_heads, max_len, cached_dim(dim, kv_dtype)), ROW_DTYPES[kv_dtype])
    scales = rng.uniform(1e-3, 2e-2, cache.shape[:3]).astype(F32) if scaled else None
    cache[..., :dim] = random_rows(rng, kv_dtype, (*cache.shape[:3], dim))
    absent = np.broadcast_to(~present[:, None], cache.shape[:3])
    if scales is None:
        cache[absent, :dim] = np.nan
    else:
        scales[absent] = np.nan
    return cache, scales


def meant(cache: np.ndarray, scales: np.ndarray | None, b: int, context: int, dim: int) -> np.ndarray:
    values = cache[b, :, :context, :dim].astype(np.float64)
    return values if scales is None else values * scales[b, :, :context, None]


def turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """x [.., heads, D] in float32, as the kernel does it: each product rounded."""
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = turns[..., None, :, 0], turns[..., None, :, 1]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits and scales; one over the scale is rounded, as in the kernel."""
    scale = np.abs(x).max(axis=-1) / F32(127)
    return np.clip(np.rint(x * (F32(1) / scale)[..., None]), -127, 127).astype(np.int8), scale


# ---- the benchmark's floor ------------------------------------------------------------------------------------------


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
    files = ("attention_decode", "attention_prefill", "kernel_properties", "kernels", "sampling")
    if reason := exercised.incomplete(*(f"test_{name}.py" for name in files)):
        pytest.skip(reason)
    kernels = {path.name for path in Path(__file__).parents[2].glob("kernels_cu/*.cu")}
    specs = specialisations()
    assert kernels == {spec.file for spec in specs}, "a kernel file that no specialisation compiles, or the reverse"
    missing = [spec.name for spec in specs if spec.name not in exercised.launched]
    assert not missing, f"{len(missing)} of {len(specs)} specialisations were not launched, such as {missing[:5]}"
