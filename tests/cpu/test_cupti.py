"""Tracing by CUPTI: records are read as NVIDIA's headers lay them out, and figures follow from records."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.metrics import missing
from edgellm_cupy.bench.parts import cupti, one_token
from edgellm_cupy.bench.parts.cupti import Call, CuptiUnavailableError, KernelRun, Session, Trace
from edgellm_cupy.bench.parts.utilisation import CONTEXT
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.runtime import cuda_available

API_BYTES, KERNEL_BYTES = 40, 216  # of the records of CUDA 13.0; the size of another version makes no difference
PRODUCT = "edgellm_rmsnorm_ternary_matmul___half_0_1_1_1_2_2_1_128_2_4"
OTHER_PRODUCT = "edgellm_rmsnorm_ternary_matmul___half_0_1_1_1_2_3_1_192_2_2"


# ---- a stand-in for the library -------------------------------------------------------------------------------------

FUNCTIONS = {
    (1, 278): "cuMemcpyDtoH_v2",
    (1, 295): "cuStreamWaitEvent",
    (1, 514): "cuGraphLaunch",
    (1, 652): "cuLaunchKernelEx",
    (2, 131): "cudaStreamSynchronize_v3020",
    (2, 165): "cudaDeviceSynchronize_v3020",
    (2, 311): "cudaGraphLaunch_v10000",
}
RESULTS = {
    12: "CUPTI_ERROR_MAX_LIMIT_REACHED",
    15: "CUPTI_ERROR_NOT_INITIALIZED",
    35: "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES",
    39: "CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED",
}


class FakeCupti:
    """CUPTI's functions, which hand out what :meth:`emit` packed, from a thread of their own.

    Attributes:
        refuse: function -> status that it returns instead of doing anything.
        used: the functions that were called, in order.
    """

    def __init__(self, version: int = 130001, record_bytes: int = KERNEL_BYTES, **refuse: int):
        self.version, self.kernel_bytes, self.refuse = version, record_bytes, refuse
        self.used: list[tuple[str, tuple]] = []
        self.pending: list[bytes] = []
        self.enabled: set[int] = set()  # kinds
        self.muted: set[tuple[int, int]] = set()  # (kind, function)
        self.dropped = 0
        self.now = 0
        self._kept: list[object] = []
        self._sizes: dict[int, int] = {}

    def __getattr__(self, name):
        if not name.startswith("cupti"):
            raise AttributeError(name)

        def function(*arguments):
            self.used.append((name, arguments))
            return self.refuse[name] if name in self.refuse else getattr(self, "_" + name, lambda *_: 0)(*arguments)

        return function

    def names(self) -> list[str]:
        return [name for name, _ in self.used]

    # records

    def api(self, cbid, start, end, domain=2, thread=7):
        self._add(
            cupti._ApiRecord(kind={1: 4, 2: 5}[domain], cbid=cbid, start=start, end=end, threadId=thread), API_BYTES
        )

    def kernel(self, name, start, end, grid=(60, 1, 1), block=(128, 1, 1), stream=13):
        text = ctypes.create_string_buffer(name.encode())
        self._kept.append(text)
        record = cupti._KernelRecord(
            kind=10, start=start, end=end, streamId=stream, gridX=grid[0], gridY=grid[1], gridZ=grid[2],
            blockX=block[0], blockY=block[1], blockZ=block[2],
            name=ctypes.cast(text, ctypes.c_char_p),
        )  # fmt: skip
        self._add(record, self.kernel_bytes)

    def other(self):
        self._add(cupti._ApiRecord(kind=38, start=1, end=2), API_BYTES)

    def _add(self, record, size):
        content = ctypes.string_at(ctypes.addressof(record), ctypes.sizeof(record))
        kind, function = struct.unpack_from("II", content)
        if (kind in self.enabled and (kind, function) not in self.muted) or kind == 38:
            self.pending.append(content.ljust(size, b"\0"))

    # functions

    def _cuptiGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def _cuptiSubscribe(self, subscriber, callback, user):
        subscriber._obj.value = 0x1234
        return 0

    def _cuptiActivityRegisterCallbacks(self, request, complete):
        self._request, self._complete = request, complete
        return 0

    def _cuptiActivityEnable(self, kind):
        self.enabled.add(kind)
        return 0

    def _cuptiActivityEnableDriverApi(self, cbid, enable):
        return self._mute(4, cbid, enable)

    def _cuptiActivityEnableRuntimeApi(self, cbid, enable):
        return self._mute(5, cbid, enable)

    def _mute(self, kind, cbid, enable):
        assert kind in self.enabled  # on a real GPU, what is turned on one by one leaves no record
        assert enable.value == 0
        self.muted.add((kind, cbid.value))
        return 0

    def recorded(self, kind):
        """The functions of `kind` that have names and are recorded."""
        known = {cbid for (domain, cbid) in FUNCTIONS if {1: 4, 2: 5}[domain] == kind}
        return {cbid for cbid in known if kind in self.enabled and (kind, cbid) not in self.muted}

    def _cuptiActivityDisable(self, kind):
        self.enabled.discard(kind)
        return 0

    def _cuptiGetTimestamp(self, now):
        now._obj.value = self.now
        return 0

    def _cuptiActivityFlushAll(self, flag):
        thread = threading.Thread(target=self._deliver)
        thread.start()
        thread.join()
        return 0

    def _deliver(self):
        """Two buffers, as if one had been full; and one that stayed empty."""
        half = len(self.pending) // 2
        for records in (self.pending[:half], self.pending[half:], []):
            buffer, size, most = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t(99)
            self._request(ctypes.pointer(buffer), ctypes.pointer(size), ctypes.pointer(most))
            assert buffer.value
            assert buffer.value % 8 == 0
            assert most.value == 0
            content = b"".join(records)
            assert len(content) <= size.value
            ctypes.memmove(buffer.value, content, len(content))
            at = buffer.value
            for record in records:
                self._sizes[at] = len(record)
                at += len(record)
            self._complete(None, 0, buffer.value, size.value, len(content))
        self.pending = []

    def _cuptiActivityGetNextRecord(self, buffer, valid, record):
        at = record._obj.value
        following = buffer.value if at is None else at + self._sizes[at]
        if following >= buffer.value + valid.value:
            return 12
        record._obj.value = following
        return 0

    def _cuptiActivityGetNumDroppedRecords(self, context, stream, dropped):
        dropped._obj.value, self.dropped = self.dropped, 0
        return 0

    def _cuptiGetCallbackName(self, domain, cbid, name):
        name._obj.value = FUNCTIONS.get((domain, cbid.value), "").encode() or None
        return 0 if name._obj.value else 1

    def _cuptiGetResultString(self, status, name):
        name._obj.value = RESULTS.get(status, "").encode() or None
        return 0 if name._obj.value else 1


def nothing():
    """The device is idle already."""


def traced(work, fake) -> Trace:
    with Session((fake, "libcupti.so.13"), nothing) as session:
        return session.trace(lambda: work(fake))


# ---- a session ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_bytes", [160, 208, 216, 248])
def test_records_of_any_size_are_read_in_the_order_of_their_starts(kernel_bytes):
    def work(fake):
        fake.kernel("second", 300, 400, (3, 2, 1), (64, 2, 1), stream=9)
        fake.kernel("first", 100, 250)
        fake.other()
        fake.api(311, 10, 20)
        fake.api(131, 30, 500)

    trace = traced(work, FakeCupti(record_bytes=kernel_bytes))
    assert trace.kernels == (
        KernelRun("first", 100, 250, (60, 1, 1), (128, 1, 1), 13),
        KernelRun("second", 300, 400, (3, 2, 1), (64, 2, 1), 9),
    )
    assert trace.calls == (Call("cudaGraphLaunch", 10, 20, 7), Call("cudaStreamSynchronize", 30, 500, 7))
    assert trace.lost == 0
    assert trace.library == "libcupti.so.13, API version 130001"


def test_what_came_before_the_work_is_not_in_the_trace():
    fake = FakeCupti()
    with Session((fake, "x"), nothing) as session:
        fake.kernel("warm-up", 8, 11)
        fake.api(311, 7, 12)
        fake.now = 10
        trace = session.trace(lambda: fake.kernel("work", 10, 40))
        fake.now = 50
        again = session.trace(lambda: fake.kernel("more", 55, 60))
    assert [k.name for k in trace.kernels] == ["work"]
    assert trace.calls == ()
    assert [k.name for k in again.kernels] == ["more"]


def test_only_calls_that_count_are_recorded():
    fake = FakeCupti()
    with Session((fake, "x"), nothing) as session:
        assert (fake.recorded(4), fake.recorded(5)) == ({278, 514, 652}, {131, 165, 311})
        trace = session.trace(lambda: [fake.api(295, 1, 2, domain=1), fake.api(514, 3, 4, domain=1)])
    assert [call.name for call in trace.calls] == ["cuGraphLaunch"]


def test_all_calls_are_recorded_where_cupti_cannot_tell_them_apart(monkeypatch):
    fake = FakeCupti()
    monkeypatch.setattr(fake, "cuptiActivityEnableRuntimeApi", None, raising=False)
    with Session((fake, "x"), nothing):
        assert fake.recorded(4) == {278, 514, 652}
        every = {(4, cbid) for cbid in range(1, cupti._MOST_FUNCTIONS)}
        assert fake.muted == every - {(4, cbid) for cbid in fake.recorded(4)}
    fake = FakeCupti(cuptiActivityEnableDriverApi=27)
    with Session((fake, "x"), nothing):
        assert fake.recorded(4) == {278, 295, 514, 652}
    fake = FakeCupti(cuptiGetCallbackName=1)
    with Session((fake, "x"), nothing) as session:
        assert fake.muted == set()
        trace = session.trace(lambda: fake.api(311, 1, 2))
    assert trace.calls == (Call("domain 2, function 311", 1, 2, 7),)


def test_the_last_wait_belongs_to_the_trace():
    fake = FakeCupti()
    with Session((fake, "x"), lambda: fake.api(165, 900, 950)) as session:
        trace = session.trace(lambda: fake.api(311, 10, 20))
    assert [call.name for call in trace.calls] == ["cudaGraphLaunch", "cudaDeviceSynchronize"]


def test_lost_records_are_counted():
    def work(fake):
        fake.kernel("timed", 1, 2)
        fake.kernel("no device memory for its times", 0, 0)
        fake.dropped = 3

    trace = traced(work, FakeCupti())
    assert trace.lost == 4
    assert cupti.figures(trace, 1) == {"value": None, "reason": "CUPTI lost 4 records"}


def test_cupti_is_let_go_in_order_and_no_buffer_is_kept():
    fake = FakeCupti()
    with Session((fake, "x"), nothing) as session:
        session.trace(lambda: fake.kernel("work", 3, 4))
        assert session._buffers == {}
    assert fake.enabled == set()
    names = fake.names()
    assert names[-3:] == ["cuptiActivityFlushAll", "cuptiUnsubscribe", "cuptiFinalize"]
    assert names[1] == "cuptiSubscribe"


def test_an_older_cupti_stays_attached():
    """Before CUDA 12.6 detaching crashes where a graph was traced."""
    fake = FakeCupti(version=23)
    traced(lambda fake: fake.kernel("work", 3, 4), fake)
    assert "cuptiUnsubscribe" in fake.names()
    assert "cuptiFinalize" not in fake.names()
    newer = FakeCupti(version=24)
    traced(lambda fake: fake.kernel("work", 3, 4), newer)
    assert "cuptiFinalize" in newer.names()


def test_cupti_is_let_go_when_the_work_fails():
    fake = FakeCupti()
    with pytest.raises(ZeroDivisionError), Session((fake, "x"), nothing) as session:
        session.trace(lambda: 1 // 0)
    assert fake.enabled == set()
    assert fake.names()[-1] == "cuptiFinalize"


@pytest.mark.parametrize(
    ("function", "status", "expected"),
    [
        ("cuptiSubscribe", 39, "another profiler or debugger is attached to this process"),
        ("cuptiActivityEnable", 35, "run as root"),
        ("cuptiSubscribe", 15, "there is no driver, or none that serves this CUPTI"),
        ("cuptiActivityRegisterCallbacks", 4711, "status 4711"),
        ("cuptiActivityFlushAll", 4711, "status 4711"),
        ("cuptiActivityGetNextRecord", 4711, "status 4711"),
        ("cuptiActivityGetNumDroppedRecords", 4711, "status 4711"),
    ],
)
def test_a_refusal_names_the_function_and_what_to_do(function, status, expected):
    fake = FakeCupti(**{function: status})
    with pytest.raises(CuptiUnavailableError, match=f"^{function}: .*{expected}"):
        traced(lambda fake: fake.kernel("work", 3, 4), fake)
    assert fake.enabled == set()
    assert ("cuptiUnsubscribe" in fake.names()) == (function != "cuptiSubscribe")


def test_a_missing_library_is_a_reason(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(cupti, "_candidates", lambda major: [Path(f"/nowhere/libcupti.so.{major}")])
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: 12090)
    monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: 13000)
    with pytest.raises(CuptiUnavailableError, match=r"pip install nvidia-cuda-cupti; /nowhere/.*12.*/nowhere/.*13"):
        cupti.load_cupti()


def test_the_library_is_looked_for_in_toolkits_and_by_its_name(tmp_path, monkeypatch):
    for folder in ("home/extras/CUPTI/lib64", "path/lib64"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "libcupti.so.99").touch()
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cupti._candidates(99) == [
        tmp_path / "path/lib64/libcupti.so.99",
        tmp_path / "home/extras/CUPTI/lib64/libcupti.so.99",
        Path("libcupti.so.99"),
    ]


def test_a_wheel_comes_first(tmp_path, monkeypatch):
    (tmp_path / "cu13/lib").mkdir(parents=True)
    (tmp_path / "cu13/lib/libcupti.so.13").touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(cupti, "find_spec", lambda name: spec)
    assert cupti._candidates(13)[0] == tmp_path / "cu13/lib/libcupti.so.13"


# ---- the headers ----------------------------------------------------------------------------------------------------


def _nvidia_folders() -> list[Path]:
    spec = find_spec("nvidia")
    return [Path(root) for root in spec.submodule_search_locations or ()] if spec else []


def _header_folders() -> list[Path]:
    candidates = [folder for root in _nvidia_folders() for folder in root.glob("*/include")]
    candidates += [Path("/usr/local/cuda/include"), Path("/usr/local/cuda/extras/CUPTI/include")]
    return [folder for folder in candidates if (folder / "cupti_activity.h").is_file()]


def _cuda_folder() -> Path | None:
    candidates = [folder for root in _nvidia_folders() for folder in root.glob("*/include")]
    return next((f for f in (*candidates, Path("/usr/local/cuda/include")) if (f / "cuda.h").is_file()), None)


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++, which knows how a struct is laid out")
@pytest.mark.skipif(not _cuda_folder(), reason="no cuda.h (nvidia-cuda-runtime)")
@pytest.mark.parametrize("headers", _header_folders() or [None], ids=lambda f: f.parent.name if f else "none")
def test_records_are_laid_out_as_in_the_headers(headers, tmp_path):
    if headers is None:
        pytest.skip("no CUPTI headers (nvidia-cuda-cupti)")
    text = "".join((headers / f"cupti_activity{part}.h").read_text(errors="replace") for part in ("", "_deprecated"))
    versions = sorted({int(n) for n in re.findall(r"\}\s*CUpti_ActivityKernel(\d+);", text)})
    kernels = [f"CUpti_ActivityKernel{n}" for n in versions if n >= 5]
    assert len(kernels) >= 5
    records = dict.fromkeys(kernels, cupti._KernelRecord) | {"CUpti_ActivityAPI": cupti._ApiRecord}
    lines = [
        f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));'
        for name, record in records.items()
        for field, _ in record._fields_
    ]
    constants = {
        "CUPTI_ACTIVITY_KIND_DRIVER": cupti._ACTIVITY_DRIVER,
        "CUPTI_ACTIVITY_KIND_RUNTIME": cupti._ACTIVITY_RUNTIME,
        "CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL": cupti._ACTIVITY_CONCURRENT_KERNEL,
        "CUPTI_CB_DOMAIN_DRIVER_API": cupti._CALLBACK_DOMAIN[cupti._ACTIVITY_DRIVER],
        "CUPTI_CB_DOMAIN_RUNTIME_API": cupti._CALLBACK_DOMAIN[cupti._ACTIVITY_RUNTIME],
        "CUPTI_ACTIVITY_FLAG_FLUSH_FORCED": cupti._FLUSH_FORCED,
        "CUPTI_ERROR_MAX_LIMIT_REACHED": cupti._NO_MORE_RECORDS,
        "CUPTI_ERROR_INVALID_KIND": cupti._INVALID_RECORD,
    }
    lines += [f'printf("{name} %d\\n", (int){name});' for name in constants]
    lines.append('printf("id %zu\\n", sizeof(CUpti_CallbackId));')
    (tmp_path / "builtin_types.h").touch()  # the vector types, which need the compiler's own headers
    (tmp_path / "layout.cpp").write_text(
        "#include <cstdio>\n#include <cstddef>\n#include <cuda.h>\n#include <cupti_activity.h>\nint main() {\n"
        + "\n".join(lines)
        + "\n}\n"
    )
    includes = [f"-I{folder}" for folder in (tmp_path, headers, _cuda_folder())]
    subprocess.run(["g++", *includes, "-o", "layout", "layout.cpp"], cwd=tmp_path, check=True, capture_output=True)
    found = subprocess.run([str(tmp_path / "layout")], check=True, capture_output=True, text=True).stdout.splitlines()
    expected = [
        f"{name}.{field} {getattr(record, field).offset} {getattr(record, field).size}"
        for name, record in records.items()
        for field, _ in record._fields_
    ]
    assert found == [*expected, *(f"{name} {value}" for name, value in constants.items()), "id 4"]


def _library(major: int):
    for path in cupti._candidates(major):
        if path.is_file():
            return ctypes.CDLL(str(path))
    pytest.skip(f"no CUPTI {major} (nvidia-cuda-cupti)")


@pytest.mark.parametrize("major", [12, 13])
def test_every_function_that_cupti_can_name_is_sorted_rightly(major):
    library, name = _library(major), ctypes.c_char_p()
    names = set()
    for domain in (1, 2):
        for cbid in range(1, 1200):
            if not library.cuptiGetCallbackName(domain, cbid, ctypes.byref(name)) and name.value:
                names.add(cupti._VERSION.sub("", name.value.decode()))
    if not names:
        pytest.skip("this CUPTI names no function without a driver")
    launches = {n for n in names if cupti._LAUNCH.fullmatch(n)}
    waits = {n for n in names if cupti._WAIT.fullmatch(n)}
    assert launches - {"__cudaLaunchKernel"} == {
        "cuGraphLaunch", "cuLaunch", "cuLaunchCooperativeKernel", "cuLaunchCooperativeKernelMultiDevice",
        "cuLaunchGrid", "cuLaunchGridAsync", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "cudaLaunch",
        "cudaLaunchCooperativeKernel", "cudaLaunchCooperativeKernelMultiDevice", "cudaLaunchKernel",
        "cudaLaunchKernelExC",
    } - ({"cudaLaunchCooperativeKernelMultiDevice"} - names)  # fmt: skip
    assert waits == {
        "cuCtxSynchronize", "cuEventSynchronize", "cuStreamSynchronize", "cudaDeviceSynchronize",
        "cudaEventSynchronize", "cudaStreamSynchronize", "cudaThreadSynchronize",
        "cuMemcpy", "cuMemcpy2D", "cuMemcpy2DUnaligned", "cuMemcpy3D", "cuMemcpyAtoH", "cuMemcpyDtoH", "cuMemcpyHtoA",
        "cuMemcpyHtoD", "cudaMemcpy", "cudaMemcpy2D", "cudaMemcpy2DFromArray", "cudaMemcpy2DToArray", "cudaMemcpy3D",
        "cudaMemcpyFromArray", "cudaMemcpyFromSymbol", "cudaMemcpyToArray", "cudaMemcpyToSymbol",
    }  # fmt: skip
    for other in ("cuStreamWaitEvent", "cuMemcpyDtoHAsync", "cudaMemcpyAsync", "cuLaunchHostFunc", "cuMemcpyDtoD"):
        assert other in names
        assert other not in launches | waits


def test_the_real_library_says_why_it_does_not_serve():
    """Without a driver; with one this is tests/gpu/test_tracing.py's business."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    refusal = pytest.raises(CuptiUnavailableError, match=r"^cuptiSubscribe: (CUPTI_ERROR_\w+|status \d+)")
    with refusal, Session((_library(13), "libcupti.so.13"), nothing):
        pytest.fail("CUPTI serves without a driver")


