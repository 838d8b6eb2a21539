"""TernaryWeight: a ternary matrix in the packed layout, on the host or on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ArgumentTypeError, ArgumentValueError
from . import packing
from .arrays import is_cupy, namespace

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_BLOCK = 1 << 18
"""Elements of a host matrix that are converted at once."""


class TernaryWeight:
    """A matrix W = scale * t with t in {-1, 0, 1}, two bits a weight. Immutable: kernels read it ahead of their turn.

    It lives where its codes came from: NumPy codes give a host weight, CuPy codes one on their device.
    :meth:`to_device` and :meth:`to_host` copy; nothing else ever crosses between host and device.

    Build one with :meth:`from_int8`, :meth:`from_float` or :meth:`from_packed`.

    Attributes:
        shape: ``(M, K)``: output features, input features.
        packed: uint8 [M, ceil(K / 64), 16]; :mod:`edgellm_cupy.formats.packing` defines the layout.
        scale: float32, [M] (one a row) or [1] (one for the matrix), in the same memory as `packed`.
    """

    __slots__ = ("packed", "scale", "shape")

    def __init__(self, packed: Any, scale: Any, shape: tuple[int, int]):
        """For the package's own use: takes the arrays as they are, without a check."""
        self.packed, self.scale, self.shape = packed, scale, shape

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_int8(cls, t: Any, scale: Any = 1.0) -> TernaryWeight:
        """Pack a ternary matrix.

        Args:
            t: int8 [M, K], NumPy or CuPy, every value -1, 0 or 1; M, K >= 1.
            scale: a number, or float32 [M] for one scale a row, in the same memory as `t`.

        Raises:
            ArgumentTypeError: `t` is not an int8 NumPy or CuPy array, or `scale` is of the wrong kind.
            ArgumentValueError: wrong shape, a value outside -1..1 (the first offender's position is named), or a
                scale that is not finite.
        """
        xp = _require_matrix(t, "t", ("int8",))
        with _device_of(t):
            bad = (t < -1) | (t > 1)
            if bool(bad.any()):
                row, col = divmod(int(bad.argmax()), t.shape[1])
                raise ArgumentValueError(f"t[{row}, {col}] is {int(t[row, col])}, expected -1, 0 or 1")
            return cls(packing.pack(t, xp), _require_scale(scale, t, xp), t.shape)._written()

    @classmethod
    def from_float(cls, w: Any) -> TernaryWeight:
        """Quantise with the absmean quantiser of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764).

        s = 1 / max(mean(abs(w)), 1e-5);  t = clip(round_half_even(w * s), -1, 1);  w ~ t / s.  The mean is taken in
        float64, the product in float32. A matrix in host memory is converted a few rows at a time.

        Args:
            w: float16, bfloat16, float32 or float64 [M, K], NumPy or CuPy, finite.

        Raises:
            ArgumentTypeError: not such an array.
            ArgumentValueError: wrong shape, or a value that is not finite (its position is named).
        """
        xp = _require_matrix(w, "w", ("float16", "bfloat16", "float32", "float64"))
        if xp is np:
            return cls(*_absmean_of_host(w), w.shape)
        with _device_of(w):
            w32 = w.astype(xp.float32)
            bad = ~xp.isfinite(w32)
            if bool(bad.any()):
                row, col = divmod(int(bad.argmax()), w.shape[1])
                raise ArgumentValueError(f"w[{row}, {col}] is {float(w[row, col])}, expected a finite float32")
            absmean = max(float(xp.abs(w32).mean(dtype=xp.float64)), 1e-5)
            t = xp.clip(xp.rint(w32 * np.float32(1.0 / absmean)), -1, 1).astype(xp.int8)
            return cls(packing.pack(t, xp), xp.full(1, absmean, dtype=xp.float32), w.shape)._written()

    @classmethod
    def from_packed(cls, packed: Any, scale: Any, shape: tuple[int, int]) -> TernaryWeight:
        """Wrap codes that are packed already (a file of ours); they are checked, and not copied unless they are not
        contiguous or, on a device, not aligned to the 16 bytes that kernels load.

        Raises:
            ArgumentTypeError: `packed` is not uint8.
            ArgumentValueError: the sizes disagree, a code is 3, a padding code is not 1, or a scale is not finite.
        """
        m, k = shape
        if not (isinstance(m, int) and isinstance(k, int) and m >= 1 and k >= 1):
            raise ArgumentValueError(f"shape is {shape}, expected (M, K), two integers of at least 1")
        if not hasattr(packed, "dtype") or packed.dtype != np.uint8:
            raise ArgumentTypeError(f"packed: expected a uint8 array, got {_kind(packed)}")
        expected = (m, packing.chunks(k), packing.CHUNK_BYTES)
        if tuple(packed.shape) != expected:
            raise ArgumentValueError(f"packed.shape is {tuple(packed.shape)}, expected {expected} for {tuple(shape)}")
        xp = namespace(packed)
        with _device_of(packed):
            # Code 3 is the only one with both bits set.
            bad = ((packed & (packed >> 1) & 0x55) != 0).reshape(m, -1)
            if bool(bad.any()):
                row, byte = divmod(int(bad.argmax()), bad.shape[1])
                raise ArgumentValueError(f"packed row {row}, byte {byte} holds the code 3, expected 0, 1 or 2")
            pad = k % packing.CHUNK
            if pad:
                tail = packing.unpack(xp.ascontiguousarray(packed[:, -1:]), packing.CHUNK, xp)[:, pad:]
                if bool(tail.any()):
                    raise ArgumentValueError(f"packed: the codes after K = {k} must all be zero weights")
            packed = xp.ascontiguousarray(packed)
            if is_cupy(packed) and packed.data.ptr % packing.CHUNK_BYTES:
                packed = packed.copy()
            return cls(packed, _require_scale(scale, packed, xp), (m, k))._written()

    def _written(self) -> TernaryWeight:
        """Itself, once its arrays are written: kernels read weights before the kernels in front of them have ended
        (kernels_cu/include/ptx.cuh)."""
        if self.on_device:
            namespace(self.packed).cuda.get_current_stream().synchronize()
        return self

    # ---- looking at it ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the scales."""
        return int(self.packed.nbytes + self.scale.nbytes)

    @property
    def on_device(self) -> bool:
        """True when it lives on a GPU."""
        return is_cupy(self.packed)

    def to_int8(self) -> Any:
        """The codes as int8 [M, K] of {-1, 0, 1}, in the same memory as the weight."""
        with _device_of(self.packed):
            return packing.unpack(self.packed, self.shape[1], namespace(self.packed))

    def __repr__(self) -> str:
        where = f"cuda:{self.packed.device.id}" if self.on_device else "host"
        return f"TernaryWeight(M={self.shape[0]}, K={self.shape[1]}, scales={self.scale.size}, {where})"

    # ---- moving it --------------------------------------------------------------------------------------------------

    def to_device(self, device: int | None = None) -> TernaryWeight:
        """A copy on CUDA device number `device` (default: the current one); itself when it is there already.

        Raises:
            ArgumentValueError: no such device.
            GpuUnavailableError: no usable GPU.
        """
        from ..runtime import require_cupy

        cp = require_cupy()
        if device is not None and not 0 <= device < cp.cuda.runtime.getDeviceCount():
            raise ArgumentValueError(f"device is {device}, expected 0 to {cp.cuda.runtime.getDeviceCount() - 1}")
        target = cp.cuda.Device(device)
        if self.on_device and self.packed.device == target:
            return self
        with target:
            return TernaryWeight(cp.asarray(self.packed), cp.asarray(self.scale), self.shape)._written()

    def to_host(self) -> TernaryWeight:
        """A copy in host memory; itself when it is there already."""
        if not self.on_device:
            return self
        return TernaryWeight(self.packed.get(), self.scale.get(), self.shape)


