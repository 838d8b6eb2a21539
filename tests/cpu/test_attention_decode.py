"""attention_decode.cu in the emulator, with attention_combine.cu and in clusters, against NumPy; its launch
configurations, and which of the two a decoder chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.formats.config import PRESETS, ModelConfig
from edgellm_cupy.kernels.spec import Launch
from edgellm_cupy.tuning import decoder as tuning
from tests.cpu.test_attention_prefill import DTYPES, ROUNDING, cache_of, quantised, turned
from tests.emulated import GPUS, H200, TINY, emulated_gpu, poisoned
from tests.emulator import ORDERS, Emulator, Output, Scratch
from tests.emulator.emulator import STATIC_SHARED_LIMIT

CONTEXTS = (1, 2, 7, 63, 64, 129)  # keys with the new one; of one batch
SIZES = (0, tuning.PORTABLE_CLUSTER, tuning.LARGE_CLUSTER)
SPLITS, ROOM = 3, 5  # without clusters; positions of the cache that are never reached


@dataclass(frozen=True)
class Case:
    """One new token in each sequence."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float16"
    kv_dtype: str = "float16"
    contexts: tuple[int, ...] = CONTEXTS

    def __str__(self) -> str:
        return f"{self.heads}of{self.kv_heads}x{self.head_dim}_{self.dtype}_{self.kv_dtype}_up_to{max(self.contexts)}"

    @property
    def config(self) -> ec.ModelConfig:
        return model(num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=self.head_dim)

    def plan(self, cluster: int) -> Launch:
        return tuning.decode_launch(self.config, self.dtype, self.kv_dtype, len(self.contexts), SPLITS, cluster)

    def combine(self) -> Launch:
        return tuning.combine_launch(self.config, self.dtype, len(self.contexts))


def model(**changes: Any) -> ec.ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 203}
    return ec.ModelConfig(name="test", **{**sizes, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, **changes})


GROUP_OF_3 = Case(6, 2, 64)
PARTS = Case(9, 1, 80, "bfloat16", "bfloat16")  # 5 and 4 queries
INT8 = Case(3, 1, 64, "float16", "int8")
LARGEST = Case(8, 1, 256, contexts=(20,))  # fewer warps, for the sake of shared memory
CASES = [
    *(GROUP_OF_3, PARTS, INT8, LARGEST),
    Case(2, 2, 16),
    Case(2, 2, 20, "bfloat16", "int8"),
    Case(4, 1, 20),
    Case(4, 1, 128),
    Case(4, 1, 128, "bfloat16", "bfloat16"),
    Case(4, 1, 128, "bfloat16", "int8"),
    Case(10, 1, 16, "float16", "int8"),
    Case(1, 1, 80, "float16", "int8"),
    Case(3, 1, 64, "bfloat16", "bfloat16", (1000, 5)),
    Case(1, 1, 64, "float16", "int8", (1000,)),
    Case(1, 1, 16, contexts=(1400, 1025)),
    *(  # the presets, with every dtype and cache
        Case(group, 1, head_dim, dtype, kv_dtype, (70, 5))
        for group, head_dim in ((3, 64), (1, 64), (4, 128))
        for dtype in ("float16", "bfloat16")
        for kv_dtype in (dtype, "int8")
    ),
]


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator(per_file=4)
    specs = [case.plan(cluster).spec for case in CASES for cluster in SIZES]
    emulator.build([*dict.fromkeys(specs + [case.combine().spec for case in CASES])])
    return emulator


# ---- the kernel -----------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """Arrays of a case. `after`: the caches with the new keys and values."""

    case: Case
    qkv: np.ndarray
    turns: np.ndarray
    caches: list[Any]
    after: list[Any]
    queries: np.ndarray  # [B, heads, D], rotated and rounded, float64


