"""Whatever file or folder is handed to us as a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import edgellm_cupy.formats
from edgellm_cupy import ArgumentValueError, CheckpointError, ModelConfig, TernaryWeight
from edgellm_cupy.arguments import check_cache_size, check_generation
from edgellm_cupy.formats import compact, gguf, huggingface, load_checkpoint
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.formats.checks import not_finite, why_untrained
from tests.checkpoints import TINY, assert_same, written

# ---- whatever file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither safetensors, nor GGUF, nor"),
        (b"GG", "neither safetensors, nor GGUF, nor"),
        (b"\x80\x02}q\x00.", "neither safetensors, nor GGUF, nor"),  # a pickle by itself
        (b"GGUF", "not a readable GGUF file"),
        (b"GGUF" + bytes(range(256)), "not a readable GGUF file"),
        (b"\x10\0\0\0\0\0\0\0{not JSON at all", "not a readable safetensors file"),
        (b'{"hidden_size": 64}', "neither safetensors, nor GGUF, nor"),  # config.json itself
    ],
)
def test_garbage(tmp_path, content, message):
    path = written(tmp_path / "garbage", content)
    with pytest.raises(CheckpointError, match=f"garbage: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "read", [load_checkpoint, gguf.read, compact.read, huggingface.read, lambda p: list(gguf.read_float(p))]
)
def test_no_file(tmp_path, read):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing", "empty", "folder"):
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/({name}|config.json): n"):  # "not a ...", "no ..."
            read(tmp_path / name)


def test_safetensors_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    compact.write(Checkpoint.random(TINY), tmp_path / "model")
    assert_same(load_checkpoint(tmp_path / "model"), Checkpoint.random(TINY))


def test_a_name_that_no_file_can_have():
    with pytest.raises(CheckpointError, match=r"not a readable file: embedded null"):
        load_checkpoint("a\0b")


def test_a_header_whose_length_begins_with_a_brace(tmp_path):
    """The first byte of a safetensors file may be any, also the one that JSON begins with."""
    text = b'{"__metadata__":{"format":"pt"}}'.ljust(ord("{"))
    path = written(tmp_path / "m.safetensors", len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file: No such file"):
        load_checkpoint(path)


# ---- whatever folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch) -> list[tuple[str, str]]:
    """Which reader was asked for which file, in place of reading it."""
    calls: list[tuple[str, str]] = []

    def reader(name: str):
        return SimpleNamespace(read=lambda path: calls.append((name, path.name)))

    for name in ("gguf", "bitnet_pt"):
        module = f"edgellm_cupy.formats.{name}"
        monkeypatch.setitem(sys.modules, module, reader(name))
        monkeypatch.setattr(edgellm_cupy.formats, name, reader(name), raising=False)
    for real in (compact, huggingface):
        name = real.__name__.rpartition(".")[2]
        monkeypatch.setattr(real, "read", lambda path, name=name: calls.append((name, path.name)))
    return calls


COMPACT = {"__metadata__": {"format": "edgellm-ternary-v9"}}
HUB = {"__metadata__": {"format": "pt"}}


def put(folder, *names: str, header=HUB) -> None:
    for name in names:
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text
        if name.endswith(".gguf"):
            content = b"GGUF"
        elif name.endswith(".pt"):
            content = b"PK\x03\x04"
        elif name.endswith(".json"):
            content = b"{}"
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("names", "reader", "name"),
    [
        (["model_state_int2.pt"], "bitnet_pt", "model_state_int2.pt"),
        (["model_state_int2.pt", "other.pt", "m.gguf"], "gguf", "m.gguf"),
        (["model.safetensors", "a.safetensors", "m.gguf", "model_state_int2.pt"], "huggingface", "model.safetensors"),
        (["a.safetensors", "a.gguf", "b.gguf"], "huggingface", "a.safetensors"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            "huggingface",
            "model.safetensors.index.json",
        ),
        (["model.safetensors", "model.safetensors.index.json"], "huggingface", "model.safetensors"),
    ],
)
def test_what_lies_in_a_folder(tmp_path, asked, names, reader, name):
    put(tmp_path, *names, "config.json", "tokenizer.json")
    load_checkpoint(tmp_path)
    load_checkpoint(tmp_path / name)
    assert asked == [(reader, name)] * 2


def test_compact_in_a_folder(tmp_path, asked):
    """The metadata decides, config.json or not; a version that is too new is the compact reader's to refuse."""
    put(tmp_path, "model.safetensors", header=COMPACT)
    load_checkpoint(tmp_path)
    put(tmp_path, "config.json")
    load_checkpoint(tmp_path / "model.safetensors")
    assert asked == [("compact", "model.safetensors")] * 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no \*.safetensors, \*.gguf or model_state_int2.pt in this folder"),
        (["config.json", "pytorch_model.bin", "other.pt"], r"no \*.safetensors, \*.gguf or model_state_int2.pt"),
        (["a.gguf", "b.gguf"], "2 GGUF files, give one of them: a.gguf, b.gguf"),
        (
            ["a.safetensors", "b.safetensors", "m.gguf"],
            "2 safetensors files, a.safetensors and others, but no model.safetensors.index.json",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, asked, names, message):
    put(tmp_path, *names)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: {message}"):
        load_checkpoint(tmp_path)
    assert not asked


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="in this folder"):
        load_checkpoint(tmp_path)


