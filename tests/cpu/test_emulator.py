"""The emulator computes what a GPU would, and finds every fault that is planted in tests/emulator/faults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.emulator import (  # noqa: E402
    ORDERS,
    Emulator,
    EmulatorBuildError,
    EmulatorFault,
    Kernel,
    Output,
    Scratch,
    compare_orders,
)

FOLDER = ROOT / "tests" / "emulator"
RNG = np.random.default_rng(7)
N = 100
X = RNG.standard_normal(N).astype(np.float32)


# ---------------------------------------------------------------------------------------------- kernels, built once

FAULTS: dict[str, str] = {  # file in faults/ -> kind of the fault
    "out_of_bounds_read": "out-of-bounds",
    "out_of_bounds_before": "out-of-bounds",
    "out_of_bounds_write": "out-of-bounds",
    "out_of_bounds_dynamic": "out-of-bounds",
    "misaligned": "misaligned",
    "read_only": "read-only",
    "uninitialised_shared": "uninitialised-shared",
    "uninitialised_scalar": "uninitialised-shared",
    "uninitialised_global": "uninitialised-global",
    "unwritten_output": "unwritten-output",
    "left_before_barrier": "left-before-barrier",
    "barrier_never_full": "deadlock",
    "barrier_counts_differ": "barrier",
    "shuffle_lanes_missing": "missing-lane",
    "shuffle_after_exit": "missing-lane",
    "shuffle_outside_mask": "missing-lane",
    "race_barrier_missing": "race",
    "race_in_warp": "race",
    "race_global": "race",
    "schedule_dependent": "schedule-dependent",
    "livelock": "livelock",
    "timeout": "timeout",
    "copy_without_wait": "uninitialised-shared",
    "copy_over_reader": "race",
    "index": "index",
    "shift": "shift",
    "divide": "divide",
    "trap": "trap",
    "stack": "crash",
    "scope": "scope",
    "cluster_exit": "out-of-bounds",
    "cluster_no_sync": "race",
}

HALF, BFLOAT = ("X_T", "__half"), ("X_T", "__nv_bfloat16")
SAMPLES: dict[str, tuple[str, int, tuple[tuple[str, str], ...]]] = {  # name -> file, CASE, macros
    "mma_m16n8k16_f16": ("instructions", 0, (HALF, ("K", "16"), ("MMA", "mma_m16n8k16_f16"))),
    "mma_m16n8k8_f16": ("instructions", 0, (HALF, ("K", "8"), ("MMA", "mma_m16n8k8_f16"))),
    "mma_m16n8k16_bf16": ("instructions", 0, (BFLOAT, ("K", "16"), ("MMA", "mma_m16n8k16_bf16"))),
    "mma_m16n8k32_s8": ("instructions", 1, (("M", "16"), ("K", "32"), ("MMA", "mma_m16n8k32_s8"), ("TYPE", "s8"))),
    "mma_m16n8k16_s8": ("instructions", 1, (("M", "16"), ("K", "16"), ("MMA", "mma_m16n8k16_s8"), ("TYPE", "s8"))),
    "mma_m8n8k16_u8s8": ("instructions", 1, (("M", "8"), ("K", "16"), ("MMA", "mma_m8n8k16_s8"), ("TYPE", "u8s8"))),
    **{
        f"ldmatrix_x{n}{'_trans' if t else ''}": (
            "instructions",
            2,
            (("COUNT", str(n)), ("TRANSPOSED", str(t).lower())),
        )
        for n in (1, 2, 4)
        for t in (False, True)
    },
    "cp_async": ("instructions", 3, ()),
    "named_barriers": ("instructions", 4, ()),
    "grid_barrier": ("instructions", 5, ()),
    "cluster": ("instructions", 6, ()),
    "votes": ("instructions", 7, ()),
    "conversions": ("instructions", 8, ()),
    "integers": ("instructions", 9, ()),
    "argmax": ("instructions", 10, ()),
    **{f"gemv_{t}": ("gemv", -1, (("X_T", t), ("THREADS", "128"))) for t in ("float", "__half", "__nv_bfloat16")},
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    kernels = [
        Kernel(f"{name}_{fault}", (FOLDER / "faults" / f"{name}.cu").read_text(), (("FAULT", str(fault)),))
        for name in FAULTS
        for fault in (0, 1)
    ]
    kernels += [
        Kernel(name, (FOLDER / "samples" / f"{file}.cu").read_text(), (("CASE", str(case)), *macros))
        for name, (file, case, macros) in SAMPLES.items()
    ]
    emulator = Emulator(per_file=16)
    emulator.build(kernels)
    return emulator


# ---------------------------------------------------------------------------------------------- faults


def launch_with_fault(emulator: Emulator, name: str, fault: int) -> Any:
    """Launches faults/<name>.cu, with or without its fault; returns y."""
    y = np.zeros(N, np.float32)
    x, scalar = X.copy(), np.int32(N)
    args: list[Any] = [x, Output(y), scalar]
    grid, options = 1, {}
    if name == "timeout":
        args[1] = y
    elif name in ("livelock", "scope"):
        args, grid = [x, y, np.zeros(1, np.uint32), scalar], 2
    elif name == "race_global":
        args = [x, Output(y), Scratch(np.zeros(128, np.float32)), scalar]
    elif name == "out_of_bounds_dynamic":
        options["shared"] = 4 * N
    elif name == "schedule_dependent":
        grid = 3
    elif name.startswith("cluster"):
        grid, options = 2, {"cluster": 2}
    emulator.launch_in_orders(f"{name}_{fault}", grid, 128, args, **options)
    return y


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(emulator: Emulator, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "timeout":
        monkeypatch.setattr(emulator, "timeout", 0.2)
    with pytest.raises(EmulatorFault) as caught:
        launch_with_fault(emulator, name, fault=1)
    fault = caught.value
    assert fault.kind == FAULTS[name], fault
    assert fault.kernel == f"{name}_1"
    if fault.kind not in ("unwritten-output", "schedule-dependent"):
        assert fault.block is not None
        assert fault.thread is not None
    if fault.kind not in ("unwritten-output", "schedule-dependent", "divide", "crash"):
        assert f"{name}_1.cu:" in fault.location, fault


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_kernel_without_the_fault_passes(emulator: Emulator, name: str) -> None:
    assert np.isfinite(launch_with_fault(emulator, name, fault=0)).all()


def test_every_fault_kernel_is_in_the_table() -> None:
    assert sorted(path.stem for path in (FOLDER / "faults").iterdir()) == sorted(FAULTS)


def test_a_message_says_where(emulator: Emulator) -> None:
    with pytest.raises(EmulatorFault) as caught:
        emulator.launch("out_of_bounds_read_1", 1, 128, [X.copy(), np.zeros(N, np.float32), 100])
    assert "thread (100, 0, 0)" in str(caught.value)
    assert "0 bytes past the end of argument 0 (float32[100])" in str(caught.value)
    assert caught.value.location.endswith(".cu:8")


def test_a_fault_leaves_the_emulator_usable(emulator: Emulator) -> None:
    for _ in range(3):
        with pytest.raises(EmulatorFault):
            launch_with_fault(emulator, "shuffle_lanes_missing", fault=1)
        launch_with_fault(emulator, "shuffle_lanes_missing", fault=0)


def test_a_view_is_as_misaligned_as_on_a_gpu(emulator: Emulator) -> None:
    y = np.zeros(N, np.float32)
    owner = np.zeros(N + 1, np.float32)
    emulator.launch("misaligned_0", 1, 128, [owner[:N], Output(y), 100])
    with pytest.raises(EmulatorFault, match="misaligned"):
        emulator.launch("misaligned_0", 1, 128, [owner[1:], Output(y), 100])


def test_bytes_behind_a_view_are_out_of_bounds(emulator: Emulator) -> None:
    owner, y = np.zeros(N + 28, np.float32), np.zeros(N, np.float32)
    with pytest.raises(EmulatorFault, match="past the end of argument 0"):
        emulator.launch("out_of_bounds_read_1", 1, 128, [owner[:N], Output(y), 100])


def test_an_array_may_come_twice(emulator: Emulator) -> None:
    x = X.copy()
    emulator.launch("unwritten_output_0", 1, 128, [x, x, 100])
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize(
    ("args", "options", "expected"),
    [
        ([X, X, 100.0], {}, TypeError),  # a Python float is 8 bytes
        ([X, X, np.int64(100)], {}, TypeError),
        ([X, X, 1 << 31], {}, TypeError),
        ([X.astype(np.float16), X, 100], {}, TypeError),
        ([X, X], {}, TypeError),
        ([X, 5, 100], {}, TypeError),
        ([X, X, 100], {"block": 1025}, EmulatorFault),
        ([X, X, 100], {"grid": (1, 70000)}, EmulatorFault),
        ([X, X, 100], {"grid": 3, "cluster": 2}, EmulatorFault),
        ([X, X, 100], {"shared": 300_000}, EmulatorFault),
    ],
)
def test_a_launch_that_a_gpu_would_refuse(emulator: Emulator, args: Any, options: Any, expected: Any) -> None:
    with pytest.raises(expected):
        emulator.launch("unwritten_output_0", args=args, **{"grid": 1, "block": 128, **options})


def test_a_compile_error_names_the_line(emulator: Emulator) -> None:
    with pytest.raises(EmulatorBuildError, match=r"broken\.cu:2"):
        emulator.build([Kernel("broken", 'extern "C" __global__ void KERNEL_NAME(int* y) {\n y[0] = nothing;\n}\n')])


# ---------------------------------------------------------------------------------------------- instructions


@pytest.mark.parametrize("name", [name for name in SAMPLES if name.startswith("mma") and name.endswith("16")][:3])
def test_mma_of_floats(emulator: Emulator, name: str) -> None:
    k = 8 if "k8" in name else 16
    dtype = ml_dtypes.bfloat16 if name.endswith("bf16") else np.float16
    a, b = RNG.standard_normal((16, k)).astype(dtype), RNG.standard_normal((k, 8)).astype(dtype)
    c, d = RNG.standard_normal((16, 8)).astype(np.float32), np.zeros((16, 8), np.float32)
    emulator.launch_in_orders(name, 1, 32, [a, b, c, Output(d)])
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.astype(np.float64) + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "m", "k"), [("m16n8k32_s8", 16, 32), ("m16n8k16_s8", 16, 16), ("m8n8k16_u8s8", 8, 16)]
)
def test_mma_of_integers(emulator: Emulator, name: str, m: int, k: int) -> None:
    a = RNG.integers(-128, 128, (m, k), dtype=np.int8)
    a = a.view(np.uint8) if "u8" in name else a
    b_transposed = RNG.integers(-128, 128, (8, k), dtype=np.int8)
    c, d = RNG.integers(-1000, 1000, (m, 8), dtype=np.int32), np.zeros((m, 8), np.int32)
    emulator.launch_in_orders(f"mma_{name}", 1, 32, [a, b_transposed, c, Output(d)])
    np.testing.assert_array_equal(d, a.astype(np.int32) @ b_transposed.T.astype(np.int32) + c)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(emulator: Emulator, count: int, transposed: bool) -> None:
    x = RNG.integers(0, 1 << 16, (count, 8, 8), dtype=np.uint16)
    out = np.zeros((count, 32), np.uint32)
    emulator.launch_in_orders(f"ldmatrix_x{count}{'_trans' * transposed}", 1, 32, [x, Output(out)])
    expected = np.ascontiguousarray(x.transpose(0, 2, 1) if transposed else x).view(np.uint32)
    np.testing.assert_array_equal(out, expected.reshape(count, 32))


@pytest.mark.parametrize("n", [1, 255, 256, 700, 1023])
def test_cp_async(emulator: Emulator, n: int) -> None:
    x = RNG.integers(-100, 100, n).astype(np.float32)
    y = np.zeros(64, np.float32)
    emulator.launch_in_orders("cp_async", 1, 64, [x, Output(y), n], 2 * 256 * 4)
    padded = np.pad(x, (0, -n % 256)).reshape(-1, 64, 4).sum(axis=(0, 2))
    np.testing.assert_array_equal(y, np.roll(padded, -1))


def test_named_barriers(emulator: Emulator) -> None:
    x, y = RNG.integers(-100, 100, (5, 32), dtype=np.int32), np.zeros(32, np.int32)
    emulator.launch_in_orders("named_barriers", 1, 64, [x, Output(y), 5])
    np.testing.assert_array_equal(y, x.sum(axis=0)[::-1])


def test_grid_barrier(emulator: Emulator) -> None:
    x, y = np.abs(RNG.standard_normal(777)).astype(np.float32), np.zeros(777, np.float32)
    args = [x, Scratch(np.zeros(5, np.float32)), np.zeros(1, np.uint32), Output(y), 777]
    emulator.launch_in_orders("grid_barrier", 5, 128, args, cooperative=True)
    np.testing.assert_allclose(y, x / x.sum(dtype=np.float64), rtol=1e-6)
    args[2] = np.zeros(1, np.uint32)
    with pytest.raises(EmulatorFault, match="livelock"):
        emulator.launch("grid_barrier", 5, 128, args)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cluster(emulator: Emulator, size: int) -> None:
    x, y = RNG.integers(-100, 100, (8, 32), dtype=np.int32), np.zeros((8, 32), np.int32)
    emulator.launch_in_orders("cluster", 8, 32, [x, Output(y)], 128, cluster=size)
    sums = x.reshape(-1, size, 32).sum(axis=1)[:, None, ::-1]
    np.testing.assert_array_equal(y.reshape(-1, size, 32), sums + 1000 * np.arange(size)[:, None])


def test_votes_shuffles_and_reductions(emulator: Emulator) -> None:
    x, y = RNG.integers(-50, 50, 32, dtype=np.int32), np.zeros((12, 32), np.int32)
    emulator.launch_in_orders("votes", 1, 32, [x, Output(y)])
    lane = np.arange(32)
    bits = np.uint64(1) << lane.astype(np.uint64)
    same = (x[:, None] & 3) == (x[None, :] & 3)
    expected = [
        np.full(32, bits[x > 0].sum().astype(np.uint32).view(np.int32)),
        np.full(32, x.sum()),
        np.full(32, x.min()),
        np.full(32, x.max()),
        (same * bits).sum(axis=1).astype(np.uint32).view(np.int32),
        x[np.where(lane >= 3, lane - 3, lane)],
        x[np.where(lane % 16 + 5 < 16, lane + 5, lane) % 32],
        x[lane // 8 * 8 + 1],
        x[lane ^ 31],
        np.where(lane < 8, x[:8].sum(), int((x[8:] == 7).any()) + 2),
        np.full(32, (x > 0).sum()),
        np.full(32, np.bitwise_xor.reduce(x)),
    ]
    np.testing.assert_array_equal(y, np.array(expected))


def test_conversions_are_exact_and_subnormals_flush(emulator: Emulator) -> None:
    random_bits = RNG.integers(0, 1 << 32, 4000, dtype=np.uint32).view(np.float32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:0x7BFF] + halves[1:0x7C00]) / 2  # half way between neighbours
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65519.0, 65520.0, 2.5, -3.5, 3e9, -3e9, 1e-40], np.float32)
    x = np.concatenate([random_bits, halves, ties, np.nextafter(ties, np.float32(np.inf)), special])
    n = x.size
    h, b = np.zeros(n, np.float16), np.zeros(n, ml_dtypes.bfloat16)
    back, i, tiny = np.zeros(n, np.float32), np.zeros(n, np.int32), np.zeros(n, np.float32)
    outputs = [Output(a) for a in (h, b, back, i, tiny)]
    emulator.launch("conversions", -(-n // 256), 256, [x, *outputs, n])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(h, x.astype(np.float16))
        np.testing.assert_array_equal(b.astype(np.float32), x.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(back, h.astype(np.float32))
        rounded = np.nan_to_num(np.rint(x.astype(np.float64)), nan=0.0, posinf=2**31, neginf=-(2**31))
        np.testing.assert_array_equal(i, np.clip(rounded, -(2**31), 2**31 - 1).astype(np.int32))
        smallest = np.finfo(np.float32).smallest_normal
        flushed = np.where(np.abs(x) < smallest, np.float32(0), x)
        product = flushed * np.float32(0.5)
        np.testing.assert_array_equal(tiny, np.where(np.abs(product) < smallest, np.float32(0), product))
    assert np.float32(1e-40) * np.float32(0.5) != 0  # the mode of this thread is restored


def test_integer_intrinsics(emulator: Emulator) -> None:
    n = 64
    x = RNG.integers(0, 1 << 32, n, dtype=np.uint32)
    x[:3] = 0, 1, 0xFFFFFFFF
    y = np.zeros((n, 8), np.uint32)
    emulator.launch("integers", 1, n, [x, Output(y), n])
    for a, b, row in zip(x.tolist(), x[::-1].tolist(), y.tolist(), strict=True):
        bytes_a, bytes_b = a.to_bytes(4, "little"), b.to_bytes(4, "little")
        signed = [v - 256 * (v > 127) for v in bytes_a], [v - 256 * (v > 127) for v in bytes_b]
        joined = bytes_a + bytes_b
        permuted = bytes([joined[1], joined[2], 255 * (joined[7] > 127), joined[4]])
        leading, trailing = 32 - a.bit_length(), (a & -a).bit_length()
        expected = [
            int.from_bytes(permuted, "little"),
            (b << 32 | a) << 7 >> 32,
            sum(p * q for p, q in zip(*signed, strict=True)) + 5,
            sum(p * q for p, q in zip(bytes_a, bytes_b, strict=True)) + 5,
            sum(p * q for p, q in zip(bytes_a, signed[1], strict=True)) - 3,
            a.bit_count() + 100 * leading + 10000 * trailing,
            a * b >> 32,
            int(f"{a:032b}"[::-1], 2),
        ]
        assert row == [value & 0xFFFFFFFF for value in expected]


def test_argmax_by_atomics(emulator: Emulator) -> None:
    x = RNG.integers(-500, 500, 3000).astype(np.float32)
    best = np.zeros(1, np.uint64)
    emulator.launch_in_orders("argmax", 24, 128, [x, best, 3000])
    assert 0xFFFFFFFF - int(best[0] & np.uint64(0xFFFFFFFF)) == int(np.argmax(x))


# ---------------------------------------------------------------------------------------------- a whole kernel


@pytest.mark.parametrize("dtype", ["float", "__half", "__nv_bfloat16"])
@pytest.mark.parametrize("shape", [(576, 576), (5, 48)])
def test_ternary_matrix_vector_product(emulator: Emulator, dtype: str, shape: tuple[int, int]) -> None:
    m, k = shape
    numpy_dtype = {"float": np.float32, "__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}[dtype]
    t = RNG.integers(-1, 2, (m, k))
    codes = ((t.reshape(m, k // 16, 16) + 1).astype(np.uint32) << (2 * np.arange(16, dtype=np.uint32))).sum(
        axis=2, dtype=np.uint32
    )
    x = RNG.standard_normal(k).astype(numpy_dtype)
    step = np.abs(x).max().astype(np.float32) / np.float32(127)
    sums = t @ np.rint(x.astype(np.float32) / step).astype(np.int64)

    def run(order: Any) -> list[Any]:
        y = np.zeros(m, numpy_dtype)
        args = [codes, x, Output(y), np.float32(0.5), np.int32(m), k]
        emulator.launch(f"gemv_{dtype}", -(-m // 4), 128, args, k, order=order)
        return [y]

    (y,) = compare_orders(run, (*ORDERS, 2))
    expected = sums.astype(np.float32) * step * np.float32(0.5)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(numpy_dtype).astype(np.float32))