def problem_of(case: Case, rng: np.random.Generator) -> Problem:
    """Random vectors; all that no token may read is NaN, or in int8 far off."""
    batch, max_len, dim = len(case.contexts), max(case.contexts) + ROOM, case.head_dim
    width = (case.heads + 2 * case.kv_heads) * dim
    angles = rng.uniform(0, 6, (max_len, dim // 2))
    turns = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    qkv = poisoned((batch, width + 6), DTYPES[case.dtype])  # a pitch of its own
    qkv[:, :width] = rng.standard_normal((batch, width))
    token = qkv[:, :width].astype(np.float32).reshape(batch, 1, -1, dim)
    positions = np.array(case.contexts)[:, None] - 1
    rotated = turned(token, turns[positions])[:, 0]
    new = [rotated[:, case.heads : case.heads + case.kv_heads], token[:, 0, case.heads + case.kv_heads :]]

    caches = [cache_of(case.kv_dtype, batch, case.kv_heads, max_len, dim) for _ in range(2)]
    for cache, scales in caches:
        for b, context in enumerate(case.contexts):
            part, vectors = cache[b, :, : context - 1], rng.standard_normal((case.kv_heads, context - 1, dim))
            part[...] = 0
            part[..., :dim] = vectors if scales is None else rng.integers(-127, 128, vectors.shape)
            if scales is not None:
                scales[b, :, : context - 1] = rng.uniform(0.01, 0.03, vectors.shape[:2])
    after = [(cache.copy(), None if scales is None else scales.copy()) for cache, scales in caches]
    for (cache, scales), vectors in zip(after, new, strict=True):
        for b, context in enumerate(case.contexts):
            if scales is None:
                cache[b, :, context - 1, :dim] = vectors[b]
            else:
                cache[b, :, context - 1, :dim], scales[b, :, context - 1] = quantised(vectors[b])
    queries = rotated[:, : case.heads].astype(DTYPES[case.dtype]).astype(np.float64)
    return Problem(case, qkv, turns, caches, after, queries)


def attend(emulator: Emulator, p: Problem, cluster: int, order: Any = None) -> np.ndarray:
    """What the kernels compute, [B, heads, D]. The caches have the new keys and values then."""
    case, plan, combine, batch = p.case, p.case.plan(cluster), p.case.combine(), len(p.case.contexts)
    (keys, key_scales), (values, value_scales) = p.caches
    out = np.empty((batch, case.heads * case.head_dim), DTYPES[case.dtype])
    partial = np.empty((batch, case.heads, SPLITS, case.head_dim), np.float32)
    stats, lengths = np.empty((batch, case.heads, SPLITS, 2), np.float32), np.array(case.contexts, np.int32) - 1
    args = [
        *(p.qkv, np.int32(p.qkv.shape[1]), keys, values, key_scales, value_scales, p.turns, lengths),
        *(np.int32(v) for v in (case.heads, case.kv_heads, keys.shape[3], keys.shape[2])),
        np.float32(case.head_dim**-0.5),
        *((None, None, Output(out)) if cluster else (Scratch(partial), Scratch(stats), None)),
    ]
    emulator.launch(plan.spec.name, plan.grid, plan.block, args, cluster=plan.cluster, order=order)
    if not cluster:
        args = [partial, stats, lengths, np.int32(1), np.int32(SPLITS), Output(out)]
        emulator.launch(combine.spec.name, combine.grid, combine.block, args, order=order)
    return out.reshape(batch, case.heads, case.head_dim)


def check(p: Problem, out: np.ndarray) -> None:
    """Against softmax in float64. Of the weighted sum of the values' magnitudes an output may be off by what scores are
    (float32 sums), in the weight and in their sum, and by the weights' rounding to X_T; and by its own rounding."""
    case, rounding = p.case, ROUNDING[p.case.dtype]
    (keys, key_scales), (values, value_scales) = p.after
    for b, context in enumerate(case.contexts):
        for h in range(case.heads):
            at = b, h * case.kv_heads // case.heads, slice(context)
            k, v = (cache[at][:, : case.head_dim].astype(np.float64) for cache in (keys, values))
            if key_scales is not None:
                k, v = k * key_scales[at][:, None], v * value_scales[at][:, None]
            q = p.queries[b, h]
            scores, products = (m @ n * case.head_dim**-0.5 for m, n in ((k, q), (np.abs(k), np.abs(q))))
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            expected, magnitude = weights @ v, weights @ np.abs(v)
            score_error = products.max() * case.head_dim * 2.0**-23 + np.ptp(scores) * 2.0**-22
            bound = (np.expm1(2 * score_error) + context * 2.0**-23 + rounding) * magnitude
            bound += context * 2.0**-24 * np.abs(v).max() * weights.max()  # weights that are subnormal in float16
            bound += rounding * (np.abs(expected) + bound) + 2.0**-25  # the last rounding
            off = np.abs(out[b, h].astype(np.float64) - expected)
            bad = ~(off <= bound)
            assert not bad.any(), (
                f"{case}: {context} keys, head {h}: {bad.sum()} of {bad.size} wrong, the first is feature "
                f"{np.argmax(bad)}: {off[bad][0]:.3g} off, allowed are {bound[bad][0]:.3g}"
            )


@pytest.mark.parametrize("cluster", SIZES, ids=["combine", "8", "16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_of_new_tokens(emulator: Emulator, case: Case, cluster: int) -> None:
    p = problem_of(case, np.random.default_rng(case.heads + case.head_dim))
    check(p, attend(emulator, p, cluster, ORDERS[case.head_dim // 4 % len(ORDERS)]))
    for got, expected in zip(p.caches, p.after, strict=True):
        for array, wanted in zip(got, expected, strict=True):
            if array is not None:
                np.testing.assert_array_equal(array.view(np.uint8), wanted.view(np.uint8))


@pytest.mark.parametrize("cluster", SIZES, ids=["combine", "8", "16"])
@pytest.mark.parametrize("case", [GROUP_OF_3, PARTS, INT8], ids=str)
def test_the_order_of_blocks_and_warps_does_not_matter(emulator: Emulator, case: Case, cluster: int) -> None:
    first, *others = (
        attend(emulator, problem_of(case, np.random.default_rng(0)), cluster, order) for order in (*ORDERS, 2)
    )
    for other in others:
        np.testing.assert_array_equal(other.view(np.uint16), first.view(np.uint16))


# ---- launch configurations ------------------------------------------------------------------------------------------


def test_clusters_need_their_hardware() -> None:
    sizes = {name: tuning.largest_cluster(facts) for name, facts in GPUS.items()}
    large = dict.fromkeys(("H100 PCIe", "H200", "B200"), 16)
    assert sizes == dict.fromkeys(("T4", "A100", "Jetson Orin", "RTX 4090"), 0) | large | {"RTX 5090": 8}


def test_the_size_of_clusters() -> None:
    nine, three = (ModelConfig.preset(f"smollm-135m{name}") for name in ("-notebook", ""))  # key/value heads

    def size(tokens=1, keys=512, dtype="float16", gpu=H200, config=nine):
        return tuning.cluster_size(config, dtype, tokens, keys, gpu)

    assert [size(keys=keys) for keys in (1, 512, 513, 9 * 512, 9 * 512 + 1)] == [8, 8, 16, 16, 0]
    assert [size(keys=keys, gpu=GPUS["RTX 5090"]) for keys in (512, 513)] == [8, 0]
    assert [size(tokens=tokens) for tokens in (3, 4)] == [8, 0]  # 36 clusters are more blocks than the GPU holds
    assert [size(tokens=tokens, keys=600) for tokens in (1, 2)] == [16, 0]
    assert [size(config=three, tokens=tokens) for tokens in (1, 2)] == [0, 8]  # three leave most of it idle
    assert size(dtype="float32") == size(gpu=GPUS["A100"]) == 0


def test_a_cluster_is_a_row_of_the_grid() -> None:
    plan = GROUP_OF_3.plan(16)
    assert (plan.grid, plan.block, plan.cluster) == ((16, 2, len(CONTEXTS)), (128, 1, 1), 16)
    plan = PARTS.plan(0)
    assert (plan.grid, plan.block, plan.cluster) == ((SPLITS, 2, len(CONTEXTS)), (128, 1, 1), 1)


@pytest.mark.parametrize("heads", range(1, 9))
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
def test_shared_memory_suffices(heads: int, head_dim: int) -> None:
    row = -(-head_dim // 64) * 64
    for cluster in SIZES[1:]:
        warps = Case(heads, 1, head_dim).plan(cluster).block[0] // 32
        results, queries, new = warps * heads * row, heads * row, 2 * row
        received = cluster * -(-heads * head_dim // cluster)
        stats = 2 * (warps + cluster) * heads
        assert 4 * (results + queries + new + received + stats) <= STATIC_SHARED_LIMIT


def test_every_group_and_head_dim_of_the_presets_has_a_case() -> None:
    cases = {(case.heads // case.kv_heads, case.head_dim) for case in CASES}
    wanted = {(config.num_heads // config.num_kv_heads, config.head_dim) for config in PRESETS.values()}
    assert wanted <= cases


# ---- the decoder's choice -------------------------------------------------------------------------------------------


def decode(facts: Any, dtype: str = "float16", kv_dtype: str = "auto", steps: int = 4) -> list[tuple[str, ...]]:
    """Which kernels of attention each of `steps` steps behind a ragged prompt of up to 6 tokens launches first."""
    checkpoint = Checkpoint.random(model(), 3)
    reference = ec.reference.TernaryTransformer(checkpoint, activation="float", dtype=dtype)
    kernels: list[tuple[str, ...]] = []
    with emulated_gpu(Emulator(), facts) as gpu:
        decoder = ec.TernaryTransformer(checkpoint, activation="float", dtype=dtype)
        cache, expected = (m.new_cache(20, 2, kv_dtype) for m in (decoder, reference))
        prompt = [[3, 7, 200, 11, 5, 9], [1, 2]]
        decoder.prefill(prompt, cache), reference.prefill(prompt, expected)
        for _ in range(steps):
            token = np.argmax(expected.logits, axis=1).astype(np.int32)
            gpu.launched.clear()
            decoder.decode_one_token(token, cache), reference.decode_one_token(token, expected)
            off = np.abs(cache.logits - expected.logits).max() / np.abs(expected.logits).max()
            assert off < 2e-2, f"length {cache.lengths}: logits are {off:.3g} of the largest off"
            kernels.append(tuple(sorted(spec.file for spec in gpu.launched if spec.file.startswith("attention"))))
    return kernels


DECODE, COMBINE = "attention_decode.cu", "attention_combine.cu"


def test_a_decoder_merges_in_clusters() -> None:
    assert decode(H200) == [(DECODE,), (), (), ()]  # a graph launches without recording
    assert decode(H200, kv_dtype="int8") == [(DECODE,), (), (), ()]


@pytest.mark.parametrize("facts", [GPUS["A100"], TINY], ids=["A100", "tiny"])
def test_a_decoder_without_clusters_combines(facts: Any) -> None:
    assert decode(facts, steps=2) == [(COMBINE, DECODE), ()]


def test_float32_combines() -> None:
    assert decode(H200, "float32", steps=2) == [("attention.cu", COMBINE), ()]


def test_a_decoder_leaves_clusters_when_the_longest_sequence_is_too_long(monkeypatch: Any) -> None:
    monkeypatch.setattr(tuning, "PORTABLE_KEYS", 8)
    monkeypatch.setattr(tuning, "LARGE_KEYS", 2)
    assert decode(H200) == [(DECODE,), (), (COMBINE, DECODE), ()]
