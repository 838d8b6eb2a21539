"""Is a result right? The one error metric of tests, `edgellm verify` and the benchmark.

A result is compared with the operation in float64. Positions of NaN come first; then every element has to lie between
the lowest and the highest value that a correct implementation may return:

- ``float`` activation (and RMSNorm alone): abs(y - ref) <= c * (scale * (abs(t) @ abs(n)) + abs(residual)), n the
  normalised activation, c = 1e-5, 2e-3 or 8e-3 for float32, float16 or bfloat16, whichever of x and y is coarser.
- ``int8``: the sums of the quantised activation are exact integers, so all that may differ is float32 arithmetic of
  the scales, the last rounding to y's dtype, and a quantised value that may go to either side of a tie when its exact
  value lies within float32 error of one.

Rounding is monotone, so ``low <= v <= high`` before the rounding to y's dtype is ``round(low) <= y <= round(high)``
after it. That covers subnormal results and overflow to infinity without cases of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ..arguments import BFLOAT16, FLOAT16, FLOAT32
from ..formats import packing
from ..formats.ternary import TernaryWeight
from .ops import normalise, quantise

FLOAT_TOLERANCE = {FLOAT32: 1e-5, FLOAT16: 2e-3, BFLOAT16: 8e-3}

# x * gamma, the absmax, 127 / absmax and their product are a handful of float32 roundings (2**-24 each); where the
# floor of the absmax acts, the float32 mean of the squares adds its own. 64 of them leave room for both.
_TIE_RELATIVE = 64 * 2.0**-24
# The same for the scales: the mean of the squares, rsqrtf (2 ulp), / 127, * scale, * sum.
_SCALE_RELATIVE = 16 * 2.0**-24
_SMALLEST_NORMAL = 2.0**-126  # kernels are compiled with -ftz=true: float32 below this is zero

_BLOCK = 1 << 22  # weights unpacked at a time: 32 MB as float64, whatever the size of the matrix


@dataclass(frozen=True)
class Bound:
    """What a correct result may be, element by element.

    Attributes:
        reference: float64, y's shape, NaN where y has to be NaN.
        low, high: float64, the smallest and the largest correct value.
        what: the problem in words, for messages.
    """

    reference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    what: str

    def check(self, y: np.ndarray) -> str | None:
        """None when `y` (the dtype and shape that the bound was made for) is right, else the worst element."""
        if y.shape != self.reference.shape:
            return f"y.shape is {y.shape}, expected {self.reference.shape} ({self.what})"
        value = y.astype(np.float64)
        wrong_nan = np.isnan(value) != np.isnan(self.reference)
        if wrong_nan.any():
            at = np.unravel_index(int(wrong_nan.argmax()), y.shape)
            expected = "NaN" if np.isnan(self.reference[at]) else f"{self.reference[at]:.8g}"
            return f"{_name(at)} is {value[at]:.8g}, expected {expected}; {_count(wrong_nan)} ({self.what})"
        with np.errstate(invalid="ignore"):  # inf - inf: an infinity where one is expected, none of it outside
            outside = np.nan_to_num(np.maximum(self.low - value, value - self.high), nan=0.0, posinf=np.inf)
        wrong = outside > 0
        if not wrong.any():
            return None
        at = np.unravel_index(int(outside.argmax()), y.shape)
        return (
            f"{_name(at)} is {value[at]:.9g}, expected {self.low[at]:.9g} to {self.high[at]:.9g} (reference "
            f"{self.reference[at]:.9g}, error {abs(value[at] - self.reference[at]):.3g}); {_count(wrong)} ({self.what})"
        )


def check(
    y: np.ndarray,
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    W: TernaryWeight | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "float",
    residual: np.ndarray | None = None,
) -> str | None:
    """None when `y` is right, else a message with the worst element, its error, its bound and the shape.

    The arguments are those of :func:`bound`, on the host.
    """
    return bound(x, gamma, W, eps=eps, activation=activation, residual=residual, dtype=y.dtype).check(y)


def bound(
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    W: TernaryWeight | None = None,
    *,
    eps: float = 1e-6,
    activation: str = "float",
    residual: np.ndarray | None = None,
    dtype: np.dtype | type | None = None,
) -> Bound:
    """The correct results of `rmsnorm`, `ternary_matmul` or `rmsnorm_ternary_matmul`.

    Args:
        x: float16, bfloat16 or float32 [K] or [N, K].
        gamma: [K], or None for a product without RMSNorm.
        W: host weight [M, K], or None for RMSNorm alone.
        residual: [M] or [N, M], or None.
        dtype: y's dtype; x's when missing.
    """
    dtype = np.dtype(x.dtype if dtype is None else dtype)
    n = x.astype(np.float64) if gamma is None else normalise(x, gamma, eps)
    finite = np.isfinite(n).all(axis=-1, keepdims=True)
    n = np.where(finite, n, 0.0)
    coarser = max(FLOAT_TOLERANCE[x.dtype], FLOAT_TOLERANCE[dtype])
    what = f"x {x.dtype} {x.shape}" + ("" if W is None else f", W {W.shape}, {activation}") + f", y {dtype}"

    if W is None:
        reference, slack, rounds = n, coarser * np.abs(n), False
    elif activation == "int8":
        reference, slack = _int8_product(n, W)
        rounds = True
    else:
        reference, magnitude = _float_product(n, W)
        slack, rounds = coarser * magnitude, False
    if residual is not None:
        addend = residual.astype(np.float64)
        reference = reference + addend
        slack = slack + (2.0**-23 if rounds else coarser) * np.abs(addend)
    return _limits(np.where(finite, reference, np.nan), slack, dtype, rounds, what)


# ---- float64 products, a block of rows at a time --------------------------------------------------------------------


def _float_product(n: np.ndarray, W: TernaryWeight) -> tuple[np.ndarray, np.ndarray]:
    """scale * (t @ n) and abs(scale) * (abs(t) @ abs(n)), each [..., M]."""
    reference, magnitude = np.empty((2, *n.shape[:-1], W.shape[0]))
    for rows, t in _blocks(W):
        reference[..., rows] = n @ t.T
        magnitude[..., rows] = np.abs(n) @ np.abs(t).T
    return reference * W.scale, magnitude * np.abs(W.scale)


def _int8_product(n: np.ndarray, W: TernaryWeight) -> tuple[np.ndarray, np.ndarray]:
    """scale * step * (t @ q), and by how much float32 scales and values near a tie may change it; each [..., M]."""
    q, step, exact = quantise(n)
    to_tie = np.abs(np.abs(exact) % 1.0 - 0.5)
    may_flip = to_tie <= _TIE_RELATIVE * np.abs(exact)
    columns = may_flip.reshape(-1, W.shape[1]).any(axis=0)
    q, flips = q.astype(np.float64), may_flip[..., columns].astype(np.float64)
    total, flipped = np.empty((2, *n.shape[:-1], W.shape[0]))
    for rows, t in _blocks(W):
        total[..., rows] = q @ t.T
        flipped[..., rows] = flips @ np.abs(t[:, columns]).T
    unit = step * W.scale
    return total * unit, (flipped + _SCALE_RELATIVE * np.abs(total)) * np.abs(unit)


def _blocks(W: TernaryWeight) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice of rows, t of these rows as float64)."""
    m, k = W.shape
    height = max(1, _BLOCK // k)
    for start in range(0, m, height):
        rows = slice(start, min(start + height, m))
        yield rows, packing.unpack(W.packed[rows], k, np).astype(np.float64)


def _limits(reference: np.ndarray, slack: np.ndarray, dtype: np.dtype, rounds: bool, what: str) -> Bound:
    """`rounds`: the slack holds before the rounding to y's dtype; else it holds for y, the rounding included."""

    def to_y(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float64)

    known = np.isfinite(reference)  # an infinite residual has to arrive as it is
    # A result in the subnormal range of y's dtype is off by half a step of that range, however exact it was before.
    slack = np.where(known, slack + max(_SMALLEST_NORMAL, float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2), 0.0)
    low, high = reference - slack, reference + slack
    with np.errstate(over="ignore", invalid="ignore"):
        rounded_low, rounded_high = to_y(low), to_y(high)
    if rounds:
        return Bound(reference, rounded_low, rounded_high, what)
    # Infinity is right where a value within the bound rounds to it.
    low = np.where(np.isneginf(rounded_low), rounded_low, low)
    high = np.where(np.isposinf(rounded_high), rounded_high, high)
    return Bound(reference, low, high, what)


def _name(at: tuple[np.intp, ...]) -> str:
    return f"y[{', '.join(str(int(i)) for i in at)}]"


def _count(wrong: np.ndarray) -> str:
    return f"{int(wrong.sum())} of {wrong.size} elements wrong"
