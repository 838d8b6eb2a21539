"""The operations on a real GPU: what only a device can show. The emulator covers the arithmetic (tests/cpu)."""

from __future__ import annotations

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import verify
from edgellm_cupy.arguments import BFLOAT16
from edgellm_cupy.kernels import capture, count_launches, loader
from edgellm_cupy.kernels.launch import overlap
from edgellm_cupy.reference.accuracy import check

pytestmark = pytest.mark.gpu


@pytest.fixture
def cp():
    return pytest.importorskip("cupy")


@pytest.fixture
def problem(cp):
    half = np.dtype(np.float16)
    case = verify.Case(m=96, n=1, k=576, dtype=half, gamma_dtype=half, activation="int8", choice="streaming")
    arrays = verify.random_problem(case, np.random.default_rng(0))
    weight = ec.TernaryWeight.from_int8(arrays["t"], arrays["scale"])
    return arrays["x"][0], arrays["gamma"], weight


def test_verify_finds_nothing():
    assert verify.run() == []


def test_weight_round_trip_on_the_device(cp):
    t = np.random.default_rng(0).integers(-1, 2, (33, 101), dtype=np.int8)
    weight = ec.TernaryWeight.from_int8(cp.asarray(t), 0.5)
    assert weight.on_device
    np.testing.assert_array_equal(weight.to_int8().get(), t)
    host = weight.to_host()
    np.testing.assert_array_equal(host.packed, ec.TernaryWeight.from_int8(t, 0.5).packed)
    again = host.to_device()
    assert again.to_device() is again


def test_absmean_on_the_device_equals_the_host(cp):
    w = np.random.default_rng(0).standard_normal((40, 130)).astype(np.float32)
    host, device = ec.TernaryWeight.from_float(w), ec.TernaryWeight.from_float(cp.asarray(w))
    np.testing.assert_array_equal(device.to_int8().get(), host.to_int8())
    np.testing.assert_allclose(device.scale.get(), host.scale, rtol=1e-7)


def test_invalid_code_on_the_device_names_its_position(cp):
    t = cp.zeros((4, 5), cp.int8)
    t[2, 3] = 2
    with pytest.raises(ec.ArgumentValueError, match=r"t\[2, 3\] is 2"):
        ec.TernaryWeight.from_int8(t)


def test_host_arguments_are_refused(cp, problem):
    x, _, weight = problem
    with pytest.raises(TypeError, match="expected a CuPy array"):
        ec.ternary_matmul(x, weight.to_device())
    with pytest.raises(TypeError, match="to_device"):
        ec.ternary_matmul(cp.asarray(x), weight)


@pytest.mark.parametrize("strategy", ["streaming", "separate"])
@pytest.mark.parametrize("n", [1, 20])
def test_graph_outlives_its_workspaces(cp, problem, strategy, n):
    """A captured call's workspace must not be handed to somebody else while the graph can still be replayed."""
    x, gamma, weight = problem
    tokens = np.ascontiguousarray(np.tile(x, (n, 1)))
    device_x, device_gamma, on_device = cp.asarray(tokens), cp.asarray(gamma), weight.to_device()
    out = cp.empty((n, 96), np.float16)

    def call():
        ec.rmsnorm_ternary_matmul(device_x, device_gamma, on_device, 1e-5, "int8", strategy=strategy, out=out)

    call()
    graph = capture(call)
    cp.get_default_memory_pool().free_all_blocks()
    churn = [cp.full(size, 0x7F, cp.uint8) for size in range(64, 40_000, 512)]
    out.fill(np.nan)
    graph.launch()
    message = check(out.get(), tokens, gamma, weight, eps=1e-5, activation="int8")
    assert message is None, message
    assert all(bool((block == 0x7F).all()) for block in churn)


