"""Ternary weights, their packed layout, model configurations, and readers and writers of checkpoints."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint

__all__ = ["load_checkpoint"]

_BITNET_PT = "model_state_int2.pt"


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint, a file or a folder. What a file is, its first bytes say, not its name.

    ==============================================  =============================================================
    our compact safetensors                         :mod:`edgellm_cupy.formats.compact`
    Hugging Face: safetensors and config.json,      :mod:`edgellm_cupy.formats.huggingface`; Llama and BitNet,
    one file or shards with their index             packed ternary weights or ordinary ones
    GGUF                                            :mod:`edgellm_cupy.formats.gguf`
    microsoft/BitNet's ``model_state_int2.pt``      :mod:`edgellm_cupy.formats.bitnet_pt`
    ==============================================  =============================================================

    In a folder the first of these counts: ``model.safetensors``, ``model.safetensors.index.json``, the one
    safetensors file, the one GGUF file, ``model_state_int2.pt``.

    Headers and configuration are checked here, before anything is returned; the values of a layer, the embedding or
    the head each time they are read. Weights that are not ternary are quantised with absmean, each matrix by itself.
    No file's code is ever run.

    Raises:
        CheckpointError: names the file, and the tensor where there is one.
        MissingDependencyError: a GGUF file, and the extra ``models`` is not installed.
    """
    from . import compact, huggingface

    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".index.json"):  # the one that its first bytes do not tell
        return huggingface.read(path)
    try:
        with path.open("rb") as f:
            head = f.read(9)
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        raise CheckpointError(f"{path}: not a readable file: {getattr(e, 'strerror', e)}") from e
    if head.startswith(b"GGUF"):
        from . import gguf

        return gguf.read(path)
    if head.startswith(b"PK\x03\x04"):
        from . import bitnet_pt

        return bitnet_pt.read(path)
    if head[8:9] == b"{":
        return compact.read(path) if compact.is_compact(path) else huggingface.read(path)
    raise CheckpointError(f"{path}: neither safetensors, nor GGUF, nor a checkpoint of microsoft/BitNet")


def _in_folder(folder: Path) -> Path:
    """The file that stands for a folder."""
    from . import huggingface

    try:
        if weights := huggingface.find_weights(folder):
            return weights
        found = sorted(p for p in folder.glob("*.gguf") if p.is_file())
    except OSError as e:
        raise CheckpointError(f"{folder}: not a readable folder: {e.strerror}") from e
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise CheckpointError(f"{folder}: {len(found)} GGUF files, give one of them: {names}")
    if found:
        return found[0]
    if (folder / _BITNET_PT).is_file():
        return folder / _BITNET_PT
    raise CheckpointError(f"{folder}: no *.safetensors, *.gguf or {_BITNET_PT} in this folder")
