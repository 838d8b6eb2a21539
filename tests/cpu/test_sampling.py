"""Sampling: NumPy against the definitions in float64, and the kernel in the emulator against NumPy, token for token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.reference.sampling import distances, filtered, masses, philox4x32, sample
from edgellm_cupy.sampling import Sampling
from tests.emulator import ORDERS, Emulator, Output

SPECS = {threads: KernelSpec("sample.cu", (("THREADS", str(threads)),)) for threads in (32, 1024)}
"""1,024 as on the GPU; with 32, lists and histograms are so short that few tokens take every path."""
PROBABLE = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=2**63 + 7)
SAMPLINGS = {
    "greedy": Sampling(),
    "penalised": Sampling(repetition_penalty=1.5),
    "plain": Sampling(temperature=1, seed=1),
    "all filters": PROBABLE,
    "top_k 1": Sampling(temperature=1, top_k=1),
    "top_k beyond a list": Sampling(temperature=2, top_k=900),
    "top_k beyond all": Sampling(temperature=1, top_k=2**31 - 1),
    "top_p": Sampling(temperature=1, top_p=0.95, seed=2**64 - 1),
    "tiny top_p": Sampling(temperature=1, top_p=1e-30),
    "top_k and top_p": Sampling(temperature=3, top_k=500, top_p=0.5),
    "min_p": Sampling(temperature=1, min_p=0.1),
    "min_p 1": Sampling(temperature=1, min_p=1),
    "min_p and top_p": Sampling(temperature=2, min_p=0.01, top_p=0.8),
    "cold": Sampling(temperature=1e-4, top_p=0.9),
    "hot": Sampling(temperature=1e4, top_p=0.7, repetition_penalty=2),
    "hot top_k": Sampling(temperature=1e4, top_k=777),
    "penalty below 1": Sampling(temperature=1, repetition_penalty=1e-3),
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    emulator.build(SPECS.values())
    return emulator


def launch(emulator, threads, logits, sampling, seen, length, count=1, order="forward"):
    """The kernel's tokens, and what it made of `length`."""
    token, length, seen = np.empty(len(logits), np.int32), np.array(length, np.int32), seen.astype(np.uint8)
    numbers = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty]
    integers = [sampling.top_k, sampling.seed % 2**32, sampling.seed >> 32]
    args = [logits, seen, np.array(numbers, np.float32), np.array(integers, np.uint32), Output(token), length]
    args += [np.int32(0), np.int32(logits.shape[1]), np.int32(count)]
    emulator.launch(SPECS[threads].name, len(logits), threads, args, order=order)
    return token, length


def check(emulator, threads, logits, sampling, seen, length, count=1, order="forward"):
    token, length_after = launch(emulator, threads, logits, sampling, seen, length, count, order)
    expected = sample(logits, sampling, seen, np.add(length, count))
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_array_equal(length_after, np.add(length, count))


# ---- the kernel equals NumPy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("threads", SPECS)
def test_kernel_on_random_logits(emulator, threads, sampling):
    for i, (v, spread) in enumerate(product((1, 5, 300, 5000, 4999), (0.01, 1, 8))):
        rng = np.random.default_rng(i)
        logits = (spread * rng.standard_normal((3, v))).astype(np.float32)
        seen = rng.random((3, v)) < 0.2
        options = replace(sampling, seed=sampling.seed ^ i)
        check(emulator, threads, logits, options, seen, [0, 9, 70_000 + i], 1 + i % 3, ORDERS[i % len(ORDERS)])


def hard_rows(v: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    normal = rng.standard_normal(v).astype(np.float32)
    some = rng.random(v) < 0.5
    last = np.arange(v) == v - 1
    return {
        "equal": np.full(v, 3.5, np.float32),
        "few values": np.round(2 * normal) / 2,
        "zeros of both signs": np.where(some, np.float32(0), np.float32(-0.0)),
        "two clusters": np.where(rng.random(v) < 2 / v, np.float32(12), np.float32(0)) + normal * np.float32(1e-6),
        "one huge": np.where(last, np.float32(1e30), normal),
        "one huge negative": np.where(last, np.float32(-3e38), normal),
        "extremes": np.where(some, np.float32(3e38), np.float32(-3e38)),
        "infinite": np.where(some, np.float32(np.inf), normal),
        "masked": np.where(some, np.float32(-np.inf), normal),
        "all masked": np.full(v, -np.inf, np.float32),
        "NaN": np.where(some, np.float32(np.nan), normal),
        "all NaN": np.full(v, np.nan, np.float32),
        "NaN, infinities": rng.choice(np.array([np.nan, np.inf, -np.inf, 1], np.float32), v),
        "subnormal": (normal * 1e-39).astype(np.float32),
        "least normal": (normal * 4e-38).astype(np.float32),
        "sorted": np.sort(normal),
        "far below": np.where(last, np.float32(27), np.float32(0)) - np.abs(normal) / 4,
    }


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("threads", SPECS)
def test_kernel_on_hard_logits(emulator, threads, sampling):
    for v in (5, 1203):
        rng = np.random.default_rng(v)
        logits = np.stack(list(hard_rows(v, rng).values()))
        seen = rng.random(logits.shape) < 0.3
        check(emulator, threads, logits, sampling, seen, np.arange(len(logits)))


def test_kernel_in_every_order_of_blocks_and_threads(emulator):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 2000)).astype(np.float32)
    for order, sampling in product(ORDERS, (PROBABLE, SAMPLINGS["hot"], SAMPLINGS["top_p"])):
        check(emulator, 32, logits, sampling, rng.random(logits.shape) < 0.1, [5, 6], order=order)


