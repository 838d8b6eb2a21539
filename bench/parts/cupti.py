"""What really runs while tokens are decoded: every launch, every synchronisation and every kernel, traced by CUPTI.

CUPTI is NVIDIA's profiling interface, a library of the toolkit and of the wheel `nvidia-cuda-cupti`. It is called
through ctypes, so nothing has to be compiled. Three kinds of its activity records are collected: the calls of CUDA's
runtime, those of the driver, and the kernels, which stay concurrent and are seen inside CUDA graphs too. Unlike the
counters of :mod:`edgellm_cupy.kernels`, CUPTI also sees what somebody else enqueues.

:class:`Session` collects a :class:`Trace`, and :func:`figures` makes of it what reports show. :func:`decode_trace` has
both done in a process of its own, which is this module as a program,

    python -m edgellm_cupy.bench.parts.cupti CONFIG OPTIONS TOKENS

with the arguments of :mod:`.one_token`: it prints the figures as JSON. CUPTI calls Python back from its own threads
while it holds its lock, so that a CUDA call that keeps Python's lock meanwhile waits for ever
(https://github.com/pytorch/pytorch/pull/186295). There it costs one attempt, and no later timing is disturbed.
"""

from __future__ import annotations

import ctypes
import glob
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import edgellm_cupy as ec

from ..context import Context
from ..metrics import measured, missing
from . import child
from .one_token import described, lookalike, warm_steps
from .utilisation import CONTEXT


class CuptiUnavailableError(ec.EdgeLLMError):
    """Nothing can be traced here; the message is the reason that the report shows."""


# ---- records --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KernelRun:
    """One kernel on the device.

    Attributes:
        name: as the kernel is called in its module.
        start, end: nanoseconds of CUPTI's clock.
        grid, block: blocks and threads along x, y and z.
        stream: CUPTI's number of the stream.
    """

    name: str
    start: int
    end: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int


@dataclass(frozen=True)
class Call:
    """One call of the CUDA runtime or of the driver on the host.

    Attributes:
        name: of the function, without its version.
        start, end: nanoseconds of CUPTI's clock.
        thread: CUPTI's number of the host thread.
    """

    name: str
    start: int
    end: int
    thread: int


@dataclass(frozen=True)
class Trace:
    """What was recorded, each list in the order of its starts.

    Attributes:
        kernels: every kernel.
        calls: the calls that the program made; what the runtime itself calls in the driver for one of them is left out.
        lost: records that CUPTI dropped, and kernels without a time.
        library: the CUPTI library that was used, and its version.
    """

    kernels: tuple[KernelRun, ...]
    calls: tuple[Call, ...]
    lost: int
    library: str

    @property
    def launches(self) -> list[Call]:
        """Calls that enqueue a kernel or a graph."""
        return [call for call in self.calls if _LAUNCH.fullmatch(call.name)]

    @property
    def synchronisations(self) -> list[Call]:
        """Calls that wait for the device: for a stream, an event or all, and copies from or to the host that block."""
        return [call for call in self.calls if _WAIT.fullmatch(call.name)]


_VERSION = re.compile(r"(_v\d+|_ptds|_ptsz)+$")  # cudaGraphLaunch_ptsz_v10000, cuMemcpyHtoD_v2_ptds
_LAUNCH = re.compile(r"(__)?cu(da)?(GraphLaunch|Launch(?!HostFunc)\w*)")
_WAIT = re.compile(
    r"cu(da)?((Stream|Event|Ctx|Device|Thread)Synchronize|Memcpy(?!\w*(Async|Peer|DtoD|DtoA|AtoD|AtoA|ArrayToArray))\w*)"
)


