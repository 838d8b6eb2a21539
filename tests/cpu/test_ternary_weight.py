"""TernaryWeight on the host: the packed layout, the absmean quantiser, and what each constructor refuses."""

from __future__ import annotations

import math
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm_cupy import ArgumentTypeError, ArgumentValueError, TernaryWeight
from edgellm_cupy.formats import packing
from edgellm_cupy.formats import ternary as formats_ternary
from edgellm_cupy.formats.ternary import concatenate

# K around the multiples of a chunk (64 codes), of a word (16) and of a byte (4), and everything small.
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([31, 63, 64, 65, 127, 128, 129, 200, 576]))
MATRICES = hnp.arrays(np.int8, st.tuples(st.integers(1, 9), SIZES), elements=st.integers(-1, 1))


def ternary(m: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (m, k), dtype=np.int8)


# ---- the packed layout ----------------------------------------------------------------------------------------------


@given(MATRICES)
def test_round_trip(t):
    w = TernaryWeight.from_int8(t)
    m, k = t.shape
    assert w.shape == (m, k)
    assert w.packed.shape == (m, math.ceil(k / 64), 16)
    assert w.packed.dtype == np.uint8
    assert w.packed.flags.c_contiguous
    back = w.to_int8()
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, t)


@given(MATRICES)
def test_every_code_lies_where_the_layout_says(t):
    packed = TernaryWeight.from_int8(t).packed
    m, k = t.shape
    for row in range(m):
        for column in range(packed.shape[1] * 64):
            chunk, e = divmod(column, 64)
            word, rest = divmod(e, 16)
            field, byte = divmod(rest, 4)
            code = (int(packed[row, chunk, 4 * word + byte]) >> (2 * field)) & 3
            assert code == (t[row, column] + 1 if column < k else 1), (row, column)


def test_documented_example():
    """The drawing in packing.py, bit by bit: elements 15, 11, 7, 3 fill the top byte of word 0."""
    t = np.zeros((1, 64), np.int8)
    t[0, [0, 4, 8, 12]] = [-1, 0, 1, 1]  # byte 0: bits 1..0 = 0, 3..2 = 1, 5..4 = 2, 7..6 = 2
    t[0, [3, 7, 11, 15]] = [1, 1, 0, -1]  # byte 3: bits 1..0 = 2, 3..2 = 2, 5..4 = 1, 7..6 = 0
    t[0, 63] = 1  # the last byte, bits 7..6 = 2
    packed = TernaryWeight.from_int8(t).packed
    zero = 0b01_01_01_01
    expected = [0b10_10_01_00, zero, zero, 0b00_01_10_10, *[zero] * 11, 0b10_01_01_01]
    assert packed.tolist() == [[expected]]
    # Read as one little-endian word, the mask of the docstring leaves four consecutive codes, scaled by 4**i.
    word = int(packed.view("<u4")[0, 0, 0])
    for i in range(4):
        fields = np.array([word & (0x03030303 << 2 * i)], "<u4").view(np.uint8)
        np.testing.assert_array_equal(fields, (t[0, 4 * i : 4 * i + 4] + 1).astype(np.uint8) * 4**i)


@pytest.mark.parametrize("k", [1, 63, 65])
def test_padding_is_zero_weights(k):
    padded = packing.unpack(TernaryWeight.from_int8(np.ones((3, k), np.int8)).packed, packing.chunks(k) * 64, np)
    assert padded[:, :k].all()
    assert not padded[:, k:].any()


