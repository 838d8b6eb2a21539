"""Sampling in NumPy: the meaning of kernels_cu/sample.cu, with which it agrees token for token.

A token's distance says how many octaves (factors of two) its probability lies below the largest one, in units of
2**-26; its mass is 2**-distance as an integer. Sorted by (distance, index), every filter keeps a prefix, and a random
number below the prefix's mass falls on one of its tokens. A distance is a subtraction and a product in float32, and all
that follows is in integers: nothing depends on the machine, the order of a sum, or the last bits of an exponential.

Beside the definition on paper: a mass is within 1e-7 of the probability it stands for; tokens less than 2**-40 times as
probable as the most probable one are never drawn; top_p and min_p are float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..sampling import Sampling

_FRACTION_BITS, _MASS_BITS = 26, 40
_FARTHEST = _MASS_BITS << _FRACTION_BITS  # beyond it the mass is zero
_OCTAVES = np.float32(2**_FRACTION_BITS / np.log(2))
# 2**-x for x from 0 to 1 in units of 2**-31, signs alternating. Exact at both ends: no mass grows with distance.
_POLYNOMIAL = (2017903, 19743523, 118729907, 515776670, 1488514207, 2147483648)


def sample(logits: Any, sampling: Sampling, seen: Any | None, positions: Any) -> np.ndarray:
    """The next token of each sequence.

    Args:
        logits: float32 [B, V]; NaN counts as -inf. Where all are -inf, token 0 is taken.
        seen: bool [B, V], the tokens of each context, for the repetition penalty; None: none.
        positions: integers [B], the position that each new token takes in its sequence.

    Returns:
        int32 [B].
    """
    logits = np.asarray(logits, np.float32)
    if seen is not None:
        logits = _penalise(logits, np.asarray(seen, bool), np.float32(sampling.repetition_penalty))
    rows = zip(logits, positions, strict=True)
    return np.array([_choose(row, sampling, b, int(position)) for b, (row, position) in enumerate(rows)], np.int32)


def _choose(row: np.ndarray, sampling: Sampling, sequence: int, position: int) -> int:
    tokens, through = filtered(row, sampling)
    low, high, _, _ = philox4x32((position % 2**32, sequence, 0, 0), (sampling.seed % 2**32, sampling.seed >> 32))
    return int(tokens[_first_beyond(through, (high << 32 | low) * int(through[-1]) >> 64)])


def filtered(row: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that all filters keep, the most probable first, and the mass of each with all before it (uint64).

    row: float32 [V], after the repetition penalty.
    """
    distance = distances(row, sampling.temperature)
    (tokens,) = np.nonzero(distance <= _FARTHEST)
    tokens = tokens[np.argsort(distance[tokens], kind="stable")]
    mass = masses(distance[tokens])
    through = np.cumsum(mass)
    n = tokens.size
    # Temperature 0 is the limit: nothing but the largest logits, and the first of them.
    if top_k := sampling.top_k if sampling.temperature else 1:
        n = min(top_k, n)
    if np.float32(sampling.top_p) < 1:
        share = int(through[n - 1]) * _fixed(sampling.top_p, 32) >> 32
        n = _first_beyond(through, max(share, 1) - 1) + 1
    n = min(n, int(np.count_nonzero(mass >= np.uint64(_fixed(sampling.min_p, _MASS_BITS)))))
    return tokens[:n], through[:n]


def _first_beyond(through: np.ndarray, target: int) -> int:
    return int(np.searchsorted(through, np.uint64(target), side="right"))


def _fixed(value: float, bits: int) -> int:
    """A float32 as a fixed-point number, half to even."""
    return round(float(_without_subnormals(np.float32(value))) * 2**bits)


def _without_subnormals(values: Any) -> Any:
    """The GPU's float32: a number below 2**-126 is zero."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)


def _penalise(logits: np.ndarray, seen: np.ndarray, penalty: np.float32) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.where(logits > 0, np.float32(1) / penalty, penalty)
        return np.where(seen & (penalty != 1), _without_subnormals(logits) * factor, logits)


def distances(row: np.ndarray, temperature: float) -> np.ndarray:
    """How far each logit lies below the largest, uint32 [V], in 2**-26 octaves of probability."""
    row = _without_subnormals(np.where(np.isnan(row), np.float32(-np.inf), row))
    top = row.max()
    if top == -np.inf:
        return np.where(np.arange(row.size) == 0, 0, 2**32 - 1).astype(np.uint32)  # nothing to choose from: token 0
    octaves = _OCTAVES / np.float32(temperature) if temperature else np.finfo(np.float32).max
    with np.errstate(over="ignore", invalid="ignore"):
        below = np.where(row == top, np.float32(0), _without_subnormals(top - row))
        scaled = np.rint(below * octaves)
    return np.minimum(scaled, np.float32(2**32 - 256)).astype(np.uint32)  # the largest float32 that fits


def masses(distance: np.ndarray) -> np.ndarray:
    """floor(2**40 * 2**-distance), uint64; the same shape."""
    distance = distance.astype(np.uint64)
    fraction = distance << np.uint64(32 - _FRACTION_BITS) & np.uint64(0xFFFFFFFF)
    p = np.full_like(distance, _POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        p = np.uint64(coefficient) - (p * fraction >> np.uint64(32))
    return (p << np.uint64(_MASS_BITS - 31)) >> (distance >> np.uint64(_FRACTION_BITS))


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four random 32-bit numbers of a counter and a key (Salmon et al. 2011, doi:10.1145/2063384.2063405)."""
    a, b, c, d = counter
    key0, key1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = high >> 32 ^ b ^ key0, high % 2**32, low >> 32 ^ d ^ key1, low % 2**32
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return a, b, c, d