# ---- figures --------------------------------------------------------------------------------------------------------


def kernel(name, start_us, end_us):
    return KernelRun(name, round(start_us * 1e3), round(end_us * 1e3), (1, 1, 1), (32, 1, 1), 7)


def call(name, start_us, end_us, thread=1):
    return Call(name, round(start_us * 1e3), round(end_us * 1e3), thread)


def token_trace(tokens=3, extra=0.0):
    """Each token: 2 us of attention, two products of 3 us, of which the second overlaps the first by 1 us, idle to 10.

    extra: microseconds that the last token's attention takes longer.
    """
    kernels, calls = [], []
    for t in range(tokens):
        at = 10 * t
        more = extra if t == tokens - 1 else 0
        kernels += [
            kernel("edgellm_attention_decode___half_64", at, at + 2 + more),
            kernel(PRODUCT, at + 2, at + 5),
            kernel(OTHER_PRODUCT, at + 4, at + 7),
        ]
        calls += [call("cudaGraphLaunch", t, t + 0.5), call("cudaStreamWaitEvent", t + 0.5, t + 0.6)]
    calls.append(call("cudaDeviceSynchronize", tokens, 10 * tokens))
    return Trace(tuple(kernels), tuple(calls), 0, "libcupti.so.13, API version 130001")