def test_kernel_on_a_row_that_starts_anywhere(emulator):
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(2 * 400 + 1).astype(np.float32)[1:].reshape(2, 400)
    check(emulator, 32, logits, PROBABLE, rng.random(logits.shape) < 0.3, [1, 2])


@pytest.mark.parametrize("spread", [0.5, 2.5])  # the nucleus is most of the vocabulary; it fits the list
def test_kernel_on_real_vocabularies(emulator, spread):
    for v, name in product((49_152, 128_256), ("all filters", "top_p", "plain")):
        rng = np.random.default_rng(v)
        logits = (spread * rng.standard_normal((1, v))).astype(np.float32)
        logits[0, :3] += np.float32(6 * spread - 3)
        check(emulator, 1024, logits, SAMPLINGS[name], rng.random(logits.shape) < 0.01, [300])


# ---- NumPy equals the definitions -----------------------------------------------------------------------------------


def defined(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> tuple[np.ndarray, float]:
    """Probabilities [V] by the definitions, in float64, and how near the closest call of a filter was."""
    scores, penalty = logits.astype(np.float64), sampling.repetition_penalty
    scores = np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores) / sampling.temperature
    order = np.argsort(-scores)
    p, near = np.exp(scores - scores.max())[order], np.inf
    if sampling.top_k and sampling.top_k < p.size:
        near = min(near, 1 - p[sampling.top_k] / p[sampling.top_k - 1])
        p[sampling.top_k :] = 0
    if sampling.top_p < 1:
        reached = np.cumsum(p) / p.sum()
        near = min(near, np.abs(reached - sampling.top_p).min())
        p[np.searchsorted(reached, sampling.top_p) + 1 :] = 0
    if sampling.min_p:
        near = min(near, np.abs(p / p[0] - sampling.min_p).min() if sampling.min_p < 1 else 1 - p[1] / p[0])
        p[p < sampling.min_p * p[0]] = 0
    result = np.empty_like(p)
    result[order] = p / p.sum()
    return result, near


def test_kept_tokens_and_their_probabilities():
    rng, clear = np.random.default_rng(2), 0
    for i in range(600):
        v = int(rng.choice([2, 7, 60, 500, 3000]))
        sampling = Sampling(
            temperature=float(10 ** rng.uniform(-1, 1)),
            top_k=int(rng.choice([0, 0, 1, 5, 50, 400])),
            top_p=float(rng.choice([1, rng.uniform(0.01, 1)])),
            min_p=float(rng.choice([0, 1, 10 ** rng.uniform(-4, -0.1)])),
            repetition_penalty=float(rng.choice([1, rng.uniform(0.5, 2)])),
        )
        logits, seen = (3 * rng.standard_normal(v)).astype(np.float32), rng.random(v) < 0.1
        factor = np.where(logits > 0, np.float32(1 / sampling.repetition_penalty), sampling.repetition_penalty)
        tokens, through = filtered(np.where(seen, logits * factor, logits).astype(np.float32), sampling)
        expected, near = defined(logits, sampling, seen)
        if near < 1e-5:
            continue
        clear += 1
        p = np.zeros(v)
        p[tokens] = np.diff(through, prepend=np.uint64(0)) / float(through[-1])
        negligible = expected < expected.max() * 2.0**-39.9
        np.testing.assert_array_equal(p[~negligible] > 0, expected[~negligible] > 0, err_msg=f"{i}: {sampling}")
        np.testing.assert_allclose(p, expected, rtol=2e-5, atol=1e-12, err_msg=f"{i}: {sampling}")
    assert clear > 400


