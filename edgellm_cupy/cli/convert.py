"""`edgellm convert`: a checkpoint in another format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .. import formats
from ..errors import ArgumentValueError, CheckpointError, MissingDependencyError
from ..formats.checkpoint import Checkpoint, Rows
from ..formats.tokenizer import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
)
from .options import HeadDtype
from .output import exit_codes, say, show


class Format(str, Enum):
    """What `convert` writes."""

    compact = "compact"
    huggingface = "huggingface"


@exit_codes()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a file or a folder.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file, or the folder for --to huggingface.")],
    to: Annotated[Format, typer.Option(help="compact: our own file, 2 bits a weight.")] = Format.compact,
    head: Annotated[
        HeadDtype,
        typer.Option(help="What embedding and head are stored as. Those of a quantised GGUF file come as int8."),
    ] = HeadDtype.auto,
) -> None:
    """Write a checkpoint, quantised to ternary where it is not, in another format, with its tokenizer beside it."""
    if to is Format.huggingface and head is HeadDtype.int8:
        raise ArgumentValueError("--to huggingface has no int8 rows: --head may be float16, bfloat16 or float32")
    _check_target(source, target, to)
    checkpoint = _with_head(formats.load_checkpoint(source), head, source)
    tokenizer = tokenizer_if_any(source)
    files = tokenizer.files() if tokenizer else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written: {e.strerror}: {e.filename}") from e
    if to is Format.compact:
        from ..formats import compact

        _check_replaceable(source, target.parent, files)  # before the work, and before anything is written
        compact.write(checkpoint, target)
        _write_files(target.parent, files)
        written = [target, *(target.parent / name for name in files)]
    else:
        from ..formats import huggingface

        huggingface.write(_noting_int8(checkpoint), target, files)
        written = sorted(target.iterdir())
    for path in written:
        size = path.stat().st_size
        show(f"written: {path}, {f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size} bytes'}")
    if not tokenizer and not has_tokenizer(source):
        say(f"warning: {source} has no tokenizer: `edgellm generate` will need --ids")


def tokenizer_if_any(path: str | Path) -> Tokenizer | None:
    """None where there is none, and with a warning where there is one that cannot be used."""
    if not has_tokenizer(path):
        return None
    try:
        return load_tokenizer(path)
    except (CheckpointError, MissingDependencyError) as e:
        say(f"warning: going on without the tokenizer: {str(e).splitlines()[0]}")
        return None


def _with_head(checkpoint: Checkpoint, head: HeadDtype, source: Path) -> Checkpoint:
    """The checkpoint with embedding and head stored as `head`."""
    if head is HeadDtype.auto:
        return checkpoint

    def stored(name: str, read: Callable[[], Rows]) -> Rows:
        try:
            return read().astype(head.value)
        except ArgumentValueError as e:
            raise CheckpointError(f"{source}: {name}: {e}") from e

    return replace(
        checkpoint,
        read_embedding=lambda: stored("embedding", checkpoint.read_embedding),
        read_head=lambda: stored("head", checkpoint.read_head),
    )


def _noting_int8(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a warning for a format without int8 rows when its embedding or its head is int8."""
    warned = False

    def noting(read: Callable[[], Rows]) -> Rows:
        nonlocal warned
        rows = read()
        if rows.dtype == "int8" and not warned:
            warned = True
            say("warning: embedding and head are int8, which this format does not have; written as float32")
        return rows

    return replace(
        checkpoint,
        read_embedding=lambda: noting(checkpoint.read_embedding),
        read_head=lambda: noting(checkpoint.read_head),
    )


def _check_target(source: Path, target: Path, to: Format) -> None:
    """What can be known to go wrong before a large file is read."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ArgumentValueError(f"{target}: this is the checkpoint that is to be converted")
    if to is Format.compact and target.is_dir():
        raise ArgumentValueError(f"{target}: a folder; name the file, such as {target / 'model.safetensors'}")
    if to is Format.huggingface and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ArgumentValueError(f"{target}: expected a folder that is new or empty")
    folder = source if source.is_dir() else source.parent
    if target.is_file() and folder.is_dir() and any(p.exists() and p.samefile(target) for p in folder.iterdir()):
        raise ArgumentValueError(f"{target}: lies in the folder of the checkpoint that is to be converted")


def _check_replaceable(source: Path, folder: Path, files: dict[str, bytes]) -> None:
    """Another model's tokenizer is neither overwritten nor adopted; the source's own may stand there."""
    beside = source if source.is_dir() else source.parent
    for name in {*files, TOKENIZER_FILE, CONFIG_FILE, GENERATION_FILE}:
        path = folder / name
        if not path.exists():
            continue
        if name in files:
            wanted: bytes | None = files[name]
        else:
            wanted = (beside / name).read_bytes() if (beside / name).is_file() else None
        if not (path.is_file() and path.read_bytes() == wanted):
            raise ArgumentValueError(f"{path}: belongs to another model; choose a folder of its own")


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as e:
        raise CheckpointError(f"{e.filename}: cannot be written: {e.strerror}") from e
