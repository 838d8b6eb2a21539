"""The one place that checks the arguments of the public operations, for CuPy arrays and for the NumPy reference.

Each check runs before anything is allocated or launched, and each message names the argument, what was expected and
what came. The checks are on the path of every call, so they compare attributes and touch no array data.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .errors import ArgumentTypeError, ArgumentValueError
from .formats.ternary import TernaryWeight
from .sampling import Sampling

FLOAT16 = np.dtype(np.float16)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
MODEL_DTYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16, "float32": FLOAT32}
"""Names of the dtypes that a decoder may store its intermediate results in."""
ACTIVATIONS = ("float", "int8")
_FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGEST_BATCH = 65_535  # a launch has one row of blocks a sequence
LARGEST_LENGTH = 2**31 - 1  # tokens, an int32
LARGEST_K = 4_000_000
"""Sums of codes, up to 128 in place, times 8-bit values stay below 2**31: an accumulator has at most a quarter of an
eighth of K (kernels_cu/include/ternary_product.cuh)."""
STRATEGIES = ("adaptive", "streaming", "separate")


def check_rmsnorm(array_type: Any, x: Any, gamma: Any, eps: float, out: Any) -> None:
    """Arguments of `rmsnorm`. `array_type` is ``cupy.ndarray`` or ``numpy.ndarray``."""
    _check_activations(array_type, x)
    _check_gamma(array_type, x, gamma, eps)
    if out is not None:
        _check_result(array_type, "out", out, x.shape, DTYPES)
        _check_no_overlap(out, (("x", x), ("gamma", gamma)))
    _check_devices(array_type, (("x", x), ("gamma", gamma), ("out", out)))


def check_ternary_matmul(array_type: Any, x: Any, W: Any, activation: str, out: Any) -> None:
    """Arguments of `ternary_matmul`."""
    _check_product(array_type, x, W, activation, None, out)
    _check_devices(array_type, (("x", x), ("W", W.packed), ("out", out)))


def check_rmsnorm_ternary_matmul(
    array_type: Any, x: Any, gamma: Any, W: Any, eps: float, activation: str, residual: Any, strategy: str, out: Any
) -> None:
    """Arguments of `rmsnorm_ternary_matmul`."""
    _check_product(array_type, x, W, activation, residual, out)
    _check_gamma(array_type, x, gamma, eps)
    if out is not None:
        _check_no_overlap(out, (("gamma", gamma),))
    arrays = (("x", x), ("gamma", gamma), ("W", W.packed), ("residual", residual), ("out", out))
    _check_devices(array_type, arrays)
    if strategy not in STRATEGIES:
        raise ArgumentValueError(f"strategy is {strategy!r}, expected one of {', '.join(STRATEGIES)}")


def check_cache_size(max_len: Any, batch: Any) -> None:
    """Arguments of `new_cache`."""
    for name, value in (("max_len", max_len), ("batch", batch)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise ArgumentTypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ArgumentValueError(f"{name} is {value}, expected at least 1")
    if max_len > LARGEST_LENGTH:
        raise ArgumentValueError(f"max_len is {max_len}, expected at most {LARGEST_LENGTH}")
    if batch > LARGEST_BATCH:
        raise ArgumentValueError(f"batch is {batch}, expected at most {LARGEST_BATCH}")


def check_tokens(ids: np.ndarray, batch: int, length: int, max_len: int, vocab_size: int) -> None:
    """Token ids [B, N] in host memory that fit the vocabulary, and a cache that holds `length` of `max_len` tokens."""
    if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < 1:
        raise ArgumentValueError(f"token_ids.shape is {ids.shape}, expected [{batch}, N] (batch {batch}), N >= 1")
    if not np.issubdtype(ids.dtype, np.integer):
        raise ArgumentTypeError(f"token_ids: expected integers, got {ids.dtype}")
    if length + ids.shape[1] > max_len:
        raise ArgumentValueError(f"token_ids: {ids.shape[1]} more after {length} do not fit max_len = {max_len}")
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        bad = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ArgumentValueError(f"token_ids holds {bad}, expected 0 <= token < vocabulary = {vocab_size}")


def is_one_sequence(token_ids: Any) -> bool:
    """Whether token ids are a number or [N], which come back without a batch dimension."""
    return not np.iterable(token_ids) or not any(np.iterable(row) and not isinstance(row, str) for row in token_ids)


def as_sequences(token_ids: Any, batch: int) -> list[np.ndarray]:
    """Token ids in host memory, [N], [B, N] or B sequences of different lengths, as B integer arrays [N_b], N_b >= 1.

    Vocabulary and room in the cache are not checked here: see :func:`check_tokens`.

    Raises:
        ArgumentTypeError, ArgumentValueError: no integers, another shape, or other than `batch` sequences.
    """
    try:
        ids = np.atleast_2d(np.asarray(token_ids))
    except ValueError:  # NumPy's word for rows of different lengths
        rows = []
        for i, row in enumerate(token_ids):
            try:
                rows.append(np.asarray(row))
            except ValueError as e:
                raise ArgumentValueError(f"token_ids[{i}]: expected [N], a flat list of integers") from e
            if rows[i].ndim != 1 or rows[i].size < 1:
                raise ArgumentValueError(f"token_ids[{i}].shape is {rows[i].shape}, expected [N], N >= 1") from None
        if len(rows) != batch:
            raise ArgumentValueError(f"token_ids holds {len(rows)} sequences, expected batch = {batch}") from None
    else:
        if ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < 1:
            raise ArgumentValueError(f"token_ids.shape is {ids.shape}, expected [{batch}, N] (batch {batch}), N >= 1")
        rows = list(ids)
    for row in rows:
        if not np.issubdtype(row.dtype, np.integer):
            raise ArgumentTypeError(f"token_ids: expected integers, got {row.dtype}")
    return rows


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    """A word out of a few."""
    if value not in options:
        raise ArgumentValueError(f"{name} is {value!r}, expected one of {', '.join(dict.fromkeys(options))}")


def check_sampling(sampling: Any) -> None:
    """The `sampling` of a cache."""
    if not isinstance(sampling, Sampling):
        raise ArgumentTypeError(f"sampling: expected a Sampling, got {type(sampling).__name__}")


def check_generation(
    token_ids: Any, max_new_tokens: Any, stop_tokens: Any, vocab_size: int
) -> tuple[bool, list[np.ndarray], frozenset[int]]:
    """Arguments of `generate`: (whether it is a single prompt, the prompts, the stop tokens)."""
    if not isinstance(max_new_tokens, (int, np.integer)) or isinstance(max_new_tokens, bool):
        raise ArgumentTypeError(f"max_new_tokens: expected an integer, got {type(max_new_tokens).__name__}")
    if max_new_tokens < 0:
        raise ArgumentValueError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
    if max_new_tokens > LARGEST_LENGTH:
        raise ArgumentValueError(f"max_new_tokens is {max_new_tokens}, expected at most {LARGEST_LENGTH}")
    if not np.iterable(token_ids) or not (prompts := list(token_ids)):
        raise ArgumentValueError("token_ids: expected at least one token, as [N], [B, N] or B sequences")
    one = is_one_sequence(prompts)
    rows = as_sequences(token_ids, 1 if one else len(prompts))
    for row in rows:
        check_tokens(row[None], 1, 0, row.size, vocab_size)
    if not np.iterable(stop_tokens):
        raise ArgumentTypeError(f"stop_tokens: expected several integers, got {type(stop_tokens).__name__}")
    stop = frozenset(stop_tokens)
    for token in stop:
        if not isinstance(token, (int, np.integer)) or isinstance(token, bool):
            raise ArgumentTypeError(f"stop_tokens: expected integers, got {type(token).__name__}")
    return one, rows, stop


# ---- one argument each ----------------------------------------------------------------------------------------------


def _check_array(array_type: Any, name: str, a: Any, dtypes: tuple[Any, ...]) -> None:
    if not isinstance(a, array_type):
        library = array_type.__module__.split(".")[0]
        raise ArgumentTypeError(
            f"{name}: expected a {'CuPy' if library == 'cupy' else 'NumPy'} array, got "
            f"{type(a).__module__}.{type(a).__name__}"
            + (" (PyTorch and JAX arrays come in through cupy.from_dlpack)" if library == "cupy" else "")
        )
    if a.dtype not in dtypes:
        raise ArgumentTypeError(f"{name}.dtype is {a.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if not a.flags.c_contiguous:
        raise ArgumentValueError(f"{name} is not C-contiguous (shape {a.shape}, strides {a.strides})")


def _check_activations(array_type: Any, x: Any) -> None:
    _check_array(array_type, "x", x, DTYPES)
    if x.ndim not in (1, 2) or 0 in x.shape:
        raise ArgumentValueError(f"x.shape is {x.shape}, expected [K] or [N, K] with N, K >= 1")


def _check_gamma(array_type: Any, x: Any, gamma: Any, eps: float) -> None:
    _check_array(array_type, "gamma", gamma, (FLOAT32,) if x.dtype == FLOAT32 else (FLOAT32, x.dtype))
    if gamma.shape != x.shape[-1:]:
        raise ArgumentValueError(f"gamma.shape is {gamma.shape}, but x.shape[-1] is K = {x.shape[-1]}")
    if not isinstance(eps, (int, float, np.floating, np.integer)) or isinstance(eps, bool):
        raise ArgumentTypeError(f"eps: expected a number, got {type(eps).__name__}")
    if not 0 <= eps <= _FLOAT32_MAX:
        raise ArgumentValueError(f"eps is {eps}, expected a finite number >= 0 that float32 holds")


def _check_weight(array_type: Any, x: Any, W: Any) -> None:
    if not isinstance(W, TernaryWeight):
        raise ArgumentTypeError(f"W: expected a TernaryWeight, got {type(W).__module__}.{type(W).__name__}")
    if not isinstance(W.packed, array_type):
        where, method = ("host", "to_device") if not W.on_device else ("device", "to_host")
        raise ArgumentTypeError(
            f"W is a {where} weight, but x is a {array_type.__module__} array: call W.{method}() first"
        )
    if W.shape[1] != x.shape[-1]:
        raise ArgumentValueError(f"x.shape[-1] is {x.shape[-1]}, but the weight has K = {W.shape[1]}")


def _check_product(array_type: Any, x: Any, W: Any, activation: str, residual: Any, out: Any) -> None:
    _check_activations(array_type, x)
    _check_weight(array_type, x, W)
    if activation not in ACTIVATIONS:
        raise ArgumentValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if W.shape[1] > LARGEST_K:
        raise ArgumentValueError(f"W has K = {W.shape[1]}, expected at most {LARGEST_K} for exact int32 sums")
    shape = (*x.shape[:-1], W.shape[0])
    if residual is not None:
        _check_result(array_type, "residual", residual, shape, (x.dtype,))
    if out is not None:
        _check_result(array_type, "out", out, shape, DTYPES)
        _check_no_overlap(out, (("x", x),))
        in_place = residual is not None and out.dtype == residual.dtype
        if residual is not None and not (in_place and address(out) == address(residual)):
            _check_no_overlap(out, (("residual", residual),))


def _check_result(array_type: Any, name: str, a: Any, shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    _check_array(array_type, name, a, dtypes)
    if a.shape != shape:
        raise ArgumentValueError(f"{name}.shape is {a.shape}, expected {shape}")


def address(a: Any) -> int:
    """Where a NumPy or CuPy array's first element lies."""
    return int(a.ctypes.data) if isinstance(a, np.ndarray) else int(a.data.ptr)


def _check_no_overlap(out: Any, inputs: tuple[tuple[str, Any], ...]) -> None:
    """Other blocks still read the inputs while the first results are written."""
    start = address(out)
    for name, a in inputs:
        begin = address(a)
        if begin < start + out.nbytes and start < begin + a.nbytes:
            raise ArgumentValueError(f"out overlaps {name} in memory, expected separate memory")


def _check_devices(array_type: Any, arrays: tuple[tuple[str, Any], ...]) -> None:
    if array_type is np.ndarray:
        return
    import cupy

    current = cupy.cuda.runtime.getDevice()
    for name, a in arrays:
        if a is not None and a.data.device_id != current:
            raise ArgumentValueError(f"{name} is on device {a.data.device_id}, but the current device is {current}")