def test_launches_go_to_the_current_stream(cp, problem):
    """A capture records what goes to its stream, and nothing else."""
    x, _, weight = problem
    on_device, device_x, out = weight.to_device(), cp.asarray(x), cp.full(96, np.nan, np.float16)
    graph = capture(lambda: ec.ternary_matmul(device_x, on_device, "int8", out=out))
    assert bool(cp.isnan(out).all())
    assert graph.kernels == 1
    graph.launch()
    message = check(out.get(), x, None, weight, activation="int8")
    assert message is None, message


def test_first_call_may_be_inside_a_capture(cp):
    """Nothing has to be warm: the kernel is compiled and loaded while the stream is capturing."""
    rng = np.random.default_rng(5)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (40, 300), dtype=np.int8)).to_device()
    x = rng.standard_normal((4, 300)).astype(BFLOAT16)
    device_x, out = cp.asarray(x), cp.full((4, 40), np.nan, np.float32)
    for (device, spec), kernel in list(loader._loaded.items()):
        if spec.file.endswith("ternary_matmul.cu"):
            del loader._loaded[device, spec], kernel
    graph = capture(lambda: ec.ternary_matmul(device_x, weight, "float", out=out))
    graph.launch()
    message = check(out.get(), x, None, weight.to_host())
    assert message is None, message


def test_fused_product_of_one_token_is_one_launch(cp, problem):
    x, gamma, weight = problem
    arguments = cp.asarray(x), cp.asarray(gamma), weight.to_device()
    with count_launches() as counter:
        ec.rmsnorm_ternary_matmul(*arguments)
    assert counter.kernels == 1
    with count_launches() as counter:
        ec.rmsnorm_ternary_matmul(cp.tile(arguments[0], (300, 1)), *arguments[1:], activation="int8")
    assert counter.kernels == 2  # not one a token


@pytest.mark.parametrize("n", [1, 3, 40])
def test_launches_that_overlap_wait_for_what_they_read(cp, n):
    """A graph of products, each of which starts before the one whose result it reads has ended."""
    rng = np.random.default_rng(n)
    weights = [
        ec.TernaryWeight.from_int8(rng.integers(-1, 2, (576, 576), dtype=np.int8), 0.05).to_device() for _ in range(5)
    ]
    first = cp.asarray(rng.standard_normal((n, 576)).astype(np.float16))
    gamma = cp.ones(576, np.float16)
    buffers = [cp.empty_like(first), cp.empty_like(first)]

    def chain():
        buffers[0][...] = first
        for i in range(60):
            x, out = buffers[i % 2], buffers[(i + 1) % 2]
            ec.rmsnorm_ternary_matmul(x, gamma, weights[i % 5], 1e-5, "int8", out=out)

    def result(enabled):
        with overlap(enabled):
            graph = capture(chain)
        graph.launch()
        return buffers[0].get()

    chain()
    expected = result(False)
    for _ in range(20):
        np.testing.assert_array_equal(result(True), expected)


def test_torch_tensor_through_dlpack(cp, problem):
    torch = pytest.importorskip("torch")
    x, _, weight = problem
    tensor = torch.from_numpy(x).cuda()
    y = torch.from_dlpack(ec.ternary_matmul(cp.from_dlpack(tensor), weight.to_device()))
    message = check(y.cpu().numpy(), x, None, weight)
    assert message is None, message


def test_extreme_float32_values(cp):
    """Squares that float32 cannot hold: the second, rescaled attempt of the norm."""
    rng = np.random.default_rng(3)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (70, 300), dtype=np.int8))
    gamma = np.ones(300, np.float32)
    for exponent, eps in ((30, 1e-6), (-30, 0.0), (-30, 1e-6), (0, 0.0)):
        x = (rng.standard_normal((2, 300)) * 10.0**exponent).astype(np.float32)
        x[1] = 0
        for activation in ("float", "int8"):
            y = ec.rmsnorm_ternary_matmul(cp.asarray(x), cp.asarray(gamma), weight.to_device(), eps, activation)
            message = check(y.get(), x, gamma, weight, eps=eps, activation=activation)
            assert message is None, f"10**{exponent}, eps {eps}, {activation}: {message}"