def test_figures_of_a_token():
    found = cupti.figures(token_trace(), 3)
    assert found["launches_per_token"]["value"] == 1
    assert found["kernels_per_token"]["value"] == 3
    assert found["synchronisations_per_token"]["value"] == 0
    assert found["synchronisations_per_token"]["final_synchronisations"] == 1
    assert found["calls"] == {"cudaGraphLaunch": 3, "cudaDeviceSynchronize": 1}
    assert found["gpu_busy_us"]["value"] == pytest.approx(7)
    assert found["token_us"]["value"] == pytest.approx(27 / 3)
    assert found["gpu_idle_share_pct"]["value"] == pytest.approx(100 * 6 / 27)
    assert found["kernels"] == [
        {
            "name": "rmsnorm_ternary_matmul",
            "names": [PRODUCT, OTHER_PRODUCT],
            "launches": 2,
            "us": 6,
            "share_pct": 75,
        },
        {
            "name": "attention_decode",
            "names": ["edgellm_attention_decode___half_64"],
            "launches": 1,
            "us": 2,
            "share_pct": 25,
        },
    ]
    assert "medians over the tokens" in found["how"]
    json.dumps(found, allow_nan=False)


def test_a_slow_token_does_not_move_the_median():
    rows = {row["name"]: row for row in cupti.figures(token_trace(extra=100), 3)["kernels"]}
    assert rows["attention_decode"]["us"] == 2


