"""Files of llama-bench and vLLM become rows with the right names, units and boundaries; others one clear error."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from edgellm_cupy.bench.comparing import imports

DATA = Path(__file__).parents[1] / "data" / "engines"


def read(name: str) -> imports.Imported:
    return imports.imported(imports.read_json(DATA / name), DATA / name)


def raw(name: str):
    return json.loads((DATA / name).read_text())


def rows_of(value, path: Path) -> list:
    return imports.imported(value, path).rows


def refuse(tmp_path: Path, text: str) -> str:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(imports.ImportFileError) as error:
        imports.imported(imports.read_json(path), path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_llama_bench_keeps_its_names_and_samples():
    found = read("llama-bench.json")
    assert found.kind == "llama-bench"
    assert [row.name for row in found.rows] == ["pp512", "tg128", "pp512+tg128", "tg128 @ d4096", "tg128 @ d16384"]
    assert [row.match for row in found.rows][3:] == ["tg @ d4096", "tg @ d16384"]  # the tokens there do not matter
    for row, test in zip(found.rows, raw("llama-bench.json"), strict=True):
        assert (row.boundary, row.unit, row.better) == ("engine", "tok/s", "higher")
        assert row.samples == tuple(test["samples_ts"])
        assert row.value == pytest.approx(statistics.median(test["samples_ts"]))
        assert row.facts["kv_type"] == "float16"
        assert row.facts["weight_bits"] == pytest.approx(8 * test["model_size"] / test["model_n_params"], abs=0.01)
    assert found.environment["gpu"] == "NVIDIA H200"


def test_llama_bench_options_are_kept_and_those_that_differ_are_named():
    found = read("llama-bench.jsonl")
    assert [row.name for row in found.rows] == ["tg128 [n_threads=8]", "tg128 [n_threads=16]"]
    assert {row.match for row in found.rows} == {"tg128"}  # what tells them apart is seen from both files
    assert [row.options["n_threads"] for row in found.rows] == ["8", "16"]
    no_options = {"build_commit", "build_number", "gpu_info", "cpu_info", "backends", "model_type", "model_size",
                  "model_n_params", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts",
                  "stddev_ts", "samples_ns", "samples_ts"}  # fmt: skip
    for row, line in zip(found.rows, (DATA / "llama-bench.jsonl").read_text().splitlines(), strict=True):
        assert row.options.keys() == json.loads(line).keys() - no_options
    assert found.environment.keys() >= found.rows[0].options.keys()
    assert found.environment["n_threads"] == "8, 16"
    assert (found.environment["flash_attn"], found.environment["no_host"]) == ("-1", "0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("poll", 0),
        ("n_cpu_moe", 7),
        ("tensor_buft_overrides", "x=CPU"),
        ("cpu_mask", "0xf"),
        ("an_option_to_come", True),
    ],
)
def test_llama_bench_every_option_tells_tests_apart(key, value, tmp_path):
    test = raw("llama-bench.json")[1]
    rows = rows_of([test, {**test, key: value}], tmp_path / "swept.json")
    shown = 1 if value is True else value
    assert [row.name for row in rows] == [f"tg128 [{key}={test.get(key, 'unset')}]", f"tg128 [{key}={shown}]"]


def test_llama_bench_twice_the_same_test_is_not_numbered(tmp_path):
    test = raw("llama-bench.json")[1]
    rows = rows_of([test, test], tmp_path / "twice.json")
    assert [(row.name, row.match) for row in rows] == [("tg128", "tg128")] * 2
    assert rows[0].options == rows[1].options


def test_llama_bench_several_counts_at_one_depth(tmp_path):
    test = next(test for test in raw("llama-bench.json") if test["n_depth"])
    rows = rows_of([{**test, "n_gen": 32}, test], tmp_path / "counts.json")
    assert [(row.name, row.match, row.options["n_gen"]) for row in rows] == [
        ("tg32 @ d4096", "tg @ d4096", "32"),
        ("tg128 @ d4096", "tg @ d4096", "128"),
    ]


@pytest.mark.parametrize(
    ("changed", "pace"),
    [
        ({}, "gpu"),
        ({"backends": "BLAS,CUDA", "n_gpu_layers": -1}, "gpu"),
        ({"backends": "CPU"}, "host"),
        ({"backends": "BLAS"}, "host"),
        ({"n_gpu_layers": 0}, "host"),
        ({"devices": "none"}, "host"),
        ({"gpu_info": ""}, "host"),
        ({"n_cpu_moe": 4}, "host"),
    ],
)
def test_llama_bench_on_the_cpu_is_paced_by_the_host(changed, pace, tmp_path):
    [row] = rows_of([{**raw("llama-bench.json")[1], **changed}], tmp_path / "some.json")
    assert row.pace == pace


def test_llama_bench_needs_little(tmp_path):
    entry = {"n_prompt": 0, "n_gen": 64, "avg_ts": 100.0}
    [row] = imports.imported([entry], tmp_path / "old.json").rows
    assert (row.name, row.value, row.samples, row.interval) == ("tg64", 100.0, (), None)
    mixed = {**entry, "type_k": "q8_0", "type_v": "f16", "unknown": {"key": [1]}}
    [row] = imports.imported([mixed], tmp_path / "new.json").rows
    assert row.facts["kv_type"] == "q8_0 and float16"


def test_vllm_latency():
    [row] = read("vllm-latency.json").rows
    assert (row.boundary, row.unit, row.better) == ("engine", "s", "lower")
    assert row.value == pytest.approx(statistics.median(raw("vllm-latency.json")["latencies"]))
    assert len(row.samples) == 30


def test_vllm_serve_with_samples():
    found, values = read("vllm-serve.json"), raw("vllm-serve.json")
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["ttft", "tg32", "inter-token latency", "output throughput"]
    assert {(row.boundary, row.pace) for row in found.rows} == {("client", "server")}
    assert rows["ttft"].samples == pytest.approx([1e3 * s for s in values["ttfts"]])
    assert rows["ttft"].value == pytest.approx(statistics.median(rows["ttft"].samples))
    assert rows["tg32"].value == pytest.approx(1e3 / values["median_tpot_ms"])
    assert rows["tg32"].better == rows["output throughput"].better == "higher"
    assert len(rows["inter-token latency"].samples) == sum(map(len, values["itls"]))
    assert rows["ttft"].facts["prompt_tokens"] == 512
    assert rows["ttft"].facts["concurrency"] == 1


def test_vllm_serve_appended_runs_are_told_apart():
    found = read("vllm-serve-appended.json")
    assert [row.name for row in found.rows if row.name.startswith("ttft")] == [
        "ttft [max_concurrency=1]",
        "ttft [max_concurrency=8]",
    ]
    assert [row.options["max_concurrency"] for row in found.rows if row.match == "client ttft"] == ["1", "8"]
    assert found.environment["max_concurrency"] == "1, 8"
    assert not any(row.samples for row in found.rows)


def test_vllm_serve_lengths_and_metadata_are_options(tmp_path):
    """Lengths that the requests do not share are rounded, or the model's choice."""
    run = raw("vllm-serve.json")
    completed = run["completed"]
    long = {**run, "total_input_tokens": 2048 * completed, "server_flags": "eager"}
    mixed = {**run, "total_input_tokens": 2048 * completed + 1, "total_output_tokens": 100 * completed + 1}
    found = imports.imported([run, long, mixed], tmp_path / "swept.json")
    firsts = [row for row in found.rows if row.match == "client ttft"]
    keys = ("prompt_tokens", "output_tokens", "server_flags")
    assert [[row.options.get(key) for key in keys] for row in firsts] == [
        ["512", "32", None],
        ["2048", "32", "eager"],
        ["2000", None, None],
    ]
    assert firsts[0].name == "ttft [prompt_tokens=512, output_tokens=32, server_flags=unset]"
    assert (firsts[2].facts["prompt_tokens"], firsts[2].facts["output_tokens"]) == (2048, 100)
    assert found.environment["server_flags"] == "unset, eager"


