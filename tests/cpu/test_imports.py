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


def test_llama_bench_options_that_differ_are_named():
    rows = read("llama-bench.jsonl").rows
    assert [row.name for row in rows] == ["tg128 [n_threads=8]", "tg128 [n_threads=16]"]
    assert len({row.match for row in rows}) == 2


def test_llama_bench_twice_the_same_test(tmp_path):
    test = raw("llama-bench.json")[1]
    path = tmp_path / "twice.json"
    rows = imports.imported([test, test], path).rows
    assert [row.name for row in rows] == ["tg128", "tg128 (2)"]


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
    assert {row.boundary for row in found.rows} == {"client"}
    assert rows["ttft"].samples == pytest.approx([1e3 * s for s in values["ttfts"]])
    assert rows["ttft"].value == pytest.approx(statistics.median(rows["ttft"].samples))
    assert rows["tg32"].value == pytest.approx(1e3 / values["median_tpot_ms"])
    assert rows["tg32"].better == rows["output throughput"].better == "higher"
    assert len(rows["inter-token latency"].samples) == sum(map(len, values["itls"]))
    assert rows["ttft"].facts["prompt_tokens"] == 512
    assert rows["ttft"].facts["concurrency"] == 1


def test_vllm_serve_appended_runs_are_told_apart():
    rows = read("vllm-serve-appended.json").rows
    assert [row.name for row in rows if row.name.startswith("ttft")] == [
        "ttft [max_concurrency=1]",
        "ttft [max_concurrency=8]",
    ]
    assert len({row.match for row in rows}) == len(rows)
    assert not any(row.samples for row in rows)


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
    serve = raw("vllm-serve.json")
    assert "median_tpot_ms is missing" in refuse(
        tmp_path, json.dumps({k: v for k, v in serve.items() if k != "median_tpot_ms"})
    )
    assert "completed 0 requests" in refuse(tmp_path, json.dumps({**serve, "completed": 0}))


def _missing(tmp_path: Path) -> str:
    with pytest.raises(imports.ImportFileError) as error:
        imports.read_json(tmp_path / "none.json")
    return str(error.value)
