"""The files that torch.save writes, without torch, and without running anything that such a file could contain.

A file is a zip archive: ``NAME/data.pkl`` describes the tensors, ``NAME/data/KEY`` are the bytes of one storage, not
compressed, which several tensors may share.

A pickle is a program for a stack machine, and one that may call any function. The machine here knows the operations
that a dictionary of tensors needs, and calls nothing: a name that the pickle asks for is looked up in a short list, and
what is not there is refused. It is also not the standard library's machine with a filter in front, because a damaged
pickle can make that one take all memory or overflow the C stack.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

_STORAGES = {
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
_DICTIONARY = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_TUPLES = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_MOST_DIMENSIONS = 8
_LARGEST_PICKLE = 1 << 22  # 2B4T needs a hundredth of it
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip entry; its name and an extra field follow, then the bytes


@dataclass(frozen=True)
class TorchTensor:
    """Where a tensor lies: row after row, from `offset` in the file on."""

    dtype: Any
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.itemsize)


class TorchFile:
    """A file that holds a dictionary of tensors, all of it checked against the file's size.

    Attributes:
        path: the file.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: str | Path):
        """
        Raises:
            CheckpointError: not such a file; names the file, and the tensor where there is one.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as f, zipfile.ZipFile(f) as archive:
                self.tensors = self._read(f, archive)
        except CheckpointError:
            raise
        except Exception as e:  # a damaged archive makes zipfile raise anything
            raise self.error(f"not a readable PyTorch file: {str(e) or type(e).__name__}") from e

    def array(self, name: str) -> np.ndarray:
        """A tensor, mapped from the file and not writable. Its pages go when the array goes.

        Raises:
            CheckpointError: the file has become shorter or is gone.
        """
        tensor = self.tensors[name]
        try:
            data = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.nbytes,))
        except (OSError, ValueError) as e:
            raise self.error(f"tensor {name} cannot be read any more: {e}") from e
        return np.asarray(data).view(tensor.dtype).reshape(tensor.shape)

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.path}: {message}")

    # ---- the archive ------------------------------------------------------------------------------------------------

    def _read(self, f: Any, archive: zipfile.ZipFile) -> dict[str, TorchTensor]:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise self.error("a zip archive, but not one that torch.save wrote: there is no data.pkl")
        folder = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
            raise self.error("it has the other byte order, which is not supported")
        if entries[pickles[0]].file_size > _LARGEST_PICKLE:
            raise self.error(f"{pickles[0]} has {entries[pickles[0]].file_size} bytes, which no state dictionary needs")
        described = _run(archive.read(pickles[0]))
        if not isinstance(described, dict) or not described:
            raise self.error("it holds no dictionary of tensors")
        size = f.seek(0, 2)

        def tensor(name: str, described: Any) -> TorchTensor:
            if not isinstance(described, _Tensor):
                raise self.error(f"{name} is no tensor")
            storage = described.storage
            info = entries.get(f"{folder}data/{storage.key}")
            if info is None:
                raise self.error(f"tensor {name}: its storage data/{storage.key} is missing")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                raise self.error(f"tensor {name}: its storage data/{storage.key} is compressed or encrypted")
            f.seek(info.header_offset)
            header = f.read(_LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
                raise self.error(f"tensor {name}: its storage data/{storage.key} is truncated or damaged")
            start = info.header_offset + len(header) + sum(_LOCAL_HEADER.unpack(header)[-2:])
            if storage.count * storage.dtype.itemsize != info.file_size or start + info.file_size > size:
                raise self.error(
                    f"tensor {name}: its storage data/{storage.key} is truncated or damaged: {storage.count} elements "
                    f"of {storage.dtype.name} are needed, {min(info.file_size, max(0, size - start))} bytes are there"
                )
            rows = described.shape
            if described.stride != tuple(math.prod(rows[i + 1 :]) for i in range(len(rows))):
                raise self.error(f"tensor {name} of shape {rows} has strides {described.stride}: not row after row")
            if described.offset + math.prod(rows) > storage.count:
                raise self.error(f"tensor {name} of shape {rows} reaches behind the end of data/{storage.key}")
            return TorchTensor(storage.dtype, rows, start + described.offset * storage.dtype.itemsize)

        return {name: tensor(name, value) for name, value in described.items()}


# ---- the pickle -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Global:
    """A name that the pickle asks for: ``module name``."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: Any
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _run(program: bytes) -> Any:
    """What a pickle of protocol 2 describes, in tuples, dictionaries and tensors."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int) -> list[Any]:
        if count > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("damaged in data.pkl: its stack is empty")
        at = len(stack) - count
        values = stack[at:]
        del stack[at:]
        return values

    def pop_to_mark() -> list[Any]:
        if not marks:
            raise ValueError("damaged in data.pkl: a mark is missing")
        values = pop(len(stack) - marks[-1])
        marks.pop()
        return values

    def update(pairs: list[Any]) -> None:
        [target] = pop(1)
        if type(target) is not dict or len(pairs) % 2 or not all(type(key) is str for key in pairs[::2]):
            raise ValueError("damaged in data.pkl: an item without a dictionary, or a key that is no text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))
        stack.append(target)

    argument: Any
    for operation, argument, _ in pickletools.genops(program):
        match operation.name:
            case "PROTO":
                if argument != 2:
                    raise ValueError(f"data.pkl has protocol {argument}, expected 2")
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(_TUPLES.index(operation.name))))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                update(pop(2))
            case "SETITEMS":
                update(pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = pop(1)[0]
                stack.append(memo[argument])
            case "BINGET" | "LONG_BINGET":
                if argument not in memo:
                    raise ValueError("damaged in data.pkl: it uses what it has not made")
                stack.append(memo[argument])
            case "GLOBAL":
                if argument not in (_DICTIONARY, _TENSOR, _PARAMETER, *_STORAGES):
                    raise ValueError(f"data.pkl asks for {argument.replace(' ', '.'):.80}, which no tensor needs")
                stack.append(_Global(argument))
            case "REDUCE":
                stack.append(_made(*pop(2)))
            case "BINPERSID":
                stack.append(_storage(*pop(1)))
            case "BUILD":  # the attributes of a state dictionary: versions of modules
                pop(1)
            case "STOP":
                return pop(1)[0]
            case name:
                raise ValueError(f"data.pkl has the operation {name}, which no tensor needs")
    raise ValueError("damaged in data.pkl: it does not end")


def _made(what: Any, arguments: Any) -> Any:
    """What the call of a name would return."""
    match what, arguments:
        case _Global(name=name), () if name == _DICTIONARY:
            return {}
        case _Global(name=name), (_Storage() as storage, offset, shape, stride, *_) if name == _TENSOR:
            if _are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(stride):
                return _Tensor(storage, offset, shape, stride)
        case _Global(name=name), (_Tensor() as tensor, *_) if name == _PARAMETER:
            return tensor
    raise ValueError("damaged in data.pkl: a call that makes no tensor")


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(name=name), str(key), str(), int(count)) if name in _STORAGES and _are_sizes((count,)):
            return _Storage(_STORAGES[name], key, count)
    raise ValueError("damaged in data.pkl: a storage of an unknown kind")


def _are_sizes(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= _MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 62 for n in values)
    )