class _KernelRecord(ctypes.Structure):
    """What CUpti_ActivityKernel5 (CUDA 11) to CUpti_ActivityKernel13 (CUDA 13.5) begin with; tests compare headers."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("cacheConfig", ctypes.c_uint8),
        ("sharedMemoryConfig", ctypes.c_uint8),
        ("registersPerThread", ctypes.c_uint16),
        ("partitionedGlobalCacheRequested", ctypes.c_uint32),
        ("partitionedGlobalCacheExecuted", ctypes.c_uint32),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("completed", ctypes.c_uint64),
        ("deviceId", ctypes.c_uint32),
        ("contextId", ctypes.c_uint32),
        ("streamId", ctypes.c_uint32),
        ("gridX", ctypes.c_int32),
        ("gridY", ctypes.c_int32),
        ("gridZ", ctypes.c_int32),
        ("blockX", ctypes.c_int32),
        ("blockY", ctypes.c_int32),
        ("blockZ", ctypes.c_int32),
        ("staticSharedMemory", ctypes.c_int32),
        ("dynamicSharedMemory", ctypes.c_int32),
        ("localMemoryPerThread", ctypes.c_uint32),
        ("localMemoryTotal", ctypes.c_uint32),
        ("correlationId", ctypes.c_uint32),
        ("gridId", ctypes.c_int64),
        ("name", ctypes.c_char_p),
    ]


class _ApiRecord(ctypes.Structure):
    """CUpti_ActivityAPI."""

    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("cbid", ctypes.c_uint32),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("processId", ctypes.c_uint32),
        ("threadId", ctypes.c_uint32),
        ("correlationId", ctypes.c_uint32),
        ("returnValue", ctypes.c_uint32),
    ]


def _outermost(calls: Iterable[Call]) -> list[Call]:
    """Those that no other call of the same thread encloses."""
    kept: list[Call] = []
    last: dict[int, Call] = {}
    for call in sorted(calls, key=lambda c: (c.start, -c.end)):
        outer = last.get(call.thread)
        if outer is None or call.end > outer.end:
            last[call.thread] = call
            kept.append(call)
    return kept


# ---- the library ----------------------------------------------------------------------------------------------------

_ACTIVITY_DRIVER, _ACTIVITY_RUNTIME, _ACTIVITY_CONCURRENT_KERNEL = 4, 5, 10  # CUPTI_ACTIVITY_KIND_*
_CALLBACK_DOMAIN = {_ACTIVITY_DRIVER: 1, _ACTIVITY_RUNTIME: 2}  # CUPTI_CB_DOMAIN_*, for the names of functions
_ENABLE_CALL = {_ACTIVITY_DRIVER: "cuptiActivityEnableDriverApi", _ACTIVITY_RUNTIME: "cuptiActivityEnableRuntimeApi"}
_MOST_FUNCTIONS = 2000  # of a domain; CUDA 13.5 has 840
_FLUSH_COMPLETE, _FLUSH_FORCED = 0, 1
_NO_MORE_RECORDS, _INVALID_RECORD = 12, 21  # CUPTI_ERROR_MAX_LIMIT_REACHED, CUPTI_ERROR_INVALID_KIND
# API version of CUDA 12.6; older ones crash where a graph was traced: https://github.com/pytorch/pytorch/pull/146604
_DETACH_SINCE = 24

_HINTS = {
    "CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED": "another profiler or debugger is attached to this process",
    "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES": (
        "only root may trace here: run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
    ),
    "CUPTI_ERROR_NOT_INITIALIZED": "there is no driver, or none that serves this CUPTI",
    "CUPTI_ERROR_NOT_COMPATIBLE": "the driver does not serve this CUPTI",
}

_GUARD_S, _SETTLE_S = 0.002, 0.2
_BUFFER_BYTES = 8 << 20  # some 30,000 kernels or 200,000 calls: none is full before it is asked for

_Request = ctypes.CFUNCTYPE(
    None, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)
)
_Complete = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_Subscriber = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)

# CUPTI's own threads may call these after a session: they must stay for the life of the process.
_callbacks: list[Any] = []


def load_cupti() -> tuple[Any, str]:
    """The CUPTI library for CuPy's CUDA version, or else for the driver's, and where it came from.

    Raises:
        CuptiUnavailableError: there is none.
    """
    import cupy

    runtime = cupy.cuda.runtime
    majors = dict.fromkeys((runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000))
    refused: list[str] = []
    for path in (path for major in majors for path in _candidates(major)):
        library = _open(path)
        if isinstance(library, ctypes.CDLL):
            return library, str(path)
        refused.append(library)
    raise CuptiUnavailableError(f"no CUPTI: pip install nvidia-cuda-cupti; {'; '.join(refused)}")


def _open(path: Path) -> ctypes.CDLL | str:
    """The library, or the loader's complaint."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        return str(e)


