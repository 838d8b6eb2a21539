"""Launches kernels on NumPy arrays."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .build import Kernel, Library, Specialisation, as_kernel, build_kernels, build_runtime
from .memory import Array, DeviceMemory, Output, Placed, Scratch

Order = str | int
ORDERS: tuple[Order, ...] = ("forward", "reverse", 1)  # an int seeds a random order of blocks and threads

STATIC_SHARED_LIMIT = 48 * 1024
SHARED_LIMIT = 227 * 1024  # of sm_90; an architecture with less is the caller's to check
MAX_CLUSTER = 16  # blocks; more than 8 are not portable
MAX_THREADS = 1024


class EmulatorFault(Exception):
    """A kernel did what it must not. `kind` is one word (README.md lists them)."""

    def __init__(
        self,
        kind: str,
        message: str,
        kernel: str = "",
        block: tuple[int, ...] | None = None,
        thread: tuple[int, ...] | None = None,
        location: str = "",
    ) -> None:
        self.kind, self.message, self.kernel = kind, message, kernel
        self.block, self.thread, self.location = block, thread, location
        where = f", block {block}, thread {thread}" if block is not None else ""
        super().__init__(f"{kind}: {kernel}{where}: {message}" + (f" [{location}]" if location else ""))


class _Parameter(ctypes.Structure):  # emu_abi.h
    _fields_ = [
        ("kind", ctypes.c_char),
        ("element", ctypes.c_char),
        ("is_const", ctypes.c_uint8),
        ("unused", ctypes.c_uint8),
        ("size", ctypes.c_uint32),
        ("element_size", ctypes.c_uint32),
    ]


class _Entry(ctypes.Structure):  # emu_abi.h
    _fields_ = [
        ("call", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_Parameter)),
        ("parameter_count", ctypes.c_uint32),
    ]


class _Configuration(ctypes.Structure):  # runtime/state.hpp
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("cooperative", ctypes.c_int32),
        ("order", ctypes.c_int32),
        ("check_races", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("timeout", ctypes.c_double),
        ("static_begin", ctypes.c_uint64),
        ("static_bytes", ctypes.c_uint64),
        ("image_begin", ctypes.c_uint64),
        ("image_end", ctypes.c_uint64),
        ("variables", ctypes.POINTER(ctypes.c_uint32)),
        ("variable_count", ctypes.c_uint32),
    ]


class _Fault(ctypes.Structure):  # runtime/fault.hpp
    _fields_ = [
        ("kind", ctypes.c_char * 32),
        ("message", ctypes.c_char * 1024),
        ("location", ctypes.c_char * 256),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("has_thread", ctypes.c_int32),
        ("pc", ctypes.c_uint64),
        ("address", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class _Loaded:
    """A kernel ready to launch."""

    kernel: Kernel
    library: Library
    entry: _Entry
    static_begin: int
    static_bytes: int  # a multiple of 16
    variables: Array  # uint32 [n, 2]: offset and bytes of each static shared variable

    @property
    def parameters(self) -> list[_Parameter]:
        return [self.entry.parameters[i] for i in range(self.entry.parameter_count)]


class Emulator:
    """Builds kernels and launches them; one launch at a time.

    `order` is the schedule of launches that name none; `timeout` bounds one launch, in seconds; `check_races` can be
    switched off for speed.
    """

    def __init__(
        self, order: Order = "forward", timeout: float = 60.0, check_races: bool = True, per_file: int = 8
    ) -> None:
        self.order = order
        self.timeout = timeout
        self.check_races = check_races
        self.per_file = per_file
        self._libraries: dict[str, tuple[Kernel, Library]] = {}
        self._loaded: dict[str, _Loaded] = {}

    # ---- building ----

    def build(self, kernels: Iterable[Kernel | Specialisation], jobs: int | None = None) -> None:
        """Compiles kernels that are not in the cache; the more at once, the fewer g++ runs."""
        runtime = _Runtime.get()  # kernels need its functions when they are loaded
        assert runtime is not None
        wanted = {kernel.name: kernel for kernel in map(as_kernel, kernels)}
        new = [k for k in wanted.values() if self._libraries.get(k.name, (None,))[0] != k]
        for kernel in new:
            self._loaded.pop(kernel.name, None)
        libraries = build_kernels(new, self.per_file, jobs or os.cpu_count() or 1)
        self._libraries.update({kernel.name: (kernel, libraries[kernel.name]) for kernel in new})

    @property
    def names(self) -> list[str]:
        return sorted(self._libraries)

    def static_shared_bytes(self, name: str) -> int:
        return int(self._load(name).variables[:, 1].sum())

    def _load(self, name: str) -> _Loaded:
        if name not in self._loaded:
            if name not in self._libraries:
                raise KeyError(f"kernel {name!r} was not built; built are {self.names}")
            kernel, library = self._libraries[name]
            found = library.shared_variables(kernel)
            begin = min((address for address, _, _ in found), default=0) // 16 * 16
            end = max((address + size for address, size, _ in found), default=0)
            variables = np.array([(address - begin, size) for address, size, _ in found], np.uint32)
            entry = _Entry.from_address(library.entry(name))
            self._loaded[name] = _Loaded(
                kernel, library, entry, begin, -(-(end - begin) // 16) * 16, variables.reshape(-1, 2)
            )
        return self._loaded[name]

    # ---- launching ----

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any],
        shared: int = 0,
        *,
        cluster: int | Sequence[int] = 1,
        cooperative: bool = False,
        order: Order | None = None,
    ) -> None:
        """Runs a kernel once; arrays change in place. Raises EmulatorFault.

        args: NumPy arrays, `Output(array)` or `Scratch(array)` for pointers, None for a null pointer; NumPy scalars of
        the parameter's type, or Python ints that fit it.
        """
        loaded = self._load(name)
        grid3, block3, cluster3 = _three(grid), _three(block), _three(cluster)
        self._check_shape(loaded, grid3, block3, cluster3, shared)
        runtime = _Runtime.get()
        with runtime.lock:
            try:
                values, placed = _pass_arguments(loaded, args, runtime.memory)
                configuration = self._configuration(loaded, grid3, block3, cluster3, shared, cooperative, order)
                fault = _Fault()
                pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(v) for v in values))
                failed = runtime.launch(
                    ctypes.byref(loaded.entry), ctypes.byref(configuration), pointers, ctypes.byref(fault)
                )
                runtime.memory.take_back(placed)
                if failed:
                    raise _describe(fault, loaded, runtime.memory, placed)
                for item in placed:
                    count, first = runtime.memory.unwritten(item) if item.is_output else (0, -1)
                    if count:
                        raise EmulatorFault(
                            "unwritten-output",
                            f"{count} elements of {item.describe()} were not written, the first at {first}",
                            name,
                        )
            finally:
                runtime.memory.clear()

    def launch_in_orders(self, name: str, *launch: Any, orders: Sequence[Order] = ORDERS, **options: Any) -> None:
        """`launch`, in each order from the same contents; all arrays but Scratch must come out the same, to the bit."""
        args = launch[2] if len(launch) > 2 else options["args"]
        arrays = [a.array if isinstance(a, (Output, Scratch)) else a for a in args]
        arrays = [a for a in arrays if isinstance(a, np.ndarray) and a.flags.writeable]
        scratch = {id(a.array) for a in args if isinstance(a, Scratch)}
        before = [a.copy() for a in arrays]

        def run(order: Order) -> list[Array]:
            for array, content in zip(arrays, before, strict=True):
                array[...] = content
            self.launch(name, *launch, order=order, **options)
            return [a.copy() for a in arrays if id(a) not in scratch]

        compare_orders(run, orders, name)

    def _check_shape(
        self, loaded: _Loaded, grid: tuple[int, ...], block: tuple[int, ...], cluster: tuple[int, ...], shared: int
    ) -> None:
        """What the driver would refuse."""
        threads = block[0] * block[1] * block[2]
        static = int(loaded.variables[:, 1].sum())
        blocks_per_cluster = cluster[0] * cluster[1] * cluster[2]
        problems = {
            f"grid {grid}": min(grid) < 1 or grid[0] > 2**31 - 1 or max(grid[1:]) > 65535,
            f"block {block}": min(block) < 1 or threads > MAX_THREADS or block[2] > 64,
            f"cluster {cluster} of grid {grid}": blocks_per_cluster > MAX_CLUSTER
            or any(g % c for g, c in zip(grid, cluster, strict=True)),
            f"{static} bytes of static shared memory": static > STATIC_SHARED_LIMIT,
            f"{static} + {shared} bytes of shared memory": shared < 0 or static + shared > SHARED_LIMIT,
        }
        wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise EmulatorFault("launch", "a GPU would refuse " + ", ".join(wrong), loaded.kernel.name)

    def _configuration(
        self,
        loaded: _Loaded,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        cluster: tuple[int, ...],
        shared: int,
        cooperative: bool,
        order: Order | None,
    ) -> _Configuration:
        order = self.order if order is None else order
        image_begin, image_end = loaded.library.image
        return _Configuration(
            grid=(ctypes.c_uint32 * 3)(*grid),
            block=(ctypes.c_uint32 * 3)(*block),
            cluster=(ctypes.c_uint32 * 3)(*cluster),
            dynamic_shared=shared,
            cooperative=cooperative,
            order={"forward": 0, "reverse": 1}[order] if isinstance(order, str) else 2,
            check_races=self.check_races,
            seed=0 if isinstance(order, str) else order,
            timeout=self.timeout,
            static_begin=loaded.static_begin,
            static_bytes=loaded.static_bytes,
            image_begin=image_begin,
            image_end=image_end,
            variables=loaded.variables.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32)),
            variable_count=len(loaded.variables),
        )


def compare_orders(
    run: Callable[[Order], Sequence[Array]], orders: Sequence[Order] = ORDERS, name: str = ""
) -> Sequence[Array]:
    """Calls run(order) for each order; what it returns must be the same each time, to the bit.

    For more than one launch: run(order) sets `emulator.order = order`, makes its arrays and launches.
    """
    first = [np.array(array) for array in run(orders[0])]
    for order in orders[1:]:
        for i, (expected, array) in enumerate(zip(first, run(order), strict=True)):
            different = _bytes(expected) != _bytes(array)
            if different.any():
                elements = np.unique(np.flatnonzero(different) // expected.itemsize)
                raise EmulatorFault(
                    "schedule-dependent",
                    f"array {i} ({expected.dtype}{list(expected.shape)}) differs between orders {orders[0]!r} and "
                    f"{order!r} in {elements.size} elements, the first at {elements[0]}",
                    name,
                )
    return first


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _three(shape: int | Sequence[int]) -> tuple[int, int, int]:
    given = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    x, y, z = (*(int(n) for n in given), 1, 1, 1)[:3]
    return x, y, z


# ---- arguments ----

_SCALARS = {b"i": "i", b"u": "u", b"f": "f"}


def _pass_arguments(loaded: _Loaded, args: Sequence[Any], memory: DeviceMemory) -> tuple[list[Any], list[Placed]]:
    """One ctypes buffer a parameter, and the arrays placed in device memory."""
    parameters = loaded.parameters
    name = loaded.kernel.name
    if len(args) != len(parameters):
        raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(args)}")
    values: list[Any] = []
    arrays: list[tuple[int, Array | Output | Scratch, bool]] = []
    for index, (argument, parameter) in enumerate(zip(args, parameters, strict=True)):
        if parameter.kind == b"p":
            if isinstance(argument, (np.ndarray, Output, Scratch)):
                array = argument if isinstance(argument, np.ndarray) else argument.array
                _check_element(name, index, array, parameter)
                arrays.append((index, argument, bool(parameter.is_const)))
            elif argument is not None:
                raise TypeError(f"{name}: argument {index} is a pointer; pass an array or None, not {argument!r}")
            values.append(ctypes.c_uint64(0))
        else:
            values.append(_scalar(name, index, argument, parameter))
    placed = memory.place(arrays)
    for item in placed:
        values[item.index].value = memory.address + item.offset
    return values, placed


def _check_element(name: str, index: int, array: Array, parameter: _Parameter) -> None:
    """A floating array must be of the pointer's type; bits in integers may pass as anything."""
    is_floating = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    expected = {b"h": "float16", b"b": "bfloat16", b"f": {4: "float32", 8: "float64"}.get(parameter.element_size)}
    if is_floating and expected.get(parameter.element, array.dtype.name) != array.dtype.name:
        wanted = expected[parameter.element]
        raise TypeError(f"{name}: argument {index} points at {wanted}, and gets an array of {array.dtype}")


