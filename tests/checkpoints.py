"""What the tests of checkpoint files share: a tiny model, comparing checkpoints, and damaging files."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from edgellm_cupy import CheckpointError, ModelConfig
from edgellm_cupy.formats.checkpoint import Checkpoint

# Every size differs from every other, so that a mixed-up shape cannot pass. All are multiples of 32, Q8_0's block.
TINY = ModelConfig(
    name="tiny",
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=40,
    rope_theta=5e4,
    rms_eps=1e-5,
    max_context=512,
)
PRODUCTS = ("qkv", "out", "up", "down")


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.config == b.config
    assert a.source == b.source
    np.testing.assert_array_equal(a.embedding.values, b.embedding.values)
    np.testing.assert_array_equal(a.embedding.scale, b.embedding.scale)
    np.testing.assert_array_equal(a.final_norm, b.final_norm)
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        np.testing.assert_array_equal(x.attn_norm, y.attn_norm)
        np.testing.assert_array_equal(x.ffn_norm, y.ffn_norm)
        for name in PRODUCTS:
            v, w = getattr(x, name), getattr(y, name)
            assert v.shape == w.shape
            np.testing.assert_array_equal(v.packed, w.packed)
            np.testing.assert_array_equal(v.scale, w.scale)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fuzz(path: Path, data: bytes, read, header: int, runs: int = 400) -> None:
    """Change one to four bytes of the header, or cut the file: it is read, or refused with our own error, soon."""
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(runs):
        damaged = bytearray(data)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        if rng.random() < 0.1:
            damaged = damaged[: rng.integers(9, len(data))]
        path.write_bytes(damaged)
        start, refusal = time.perf_counter(), None
        try:
            read(path)
        except CheckpointError as e:
            refusal = str(e)
        outcomes["read" if refusal is None else "refused"] += 1
        assert refusal is None or refusal.startswith(f"{path}: ")
        assert time.perf_counter() - start < 5
    assert min(outcomes.values()) > 10, f"the mutations test one outcome only: {outcomes}"
