"""The NumPy reference against plain formulas, written here a second time, in Python floats and with loops."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy import ArgumentTypeError, ArgumentValueError, EdgeLLMError, ModelConfig, TernaryWeight, reference
from edgellm_cupy.arguments import check_rmsnorm, check_ternary_matmul
from edgellm_cupy.formats import compact
from edgellm_cupy.formats.checkpoint import Checkpoint, Rows

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
ACTIVATIONS = ["float", "int8"]
# One rounding to the dtype, of a value that was itself within an ulp of float64.
ROUNDING = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8, np.float32: 2.0**-24}


# ---- the formulas ---------------------------------------------------------------------------------------------------


def plain_norm(x, gamma, eps):
    """x / sqrt(mean(x**2) + eps) * gamma of one token, as a list of floats."""
    x = [float(v) for v in x]
    rms = math.sqrt(math.fsum(v * v for v in x) / len(x) + eps)
    return [v / rms * float(g) for v, g in zip(x, gamma, strict=True)]


def plain_quantised(n):
    """(q, step) of one token; Python's `round` takes half to even."""
    step = max(max(abs(v) for v in n), 1e-5) / 127
    return [round(v / step) for v in n], step


def plain_product(n, t, scale, activation):
    """scale * (t @ n) of one token, as a list of floats."""
    step = 1.0
    if activation == "int8":
        n, step = plain_quantised(n)
    sums = [math.fsum(int(c) * v for c, v in zip(row, n, strict=True)) for row in t]
    return [total * step * float(s) for total, s in zip(sums, scale, strict=True)]


