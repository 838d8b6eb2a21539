"""Tracing on a real GPU: CUPTI sees what the library says it launches, and Nsight Compute names the same kernels."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.metrics import measured
from edgellm_cupy.bench.parts import cupti, ncu, one_token, roofline
from edgellm_cupy.bench.parts.utilisation import CONTEXT
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import count_launches, loaded

pytestmark = pytest.mark.gpu

CONFIG = ec.ModelConfig("small", 3, 1024, 2048, 16, 4, 64, 4000)
TOKENS = 8


@pytest.fixture(scope="module")
def ctx():
    return Context(Checkpoint.random(CONFIG), None)


@pytest.fixture(scope="module")
def a_token(ctx):
    """Kernel -> launches for one token, where the library counts them; and the launch shapes."""
    steps = one_token.warm_steps(ctx, 1)
    for kernel in loaded():
        kernel.forget_launches()
    with count_launches() as recorded:  # another cache, whose graph is recorded now
        one_token.warm_steps(ctx, 1)
    with count_launches() as counter:
        steps()
    shapes = {
        (kernel.info.name, " x ".join(map(str, grid)))
        for kernel in loaded()
        for grid, _, _ in kernel.launch_shapes
        if kernel.info.name in recorded.by_name
    }
    return counter.kernels, recorded.by_name, shapes


@pytest.fixture(scope="module")
def library():
    try:
        return cupti.load_cupti()
    except cupti.CuptiUnavailableError as e:
        pytest.skip(str(e))


def test_cupti_sees_what_the_library_says(ctx, a_token, library):
    kernels, by_name, _ = a_token
    found = cupti.decode_trace(ctx, TOKENS)
    assert "kernels" in found, found["reason"]
    assert found["context"] == CONTEXT
    assert found["kernels_per_token"]["value"] == kernels
    assert found["launches_per_token"]["value"] == 1
    assert found["synchronisations_per_token"]["value"] == 0
    assert found["synchronisations_per_token"]["final_synchronisations"] == 1
    assert found["calls"]["cudaGraphLaunch"] == TOKENS
    assert {name for row in found["kernels"] for name in row["names"]} == set(by_name)
    assert sum(row["launches"] for row in found["kernels"]) == kernels
    assert sum(row["share_pct"] for row in found["kernels"]) == pytest.approx(100)
    assert all(row["us"] > 0 for row in found["kernels"])
    assert 0 < found["gpu_busy_us"]["value"] <= found["token_us"]["value"]
    assert 0 <= found["gpu_idle_share_pct"]["value"] < 100
    assert "medians over the tokens" in found["how"]


def test_kernels_and_waits_of_this_process_are_traced(library):
    import cupy as cp

    W = ec.TernaryWeight.from_int8(cp.ones((960, 576), cp.int8), 0.01)
    x, gamma = cp.ones(576, cp.float16), cp.ones(576, cp.float32)

    def work():
        for _ in range(3):
            ec.rmsnorm_ternary_matmul(x, gamma, W, activation="int8")
        cp.cuda.get_current_stream().synchronize()
        ec.rmsnorm_ternary_matmul(x, gamma, W, activation="int8")

    for _ in range(2):  # CUPTI comes back after it was let go
        with cupti.Session(library) as session:
            work()
            session.settle()
            trace = session.trace(work)
        assert trace.lost == 0
        assert len(trace.kernels) == len(trace.launches) == 4
        assert {cupti.base_name(k.name) for k in trace.kernels} == {"rmsnorm_ternary_matmul"}
        assert all(k.end > k.start for k in trace.kernels)
        assert [call.name for call in trace.synchronisations] == ["cudaStreamSynchronize", "cudaDeviceSynchronize"]
    y = ec.rmsnorm_ternary_matmul(x, gamma, W, activation="float")
    assert np.isfinite(y.get()).all()


@pytest.mark.skipif(not shutil.which("ncu"), reason="no ncu on the PATH")
def test_nsight_compute_names_the_same_kernels(ctx, a_token):
    found = ncu.achieved_occupancy(ctx)
    if "kernels" not in found and "ERR_NVGPUCTRPERM" in found["reason"]:
        pytest.skip(found["reason"])
    assert "kernels" in found, found["reason"]
    _, _, shapes = a_token
    assert {(row["name"], row["grid"]) for row in found["kernels"]} == shapes
    for row in found["kernels"]:
        assert 0 < row["measured_occupancy_pct"]["value"] <= 100
        assert row["duration_us"]["value"] > 0
        assert ncu.of_kernel(found, row["name"], row["grid"]) == row["measured_occupancy_pct"]


def test_this_device_has_a_peak():
    peak = roofline.theoretical_peak(roofline.current_roof_facts())
    if peak["int8_tops"]["value"] is None:
        assert "no published tensor-core rate" in peak["how"]
    else:
        assert peak["int8_tops"]["value"] == pytest.approx(2 * peak["float16_tflops"]["value"])
        assert roofline.roofline({}, measured(1.0, "GB/s"), roofline.current_roof_facts())["points"] == []
