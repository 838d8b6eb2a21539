"""Tests that came out of the mutation check (tests/mutation): faults that the other tests let pass."""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.tuning import FLOOR_THREADS, floor_spec
from edgellm_cupy.tuning.decoder import ATTENTION_THREADS, attention_spec, combine_spec
from tests.emulator import ORDERS, Emulator, Output, Scratch

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 12
MODEL = ec.ModelConfig("tiny", 1, HEADS * HEAD_DIM, 8, HEADS, KV_HEADS, HEAD_DIM, vocab_size=8)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    emulator.build([spec(MODEL, "float32") for spec in (attention_spec, combine_spec)])
    emulator.build([floor_spec(threads) for threads in FLOOR_THREADS])
    return emulator


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("length", [0, 63, 127, 290])
def test_attention_over_many_keys(emulator, length, splits, order):
    """Shares of more keys than a block has threads, and more or fewer shares than the grid offers."""
    batch, n, max_len = 2, 3, length + 3
    rng = np.random.default_rng(length)
    qkv = rng.standard_normal((batch * n, (HEADS + 2 * KV_HEADS) * HEAD_DIM)).astype(np.float32)
    keys, values = rng.standard_normal((2, batch, KV_HEADS, max_len, HEAD_DIM)).astype(np.float32)
    keys *= np.linspace(0.1, 4, max_len, dtype=np.float32)[:, None]  # the maximum keeps rising: shares differ much
    partial = np.empty((batch * n, HEADS, splits, HEAD_DIM + 2), np.float32)
    out = np.empty((batch * n, HEADS * HEAD_DIM), np.float32)
    device_length = np.array([length], np.int32)
    # Scratch: shares that are not in use stay poisoned, and combining must not look at them.
    emulator.launch(
        attention_spec(MODEL, "float32").name,
        (splits, KV_HEADS, batch * n),
        ATTENTION_THREADS,
        [qkv, qkv.shape[1], keys, values, device_length, n, KV_HEADS, max_len, np.float32(0.5), Scratch(partial)],
        order=order,
    )
    emulator.launch(
        combine_spec(MODEL, "float32").name,
        (HEADS, batch * n),
        HEAD_DIM,
        [partial, device_length, n, splits, Output(out)],
        order=order,
    )
    q = qkv[:, : HEADS * HEAD_DIM].reshape(batch, n, KV_HEADS, -1, HEAD_DIM).astype(np.float64)
    scores = 0.5 * np.einsum("bnhgd,bhkd->bnhgk", q, keys)
    visible = np.arange(max_len) <= length + np.arange(n)[:, None]
    scores = np.where(visible[None, :, None, None, :], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bnhgk,bhkd->bnhgd", weights / weights.sum(-1, keepdims=True), values)
    np.testing.assert_allclose(out, expected.reshape(out.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", FLOOR_THREADS)
def test_the_floor_kernel_reads_every_word_once(emulator, threads):
    """All is zero but one field, which is the hash that the kernel writes: left out, or read twice, nothing is written.
    A thread's words are a stride apart, in rounds of four and then one by one."""
    blocks, magic = 2, 0x9E3779B9
    stride = blocks * threads
    for count in (1, 3 * stride + 1, 4 * stride + 1, 10 * stride + 5):
        for word in {0, count // 2, count - 1, *range(0, count, stride), *range(stride - 1, count, stride)}:
            for field in range(4):
                data, sink = np.zeros((count, 4), np.uint32), np.zeros(1, np.uint32)
                data[word, field] = magic
                emulator.launch(floor_spec(threads).name, blocks, threads, [data, np.int64(count), sink])
                assert sink[0] == magic, f"word {word} of {count}, field {field}"
