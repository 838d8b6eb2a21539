"""How GGUF stores the elements of a tensor: the four ternary types, and the ordinary ones.

The ternary types are decoded here, exactly: to codes and block scales, not to floats. Three of them cut a row into
blocks, each with a float16 scale d of its own; I2_S has one float32 scale for the whole matrix.

    TQ1_0   256 weights in 54 bytes: base-3 digits, five a byte (the last four bytes hold four), then d
    TQ2_0   256 weights in 66 bytes: 64 bytes of 2-bit codes, then d
    Q2_0     64 weights in 18 bytes: d, then 16 bytes of 2-bit codes
    I2_S    128 weights in 32 bytes of 2-bit codes, block after block; behind the last one the scale and padding

Floats are views of the file. All other types are dequantised by the package `gguf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import MissingDependencyError

_I2_S_TAIL = 32  # bytes behind the codes: the scale, and padding


@dataclass(frozen=True)
class GgufType:
    """One way to store elements.

    Attributes:
        id, name: ggml's.
        per_block, block_bytes: a block is so many elements of a row, in so many bytes.
        dtype: of floats that need no decoding, else None.
        codes: of a ternary type with block scales; takes uint8 [blocks, block_bytes], and returns codes, uint8
            [blocks, per_block], one more than the weight, 3 for none, and the scales, float16 [blocks].
        tail: bytes behind the last block.
    """

    id: int
    name: str
    per_block: int
    block_bytes: int
    dtype: Any = None
    codes: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None
    tail: int = 0

    @property
    def is_ternary(self) -> bool:
        return self.codes is not None or self is I2_S

    def nbytes(self, shape: tuple[int, ...]) -> int | None:
        """Of a tensor of that shape, rows first; None where its rows (I2_S: its elements) are not whole blocks."""
        count = math.prod(shape)
        if (count if self is I2_S else shape[-1] if shape else 1) % self.per_block:
            return None
        return count // self.per_block * self.block_bytes + self.tail


# ---- the ternary types ----------------------------------------------------------------------------------------------


def _tq1_0_table() -> np.ndarray:
    """uint8 [256, 5]: the base-3 digits of each byte, the most significant first; 3 where no five digits give it.

    The byte of a number v below 243 is ceil(v * 256 / 243), so that 13 of the 256 bytes never occur.
    """
    table = np.full((256, 5), 3, np.uint8)
    v = np.arange(243)
    table[-(-v * 256 // 243)] = v[:, None] // 3 ** np.arange(4, -1, -1) % 3
    return table


_TQ1_0_DIGITS = _tq1_0_table()


def _tq1_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digit n of byte m is element 32n + m of the first 160, 16n + m of the next 80, 4n + m of the last 16."""
    parts = [
        _TQ1_0_DIGITS[blocks[:, start:end], :count].swapaxes(1, 2).reshape(len(blocks), -1)
        for start, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))
    ]
    return np.concatenate(parts, axis=1), blocks[:, 52:54].copy().view("<f2")[:, 0]


def _tq2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each half, 32 bytes, bits 2n and 2n + 1 of byte m are element 32n + m."""
    halves = blocks[:, :64].reshape(-1, 2, 1, 32)
    return _fields(halves, (0, 2, 4, 6)), blocks[:, 64:66].copy().view("<f2")[:, 0]


def _q2_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits 2n and 2n + 1 of byte m are element 4m + n."""
    shifts = np.array([0, 2, 4, 6], np.uint8)
    codes = (blocks[:, 2:, None] >> shifts) & 3
    return codes.reshape(len(blocks), -1), blocks[:, :2].copy().view("<f2")[:, 0]


def _fields(data: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    """uint8 [blocks, parts, 1, m] -> [blocks, parts * 4 * m]: the 2-bit fields at each shift, m at a time."""
    codes = (data >> np.array(shifts, np.uint8)[:, None]) & 3
    return codes.reshape(len(data), -1)


_TYPES = {
    kind.id: kind
    for kind in (
        GgufType(0, "F32", 1, 4, np.dtype("<f4")),
        GgufType(1, "F16", 1, 2, np.dtype("<f2")),
        GgufType(30, "BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
        GgufType(34, "TQ1_0", 256, 54, codes=_tq1_0),
        GgufType(35, "TQ2_0", 256, 66, codes=_tq2_0),
        GgufType(36, "I2_S", 128, 32, tail=_I2_S_TAIL),
        GgufType(42, "Q2_0", 64, 18, codes=_q2_0),
    )
}
I2_S = _TYPES[36]


def find_type(type_id: int, path: Path) -> GgufType | None:
    """The type of that id; None where nobody knows it.

    Raises:
        MissingDependencyError: the package `gguf` is not installed, and the type is not one of this module's.
    """
    if type_id in _TYPES:
        return _TYPES[type_id]
    gguf = _package(path)
    try:
        kind = gguf.GGMLQuantizationType(type_id)
        return GgufType(type_id, kind.name, *gguf.GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        return None


def ternary_rows(kind: GgufType, data: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Decode a ternary matrix, or whole rows of one of block scales.

    Args:
        data: uint8, the stored bytes.
        k: elements of a row.

    Returns:
        int8 [M, K] of {-1, 0, 1}, and 2 for a code that is no ternary weight, and the scales: float16 [M, blocks of
        a row], float32 [1, 1] for I2_S.
    """
    if kind is I2_S:
        codes = _fields(data[: -kind.tail].reshape(-1, 1, 1, 32), (6, 4, 2, 0)).reshape(-1, k)
        scales = data[-kind.tail :][:4].copy().view("<f4").reshape(1, 1)
    else:
        assert kind.codes is not None
        codes, scales = kind.codes(data.reshape(-1, kind.block_bytes))
        codes, scales = codes.reshape(-1, k), scales.reshape(-1, k // kind.per_block)
    codes = codes.view(np.int8)
    codes -= 1
    return codes, scales


def dequantize(kind: GgufType, data: np.ndarray, k: int, path: Path) -> np.ndarray:
    """Whole rows of k elements, of one of the package's types, as float32 [M, K]. May raise anything for a type that
    the package cannot dequantise."""
    gguf = _package(path)
    rows = data.reshape(-1, k // kind.per_block * kind.block_bytes)  # the package works on a few rows at a time
    with np.errstate(all="ignore"):  # damaged block scales overflow; who wants the values checks them
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.id)), np.float32)


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError as e:
        raise MissingDependencyError(
            f"reading {path} needs the package gguf: pip install 'edgellm-cupy[models]' ({e})"
        ) from e
    return gguf
