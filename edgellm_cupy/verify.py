"""`edgellm verify`: every kernel against the reference, on the GPU of this machine.

The cases reach every specialisation that dispatch can choose on this device; one that none of them reached is a failure
too. Outputs are poisoned, inputs random, with the values that break kernels mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import ops
from .arguments import ACTIVATIONS, BFLOAT16, DTYPES, FLOAT16, FLOAT32
from .formats.checkpoint import Checkpoint
from .formats.config import PRESETS, ModelConfig
from .formats.ternary import TernaryWeight
from .kernels import load, loaded
from .model.decoder import TernaryTransformer
from .ops import enqueue
from .reference import TernaryTransformer as ReferenceTransformer
from .reference.accuracy import check
from .reference.sampling import sample
from .runtime import require_gpu
from .sampling import Sampling
from .tuning import FLOOR_THREADS, dispatch, floor_spec, specialisations
from .tuning.decoder import SAMPLE, SAMPLE_THREADS
from .tuning.device import DeviceFacts, current_facts
from .tuning.gemm import GemmConfig
from .tuning.product import ProductConfig, largest_k


@dataclass(frozen=True)
class DecoderCase:
    """One kind of decoder. tolerance: largest error of a logit over the largest logit, two layers.

    The reference rounds its intermediate results to the same dtype. What remains is float32 rounding, which now and
    then tips a result over to the next number of that dtype, and an int8 activation, key or value over a tie, by
    1 / 127 of the absmax; that tips others after it. The products themselves are checked exactly.
    """

    dtype: str
    activation: str
    head: str
    kv_dtype: str
    tolerance: float

    def __str__(self) -> str:
        return f"{self.dtype}, {self.activation} activations, {self.head} head, {self.kv_dtype} cache"


DECODER_CASES = (
    DecoderCase("float32", "float", "float32", "auto", 6e-6),
    DecoderCase("float32", "float", "int8", "int8", 2e-3),
    DecoderCase("float32", "int8", "float32", "auto", 0.1),
    DecoderCase("float16", "float", "float16", "auto", 3e-3),
    DecoderCase("float16", "float", "int8", "int8", 1.5e-2),
    DecoderCase("float16", "int8", "float16", "auto", 0.1),
    DecoderCase("bfloat16", "float", "bfloat16", "auto", 2.5e-2),
    DecoderCase("bfloat16", "float", "int8", "int8", 2.5e-2),
)
"""Two to three times what an H200 made of the three presets behind prompts of 300 tokens."""

_VOCABULARY = 1000
_PROMPTS = ((200, 200), (100, 37))  # tokens of two sequences: side by side, then one after the other behind those
_TOKENS = ((5, 999), (0, 7))
_DEEP = 2500  # a context that takes more blocks than one cluster a head
_SAMPLINGS = (
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=2),
    Sampling(temperature=2.0, top_k=900, seed=3),
    Sampling(temperature=1.0, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=4),
    Sampling(repetition_penalty=1.5),
)
_VOCABULARIES = (49152, 128256)


@dataclass(frozen=True)
class Case:
    """One problem for the operations. choice: a strategy, or a configuration whatever dispatch would choose."""

    m: int
    n: int
    k: int
    dtype: Any
    gamma_dtype: Any
    activation: str
    choice: str | dispatch.Config

    def __str__(self) -> str:
        return f"M={self.m} N={self.n} K={self.k} {self.dtype}/{self.gamma_dtype} {self.activation} {self.choice}"


def cases(device: DeviceFacts) -> Iterator[Case]:
    """What dispatch chooses, then every enumerated configuration that this device can run, on shapes that no tile
    divides."""
    for n, m, k in (
        (1, 61, 572),
        (1, 63, 2300),
        (2, 61, 1100),
        (3, 70, 575),
        (5, 35, 1028),
        (9, 61, 577),
        (40, 70, 300),
    ):
        for dtype in DTYPES:
            for activation in ACTIVATIONS:
                for strategy in ("streaming", "separate", "adaptive"):
                    yield Case(m, n, k, dtype, FLOAT32 if n % 2 else dtype, activation, strategy)
    for n, k in ((1, 577), (3, 1101), (1, 1100), (2, 604)):  # the first two: rows that are aligned for scalars only
        for dtype in DTYPES:
            for gamma_dtype in dict.fromkeys((FLOAT32, dtype)):
                for activation in ACTIVATIONS:
                    yield from (
                        Case(37, n, length, dtype, gamma_dtype, activation, config)
                        for config, length in _configurations(n, k, dtype, activation, device)
                    )
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            problem = dispatch.Problem(150, 70, 700, str(dtype), "float32", True, activation)
            for config in dispatch.candidates(problem, device):
                if isinstance(config, GemmConfig):
                    yield Case(150, 70, 700, dtype, FLOAT32, activation, config)
    yield Case(1, 1, 1, FLOAT16, FLOAT16, "int8", "adaptive")
    yield Case(3, 70, 64, BFLOAT16, BFLOAT16, "float", "adaptive")
    yield Case(5, 2, 100_003, FLOAT32, FLOAT32, "float", "streaming")  # activations that do not fit shared memory


def _configurations(
    n: int, k: int, dtype: Any, activation: str, device: DeviceFacts
) -> Iterator[tuple[ProductConfig, int]]:
    """The streaming configurations that dispatch can choose on this device for n tokens or, with more than one, for
    some more; and a K that uses nearly all of a configuration's registers, k itself where nothing depends on it."""
    for tokens in (1,) if n == 1 or k % 4 else (2, 4):
        problem = dispatch.Problem(37, tokens, 4 if k % 4 == 0 else 1, str(dtype), None, k % 4 == 0, activation)
        for config in dispatch.candidates(problem, device):
            if isinstance(config, ProductConfig):
                yield config, largest_k(config, str(dtype), activation, device) if config.held else k


