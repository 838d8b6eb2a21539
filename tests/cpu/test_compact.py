"""Our compact safetensors: exact round trips, and what becomes of damaged files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edgellm_cupy import CheckpointError
from edgellm_cupy.formats import compact, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint

gguf_package = pytest.importorskip("gguf", reason="the extra `models` is not installed")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")

from tests.checkpoints import TINY, assert_same, fuzz, written

# ---- compact safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        dataclasses.replace(TINY, gated=False, num_kv_heads=4, hidden_size=72, intermediate_size=65, vocab_size=3),
        dataclasses.replace(TINY, name='größer ≥ 1 "x"', rope_theta=1e5 / 3, rms_eps=0.0, num_layers=1),
    ],
)
def test_compact_round_trip(tmp_path, config):
    checkpoint = Checkpoint.random(config, seed=3)
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    assert_same(compact.read(path), checkpoint)
    assert_same(load_checkpoint(str(path)), checkpoint)


def test_compact_is_two_bits_a_weight(tmp_path):
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=512, num_heads=16, num_kv_heads=4)
    checkpoint = Checkpoint.random(config)
    path = tmp_path / "model.safetensors"
    compact.write(checkpoint, path)
    weights = sum(m * k for m, k in config.products().values()) * config.num_layers
    embedding = config.vocab_size * config.hidden_size
    assert path.stat().st_size < 1.02 * (weights / 4 + embedding) + 10_000


def test_compact_replaces_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    first, second = Checkpoint.random(TINY, 1), Checkpoint.random(TINY, 2)
    compact.write(first, path)
    compact.write(second, path)
    assert_same(compact.read(path), second)

    def disk_full(self, data):
        with self.open("wb") as f:
            f.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be written: .*No space left"):
        compact.write(first, path)
    monkeypatch.undo()
    assert_same(compact.read(path), second)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_compact_into_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere.model.safetensors: cannot be written"):
        compact.write(Checkpoint.random(TINY), tmp_path / "nowhere" / "model.safetensors")


@pytest.fixture(scope="module")
def compact_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("compact") / "model.safetensors"
    compact.write(Checkpoint.random(TINY), path)
    return path.read_bytes()


def rewrite(data: bytes, path: Path, edit) -> None:
    """Write the file `data` to `path` after `edit(tensors, metadata)` changed the two dictionaries."""
    path.write_bytes(data)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata())  # noqa: SIM118
    edit(tensors, metadata)
    path.write_bytes(safetensors_numpy.save(tensors, metadata or None))


def _set(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def _poke(name, index, value):
    return lambda tensors, metadata: tensors[name].__setitem__(index, value)


def _metadata(key, value):
    return lambda tensors, metadata: metadata.__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t, m: t.pop("layers.1.up.packed"), "tensor layers.1.up.packed is missing"),
        (lambda t, m: t.pop("embedding.scale"), "tensor embedding.scale is missing"),
        (_poke("layers.1.down.packed", (3, 0, 5), 0xFF), "tensor layers.1.down: packed row 3, byte 5 holds the code 3"),
        (_poke("layers.0.qkv.scale", 0, np.nan), "tensor layers.0.qkv.scale holds a value that is not finite"),
        (_poke("layers.0.ffn_norm", 7, np.inf), "tensor layers.0.ffn_norm holds a value that is not finite"),
        (_poke("embedding.scale", 7, -np.inf), "tensor embedding.scale holds a value that is not finite"),
        (_set("layers.0.out.packed", np.zeros((3, 1, 16), np.uint8)), "tensor layers.0.out: packed.shape is"),
        (_set("layers.0.out.packed", np.zeros((64, 1, 16), np.int8)), "tensor layers.0.out.packed is int8 [64, 1, 16]"),
        (_set("layers.0.out.scale", np.ones(3, np.float32)), "tensor layers.0.out: scale.shape is (3,)"),
        (_set("final_norm", np.ones(3, np.float32)), "tensor final_norm is float32 [3]"),
        (_set("final_norm", np.ones(64)), "tensor final_norm is float64 [64]"),
        (_set("embedding.values", np.zeros((40, 63), np.int8)), "tensor embedding.values is int8 [40, 63]"),
        (_set("layers.2.bias", np.ones(3)), "tensor layers.2.bias: the configuration has no place for it"),
        (_metadata("format", "edgellm-ternary-v9"), "its format is 'edgellm-ternary-v9', but this version reads"),
        (_metadata("format", "pt"), "not one that edgellm wrote (its metadata gives the format 'pt'"),
        (lambda t, m: m.clear(), "not one that edgellm wrote (its metadata gives no format"),
        (lambda t, m: m.pop("config"), "its metadata holds no model configuration"),
        (_metadata("config", "{"), "its metadata holds no model configuration"),
        (_metadata("config", "[]"), "expected a JSON object"),
        (_metadata("config", '{"name": "x"}'), "the model field 'num_layers' is missing"),
    ],
)
def test_compact_refuses(tmp_path, compact_bytes, edit, message):
    path = tmp_path / "damaged.safetensors"
    rewrite(compact_bytes, path, edit)
    with pytest.raises(CheckpointError) as e:
        load_checkpoint(path)
    assert str(e.value).startswith(f"{path}: ")
    assert message in str(e.value)


def test_compact_with_a_dtype_that_numpy_lacks(tmp_path, compact_bytes):
    end = 8 + int.from_bytes(compact_bytes[:8], "little")
    header = json.loads(compact_bytes[8:end])
    header["embedding.values"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path = written(tmp_path / "damaged.safetensors", len(text).to_bytes(8, "little") + text + compact_bytes[end:])
    with pytest.raises(CheckpointError, match=r"damaged.safetensors: tensor embedding.values"):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [9, 100, 2000, -1])
def test_compact_truncated(tmp_path, compact_bytes, kept):
    path = tmp_path / "short.safetensors"
    path.write_bytes(compact_bytes[:kept])
    with pytest.raises(CheckpointError, match=r"short.safetensors: not a readable safetensors file"):
        load_checkpoint(path)


def test_compact_fuzzed(tmp_path, compact_bytes):
    fuzz(tmp_path / "fuzzed.safetensors", compact_bytes, compact.read, header=3500)
