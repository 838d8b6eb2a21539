"""The GGUF container: header fields, and where in the file each tensor lies. What tensors mean, other modules know.

All of it is little endian:

    "GGUF", uint32 version, uint64 number of tensors, uint64 number of fields
    a field:   string key, uint32 kind, value
    a tensor:  string name, uint32 number of dimensions, uint64 each (the fastest first), uint32 type, uint64 offset
    zeros up to the alignment, then the tensors' bytes, at their offsets from here

A string is a uint64 length and UTF-8; an array a uint32 kind, a uint64 count, and its elements. Nothing in a damaged
file is believed: each length is compared with the bytes that are there before anything is allocated for it.

The package `gguf` has such a reader too; its release 0.19 refuses files with the types Q2_0 and I2_S.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .gguf_types import GgufType, find_type

_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""The kinds of values that are one number, by their ids."""
_STRING, _ARRAY = 8, 9
_DEEPEST_ARRAY = 2
_MOST_DIMENSIONS = 4  # ggml's own limit
_VERSIONS = (2, 3)  # of one layout; 3 allowed big endian too


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: the rows first, so that a matrix is (M, K).
        type: how its elements are stored.
        offset, nbytes: in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: GgufType
    offset: int
    nbytes: int


class GgufFile:
    """The header of a GGUF file, all of it checked against the file's size.

    Attributes:
        path: the file.
        fields: the header fields by key. Numbers are Python's; strings str; arrays of numbers NumPy arrays, other
            arrays lists.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            CheckpointError: not a complete GGUF file; names the file, and the field or tensor that is damaged.
            MissingDependencyError: the package `gguf` is not installed, and a tensor's type is one of its.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.fields, self.tensors = _Header(self.path, data).read()
        except (OSError, ValueError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: not a readable GGUF file: {e}") from e  # ValueError: it is empty

    def bytes_of(self, tensor: GgufTensor) -> np.ndarray:
        """uint8 [nbytes]: the tensor as it is stored. A mapping of its own, so that its pages go when the array goes.

        Raises:
            CheckpointError: the file has become shorter or is gone.
        """
        if tensor.nbytes == 0:
            return np.empty(0, np.uint8)
        try:
            return np.asarray(np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,)))
        except (OSError, ValueError) as e:
            raise self.error(f"tensor {tensor.name} cannot be read any more: {e}") from e

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.path}: {message}")


class _Header:
    """Walks through the header once, front to back."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0
        self.where = "the header"  # what is being read, for messages

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if bytes(self.take(4)) != b"GGUF":
            raise self.error("it does not begin with GGUF")
        if (version := self.integer("<I")) not in _VERSIONS:
            if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
                raise self.error("it has the other byte order, which is not supported")
            raise self.error(f"its version is {version}, expected 2 or 3")
        tensors, fields = self.integer("<Q"), self.integer("<Q")
        # Counts are not believed either: both loops end at the end of the file, and no key may come twice.
        values: dict[str, Any] = {}
        for i in range(fields):
            self.where = f"header field {i}"
            key = self.string()
            if key in values:
                raise self.error(f"the header field {key} is there twice")
            self.where = f"the header field {key}"
            values[key] = self.value(self.integer("<I"), 0)
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for i in range(tensors):
            self.where = f"the description of tensor {i}"
            name = self.string()
            if name in infos:
                raise self.error(f"tensor {name} is there twice")
            self.where = f"the description of tensor {name}"
            if (dimensions := self.integer("<I")) > _MOST_DIMENSIONS:
                raise self.error(f"tensor {name} has {dimensions} dimensions, expected at most {_MOST_DIMENSIONS}")
            shape = tuple(self.integer("<Q") for _ in range(dimensions))[::-1]
            infos[name] = (shape, self.integer("<I"), self.integer("<Q"))
        start = -(-self.at // self.alignment(values)) * self.alignment(values)
        return values, {name: self.tensor(name, *info, start) for name, info in infos.items()}

    # ---- pieces -----------------------------------------------------------------------------------------------------

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if end > len(self.data):
            raise self.error(
                f"truncated or damaged in {self.where}: {end} bytes are needed, {len(self.data)} are there"
            )
        part, self.at = self.data[self.at : end], end
        return part

    def integer(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def string(self) -> str:
        try:
            return self.take(self.integer("<Q")).decode()
        except UnicodeDecodeError as e:
            raise self.error(f"damaged in {self.where}: {e}") from e

    def value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self.numbers(kind, 1)[0].item()
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"damaged in {self.where}: there is no kind {kind} of values")
        if depth == _DEEPEST_ARRAY:
            raise self.error(f"damaged in {self.where}: arrays more than {_DEEPEST_ARRAY} deep")
        kind, count = self.integer("<I"), self.integer("<Q")
        if kind in _NUMBERS:
            return self.numbers(kind, count)
        return [self.value(kind, depth + 1) for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        return np.frombuffer(self.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])

    def alignment(self, values: dict[str, Any]) -> int:
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"the header field general.alignment is {alignment!r:.80}, expected a power of two")
        return alignment

    def tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int) -> GgufTensor:
        kind = find_type(type_id, self.path)
        if kind is None:
            raise self.error(f"tensor {name} has the unknown type {type_id}")
        nbytes = kind.nbytes(shape)
        if nbytes is None:
            raise self.error(f"tensor {name} has shape {shape}, but {kind.name} stores {kind.per_block} at a time")
        if start + offset + nbytes > len(self.data):
            raise self.error(
                f"truncated or damaged in tensor {name}: {start + offset + nbytes} bytes are needed, "
                f"{len(self.data)} are there"
            )
        return GgufTensor(name, shape, kind, start + offset, nbytes)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a readable GGUF file: {message}")