def random_problem(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Host arrays t, scale, x, gamma, residual, with the hard values of the interface mixed in."""
    t = rng.integers(-1, 2, (case.m, case.k), dtype=np.int8)
    x = rng.standard_normal((case.n, case.k))
    # One activation 10,000 times the others, in a column that every other row ignores.
    column = int(rng.integers(case.k))
    x[0, column] = 1e4
    t[::2, column] = 0
    if case.n > 2:
        x[1], x[2, case.k // 2] = 0.0, np.nan
    return {
        "t": t,
        "scale": rng.uniform(0.5, 2.0, case.m).astype(np.float32),
        "x": x.astype(case.dtype),
        "gamma": rng.uniform(0.5, 1.5, case.k).astype(case.gamma_dtype),
        "residual": rng.standard_normal((case.n, case.m)).astype(case.dtype),
    }


def run(progress: Callable[[str], None] = lambda message: None) -> list[str]:
    """Check everything; returns a line for each failure, none when all is right.

    Raises:
        GpuUnavailableError: no usable GPU.
    """
    cp = require_gpu()
    failures: list[str] = []
    rng = np.random.default_rng(0)
    for case in cases(current_facts()):
        progress(str(case))
        failures += [f"{case}: {message}" for message in _check_case(cp, case, rng)]
    for config in PRESETS.values():
        checkpoint = _two_layers(config)
        for decoder in DECODER_CASES:
            what = f"decoder {config.name}, {decoder}"
            progress(what)
            failures += [f"{what}: {message}" for message in _check_decoder(checkpoint, decoder)]
    progress("sampling")
    failures += _check_sampling(cp, rng)
    failures += _check_floor(cp, rng)
    reached = {kernel.spec for kernel in loaded()}
    failures += [f"{spec.name}: no case reaches it" for spec in specialisations(current_facts()) if spec not in reached]
    return failures


def _check_case(cp: Any, case: Case, rng: np.random.Generator) -> Iterator[str]:
    p = random_problem(case, rng)
    x, gamma, residual = (p[name] for name in ("x", "gamma", "residual"))
    weight = TernaryWeight.from_int8(p["t"], p["scale"])
    on_device = weight.to_device()
    # A view that starts one element into its memory is aligned for scalars only.
    shifted = cp.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    shifted[...] = cp.asarray(x)
    places = [cp.asarray(x)]
    if isinstance(case.choice, str):
        places.append(shifted)
    for y_dtype in (case.dtype, FLOAT16 if case.dtype == FLOAT32 else FLOAT32):
        for device_x in places:
            out = _poisoned(cp, (case.n, case.m), y_dtype)
            enqueue.product(
                cp,
                device_x,
                cp.asarray(gamma),
                on_device,
                1e-5,
                case.activation,
                cp.asarray(residual),
                case.choice,
                out,
            )
            message = check(out.get(), x, gamma, weight, eps=1e-5, activation=case.activation, residual=residual)
            if message:
                yield f"rmsnorm_ternary_matmul: {message}"
    out = _poisoned(cp, (case.n, case.m), case.dtype)
    enqueue.product(cp, cp.asarray(x), None, on_device, 0.0, case.activation, None, case.choice, out)
    if message := check(out.get(), x, None, weight, activation=case.activation):
        yield f"ternary_matmul: {message}"
    out = _poisoned(cp, x.shape, case.dtype)
    ops.rmsnorm(cp.asarray(x), cp.asarray(gamma), 1e-5, out)
    if message := check(out.get(), x, gamma, eps=1e-5):
        yield f"rmsnorm: {message}"


def _two_layers(preset: ModelConfig) -> Checkpoint:
    """Of a preset, with a small vocabulary, random but read only once."""
    checkpoint = Checkpoint.random(replace(preset, num_layers=2, vocab_size=_VOCABULARY), seed=1, head="float32")
    return replace(checkpoint, layers=checkpoint.layers[:])


def _check_decoder(checkpoint: Checkpoint, case: DecoderCase) -> Iterator[str]:
    """Prompts side by side, ragged ones onto those, and tokens through the graphs, against NumPy.

    A decoder on tensor cores does so three times: as what this device is, and as if it had one multiprocessor or very
    many, for which it takes other tiles.
    """
    options = {"activation": case.activation, "dtype": case.dtype, "head": case.head}
    reference = ReferenceTransformer(checkpoint, **options)
    expected = [cache.logits.copy() for _, cache in _steps(reference, case)]
    model = TernaryTransformer(checkpoint, **options)
    facts = model._facts
    others = () if case.dtype == "float32" else (1, 10_000)
    for multiprocessors in dict.fromkeys((facts.multiprocessors, *others)):
        model._facts = replace(facts, multiprocessors=multiprocessors)
        for right, (what, cache) in zip(expected, _steps(model, case), strict=True):
            logits = cache.logits.get()
            error = np.abs(logits - right).max() / np.abs(right).max()
            if not error <= case.tolerance:
                yield f"{what}, chosen for {multiprocessors} multiprocessors: error {error:.3g} of the largest logit"
            if cache.token.get().tolist() != logits.argmax(axis=1).tolist():
                yield f"{what}: the greedy tokens are not the largest logits"


def _steps(decoder: Any, case: DecoderCase) -> Iterator[tuple[str, Any]]:
    """What was done last, and the cache with its logits, after each step of a decoder of either kind."""
    rng = np.random.default_rng(2)
    cache = decoder.new_cache(_DEEP + 1, batch=2, dtype=case.kv_dtype)
    for lengths in _PROMPTS:
        decoder.prefill([rng.integers(0, _VOCABULARY, n) for n in lengths], cache)
        yield f"prompts of {lengths}", cache
    for tokens in _TOKENS:
        decoder.decode_one_token(tokens, cache)
        yield f"tokens {tokens}", cache
    cache.fill_random(_DEEP)
    decoder.decode_one_token(_TOKENS[0], cache)
    yield f"tokens behind {_DEEP} random keys", cache


def _check_sampling(cp: Any, rng: np.random.Generator) -> Iterator[str]:
    """Token for token: the kernel's arithmetic is the reference's."""
    lengths = np.array([0, 9, 70_000], np.int32)
    for vocabulary in _VOCABULARIES:
        for s in _SAMPLINGS:
            logits = (3 * rng.standard_normal((len(lengths), vocabulary))).astype(np.float32)
            seen = (rng.random(logits.shape) < 0.1).astype(np.uint8)
            numbers = np.array([s.temperature, s.top_p, s.min_p, s.repetition_penalty], np.float32)
            integers = np.array([s.top_k, s.seed % 2**32, s.seed >> 32], np.uint32)
            token, on_device = cp.full(len(lengths), -1, cp.int32), [cp.asarray(a) for a in (logits, seen, lengths)]
            load(SAMPLE)(
                (len(lengths), 1, 1),
                (SAMPLE_THREADS, 1, 1),
                (*on_device[:2], cp.asarray(numbers), cp.asarray(integers), token, on_device[2], 0, vocabulary, 1),
            )
            expected = sample(logits, s, seen, lengths + 1)
            if token.get().tolist() != expected.tolist():
                yield f"sample of {vocabulary} logits, {s}: tokens {token.get().tolist()}, expected {expected.tolist()}"


def _check_floor(cp: Any, rng: np.random.Generator) -> Iterator[str]:
    """The benchmark's yardstick reads every word; the variant that is timed has the same loop and no result."""
    words = rng.integers(0, 2**32, (10_007, 4), dtype=np.uint32)
    data, expected = cp.asarray(words), int(np.bitwise_xor.reduce(words, axis=None))
    for threads in FLOOR_THREADS:
        sink = cp.zeros(1, cp.uint32)
        for check_sum in (False, True):
            load(floor_spec(threads, check_sum))((7, 1, 1), (threads, 1, 1), (data, len(words), sink))
        if int(sink[0]) != expected:
            yield f"read_floor with {threads} threads: the words' exclusive or is {int(sink[0])}, expected {expected}"


def _poisoned(cp: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory whose every element is NaN, so that one that no kernel wrote is seen."""
    return cp.full(shape, np.nan, dtype)
