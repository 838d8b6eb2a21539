"""From a specialisation to a callable on the current device. Every launch of this package passes through here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..runtime import require_cupy
from .launch import Launcher, Shape
from .nvrtc import cubin_file
from .spec import KernelSpec

_UNASKED_SHARED = 48 * 1024  # more shared memory than this, static and dynamic, a kernel has to be allowed explicitly


@dataclass(frozen=True)
class KernelInfo:
    """What the driver says about a loaded kernel. Bytes and counts are per thread or block as named."""

    name: str
    file: str
    registers: int
    static_shared_bytes: int
    local_bytes: int
    max_threads_per_block: int
    arch: int


class Kernel:
    """A loaded specialisation. Calling it enqueues one launch on CuPy's current stream."""

    def __init__(self, spec: KernelSpec, cp: Any):
        device = cp.cuda.Device()
        arch = int(device.compute_capability)
        self.spec, self._cp = spec, cp
        self._raw = cp.RawModule(path=str(cubin_file(spec, arch))).get_function(spec.name)
        self._attributes = self._raw.attributes  # CuPy loads lazily: now, not at a first launch inside a capture
        self._get_stream = cp.cuda.get_current_stream
        self._launcher = Launcher(self._raw.kernel.ptr, spec.parameters, may_overlap=arch >= 90 and spec.waits)
        self._shared_limit = _UNASKED_SHARED - self._attributes["shared_size_bytes"]

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """args: CuPy arrays or None for pointers, numbers of Python or NumPy else. cluster: blocks of one, along x."""
        if shared_bytes > self._shared_limit:
            self._raw.max_dynamic_shared_size_bytes = shared_bytes
            self._shared_limit = shared_bytes
        self._launcher(self._get_stream().ptr, (grid, block, shared_bytes), args, cluster)
        if _counters:
            for counter in _counters:
                counter.by_name[self.spec.name] += 1

    @property
    def launch_shapes(self) -> Counter[Shape]:
        """(grid, block, dynamic shared memory in bytes) -> launches since they were last forgotten."""
        return Counter(self._launcher.launches)

    def forget_launches(self) -> None:
        """Start `launch_shapes` anew."""
        self._launcher.launches = {}

    @property
    def info(self) -> KernelInfo:
        a = self._attributes
        return KernelInfo(
            name=self.spec.name,
            file=self.spec.file,
            registers=a["num_regs"],
            static_shared_bytes=a["shared_size_bytes"],
            local_bytes=a["local_size_bytes"],
            max_threads_per_block=a["max_threads_per_block"],
            arch=a["binary_version"],
        )

    def occupancy(self, threads: int, shared_bytes: int = 0) -> float:
        """Theoretical occupancy, 0 to 1: resident threads a multiprocessor by the driver's calculator."""
        cp = self._cp
        blocks = cp.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(self._raw.kernel.ptr, threads, shared_bytes)
        properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.runtime.getDevice())
        limit = properties["maxThreadsPerMultiProcessor"]
        return float(blocks * threads / limit)


_loaded: dict[tuple[int, KernelSpec], Kernel] = {}


def load(spec: KernelSpec) -> Kernel:
    """The kernel on the current device: compiled at most once a machine, loaded at most once a process.

    Raises:
        GpuUnavailableError: no usable GPU, or no NVRTC.
        KernelCompileError: NVRTC refused it.
    """
    cp = require_cupy() if not _loaded else _cupy()
    key = (cp.cuda.runtime.getDevice(), spec)
    kernel = _loaded.get(key)
    if kernel is None:
        kernel = _loaded[key] = Kernel(spec, cp)
    return kernel


def _cupy() -> Any:
    import cupy

    return cupy


def loaded() -> tuple[Kernel, ...]:
    """Every kernel that this process has loaded on the current device."""
    device = _cupy().cuda.runtime.getDevice() if _loaded else None
    return tuple(kernel for (d, _), kernel in _loaded.items() if d == device)


# ---- counting -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)  # open counters are told apart by identity
class LaunchCounter:
    """Launches made by this package while the counter was open.

    Attributes:
        by_name: kernel name -> launches enqueued one by one. Inside a graph capture: recorded nodes.
        graph_launches: launches of whole graphs, each of which runs `graph_kernels / graph_launches` kernels.
        graph_kernels: kernels that ran as nodes of those graphs.
    """

    by_name: Counter[str] = field(default_factory=Counter)
    graph_launches: int = 0
    graph_kernels: int = 0

    @property
    def kernels(self) -> int:
        """Kernels enqueued, one by one or as nodes of a graph."""
        return sum(self.by_name.values()) + self.graph_kernels


_counters: list[LaunchCounter] = []


@contextmanager
def count_launches() -> Iterator[LaunchCounter]:
    """Count the launches that this package makes inside the block, at the one place that launches."""
    counter = LaunchCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


class Graph:
    """A captured CUDA graph that knows its kernels, and keeps the workspaces that they use.

    Attributes:
        by_name: kernel name -> nodes of it.
    """

    def __init__(self, graph: Any, by_name: Counter[str], workspaces: list[Any]):
        self._graph, self.by_name, self._workspaces = graph, by_name, workspaces

    @property
    def kernels(self) -> int:
        return sum(self.by_name.values())

    def launch(self) -> None:
        """Enqueue the graph on CuPy's current stream."""
        self._graph.launch()
        for counter in _counters:
            counter.graph_launches += 1
            counter.graph_kernels += self.kernels


def capture(record: Callable[[], None]) -> Graph:
    """Run `record()`, which enqueues work on CuPy's current stream, into a graph instead of onto the device."""
    cp = require_cupy()
    stream = cp.cuda.Stream(non_blocking=True)
    workspaces: list[Any] = []
    _workspaces_of_captures.append(workspaces)
    try:
        with count_launches() as counter, stream:
            stream.begin_capture()
            try:
                record()
            finally:
                graph = stream.end_capture()
    finally:
        _workspaces_of_captures.pop()
    return Graph(graph, counter.by_name, workspaces)


# The innermost capture of ours that is open, last; at the bottom what captures by somebody else use, whose graphs we
# never see: that is kept for the life of the process.
_workspaces_of_captures: list[list[Any]] = [[]]


def keep_while_captured(workspace: Any) -> None:
    """Keep memory that a launch under capture uses, because replays of the graph will use it again."""
    _workspaces_of_captures[-1].append(workspace)
