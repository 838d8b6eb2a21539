"""The benchmark on the decoder: its options, batches, sampling, large models, and where a token's microseconds go.

And `edgellm verify`'s check of decoders: that it finds what is wrong, and reaches every kernel.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import Sampling, cli, kernels, verify
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import Context, WrongResultError
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts import ablation, scaling, tokens
from edgellm_cupy.bench.reporting import report, terminal
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.model import decoder
from edgellm_cupy.ops import enqueue
from edgellm_cupy.tuning.decoder import decoder_specs
from edgellm_cupy.tuning.product import norm_spec
from tests.emulated import GPUS, emulated_gpu, new_emulator
from tests.emulator import Emulator

CONFIG = ec.ModelConfig("tiny", 2, 64, 96, 4, 2, 16, 256, max_context=128)
OPTIONS = {"activation": "float", "dtype": "float16", "head": "int8", "kv_dtype": "int8"}


def context(config: ec.ModelConfig = CONFIG, **options) -> Context:
    return Context(Checkpoint.random(config), "not asked for", quick=True, **options)


class Array(np.ndarray):
    """Stands in for a CuPy array."""

    def get(self) -> np.ndarray:
        return np.array(self)


# ---- what was measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "decoder", "quantization"),
    [
        (
            {},
            {"activation": "int8", "dtype": "float32", "head": "float16", "kv_cache": "float32"},
            "ternary 2-bit weights, int8 activations in float32 layers, float16 embedding and head, float32 keys and "
            "values",
        ),
        (
            OPTIONS,
            {"activation": "float", "dtype": "float16", "head": "int8", "kv_cache": "int8"},
            "ternary 2-bit weights, float16 activations, int8 embedding and head, int8 keys and values",
        ),
    ],
)
def test_a_report_says_what_the_decoder_really_was(options, decoder, quantization):
    ctx = context(**options)
    result = suite.run(ctx, ["scaling"])
    assert result["errors"] == {}
    assert result["model"]["decoder"] == decoder
    assert result["model"]["head_bytes"] == ctx.model.head_bytes
    assert result["summary"]["quantization"]["value"] == quantization
    assert f"| Decoder | activation: {decoder['activation']}; dtype: {decoder['dtype']}; " in report.markdown(result)
    bytes_a_value = {"int8": 4, "float16": 4, "float32": 4}[decoder["kv_cache"]]  # NumPy keeps what they stand for
    assert result["parts"]["scaling"]["rows"][1]["kv_cache_bytes"]["value"] == 2 * 2 * 2 * 16 * bytes_a_value * 1024


def test_the_command_measures_the_decoder_that_it_is_told(tmp_path, monkeypatch):
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps(CONFIG.to_dict()))
    monkeypatch.setattr(tokens, "run", lambda ctx: {"options": ctx.options, "cache": ctx.new_cache(1).dtype})
    arguments = ["bench", "tokens", "--model", str(model), "--backend", "numpy", "--out", str(tmp_path)]
    options = ["--activation", "float", "--dtype", "bfloat16", "--head", "int8", "--kv-dtype", "int8"]
    done = CliRunner().invoke(cli.app, [*arguments, *options])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["parts"]["tokens"] == {
        "options": {"activation": "float", "dtype": "bfloat16", "head": "int8"},
        "cache": "int8",
    }


def test_no_decoder_is_built_for_what_needs_none(monkeypatch):
    monkeypatch.setattr(ec.reference, "TernaryTransformer", lambda *args, **options: pytest.fail("a decoder was built"))
    result = suite.run(context(), ["hardware"])
    assert result["model"]["head_bytes"] is None
    assert result["model"]["decoder"] is None
    assert result["summary"]["quantization"] == {"value": None, "reason": "no decoder was built"}
    assert "null bytes" not in report.markdown(result)


def test_a_decoder_that_cannot_be_built_costs_its_parts_and_not_the_report(monkeypatch):
    def no_room(*args, **options):
        raise MemoryError("two models")

    monkeypatch.setattr(ec.reference, "TernaryTransformer", no_room)
    result = suite.run(context(), ["hardware", "tokens"])
    assert list(result["parts"]) == ["hardware"]
    assert "two models" in result["errors"]["decoder_check"]["reason"]
    assert "check of the decoder failed" in result["summary"]["throughput_tok_s"]["reason"]
    assert report.markdown(result)


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured_tokens():
    ctx = context()
    return tokens._measure(ctx, replace(tokens._plan(ctx), prompts=(32, 600), batches=(1, 3), short_runs=2))


def test_batches_count_the_tokens_of_all_sequences(measured_tokens):
    one, three = measured_tokens["batches"]
    for row in (one, three):
        assert row["latency"]["n"] == 2 * tokens.SHORT_RUN
        ms = row["latency"]["median"]["value"]
        assert row["tok_s"]["value"] == pytest.approx(1e3 * row["batch"] / ms)
    assert measured_tokens["batch_tok_s"]["value"] == three["tok_s"]["value"]
    assert measured_tokens["batch_tok_s"]["batch"] == 3


def test_every_sequence_of_a_batch_is_decoded():
    ctx = context()
    cache = ctx.new_cache(tokens.WARM_UP_TOKENS + 3, batch=3)
    assert len(tokens.decode_times(ctx, cache, 3)) == 3
    assert cache.lengths == (7, 7, 7)


def test_sampling_is_compared_with_greedy(measured_tokens):
    rows = {row["sampling"]: row for row in measured_tokens["sampling"]}
    assert list(rows) == ["greedy", "temperature 0.8, top_k 40, top_p 0.95", "temperature 1"]
    greedy, *others = rows.values()
    assert greedy["over_greedy_us"] == {"value": None, "unit": "us", "reason": "this is greedy"}
    for row in others:
        more = np.subtract(row["latency"]["samples"], greedy["latency"]["samples"])
        assert row["over_greedy_us"]["value"] == pytest.approx(1e3 * np.median(more), abs=0.1)
        assert row["over_greedy_us"]["ci95"]


def test_sampling_is_what_the_cache_is_given(monkeypatch):
    ctx, seen = context(), []
    new_cache = Context.new_cache

    def spy(self, max_len, batch=1, sampling=None):
        seen.append(sampling)
        return new_cache(self, max_len, batch, sampling)

    monkeypatch.setattr(Context, "new_cache", spy)
    tokens._samplings(ctx, tokens._plan(ctx))
    assert seen == list(tokens.SAMPLINGS)
    assert seen[0] == Sampling()


def test_the_reported_prompt_is_not_the_longest(measured_tokens):
    assert [row["tokens"] for row in measured_tokens["prompts"]] == [32, 600]
    assert measured_tokens["prompt_tok_s"]["prompt_tokens"] == 32


@pytest.mark.parametrize(("max_context", "prompts"), [(64, (128, 512)), (2048, (128, 512)), (4096, (128, 512, 4096))])
def test_long_prompts_only_where_the_model_was_made_for_them(max_context, prompts):
    ctx = Context(Checkpoint.random(replace(CONFIG, max_context=max_context)), None)
    assert tokens._plan(ctx).prompts == prompts
    assert tokens._plan(replace(ctx, quick=True)).prompts == (128,)


def test_short_runs_begin_with_an_empty_cache(monkeypatch):
    ctx, starts = context(), []
    caches = [ctx.new_cache(tokens.WARM_UP_TOKENS + tokens.SHORT_RUN) for _ in range(2)]

    def times(ctx, cache, n):
        starts.append((caches.index(cache), cache.length))
        cache.fill_random(n)
        return [float(len(starts))] * n

    monkeypatch.setattr(tokens, "decode_times", times)
    samples = tokens.short_times(ctx, caches, 2)
    assert starts == [(0, 0), (1, 0)] * 3
    n = tokens.SHORT_RUN  # the first run of each is for nothing
    assert samples == [[3.0] * n + [5.0] * n, [4.0] * n + [6.0] * n]


# ---- a model that is too large for the reference --------------------------------------------------------------------


class Device(ec.reference.TernaryTransformer):
    """Stands in for the decoder on the GPU."""

    def _forward(self, ids, cache):
        logits = super()._forward(ids, cache)
        cache.logits, cache.token = logits.view(Array), cache.token.view(Array)
        return logits


@pytest.fixture
def large(monkeypatch):
    """Five layers, of which the reference may have two; reading a layer is counted."""
    config = replace(CONFIG, num_layers=5, tied_head=False)
    checkpoint, reads = Checkpoint.random(config), []
    read = checkpoint.layers._read
    monkeypatch.setattr(checkpoint.layers, "_read", lambda i: (reads.append(i), read(i))[1])
    monkeypatch.setattr(suite, "_REFERENCE_WEIGHTS", 2 * sum(m * k for m, k in config.products().values()))
    monkeypatch.setattr(scaling, "DEPTHS", (1024,))
    monkeypatch.setattr(suite, "DECODER_CHECKS", tuple(c._replace(depths=c.depths[:1]) for c in suite.DECODER_CHECKS))
    ctx = Context(checkpoint, None, quick=True)
    ctx.model = Device(checkpoint)
    reads.clear()
    return ctx, reads


def test_of_a_large_model_the_first_layers_are_checked_and_read_once(large):
    ctx, reads = large
    figure = suite.check_decoder(ctx)
    assert figure["value"] == 0
    assert figure["layers"] == "the first 2 of 5"
    assert reads == [0, 1]


def test_a_small_model_is_checked_whole(large, monkeypatch):
    monkeypatch.setattr(suite, "_REFERENCE_WEIGHTS", 10**9)
    assert "layers" not in suite.check_decoder(large[0])


def test_layers_that_are_not_compared_are_looked_at(large):
    ctx, _ = large
    ctx.model._layers[4].down = replace(ctx.model._layers[4].down, scale=np.float32([np.nan]))
    with pytest.raises(WrongResultError, match="whole decoder, prompt: 256 logits are not finite"):
        suite.check_decoder(ctx)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.04), ("bfloat16", 0.08)])
def test_float_activations_are_their_own_check(large, dtype, bound):
    ctx, _ = large
    ctx.activation, ctx.dtype, ctx.kv_dtype = "float", dtype, "int8"
    ctx.model = Device(ctx.checkpoint, **ctx.options)
    figure = suite.check_decoder(ctx)
    assert (figure["value"], figure["bound"]) == (0, bound)
    assert "float_activations_at_depth" not in figure


# ---- where the microseconds go --------------------------------------------------------------------------------------

LAYER = ["rmsnorm_ternary_matmul.cu", "attention_decode.cu", "attention_combine.cu", "ternary_matmul.cu"]
LAYER += ["rmsnorm_ternary_matmul.cu", "ternary_matmul.cu"]
PRODUCTS = ["qkv", "out", "up", "down"]


def test_products_are_told_apart_by_their_order():
    files = ["embed.cu", *LAYER, *LAYER, "lm_head.cu", "next_token.cu"]
    layer = ["qkv", "attention_decode", "attention_combine", "out", "up", "down"]
    assert ablation.kinds_of(files, PRODUCTS) == ["embed", *layer, *layer, "lm_head", "next_token"]


def test_what_prepares_a_product_belongs_to_it():
    files = ["rmsnorm.cu", "ternary_matmul.cu", "quantise_tiles.cu", "ternary_gemm.cu", "rmsnorm_ternary_matmul.cu"]
    files += ["ternary_matmul.cu", "rmsnorm.cu", "lm_head.cu"]
    kinds = ["qkv", "qkv", "out", "out", "up", "down", "rmsnorm", "lm_head"]
    assert ablation.kinds_of(files, PRODUCTS) == kinds


def test_launches_that_are_no_whole_layers_keep_their_names():
    assert ablation.kinds_of(["embed.cu", *LAYER[:5], "lm_head.cu"], PRODUCTS) == [
        "embed", "rmsnorm_ternary_matmul", "attention_decode", "attention_combine", "ternary_matmul",
        "rmsnorm_ternary_matmul", "lm_head",
    ]  # fmt: skip


def test_every_graph_but_the_whole_one_lacks_the_last_kernel():
    found = ablation.variants(["qkv", "out", "qkv", "out", "next_token"])
    assert list(found) == [None, "next_token", "qkv", "out"]
    assert found[None] == set()
    assert found["next_token"] == {"next_token"}
    assert found["out"] == {"next_token", "out"}


def test_skipping_goes_by_order_and_notices_another_order():
    asked = ablation.skip(["a", "b", "a"], {"a"})
    assert [asked("same name") for _ in range(3)] == [True, False, True]
    with pytest.raises(RuntimeError, match="one launch more"):
        asked("same name")


def test_costs_are_differences_of_neighbours_in_time():
    order = [("k1", "a.cu"), ("k2", "b.cu"), ("k1", "a.cu"), ("k3", "next_token.cu")]
    rows = ablation.describe(order, ["a", "b", "a", "next_token"])
    assert rows["a"] == {"kernels": ["k1"], "files": ["a.cu"], "launches_per_token": 2}
    # A token takes 100 us and drifts by 1 a round: a costs 40 of them, b 25, the last kernel 2.
    drift = np.arange(10.0)
    samples = {None: 100 + drift, "next_token": 98 + drift, "a": 58 + drift, "b": 73 + drift}
    figures = ablation.table(samples, rows, {"a": measured(30.0, "us"), "b": missing("no bandwidth", "us")})
    a, b, last = figures["kernels"]
    assert [row["kind"] for row in figures["kernels"]] == ["a", "b", "next_token"]
    assert [row["time_us"]["value"] for row in (a, b, last)] == [40, 25, 2]
    assert a["time_us"]["ci95"] == [40, 40]
    assert (a["floor_us"]["value"], a["gap_us"]["value"]) == (30, 10)
    assert b["gap_us"] == {"value": None, "unit": "us", "reason": "no bandwidth"}
    assert "too few bytes" in last["floor_us"]["reason"]
    assert (figures["token_us"]["value"], figures["sum_us"]["value"]) == (104.5, 67)
    assert "need not add up" in figures["meaning"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_graphs_without_a_kind_of_kernel_run_in_the_emulator(monkeypatch, dtype):
    """A real token's launches: each graph lacks its kind and nothing else, and none of them leaves its memory."""
    monkeypatch.setattr(ablation, "CONTEXT", 70)
    ran: list[str] = []
    with emulated_gpu(Emulator()) as gpu:
        monkeypatch.setattr(kernels, "loaded", lambda: [SimpleNamespace(spec=spec) for spec in gpu.launched])
        monkeypatch.setattr(ablation, "leaving_out", lambda skip: patched_loads(monkeypatch, gpu, skip))
        launch = gpu.emulator.launch
        monkeypatch.setattr(gpu.emulator, "launch", lambda name, *a, **o: (ran.append(name), launch(name, *a, **o)))
        ctx = Context(Checkpoint.random(CONFIG), None, dtype=dtype)
        ctx.model = ec.TernaryTransformer(ctx.checkpoint, **ctx.options)
        caches, order, kinds = ablation.record(ctx)
        products = list(CONFIG.products())
        assert [kind for kind in kinds if kind in products] == 2 * products
        assert kinds[0] == "embed"
        assert kinds[-2:] == ["lm_head", "next_token"]
        assert list(caches) == list(ablation.variants(kinds))
        for kind, recorded in caches.items():
            recorded.truncate(70)
            left_out = ablation.variants(kinds)[kind]
            for _ in range(3):
                ran.clear()
                ctx.model.decode_one_token(recorded.token, recorded)
                assert ran == [name for (name, _), k in zip(order, kinds, strict=True) if k not in left_out]
            assert recorded._device_lengths.tolist() == [73 if kind is None else 70]