# ---- what is checked of values --------------------------------------------------------------------------------------


def test_not_finite_takes_pieces():
    """The position counts from the first row, and no mask of the whole matrix is ever made."""
    values = np.zeros((3 << 12, 1 << 12), np.float16)  # 96 MB: six pieces
    tracemalloc.start()
    try:
        assert not_finite(values) is None
        values[12287, 7] = values[9000, 5] = np.nan
        assert not_finite(values) == (9000, 5)
        assert tracemalloc.get_traced_memory()[1] < values.nbytes / 4
    finally:
        tracemalloc.stop()
    assert not_finite(np.float32([0, 1, np.inf])) == (2,)


@pytest.mark.parametrize("k", [1, 63, 64, 200])
def test_why_untrained(k):
    for value in (-1, 0, 1):
        t = np.full((3, k), value, np.int8)
        assert why_untrained(TernaryWeight.from_int8(t)) == f"every weight is {value}, which no trained model has"
        t[2, k - 1] = (value + 2) % 3 - 1
        assert why_untrained(TernaryWeight.from_int8(t)) is None
        assert (
            why_untrained(TernaryWeight.from_int8(t, np.float32([1, 0, 1])))
            == "a scale is 0, which no trained model has"
        )


# ---- configurations and arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": x} for x in (10**400, 1e300, 1e-50, 0, float("nan"))] + [{"rms_eps": x} for x in (10**400, 1e300)],
)
def test_a_configuration_has_numbers_of_float32(change):
    with pytest.raises(ArgumentValueError, match="that float32 holds"):
        dataclasses.replace(ModelConfig.preset("smollm-135m"), **change)


def test_a_configuration_nested_too_deeply(tmp_path):
    with pytest.raises(CheckpointError, match=r"c.json: not a readable JSON file"):
        ModelConfig.from_json(written(tmp_path / "c.json", b"[" * 200_000))


def test_lengths_fit_31_bits():
    check_cache_size(2**31 - 1, 1)
    check_generation([1], 2**31 - 1, (), 2)
    with pytest.raises(ArgumentValueError, match="max_len is 2147483648, expected at most 2147483647"):
        check_cache_size(2**31, 1)
    for n in (2**31, 10**30):
        with pytest.raises(ArgumentValueError, match=f"max_new_tokens is {n}, expected at most 2147483647"):
            check_generation([1], n, (), 2)
