"""The NumPy reference against plain formulas, written here a second time, in Python floats and with loops."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from edgellm_cupy import ArgumentTypeError, ArgumentValueError, EdgeLLMError, ModelConfig, TernaryWeight, reference
from edgellm_cupy.arguments import as_sequences, check_rmsnorm, check_ternary_matmul
from edgellm_cupy.formats import compact
from edgellm_cupy.formats.checkpoint import Checkpoint, Rows
from edgellm_cupy.formats.rotary import RopeScaling
from edgellm_cupy.reference import decoder
from edgellm_cupy.sampling import Sampling

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
BITNET = replace(GROUPED, name="bitnet", ffn_activation="relu2", sub_norms=True, tied_head=False, rms_eps=1e-2)
MIXED = replace(PLAIN, name="mixed", ffn_activation="relu2", tied_head=False)
CONFIGS = pytest.mark.parametrize("config", [GROUPED, PLAIN, BITNET, MIXED], ids=lambda c: c.name)
PROMPT = np.array([3, 17, 40, 3, 0, 29, 8])
PROMPTS = [PROMPT, PROMPT[:2], PROMPT[::-1][:5]]  # of different length


def checkpoint_of(config, seed=0, rows="int8"):
    """Random weights, with an embedding of unit size, so that the residual stream and each product both matter."""
    checkpoint, rng = Checkpoint.random(config, seed), np.random.default_rng(seed)
    shape = config.vocab_size, config.hidden_size
    embedding, head = (Rows.from_float(rng.standard_normal(shape, np.float32), rows) for _ in range(2))
    return replace(
        checkpoint,
        read_embedding=lambda: embedding,
        read_head=lambda: embedding if config.tied_head else head,
    )


def model_of(config, activation="float", seed=0, **options):
    return reference.TernaryTransformer(checkpoint_of(config, seed), activation, **options)


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


def plain_int8(vector):
    """What an int8 cache gives back of a key or a value."""
    scale = max(abs(v) for v in vector) / 127
    return [round(v / scale) * scale if scale else 0.0 for v in vector]


def plain_attention(qkv, config, stored=list, kept=None):
    """Causal grouped-query attention. qkv: one list of floats a token; the same comes back, of the queries' length.

    `stored` rounds a list as memory does, `kept` as the cache does (as memory, if it is None).
    """
    d, kv_first, v_first = config.head_dim, config.q_rows, config.q_rows + config.kv_rows
    kept = kept or stored
    result = []
    for position, token in enumerate(qkv):
        row = []
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            query = stored(plain_rotated(token[head * d : (head + 1) * d], position, config.rope_theta))
            weights = []
            for past in range(position + 1):
                key = qkv[past][kv_first + group * d : kv_first + (group + 1) * d]
                key = kept(plain_rotated(key, past, config.rope_theta))
                weights.append(math.exp(math.fsum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(d)))
            values = [kept(token[v_first + group * d : v_first + (group + 1) * d]) for token in qkv[: position + 1]]
            for i in range(d):
                total = math.fsum(w * value[i] for w, value in zip(weights, values, strict=True))
                row.append(total / math.fsum(weights))
        result.append(row)
    return result


def plain_logits(checkpoint, tokens, activation, dtype=None, kept=None, gate_stored=False):
    """Logits of the last position, float64 [V].

    `dtype`: what intermediate results are rounded to, where the GPU stores one; None: nothing. `gate_stored`: as if
    gate and up went through memory too, which they do not.
    """
    c = checkpoint.config
    unit = 2.0**-8 if c.sub_norms and c.ffn_activation == "relu2" else 1.0

    def stored(values):
        return [float(v) for v in (values if dtype is None else np.array(values).astype(dtype))]

    def product(n, W):
        return plain_product(n, W.to_int8(), np.broadcast_to(W.scale, W.shape[:1]), activation)

    def activated(v):
        return max(v, 0.0) ** 2 if c.ffn_activation == "relu2" else v / (1 + math.exp(-v))

    x = [stored(checkpoint.embedding.to_float(token)) for token in tokens]
    for layer in checkpoint.layers:
        qkv = [stored(product(plain_norm(v, layer.attn_norm, c.rms_eps), layer.qkv)) for v in x]
        for i, a in enumerate(plain_attention(qkv, c, stored, kept)):
            a = stored(a)
            if c.sub_norms:
                a = plain_norm(a, layer.attn_sub_norm, c.rms_eps)
            x[i] = stored([u + v for u, v in zip(x[i], product(a, layer.out), strict=True)])
        for i, v in enumerate(x):
            h = product(plain_norm(v, layer.ffn_norm, c.rms_eps), layer.up)
            if gate_stored:
                h = stored(h)
            gate, up = h[: c.intermediate_size], h[c.intermediate_size :]
            hidden = stored([activated(g) * u * unit for g, u in zip(gate, up or [1.0] * len(gate), strict=True)])
            if c.sub_norms:
                hidden = plain_norm([v / unit for v in hidden], layer.ffn_sub_norm, c.rms_eps)
            x[i] = stored([u + w for u, w in zip(v, product(hidden, layer.down), strict=True)])
    last = np.array(plain_norm(x[-1], checkpoint.final_norm, c.rms_eps))
    return checkpoint.head.to_float().astype(np.float64) @ last


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
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoder_rounds_what_the_gpu_stores_and_nothing_else(config, dtype):
    model = model_of(config, dtype=dtype, seed=2)  # no sum lies so close to a tie that float32 tips it
    logits = model.prefill(PROMPT[:4], model.new_cache(4))
    expected, not_rounded, rounded_twice = (
        plain_logits(model.checkpoint, PROMPT[:4], "float", **options)
        for options in ({"dtype": dtype}, {}, {"dtype": dtype, "gate_stored": True})
    )
    error = rms(logits - expected)
    assert error < 1e-5 * rms(expected)
    assert error < 0.02 * min(rms(not_rounded - expected), rms(rounded_twice - expected))


def test_squared_relu_does_not_overflow_float16():
    """A gate of 40 squared, times 40, is 64,000. Without the sub-norm nothing could take a factor out again."""
    config = replace(BITNET, num_layers=1)
    checkpoint = checkpoint_of(config)
    (layer,) = checkpoint.layers
    t, scale = layer.up.to_int8(), 40 * layer.up.scale
    large = replace(checkpoint, layers=[replace(layer, up=TernaryWeight.from_int8(t, scale * np.ones(1, np.float32)))])
    logits = {}
    for dtype in ("float16", "float32"):
        model = reference.TernaryTransformer(large, "float", dtype=dtype)
        logits[dtype] = model.prefill(PROMPT, model.new_cache(8))
    np.testing.assert_allclose(logits["float32"], plain_logits(large, PROMPT, "float"), rtol=1e-4, atol=1e-4)
    assert rms(logits["float16"] - logits["float32"]) < 2e-3 * rms(logits["float32"])
    bare = replace(config, sub_norms=False)
    model = reference.TernaryTransformer(
        replace(large, config=bare, layers=[replace(large.layers[0], attn_sub_norm=None, ffn_sub_norm=None)]),
        "float",
        dtype="float16",
    )
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(model.prefill(PROMPT, model.new_cache(8))).all()


def test_matrices_of_a_large_model_are_kept_small(monkeypatch):
    models = [model_of(GROUPED, "int8")]
    monkeypatch.setattr(decoder, "_FLOAT_WEIGHTS", 0)
    models.append(model_of(GROUPED, "int8"))
    assert [model._layers[0].qkv.values.dtype for model in models] == [np.float32, np.int8]
    logits = [model.prefill(PROMPT, model.new_cache(8)) for model in models]
    np.testing.assert_array_equal(*logits)


@CONFIGS
def test_float_matrices_in_place_of_ternary_ones(config):
    checkpoint = checkpoint_of(config)

    def dense(layer):
        products = {name: getattr(layer, name) for name in ("qkv", "out", "up", "down")}
        return replace(layer, **{name: w.to_int8() * w.scale.reshape(-1, 1) for name, w in products.items()})

    model = reference.TernaryTransformer(replace(checkpoint, layers=[dense(w) for w in checkpoint.layers]), "float")
    logits = model.prefill(PROMPT, model.new_cache(8))
    assert_close(logits, plain_logits(checkpoint, PROMPT, "float"), "float")


# ---- embedding and head ----


@pytest.mark.parametrize("config", [GROUPED, BITNET], ids=lambda c: c.name)
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("head", ["auto", "float32", "float16", "bfloat16", "int8"])
def test_head(config, stored, head):
    """Tied or separate, as stored or converted on demand, and the embedding with it."""
    checkpoint = checkpoint_of(config, rows=stored)
    model = reference.TernaryTransformer(checkpoint, "float", head=head)
    rows = (checkpoint.embedding, checkpoint.head)
    embedding, head_rows = rows if head == "auto" else (r.astype(head) for r in rows)
    assert model.head_dtype == (stored if head == "auto" else head)
    assert model.head_bytes == head_rows.nbytes
    same = replace(checkpoint, read_embedding=lambda: embedding, read_head=lambda: head_rows)
    logits = model.prefill(PROMPT[:3], model.new_cache(3))
    np.testing.assert_allclose(logits, plain_logits(same, PROMPT[:3], "float"), rtol=1e-4, atol=1e-4)


def test_heads_of_other_dtypes_are_other_heads():
    logits = []
    for head in ("float32", "float16", "bfloat16", "int8"):
        model = reference.TernaryTransformer(checkpoint_of(BITNET, rows="float32"), "float", head=head)
        logits.append(model.prefill(PROMPT, model.new_cache(8)))
    errors = [rms(other - logits[0]) / rms(logits[0]) for other in logits[1:]]
    for error, lowest, highest in zip(errors, (1e-5, 5e-4, 1e-3), (5e-4, 5e-3, 3e-2), strict=True):
        assert lowest < error < highest


# ---- steps ----


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
    tokens = greedy(model.checkpoint, PROMPT.tolist(), 6)
    assert list(model.generate(PROMPT, max_new_tokens=6)) == tokens
    assert all(isinstance(token, int) for token in model.generate(PROMPT.tolist(), max_new_tokens=1))
    assert list(model.generate(PROMPT, max_new_tokens=1)) == tokens[:1]
    assert list(model.generate(PROMPT, max_new_tokens=0)) == []


def greedy(checkpoint, prompt, count):
    """The greedy continuation, by loops: a whole forward pass a token."""
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(np.argmax(plain_logits(checkpoint, sequence, "float"))))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("config", [BITNET, MIXED], ids=lambda c: c.name)
@pytest.mark.parametrize("kind", [list, tuple, lambda prompts: [prompt.tolist() for prompt in prompts]])
def test_generate_continues_several_prompts(config, kind):
    model = model_of(config, seed=2)  # which does not go round in circles
    steps = list(model.generate(kind(PROMPTS), max_new_tokens=5))
    assert all(step.shape == (3,) and step.dtype == np.int32 for step in steps)
    assert np.stack(steps, axis=1).tolist() == [greedy(model.checkpoint, prompt, 5) for prompt in PROMPTS]


def test_generate_of_one_prompt_in_a_batch_yields_arrays():
    model = model_of(BITNET, seed=2)
    expected = [[token] for token in model.generate(PROMPT, 4)]
    for prompts in (PROMPT[None], [PROMPT], [PROMPT.tolist()]):
        assert [step.tolist() for step in model.generate(prompts, 4)] == expected


def test_generate_ends_before_a_stop_token():
    model = model_of(BITNET, seed=2)
    tokens = list(model.generate(PROMPT, 8))
    at = next(i for i in range(1, 8) if tokens[i] not in tokens[:i])
    for stop in ([tokens[at]], {tokens[at]}, np.array([1000, tokens[at]])):
        assert list(model.generate(PROMPT, 8, stop_tokens=stop)) == tokens[:at]
    assert list(model.generate(PROMPT, 8, stop_tokens=[tokens[0]])) == []
    assert list(model.generate(PROMPT, 8, stop_tokens=[1000])) == tokens


def test_generate_of_several_prompts_goes_on_until_all_have_ended():
    model = model_of(BITNET, seed=2)
    alone = [list(model.generate(prompt, 8)) for prompt in PROMPTS]
    stop = {alone[0][1], alone[2][4]}
    expected = []
    for tokens in alone:
        end = next((i for i, token in enumerate(tokens) if token in stop), 8)
        expected.append(tokens[:end])
    assert len({len(tokens) for tokens in expected}) > 1
    steps = list(model.generate(PROMPTS, 8, stop_tokens=stop))
    assert len(steps) == max(len(tokens) for tokens in expected)
    for tokens, got in zip(expected, np.stack(steps, axis=1).tolist(), strict=True):
        assert got == tokens + [-1] * (len(steps) - len(tokens))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"token_ids": [50]}, ArgumentValueError, "token_ids holds 50, expected 0 <= token < vocabulary = 50"),
        ({"token_ids": [[1], [2, 50]]}, ArgumentValueError, "token_ids holds 50, expected 0 <= token"),
        ({"token_ids": [[1], []]}, ArgumentValueError, "token_ids[1].shape is (0,), expected [N], N >= 1"),
        ({"token_ids": []}, ArgumentValueError, "token_ids: expected at least one token, as [N], [B, N] or"),
        ({"token_ids": np.zeros((0, 3), int)}, ArgumentValueError, "token_ids: expected at least one token"),
        ({"token_ids": "text"}, ArgumentTypeError, "token_ids: expected integers, got <U4"),
        ({"max_new_tokens": "3"}, ArgumentTypeError, "max_new_tokens: expected an integer, got str"),
        ({"max_new_tokens": 2.0}, ArgumentTypeError, "max_new_tokens: expected an integer, got float"),
        ({"max_new_tokens": -1}, ArgumentValueError, "max_new_tokens is -1, expected at least 0"),
        ({"sampling": {"top_k": 3}}, ArgumentTypeError, "sampling: expected a Sampling, got dict"),
        ({"stop_tokens": ["</s>"]}, ArgumentTypeError, "stop_tokens: expected integers, got str"),
    ],
)
def test_generate_refuses_at_once(arguments, error, message):
    with pytest.raises(error) as e:
        model_of(GROUPED).generate(**{"token_ids": PROMPT, **arguments})
    assert str(e.value).startswith(message)


# ---- sequences of different length ----


@CONFIGS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequences_of_different_length_are_each_what_they_are_alone(config, activation):
    model = model_of(config, activation)
    cache = model.new_cache(12, batch=3)
    alone = [model.new_cache(12) for _ in PROMPTS]
    logits = model.prefill(PROMPTS, cache)
    assert logits.shape == (3, config.vocab_size)
    for prompt, single, row in zip(PROMPTS, alone, logits, strict=True):
        assert_close(row, model.prefill(prompt, single), activation)
    assert cache.lengths == (7, 2, 5)
    assert cache.length == 7
    for token in ([4, 5, 6], [7, 7, 7]):
        following = model.decode_one_token(token, cache)
        for b, single in enumerate(alone):
            assert model.decode_one_token(token[b], single).tolist() == [following[b]]
            assert_close(cache.logits[b], single.logits[0], activation)
    # A second prompt goes behind each sequence's own end.
    logits = model.prefill([[1], [2, 3, 4, 5, 6, 7], [8, 9]], cache)
    for b, piece in enumerate(([1], [2, 3, 4, 5, 6, 7], [8, 9])):
        assert_close(logits[b], model.prefill(piece, alone[b]), activation)
    assert cache.lengths == (10, 10, 9)


def test_a_long_prompt_goes_in_pieces(monkeypatch):
    model = model_of(GROUPED)
    whole, pieces = model.new_cache(7, batch=3), model.new_cache(7, batch=3)
    expected = model.prefill(PROMPTS, whole)
    monkeypatch.setattr(decoder, "_TOKENS_AT_ONCE", 2)
    np.testing.assert_allclose(model.prefill(PROMPTS, pieces), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(pieces.keys, whole.keys, rtol=1e-4, atol=1e-5)
    assert pieces.lengths == whole.lengths


def test_truncation():
    """Cuts the longer sequences, leaves the shorter ones, and goes on where it cut."""
    model = model_of(GROUPED)
    cache = model.new_cache(12, batch=3)
    model.prefill(PROMPTS, cache)
    cache.truncate(4)
    assert cache.lengths == (4, 2, 4)
    model.decode_one_token([1, 2, 3], cache)
    for b, prompt in enumerate(PROMPTS):
        sequence = [*prompt[:4], b + 1]
        expected = plain_logits(model.checkpoint, sequence, "float")
        np.testing.assert_allclose(cache.logits[b], expected, rtol=1e-4, atol=1e-4)
    for length in (-1, 6):
        with pytest.raises(ArgumentValueError, match=f"length is {length}, expected 0 to the present 5"):
            cache.truncate(length)


@pytest.mark.parametrize(
    ("token_ids", "batch", "lengths"),
    [
        (5, 1, [1]),
        ([5], 1, [1]),
        ((5, 6), 1, [2]),
        (np.array([5, 6], np.uint8), 1, [2]),
        ([[5, 6]], 1, [2]),
        ([[5, 6], [7, 8]], 2, [2, 2]),
        ([[5, 6], [7]], 2, [2, 1]),
        ((np.array([5, 6]), [7]), 2, [2, 1]),
    ],
)
def test_as_sequences(token_ids, batch, lengths):
    rows = as_sequences(token_ids, batch)
    assert [row.shape for row in rows] == [(n,) for n in lengths]
    assert np.concatenate(rows).tolist() == list(range(5, 5 + sum(lengths)))


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([1, 2], ArgumentValueError, "token_ids.shape is (1, 2), expected [2, N] (batch 2), N >= 1"),
        ([[1], [2], [3]], ArgumentValueError, "token_ids.shape is (3, 1), expected [2, N]"),
        ([[], []], ArgumentValueError, "token_ids.shape is (2, 0), expected [2, N]"),
        ([[[1]], [[2]]], ArgumentValueError, "token_ids.shape is (2, 1, 1), expected [2, N]"),
        ([[1], [2, 3], [4]], ArgumentValueError, "token_ids holds 3 sequences, expected batch = 2"),
        ([[1], []], ArgumentValueError, "token_ids[1].shape is (0,), expected [N], N >= 1"),
        ([[1, 2], 3], ArgumentValueError, "token_ids[1].shape is (), expected [N], N >= 1"),
        ([[1, 2], [[3], [4]]], ArgumentValueError, "token_ids[1].shape is (2, 1), expected [N], N >= 1"),
        ([[1, 2], [[3], [4, 5]]], ArgumentValueError, "token_ids[1]: expected [N], a flat list of integers"),
        ([[1, 2], [3.5]], ArgumentTypeError, "token_ids: expected integers, got float64"),
        ([[1.0], [2.0]], ArgumentTypeError, "token_ids: expected integers, got float64"),
        ([[True], [False]], ArgumentTypeError, "token_ids: expected integers, got bool"),
    ],
)
def test_as_sequences_refuses(token_ids, error, message):
    with pytest.raises(error) as e:
        as_sequences(token_ids, 2)
    assert str(e.value).startswith(message)


def test_a_refused_step_changes_nothing():
    model = model_of(GROUPED)
    cache = model.new_cache(7, batch=3)
    model.prefill(PROMPTS, cache)
    before = cache.keys.copy(), cache.logits.copy(), cache.token.copy(), cache.seen.copy()
    for refused in ([[1], [2], [3]], [[1], [1] * 6, [1]]):  # a sequence is full; another one would be
        with pytest.raises(ArgumentValueError, match="do not fit max_len = 7"):
            model.prefill(refused, cache)
    with pytest.raises(ArgumentValueError, match="token_ids: 1 more after 7 do not fit max_len = 7"):
        model.decode_one_token([1, 2, 3], cache)
    with pytest.raises(ArgumentValueError, match="expected \\[3, N\\] \\(batch 3\\)"):
        model.decode_one_token([1, 2], cache)
    assert cache.lengths == (7, 2, 5)
    for array, copy in zip((cache.keys, cache.logits, cache.token, cache.seen), before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_cache_serves_its_own_model_only():
    a, b = model_of(GROUPED), model_of(GROUPED)
    with pytest.raises(ArgumentValueError, match="cache belongs to another model"):
        b.prefill(PROMPT, a.new_cache(8))


# ---- the cache's dtype ----


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_int8_cache_against_loops(dtype):
    model = model_of(GROUPED, dtype=dtype)
    cache = model.new_cache(8, dtype="int8")
    model.prefill(PROMPT[:3], cache)
    for token in PROMPT[3:]:
        model.decode_one_token(int(token), cache)
    options = {"dtype": None if dtype == "float32" else dtype}
    expected, full = (plain_logits(model.checkpoint, PROMPT, "float", **options, kept=k) for k in (plain_int8, None))
    assert rms(cache.logits[0] - expected) < 1e-5 * rms(expected)
    assert 1e-3 * rms(expected) < rms(full - expected) < 2e-2 * rms(expected)
    # Each vector is its own scale times whole numbers up to 127.
    keys = cache.keys[..., :7, :]
    units = keys / np.abs(keys).max(axis=-1, keepdims=True) * 127
    np.testing.assert_allclose(units, np.rint(units), atol=1e-4)


@pytest.mark.filterwarnings("error")
def test_int8_cache_of_a_zero_vector():
    model = model_of(GROUPED)
    (first, second) = model.checkpoint.layers
    nothing = TernaryWeight.from_int8(np.zeros(first.qkv.shape, np.int8))
    checkpoint = replace(model.checkpoint, layers=[replace(first, qkv=nothing), second])
    model = reference.TernaryTransformer(checkpoint, "float")
    cache = model.new_cache(8, dtype="int8")
    logits = model.prefill(PROMPT, cache)
    assert not cache.keys[0].any()
    np.testing.assert_allclose(logits, plain_logits(checkpoint, PROMPT, "float", kept=plain_int8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cache_of_the_dtype_of_the_model(dtype):
    model = model_of(GROUPED, dtype=dtype)
    cache = model.new_cache(12)
    model.prefill(PROMPT, cache)
    filled = model.new_cache(12)
    filled.fill_random(9)
    for array in (cache.keys, cache.values, filled.keys, filled.values):
        np.testing.assert_array_equal(array, array.astype(dtype).astype(np.float32))
        assert array.any()


def test_fill_random_quantises_an_int8_cache():
    model = model_of(GROUPED)
    cache, exact = model.new_cache(12, dtype="int8"), model.new_cache(12)
    cache.fill_random(9, seed=4)
    exact.fill_random(9, seed=4)
    for given, wanted in ((cache.keys, exact.keys), (cache.values, exact.values)):
        expected = [plain_int8(vector) for vector in wanted[..., :9, :].reshape(-1, GROUPED.head_dim).tolist()]
        np.testing.assert_allclose(given[..., :9, :].reshape(-1, GROUPED.head_dim), expected, rtol=1e-5, atol=1e-6)
        assert np.abs(given - wanted).max() > 1e-3


def test_new_cache_refuses():
    model = model_of(GROUPED)
    with pytest.raises(ArgumentValueError, match="dtype is 'float16', expected one of auto, float32, int8"):
        model.new_cache(8, dtype="float16")
    cache = model.new_cache(8, dtype="float32")
    for refused in (lambda: model.new_cache(8, sampling="greedy"), lambda: setattr(cache, "sampling", "greedy")):
        with pytest.raises(ArgumentTypeError, match="sampling: expected a Sampling, got str"):
            refused()


# ---- rotary variants ----


def test_positions_turn_as_the_scaling_says():
    """Linear with factor 2: every second position turns as the plain embedding's position at half of it."""
    config = replace(GROUPED, rope_scaling=RopeScaling("linear", 2.0))
    model, plain = model_of(config), model_of(GROUPED)
    scaled, unscaled = model.new_cache(13), plain.new_cache(13)
    tokens = np.full(13, 7)  # equal tokens have equal keys before the rotation, in the first layer
    model.prefill(tokens, scaled)
    plain.prefill(tokens, unscaled)
    np.testing.assert_allclose(scaled.keys[0, 0, :, ::2], unscaled.keys[0, 0, :, :7], rtol=1e-4, atol=1e-5)
    assert np.abs(scaled.keys[0] - unscaled.keys[0]).max() > 0.1