def _candidates(major: int) -> list[Path]:
    """Files that exist in wheels and toolkits, then the bare name for the loader's own search."""
    name = f"libcupti.so.{major}"
    spec = find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    folders = [root / wheel / "lib" for root in roots for wheel in (f"cu{major}", "cuda_cupti")]
    toolkits = [os.environ.get("CUDA_PATH"), os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    toolkits += sorted(glob.glob(f"/usr/local/cuda-{major}*"), reverse=True)
    folders += [Path(toolkit) / sub for toolkit in toolkits if toolkit for sub in ("lib64", "extras/CUPTI/lib64")]
    return [*dict.fromkeys(folder / name for folder in folders if (folder / name).is_file()), Path(name)]


def _synchronise() -> None:
    import cupy

    cupy.cuda.Device().synchronize()


class Session:
    """CUPTI attached to this process while the ``with`` block runs; one at a time.

    A graph that is launched in :meth:`trace` should be captured inside the block, and be gone before it ends.

    Args:
        library: with CUPTI's functions, and its name; found by :func:`load_cupti` when missing.
        synchronise: waits for the device; CuPy's when missing.

    Raises:
        CuptiUnavailableError: on entering: there is no CUPTI, or it refuses.
    """

    def __init__(self, library: tuple[Any, str] | None = None, synchronise: Callable[[], None] = _synchronise):
        self._given, self._synchronise = library, synchronise
        self._subscriber = ctypes.c_void_p()
        self._enabled: list[int] = []
        self._buffers: dict[int, Any] = {}
        self._completed: list[tuple[int, int]] = []  # address, bytes that hold records
        self._names: dict[tuple[int, int], str] = {}

    def __enter__(self) -> Session:
        self._cupti, path = self._given or load_cupti()
        version = ctypes.c_uint32()
        self._check("cuptiGetVersion", ctypes.byref(version))
        self._version = version.value
        self.library = f"{path}, API version {version.value}"
        request, complete = _Request(self._request), _Complete(self._complete)
        nothing = _Subscriber(lambda *_: None)  # no callback is enabled: who subscribes is alone
        _callbacks.extend((request, complete, nothing))
        self._check("cuptiSubscribe", ctypes.byref(self._subscriber), nothing, None)
        try:
            self._check("cuptiActivityRegisterCallbacks", request, complete)
            for kind in _CALLBACK_DOMAIN:
                self._enable_calls(kind)
            self._check("cuptiActivityEnable", _ACTIVITY_CONCURRENT_KERNEL)
            self._enabled.append(_ACTIVITY_CONCURRENT_KERNEL)
        except CuptiUnavailableError:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def settle(self) -> None:
        """Behind the first kernel: CUPTI's threads ask for buffers now, while this one does not hold Python's lock."""
        self._synchronise()
        time.sleep(_SETTLE_S)

    def trace(self, work: Callable[[], None]) -> Trace:
        """Run `work`, wait for the device, and return what happened meanwhile; that last wait is part of it.

        Raises:
            CuptiUnavailableError: CUPTI failed.
        """
        self._synchronise()
        # By time, not by a flush: CUPTI's threads keep the buffers that they have, and need no others meanwhile. The
        # device's clock is only converted to the host's, so that the two are some microseconds apart.
        begin = ctypes.c_uint64()
        time.sleep(_GUARD_S)
        self._check("cuptiGetTimestamp", ctypes.byref(begin))
        time.sleep(_GUARD_S)
        work()
        self._synchronise()
        self._flush()
        kernels, calls, lost = self._take(begin.value)
        return Trace(
            tuple(sorted(kernels, key=lambda k: k.start)),
            tuple(_outermost(calls)),
            lost + self._dropped(),
            self.library,
        )

    # ---- CUPTI asks for buffers and gives them back, on any thread ----

    def _request(self, buffer: Any, size: Any, most: Any) -> None:
        buffer[0], size[0], most[0] = None, 0, 0
        memory = ctypes.create_string_buffer(_BUFFER_BYTES)
        address = ctypes.addressof(memory)
        self._buffers[address] = memory
        buffer[0], size[0] = address, _BUFFER_BYTES

    def _complete(self, context: Any, stream: int, buffer: int, size: int, valid: int) -> None:
        self._completed.append((buffer, valid))

    # ---- our thread ----

    def _enable_calls(self, kind: int) -> None:
        """Record the functions that count, or all, where CUPTI cannot tell them apart.

        Those that count let go of Python's lock while they run (CuPy's binding, ctypes). Others do not. All are turned
        on and the others off again: on an H200 with CUDA 13.0, functions turned on one by one left no record.
        """
        domain, set_call = _CALLBACK_DOMAIN[kind], getattr(self._cupti, _ENABLE_CALL[kind], None)
        self._check("cuptiActivityEnable", kind)
        self._enabled.append(kind)
        names = {cbid: self._name(domain, cbid) for cbid in range(1, _MOST_FUNCTIONS)}
        others = [cbid for cbid, name in names.items() if not (_LAUNCH.fullmatch(name) or _WAIT.fullmatch(name))]
        if set_call is None or len(others) == len(names):
            return
        for cbid in others:
            set_call(ctypes.c_uint32(cbid), ctypes.c_uint8(0))  # refused for numbers that are no function

    def _name(self, domain: int, cbid: int) -> str:
        if (domain, cbid) not in self._names:
            name = ctypes.c_char_p()
            failed = self._cupti.cuptiGetCallbackName(domain, ctypes.c_uint32(cbid), ctypes.byref(name))
            known = "" if failed else (name.value or b"").decode()
            self._names[domain, cbid] = _VERSION.sub("", known) or f"domain {domain}, function {cbid}"
        return self._names[domain, cbid]

    def _check(self, function: str, *arguments: Any) -> None:
        status = getattr(self._cupti, function)(*arguments)
        if status:
            raise CuptiUnavailableError(f"{function}: {self._text(status)}")

    def _text(self, status: int) -> str:
        name = ctypes.c_char_p()
        unknown = self._cupti.cuptiGetResultString(status, ctypes.byref(name)) or not name.value
        text = f"status {status}" if unknown else (name.value or b"").decode()
        return f"{text}: {_HINTS[text]}" if text in _HINTS else text

    def _flush(self) -> None:
        """Until every record is delivered; the device is idle, so that all are complete."""
        for flag in (_FLUSH_COMPLETE, _FLUSH_FORCED):
            self._check("cuptiActivityFlushAll", ctypes.c_uint32(flag))

    def _dropped(self) -> int:
        """Records that CUPTI dropped since the last call."""
        dropped = ctypes.c_size_t()
        self._check("cuptiActivityGetNumDroppedRecords", None, ctypes.c_uint32(0), ctypes.byref(dropped))
        return dropped.value

    def _take(self, begin: int) -> tuple[list[KernelRun], list[Call], int]:
        """What began at `begin` or later, of all buffers that were given back, and how many kernels have no time."""
        kernels: list[KernelRun] = []
        calls: list[Call] = []
        untimed = 0
        completed, self._completed = self._completed, []
        for buffer, valid in completed:
            record = ctypes.c_void_p()
            while valid and self._next(buffer, valid, record):
                kind = ctypes.c_uint32.from_address(record.value or 0).value
                if kind in _CALLBACK_DOMAIN:
                    call = _ApiRecord.from_address(record.value or 0)
                    if call.start >= begin:
                        calls.append(self._call(call))
                elif kind == _ACTIVITY_CONCURRENT_KERNEL:
                    kernel = _KernelRecord.from_address(record.value or 0)
                    if not (kernel.start and kernel.end):
                        untimed += 1
                    elif kernel.start >= begin:
                        kernels.append(_kernel_run(kernel))
            self._buffers.pop(buffer, None)
        return kernels, calls, untimed

    def _next(self, buffer: int, valid: int, record: ctypes.c_void_p) -> bool:
        """Move `record` to the next one; False behind the last."""
        status = self._cupti.cuptiActivityGetNextRecord(
            ctypes.c_void_p(buffer), ctypes.c_size_t(valid), ctypes.byref(record)
        )
        if status in (_NO_MORE_RECORDS, _INVALID_RECORD):
            return False
        if status:
            raise CuptiUnavailableError(f"cuptiActivityGetNextRecord: {self._text(status)}")
        return True

    def _call(self, record: _ApiRecord) -> Call:
        name = self._name(_CALLBACK_DOMAIN[record.kind], record.cbid)
        return Call(name, record.start, record.end, record.threadId)

    def _close(self) -> None:
        """Let go of CUPTI. What it says is ignored: what was traced is worth more than what fails here."""
        cupti = self._cupti
        self._synchronise()
        for kind in self._enabled:
            cupti.cuptiActivityDisable(kind)
        if self._enabled:
            cupti.cuptiActivityFlushAll(ctypes.c_uint32(_FLUSH_FORCED))
        cupti.cuptiUnsubscribe(self._subscriber)
        if self._enabled and self._version >= _DETACH_SINCE:
            cupti.cuptiFinalize()
        self._enabled, self._completed = [], []


def _kernel_run(record: _KernelRecord) -> KernelRun:
    return KernelRun(
        (record.name or b"?").decode(errors="replace"),
        record.start,
        record.end,
        (record.gridX, record.gridY, record.gridZ),
        (record.blockX, record.blockY, record.blockZ),
        record.streamId,
    )


# ---- figures --------------------------------------------------------------------------------------------------------

_HOW = (
    "CUPTI activity records. Launches and synchronisations are calls of the host to the CUDA runtime or driver; a copy "
    "from pageable memory that waits although it is called asynchronous is not counted. Busy: the union of the "
    "kernels' times; idle: the rest from the first kernel's start to the last one's end, with what tracing costs. "
    "Kernels overlap where one starts before its predecessor has ended, so that their times add up to more"
)


def figures(trace: Trace, tokens: int) -> dict[str, Any]:
    """What `trace` says about each of `tokens` decoded tokens.

    Returns:
        tokens, launches_per_token, kernels_per_token, synchronisations_per_token; `final_synchronisations`, which came
        behind the last launch and are not in the former; `calls`, name -> how many launches and synchronisations;
        `kernels`, one row a kernel file of ours or foreign kernel, longest first: {name, names, launches, us,
        share_pct}, launches and microseconds of a token; gpu_busy_us and token_us of a token, gpu_idle_share_pct; how.
        One null figure with the reason instead when records were lost or no kernel ran.
    """
    if trace.lost:
        return missing(f"CUPTI lost {trace.lost} records")
    if not trace.kernels:
        return missing("CUPTI saw no kernel")
    launches, waits = trace.launches, trace.synchronisations
    last_launch = max((call.end for call in launches), default=0)
    final = [call for call in waits if call.start >= last_launch]
    rows, how = _kernel_rows(trace.kernels, tokens)
    busy = _union(trace.kernels)
    span = max(kernel.end for kernel in trace.kernels) - trace.kernels[0].start
    return {
        "tokens": tokens,
        "launches_per_token": measured(len(launches) / tokens, "launches", n=len(launches)),
        "kernels_per_token": measured(len(trace.kernels) / tokens, "kernels", n=len(trace.kernels)),
        "synchronisations_per_token": measured(
            (len(waits) - len(final)) / tokens, "calls", n=len(waits) - len(final), final_synchronisations=len(final)
        ),
        "calls": dict(Counter(call.name for call in (*launches, *waits)).most_common()),
        "kernels": rows,
        "gpu_busy_us": measured(busy / tokens / 1e3, "us", of="a token, mean"),
        "token_us": measured(span / tokens / 1e3, "us", of="a token, mean, while it is traced"),
        "gpu_idle_share_pct": measured(100 * (1 - busy / span), "%"),
        "how": f"{_HOW}. {how}. {trace.library}",
    }


def _kernel_rows(kernels: Sequence[KernelRun], tokens: int) -> tuple[list[dict[str, Any]], str]:
    """The rows, and how their times came about."""
    each, rest = divmod(len(kernels), tokens)
    split = [kernels[i : i + each] for i in range(0, len(kernels) - rest, each)] if each else []
    alike = not rest and len({frozenset(Counter(k.name for k in part).items()) for part in split}) == 1
    times: dict[str, list[int]] = {}  # name -> nanoseconds of each token, or of all together
    for i, part in enumerate(split if alike else [kernels]):
        for kernel in part:
            of_name = times.setdefault(base_name(kernel.name), [])
            of_name.extend([0] * (i + 1 - len(of_name)))
            of_name[i] += kernel.end - kernel.start
    us = {name: (median(ns) if alike else sum(ns) / tokens) / 1e3 for name, ns in times.items()}
    count = Counter(base_name(kernel.name) for kernel in kernels)
    rows = [
        {
            "name": name,
            "names": sorted({kernel.name for kernel in kernels if base_name(kernel.name) == name}),
            "launches": count[name] / tokens,
            "us": us[name],
            "share_pct": 100 * us[name] / sum(us.values()),
        }
        for name in sorted(us, key=lambda name: -us[name])
    ]
    return rows, "Kernel times: " + ("medians over the tokens" if alike else "means, because the tokens differ")


def base_name(kernel: str) -> str:
    """The kernel file that one of our kernels was compiled from, without ``.cu``; other names as they are."""
    of_ours = [source for source in _sources() if f"{kernel}_".startswith(f"edgellm_{source}_")]
    return max(of_ours, key=len, default=kernel)


def _sources() -> list[str]:
    return [f.name.removesuffix(".cu") for f in files("edgellm_cupy.kernels_cu").iterdir() if f.name.endswith(".cu")]


def _union(kernels: Iterable[KernelRun]) -> int:
    """Nanoseconds in which at least one of the kernels ran."""
    busy, end = 0, 0
    for kernel in sorted(kernels, key=lambda k: k.start):
        busy += max(0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return busy


# ---- decoding -------------------------------------------------------------------------------------------------------

TIME_LIMIT_S = 60.0
_ATTEMPTS = 2


def decode_trace(ctx: Context, tokens: int = 32, time_limit_s: float = TIME_LIMIT_S) -> dict[str, Any]:
    """:func:`figures` of `tokens` tokens decoded around a context of :data:`.utilisation.CONTEXT`, and `context`.

    A second process decodes them, with random weights of the same shapes. The host waits once, at the end. One null
    figure with the reason where there is no GPU or no CUPTI, or where two attempts of `time_limit_s` seconds fail.
    """
    if ctx.no_gpu:
        return missing(ctx.no_gpu)
    ctx.progress(f"trace of {tokens} tokens")
    for _ in range(_ATTEMPTS):
        code, output = child.run("cupti", (*described(ctx), str(tokens)), time_limit_s)
        # Said is said, whatever happened when CUPTI was let go.
        if found := [line for line in output.splitlines() if line.startswith("{")]:
            result: dict[str, Any] = json.loads(found[-1])
            return result
        if code is not None:
            return missing(f"the process that traces ended with {code}: {child.last_words(output)}")
    return missing(f"the process that traces was not done after {time_limit_s:g} s, {_ATTEMPTS} times")


def main(arguments: Sequence[str]) -> None:
    """Run the program with its three arguments. What :func:`.one_token.lookalike` raises, it raises."""
    config_text, options_text, tokens = arguments
    ctx = lookalike(config_text, options_text)
    warm_steps(ctx, int(tokens))()  # weights are uploaded and kernels are loaded before CUPTI watches

    import cupy

    array = cupy.arange(1)
    array += 1
    try:
        with Session() as session:
            array += 1
            session.settle()
            found = figures(session.trace(warm_steps(ctx, int(tokens))), int(tokens))
            print(json.dumps(found | ({"context": CONTEXT} if "tokens" in found else {})), flush=True)
    except CuptiUnavailableError as e:
        print(json.dumps(missing(str(e))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