@pytest.mark.parametrize("name", ["plain", "all filters", "top_p", "min_p"])
def test_draws_follow_the_probabilities(name):
    sampling, draws, v = SAMPLINGS[name], 20_000, 24
    rng = np.random.default_rng(3)
    logits, seen = (1.5 * rng.standard_normal(v)).astype(np.float32), rng.random(v) < 0.2
    p, near = defined(logits, sampling, seen)
    assert near > 1e-4
    rows = np.broadcast_to(logits, (draws, v))
    drawn = sample(rows, sampling, np.broadcast_to(seen, (draws, v)), np.arange(draws))
    counts = np.bincount(drawn, minlength=v)
    assert not counts[p == 0].any()
    assert chi_square(counts[p > 0], p[p > 0] * draws) < 4


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic lies above its mean (Wilson and Hilferty 1931)."""
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def test_seeds_positions_and_sequences_are_independent():
    draws, v = 4000, 4
    rows, positions = np.zeros((draws, v), np.float32), np.zeros(draws, np.int64)
    seed = Sampling(temperature=1, seed=11)

    def one_sequence(sampling, positions):
        return np.array([sample(rows[:1], sampling, None, [position])[0] for position in positions])

    steps = np.arange(draws)
    base = one_sequence(seed, steps)
    others = {
        "seed": one_sequence(replace(seed, seed=12), steps),
        "upper half of the seed": one_sequence(replace(seed, seed=11 + 2**32), steps),
        "next position": one_sequence(seed, steps + 1),
        "sequence": np.array([sample(rows[:2], seed, None, [step, step])[1] for step in steps]),
        "sequences": sample(rows, seed, None, positions),
    }
    for name, other in others.items():
        pairs = np.bincount(v * base + other, minlength=v * v)
        assert chi_square(pairs, np.full(v * v, draws / v**2)) < 4, name
    np.testing.assert_array_equal(one_sequence(seed, steps), base)


def test_ties_take_the_lowest_indices():
    logits = np.full(40, 1, np.float32)
    logits[[33, 7]] = 2
    assert sample([logits], Sampling(), None, [0]) == [7]
    tokens, _ = filtered(logits, Sampling(temperature=1, top_k=4))
    assert tokens.tolist() == [7, 33, 0, 1]
    tokens, _ = filtered(np.zeros(8, np.float32), Sampling(temperature=1, top_p=0.5))
    assert tokens.tolist() == [0, 1, 2, 3]


def test_greedy_and_special_values():
    nan, inf = np.nan, np.inf
    rows = [[nan, -inf, 5, 9], [nan, inf, 5, inf], [-inf, -inf, -inf, -inf], [nan, nan, nan, nan], [nan, -1, 0, -2]]
    assert sample(rows, Sampling(), None, range(5)).tolist() == [3, 1, 0, 0, 2]
    drawn = sample(np.tile(np.float32(rows[1]), (200, 1)), Sampling(temperature=1), None, range(200))
    assert set(drawn.tolist()) == {1, 3}
    seen = [[False, False, True, False], [False, False, True, False]]
    penalised = sample([[3, 1, 4, 2], [-5, -4, -3, -9]], Sampling(repetition_penalty=2), seen, [0, 0])
    assert penalised.tolist() == [0, 1]


def test_philox_known_answers():
    """The known answers that the Random123 library publishes."""
    ones = 2**32 - 1
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones, ones)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    assert pi == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_masses_are_exponentials_that_never_grow():
    octave = 2**26
    for start in (0, octave // 3, octave - 10_000, 3 * octave - 10_000, 39 * octave - 10_000, 40 * octave - 10_000):
        mass = masses(np.arange(start, start + 20_000, dtype=np.uint32))
        assert (np.diff(mass.astype(np.int64)) <= 0).all()
    far = np.arange(0, 41 * octave, 1_000_003).astype(np.uint32)
    np.testing.assert_allclose(masses(far), 2.0 ** (40 - far / octave), rtol=1.5e-7, atol=1)
    assert masses(np.array([0, octave, 40 * octave, 40 * octave + 1])).tolist() == [2**40, 2**39, 1, 0]


def test_distances_count_octaves_of_probability():
    logits = np.float32([0, -np.log(2), -3, 1, -np.inf, np.nan])
    octaves = distances(logits, 0.5)[:4] / 2**26
    np.testing.assert_allclose(octaves, (1 - logits[:4]) / 0.5 / np.log(2), rtol=3e-7)
    assert (distances(logits, 0.5)[4:] > 40 * 2**26).all()