def test_tokens_that_differ_give_means():
    whole = token_trace()
    fewer = replace(whole, kernels=whole.kernels[:-1])
    found = cupti.figures(fewer, 3)
    assert found["kernels_per_token"]["value"] == pytest.approx(8 / 3)
    assert found["kernels"][0]["us"] == pytest.approx(5)
    assert "means, because the tokens differ" in found["how"]
    renamed = replace(whole, kernels=(*whole.kernels[:-1], kernel("other", 24, 27)))
    assert "means" in cupti.figures(renamed, 3)["how"]


def test_waits_before_the_last_launch_are_counted_by_token():
    whole = token_trace()
    more = [call(name, 0.6, 0.7) for name in ("cuStreamSynchronize", "cuMemcpyDtoH", "cudaMemcpyAsync")]
    found = cupti.figures(replace(whole, calls=(*whole.calls, *more)), 3)
    assert found["synchronisations_per_token"]["value"] == pytest.approx(2 / 3)
    assert found["synchronisations_per_token"]["final_synchronisations"] == 1


def test_no_kernel_is_a_reason():
    assert cupti.figures(Trace((), (), 0, "x"), 3)["reason"] == "CUPTI saw no kernel"


def test_what_the_runtime_calls_in_the_driver_is_not_counted_twice():
    def work(fake):
        fake.api(311, 100, 200)
        fake.api(514, 110, 190, domain=1)  # inside
        fake.api(514, 100, 200, domain=1, thread=8)  # another thread
        fake.api(652, 200, 210, domain=1)  # behind it

    trace = traced(work, FakeCupti())
    assert [(c.name, c.thread) for c in trace.calls] == [
        ("cudaGraphLaunch", 7),
        ("cuGraphLaunch", 8),
        ("cuLaunchKernelEx", 7),
    ]
    assert len(trace.launches) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (PRODUCT, "rmsnorm_ternary_matmul"),
        ("edgellm_rmsnorm___half_256", "rmsnorm"),
        ("edgellm_attention_decode___half___half_64_3_4_0", "attention_decode"),
        ("edgellm_attention___half_64", "attention"),
        ("edgellm_next_token_32", "next_token"),
        ("edgellm_sample", "sample"),
        ("edgellm_samples_1", "edgellm_samples_1"),
        ("ampere_fp16_s16816gemm", "ampere_fp16_s16816gemm"),
    ],
)
def test_kernels_are_grouped_by_their_file(name, expected):
    assert cupti.base_name(name) == expected