class patched_loads:
    """:func:`ablation.leaving_out` for the emulator, whose launches do not pass through the loader."""

    def __init__(self, monkeypatch, gpu, skip):
        self._patches, self._gpu, self._skip = monkeypatch, gpu, skip

    def _load(self, spec):
        launch = self._gpu.load(spec)
        return lambda *args, **options: None if self._skip(spec.name) else launch(*args, **options)

    def __enter__(self):
        for module in (decoder, enqueue):
            self._patches.setattr(module, "load", self._load)

    def __exit__(self, *exception):
        for module in (decoder, enqueue):
            self._patches.setattr(module, "load", self._gpu.load)


def test_the_loader_s_launches_are_left_out(monkeypatch):
    from edgellm_cupy.kernels import loader

    launched = []
    monkeypatch.setattr(loader.Kernel, "__call__", lambda self, *args, **options: launched.append((args, options)))
    kernel = object.__new__(loader.Kernel)
    kernel.spec = SimpleNamespace(name="a kernel")
    with ablation.leaving_out(lambda name: name == "a kernel"):
        kernel((1,), (32,), ())
    kernel((1,), (32,), (), cluster=8)
    assert launched == [(((1,), (32,), ()), {"cluster": 8})]


# ---- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_everything(measured_tokens):
    """A report with the figures of a GPU where the test needs them."""
    result = suite.run(context(), ["hardware", "scaling", "kernels"])
    drift = np.arange(10.0)
    rows = ablation.describe([("k1", "a.cu"), ("k3", "next_token.cu")], ["a", "next_token"])
    samples = {None: 100 + drift, "next_token": 98 + drift, "a": 58 + drift}
    result["parts"]["kernels"]["where_the_time_goes"] = ablation.table(samples, rows, {"a": measured(30.0, "us")})
    result["parts"]["tokens"] = measured_tokens
    return result


