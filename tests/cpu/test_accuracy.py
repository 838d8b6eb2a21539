"""The error metric: right results pass, planted errors of every kind are found, with the place named."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_cupy import TernaryWeight
from edgellm_cupy.reference import accuracy, rmsnorm, rmsnorm_ternary_matmul, ternary_matmul
from edgellm_cupy.reference.ops import normalise, product, quantise

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_activation = pytest.mark.parametrize("activation", ["float", "int8"])


class Case:
    """A problem with its operands on the host, and the reference's result."""

    def __init__(self, m: int, k: int, n: int, dtype: Any, activation: str, seed: int = 0, residual: bool = False):
        rng = np.random.default_rng(seed)
        self.activation = activation
        self.x = rng.standard_normal((n, k)).astype(dtype)
        self.gamma = rng.uniform(0.5, 1.5, k).astype(np.float32)
        t = rng.integers(-1, 2, (m, k), dtype=np.int8)
        self.W = TernaryWeight.from_int8(t, rng.uniform(-2, 2, m).astype(np.float32))
        self.residual = rng.standard_normal((n, m)).astype(dtype) if residual else None

    def result(self) -> np.ndarray:
        return rmsnorm_ternary_matmul(
            self.x, self.gamma, self.W, activation=self.activation, residual=self.residual
        )  # fmt: skip

    def check(self, y: np.ndarray) -> str | None:
        return accuracy.check(y, self.x, self.gamma, self.W, activation=self.activation, residual=self.residual)


# ---- right results --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(1, 4), st.sampled_from(DTYPES),
    st.sampled_from(["float", "int8"]), st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_the_reference_passes(m: int, k: int, n: int, dtype: Any, activation: str, seed: int, residual: bool) -> None:
    case = Case(m, k, n, dtype, activation, seed, residual)
    assert case.check(case.result()) is None


@every_dtype
@every_activation
def test_float32_arithmetic_passes(dtype: Any, activation: str) -> None:
    """What a kernel does: every step in float32, q * gamma without the norm first, the norm in the last scale."""
    case = Case(64, 576, 5, dtype, activation, residual=True)
    x, f = case.x.astype(np.float32), np.float32
    r = f(1) / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + f(1e-6))
    g = x * case.gamma
    if activation == "int8":
        largest = np.maximum(np.abs(g).max(axis=1, keepdims=True), f(1e-5) / r)
        q = np.rint(g * (f(127) / largest))
        total = (q @ case.W.to_int8().T).astype(f) * (case.W.scale * (largest * r / f(127)))
    else:
        total = (g @ case.W.to_int8().T.astype(f)) * r * case.W.scale
    y = (total + case.residual.astype(f)).astype(dtype)
    assert case.check(y) is None


@every_dtype
def test_rmsnorm_and_product_alone(dtype: Any) -> None:
    case = Case(20, 100, 3, dtype, "int8")
    norm = rmsnorm(case.x, case.gamma)
    assert accuracy.check(norm, case.x, case.gamma) is None
    assert accuracy.check(ternary_matmul(case.x, case.W, "int8"), case.x, None, case.W, activation="int8") is None
    norm[1, 2] *= dtype(1.05)
    message = accuracy.check(norm, case.x, case.gamma)
    assert message is not None
    assert message.startswith("y[1, 2] is ")


def test_results_in_another_dtype_are_judged_by_the_coarser_one() -> None:
    case = Case(20, 100, 2, np.float32, "float")
    y = np.empty((2, 20), np.float16)
    rmsnorm_ternary_matmul(case.x, case.gamma, case.W, out=y)
    assert case.check(y) is None
    assert case.check(y.astype(np.float32)) is not None  # float16 rounding is no excuse for a float32 result


# ---- planted errors -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(DTYPES), st.sampled_from(["float", "int8"]))
def test_one_wrong_element_is_found_and_named(data: st.DataObject, dtype: Any, activation: str) -> None:
    case = Case(30, 129, 3, dtype, activation, seed=data.draw(st.integers(0, 99)))
    y = case.result()
    at = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 29))
    bound = accuracy.bound(case.x, case.gamma, case.W, activation=activation)
    # Two steps of y's dtype beyond what is allowed, so that the rounding to y cannot take the error back.
    wrong = np.nextafter(np.nextafter(bound.high[at].astype(dtype), dtype(np.inf)), dtype(np.inf))
    y[at] = wrong
    message = case.check(y)
    assert message is not None
    assert message.startswith(f"y[{at[0]}, {at[1]}] is ")
    assert "1 of 90 elements wrong" in message
    assert "W (30, 129)" in message


@every_dtype
@every_activation
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_must_be_nan_throughout(dtype: Any, activation: str, bad: float) -> None:
    case = Case(30, 129, 3, dtype, activation)
    case.x[1, 7] = bad
    y = case.result()
    assert np.isnan(y[1]).all()
    assert case.check(y) is None
    y[1, 4] = 0
    message = case.check(y)
    assert message is not None
    assert message.startswith("y[1, 4] is 0, expected NaN; 1 of 90")