def test_vllm_serve_of_a_prefill_benchmark(tmp_path):
    """One output token a request: there is no time between tokens, and vLLM writes 0."""
    run = raw("vllm-serve.json")
    run |= {"total_output_tokens": run["completed"], "median_tpot_ms": 0.0, "median_itl_ms": 0.0, "itls": []}
    rows = rows_of(run, tmp_path / "prefill.json")
    assert [row.name for row in rows] == ["ttft", "output throughput"]
    assert len(rows[0].samples) == run["completed"]


@pytest.mark.parametrize(
    ("metric", "row"), [("ttft", "ttft"), ("tpot", "tg32"), ("itl", "inter-token latency"), (None, None)]
)
def test_vllm_serve_without_a_metric(metric, row, tmp_path):
    run = {key: value for key, value in raw("vllm-serve.json").items() if not key.endswith(f"_{metric}_ms")}
    names = {found.name for found in rows_of(run, tmp_path / "some.json")}
    assert names == {"ttft", "tg32", "inter-token latency", "output throughput"} - {row}


def test_vllm_serve_samples_of_failed_requests_are_left_out(tmp_path):
    run = raw("vllm-serve.json")
    run["ttfts"][3] = 0.0
    expected = [1e3 * s for s in run["ttfts"] if s > 0]
    rows = {row.name: row for row in rows_of(run, tmp_path / "failed.json")}
    assert rows["ttft"].samples == pytest.approx(expected)
    # Failed after its first token: seen from `errors` only.
    run["errors"] = ["", "timeout", *[""] * (len(run["ttfts"]) - 2)]
    rows = {row.name: row for row in rows_of(run, tmp_path / "failed.json")}
    assert rows["ttft"].samples == pytest.approx([expected[0], *expected[2:]])
    assert len(rows["inter-token latency"].samples) == sum(map(len, run["itls"])) - len(run["itls"][1])


