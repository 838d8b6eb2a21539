"""rope_append.cu and attention_prefill.cu in the emulator, against NumPy, and their launch configurations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy.formats.config import PRESETS
from edgellm_cupy.kernels.spec import KernelSpec
from edgellm_cupy.tuning import attention
from tests.emulated import GPUS, H200, T4, poisoned
from tests.emulator import ORDERS, Emulator, Output

DTYPES: dict[str, Any] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, at most
HEAD_DIMS = (12, 16, 20, 64, 80, 128, 256)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator(per_file=4)
    emulator.build([case.plan().launch.spec for case in CASES] + APPENDS)
    return emulator


def cache_of(kv_dtype: str, batch: int, kv_heads: int, max_len: int, head_dim: int) -> Any:
    """Keys or values that nobody wrote, and their scales."""
    shape = (batch, kv_heads, max_len)
    cache = poisoned((*shape, attention.cached_dim(head_dim, kv_dtype)), DTYPES[kv_dtype])
    return cache, poisoned(shape) if kv_dtype == "int8" else None


# ---- attention ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """`tokens` new tokens in each sequence, behind what its cache holds already."""

    tokens: int
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float16"
    kv_dtype: str = "float16"
    row_tiles: int = 1
    facts: Any = field(default=H200, repr=False)
    room: int = 70  # positions of the cache that are never reached

    def __str__(self) -> str:
        lengths = "-".join(map(str, self.lengths))
        return (
            f"S{self.tokens}_after{lengths}_heads{self.heads}of{self.kv_heads}x{self.head_dim}_{self.dtype}_"
            f"{self.kv_dtype}_{self.row_tiles}"
        )

    def plan(self) -> attention.PrefillLaunch:
        """What the package would launch, but for the number of row tiles."""
        problem = (self.heads, self.kv_heads, self.head_dim, self.dtype, self.kv_dtype)
        configs = attention.prefill_configs(self.head_dim, self.kv_dtype)
        fitting = [c for c in configs if c.shared_bytes(self.head_dim, 2) <= self.facts.block_shared_bytes]
        config = next(c for c in fitting if c.row_tiles == self.row_tiles)
        return attention.prefill_launch(*problem, len(self.lengths), self.tokens, self.facts, config)


ONE_TOKEN = Case(1, (100,), 4, 2, 64)
GROUP_OF_3 = Case(65, (63,), 3, 1, 64)
SEVERAL = Case(130, (0, 100), 1, 1, 80)
INT8 = Case(65, (0, 63), 2, 1, 64, "float16", "int8")
CASES = [
    *(ONE_TOKEN, GROUP_OF_3, SEVERAL, INT8),
    Case(1, (0,), 1, 1, 16),
    Case(1, (1, 63, 64), 4, 2, 64),
    Case(2, (62, 61), 1, 1, 64),  # one token sees the last key of a tile, the other does not
    Case(3, (0, 100), 3, 1, 64, room=0),
    Case(64, (0,), 2, 2, 64),
    Case(130, (1,), 1, 1, 64, row_tiles=2),
    Case(65, (100, 0), 4, 1, 128, room=0),
    Case(130, (1,), 1, 1, 128, row_tiles=2),
    Case(50, (63, 0), 4, 1, 80, row_tiles=2),
    Case(33, (0, 1), 3, 1, 16, "bfloat16", "bfloat16"),
    Case(65, (1,), 2, 1, 64, "bfloat16", "bfloat16"),
    Case(3, (100, 1), 3, 1, 80, "float16", "int8", room=0),
    Case(70, (0,), 1, 1, 128, "float16", "int8", row_tiles=2),
    Case(40, (30,), 1, 1, 12),  # heads that begin at multiples of 4 bytes only
    Case(9, (60, 1), 2, 1, 20, "float16", "int8"),
    Case(20, (50,), 2, 1, 256, room=0),
    Case(20, (50,), 2, 1, 256, facts=T4),
    Case(70, (60,), 1, 1, 112, facts=T4),
    *(  # every specialisation of the presets
        Case(20, (50,), 3, 1, head_dim, dtype, kv_dtype, row_tiles)
        for head_dim in (64, 128)
        for dtype in ("float16", "bfloat16")
        for kv_dtype in (dtype, "int8")
        for row_tiles in (1, 2)
    ),
]


@dataclass
class Problem:
    """Arrays of a case. `keys` and `values`: what the caches stand for, [kv_heads, context, D] a sequence, float64."""

    case: Case
    qkv: np.ndarray
    keys: list[np.ndarray]
    values: list[np.ndarray]
    caches: list[tuple[np.ndarray, Any]]
    softmax_scale: float


def problem_of(case: Case, rng: np.random.Generator, draw: Any = None) -> Problem:
    """Random queries and a random cache; all that no token may read is NaN, or in int8 far off.

    draw: what makes queries, keys and values of a shape, in place of the normal distribution.
    """
    draw = draw or rng.standard_normal
    batch, width = len(case.lengths), case.heads + 2 * case.kv_heads
    max_len = max(case.lengths) + case.tokens + case.room
    qkv = poisoned((batch * case.tokens, width * case.head_dim), DTYPES[case.dtype])
    queries = draw((batch * case.tokens, case.heads * case.head_dim))
    qkv[:, : case.heads * case.head_dim] = queries  # keys and values are read from the cache
    caches = [cache_of(case.kv_dtype, batch, case.kv_heads, max_len, case.head_dim) for _ in range(2)]
    contents: list[list[np.ndarray]] = [[], []]
    for b, length in enumerate(case.lengths):
        for (cache, scales), content in zip(caches, contents, strict=True):
            vectors = draw((case.kv_heads, length + case.tokens, case.head_dim))
            part = cache[b, :, : length + case.tokens]
            part[...] = 0
            if case.kv_dtype == "int8":
                scale = (np.abs(vectors).max(axis=-1) / 127).astype(np.float32)
                part[..., : case.head_dim] = np.rint(vectors / scale[..., None].astype(np.float64))
                scales[b, :, : length + case.tokens] = scale
                content.append(part[..., : case.head_dim].astype(np.float64) * scale[..., None])
            else:
                part[..., : case.head_dim] = vectors
                content.append(part[..., : case.head_dim].astype(np.float64))
    return Problem(case, qkv, contents[0], contents[1], caches, case.head_dim**-0.5)


def attend(emulator: Emulator, p: Problem, order: Any = None) -> np.ndarray:
    """What the kernel computes, [B, S, heads, D]."""
    case, plan = p.case, p.case.plan()
    batch, (keys, key_scales), (values, value_scales) = len(case.lengths), *p.caches
    out = np.empty((batch * case.tokens, case.heads * case.head_dim), DTYPES[case.dtype])
    args = [
        *(p.qkv, np.int32(p.qkv.shape[1]), keys, values, key_scales, value_scales),
        np.array(case.lengths, np.int32),
        *(np.int32(v) for v in (case.tokens, case.heads, case.kv_heads, keys.shape[2])),
        *(np.float32(p.softmax_scale), Output(out), np.int32(plan.slots)),
    ]
    launch = plan.launch
    emulator.launch(launch.spec.name, launch.grid, launch.block, args, shared=launch.shared_bytes, order=order)
    return out.reshape(batch, case.tokens, case.heads, case.head_dim)


def check(p: Problem, out: np.ndarray, exact_scores: bool = False) -> None:
    """Against softmax in float64. Each output may be off by, of the weighted sum of the values' magnitudes:

    - the rounding of the weights to X_T, and with int8 that of the values;
    - what scores are off by (float32 sums, and with int8 the rounding of the keys), in the weight and in their sum;
    - the float32 arithmetic of the softmax;

    and by its own rounding. Weights that are subnormal in float16, below 2^-29 of the largest, are off by 2^-40 of it.
    `exact_scores`: products and sums are whole numbers that float32 holds.
    """
    case, rounding = p.case, ROUNDING[p.case.dtype]
    group, width = case.heads // case.kv_heads, case.heads * case.head_dim
    queries = p.qkv[:, :width].astype(np.float64).reshape(len(case.lengths), case.tokens, case.heads, case.head_dim)
    for b, length in enumerate(case.lengths):
        context = length + case.tokens
        hidden = np.arange(context)[None, :] > length + np.arange(case.tokens)[:, None]
        for h in range(case.heads):
            q, k, v = queries[b, :, h], p.keys[b][h // group], p.values[b][h // group]
            scores = np.where(hidden, -np.inf, q @ k.T * p.softmax_scale)
            top = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - top)
            weights /= weights.sum(axis=1, keepdims=True)
            expected, magnitude = weights @ v, weights @ np.abs(v)

            products = np.abs(q) @ np.abs(k).T * p.softmax_scale
            error = np.where(hidden, 0.0, 0.0 if exact_scores else products * case.head_dim * 2.0**-23)
            # A difference of scores is rounded three times. Where it is beyond 100 there is no weight left.
            error += np.where(hidden, 0.0, np.minimum(top - scores, 100.0)) * 2.0**-22
            error += np.where(hidden, 0.0, products * rounding) if case.kv_dtype == "int8" else 0.0
            relative = np.expm1(2 * error.max(axis=1, keepdims=True)) + context * 2.0**-23 + 2.0**-20
            relative = relative + rounding * (2 if case.kv_dtype == "int8" else 1)
            bound = relative * magnitude + context * 2.0**-40 * np.abs(v).max()
            bound += rounding * (np.abs(expected) + bound) + 2.0**-25  # the last rounding
            off = np.abs(out[b, :, h].astype(np.float64) - expected)
            bad = ~(off <= bound)
            assert not bad.any(), (
                f"{case}: sequence {b}, head {h}: {bad.sum()} of {bad.size} wrong, the first at (token, feature) "
                f"{tuple(np.argwhere(bad)[0])}: {off[bad][0]:.3g} off, allowed are {bound[bad][0]:.3g}"
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_a_prompt(emulator: Emulator, case: Case) -> None:
    p = problem_of(case, np.random.default_rng(case.tokens + case.head_dim))
    check(p, attend(emulator, p, ORDERS[case.tokens % len(ORDERS)]))


def test_the_cases_have_rings_of_every_length() -> None:
    for row_tiles, slots in ((1, {2, 3, 4}), (2, {2, 4})):
        assert {case.plan().slots for case in CASES if case.row_tiles == row_tiles} == slots


def prefill_specs(head_dim: int) -> set[KernelSpec]:
    """All there are, with the caches that each dtype may have."""
    pairs = [(dtype, kv_dtype) for dtype in ("float16", "bfloat16") for kv_dtype in (dtype, "int8")]
    return {spec for pair in pairs for spec in attention.prefill_specs(head_dim, *pair)}


def test_every_specialisation_of_the_presets_has_a_case() -> None:
    presets = {spec for config in PRESETS.values() for spec in prefill_specs(config.head_dim)}
    assert presets <= {case.plan().launch.spec for case in CASES}


@pytest.mark.parametrize("case", [GROUP_OF_3, INT8], ids=str)
def test_the_order_of_warps_does_not_matter(emulator: Emulator, case: Case) -> None:
    p = problem_of(case, np.random.default_rng(0))
    first, *others = (attend(emulator, p, order) for order in ORDERS)
    for other in others:
        np.testing.assert_array_equal(other.view(np.uint16), first.view(np.uint16))


@pytest.mark.parametrize("case", [GROUP_OF_3, SEVERAL], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(emulator: Emulator, case: Case, sign: int) -> None:
    """Scores of some 10^5, where most of a row has no weight at all, and of one sign: all sums far from zero."""
    rng = np.random.default_rng(5)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return rng.integers(1, 8, shape) * 16.0

    p = problem_of(case, rng, draw)
    p.qkv[:, : case.heads * case.head_dim] *= DTYPES[case.dtype].type(sign)
    check(p, attend(emulator, p), exact_scores=True)


def test_keys_that_tie_share_the_weight(emulator: Emulator) -> None:
    """Every score is the same, near the largest that there is: the mean of the values."""
    p = problem_of(GROUP_OF_3, np.random.default_rng(6), lambda shape: np.full(shape, 30000.0))
    out = attend(emulator, p).astype(np.float64)
    np.testing.assert_allclose(out, 30000.0, rtol=2 * ROUNDING[GROUP_OF_3.dtype])


def test_float16_keeps_small_weights(emulator: Emulator) -> None:
    """One key has nearly all the weight, and the others, with less than float16's 6e-8 each, have all the value."""
    p = problem_of(ONE_TOKEN, np.random.default_rng(7))
    p.softmax_scale = 1.0
    p.qkv[:, : ONE_TOKEN.heads * ONE_TOKEN.head_dim] = 1.0
    (keys, _), (values, _) = p.caches
    keys[:, :, :101], values[:, :, :101] = 0.0, 1000.0
    keys[:, :, 40, 0], values[:, :, 40] = 17.0, 0.0
    out = attend(emulator, p).astype(np.float64)
    np.testing.assert_allclose(out, 1e5 * np.exp(-17.0) / (1 + 100 * np.exp(-17.0)), rtol=2e-3)


