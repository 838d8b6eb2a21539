"""Whatever file is handed to us as a checkpoint."""

from __future__ import annotations

import sys

import pytest

from edgellm_cupy import CheckpointError, MissingDependencyError
from edgellm_cupy.formats import compact, gguf, load_checkpoint

gguf_package = pytest.importorskip("gguf", reason="the extra `models` is not installed")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra `models` is not installed")


# ---- whatever file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither GGUF nor safetensors"),
        (b"GG", "neither GGUF nor safetensors"),
        (b"PK\x03\x04 some other file", "neither GGUF nor safetensors"),
        (b"GGUF", "not a readable GGUF file"),
        (b"GGUF" + bytes(range(256)), "not a readable GGUF file"),
        (b"\x10\0\0\0\0\0\0\0{not JSON at all", "not a readable safetensors file"),
    ],
)
def test_garbage(tmp_path, content, message):
    path = _written(tmp_path / "garbage", content)
    with pytest.raises(CheckpointError, match=f"garbage: {message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("read", [load_checkpoint, gguf.read, compact.read, lambda p: list(gguf.read_float(p))])
def test_no_file(tmp_path, read):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing", "empty", "folder"):
        with pytest.raises(CheckpointError, match=f"{name}: n"):  # "not a readable ...", "neither ..."
            read(tmp_path / name)


@pytest.mark.parametrize(("module", "read"), [("gguf", gguf.read), ("safetensors", compact.read)])
def test_without_the_package(tmp_path, monkeypatch, module, read):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf"package {module}: pip install 'edgellm-cupy\[models\]'"):
        read(tmp_path / "model")