def test_attention_factor_scales_queries_and_keys():
    factors = {"short_factor": (1.0,) * 4, "long_factor": (1.0,) * 4}
    config = replace(GROUPED, rope_scaling=RopeScaling("longrope", 1.0, 64, attention_factor=1.5, **factors))
    model, plain = model_of(config), model_of(GROUPED)
    scaled, unscaled = model.new_cache(8), plain.new_cache(8)
    logits, other = model.prefill(PROMPT, scaled), plain.prefill(PROMPT, unscaled)
    np.testing.assert_allclose(scaled.keys[0], 1.5 * unscaled.keys[0], rtol=1e-5, atol=1e-6)
    assert rms(logits - other) > 1e-2 * rms(other)


def test_the_size_of_the_cache_chooses_the_factors_of_longrope():
    scaling = RopeScaling("longrope", 4.0, 16, short_factor=(1.0,) * 4, long_factor=(1.0, 2.0, 4.0, 8.0))
    model = model_of(replace(GROUPED, rope_scaling=scaling))
    short, same, long = (model.prefill(PROMPT, model.new_cache(size)) for size in (8, 16, 17))
    np.testing.assert_array_equal(short, same)
    assert rms(long - short) > 1e-3 * rms(short)


# ---- sampling ----


@pytest.fixture
def sampler(monkeypatch):
    """Stands in for reference/sampling.py: notes its arguments and answers with the smallest logit."""
    calls = []

    def sample(logits, sampling, seen, positions):
        calls.append((logits.copy(), sampling, seen.copy(), [int(p) for p in positions]))
        return logits.argmin(axis=1).astype(np.int32)

    monkeypatch.setattr(decoder, "draw", sample)
    return calls


