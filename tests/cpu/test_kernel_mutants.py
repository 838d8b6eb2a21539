"""Faults planted by hand in the decoder's kernels, each of which a check of the other tests has to see; and tests that
came out of the mutation check (tests/mutation), whose faults are drawn: what the other tests had let pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from unittest import mock

import numpy as np
import pytest

import edgellm_cupy as ec
from edgellm_cupy import verify
from edgellm_cupy.arguments import ACTIVATIONS, FLOAT16, FLOAT32
from edgellm_cupy.kernels import KernelSpec
from edgellm_cupy.reference.accuracy import check
from edgellm_cupy.tuning.decoder import NEXT_TOKEN, attention_launch, combine_launch, embed_spec, head_launch
from edgellm_cupy.tuning.product import norm_spec, product_launch
from tests.cpu.test_kernel_properties import (
    MODELS,
    Attention,
    check_attention,
    check_embed,
    check_head,
    check_next_token,
)
from tests.cpu.test_kernels import check_ffn
from tests.emulated import H200, emulated_gpu
from tests.emulator import Emulator, EmulatorFault, Output

SOURCE = KernelSpec.source


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    emulator = Emulator()
    emulator.build(
        [norm_spec("float16")]
        + [
            product_launch(20, 1, 772, "float16", "float16", True, activation, H200).launch.spec
            for activation in ACTIVATIONS
        ]
    )
    return emulator


# ---- planted --------------------------------------------------------------------------------------------------------


def embed(emulator: Emulator) -> None:
    emulator.build([embed_spec("int8")])
    check_embed(emulator, FLOAT16, "int8", 5, 300, 7, True, 0)


def next_token(emulator: Emulator) -> None:
    emulator.build([NEXT_TOKEN])
    for head in (True, False):
        check_next_token(emulator, 40, 30, 3, head)


@cache
def head(rows: str, n: int, different: int = 100, outlier: bool = False) -> Callable[[Emulator], None]:
    def check_it(emulator: Emulator) -> None:
        spec = head_launch(576, 1000, n, rows, "float32", H200).spec
        emulator.build([spec])
        check_head(
            *(emulator, spec, rows, "float32"),
            n=n,
            vocabulary=70,
            hidden=201,
            spare=3,
            blocks=2,
            different=different,
            outlier=outlier,
        )

    return check_it


@cache
def attention(kv_dtype: str, rotate: bool, model: str = "narrow") -> Callable[[Emulator], None]:
    def check_it(emulator: Emulator) -> None:
        launches = (
            attention_launch(MODELS[model], "float32", kv_dtype, rotate, 1, 1),
            combine_launch(MODELS[model], "float32", 1),
        )
        emulator.build([launch.spec for launch in launches])
        tokens = 1 if rotate else 2
        check_attention(emulator, Attention(model, "float32", kv_dtype, rotate, (63, 130), tokens, splits=4))

    return check_it


def many_shares(emulator: Emulator) -> None:
    config = MODELS["bitnet-2b4t"]
    emulator.build([attention_launch(config, "float32", "int8", True, 1, 1).spec])
    emulator.build([combine_launch(config, dtype, 1).spec for dtype in ("float16", "bfloat16", "float32")])
    check_attention(emulator, Attention("bitnet-2b4t", "float32", "int8", True, (390,), splits=7, sharpness=4.0))


@cache
def ffn(strategy: str, activation: str = "relu2 scaled", gated: bool = True) -> Callable[[Emulator], None]:
    def check_it(emulator: Emulator) -> None:
        case = verify.Case(40, 3, 300, FLOAT16, FLOAT32, "int8", strategy)
        check_ffn(emulator, case, activation, gated)

    return check_it


@dataclass(frozen=True)
class Planted:
    """`old`, which stands once in a kernel with its headers, becomes `new`."""

    what: str
    old: str
    new: str
    seen_by: Callable[[Emulator], None]


PLANTED = [
    Planted("the row's scale is another's", "1.f : scale[id]", "1.f : scale[ids[0]]", embed),
    Planted("the pitch is the width", "(long long)id * pitch + h", "(long long)id * H + h", embed),
    Planted("seen of the first sequence", "seen[(long long)(n / S) * V + id]", "seen[id]", embed),
    Planted("best stays", "best[b] = 0ull;", ";", next_token),
    Planted("as many sequences as threads", "b < B; b += THREADS", "b < min(B, THREADS); b += THREADS", next_token),
    Planted("no length without a head", "length[b] += count;", "if (best != nullptr) length[b] += count;", next_token),
    Planted("ties take the highest index", "<< 32 | ~index", "<< 32 | index", head("int8", 1, 3)),
    Planted("negative logits in their bits' order", "0x80000000u ? ~bits : bits", "0x80000000u ? bits : bits",
            head("float32", 4)),
    Planted("warps do not wait for each other's best", "= key[t];\n  }\n  __syncthreads();", "= key[t];\n  }",
            head("float32", 1)),
    Planted("the head's last vector is lost", "at_row < V && c < vectors", "at_row < V && c < vectors - 1",
            head("int8", 1)),
    Planted("the last token's neighbour", "x + (n0 + t) * x_pitch", "x + (n0 + t) * H", head("float32", 4)),
    Planted("all tokens have the first one's unit", "logit * units[t]", "logit * units[0]", head("int8", 4)),
    Planted("the last digit is lost", "for (int d = 3; d >= 0; --d) total", "for (int d = 2; d >= 0; --d) total",
            head("int8", 1, outlier=True)),
    Planted("gamma is forgotten", "* s.pre) * norm.at(4 * i, H)", "* s.pre)", head("float32", 1)),
    Planted("another group's query", "kv * group + part * kHeads", "kv + part * kHeads", attention("float32", True)),
    Planted("the second half's turn has the wrong sign", "second * turns[t].x + first", "second * turns[t].x - first",
            attention("float32", True)),
    Planted("the new key goes one place further", "row0 + position;", "row0 + position + 1;",
            attention("float32", True)),
    Planted("a share sees one key beyond its end", "last ? position : end", "last ? position : end + 1",
            attention("float32", False)),
    Planted("a share loses its first key", "context * share.split / splits", "context * share.split / splits + 1",
            attention("float32", False)),
    Planted("the key's scale is the value's", "load(key[u], key_scale[u], keys, key_scales, at);",
            "load(key[u], key_scale[u], keys, value_scales, at);", attention("int8", False)),
    Planted("the new vector stays as it was", "row[d] = q * step;", ";", attention("int8", True)),
    Planted("the last part has all queries", "end_head = (kv + 1) * group", "end_head = first_head + kHeads",
            attention("float32", True, "many")),
    Planted("warps do not wait before they merge", "  __syncthreads();\n  store_share", "  store_share",
            attention("float32", True)),
    Planted("the last share is lost", "s < used; s += kGroups", "s < used - 1; s += kGroups",
            attention("float32", True)),
    Planted("shares are not weighted", "weight = exp2f(share.x - larger)", "weight = 1.f", many_shares),
    Planted("a share too many is used", "+ n % S + 1, splits)", "+ n % S + 2, splits)", attention("float32", True)),
    Planted("gate and up exchanged", "value = ffn_activation(value, ffn);",
            "value = ffn & kGated ? ffn_activation(up, ffn) * value / up : ffn_activation(value, ffn);",
            ffn("streaming")),
    Planted("gate and up exchanged", "ffn_activation(v[0], ffn) * v[1]", "ffn_activation(v[1], ffn) * v[0]",
            ffn("separate")),
    Planted("the last pair of rows is lost", "if (count > 2) store_as", "if (count > 4) store_as", ffn("separate")),
    Planted("the square is stored whole", "? r * 0x1p-8f : r", "? r : r", ffn("streaming", "relu2 scaled")),
    Planted("NaN is lost", "v < 0.f ? 0.f : v;", "fmaxf(v, 0.f);", ffn("separate", gated=False)),
    Planted("the sigmoid's sign", "__expf(-v)", "__expf(v)", ffn("streaming", "silu")),
]  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED, ids=lambda f: f.what)
def test_a_planted_fault_is_seen(fault: Planted) -> None:
    found = set[int]()

    def source(spec: KernelSpec) -> str:
        text = SOURCE(spec)
        found.add(text.count(fault.old))
        return text.replace(fault.old, fault.new)

    emulator = Emulator(timeout=10.0)
    with mock.patch.object(KernelSpec, "source", source), pytest.raises((AssertionError, EmulatorFault)):
        fault.seen_by(emulator)
    assert 1 in found, f"{fault.old!r} does not stand in the kernel any more"
    assert found <= {0, 1}, f"{fault.old!r} stands in the kernel several times"


@pytest.mark.parametrize("seen_by", list(dict.fromkeys(p.seen_by for p in PLANTED)))
def test_without_a_fault_nothing_is_seen(seen_by: Callable[[Emulator], None]) -> None:
    seen_by(Emulator())


# ---- drawn ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_the_greedy_choice_sees_the_last_bit(emulator, sign):
    """Two logits that are neighbours as floats, the larger one behind: not a tie."""
    vocabulary, hidden = 90, 4
    scale = np.full(vocabulary, sign, np.float32)
    scale[70] = np.nextafter(scale[70], np.float32(np.inf))
    launch = head_launch(hidden, vocabulary, 1, "float32", "float32", H200)
    emulator.build([launch.spec])
    logits, best = np.empty((1, vocabulary), np.float32), np.zeros(1, np.uint64)
    values, ones = np.ones((vocabulary, hidden), np.float32), np.ones(hidden, np.float32)
    args = [ones[None], np.int64(hidden), ones, values, scale, Output(logits), best]
    args += [np.int32(vocabulary), np.int32(hidden), np.int32(1), np.float32(0)]
    emulator.launch_in_orders(launch.spec.name, launch.grid, launch.block, args, shared=launch.shared_bytes)
    assert ~best.astype(np.uint32) == 70


@pytest.mark.parametrize("length", [63, 130, 290])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_contexts_that_need_more_splits_than_the_grid_has_or_fewer(emulator, length, splits):
    """A block also takes more keys than it has in flight; shares beyond those in use stay poisoned."""
    config = MODELS["narrow"]
    emulator.build([attention_launch(config, "float32", "float32", True, 1, 1).spec])
    emulator.build([combine_launch(config, "float32", 1).spec])
    check_attention(emulator, Attention("narrow", "float32", "float32", True, (length,), splits=splits, sharpness=4.0))


@pytest.mark.parametrize("start", [1, 2, 4])
def test_gamma_aligned_for_four_halves_and_not_for_four_floats(emulator, start):
    rng = np.random.default_rng(0)
    x, gamma = rng.standard_normal((2, 128)).astype(np.float16), rng.uniform(0.5, 1.5, 132).astype(np.float32)
    gamma = gamma[start : start + 128]
    with emulated_gpu(emulator):
        y = ec.rmsnorm(x, gamma, 1e-5)
    message = check(y, x, gamma, eps=1e-5)
    assert message is None, message


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_registers_beyond_the_token_add_nothing_to_its_squares(emulator, activation):
    """Threads beyond K hold zeros; were it float16's smallest number, this token would show it."""
    rng = np.random.default_rng(0)
    weight = ec.TernaryWeight.from_int8(rng.integers(-1, 2, (20, 772), dtype=np.int8))
    x, gamma = np.zeros((1, 772), np.float16), np.ones(772, np.float16)
    x[0, 7] = 1e-6
    with emulated_gpu(emulator):
        y = ec.rmsnorm_ternary_matmul(x, gamma, weight, 0.0, activation)
    message = check(y, x, gamma, weight, eps=0.0, activation=activation)
    assert message is None, message