def test_markdown_shows_the_new_figures(with_everything):
    text = report.markdown(with_everything)
    assert "| kind | kernels | files | launches_per_token | time_us (us) | floor_us (us) | gap_us (us) |" in text
    assert "| a | k1 | a.cu | 1 | 40 | 30 | 10 |" in text
    assert "| next_token | k3 | next_token.cu | 1 | 2 | null | null |" in text
    assert "### batches\n\n| batch | tok_s (tok/s) | latency (ms) |" in text
    assert "### sampling\n\n| sampling | latency (ms) | over_greedy_us (us) |" in text
    assert "| time_16k_over_0 | " in text
    assert "of: time a token at context 16384 over 12" in text
    assert "{'" not in text


def test_terminal_shows_the_new_headlines(with_everything):
    out = StringIO()
    Console(file=out, width=80).print(terminal.summary(with_everything))
    shown = out.getvalue()
    for key in ("batch_tok_s", "prompt_tok_s", "time_to_first_token_ms", "time_16k_over_0"):
        assert key in shown


def test_a_narrow_terminal_cuts_no_figure(with_everything):
    def words(width: int) -> list[str]:
        out = StringIO()
        Console(file=out, width=width).print(terminal.summary(with_everything))
        assert max(map(len, out.getvalue().splitlines())) <= width
        return out.getvalue().split()

    assert "…" not in "".join(words(60))
    figures = {word for word in words(80) if word[0].isdigit()}
    assert len(figures) > 10
    assert figures <= set(words(60))