# ---- rotary embedding and append ------------------------------------------------------------------------------------

APPENDS = [
    attention.append_spec(dtype, kv_dtype)
    for dtype in ("float16", "bfloat16", "float32")
    for kv_dtype in (dtype, "int8")
]


def append(
    emulator: Emulator, dtype: str, qkv: np.ndarray, caches: Any, turns: np.ndarray, lengths: Any, heads: int, D: int
) -> None:
    (keys, key_scales), (values, value_scales) = caches
    (batch, kv_heads, max_len, cached), kv_dtype = keys.shape, "int8" if key_scales is not None else dtype
    tokens = qkv.shape[0] // batch
    args = [
        *(qkv, np.int32(qkv.shape[1]), keys, values, key_scales, value_scales, turns, np.array(lengths, np.int32)),
        *(np.int32(v) for v in (tokens, heads, kv_heads, D, cached, max_len)),
    ]
    spec = attention.append_spec(dtype, kv_dtype)
    emulator.launch_in_orders(spec.name, qkv.shape[0], attention.APPEND_THREADS, args)


def turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """x [.., heads, D] in float32, as the kernel does it: each product rounded."""
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = turns[..., None, :, 0], turns[..., None, :, 1]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits and scales; one over the scale is rounded, as in the kernel."""
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    with np.errstate(divide="ignore"):
        factor = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    return np.clip(np.rint(x * factor[..., None]), -127, 127).astype(np.int8), scale


@pytest.mark.parametrize("kv", ["same", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tokens", "lengths"),
    [(1, 1, 2, 1, (0,)), (3, 1, 20, 3, (5, 0)), (4, 2, 64, 2, (0, 9, 1)), (2, 2, 130, 1, (3,))],
)
def test_rotary_and_append(
    emulator: Emulator, dtype: str, kv: str, heads: int, kv_heads: int, head_dim: int, tokens: int, lengths: Any
) -> None:
    rng, batch, kv_dtype = np.random.default_rng(head_dim), len(lengths), dtype if kv == "same" else kv
    max_len, width = max(lengths) + tokens, (heads + 2 * kv_heads) * head_dim
    angles = rng.uniform(0, 6, (max_len, head_dim // 2))
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    qkv = poisoned((batch * tokens, width + 6), DTYPES[dtype])  # a pitch of its own
    qkv[:, :width] = rng.standard_normal((batch * tokens, width))
    qkv[0, heads * head_dim : width] = 0  # a zero key and a zero value
    x = qkv[:, :width].astype(np.float32).reshape(batch, tokens, -1, head_dim)
    positions = np.array(lengths)[:, None] + np.arange(tokens)
    new = [turned(x[:, :, heads : heads + kv_heads], turns[positions]), x[:, :, heads + kv_heads :]]

    caches = [cache_of(kv_dtype, batch, kv_heads, max_len, head_dim) for _ in range(2)]
    expected: Any = [(cache.copy(), None if scales is None else scales.copy()) for cache, scales in caches]
    after = qkv.copy()
    after[:, : heads * head_dim] = turned(x[:, :, :heads], turns[positions]).reshape(batch * tokens, -1)
    for (cache, scales), vectors in zip(expected, new, strict=True):
        for b in range(batch):
            to, rows = positions[b], vectors[b].swapaxes(0, 1)
            if kv_dtype == "int8":
                cache[b][:, to, :head_dim], scales[b][:, to] = quantised(rows)
            else:
                cache[b][:, to, :head_dim] = rows
    append(emulator, dtype, qkv, caches, turns, lengths, heads, head_dim)

    def same(a: np.ndarray, b: np.ndarray) -> None:  # bytes, as poison is NaN
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))

    same(qkv, after)
    for (cache, scales), (right, right_scales) in zip(caches, expected, strict=True):
        same(cache, right)
        if scales is not None:
            same(scales, right_scales)


def test_what_is_not_a_number_stays_so_in_an_int8_cache(emulator: Emulator) -> None:
    qkv = np.ones((3, 3 * 8), np.float32)
    qkv[0, 9], qkv[1, 9], qkv[2, 9] = np.nan, np.inf, 1e-38  # the last is below the smallest step
    qkv[2, 8:16] *= 1e-38
    caches = [cache_of("int8", 1, 1, 3, 8) for _ in range(2)]
    turns = np.stack([np.ones((3, 4)), np.zeros((3, 4))], axis=-1).astype(np.float32)
    append(emulator, "float32", qkv, caches, turns, [0], 1, 8)
    keys, scales = caches[0]
    with np.errstate(invalid="ignore"):
        meant = keys[0, 0, :, :8] * scales[0, 0, :, None]
    assert np.isnan(meant[0]).all()
    assert not np.isfinite(meant[1]).any()
    np.testing.assert_array_equal(meant[2], 0)


# ---- launch configurations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
def test_every_launch_fits(facts: Any, head_dim: int, kv_dtype: str) -> None:
    assert attention.prefill_unsupported(head_dim, "float16", kv_dtype, facts) is None
    reachable = set(prefill_specs(head_dim))
    for heads, kv_heads, batch, tokens in [(1, 1, 1, 1), (9, 3, 5, 100), (20, 5, 1, 4096), (71, 1, 64, 700)]:
        plan = attention.prefill_launch(heads, kv_heads, head_dim, "float16", kv_dtype, batch, tokens, facts)
        launch, config = plan.launch, plan.config
        assert launch.spec in reachable
        assert 2 <= plan.slots <= 4
        assert launch.shared_bytes == config.shared_bytes(head_dim, plan.slots) <= facts.block_shared_bytes
        assert launch.grid[0] == batch * kv_heads
        rows = tokens * heads // kv_heads
        assert (launch.grid[1] - 1) * config.rows < rows <= launch.grid[1] * config.rows


def test_every_enumerated_specialisation_is_chosen_somewhere() -> None:
    for head_dim in HEAD_DIMS:
        chosen = {
            attention.prefill_launch(8, 8, head_dim, dtype, kv_dtype, 1, tokens, facts).launch.spec
            for facts in GPUS.values()
            for dtype in ("float16", "bfloat16")
            for kv_dtype in (dtype, "int8")
            for tokens in (1, 8000)
            if attention.prefill_unsupported(head_dim, dtype, kv_dtype, facts) is None
        }
        # bfloat16 is not on T4, for which the smallest blocks of head_dim 256 are.
        assert chosen >= {s for s in prefill_specs(head_dim) if head_dim < 256 or ("X_T", "__half") in s.macros}


def test_large_tiles_are_for_problems_that_fill_the_gpu() -> None:
    def rows(tokens: int, batch: int = 1) -> int:
        return attention.prefill_launch(20, 5, 128, "float16", "float16", batch, tokens, H200).config.rows

    assert [rows(512), rows(4096), rows(512, batch=8)] == [64, 128, 128]
    # Shared memory for two blocks of a multiprocessor comes before tiles in flight.
    for facts, slots in ((H200, 4), (GPUS["A100"], 3), (T4, 2)):
        assert attention.prefill_launch(20, 5, 128, "float16", "float16", 1, 4096, facts).slots == slots


@pytest.mark.parametrize(
    ("head_dim", "dtype", "kv_dtype", "facts", "reason"),
    [
        (128, "float32", "float32", H200, "float32"),
        (128, "bfloat16", "bfloat16", T4, "sm_75"),
        (128, "float16", "bfloat16", H200, "cache is bfloat16"),
        (258, "float16", "float16", H200, "head_dim is 258"),
        (15, "float16", "float16", H200, "head_dim is 15"),
    ],
)
def test_what_is_not_served_has_a_reason(head_dim: int, dtype: str, kv_dtype: str, facts: Any, reason: str) -> None:
    message = attention.prefill_unsupported(head_dim, dtype, kv_dtype, facts)
    assert message is not None
    assert reason in message


def test_a_cached_vector_is_whole_pieces() -> None:
    dims = [(64, "float16", 64), (20, "bfloat16", 24), (20, "int8", 32), (6, "float32", 8)]
    assert [attention.cached_dim(d, kv) for d, kv, _ in dims] == [expected for *_, expected in dims]