@every_dtype
@every_activation
def test_nan_and_infinity_where_a_number_belongs(dtype: Any, activation: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        case = Case(30, 129, 3, dtype, activation)
        y = case.result()
        y[2, 29] = bad
        assert str(case.check(y)).startswith("y[2, 29] is ")


@every_activation
def test_unwritten_outputs_are_found(activation: str) -> None:
    case = Case(30, 129, 3, np.float16, activation)
    assert "90 of 90" in str(case.check(np.full((3, 30), np.nan, np.float16)))
    assert "elements wrong" in str(case.check(np.zeros((3, 30), np.float16)))


def test_a_wrong_shape_is_an_error() -> None:
    case = Case(30, 129, 3, np.float16, "int8")
    assert str(case.check(case.result()[:2])).startswith("y.shape is (2, 30), expected (3, 30)")


# ---- int8: exact sums -----------------------------------------------------------------------------------------------


def _with_one_flip(k: int) -> tuple[np.ndarray, TernaryWeight, np.ndarray]:
    """x whose element `k` lies exactly on a tie, a weight that reads it, and y for the other side of the tie."""
    x = np.zeros(64, np.float32)
    x[0] = 127  # absmax: step is 1, so values are their own quantised values
    x[k] = 2.5 if k == 5 else 2.4
    W = TernaryWeight.from_int8(np.ones((1, 64), np.int8))
    q, step, _ = quantise(x.astype(np.float64))
    q[k] += 1
    return x, W, np.array([q.sum() * step[0]], np.float32)


def test_a_value_on_a_tie_may_go_to_either_side() -> None:
    x, W, other_side = _with_one_flip(5)
    right = ternary_matmul(x, W, "int8")
    assert right[0] == 129
    assert other_side[0] == 130
    for y in (right, other_side):
        assert accuracy.check(y, x, None, W, activation="int8") is None


def test_a_value_beside_a_tie_may_not() -> None:
    x, W, off_by_one = _with_one_flip(6)
    assert accuracy.check(ternary_matmul(x, W, "int8"), x, None, W, activation="int8") is None
    assert accuracy.check(off_by_one, x, None, W, activation="int8") is not None


def test_an_element_that_ignores_the_tie_may_not_move() -> None:
    x, _, _ = _with_one_flip(5)
    t = np.ones((2, 64), np.int8)
    t[1, 5] = 0
    W = TernaryWeight.from_int8(t)
    assert accuracy.check(np.array([130, 127], np.float32), x, None, W, activation="int8") is None
    assert str(accuracy.check(np.array([130, 128], np.float32), x, None, W, activation="int8")).startswith("y[1]")


def test_quantisation_of_the_float_path_would_be_found() -> None:
    """An outlier in a column that some rows ignore: int8 has lost the rest, the elementwise bound sees it."""
    case = Case(16, 576, 1, np.float32, "float")
    case.x[0, 3] = 1e4
    t = case.W.to_int8()
    t[:8, 3] = 0
    case.W = TernaryWeight.from_int8(t, case.W.scale)
    y = case.result()
    assert case.check(y) is None
    n = normalise(case.x, case.gamma, 1e-6)
    y[:, :8] = product(n, case.W, "int8")[:, :8]
    assert "8 of 16 elements wrong" in str(case.check(y))


# ---- the edges of a dtype -------------------------------------------------------------------------------------------


@every_activation
def test_overflow_to_infinity_is_right_where_the_reference_overflows(activation: str) -> None:
    x = np.ones(64, np.float16)
    W = TernaryWeight.from_int8(np.ones((3, 64), np.int8), np.array([2000, 500, -2000], np.float32))
    y = ternary_matmul(x, W, activation)
    assert list(y) == [np.inf, 32000, -np.inf]
    assert accuracy.check(y, x, None, W, activation=activation) is None
    assert accuracy.check(np.array([65504, 32000, -np.inf], np.float16), x, None, W, activation="int8") is not None
    assert accuracy.check(np.array([np.inf, 32000, np.inf], np.float16), x, None, W, activation=activation) is not None


@every_activation
def test_subnormal_results_pass(activation: str) -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float16)
    W = TernaryWeight.from_int8(np.ones((2, 64), np.int8), np.array([1e-8, 1e-7], np.float32))
    y = ternary_matmul(x, W, activation)
    assert accuracy.check(y, x, None, W, activation=activation) is None
    assert accuracy.check(y + np.float16(1e-6), x, None, W, activation=activation) is not None


@every_dtype
@every_activation
def test_a_zero_token_gives_the_residual(dtype: Any, activation: str) -> None:
    case = Case(10, 70, 2, dtype, activation, residual=True)
    case.x[0] = 0
    y = case.result()
    assert (y[0] == case.residual[0]).all()
    assert case.check(y) is None


def test_an_infinite_residual_arrives_as_it_is() -> None:
    case = Case(10, 70, 2, np.float16, "int8", residual=True)
    case.residual[1, 4] = np.inf
    y = case.result()
    assert case.check(y) is None
    y[1, 4] = 0
    assert str(case.check(y)).startswith("y[1, 4] is 0, expected inf")


def test_blocks_of_rows_give_the_same_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for activation in ("float", "int8"):
        case = Case(33, 100, 2, np.float32, activation)
        whole = accuracy.bound(case.x, case.gamma, case.W, activation=activation)
        monkeypatch.setattr(accuracy, "_BLOCK", 700)  # seven rows at a time
        parts = accuracy.bound(case.x, case.gamma, case.W, activation=activation)
        monkeypatch.undo()
        assert parts.reference == pytest.approx(whole.reference)
        assert parts.low == pytest.approx(whole.low)
        assert parts.high == pytest.approx(whole.high)
