"""Ternary weights, their packed layout, model configurations, and readers and writers of checkpoints."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .checkpoint import Checkpoint

__all__ = ["load_checkpoint"]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint file into host memory. What it is, its first bytes say, not its name.

    Reads GGUF of architecture ``llama`` (every ternary product is quantised with absmean) and our own compact
    safetensors (see :mod:`edgellm_cupy.formats.compact`).

    Raises:
        CheckpointError: names the file, and the tensor where there is one.
        MissingDependencyError: the extra ``models`` is not installed.
    """
    from . import compact, gguf

    path = Path(path)
    try:
        with path.open("rb") as f:
            head = f.read(9)
    except OSError as e:
        raise CheckpointError(f"{path}: not a readable file: {e.strerror}") from e
    if head.startswith(b"GGUF"):
        return gguf.read(path)
    if head[8:9] == b"{":
        return compact.read(path)
    raise CheckpointError(f"{path}: neither GGUF nor safetensors")