@pytest.mark.parametrize("order", ["F", "strided"])
def test_from_int8_takes_any_strides(order):
    t = ternary(7, 70)
    view = np.asfortranarray(t) if order == "F" else np.repeat(t, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(TernaryWeight.from_int8(view).packed, TernaryWeight.from_int8(t).packed)


# ---- from_int8 ------------------------------------------------------------------------------------------------------


def test_first_offender_is_named():
    t = ternary(5, 70)
    t[2, 69], t[3, 0] = 2, -5
    with pytest.raises(ArgumentValueError, match=re.escape("t[2, 69] is 2, expected -1, 0 or 1")):
        TernaryWeight.from_int8(t)
    t[0, 3] = -128
    with pytest.raises(ArgumentValueError, match=re.escape("t[0, 3] is -128")):
        TernaryWeight.from_int8(t)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ([[0, 1]], TypeError, "t: expected a NumPy or CuPy array of int8, got builtins.list"),
        (np.zeros((2, 2), np.int32), TypeError, "expected a NumPy or CuPy array of int8, got numpy.ndarray of int32"),
        (np.zeros((2, 2), np.float32), TypeError, "got numpy.ndarray of float32"),
        (np.zeros(4, np.int8), ValueError, "t.shape is (4,), expected [M, K] with M, K >= 1"),
        (np.zeros((0, 4), np.int8), ValueError, "t.shape is (0, 4), expected [M, K]"),
        (np.zeros((4, 0), np.int8), ValueError, "t.shape is (4, 0), expected [M, K]"),
        (np.zeros((1, 2, 3), np.int8), ValueError, "t.shape is (1, 2, 3), expected [M, K]"),
    ],
)
def test_from_int8_refuses(t, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TernaryWeight.from_int8(t)


@pytest.mark.parametrize(
    ("scale", "stored"),
    [
        (0.5, [0.5]),
        (2, [2.0]),
        (np.float64(0.25), [0.25]),
        (np.array([1, -2, 0], np.float32), [1, -2, 0]),
        (np.array([3], np.float32), [3]),
    ],
)
def test_scales(scale, stored):
    w = TernaryWeight.from_int8(ternary(3, 4), scale)
    assert w.scale.dtype == np.float32
    assert w.scale.tolist() == stored


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (np.ones(2, np.float32), ValueError, "scale.shape is (2,), expected (3,), one a row"),
        (np.ones((3, 1), np.float32), ValueError, "scale.shape is (3, 1), expected (3,)"),
        (np.array([1, np.inf, np.nan], np.float32), ValueError, "scale[1] is inf, expected a finite float32"),
        (float("nan"), ValueError, "scale is nan, expected a finite float32"),
        (1e39, ValueError, "scale is 1e+39, expected a finite float32"),
        (np.ones(3), TypeError, "scale: expected a number or a numpy float32 array like the codes"),
        ([1, 1, 1], TypeError, "got builtins.list"),
        (True, TypeError, "got builtins.bool"),
        (None, TypeError, "got builtins.NoneType"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_scales_refused(scale, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TernaryWeight.from_int8(ternary(3, 4), scale)


# ---- from_float: absmean --------------------------------------------------------------------------------------------


def absmean(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The formula of BitNet b1.58 in float64: scale, codes, and how far each |w| / scale lay from the tie at 1/2."""
    w64 = w.astype(np.float64)
    scale = max(float(np.mean(np.abs(w64))), 1e-5)
    return scale, np.clip(np.rint(w64 / scale), -1, 1), np.abs(np.abs(w64 / scale) - 0.5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (64, 576)])
def test_from_float_is_absmean(dtype, shape):
    w = (np.random.default_rng(1).standard_normal(shape) * 0.03).astype(dtype)
    result = TernaryWeight.from_float(w)
    scale, codes, margin = absmean(w)
    np.testing.assert_allclose(result.scale, [scale], rtol=1e-6)
    # The product with 1 / scale is taken in float32: a value within its rounding error of the tie may fall either way.
    decided = margin > 1e-6
    assert decided.mean() > 0.99
    np.testing.assert_array_equal(result.to_int8()[decided], codes[decided])
    assert set(np.unique(result.to_int8())) <= {-1, 0, 1}


def test_from_float_rounds_half_to_even():
    w = np.array([[1.0, -1.0, 3.0, -3.0, 2.0, 2.0, 2.0, 2.0]], np.float32)  # mean |w| = 2, so |w| = 1 is the tie
    np.testing.assert_array_equal(TernaryWeight.from_float(w).to_int8(), [[0, 0, 1, -1, 1, 1, 1, 1]])


def test_from_float_of_tiny_weights_uses_the_floor():
    for w in (np.zeros((2, 3), np.float32), np.full((2, 3), 1e-6, np.float32)):
        result = TernaryWeight.from_float(w)
        assert result.scale.tolist() == [np.float32(1e-5)]
        assert not result.to_int8().any()


def test_from_float_of_huge_weights():
    w = np.array([[3e38, -3e38, 1.0]], np.float32)  # their float32 sum overflows, their float64 mean does not
    result = TernaryWeight.from_float(w)
    np.testing.assert_allclose(result.scale, [2e38], rtol=1e-6)
    np.testing.assert_array_equal(result.to_int8(), [[1, -1, 0]])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F"])
def test_from_float_does_not_depend_on_blocks(monkeypatch, dtype, order):
    w = np.asarray(np.random.default_rng(1).standard_normal((37, 65)).astype(dtype), order=order)
    whole = TernaryWeight.from_float(w)
    for block in (1, 65, 65 * 8):
        monkeypatch.setattr(formats_ternary, "_BLOCK", block)
        blocks = TernaryWeight.from_float(w)
        np.testing.assert_array_equal(blocks.packed, whole.packed)
        np.testing.assert_array_equal(blocks.scale, whole.scale)
    w[20, 3] = np.nan
    with pytest.raises(ArgumentValueError, match=re.escape("w[20, 3] is nan")):
        TernaryWeight.from_float(w)


def test_from_float_makes_no_copy_of_the_matrix():
    w = np.random.default_rng(1).standard_normal((4096, 1024)).astype(np.float16)
    tracemalloc.start()
    try:
        TernaryWeight.from_float(w)
        assert tracemalloc.get_traced_memory()[1] < w.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_from_float_names_the_first_value_that_is_not_finite(value):
    w = np.ones((4, 65), np.float32)
    w[1, 64], w[2, 0] = value, np.nan
    with pytest.raises(ArgumentValueError, match=re.escape(f"w[1, 64] is {value}, expected a finite float32")):
        TernaryWeight.from_float(w)


@pytest.mark.filterwarnings("ignore:overflow")
def test_from_float_refuses_what_float32_cannot_hold():
    with pytest.raises(ArgumentValueError, match=re.escape("w[0, 0] is 1e+300, expected a finite float32")):
        TernaryWeight.from_float(np.array([[1e300]]))


def test_from_float_refuses_integers():
    with pytest.raises(ArgumentTypeError, match="w: expected a NumPy or CuPy array of float16 or bfloat16 or"):
        TernaryWeight.from_float(np.ones((2, 2), np.int8))


# ---- from_packed ----------------------------------------------------------------------------------------------------


@given(MATRICES)
def test_from_packed_accepts_its_own(t):
    w = TernaryWeight.from_int8(t, 0.5)
    again = TernaryWeight.from_packed(w.packed, w.scale, w.shape)
    np.testing.assert_array_equal(again.to_int8(), t)
    assert again.shape == w.shape
    assert np.shares_memory(again.packed, w.packed)


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
@pytest.mark.parametrize("byte", [0, 7, 15])
def test_from_packed_refuses_code_3(shift, byte):
    w = TernaryWeight.from_int8(np.zeros((2, 128), np.int8))
    w.packed[1, 1, byte] |= 3 << shift
    with pytest.raises(ArgumentValueError, match=rf"packed row 1, byte {16 + byte} holds the code 3"):
        TernaryWeight.from_packed(w.packed, w.scale, w.shape)


def test_from_packed_takes_codes_1_and_2_side_by_side():
    """01 beside 10 has two neighbouring bits set, but in two codes."""
    t = np.tile(np.array([[1, 0], [0, 1], [-1, 1]], np.int8).repeat(4, axis=1), 8)
    w = TernaryWeight.from_int8(t)
    np.testing.assert_array_equal(TernaryWeight.from_packed(w.packed, 1.0, w.shape).to_int8(), t)


def test_from_packed_refuses_weights_in_the_padding():
    w = TernaryWeight.from_int8(np.ones((3, 70), np.int8))
    with pytest.raises(ArgumentValueError, match="the codes after K = 69 must all be zero weights"):
        TernaryWeight.from_packed(w.packed, 1.0, (3, 69))
    w.packed[2, 1, 15] = 0b10_01_01_01
    with pytest.raises(ArgumentValueError, match="the codes after K = 70 must all be zero weights"):
        TernaryWeight.from_packed(w.packed, 1.0, (3, 70))


@pytest.mark.parametrize(
    ("packed", "scale", "error", "message"),
    [
        (np.zeros((3, 1, 16), np.int8), 1.0, TypeError, "packed: expected a uint8 array, got numpy.ndarray of int8"),
        (b"", 1.0, TypeError, "packed: expected a uint8 array, got builtins.bytes"),
        (np.zeros((3, 2, 16), np.uint8), 1.0, ValueError, "packed.shape is (3, 2, 16), expected (3, 1, 16)"),
        (np.zeros((3, 16), np.uint8), 1.0, ValueError, "packed.shape is (3, 16), expected (3, 1, 16) for (3, 20)"),
        (np.full((3, 1, 16), 0x55, np.uint8), np.float32("nan"), ValueError, "scale is nan, expected a finite"),
    ],
)
def test_from_packed_refuses(packed, scale, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TernaryWeight.from_packed(packed, scale, (3, 20))


# ---- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scales", "nbytes"),
    [((1, 1), 1, 16 + 4), ((3, 64), 3, 3 * 16 + 12), ((3, 65), 1, 3 * 32 + 4), ((960, 576), 1, 960 * 144 + 4)],
)
def test_nbytes(shape, scales, nbytes):
    scale = 1.0 if scales == 1 else np.ones(scales, np.float32)
    assert TernaryWeight.from_int8(np.zeros(shape, np.int8), scale).nbytes == nbytes


def test_host_weight():
    w = TernaryWeight.from_int8(ternary(3, 4))
    assert not w.on_device
    assert w.to_host() is w
    assert repr(w) == "TernaryWeight(M=3, K=4, scales=1, host)"


def test_concatenate_keeps_codes_and_scales():
    a, b = ternary(3, 70, 1), ternary(2, 70, 2)
    stacked = concatenate([TernaryWeight.from_int8(a, 0.5), TernaryWeight.from_int8(b, np.array([2, 3], np.float32))])
    assert stacked.shape == (5, 70)
    np.testing.assert_array_equal(stacked.to_int8(), np.concatenate([a, b]))
    np.testing.assert_array_equal(stacked.scale, np.array([0.5, 0.5, 0.5, 2, 3], np.float32))
    TernaryWeight.from_packed(stacked.packed, stacked.scale, stacked.shape)


def test_concatenate_refuses_different_k():
    with pytest.raises(ArgumentValueError, match=re.escape("expected one common K, got [(1, 64), (1, 65)]")):
        concatenate([TernaryWeight.from_int8(ternary(1, 64)), TernaryWeight.from_int8(ternary(1, 65))])
