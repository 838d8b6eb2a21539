"""cuLaunchKernelEx: the one driver call that CuPy does not wrap.

CuPy's own launch has no launch attributes, and of those we need two, both of compute capability 9.0 and newer. With
programmatic dependent launch a kernel starts while its predecessor still runs, loads its weights, and waits for it
inside (kernels_cu/include/ptx.cuh); inside a capture the same call records a programmatic edge of the graph. A cluster
dimension puts neighbouring blocks where they reach each other's shared memory (kernels_cu/include/cluster.cuh).
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__EXEC.html
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

Shape = tuple[tuple[int, ...], tuple[int, ...], int]  # grid, block, dynamic shared memory in bytes

_PARAMETER_BUFFER, _PARAMETER_BYTES, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CU_LAUNCH_ATTRIBUTE_*
_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14  # CU_FUNC_ATTRIBUTE_*
_PORTABLE_CLUSTER = 8  # blocks: larger clusters a kernel has to be allowed explicitly
_INVALID_CONTEXT = 201


class _Attribute(ctypes.Structure):  # CUlaunchAttribute
    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_uint * 3),  # a flag, or blocks of a cluster along x, y and z
        ("rest", ctypes.c_char * 52),
    ]


class _Configuration(ctypes.Structure):  # CUlaunchConfig
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def _configuration(shape: Shape, cluster: int, may_overlap: bool) -> _Configuration:
    attributes = []
    if cluster > 1:
        attributes.append(_Attribute(_CLUSTER_DIMENSION, b"", (cluster, 1, 1)))
    if may_overlap:
        attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, b"", (1, 0, 0)))
    count = len(attributes)
    return _Configuration(*shape, None, (_Attribute * count)(*attributes), count)


_overlap = os.environ.get("EDGELLM_OVERLAP") != "0"


@contextmanager
def overlap(enabled: bool) -> Iterator[None]:
    """Whether launches (and captures) inside the block may start before their predecessor has ended. The default is
    yes, unless EDGELLM_OVERLAP=0. Results are the same; it is there to measure and to debug."""
    global _overlap
    before, _overlap = _overlap, enabled
    try:
        yield
    finally:
        _overlap = before


def _allow_large_clusters(function: int) -> None:
    from cupy_backends.cuda.api.driver import funcSetAttribute

    funcSetAttribute(function, _NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)


@cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuLaunchKernelEx


class Launcher:
    """Launches one function of the driver, with buffers that are made once.

    Args:
        function: CUfunction.
        parameters: the kernel's parameters as a format of `struct`.
        may_overlap: the device knows programmatic dependent launch, and the kernel waits for its predecessors itself.
    """

    def __init__(self, function: int, parameters: str, may_overlap: bool):
        self._function, self._may_overlap = ctypes.c_void_p(function), may_overlap
        self._pack = struct.Struct(parameters)
        self._launch = _driver()
        self._lock = threading.Lock()  # the buffers are filled, then read by the driver, without the GIL
        self._buffer = ctypes.create_string_buffer(self._pack.size)
        self._size = ctypes.c_size_t(self._pack.size)
        self._extra = (ctypes.c_void_p * 5)(
            _PARAMETER_BUFFER, ctypes.addressof(self._buffer), _PARAMETER_BYTES, ctypes.addressof(self._size), _END
        )
        # Without overlap and with it; by shape, and by cluster where there is one.
        self._configurations: tuple[dict[tuple[Any, ...], _Configuration], ...] = ({}, {})
        self.launches: dict[Shape, int] = {}

    def __call__(self, stream: int, shape: Shape, args: tuple[Any, ...], cluster: int = 1) -> None:
        """Enqueue on `stream`. args: CuPy arrays, None, numbers; cluster: blocks of one, along x. `launches` counts.

        Raises:
            struct.error: the arguments are not what the kernel declares.
            CUDADriverError: the driver refused the launch.
        """
        values = [a if a.__class__ in _PLAIN else _value(a) for a in args]
        key: tuple[Any, ...] = shape if cluster == 1 else (*shape, cluster)
        may_overlap = self._may_overlap and _overlap
        configuration = self._configurations[may_overlap].get(key)
        if configuration is None:
            if cluster > _PORTABLE_CLUSTER:
                _allow_large_clusters(self._function.value or 0)
            configuration = self._configurations[may_overlap][key] = _configuration(shape, cluster, may_overlap)
        with self._lock:
            self._pack.pack_into(self._buffer, 0, *values)
            configuration.stream = stream
            status = self._launch(ctypes.byref(configuration), self._function, None, self._extra)
            if status == _INVALID_CONTEXT:  # a new thread: the runtime's context is not yet the driver's current one
                import cupy

                cupy.cuda.Device().use()
                status = self._launch(ctypes.byref(configuration), self._function, None, self._extra)
        if status:
            from cupy_backends.cuda.api.driver import CUDADriverError

            raise CUDADriverError(status)
        self.launches[shape] = self.launches.get(shape, 0) + 1


_PLAIN = frozenset((int, float, bool))


def _value(a: Any) -> Any:
    """What goes into the parameter buffer: an array's address, zero for None, a number as it is."""
    if a is None:
        return 0
    try:
        return a.data.ptr
    except AttributeError:
        return a