def _scalar(name: str, index: int, argument: Any, parameter: _Parameter) -> Any:
    kind, size = _SCALARS.get(parameter.kind), parameter.size
    if isinstance(argument, (bool, int)) and kind in ("i", "u"):
        low, high = (-(1 << 8 * size - 1), (1 << 8 * size - 1) - 1) if kind == "i" else (0, (1 << 8 * size) - 1)
        if low <= argument <= high:
            return (ctypes.c_uint8 * size).from_buffer_copy(int(argument).to_bytes(size, "little", signed=kind == "i"))
    elif isinstance(argument, (np.generic, np.ndarray)):
        matches = argument.dtype.kind == kind or (argument.dtype.kind == "b" and size == 1) or kind is None
        if matches and argument.nbytes == size:
            return (ctypes.c_uint8 * size).from_buffer_copy(argument.tobytes())
    wanted = {"i": f"int{8 * size}", "u": f"uint{8 * size}", "f": f"float{8 * size}"}.get(kind or "", f"{size} bytes")
    raise TypeError(f"{name}: argument {index} is a {wanted}; got {argument!r} of type {type(argument).__name__}")


# ---- faults ----


def _describe(fault: _Fault, loaded: _Loaded, memory: DeviceMemory, placed: Sequence[Placed]) -> EmulatorFault:
    message = fault.message.decode()
    if fault.address and (place := memory.describe(fault.address, placed)):
        message += f": {place}"
    location = (loaded.library.source_line(fault.pc) if fault.pc else "") or fault.location.decode()
    block, thread = (tuple(fault.block), tuple(fault.thread)) if fault.has_thread else (None, None)
    return EmulatorFault(fault.kind.decode(), message, loaded.kernel.name, block, thread, location)


class _Runtime:
    """The one runtime of this process."""

    _instance: _Runtime | None = None

    def __init__(self) -> None:
        library = ctypes.CDLL(str(build_runtime()), mode=ctypes.RTLD_GLOBAL)
        library.emu_arena.restype = ctypes.c_void_p
        library.emu_shadow.restype = ctypes.c_void_p
        library.emu_global_bytes.restype = ctypes.c_uint64
        self.launch = library.emu_launch
        self.memory = DeviceMemory(library.emu_arena(), library.emu_shadow(), library.emu_global_bytes())
        self.lock = threading.Lock()

    @classmethod
    def get(cls) -> _Runtime:
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance
