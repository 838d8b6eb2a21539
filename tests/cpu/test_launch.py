"""What the launcher hands to the driver, without a driver."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from edgellm_cupy.kernels import KernelSpec, launch
from edgellm_cupy.tuning import specialisations


@pytest.fixture
def driver(monkeypatch):
    """Calls of cuLaunchKernelEx: (grid, block, shared bytes, stream, attributes, parameter buffer)."""
    calls = []

    def launch_kernel(configuration, function, params, extra):
        c = configuration._obj
        assert (extra[0], extra[2], extra[4]) == (1, 2, None)  # CU_LAUNCH_PARAM_BUFFER_POINTER, _SIZE, _END
        size = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t))[0]
        attributes = [(a.id, *a.value) for a in c.attributes[: c.attribute_count]]
        calls.append(
            (list(c.grid), list(c.block), c.shared_bytes, c.stream, attributes, ctypes.string_at(extra[1], size))
        )
        return 0

    monkeypatch.setattr(launch, "_driver", lambda: launch_kernel)
    return calls


def test_structures_have_the_sizes_of_cuda_h():
    assert ctypes.sizeof(launch._Attribute) == 72
    assert launch._Attribute.value.offset == 8
    assert ctypes.sizeof(launch._Configuration) == 56
    assert launch._Configuration.stream.offset == 32


def test_parameters_lie_as_c_lays_them_out(driver):
    array = SimpleNamespace(data=SimpleNamespace(ptr=0x1234567890))
    run = launch.Launcher(1, "PiPqf", may_overlap=False)
    run(77, ((3, 2, 1), (64, 1, 1), 512), (array, True, None, 5, np.float32(0.5)))
    grid, block, shared, stream, attributes, buffer = driver[0]
    assert (grid, block, shared, stream, attributes) == ([3, 2, 1], [64, 1, 1], 512, 77, [])
    assert struct.unpack("PiPqf", buffer) == (0x1234567890, 1, 0, 5, 0.5)
    assert run.launches == {((3, 2, 1), (64, 1, 1), 512): 1}
    with pytest.raises(struct.error):
        run(77, ((3, 2, 1), (64, 1, 1), 512), (array, True, None, 5))
    assert len(driver) == 1


def test_overlap_is_asked_for_where_the_kernel_waits(driver):
    shape = ((1, 1, 1), (32, 1, 1), 0)
    run = launch.Launcher(1, "i", may_overlap=True)
    run(0, shape, (1,))
    with launch.overlap(False):
        run(0, shape, (1,))
    launch.Launcher(1, "i", may_overlap=False)(0, shape, (1,))
    assert [call[4] for call in driver] == [[(6, 1, 0, 0)], [], []]


def test_clusters_lie_along_x(driver):
    shape = ((16, 3, 1), (32, 1, 1), 0)
    run = launch.Launcher(1, "i", may_overlap=True)
    run(0, shape, (1,), 8)
    with launch.overlap(False):
        run(0, shape, (1,), 8)
    run(0, shape, (1,))
    run(0, shape, (1,), 4)
    launch.Launcher(1, "i", may_overlap=False)(0, shape, (1,), 8)
    eight, four, overlap = (4, 8, 1, 1), (4, 4, 1, 1), (6, 1, 0, 0)
    assert [call[4] for call in driver] == [[eight, overlap], [eight], [overlap], [four, overlap], [eight]]
    assert run.launches == {shape: 4}


def test_every_kernel_but_the_yardstick_waits_for_its_predecessors():
    waiting = {spec.file: spec.waits for spec in specialisations()}
    assert [file for file, waits in waiting.items() if not waits] == ["read_floor.cu"]


def test_signatures_are_read_from_the_source():
    assert KernelSpec("read_floor.cu").parameters == "PqP"
    assert KernelSpec("rmsnorm.cu").parameters == "PPiPiiif"
