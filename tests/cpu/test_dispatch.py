"""Dispatch on descriptions of real GPUs: whatever the problem, the choice is enumerated and fits the device."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_cupy import verify
from edgellm_cupy.tuning import dispatch, specialisations
from edgellm_cupy.tuning.gemm import GemmConfig, quantise_tiles_launch
from edgellm_cupy.tuning.product import _STATIC_SHARED_BYTES, ProductConfig
from tests.emulated import GPUS

ENUMERATED = frozenset(specialisations())


def random_problem(rng: np.random.Generator) -> dispatch.Problem:
    def size(most: int) -> int:
        """Small and large alike, every third a multiple of 64."""
        value = int(np.exp(rng.uniform(0, np.log(most))))
        return value if rng.integers(3) else max(64, value // 64 * 64)

    x_dtype = str(rng.choice(["float16", "bfloat16", "float32"]))
    k = size(200_000)
    return dispatch.Problem(
        size(100_000),
        1 if rng.integers(3) == 0 else size(5000),
        k,
        x_dtype,
        [None, "float32", x_dtype][rng.integers(3)],
        k % 4 == 0 and bool(rng.integers(4)),
        str(rng.choice(["int8", "float"])),
    )


@pytest.mark.parametrize("gpu", GPUS)
def test_every_choice_is_enumerated_and_fits(gpu):
    facts, rng = GPUS[gpu], np.random.default_rng(len(gpu))
    for _ in range(1500):
        problem = random_problem(rng)
        for strategy in ("adaptive", "streaming", "separate"):
            config = dispatch.choose(problem, strategy, facts)
            plan = dispatch.launch(problem, strategy, facts)
            launch = plan.launch
            what = f"{problem}, {strategy}: {launch}"
            assert config == plan.config, what
            assert config in dispatch.candidates(problem, facts), what
            assert launch.spec in ENUMERATED, what
            assert launch.shared_bytes + _STATIC_SHARED_BYTES <= facts.block_shared_bytes, what
            assert launch.block[0] * launch.block[1] <= 1024, what
            assert min(launch.grid) >= 1, what
            assert launch.grid[0] < 2**31, what
            assert max(launch.grid[1:]) <= 65535, what
            if isinstance(config, ProductConfig) and config.held:  # registers hold one slice, so there may be no second
                assert plan.slice_steps * config.step * 256 >= problem.k, what
            if strategy != "adaptive":
                assert isinstance(config, ProductConfig if strategy == "streaming" else GemmConfig), what


@pytest.mark.parametrize("gpu", GPUS)
def test_one_token_always_streams(gpu):
    for m, k in ((576, 576), (28672, 4096), (8192, 28672), (37, 577)):
        problem = dispatch.Problem(m, 1, k, "float16", "float16", k % 4 == 0, "int8")
        assert isinstance(dispatch.choose(problem, "adaptive", GPUS[gpu]), ProductConfig)


def test_many_tokens_are_normed_once():
    for n in (64, 4096):
        problem = dispatch.Problem(2560, n, 2560, "float16", "float16", True, "int8")
        assert isinstance(dispatch.choose(problem, "adaptive", GPUS["H200"]), GemmConfig)


@pytest.mark.parametrize("gpu", GPUS)
def test_verify_reaches_what_this_gpu_can_run(gpu):
    """Products, norms and the launch in front: each specialisation for this device, and none beside."""
    facts = GPUS[gpu]
    reached = set()
    for case in verify.cases(facts):
        for gamma in (str(case.gamma_dtype), None):
            problem = dispatch.Problem(case.m, case.n, case.k, str(case.dtype), gamma, case.k % 4 == 0, case.activation)
            plan = dispatch.launch(problem, case.choice, facts)
            reached.add(plan.launch.spec)
            if isinstance(plan.config, GemmConfig):
                norm = gamma is not None
                reached.add(quantise_tiles_launch(case.n, case.k, str(case.dtype), norm, case.activation).spec)
            else:
                assert not plan.config.held or plan.slice_steps * plan.config.step * 256 >= case.k, case
    products = {"rmsnorm_ternary_matmul.cu", "ternary_matmul.cu", "ternary_gemm.cu", "quantise_tiles.cu"}
    assert reached == {spec for spec in specialisations(facts) if spec.file in products}


@pytest.mark.parametrize("n", [1, 64])
def test_the_choice_is_printed_once(monkeypatch, capsys, n):
    monkeypatch.setenv("EDGELLM_PRINT_CONFIG", "1")
    dispatch.launch.cache_clear()
    problem = dispatch.Problem(576, n, 576, "float16", "float16", True, "int8")
    for _ in range(3):
        dispatch.launch(problem, "adaptive", GPUS["H200"])
    printed = capsys.readouterr().err
    assert printed.count("edgellm: ") == 1
    assert f"m=576, n={n}, k=576" in printed