# ---- decoding -------------------------------------------------------------------------------------------------------


class FakeModel:
    """What a decoder says of itself, and counts of what it is asked for."""

    activation, dtype, head_dtype = "int8", "bfloat16", "int8"

    def __init__(self, fake=None):
        self.fake, self.lengths = fake, []

    def new_cache(self, max_len, batch, dtype, sampling):
        assert dtype == "int8"
        return FakeCache(max_len)

    def decode_one_token(self, token, cache):
        assert token is cache.token
        self.lengths.append(cache.length)
        self.fake.now += 100
        self.fake.api(311, self.fake.now - 90, self.fake.now - 80)
        self.fake.kernel(PRODUCT, self.fake.now - 80, self.fake.now - 10)
        cache.length += 1
        assert cache.length <= cache.max_len
        return cache.token


class FakeCache:
    def __init__(self, max_len):
        self.max_len, self.length, self.token = max_len, 0, object()

    def fill_random(self, length):
        self.length = length

    def truncate(self, length):
        assert length <= self.length
        self.length = length


TINY = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256)


def context(no_gpu=None):
    return Context(Checkpoint.random(TINY), no_gpu, activation="int8", kv_dtype="int8")


def test_the_program_traces_tokens_warm_and_at_the_context(monkeypatch, capsys):
    fake = FakeCupti()
    model = FakeModel(fake)
    array = [0]
    monkeypatch.setattr(cupti, "load_cupti", lambda: (fake, "x"))
    monkeypatch.setattr(cupti.Session.__init__, "__defaults__", (None, nothing))
    monkeypatch.setattr(cupti, "_synchronise", nothing)
    monkeypatch.setattr(cupti, "_SETTLE_S", 0)
    monkeypatch.setattr(Context, "model", model)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(arange=lambda n: np.array(array)))
    cupti.main([*one_token.described(context()), "4"])
    found = json.loads(capsys.readouterr().out)
    span = [*range(CONTEXT - 2, CONTEXT + 2)]
    assert model.lengths == span * 4  # before CUPTI, behind it to warm up, each twice; the last is the one
    assert found["context"] == CONTEXT
    assert found["launches_per_token"] == {"value": 1, "unit": "launches", "n": 4}
    assert found["kernels_per_token"]["n"] == 4
    assert found["kernels"][0]["us"] == 0.07
    assert found["gpu_busy_us"]["value"] == pytest.approx(0.07)