def problem(n, m, k, dtype, seed=0):
    """x [N, K] and residual [N, M] of `dtype`, gamma float32 [K], a weight with a scale a row."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n, k)) * 3).astype(dtype)
    gamma = rng.uniform(-2, 2, k).astype(np.float32)
    W = TernaryWeight.from_int8(rng.integers(-1, 2, (m, k), dtype=np.int8), rng.uniform(0.1, 2, m).astype(np.float32))
    return x, gamma, W, rng.standard_normal((n, m)).astype(dtype)


def assert_rounded(y, expected, magnitude=None):
    """`y` is `expected` (floats) rounded to y's dtype once; `magnitude` of the terms that were summed, float64."""
    expected = np.array(expected)
    slack = 1e-13 * (np.abs(expected) if magnitude is None else np.array(magnitude))
    slack += float(ml_dtypes.finfo(y.dtype).smallest_subnormal) / 2
    error = np.abs(y.astype(np.float64) - expected)
    assert (error <= ROUNDING[y.dtype.type] * np.abs(expected) + slack).all(), error.max()


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 65), (3, 64), (5, 200)])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_rmsnorm(dtype, shape, eps):
    x, gamma, _, _ = problem(shape[0], 1, shape[1], dtype)
    y = reference.rmsnorm(x, gamma, eps)
    assert y.dtype == dtype
    assert_rounded(y, [plain_norm(token, gamma, eps) for token in x])
    np.testing.assert_array_equal(reference.rmsnorm(x[0], gamma, eps), y[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_takes_gamma_of_the_dtype_of_x(dtype):
    x, gamma, _, _ = problem(2, 1, 30, dtype)
    gamma = gamma.astype(dtype)
    assert_rounded(reference.rmsnorm(x, gamma), [plain_norm(token, gamma, 1e-6) for token in x])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m", "k"), [(1, 1, 1), (1, 7, 65), (3, 5, 64), (4, 33, 130)])
def test_ternary_matmul(n, m, k, dtype, activation):
    x, _, W, _ = problem(n, m, k, dtype)
    y = reference.ternary_matmul(x, W, activation)
    assert y.shape == (n, m)
    assert y.dtype == dtype
    t = W.to_int8()
    magnitude = np.abs(x).astype(np.float64) @ np.abs(t).T * W.scale
    assert_rounded(y, [plain_product(token.astype(float), t, W.scale, activation) for token in x], magnitude)
    np.testing.assert_array_equal(reference.ternary_matmul(x[0], W, activation), y[0])


@pytest.mark.parametrize("strategy", ["adaptive", "streaming", "separate"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rmsnorm_ternary_matmul(dtype, activation, with_residual, strategy):
    x, gamma, W, residual = problem(3, 9, 70, dtype)
    t = W.to_int8()
    y = reference.rmsnorm_ternary_matmul(
        x, gamma, W, 1e-5, activation, residual=residual if with_residual else None, strategy=strategy
    )
    normalised = [plain_norm(token, gamma, 1e-5) for token in x]
    expected = np.array([plain_product(n, t, W.scale, activation) for n in normalised])
    magnitude = np.abs(normalised) @ np.abs(t).T * W.scale
    if with_residual:
        expected, magnitude = expected + residual.astype(float), magnitude + np.abs(residual.astype(float))
    assert y.dtype == dtype
    assert_rounded(y, expected, magnitude)


def test_one_scale_for_the_matrix():
    x, _, W, _ = problem(2, 5, 20, np.float32)
    single = TernaryWeight.from_int8(W.to_int8(), 0.75)
    each = TernaryWeight.from_int8(W.to_int8(), np.full(5, 0.75, np.float32))
    for activation in ACTIVATIONS:
        expected = reference.ternary_matmul(x, each, activation)
        np.testing.assert_array_equal(reference.ternary_matmul(x, single, activation), expected)


def test_quantisation_takes_half_to_even():
    """absmax = 127 makes the step 1: each value is its own tie."""
    x = np.array([127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 126.5, -126.5], np.float32)
    identity = TernaryWeight.from_int8(np.eye(10, dtype=np.int8))
    expected = [127, 0, 2, 2, 4, 0, -2, -2, 126, -126]
    assert reference.ternary_matmul(x, identity, "int8").tolist() == expected


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_is_nan_and_leaves_the_others_alone(dtype, bad, activation):
    x, gamma, _, residual = problem(3, 6, 40, dtype)
    t = np.ones((6, 40), np.int8)
    t[0] = 0  # a row that ignores every feature
    t[1, 17] = 0  # a row that ignores just the bad one
    W = TernaryWeight.from_int8(t, 0.5)
    operations = (
        lambda x: reference.rmsnorm(x, gamma),
        lambda x: reference.ternary_matmul(x, W, activation),
        lambda x: reference.rmsnorm_ternary_matmul(x, gamma, W, activation=activation, residual=residual),
    )
    for operation in operations:
        good = operation(x)
        damaged = x.copy()
        damaged[1, 17] = bad
        y = operation(damaged)
        assert np.isnan(y[1].astype(np.float32)).all()
        np.testing.assert_array_equal(y[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("eps", [0, 1e-6])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_all_zero_token_gives_zeros(dtype, activation, eps):
    x, gamma, W, residual = problem(2, 6, 40, dtype)
    x[0] = 0
    assert not reference.rmsnorm(x, gamma, eps)[0].any()
    assert not reference.ternary_matmul(x, W, activation)[0].any()
    assert not reference.rmsnorm_ternary_matmul(x, gamma, W, eps, activation)[0].any()
    y = reference.rmsnorm_ternary_matmul(x, gamma, W, eps, activation, residual=residual)
    np.testing.assert_array_equal(y[0], residual[0])


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-30, 1e-40])
def test_rmsnorm_of_huge_and_tiny_values(size):
    """Squares that float32 cannot hold; with eps = 0 the scale of x drops out."""
    x, gamma, _, _ = problem(1, 1, 50, np.float32)
    x = x / np.abs(x).max() * np.float32(size)
    assert_rounded(reference.rmsnorm(x, gamma, 0.0), [plain_norm(x[0], gamma, 0.0)])


def test_tiny_tokens_are_quantised_with_the_floor():
    x = np.array([1e-7, -4e-7, 6e-8], np.float32)  # 127 / 1e-5 * x = 1.27, -5.08, 0.762
    y = reference.ternary_matmul(x, TernaryWeight.from_int8(np.eye(3, dtype=np.int8)), "int8")
    np.testing.assert_allclose(y, np.array([1, -5, 1]) * 1e-5 / 127, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_result_beyond_the_dtype_is_infinite():
    x = np.full(100, 60000, np.float16)
    W = TernaryWeight.from_int8(np.stack([np.ones(100, np.int8), -np.ones(100, np.int8)]))
    assert reference.ternary_matmul(x, W).tolist() == [np.inf, -np.inf]
    out = np.empty(2, np.float32)
    assert reference.ternary_matmul(x, W, out=out).tolist() == [6e6, -6e6]


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype, out_dtype):
    x, gamma, W, residual = problem(2, 6, 40, dtype)
    t = W.to_int8()
    normalised = [plain_norm(token, gamma, 1e-6) for token in x]

    out = np.full((2, 40), 99, out_dtype)
    assert reference.rmsnorm(x, gamma, out=out) is out
    assert_rounded(out, normalised)

    out = np.full((2, 6), 99, out_dtype)
    assert reference.ternary_matmul(x, W, out=out) is out
    expected = [plain_product(token.astype(float), t, W.scale, "float") for token in x]
    assert_rounded(out, expected, np.full((2, 6), 1e3))

    out = np.full((2, 6), 99, out_dtype)
    assert reference.rmsnorm_ternary_matmul(x, gamma, W, residual=residual, out=out) is out
    expected = [plain_product(n, t, W.scale, "float") for n in normalised] + residual.astype(float)
    assert_rounded(out, expected, np.full((2, 6), 1e3))


def test_out_may_be_the_residual():
    x, gamma, W, residual = problem(2, 6, 40, np.float32)
    expected = reference.rmsnorm_ternary_matmul(x, gamma, W, residual=residual)
    assert reference.rmsnorm_ternary_matmul(x, gamma, W, residual=residual, out=residual) is residual
    np.testing.assert_array_equal(residual, expected)


# ---- arguments ------------------------------------------------------------------------------------------------------

N, M, K = 2, 3, 4


def arguments(**changes):
    """A call of rmsnorm_ternary_matmul that is right but for `changes`."""
    right = {
        "x": np.ones((N, K), np.float32),
        "gamma": np.ones(K, np.float32),
        "W": TernaryWeight.from_int8(np.ones((M, K), np.int8)),
    }
    return right | changes


def zeros(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


X_ERRORS = [
    ({"x": [1.0] * K}, TypeError, "x: expected a NumPy array, got builtins.list"),
    ({"x": 1.0}, TypeError, "x: expected a NumPy array, got builtins.float"),
    ({"x": zeros((N, K), np.float64)}, TypeError, "x.dtype is float64, expected float16 or bfloat16 or float32"),
    ({"x": zeros((N, K), np.int8)}, TypeError, "x.dtype is int8, expected"),
    ({"x": zeros((K, N)).T}, ValueError, "x is not C-contiguous (shape (2, 4), strides (4, 8))"),
    ({"x": zeros((N, 2 * K))[:, ::2]}, ValueError, "x is not C-contiguous"),
    ({"x": zeros((1, N, K))}, ValueError, "x.shape is (1, 2, 4), expected [K] or [N, K] with N, K >= 1"),
    ({"x": zeros(())}, ValueError, "x.shape is (), expected [K] or [N, K]"),
    ({"x": zeros((0, K))}, ValueError, "x.shape is (0, 4), expected [K] or [N, K]"),
]
NORM_ERRORS = [
    ({"gamma": [1.0] * K}, TypeError, "gamma: expected a NumPy array, got builtins.list"),
    ({"gamma": zeros(K, np.float16)}, TypeError, "gamma.dtype is float16, expected float32"),
    (
        {"x": zeros((N, K), np.float16), "gamma": zeros(K, ml_dtypes.bfloat16)},
        TypeError,
        "gamma.dtype is bfloat16, expected float32 or float16",
    ),
    ({"gamma": zeros(2 * K)[::2]}, ValueError, "gamma is not C-contiguous"),
    ({"gamma": zeros(K + 1)}, ValueError, "gamma.shape is (5,), but x.shape[-1] is K = 4"),
    ({"gamma": zeros((1, K))}, ValueError, "gamma.shape is (1, 4), but x.shape[-1] is K = 4"),
    ({"eps": -1e-6}, ValueError, "eps is -1e-06, expected a finite number >= 0"),
    ({"eps": math.nan}, ValueError, "eps is nan, expected a finite number >= 0"),
    ({"eps": math.inf}, ValueError, "eps is inf, expected a finite number >= 0"),
    ({"eps": "1e-6"}, TypeError, "eps: expected a number, got str"),
    ({"eps": None}, TypeError, "eps: expected a number, got NoneType"),
]
PRODUCT_ERRORS = [
    ({"W": zeros((M, K))}, TypeError, "W: expected a TernaryWeight, got numpy.ndarray"),
    ({"W": None}, TypeError, "W: expected a TernaryWeight, got builtins.NoneType"),
    (
        {"W": TernaryWeight.from_int8(np.ones((M, K + 1), np.int8))},
        ValueError,
        "x.shape[-1] is 4, but the weight has K = 5",
    ),
    ({"activation": "int4"}, ValueError, "activation is 'int4', expected one of float, int8"),
    ({"activation": None}, ValueError, "activation is None, expected one of float, int8"),
    ({"out": zeros((N, K))}, ValueError, "out.shape is (2, 4), expected (2, 3)"),
    ({"out": zeros(M)}, ValueError, "out.shape is (3,), expected (2, 3)"),
    ({"out": zeros((N, M), np.float64)}, TypeError, "out.dtype is float64, expected float16 or bfloat16 or float32"),
    ({"out": [0.0]}, TypeError, "out: expected a NumPy array, got builtins.list"),
    ({"out": zeros((M, N)).T}, ValueError, "out is not C-contiguous"),
]
FUSED_ERRORS = [
    ({"residual": zeros((N, K))}, ValueError, "residual.shape is (2, 4), expected (2, 3)"),
    ({"residual": zeros((N, M), np.float16)}, TypeError, "residual.dtype is float16, expected float32"),
    ({"residual": [0.0]}, TypeError, "residual: expected a NumPy array, got builtins.list"),
    ({"strategy": "fast"}, ValueError, "strategy is 'fast', expected one of adaptive, streaming, separate"),
]


def assert_refused(operation, kwargs, error, message):
    with pytest.raises(error, match=re.escape(message)) as e:
        operation(**kwargs)
    assert isinstance(e.value, EdgeLLMError)
    assert str(e.value).startswith(message)


@pytest.mark.parametrize(("changes", "error", "message"), X_ERRORS + NORM_ERRORS + PRODUCT_ERRORS + FUSED_ERRORS)
def test_rmsnorm_ternary_matmul_refuses(changes, error, message):
    assert_refused(reference.rmsnorm_ternary_matmul, arguments(**changes), error, message)


@pytest.mark.parametrize(("changes", "error", "message"), X_ERRORS + PRODUCT_ERRORS)
def test_ternary_matmul_refuses(changes, error, message):
    kwargs = arguments(**changes)
    del kwargs["gamma"]
    assert_refused(reference.ternary_matmul, kwargs, error, message)


@pytest.mark.parametrize(("changes", "error", "message"), X_ERRORS + NORM_ERRORS)
def test_rmsnorm_refuses(changes, error, message):
    kwargs = arguments(**changes)
    del kwargs["W"]
    assert_refused(reference.rmsnorm, kwargs, error, message)


def test_rmsnorm_refuses_a_wrong_out():
    x, gamma = arguments()["x"], arguments()["gamma"]
    assert_refused(reference.rmsnorm, {"x": x, "gamma": gamma, "out": zeros((N, M))}, ValueError, "out.shape is (2, 3)")
    assert_refused(reference.rmsnorm, {"x": x, "gamma": gamma, "out": x}, ValueError, "out overlaps x in memory")


def test_out_may_not_overlap_an_input():
    memory = np.ones(100, np.float32)
    right = arguments(x=memory[: N * K].reshape(N, K), gamma=memory[20 : 20 + K], residual=memory[40:46].reshape(N, M))
    for start, name in ((7, "x"), (23, "gamma"), (41, "residual"), (35, "residual")):
        out = memory[start : start + N * M].reshape(N, M)
        assert_refused(
            reference.rmsnorm_ternary_matmul, right | {"out": out}, ValueError, f"out overlaps {name} in memory"
        )
    for start in (8, 24, 34, 46, 40):  # beside each of them, and exactly the residual
        out = memory[start : start + N * M].reshape(N, M)
        reference.rmsnorm_ternary_matmul(**right, out=out)
    half = memory[40:46].view(np.float16)[: N * M].reshape(N, M)
    assert_refused(reference.rmsnorm_ternary_matmul, right | {"out": half}, ValueError, "out overlaps residual")


def test_a_refused_call_writes_nothing():
    out = np.full((N, M), 99, np.float32)
    with pytest.raises(ArgumentValueError):
        reference.rmsnorm_ternary_matmul(**arguments(out=out, strategy="fast"))
    assert (out == 99).all()


class _OnDevice:
    """Looks like a CuPy array to checks, which ask only for type and attributes."""

    __module__ = "cupy"
    __cuda_array_interface__: dict = {}  # noqa: RUF012

    def __init__(self, a):
        self._array = a

    def __getattr__(self, name):
        return getattr(self._array, name)


def test_host_and_device_do_not_mix():
    """The same checks serve CuPy arrays; here a stand-in plays one, so that no GPU is needed."""
    x, gamma, host = arguments()["x"], arguments()["gamma"], arguments()["W"]
    device = TernaryWeight(_OnDevice(host.packed), _OnDevice(host.scale), host.shape)
    message = "W is a device weight, but x is a numpy array: call W.to_host() first"
    assert_refused(reference.ternary_matmul, {"x": x, "W": device}, TypeError, message)
    with pytest.raises(ArgumentTypeError, match=r"W is a host weight, but x is a cupy array: call W.to_device"):
        check_ternary_matmul(_OnDevice, _OnDevice(x), host, "float", None)
    with pytest.raises(ArgumentTypeError, match=r"x: expected a CuPy array, got numpy.ndarray .*cupy.from_dlpack"):
        check_rmsnorm(_OnDevice, x, gamma, 1e-6, None)


# ---- the decoder ----------------------------------------------------------------------------------------------------

GROUPED = ModelConfig(
    name="grouped",
    num_layers=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=50,
    rope_theta=100.0,
)
PLAIN = ModelConfig(
    name="plain",
    num_layers=3,
    hidden_size=30,
    intermediate_size=40,
    num_heads=3,
    num_kv_heads=3,
    head_dim=10,
    vocab_size=41,
    gated=False,
)
CONFIGS = pytest.mark.parametrize("config", [GROUPED, PLAIN], ids=lambda c: c.name)
PROMPT = np.array([3, 17, 40, 3, 0, 29, 8])


def model_of(config, activation="float", seed=0):
    """Random weights, with an embedding of unit size, so that the residual stream and each product both matter."""
    checkpoint = Checkpoint.random(config, seed)
    embedding = np.random.default_rng(seed).standard_normal((config.vocab_size, config.hidden_size))
    rows = Rows.from_float(embedding.astype(np.float32), "int8")
    checkpoint = Checkpoint(
        config, checkpoint.layers, checkpoint.final_norm, checkpoint.source, lambda: rows, lambda: rows
    )
    return reference.TernaryTransformer(checkpoint, activation)


def plain_rotated(head, position, theta):
    """The first half of a head against the second: pair i turns by position * theta**(-2i / d)."""
    half = len(head) // 2
    turned = [0.0] * len(head)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(head))
        a, b = float(head[i]), float(head[half + i])
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[half + i] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def plain_attention(qkv, config):
    """Causal grouped-query attention. qkv: one list of floats a token; the same comes back, of the queries' length."""
    d, kv_first, v_first = config.head_dim, config.q_rows, config.q_rows + config.kv_rows
    result = []
    for position, token in enumerate(qkv):
        row = []
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            query = plain_rotated(token[head * d : (head + 1) * d], position, config.rope_theta)
            weights = []
            for past in range(position + 1):
                key = qkv[past][kv_first + group * d : kv_first + (group + 1) * d]
                key = plain_rotated(key, past, config.rope_theta)
                weights.append(math.exp(math.fsum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(d)))
            for i in range(d):
                values = [qkv[past][v_first + group * d + i] for past in range(position + 1)]
                row.append(math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights))
        result.append(row)
    return result


def plain_logits(checkpoint, tokens, activation):
    """Logits of the last position, float64 [V]."""
    c, table = checkpoint.config, checkpoint.embedding

    def product(n, W):
        return plain_product(n, W.to_int8(), np.broadcast_to(W.scale, W.shape[:1]), activation)

    def silu(v):
        return v / (1 + math.exp(-v))

    x = [table.to_float(token).astype(np.float64) for token in tokens]
    for layer in checkpoint.layers:
        attended = plain_attention([product(plain_norm(v, layer.attn_norm, c.rms_eps), layer.qkv) for v in x], c)
        x = [v + np.array(product(a, layer.out)) for v, a in zip(x, attended, strict=True)]
        for i, v in enumerate(x):
            h = product(plain_norm(v, layer.ffn_norm, c.rms_eps), layer.up)
            gate, up = h[: c.intermediate_size], h[c.intermediate_size :]
            hidden = [silu(g) * u for g, u in zip(gate, up or [1.0] * len(gate), strict=True)]
            x[i] = v + np.array(product(hidden, layer.down))
    last = np.array(plain_norm(x[-1], checkpoint.final_norm, c.rms_eps))
    return table.to_float().astype(np.float64) @ last


def rms(a):
    return np.sqrt(np.mean(np.square(a, dtype=np.float64)))


def assert_close(actual, expected, activation):
    """Equal up to float32 arithmetic in another order.

    With int8 a value near a tie may then be rounded the other way, which changes a thousandth of the whole;
    quantisation itself changes a hundredth.
    """
    if activation == "float":
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    else:
        assert rms(actual - expected) < 2e-3 * rms(expected)


@CONFIGS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_decoder_against_loops(config, activation):
    model = model_of(config, activation)
    logits = model.prefill(PROMPT, model.new_cache(16))
    assert logits.shape == (config.vocab_size,)
    assert logits.dtype == np.float32
    plain = {a: plain_logits(model.checkpoint, PROMPT, a) for a in ACTIVATIONS}
    assert_close(logits, plain[activation], activation)
    assert rms(plain["float"] - plain["int8"]) > 4e-3 * rms(plain["float"]), "the two must not pass for each other"


@CONFIGS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [6, 1], [1, 6]], ids=str)
def test_prefill_in_pieces(config, activation, pieces):
    model = model_of(config, activation)
    whole, parts = model.new_cache(7), model.new_cache(20)
    expected = model.prefill(PROMPT, whole)
    start = 0
    for size in pieces:
        logits = model.prefill(PROMPT[start : start + size], parts)
        start += size
        assert parts.length == start
    assert_close(logits, expected, activation)
    assert_close(parts.keys[..., :7, :], whole.keys, activation)
    assert_close(parts.values[..., :7, :], whole.values, activation)
    assert not parts.keys[..., 7:, :].any()


@CONFIGS
def test_decoding_equals_prefill(config):
    model = model_of(config)
    expected, cache = model.prefill(PROMPT, model.new_cache(7)), model.new_cache(7)
    for token in PROMPT:
        following = model.decode_one_token(int(token), cache)
    np.testing.assert_allclose(cache.logits[0], expected, rtol=1e-4, atol=1e-4)
    assert following.dtype == np.int32
    assert following.tolist() == [int(np.argmax(expected))]


def test_a_long_prefill_is_worked_off_in_blocks():
    """More queries than are held at once, and not a multiple of them."""
    model = model_of(GROUPED)
    tokens = np.random.default_rng(1).integers(0, GROUPED.vocab_size, 600)
    whole, pieces = model.new_cache(600), model.new_cache(600)
    expected = model.prefill(tokens, whole)
    for piece in np.array_split(tokens, 7):
        logits = model.prefill(piece, pieces)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


@CONFIGS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_batch_is_its_sequences(config, activation):
    model = model_of(config, activation)
    prompts = np.stack([PROMPT, PROMPT[::-1]])
    cache = model.new_cache(10, batch=2)
    logits = model.prefill(prompts, cache)
    assert logits.shape == (2, config.vocab_size)
    tokens = model.sample(logits)
    following = model.decode_one_token(tokens, cache)
    for row, prompt in enumerate(prompts):
        alone = model.new_cache(10)
        assert_close(logits[row], model.prefill(prompt, alone), activation)
        assert model.decode_one_token(tokens[row], alone).tolist() == [following[row]]
        assert_close(cache.logits[row], alone.logits[0], activation)


@CONFIGS
def test_generate_is_greedy(config):
    model = model_of(config)
    sequence = PROMPT.tolist()
    for _ in range(6):
        sequence.append(int(np.argmax(plain_logits(model.checkpoint, sequence, "float"))))
    assert list(model.generate(PROMPT, max_new_tokens=6)) == sequence[len(PROMPT) :]
    assert list(model.generate(PROMPT, max_new_tokens=1)) == sequence[len(PROMPT) : len(PROMPT) + 1]
    assert list(model.generate(PROMPT, max_new_tokens=0)) == []


def test_sample_takes_the_lowest_index_among_equals():
    logits = np.array([[0, 3, 3, 1], [2, 2, 2, 2]], np.float32)
    assert reference.TernaryTransformer.sample(logits).tolist() == [1, 0]
    assert reference.TernaryTransformer.sample(logits[0]).tolist() == [1]


def test_random_models_repeat():
    logits = []
    for seed in (1, 1, 2):
        model = reference.TernaryTransformer.random(GROUPED, seed)
        logits.append(model.prefill(PROMPT, model.new_cache(8)))
    np.testing.assert_array_equal(logits[0], logits[1])
    assert not np.array_equal(logits[0], logits[2])


def test_from_pretrained(tmp_path):
    pytest.importorskip("safetensors", reason="the extra `models` is not installed")
    model = model_of(GROUPED, "int8")
    compact.write(model.checkpoint, tmp_path / "model.safetensors")
    again = reference.TernaryTransformer.from_pretrained(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.prefill(PROMPT, again.new_cache(8)), model.prefill(PROMPT, model.new_cache(8)))


def test_fill_random():
    model = model_of(GROUPED)
    cache, same = model.new_cache(12), model.new_cache(12)
    cache.fill_random(9, seed=4)
    same.fill_random(9, seed=4)
    assert cache.length == 9
    np.testing.assert_array_equal(cache.keys, same.keys)
    assert cache.keys[..., :9, :].std() > 0.5
    assert not cache.keys[..., 9:, :].any()
    assert np.isfinite(model.prefill(PROMPT[:3], cache)).all()
    assert cache.length == 12
    for length in (-1, 13):
        with pytest.raises(ArgumentValueError, match=f"length is {length}, but the cache holds max_len = 12"):
            cache.fill_random(length)


def test_cache_size():
    cache = model_of(GROUPED).new_cache(12, batch=3)
    assert cache.nbytes == 2 * 4 * GROUPED.num_layers * 3 * GROUPED.num_kv_heads * 12 * GROUPED.head_dim


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([50], "token_ids holds 50, expected 0 <= token < vocabulary = 50"),
        ([1, -1], "token_ids holds -1, expected 0 <= token"),
        ([1] * 9, "token_ids: 9 more after 0 do not fit max_len = 8"),
        ([], "token_ids.shape is (1, 0), expected [1, N] (batch 1), N >= 1"),
        ([[1], [2]], "token_ids.shape is (2, 1), expected [1, N] (batch 1)"),
        ([[[1]]], "token_ids.shape is (1, 1, 1), expected [1, N]"),
    ],
)
def test_prefill_refuses(tokens, message):
    model = model_of(GROUPED)
    cache = model.new_cache(8)
    with pytest.raises(ArgumentValueError, match=re.escape(message)):
        model.prefill(tokens, cache)
    with pytest.raises(ArgumentTypeError, match="token_ids: expected integers, got float64"):
        model.prefill([1.0], cache)
    assert cache.length == 0


def test_decoding_refuses_a_full_cache():
    model = model_of(GROUPED)
    cache = model.new_cache(7)
    model.prefill(PROMPT, cache)
    with pytest.raises(ArgumentValueError, match="token_ids: 1 more after 7 do not fit max_len = 7"):
        model.decode_one_token(1, cache)


def test_model_refuses():
    with pytest.raises(ArgumentValueError, match="activation is 'int4', expected one of float, int8"):
        model_of(GROUPED, "int4")
    for max_len, batch, message in (
        (0, 1, "max_len is 0, expected at least 1"),
        (1, 0, "batch is 0, expected at least 1"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            model_of(GROUPED).new_cache(max_len, batch)
    with pytest.raises(ArgumentTypeError, match="max_len: expected an integer, got str"):
        model_of(GROUPED).new_cache("3")
