"""Tuned choices: their file, who reads it, and a run of `edgellm tune` on a GPU that is played by NumPy."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import cli, runtime
from edgellm_cupy.bench import statistics, suite, timing, tune
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts import reproducibility
from edgellm_cupy.bench.parts.shapes import Shape
from edgellm_cupy.bench.reporting import report
from edgellm_cupy.errors import EdgeLLMError
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.ops import enqueue
from edgellm_cupy.reference import ops
from edgellm_cupy.tuning import dispatch, tuned
from edgellm_cupy.tuning.dispatch import Config, Problem
from edgellm_cupy.tuning.tuned import Key, Tuned
from tests.cpu.test_cli import NO_CUPY, NO_DRIVER, edgellm
from tests.cpu.test_table import FakeArray, fake_cupy
from tests.emulated import H200, TINY

KEY = Key("NVIDIA H200", "580.1", "0.1.0")
ONE = Problem(70, 1, 128, "float16", "float32", True, "int8")
FOUR = ONE._replace(n=4)


def choices(problem: Problem) -> tuple[Config, ...]:
    """The candidates, the default first."""
    default = dispatch.choose(problem, "adaptive", H200)
    return (default, *(c for c in dispatch.candidates(problem, H200) if c != default))


def separate(problem: Problem) -> Config:
    return dispatch.choose(problem, "separate", H200)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache of its own for every test."""
    monkeypatch.setenv("EDGELLM_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("EDGELLM_TUNED", raising=False)
    tuned._tables.cache_clear()
    yield tuned.folder()
    tuned._tables.cache_clear()


def load(folder, key=KEY, facts=H200) -> dict[Problem, Tuned]:
    """Without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tuned.load(folder, key, facts)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded_for_the_same_key_only(folder):
    found = {ONE: Tuned(choices(ONE)[1], 2.5, 2.75), FOUR: Tuned(separate(FOUR), 3.5, 4.0)}
    path = tuned.save(folder, KEY, H200, found)
    assert load(folder) == found
    assert {entry["strategy"] for entry in json.loads(path.read_text())["entries"]} <= set(tuned.CONFIGS)
    for other in (KEY._replace(gpu="Tesla T4"), KEY._replace(driver="1"), KEY._replace(version="0.2")):
        assert load(folder, other) == {}
    assert [p.name for p in folder.iterdir()] == [path.name]  # nothing is left beside it


def test_a_later_run_replaces_what_it_measured_and_keeps_the_rest(folder):
    second, third = choices(ONE)[1:3]
    five = ONE._replace(n=5)
    tuned.save(folder, KEY, H200, {ONE: Tuned(second, 2.0, 3.0), FOUR: Tuned(separate(FOUR), 2.0, 3.0)})
    tuned.save(folder, KEY, H200, {ONE: Tuned(third, 1.0, 3.0), FOUR: None, five: Tuned(separate(five), 2.0, 3.0)})
    assert load(folder) == {ONE: Tuned(third, 1.0, 3.0), five: Tuned(separate(five), 2.0, 3.0)}


def test_the_file_name_is_harmless(folder):
    path = tuned.file(folder, Key("../GPU (4 GB)\n", "1/2", "0+local"))
    assert path.parent == folder
    assert re.fullmatch(r"[\w.+-]+\.json", path.name)


def test_two_keys_of_one_name_are_told_apart(folder):
    tuned.save(folder, KEY, H200, {ONE: Tuned(choices(ONE)[1], 2.0, 3.0)})
    other = KEY._replace(gpu="NVIDIA/H200")
    assert tuned.file(folder, other) == tuned.file(folder, KEY)
    with pytest.warns(UserWarning, match="ignored: ValueError: it is of NVIDIA H200, 580.1, 0.1.0"):
        assert tuned.load(folder, other, H200) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "null", '{"gpu": 1}', "\x00", "[" * 100_000])
def test_a_file_that_is_none_costs_a_warning(folder, text):
    folder.mkdir()
    tuned.file(folder, KEY).write_text(text)
    with pytest.warns(UserWarning, match="ignored: ") as seen:
        assert tuned.load(folder, KEY, H200) == {}
    assert len(seen) == 1


def test_a_file_that_cannot_be_read_costs_a_warning(folder):
    tuned.file(folder, KEY).mkdir(parents=True)
    with pytest.warns(UserWarning, match="ignored: IsADirectoryError"):
        assert tuned.load(folder, KEY, H200) == {}


SPOILED: dict[str, Any] = {
    "not an object": lambda e: 7,
    "a field more": lambda e: {**e, "colour": "blue"},
    "a field less": lambda e: {key: value for key, value in e.items() if key != "us"},
    "no time": lambda e: {**e, "us": "fast"},
    "an unknown strategy": lambda e: {**e, "strategy": "magic"},
    "another strategy": lambda e: {**e, "strategy": "separate"},
    "a problem's field more": lambda e: {**e, "problem": {**e["problem"], "residual": True}},
    "a problem's field less": lambda e: {**e, "problem": {"m": 1}},
    "an unknown dtype": lambda e: {**e, "problem": {**e["problem"], "activation": "float", "x_dtype": "int4"}},
    "a list": lambda e: {**e, "problem": {**e["problem"], "gamma": ["float32"]}},
    "a text": lambda e: {**e, "problem": {**e["problem"], "k": "128"}},
    "a configuration's field more": lambda e: {**e, "config": {**e["config"], "colour": 1}},
    "a configuration of the past": lambda e: {**e, "config": {**e["config"], "threads": 33}},
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_wrong_entry_is_ignored_and_the_others_count(folder, spoil):
    five = ONE._replace(n=5)
    good = {FOUR: Tuned(separate(FOUR), 2.0, 3.0), five: Tuned(separate(five), 2.0, 3.0)}
    streaming = dispatch.choose(ONE, "streaming", H200)
    path = tuned.save(folder, KEY, H200, {ONE: Tuned(streaming, 2.0, 3.0), **good})
    content = json.loads(path.read_text())
    content["entries"][0] = spoil(content["entries"][0])
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 of 3 entries ignored, the first: ") as seen:
        assert tuned.load(folder, KEY, H200) == good
    assert len(seen) == 1


def test_a_configuration_that_does_not_fit_this_device_is_ignored(folder):
    large = max(dispatch.candidates(FOUR, H200), key=lambda c: c.threads if hasattr(c, "stages") else 0)
    assert large not in dispatch.candidates(FOUR, TINY)
    tuned.save(folder, KEY, H200, {FOUR: Tuned(large, 2.0, 3.0)})
    with pytest.warns(UserWarning, match="is no candidate for"):
        assert tuned.load(folder, KEY, TINY) == {}


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="ignored: "), pytest.raises(EdgeLLMError, match="cannot be written: "):
        tuned.save(tmp_path / "file", KEY, H200, {})


# ---- who reads it ---------------------------------------------------------------------------------------------------


@pytest.fixture
def devices(monkeypatch) -> SimpleNamespace:
    """Two GPUs, of which the second is current."""
    devices = SimpleNamespace(current=1)
    driver = SimpleNamespace(getDevice=lambda: devices.current, getDeviceCount=lambda: 2)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=driver)))
    monkeypatch.setattr(tuned, "key_of", lambda device: KEY if device else KEY._replace(gpu="Tesla T4"))
    monkeypatch.setattr(tuned, "_facts_of", lambda device: H200)
    return devices


def test_lookup_is_of_the_current_device_and_of_exactly_this_problem(folder, devices):
    path = tuned.save(folder, KEY, H200, {ONE: Tuned(separate(ONE), 2.0, 3.0)})
    assert tuned.lookup(ONE) == separate(ONE)
    for other in (FOUR, ONE._replace(gamma="float16"), ONE._replace(aligned=False), ONE._replace(activation="float")):
        assert tuned.lookup(other) is None
    assert tuned.in_use() == (1, path)
    devices.current = 0
    assert tuned.lookup(ONE) is None
    assert tuned.in_use() == (0, None)


def test_the_file_is_read_once_and_again_after_tuning(folder, devices, monkeypatch):
    tuned.save(folder, KEY, H200, {ONE: Tuned(separate(ONE), 2.0, 3.0)})
    assert tuned.lookup(ONE) == separate(ONE)
    tuned.file(folder, KEY).unlink()
    assert tuned.lookup(ONE) == separate(ONE)
    tuned.save(folder, KEY, H200, {})
    assert tuned.lookup(ONE) is None


def test_edgellm_tuned_0_turns_it_off(folder, devices, monkeypatch):
    tuned.save(folder, KEY, H200, {ONE: Tuned(separate(ONE), 2.0, 3.0)})
    monkeypatch.setenv("EDGELLM_TUNED", "0")
    assert tuned.lookup(ONE) is None
    assert tuned.in_use() == (0, None)


def test_nothing_tuned_asks_no_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert tuned.lookup(ONE) is None
    assert tuned.in_use() == (0, None)


def test_adaptive_takes_the_tuned_choice_and_nothing_else_does(folder, devices, monkeypatch):
    taken: list[Config] = []
    for name in ("_streaming", "_separate"):
        monkeypatch.setattr(
            enqueue, name, lambda *args: taken.append(next(a for a in args if hasattr(a, "config")).config)
        )
    monkeypatch.setattr(enqueue, "current_facts", lambda: H200)
    monkeypatch.setattr(enqueue, "address", lambda array: 0)
    default, second, other = choices(ONE)[0], choices(ONE)[1], separate(ONE)
    tuned.save(folder, KEY, H200, {ONE: Tuned(other, 2.0, 3.0)})
    W = ec.TernaryWeight.from_int8(np.ones((70, 128), np.int8), 1.0)

    def product(n: int, choice: str | Config) -> Config:
        x = np.ones((n, 128), np.float16)
        enqueue.product(None, x, np.ones(128, np.float32), W, 1e-5, "int8", None, choice, None)
        return taken[-1]

    assert product(1, "adaptive") == other != default
    assert product(1, "streaming") == default
    assert product(1, second) == second
    assert product(2, "adaptive") == dispatch.choose(ONE._replace(n=2), "adaptive", H200)


# ---- a run ----------------------------------------------------------------------------------------------------------


class FakeGpu:
    """NumPy in the GPU's place: real results, and a time for each configuration.

    Attributes:
        us: times of those configurations that do not take `usual`.
        wrong: configurations with a wrong result; late: those whose graph writes nothing.
        timed: configurations that were timed in a graph.
    """

    usual = 4.0

    def __init__(self) -> None:
        self.us: dict[Config, float] = {}
        self.wrong: set[Config] = set()
        self.late: set[Config] = set()
        self.timed: list[Config] = []
        self.noise = 0.0
        self._ran: Config | None = None

    def product(self, cp, x, gamma, W, eps, activation, residual, choice, out):
        self._ran = choice
        if gamma is None:
            ops.ternary_matmul(x, W, activation, out=out)
        else:
            ops.rmsnorm_ternary_matmul(x, gamma, W, eps, activation, out=out)
        if choice in self.wrong:
            out[..., -1] = 9

    def kernel(self, rotation, rule, prepare):
        assert rotation.l2 == "cold"
        prepare()
        for call in rotation.calls:
            call()
        if self._ran in self.late:
            prepare()
        self.timed.append(self._ran)
        return self.series()

    def device(self, call, rule):
        call()
        return self.series()

    def series(self):
        us = self.us.get(self._ran, self.usual)
        return statistics.summarise([us - self.noise] * 5 + [us] * 5 + [us + self.noise] * 5, "us")


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    gpu, cp = FakeGpu(), fake_cupy()
    cp.copyto = np.copyto
    cp.cuda.runtime.getDevice, cp.cuda.runtime.getDeviceCount = lambda: 0, lambda: 1

    def copies(W):
        packed, scale = (np.array(a).view(FakeArray) for a in (W.packed, W.scale))
        return [ec.TernaryWeight(packed, scale, W.shape) for _ in range(2)]

    for module, name, stand_in in (
        (tune.enqueue, "product", gpu.product),
        (tune, "cold_weights", copies),
        (tune, "current_facts", lambda: H200),
        (tune, "TABLE", (Shape("SmolLM", "out", 40, 64),)),
        (tuned, "key_of", lambda device: KEY),
        (tuned, "_facts_of", lambda device: H200),
        (timing, "kernel", gpu.kernel),
        (timing, "device", gpu.device),
    ):
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setitem(sys.modules, "cupy", cp)
    return gpu


PRODUCT = tune.Product(Shape("test", "qkv", 70, 128), "float32")


def measure(n: int = 1, dtype: str = "float16") -> tuple[tune.Row, list[str]]:
    """The row of :data:`ONE` or of another number of tokens, and the failures."""
    rows, failures, _ = tune.run([PRODUCT], (n,), ("int8",), dtype)
    return rows[0], failures


def test_a_candidate_that_is_faster_is_kept_and_used(gpu, folder):
    default, *others = choices(ONE)
    gpu.us = {default: 4.0, others[2]: 3.0, others[0]: 3.5}
    row, failures = measure()
    assert failures == []
    assert (row.problem, row.default, row.default_us) == (ONE, default, 4.0)
    assert row.best == Tuned(others[2], 3.0, 4.0)
    assert set(gpu.timed) == {default, *others}
    assert load(folder) == {ONE: row.best}
    assert tuned.lookup(ONE) == others[2]


@pytest.mark.parametrize(("us", "noise"), [(4.0, 0.0), (4.5, 0.0), (3.95, 0.0), (3.0, 0.6)])
def test_a_candidate_within_the_noise_is_not_kept(gpu, folder, us, noise):
    gpu.us, gpu.noise = {choices(ONE)[1]: us}, noise
    row, failures = measure()
    assert (row.best, row.default_us, failures) == (None, 4.0, [])
    assert load(folder) == {}


def test_the_second_measurement_decides(gpu, monkeypatch):
    default, lucky = choices(ONE)[:2]
    gpu.us = {lucky: 3.0}
    series = gpu.series

    def second_thoughts():
        if gpu.timed.count(lucky) > 1:
            gpu.us[lucky] = 4.0
        return series()

    monkeypatch.setattr(gpu, "series", second_thoughts)
    assert measure()[0].best is None
    assert gpu.timed[-2:] == [lucky, default]


@pytest.mark.parametrize("how", ["wrong", "late"])
def test_a_wrong_candidate_is_a_failure_and_never_kept(gpu, folder, how):
    bad, good = choices(ONE)[1:3]
    gpu.us = {bad: 1.0, good: 3.0}
    getattr(gpu, how).add(bad)
    row, failures = measure()
    assert row.best == Tuned(good, 3.0, 4.0)
    (failure,) = failures
    assert failure.startswith(f"test qkv 70 x 128, N = 1, int8, {tune.text_of(bad)}: wrong result: ")
    assert (bad in gpu.timed) == (how == "late")
    assert load(folder)[ONE].config == good


def test_with_a_wrong_default_nothing_is_kept(gpu, folder):
    default, other = choices(ONE)[:2]
    gpu.us, gpu.wrong = {other: 3.0}, {default}
    row, failures = measure()
    assert (row.default_us, row.best, len(failures)) == (None, None, 1)
    assert load(folder) == {}


def test_the_graph_of_a_hopeless_candidate_is_not_recorded(gpu):
    slow = choices(ONE)[1]
    gpu.us = {slow: 100.0}
    measure()
    assert slow not in gpu.timed


def test_tuning_again_forgets_what_is_no_longer_faster(gpu, folder):
    other = choices(ONE)[1]
    gpu.us = {other: 3.0}
    measure()
    assert ONE in load(folder)
    gpu.us = {other: 5.0}
    measure()
    assert load(folder) == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype_token_and_activation_is_a_problem_of_its_own(gpu, dtype):
    plain = tune.Product(Shape("test", "down", 40, 66), None)
    rows, failures, _ = tune.run([PRODUCT, plain], (1, 3), ("int8", "float"), dtype)
    assert failures == []
    assert [row.problem for row in rows] == [
        Problem(m, n, k, dtype, gamma, k % 4 == 0, activation)
        for m, k, gamma in ((70, 128, "float32"), (40, 66, None))
        for n in (1, 3)
        for activation in ("int8", "float")
    ]


def test_the_products_of_a_model_are_those_that_its_decoder_runs():
    found = [(p.shape.layer, p.gamma) for p in tune.of_model(ec.ModelConfig.preset("smollm-135m"))]
    assert found == [("qkv", "float32"), ("out", None), ("gate_up", "float32"), ("down", None)]
    assert {p.gamma for p in tune.of_table("bfloat16")} == {"bfloat16"}


def test_intervals_are_needed():
    lone = measured(1.0, "us", ci95=None)
    assert not tune.faster(lone, measured(2.0, "us", ci95=[2.0, 2.0]))


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(monkeypatch, *arguments: str):
    monkeypatch.setattr(runtime, "require_gpu", lambda: None)
    return CliRunner().invoke(cli.app, ["tune", *arguments])


def test_the_command_shows_the_table_and_the_file(gpu, folder, monkeypatch):
    problem = Problem(40, 1, 64, "float16", "float16", True, "int8")
    gpu.us = {choices(problem)[1]: 3.2}
    done = invoke(monkeypatch, "--shapes", "table", "--tokens", "1", "--activation", "int8")
    assert done.exit_code == 0, done.output
    head, line, *_ = done.stdout.splitlines()
    assert head.split() == ["product", "M", "x", "K", "N", "activation", "default", "us", "fastest", "us", "gain"]
    assert line.startswith("SmolLM out  40 x 64  1  int8 ")
    assert line.endswith(f"{tune.text_of(choices(problem)[1])}  3.20  25.0%")
    assert "1 of 1 defaults beaten by more than 2%" in done.stdout
    assert done.stdout.endswith(f"\nwritten: {tuned.file(folder, KEY)}\n")
    assert re.fullmatch(r"SmolLM out 40 x 64, N = 1, int8: \d+ candidates\n", done.stderr)


def test_a_wrong_result_ends_with_4(gpu, monkeypatch):
    problem = Problem(40, 1, 64, "float16", "float16", True, "int8")
    gpu.wrong = {choices(problem)[0]}
    done = invoke(monkeypatch, "--shapes", "table", "--tokens", "1", "--activation", "int8")
    assert done.exit_code == 4
    assert re.search(r"^SmolLM out .* wrong$", done.stdout, re.MULTILINE)
    assert re.search(r"^wrong: SmolLM out 40 x 64, N = 1, int8, streaming [\d/]+: wrong result: ", done.stdout, re.M)


@pytest.mark.filterwarnings("ignore:.*NotADirectoryError")
def test_a_cache_that_cannot_be_written_is_known_before_the_work(gpu, folder, monkeypatch):
    folder.write_text("a file")
    done = invoke(monkeypatch)
    assert done.exit_code == 2
    assert "cannot be written: " in done.stderr
    assert gpu.timed == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm-135m", "--shapes", "table"], "--model and --shapes exclude each other"),
        (["--tokens", "0"], "--tokens is '0'"),
        (["--model", "llama"], "no model preset 'llama'"),
        (["--activation", "int4"], "int4"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_usage(arguments, message):
    done = CliRunner().invoke(cli.app, ["tune", *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(("cupy", "layer"), [(NO_CUPY, "CuPy"), (NO_DRIVER, "driver")])
def test_without_a_gpu_it_says_why(tmp_path, cupy, layer):
    done = edgellm(tmp_path, "tune", cupy=cupy)
    assert done.returncode == 3
    assert done.stdout == ""
    assert re.fullmatch(rf"error: no usable GPU: {layer}: .*; .*install.*\n", done.stderr)


# ---- reports --------------------------------------------------------------------------------------------------------


def test_a_report_tells_which_choices_were_in_use(gpu, folder, monkeypatch):
    path = tuned.save(folder, KEY, H200, {ONE: Tuned(separate(ONE), 2.0, 3.0)})
    monkeypatch.setattr(runtime, "device_name", lambda: "Test GPU")
    nvml = SimpleNamespace(driver_version=lambda: measured("580.1"))
    monkeypatch.setattr(reproducibility.hardware, "current_nvml_device", lambda: nvml)
    ctx = Context(Checkpoint.random(ec.ModelConfig("tiny", 1, 64, 64, 1, 1, 64, 256)), None)
    environment = reproducibility.environment(ctx)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert environment["tuned"] == {"value": 1, "unit": "entries", "file": str(path), "sha256": sha256}

    result = suite.run(Context(ctx.checkpoint, "host"), ["transfer"])
    assert result["environment"]["tuned"] == missing("host")
    assert "Tuned choices" not in report.markdown(result)
    result |= {"no_gpu": None, "environment": environment}
    assert f"| Tuned choices | 1, of `{path}` |" in report.markdown(result)
    monkeypatch.setenv("EDGELLM_TUNED", "0")
    tuned._tables.cache_clear()
    result["environment"] = reproducibility.environment(ctx)
    assert "| Tuned choices | 0 |" in report.markdown(result)
    del result["environment"]  # a report of before
    assert "Tuned choices" not in report.markdown(result)