def test_the_program_says_why_there_is_no_trace(monkeypatch, capsys):
    fake = FakeCupti(cuptiSubscribe=39)
    monkeypatch.setattr(cupti, "load_cupti", lambda: (fake, "x"))
    monkeypatch.setattr(Context, "model", FakeModel(FakeCupti()))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(arange=lambda n: np.zeros(n)))
    cupti.main([*one_token.described(context()), "4"])
    assert "another profiler" in json.loads(capsys.readouterr().out)["reason"]


def test_a_lookalike_has_the_same_decoder(monkeypatch):
    monkeypatch.setattr(Context, "model", FakeModel())
    config_text, options_text = one_token.described(context())
    whole, one = one_token.lookalike(config_text, options_text), one_token.lookalike(config_text, options_text, 1)
    assert whole.config == TINY
    assert one.config == replace(TINY, num_layers=1)
    assert (len(whole.checkpoint.layers), len(one.checkpoint.layers)) == (2, 1)
    assert (whole.activation, whole.dtype, whole.head, whole.kv_dtype) == ("int8", "bfloat16", "int8", "int8")
    with pytest.raises(ValueError, match="unknown option 'batch'"):
        one_token.lookalike(config_text, '{"batch": 2}')


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(0, 'a warning\n{"tokens": 32}\n')], {"tokens": 32}),
        ([(-11, '{"tokens": 32}\nSegmentation fault')], {"tokens": 32}),
        ([(None, '{"tokens": 32}\n')], {"tokens": 32}),
        ([(None, ""), (0, '{"tokens": 32}\n')], {"tokens": 32}),
        ([(None, ""), (None, "")], missing("the process that traces was not done after 5 s, 2 times")),
        ([(1, "Traceback\nGpuUnavailableError: x\n\n")],
         missing("the process that traces ended with 1: GpuUnavailableError: x")),
        ([(-11, "")], missing("the process that traces ended with -11: it printed nothing")),
    ],
)  # fmt: skip
def test_the_other_process_may_fail(monkeypatch, answers, expected):
    asked = []

    def run(module, arguments, time_limit_s):
        asked.append((module, arguments[2], time_limit_s))
        return answers[len(asked) - 1]

    monkeypatch.setattr(Context, "model", FakeModel())
    monkeypatch.setattr(cupti.child, "run", run)
    assert cupti.decode_trace(context(), 32, 5) == expected
    assert asked == [("cupti", "32", 5)] * len(answers)


def test_the_other_process_says_that_there_is_no_gpu(monkeypatch):
    """The real one, where there is none."""
    if cuda_available():
        pytest.skip("there is a GPU: tests/gpu/test_tracing.py")
    monkeypatch.setattr(Context, "model", FakeModel())
    reason = cupti.decode_trace(context())["reason"]
    assert re.match(r"the process that traces ended with 1: .*GpuUnavailableError: ", reason)


def test_without_a_gpu_there_is_a_reason():
    assert cupti.decode_trace(context("no GPU here"))["reason"] == "no GPU here"
