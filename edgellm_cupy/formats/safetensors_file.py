"""The safetensors container: reads tensors as views of the mapped file, writes them one after the other.

A file is the length of the header (8 bytes, little-endian), the header as JSON, and the tensors' bytes:

    {"__metadata__": {text: text}, NAME: {"dtype": "BF16", "shape": [...], "data_offsets": [first, end]}, ...}

with offsets from the end of the header, without gaps and overlaps. The package `safetensors` is not used because what
its 0.4 hands to NumPy are copies, and no bfloat16 at all.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the limit of the package safetensors too
_ENTRY_ROOM = 128  # bytes of a header entry without its name, at most


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes `first` to `end` of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    first: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"


class SafetensorsFile:
    """An open file whose header was checked: what it lists is there, byte for byte.

    Attributes:
        path: the file.
        metadata: the header's texts.
        entries: the tensors, by name.
    """

    def __init__(self, path: Path):
        """Map `path` and check its header.

        Raises:
            CheckpointError: not a complete safetensors file.
        """
        self.path = path
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                length = int.from_bytes(f.read(8), "little")
                if size < 8 or length > min(_MAX_HEADER, size - 8):
                    raise self._unreadable(f"a header of {length} bytes does not fit a file of {size}")
                header = f.read(length)
                self._mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:  # ValueError: a name that no file can have
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{path}: not a readable file: {getattr(e, 'strerror', None) or e}") from e
        try:
            listed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as e:
            raise self._unreadable(f"its header is not JSON: {e}") from e
        if not isinstance(listed, dict):
            raise self._unreadable("its header is not a JSON object")
        metadata = listed.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise self._unreadable("its __metadata__ is not an object of texts")
        self.metadata: dict[str, str] = metadata
        self.entries = {name: self._entry(name, entry, 8 + length) for name, entry in listed.items()}
        self._check_coverage(8 + length, size)

    def _entry(self, name: str, entry: Any, start: int) -> Entry:
        where = f"tensor {shown(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._unreadable(f"{where}: expected dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in DTYPES:
            raise self._unreadable(f"{where}: unknown dtype {kind!r:.80}")
        if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
            raise self._unreadable(f"{where}: shape {shape!r:.80} or data_offsets {offsets!r:.80} make no sense")
        needed = math.prod(shape) * DTYPES[kind].itemsize
        if offsets[1] - offsets[0] != needed:
            raise self._unreadable(
                f"{where}: {kind} {shape!r:.80} is {needed} bytes, but its offsets are {offsets!r:.80}"
            )
        return Entry(DTYPES[kind], tuple(shape), start + offsets[0], start + offsets[1])

    def _check_coverage(self, start: int, size: int) -> None:
        """The tensors follow each other from `start` to the end of the file."""
        end = start
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].first, item[1].end)):
            if entry.first != end:
                what = "overlaps the one in front of it" if entry.first < end else "leaves a gap in front of it"
                raise self._unreadable(f"tensor {shown(name)} {what}")
            if entry.end > size:
                raise self._unreadable(f"truncated: tensor {shown(name)} ends at byte {entry.end} of {size}")
            end = entry.end
        if end != size:
            raise self._unreadable(f"{size - end} bytes at its end belong to no tensor")

    def expect(self, name: str, shape: tuple[int, ...] | None, *dtypes: Any) -> Entry:
        """The entry of a tensor that must be one of `dtypes`, in `shape` where that is given.

        Raises:
            CheckpointError: it is missing or something else.
        """
        if name not in self.entries:
            raise self.error(f"tensor {name} is missing")
        entry = self.entries[name]
        if entry.dtype not in dtypes or shape not in (None, entry.shape):
            expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
            expected += "" if shape is None else f" {list(shape)}"
            raise self.error(f"tensor {name} is {entry}, but the configuration needs {expected}")
        return entry

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file, which may not be aligned to its dtype."""
        entry = self.entries[name]
        return np.frombuffer(self._mapped, entry.dtype, math.prod(entry.shape), entry.first).reshape(entry.shape)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def _unreadable(self, message: str) -> CheckpointError:
        return self.error(f"not a readable safetensors file: {message}")


def shown(name: str) -> str:
    """A name that a file gives, fit for a message."""
    return name[:200] if name.isprintable() else f"{name[:200]!r}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands there twice")
    return values


def _is_sizes(values: Any) -> bool:
    # The limits keep their product cheap.
    return isinstance(values, list) and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in values)


@dataclass(frozen=True)
class Pieces:
    """A tensor whose rows come a few at a time."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Iterable[np.ndarray]


Add = Callable[[str, "np.ndarray | Pieces"], None]


@contextmanager
def create(path: Path, names: Iterable[str], metadata: dict[str, str], called: Path | None = None) -> Iterator[Add]:
    """A function `add(name, array)` that appends a tensor to what becomes `path`, in one step, when the block ends.

    Args:
        path: a link is kept; the file that it leads to is replaced.
        names: of every tensor that may be added. The header stands first, is written last, and gets room for them.
        called: what messages call the file; `path` unless given.

    Raises:
        CheckpointError: the file cannot be written; one that stood there is as it was.
    """
    room = len(json.dumps(metadata)) + sum(len(json.dumps(name)) + _ENTRY_ROOM for name in names) + _ENTRY_ROOM
    room += -room % 8
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0

    whole = Path(os.path.realpath(path))
    partial = whole.with_name(f".{whole.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as f:
            f.seek(8 + room)

            def add(name: str, array: np.ndarray | Pieces) -> None:
                nonlocal end
                start = end
                for part in array.parts if isinstance(array, Pieces) else (array,):
                    end += f.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
                header[name] = {
                    "dtype": _NAMES[array.dtype],
                    "shape": list(array.shape),
                    "data_offsets": [start, end],
                }

            yield add
            text = json.dumps(header, separators=(",", ":")).encode().ljust(room)
            if len(text) > room:
                raise AssertionError(f"the header has {len(text)} bytes, but {room} were kept for it")
            f.seek(0)
            f.write(room.to_bytes(8, "little") + text)
        partial.replace(whole)
    except OSError as e:
        raise CheckpointError(f"{called or path}: cannot be written: {e.strerror or e}") from e
    finally:
        partial.unlink(missing_ok=True)
