"""The packed 2-bit layout of a ternary matrix: the one place that defines it.

A weight t in {-1, 0, 1} is stored as the code u = t + 1 in {0, 1, 2}; 3 never occurs. Rows lie one after the other.
A row of K codes is cut into *chunks* of 64 codes, 16 bytes, which is what one thread loads with one instruction; the
last chunk is filled up with u = 1 (t = 0). ``chunks(K) = ceil(K / 64)``, so the array is uint8 [M, chunks(K), 16].

Inside a chunk, 32-bit word j holds elements 16j .. 16j+15, and element 16j + 4i + b sits in byte b, bits 2i and 2i+1:

    word j, bits   31..30 29..28 27..26 25..24 | 23..22 ...  | ... | 7..6  5..4  3..2  1..0
    element 16j +    15     11      7      3   |   14   ...  | ... |  12     8     4     0

Why: ``word & (0x03030303 << 2i)`` leaves the four codes 4i .. 4i+3, one a byte and still scaled by 4**i. That is an
operand of the tensor cores against four *consecutive* int8 activations, with one mask and no shift.

All functions take NumPy or CuPy arrays (``xp`` is the array's own module) and return arrays of the same kind; nothing
is copied between host and device.
"""

from __future__ import annotations

from typing import Any

CHUNK = 64  # codes in a chunk
CHUNK_BYTES = 16


def chunks(k: int) -> int:
    """Number of 64-code chunks that hold a row of `k` codes."""
    return -(-k // CHUNK)


def pack(t: Any, xp: Any) -> Any:
    """Pack int8 [M, K] of {-1, 0, 1} into uint8 [M, chunks(K), 16]. The values are not checked here."""
    m, k = t.shape
    padded = chunks(k) * CHUNK
    u = xp.ones((m, padded), dtype=xp.uint8)
    xp.add(t, 1, out=u[:, :k], casting="unsafe")
    # [M, word, field i, byte b]: the field becomes the shift, the byte stays the byte.
    fields = u.reshape(m, padded // 16, 4, 4)
    packed = fields[:, :, 0] | (fields[:, :, 1] << 2) | (fields[:, :, 2] << 4) | (fields[:, :, 3] << 6)
    return xp.ascontiguousarray(packed.reshape(m, chunks(k), CHUNK_BYTES))


def unpack(packed: Any, k: int, xp: Any) -> Any:
    """Inverse of :func:`pack`: int8 [M, K]."""
    m = packed.shape[0]
    words = packed.reshape(m, -1, 1, 4)
    shifts = xp.arange(0, 8, 2, dtype=xp.uint8).reshape(1, 1, 4, 1)
    u = ((words >> shifts) & 3).astype(xp.int8)
    u -= 1
    return xp.ascontiguousarray(u.reshape(m, -1)[:, :k])