def test_sampling_is_asked_for_each_next_token(sampler):
    model, sampling = model_of(GROUPED), Sampling(temperature=0.7, seed=3)
    cache = model.new_cache(12, batch=3, sampling=sampling)
    model.prefill(PROMPTS, cache)
    np.testing.assert_array_equal(cache.token, cache.logits.argmin(axis=1))
    first = cache.token.copy()
    following = model.decode_one_token(first, cache)
    np.testing.assert_array_equal(following, cache.logits.argmin(axis=1))
    assert [call[1] for call in sampler] == [sampling] * 2
    assert [call[3] for call in sampler] == [[7, 2, 5], [8, 3, 6]]  # where the new tokens will stand
    np.testing.assert_array_equal(sampler[1][0], cache.logits)
    for b, prompt in enumerate(PROMPTS):
        assert np.flatnonzero(sampler[0][2][b]).tolist() == sorted(set(prompt.tolist()))
        assert np.flatnonzero(sampler[1][2][b]).tolist() == sorted({*prompt.tolist(), int(first[b])})


def test_tokens_are_seen_until_the_cache_is_emptied(sampler):
    model = model_of(GROUPED)
    cache = model.new_cache(12, sampling=Sampling(repetition_penalty=1.5))
    model.prefill([1, 2, 3], cache)
    cache.truncate(1)
    model.prefill([4], cache)
    assert np.flatnonzero(sampler[-1][2][0]).tolist() == [1, 2, 3, 4]
    cache.truncate(0)
    model.prefill([5], cache)
    assert np.flatnonzero(sampler[-1][2][0]).tolist() == [5]


