"""Tests marked `gpu` are skipped, with the reason, where there is none; and what the others exercised is counted."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

from edgellm_cupy.errors import GpuUnavailableError
from edgellm_cupy.kernels.nvrtc import ARCHITECTURES
from edgellm_cupy.runtime import require_gpu
from edgellm_cupy.tuning import specialisations
from tests.emulator import Emulator, EmulatorFault
from tests.fake_server import FakeServer, Pieces, Request

os.environ.setdefault("EDGELLM_TUNED", "0")  # what a user has tuned is not what is tested
# In .ci/run the same examples each time: a failure there is of the change, and repeats.
settings.register_profile("edgellm", deadline=None, derandomize="EDGELLM_REPEATABLE" in os.environ)
settings.load_profile("edgellm")
# A shell starts what it runs in the background deaf to Ctrl-C, and so would be the commands that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Exercised:
    """What the tests of this session used.

    Attributes:
        launched: names of the kernels that the emulator ran.
        faults: kinds of fault that it found.
        compiled: how many specialisations were compiled for an architecture; the others are in the budget.
    """

    def __init__(self) -> None:
        self.launched, self.faults = set[str](), set[str]()
        self.compiled: dict[int, int] = {}
        self._collected, self._deselected = set[str](), set[str]()
        self._selected_by_name = "PYTEST_XDIST_WORKER" in os.environ  # which sees a part of the tests

    def incomplete(self, *files: str) -> str | None:
        """Why this session does not run all tests of these files; None when it does."""
        if self._selected_by_name or self._deselected & set(files):
            return f"needs all tests of {' and '.join(files)}; some were deselected"
        if missing := sorted(set(files) - self._collected):
            return f"needs the tests of {' and '.join(missing)} in the same session"
        return None

    # ---- hooks, as a plugin of the session ----

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected = {item.path.name for item in session.items}
        self._selected_by_name |= any("::" in arg for arg in session.config.args)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._deselected |= {item.path.name for item in items}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        specs = specialisations()
        ran = [spec for spec in specs if spec.name in self.launched]
        compiled = ", ".join(f"sm_{arch} {count}" for arch, count in self.compiled.items()) or "none"
        terminalreporter.section("exercised")
        terminalreporter.line(
            f"emulator: {len({s.file for s in ran})} of {len({s.file for s in specs})} kernels, "
            f"{len(ran)} of {len(specs)} specialisations, {len(self.faults)} fault detectors"
        )
        terminalreporter.line(f"NVRTC, of {len(specs)} for each of {len(ARCHITECTURES)} architectures: {compiled}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Exercised(), "exercised")


@pytest.fixture(scope="session")
def exercised(pytestconfig: pytest.Config) -> Any:
    return pytestconfig.pluginmanager.get_plugin("exercised")


@pytest.fixture(scope="session", autouse=True)
def _record(exercised: Exercised) -> Iterator[None]:
    """Every launch and every fault of the emulator passes through these two functions."""
    launch, fault = Emulator.launch, EmulatorFault.__init__

    def launch_and_note(self: Emulator, name: str, *args: Any, **options: Any) -> None:
        exercised.launched.add(name)
        launch(self, name, *args, **options)

    def fault_and_note(self: EmulatorFault, kind: str, *args: Any, **options: Any) -> None:
        exercised.faults.add(kind)
        fault(self, kind, *args, **options)

    with (
        mock.patch.object(Emulator, "launch", launch_and_note),
        mock.patch.object(EmulatorFault, "__init__", fault_and_note),
    ):
        yield


EMULATED = (
    "test_attention_decode.py",
    "test_attention_prefill.py",
    "test_bench_decoder.py",
    "test_decoder.py",
    "test_emulator.py",
    "test_gemm.py",
    "test_kernels.py",
    "test_kernel_properties.py",
    "test_kernel_mutants.py",
    "test_sampling.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_compiler = not shutil.which(os.environ.get("CXX", "g++")) and os.environ.get("CI") != "true"
    for item in items:
        if item.path.name in EMULATED:
            item.add_marker("emulated")
            if no_compiler:
                item.add_marker(pytest.mark.skip(reason="no g++, which runs the kernels on the CPU"))
    # The test of coverage looks back at all others.
    items.sort(key=lambda item: item.name == "test_every_kernel_and_specialisation_was_launched")
    try:
        require_gpu()
    except GpuUnavailableError as e:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=str(e)))


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers that answer so, and closes them behind the test."""
    fakes: list[FakeServer] = []

    def start(answer: Callable[[Request], Pieces], **options: Any) -> FakeServer:
        fakes.append(FakeServer(answer, **options))
        return fakes[-1]

    yield start
    for fake in fakes:
        fake.close()