@pytest.mark.parametrize("itls", [5, ["x"], [["x"]], [5], [[None, 0.1]]])
def test_vllm_serve_samples_that_are_none(itls, tmp_path):
    rows = {row.name: row for row in rows_of({**raw("vllm-serve.json"), "itls": itls}, tmp_path / "odd.json")}
    assert rows["inter-token latency"].value
    assert not rows["inter-token latency"].samples


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"schema_version": "1.2.0"}, "edgellm"),
        ([{"model_filename": "x"}], "llama-bench"),
        ({"avg_latency": 1}, "vLLM latency"),
        ({"output_throughput": 1, "completed": 3}, "vLLM serve"),
        ({"benchmarks": []}, None),
        ([], None),
        ([1], None),
        ("text", None),
    ],
)
def test_what_a_file_is(value, kind):
    assert imports.kind_of(value) == kind


def test_clear_errors(tmp_path):
    assert "cannot be read" in _missing(tmp_path)
    assert "nor JSON lines" in refuse(tmp_path, "{")
    assert "its keys are benchmarks" in refuse(tmp_path, '{"benchmarks": []}')
    assert "it is empty" in refuse(tmp_path, "[]")
    assert "n_gen is missing" in refuse(tmp_path, '[{"model_filename": "x", "n_prompt": 512, "avg_ts": 1}]')
    assert "avg_ts is 'fast'" in refuse(tmp_path, '[{"n_prompt": 512, "n_gen": 0, "avg_ts": "fast"}]')
    assert "avg_ts is 0" in refuse(tmp_path, '[{"n_prompt": 512, "n_gen": 0, "avg_ts": 0}]')
    assert "n_prompt and n_gen 0" in refuse(tmp_path, '[{"n_prompt": 0, "n_gen": 0, "avg_ts": 1}]')
    assert "expected objects" in refuse(tmp_path, '[{"n_prompt": 1, "n_gen": 0, "avg_ts": 1}, 5]')
    assert "avg_latency is missing" in refuse(tmp_path, '{"latencies": [1]}')
    test = {"n_prompt": 0, "n_gen": 8, "avg_ts": 1}
    assert "n_depth is 'x'" in refuse(tmp_path, json.dumps([{**test, "n_depth": "x"}]))
    assert "n_gen is inf" in refuse(tmp_path, json.dumps([{**test, "n_gen": float("inf")}]))
    assert "n_gen is 1.5" in refuse(tmp_path, json.dumps([{**test, "n_gen": 1.5}]))
    assert "model_size is '9'" in refuse(tmp_path, json.dumps([{**test, "model_size": "9"}]))
    assert "avg_ts is nan" in refuse(tmp_path, json.dumps([{**test, "avg_ts": float("nan")}]))
    assert "avg_ts is 1000" in refuse(tmp_path, json.dumps([{**test, "avg_ts": 10**400}]))
    assert "nor JSON lines" in refuse(tmp_path, "[" * 100_000)
    serve = raw("vllm-serve.json")
    assert "median_ttft_ms is 'x'" in refuse(tmp_path, json.dumps({**serve, "median_ttft_ms": "x"}))
    none = {key: value for key, value in serve.items() if not key.startswith("median")} | {"output_throughput": 0.0}
    assert "max_concurrency is '8'" in refuse(tmp_path, json.dumps({**serve, "max_concurrency": "8"}))
    assert "expected one of median_ttft_ms" in refuse(tmp_path, json.dumps(none))
    assert "completed 0 requests" in refuse(tmp_path, json.dumps({**serve, "completed": 0}))


def _missing(tmp_path: Path) -> str:
    with pytest.raises(imports.ImportFileError) as error:
        imports.read_json(tmp_path / "none.json")
    return str(error.value)