def concatenate(weights: list[TernaryWeight]) -> TernaryWeight:
    """Stack host weights of one K along M, as one product: [M1 + M2 + ..., K] with a scale a row."""
    if len({w.shape[1] for w in weights}) != 1:
        raise ArgumentValueError(f"weights: expected one common K, got {[w.shape for w in weights]}")
    scale = np.concatenate([np.broadcast_to(w.scale, (w.shape[0],)) for w in weights])
    m = sum(w.shape[0] for w in weights)
    return TernaryWeight(np.concatenate([w.packed for w in weights]), scale, (m, weights[0].shape[1]))


def row_blocks(w: np.ndarray) -> Iterator[slice]:
    """The rows of a host matrix, a few at a time."""
    step = max(1, _BLOCK // w.shape[1])
    return (slice(start, start + step) for start in range(0, len(w), step))


def _absmean_of_host(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes and scale of `from_float`. Neither depends on the size of a block."""

    def as_float32(rows: slice) -> np.ndarray:
        with np.errstate(over="ignore"):  # a float64 beyond float32 is refused below, by name
            return w[rows].astype(np.float32, order="C")

    m, k = w.shape
    sums = np.empty(m, np.float64)
    for rows in row_blocks(w):
        block = as_float32(rows)
        bad = ~np.isfinite(block)
        if bad.any():
            row, col = divmod(int(bad.argmax()), k)
            row += rows.start
            raise ArgumentValueError(f"w[{row}, {col}] is {float(w[row, col])}, expected a finite float32")
        sums[rows] = np.abs(block, out=block).sum(axis=1, dtype=np.float64)
    absmean = max(float(sums.sum()) / w.size, 1e-5)
    packed = np.empty((m, packing.chunks(k), packing.CHUNK_BYTES), np.uint8)
    for rows in row_blocks(w):
        block = as_float32(rows)
        block *= np.float32(1.0 / absmean)
        np.clip(np.rint(block, out=block), -1, 1, out=block)
        packed[rows] = packing.pack(block.astype(np.int8), np)
    return packed, np.full(1, absmean, np.float32)


# ---- the checks of this file ----------------------------------------------------------------------------------------


def _kind(a: Any) -> str:
    """`numpy.ndarray of float32`, for error messages."""
    name = f"{type(a).__module__.split('.')[0]}.{type(a).__name__}"
    return f"{name} of {a.dtype}" if hasattr(a, "dtype") else name


def _device_of(a: Any) -> Any:
    """Context in which work on `a` runs on the device that holds it."""
    from contextlib import nullcontext

    return a.device if is_cupy(a) else nullcontext()


def _require_matrix(a: Any, name: str, dtypes: tuple[str, ...]) -> Any:
    if not (isinstance(a, np.ndarray) or is_cupy(a)) or str(a.dtype) not in dtypes:
        raise ArgumentTypeError(f"{name}: expected a NumPy or CuPy array of {' or '.join(dtypes)}, got {_kind(a)}")
    if a.ndim != 2 or 0 in a.shape:
        raise ArgumentValueError(f"{name}.shape is {tuple(a.shape)}, expected [M, K] with M, K >= 1")
    return namespace(a)


def _require_scale(scale: Any, t: Any, xp: Any) -> Any:
    """float32 [1] or [M] in the memory of `t`."""
    m = t.shape[0]
    if isinstance(scale, (int, float, np.floating, np.integer)) and not isinstance(scale, bool):
        if not -_FLOAT32_MAX <= scale <= _FLOAT32_MAX:
            raise ArgumentValueError(f"scale is {scale}, expected a finite float32")
        return xp.full(1, scale, dtype=xp.float32)
    if not isinstance(scale, xp.ndarray) or scale.dtype != np.float32:
        raise ArgumentTypeError(
            f"scale: expected a number or a {xp.__name__} float32 array like the codes, got {_kind(scale)}"
        )
    if scale.shape not in ((m,), (1,)):
        raise ArgumentValueError(f"scale.shape is {tuple(scale.shape)}, expected ({m},), one a row")
    if is_cupy(t) and scale.device != t.device:
        raise ArgumentValueError(f"scale is on {scale.device}, but the codes are on {t.device}")
    bad = ~xp.isfinite(scale)
    if bool(bad.any()):
        row = int(bad.argmax())
        raise ArgumentValueError(f"scale[{row}] is {float(scale[row])}, expected a finite float32")
    return xp.ascontiguousarray(scale)