COMMITTED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/*/report.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_committed_reports_still_render(path, tmp_path):
    """Also those of older schemas."""
    assert report.remake(path, tmp_path)[0].read_text(encoding="utf-8").startswith("# edgellm benchmark: ")
    Console(file=StringIO(), width=80).print(terminal.summary(report.load(path)))


# ---- edgellm verify -------------------------------------------------------------------------------------------------


def failures_of(emulator, monkeypatch, case, config=CONFIG):
    monkeypatch.setattr(verify, "_PROMPTS", ((9, 9), (7, 4)))
    monkeypatch.setattr(verify, "_DEEP", 70)
    monkeypatch.setattr(verify, "_VOCABULARY", 100)
    monkeypatch.setattr(verify, "_TOKENS", ((5, 99), (0, 7)))
    with emulated_gpu(emulator) as gpu:
        gpu.cupy.zeros = lambda *args: np.zeros(*args).view(Array)
        return list(verify._check_decoder(verify._two_layers(config), case))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return new_emulator()


@pytest.mark.parametrize("case", [c for c in verify.DECODER_CASES if c.dtype != "float32"][1::2], ids=str)
def test_right_decoders_are_verified(emulator, monkeypatch, case):
    assert failures_of(emulator, monkeypatch, case) == []


def test_a_wrong_decoder_is_found(emulator, monkeypatch):
    monkeypatch.setattr(verify, "ReferenceTransformer", lambda checkpoint, **options: ec.reference.TernaryTransformer(
        replace(checkpoint, config=replace(checkpoint.config, rope_theta=10.0)), **options
    ))  # fmt: skip
    messages = failures_of(emulator, monkeypatch, verify.DECODER_CASES[3])
    assert any("error" in message and "of the largest logit" in message for message in messages)


@pytest.mark.parametrize("gpu", ["T4", "A100", "H200", "B200", "RTX 5090"])
def test_verify_reaches_every_kernel_of_the_presets(monkeypatch, gpu):
    """Launches that do nothing, of the real shapes."""
    monkeypatch.setattr(verify, "ReferenceTransformer", verify.TernaryTransformer)
    monkeypatch.setattr(decoder.KVCache, "fill_random", lambda cache, n: cache._set_lengths([n] * cache.batch))
    two_layers = cache(verify._two_layers)
    nothing = SimpleNamespace(build=lambda specs: None, launch=lambda *args, **options: None)
    with emulated_gpu(nothing, GPUS[gpu]) as device, np.errstate(invalid="ignore"):
        device.cupy.zeros = lambda *args: np.zeros(*args).view(Array)
        device.cupy.full = lambda *args: np.full(*args).view(Array)
        monkeypatch.setattr(verify, "load", device.load)
        for config in verify.PRESETS.values():
            for case in verify.DECODER_CASES:
                list(verify._check_decoder(two_layers(config), case))
        monkeypatch.setattr(verify, "_VOCABULARIES", (300,))
        list(verify._check_sampling(device.cupy, np.random.default_rng(0)))
    norms = {norm_spec(dtype) for dtype in ("float16", "bfloat16", "float32")}  # other cases have those
    expected = {spec for config in verify.PRESETS.values() for spec in decoder_specs(config, GPUS[gpu])}
    assert {spec.name for spec in expected - device.launched - norms} == set()


def test_sampled_tokens_are_verified(emulator, monkeypatch):
    monkeypatch.setattr(verify, "_VOCABULARIES", (300,))
    with emulated_gpu(emulator) as gpu:
        monkeypatch.setattr(verify, "load", gpu.load)
        gpu.cupy.full = lambda *args: np.full(*args).view(Array)
        assert list(verify._check_sampling(gpu.cupy, np.random.default_rng(0))) == []
        monkeypatch.setattr(verify, "sample", lambda logits, s, seen, positions: np.zeros(len(logits), np.int32))
        assert len(list(verify._check_sampling(gpu.cupy, np.random.default_rng(0)))) == len(verify._SAMPLINGS)