def test_sampling_may_be_set_between_two_tokens(sampler):
    model = model_of(GROUPED)
    cache = model.new_cache(12)
    model.prefill(PROMPT, cache)
    assert not sampler
    cache.sampling = Sampling(repetition_penalty=2.0)
    model.decode_one_token(1, cache)
    assert np.flatnonzero(sampler[0][2][0]).tolist() == sorted({*PROMPT.tolist(), 1})


def test_a_seed_repeats():
    model = model_of(BITNET)
    runs = [list(model.generate(PROMPT, 6, Sampling(temperature=2.0, seed=seed))) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert list(model.generate(PROMPT, 6, Sampling(temperature=2.0, top_k=1, seed=1))) == list(
        model.generate(PROMPT, 6)
    )


def test_a_penalty_keeps_tokens_from_coming_again():
    """The greedy tokens of this model go round in circles."""
    model = model_of(GROUPED)
    greedy = list(model.generate(PROMPT, 8))
    assert len(set(greedy)) < 8
    assert len({*PROMPT.tolist(), *model.generate(PROMPT, 8, Sampling(repetition_penalty=1000.0))}) == 6 + 8


def test_generate_samples(sampler):
    model, sampling = model_of(GROUPED), Sampling(temperature=1.0)
    tokens = list(model.generate(PROMPT, 3, sampling))
    assert tokens == [int(call[0].argmin()) for call in sampler]
    assert [call[3] for call in sampler] == [[7], [8], [9]]


def test_greedy_needs_no_sampler(sampler):
    model = model_of(GROUPED)
    assert list(model.generate(PROMPT, 3, Sampling(top_k=5, seed=1))) == list(model.generate(PROMPT, 3))
    assert not sampler


# ---- whole models ----


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
    for options, message in (
        ({"activation": "int4"}, "activation is 'int4', expected one of float, int8"),
        ({"dtype": "float64"}, "dtype is 'float64', expected one of auto, float16, bfloat16, float32"),
        ({"head": "int4"}, "head is 'int4', expected one of auto, int8, float16, bfloat16, float32"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            model_of(GROUPED, **options)
    with pytest.raises(ArgumentTypeError, match="checkpoint: expected a Checkpoint, got str"):
        reference.TernaryTransformer("model.safetensors")
    for max_len, batch, message in (
        (0, 1, "max_len is 0, expected at least 1"),
        (1, 0, "batch is 0, expected at least 1"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            model_of(GROUPED).new_cache(max_len, batch)
    with pytest.raises(ArgumentTypeError, match="max_len: expected an integer, got str"):
        model_of(GROUPED).new_cache("3")
