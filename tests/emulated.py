"""The package's own dispatch on the CPU: operations and decoder run unchanged, their kernels in the emulator.

`emulated_gpu` stands in for CuPy and the loader. Everything between the public function and the launch is the real
code: argument checks, choice of the specialisation, launch configuration, order of the kernels' arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.model import decoder
from edgellm_cupy.ops import enqueue, public
from edgellm_cupy.tuning import specialisations
from edgellm_cupy.tuning.device import DeviceFacts
from tests.emulator import Emulator

_KIB = 1024
GPUS = {
    "T4": DeviceFacts(75, 40, 1024, 64 * _KIB, 64 * _KIB),
    "A100": DeviceFacts(80, 108, 2048, 164 * _KIB, 163 * _KIB),
    "Jetson Orin": DeviceFacts(87, 16, 1536, 164 * _KIB, 163 * _KIB),
    "RTX 4090": DeviceFacts(89, 128, 1536, 100 * _KIB, 99 * _KIB),
    "H100 PCIe": DeviceFacts(90, 114, 2048, 228 * _KIB, 227 * _KIB),
    "H200": DeviceFacts(90, 132, 2048, 228 * _KIB, 227 * _KIB),
    "B200": DeviceFacts(100, 148, 2048, 228 * _KIB, 227 * _KIB),
    "RTX 5090": DeviceFacts(120, 170, 1536, 100 * _KIB, 99 * _KIB),
}
H200, T4 = GPUS["H200"], GPUS["T4"]
TINY = DeviceFacts(arch=75, multiprocessors=2, threads=1024, shared_bytes=65536, block_shared_bytes=65536)
"""No real GPU: its two multiprocessors make small problems take every persistent loop."""


def poisoned(shape: Any, dtype: Any = np.float32) -> np.ndarray:
    """Memory that nobody has written: bytes that are NaN as any float, and far off as an integer."""
    array = np.empty(shape, dtype)
    array.view(np.uint8).reshape(-1)[...] = 0xFF if array.dtype.kind != "i" else 0x7B
    return array


class EmulatedGpu:
    """What `emulated_gpu` yields.

    Attributes:
        launched: the specialisations launched so far.
        cupy: what the package takes for CuPy.
    """

    def __init__(self, emulator: Emulator, facts: DeviceFacts):
        self.emulator, self.facts, self.launched = emulator, facts, set[KernelSpec]()
        self.cupy: Any = None
        self._recording: list[Callable[[], None]] | None = None

    def load(self, spec: KernelSpec) -> Callable[..., None]:
        def launch(grid: Any, block: Any, args: tuple[Any, ...], shared_bytes: int = 0, cluster: int = 1) -> None:
            assert shared_bytes <= self.facts.block_shared_bytes, f"{spec.name}: {shared_bytes} bytes of shared memory"
            if spec not in self.launched:
                self.emulator.build([spec])  # where that was not done in advance, many at once
            assert cluster == 1 or self.facts.arch >= 90, f"{spec.name}: no clusters on sm_{self.facts.arch}"
            self.launched.add(spec)
            # As the launcher does it: a Python float is a float32 parameter.
            values = [np.float32(a) if isinstance(a, float) else int(a) if isinstance(a, bool) else a for a in args]

            def run() -> None:
                self.emulator.launch(spec.name, grid, block, values, shared=shared_bytes, cluster=cluster)

            if self._recording is None:
                run()
            else:
                self._recording.append(run)

        return launch

    def capture(self, record: Callable[[], None]) -> SimpleNamespace:
        """Like `kernels.capture`: each replay has the very arguments of the recording, stale or not."""
        self._recording = nodes = []
        record()
        self._recording = None

        def replay() -> None:
            for node in nodes:
                node()

        return SimpleNamespace(launch=replay)


class HostReader:
    """In place of the decoder's reader of tokens: here memory is the host's, and nothing runs beside it."""

    def __init__(self, cp: Any, token: np.ndarray):
        self._token, self._copy = token, token

    def start(self) -> None:
        self._copy = self._token.copy()

    def finish(self) -> np.ndarray:
        return self._copy


def new_emulator() -> Emulator:
    """An emulator that holds every specialisation that dispatch can reach."""
    emulator = Emulator()
    emulator.build(specialisations())
    return emulator


@contextmanager
def emulated_gpu(emulator: Emulator, facts: DeviceFacts = H200) -> Iterator[EmulatedGpu]:
    """Inside, `edgellm_cupy`'s GPU functions and decoder take NumPy arrays and run in the emulator."""
    gpu = EmulatedGpu(emulator, facts)
    stream = SimpleNamespace(is_capturing=lambda: False, synchronize=lambda: None)
    gpu.cupy = cupy = SimpleNamespace(
        ndarray=np.ndarray,
        empty=poisoned,
        empty_like=lambda a: poisoned(a.shape, a.dtype),
        zeros=np.zeros,
        asarray=np.array,
        int32=np.int32,
        float32=np.float32,
        uint8=np.uint8,
        uint32=np.uint32,
        uint64=np.uint64,
        arange=np.arange,
        cuda=SimpleNamespace(get_current_stream=lambda: stream, runtime=SimpleNamespace(getDevice=lambda: 0)),
    )

    with (
        mock.patch.object(public, "_cupy", cupy),
        mock.patch.object(decoder, "require_gpu", return_value=cupy),
        mock.patch.object(decoder, "capture", gpu.capture),
        mock.patch.object(decoder, "load", gpu.load),
        mock.patch.object(decoder, "_TokenReader", HostReader),
        mock.patch.object(enqueue, "load", gpu.load),
        mock.patch.object(enqueue, "current_facts", return_value=facts),
        mock.patch.object(enqueue.tuned, "lookup", return_value=None),  # not what is in the user's cache
        mock.patch.object(decoder, "current_facts", return_value=facts),
        mock.patch.object(decoder.TernaryWeight, "to_device", lambda self: self),
    ):
        yield gpu
