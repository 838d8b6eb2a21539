"""The published schemas and the migration: what is written is valid, what is wrong is refused, old reports are read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import suite
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.journal import Journal
from edgellm_cupy.bench.metrics import is_metric
from edgellm_cupy.bench.reporting import migrate, report, schema
from edgellm_cupy.bench.reporting.schema.__main__ import main
from edgellm_cupy.formats.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "bench" / "results").glob("**/report.json"))
OLD = sorted((ROOT / "tests" / "data" / "reports").glob("*.json"))  # of git's history, with fewer rows and samples
REPORTS = [*COMMITTED, *OLD]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A fresh quick report of all parts on the NumPy backend, and the rows.jsonl of its run."""
    folder = tmp_path_factory.mktemp("run")
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256, max_context=128)
    ctx = Context(Checkpoint.random(config), "the NumPy backend was asked for", quick=True)
    ctx.journal = Journal.open(folder, {"workload": "tiny"})
    result = suite.run(ctx, command="edgellm bench --quick")
    ctx.journal.close()
    assert result["errors"] == {}
    return result, folder / "rows.jsonl"


@pytest.fixture(scope="module")
def fresh(run: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return run[0]


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    """A whole report of a GPU in the newest layout, as small as one can be."""
    return migrate.upgrade(read(ROOT / "tests" / "data" / "reports" / "1.2-h200.json"))


# ---- what is valid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [schema.REPORT, schema.ROW])
def test_a_schema_is_one_itself(file: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema.load(file))
    assert schema.load(file)["$id"] == file


def test_there_are_reports_to_check() -> None:
    assert len(COMMITTED) >= 3
    assert {read(path)["schema_version"] for path in OLD} == {"1.0.0", "1.1.0", "1.2.0"}


@pytest.mark.parametrize("path", REPORTS, ids=name)
def test_every_report_is_valid(path: Path) -> None:
    assert schema.faults(read(path)) == []


def test_a_fresh_report_is_valid_and_of_the_newest_layout(fresh: dict[str, Any]) -> None:
    assert schema.faults(fresh) == []
    assert fresh["schema_version"] == report.SCHEMA_VERSION == migrate.NEWEST


def test_every_line_of_the_rows_is_valid(run: tuple[dict[str, Any], Path]) -> None:
    path = run[1]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) > 10
    assert schema.check(path) == []


def test_parts_that_failed_or_were_not_asked_for_leave_a_valid_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: Context) -> dict[str, Any]:
        raise RuntimeError("on fire")

    monkeypatch.setattr(suite.PARTS["cpu"].module, "run", broken)
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256, max_context=128)
    result = suite.run(Context(Checkpoint.random(config), "none here", quick=True), ["hardware", "cpu"])
    assert "on fire" in result["errors"]["cpu"]["reason"]
    assert schema.faults(result) == []


def test_an_interrupted_report_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256, max_context=128)
    ctx = Context(Checkpoint.random(config), "none here", quick=True)
    ctx.interrupted = True
    result = suite.run(ctx, ["tokens", "scaling"])
    assert result["interrupted"]
    assert schema.faults(result) == []
    ctx = Context(Checkpoint.random(config), "none here", quick=True)
    ctx.progress = lambda line: (_ for _ in ()).throw(KeyboardInterrupt)  # in the first row that says what it does
    result = suite.run(ctx, ["tokens", "scaling"])
    assert result["interrupted"]
    assert schema.faults(result) == []


def test_keys_that_a_later_version_adds_are_valid(gpu: dict[str, Any]) -> None:
    later = copy.deepcopy(gpu)
    later["schema_version"] = "1.99.3"
    later["weather"] = {"rain": {"value": 3.5, "unit": "mm", "station": {"height_m": 12}}}
    later["summary"]["tokens_per_euro"] = {"value": None, "reason": "no price"}
    later["parts"]["moon"] = {"rows": [{"phase": "full", "share": {"value": 1.0}}]}
    later["parts"]["tokens"]["token_latency"]["skewness"] = {"value": 0.1}
    later["model"]["config"]["experts"] = 8
    assert schema.faults(later) == []


def test_the_schema_knows_the_keys_of_the_summary() -> None:
    document = schema.load(schema.REPORT)
    summary = document["properties"]["summary"]
    assert summary["required"] == list(summary["properties"]) == list(report.KEYS)
    for part in suite.PARTS:
        assert f"part_{part}" in document["$defs"]
        expected = {key for key, section in report.KEYS.items() if section == part}
        assert expected <= set(document["$defs"][f"part_{part}"]["required"])


# ---- what is refused ------------------------------------------------------------------------------------------------


def at(document: Any, place: str) -> tuple[Any, Any]:
    """The container and the key of a place such as ``parts.tokens.prompts.0``."""
    *path, last = (int(step) if step.isdigit() else step for step in place.split("."))
    for step in path:
        document = document[step]
    return document, last


def put(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def fault(document: dict[str, Any]) -> None:
        container, key = at(document, place)
        assert isinstance(container, list) or key in container  # a misspelt key would be valid, as an added one
        container[key] = value

    return fault


def add(place: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def fault(document: dict[str, Any]) -> None:
        container, key = at(document, place)
        assert key not in container
        container[key] = value

    return fault


def drop(place: str) -> Callable[[dict[str, Any]], None]:
    def fault(document: dict[str, Any]) -> None:
        container, key = at(document, place)
        del container[key]

    return fault


TOKENS = "parts.tokens"
ROW = "parts.latency.products.qkv.rows.0"
FAULTS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    # A null needs its reason, and what is measured has none.
    (put("summary.throughput_tok_s", {"value": None}), "'reason' is a required property"),
    (put("summary.throughput_tok_s", {"value": None, "reason": ""}), "summary.throughput_tok_s.reason"),
    (put("summary.throughput_tok_s", {"value": 3.0, "reason": "why not"}), "summary.throughput_tok_s"),
    (put("summary.throughput_tok_s", None), "summary.throughput_tok_s"),
    (put(f"{TOKENS}.token_latency.p99", {"value": None, "unit": "ms"}), "token_latency.p99"),
    (put(f"{TOKENS}.plan.runs", None), f"{TOKENS}.plan.runs"),
    (put(f"{ROW}.conditions.temperature_c", {"value": None}), "conditions.temperature_c"),
    (put("telemetry", None), "telemetry"),
    (put("seed", {"value": None}), "seed"),
    # Words in the place of a number, and other wrong types.
    (put("summary.throughput_tok_s.value", "N/A"), "summary.throughput_tok_s.value"),
    (put("summary.throughput_tok_s.value", "12.5"), "summary.throughput_tok_s.value"),
    (put("summary.gpu_model.value", "N/A"), "summary.gpu_model.value"),
    (put("summary.gpu_model.value", 7), "summary.gpu_model.value"),
    (put("summary.kv_cache_enabled.value", "yes"), "summary.kv_cache_enabled.value"),
    (put("parts.scaling.rows.0.context", "1k"), "scaling.rows[0].context"),
    (put("parts.scaling.rows.0.latency.samples", [1.0, "N/A"]), "samples[1]"),
    (put("parts.scaling.rows.0.latency.samples", []), "samples"),
    (put(f"{ROW}.correct", "true"), "rows[0].correct"),
    (put("quick", "no"), "quick"),
    (put("failures", [""]), "failures[0]"),
    (put("doctor", [{"level": "fine", "what": "a", "why": "b"}]), "doctor[0].level"),
    (put("errors", {"cpu": {}}), "errors.cpu"),
    (put("parts.hardware.gpu_model", "H200"), "parts.hardware.gpu_model"),
    # Numbers that JSON does not have.
    (put("summary.throughput_tok_s.value", float("nan")), "summary.throughput_tok_s.value: nan"),
    (put(f"{TOKENS}.token_latency.samples", [1.0, float("inf")]), "samples[1]: inf"),
    (put("seconds", {"cpu": float("nan")}), "seconds.cpu: nan"),
    # Intervals.
    (put("summary.throughput_tok_s.ci95", [5.0, 4.0]), "summary.throughput_tok_s.ci95: [5.0, 4.0] does not ascend"),
    (put("summary.throughput_tok_s.ci95", [5.0]), "summary.throughput_tok_s.ci95"),
    (put("summary.throughput_tok_s.ci95", [1.0, 2.0, 3.0]), "summary.throughput_tok_s.ci95"),
    (put("summary.throughput_tok_s.ci95", ["1", "2"]), "summary.throughput_tok_s.ci95"),
    (put("summary.throughput_tok_s.ci95", None), "'ci95_reason' is a required property"),
    (drop("parts.scaling.rows.0.latency.median.ci95"), "'ci95' is a required property"),
    # Keys that readers rest on.
    *((drop(key), f"{key!r} is a required property") for key in ("schema_version", "model", "parts", "summary")),
    *(
        (drop(key), f"{key!r} is a required property")
        for key in ("environment", "telemetry", "seed", "doctor", "stability")
    ),
    (drop("summary.persistence_mode"), "'persistence_mode' is a required property"),
    (drop(f"{TOKENS}.throughput_tok_s"), "'throughput_tok_s' is a required property"),
    (drop(f"{TOKENS}.token_latency.samples"), f"{TOKENS}.token_latency"),
    (drop(f"{TOKENS}.prompts.0.tok_s"), "'tok_s' is a required property"),
    (drop("parts.scaling.rows.0.boundary"), "'boundary' is a required property"),
    (drop(f"{ROW}.boundary"), "'boundary' is a required property"),
    (drop(f"{ROW}.conditions"), "'conditions' is a required property"),
    (drop(f"{ROW}.conditions.throttled"), "'throttled' is a required property"),
    (drop(f"{ROW}.conditions.after"), "'after' is a dependency of 'before'"),
    (drop(f"{ROW}.kernel.cold"), "'cold' is a required property"),
    (drop("parts.power.token.windows.0.joules"), "'joules' is a required property"),
    (drop("parts.latency.roofline"), "'roofline' is a required property"),
    (drop("model.decoder"), "'decoder' is a required property"),
    (drop("model.config.num_layers"), "'num_layers' is a required property"),
    (drop("environment.git_commit"), "'git_commit' is a required property"),
    # What is not one of a few.
    (put(f"{ROW}.boundary", "gpu"), "rows[0].boundary: 'gpu' is not one of"),
    (put(f"{TOKENS}.boundary", "kernel"), f"{TOKENS}.boundary"),
    (put("backend", "opencl"), "backend"),
    (put("schema_version", "2.0.0"), "schema_version"),
    (put("schema_version", "1.3"), "schema_version"),
    (put("schema_version", 1), "schema_version"),
    (put("no_gpu", "none here"), "no_gpu"),
    (put("model", None), "model"),
    (put("parts.latency.products", {}), "parts.latency"),
    (add("weather", {"rain": {"value": None}}), "weather.rain"),
    (add("parts.moon", {"phase": {"value": "N/A"}}), "parts.moon.phase.value"),
]


@pytest.mark.parametrize(("fault", "place"), FAULTS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_fault_is_found_and_named(gpu: dict[str, Any], fault: Callable[[dict[str, Any]], None], place: str) -> None:
    document = copy.deepcopy(gpu)
    fault(document)
    found = schema.faults(document)
    assert any(place in line for line in found), found


def test_the_report_that_faults_are_made_in_is_valid(gpu: dict[str, Any]) -> None:
    assert schema.faults(gpu) == []


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"key": "a", "seconds": 1.0, "figures": {}},
        {"key": "", "seconds": 1.0, "figures": {}, "failures": []},
        {"key": "a", "seconds": -1.0, "figures": {}, "failures": []},
        {"key": "a", "seconds": 1.0, "figures": [], "failures": []},
        {"key": "a", "seconds": 1.0, "figures": {"tok_s": {"value": None}}, "failures": []},
        {"key": "a", "seconds": 1.0, "figures": {"tok_s": {"value": float("nan")}}, "failures": []},
        {"key": "a", "seconds": 1.0, "figures": {"boundary": "moon"}, "failures": []},
        {"key": "a", "seconds": 1.0, "figures": {"conditions": {}}, "failures": []},
        {"key": "a", "seconds": 1.0, "figures": {}, "failures": [7]},
        {"identity": {"workload": "tiny"}},
        {"schema_version": "2.0.0", "identity": {"workload": "tiny"}},
        {"schema_version": "1.0.0", "identity": {}},
    ],
)
def test_a_wrong_line_of_the_rows_is_found(line: dict[str, Any]) -> None:
    good = {"key": "a", "seconds": 1.0, "figures": {"tok_s": {"value": 2.0, "unit": "tok/s"}}, "failures": ["y is 7"]}
    assert schema.faults(good, schema.ROW) == []
    assert schema.faults(line, schema.ROW)


def test_the_command_names_faults_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = OLD[0]
    broken, torn, empty = tmp_path / "broken.json", tmp_path / "torn.json", tmp_path / "rows.jsonl"
    document = read(good)
    document["summary"]["os"] = {"value": None}
    broken.write_text(json.dumps(document))
    torn.write_text("{")
    empty.write_text("")
    assert main([str(good)]) == 0
    assert capsys.readouterr().out == ""
    assert main([str(good), str(broken)]) == 1
    assert f"{broken}: summary.os: 'reason' is a required property" in capsys.readouterr().out
    assert main([str(empty)]) == 1
    assert main([str(torn)]) == 2
    assert str(torn) in capsys.readouterr().err
    assert main([]) == 2


# ---- old layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", REPORTS, ids=name)
def test_an_old_report_becomes_a_valid_one_of_the_newest_layout(path: Path) -> None:
    old = read(path)
    kept = copy.deepcopy(old)
    new = migrate.upgrade(old)
    assert old == kept  # pure
    assert new["schema_version"] == migrate.NEWEST
    assert new == old or schema.faults(new) == []  # if nothing changed: test_every_report_is_valid
    again = migrate.upgrade(new)
    assert again == new  # idempotent
    assert list(again) == list(new)
    assert next(iter(new)) == "schema_version"
    assert list(new)[-1] == "summary"


@pytest.mark.parametrize("path", OLD, ids=name)
def test_nothing_that_was_measured_changes_or_is_lost(path: Path) -> None:
    def compare(before: Any, after: Any, place: str) -> None:
        if isinstance(before, dict):
            assert list(before) == [key for key in after if key in before], place
            for key, value in before.items():
                compare(value, after[key], f"{place}.{key}")
            if not is_metric(before):
                added = {key: after[key] for key in after if key not in before}
                assert all(only_null(value) or key in told for key, value in added.items()), (place, added)
        elif isinstance(before, list):
            assert len(before) == len(after), place
            for i, (one, other) in enumerate(zip(before, after, strict=True)):
                compare(one, other, f"{place}[{i}]")
        else:
            assert before == after, place

    def only_null(value: Any) -> bool:
        if is_metric(value):
            return value["value"] is None and value["reason"].startswith("not recorded before 1.")
        return isinstance(value, dict) and all(map(only_null, value.values()))

    # What follows from the rest of the report, or from how a part measures.
    told = {"boundary", "environment", "resumed_rows", "stability", "decoder", "windows", "batches"}
    old, new = read(path), migrate.upgrade(read(path))
    order = ["schema_version", "summary"]  # may move
    compare(
        {key: value for key, value in old.items() if key not in order},
        {key: value for key, value in new.items() if key not in order},
        "",
    )
    assert new["summary"] == old["summary"]


def test_an_old_report_has_every_key_of_a_new_one(fresh: dict[str, Any]) -> None:
    for path in OLD:
        new = migrate.upgrade(read(path))
        assert set(fresh) <= set(new)
        for part in set(new["parts"]) - ({"latency"} if "table" in path.name else set()):
            figures = fresh["parts"][part]
            assert set(figures) <= set(new["parts"][part]), (path.name, part)
            assert new["parts"][part].get("boundary") == figures.get("boundary")


def test_what_1_0_lacked_is_told_from_its_parts_or_null_with_the_reason() -> None:
    old = read(ROOT / "tests" / "data" / "reports" / "1.0-h200.json")
    assert not {"environment", "telemetry", "seed"} & set(old)
    new = migrate.upgrade(old)
    assert new["environment"]["gpu_model"] == old["parts"]["hardware"]["gpu_model"]
    assert new["environment"]["git_commit"] == old["parts"]["reproducibility"]["source"]["git_commit"]
    assert new["environment"]["tuned"] == {"value": None, "reason": "not recorded before 1.1"}
    assert new["model"]["decoder"] == {"value": None, "reason": "not recorded before 1.2"}
    assert new["telemetry"] == {"value": None, "reason": "not recorded before 1.3"}
    product = next(iter(new["parts"]["latency"]["products"].values()))
    conditions = product["rows"][0]["conditions"]
    assert conditions["sm_clock_mhz"]["value"] > 0
    assert conditions["begin_s"] == {"value": None, "unit": "s", "reason": "not recorded before 1.3"}
    assert conditions["before"]["temperature_c"]["reason"] == "not recorded before 1.3"
    assert product["rows"][0]["boundary"] == "kernel"
    assert [row["boundary"] for row in new["parts"]["scaling"]["rows"]] == ["engine", "engine"]
    table = migrate.upgrade(read(ROOT / "tests" / "data" / "reports" / "1.1-table.json"))["parts"]["latency"]["table"]
    assert {row["boundary"] for line in table["shapes"][0]["tokens"] for row in line["rows"]} == {"kernel"}
    power = next(iter(new["parts"]["power"]["products"].values()))
    assert power["windows"] == [power["window"]]


def test_a_run_that_did_not_decode_has_no_decoder_and_an_unknown_environment() -> None:
    old = read(ROOT / "tests" / "data" / "reports" / "1.0-numpy.json")
    del old["parts"]["hardware"], old["parts"]["reproducibility"]
    old["model"]["head_bytes"] = None
    new = migrate.upgrade(old)
    assert new["model"]["decoder"] is None
    assert {figure["reason"] for figure in new["environment"].values()} == {"not recorded before 1.1"}


def test_what_disturbed_an_old_run_is_found_in_its_conditions() -> None:
    old = read(ROOT / "tests" / "data" / "reports" / "1.0-h200.json")
    assert migrate.upgrade(old)["stability"] == []
    product = next(iter(old["parts"]["latency"]["products"].values()))
    product["rows"][0]["conditions"]["throttled"] = {"value": True}
    assert "held its clocks down" in migrate.upgrade(old)["stability"][0]


def test_a_report_of_a_later_version_keeps_it() -> None:
    later = migrate.upgrade(read(OLD[0])) | {"schema_version": "1.10.0", "weather": {"rain": {"value": 3}}}
    new = migrate.upgrade(later)
    assert new == later
    assert list(new)[-2:] == ["weather", "summary"]


def test_every_command_reads_old_reports_in_the_newest_layout() -> None:
    assert report.load(OLD[0])["schema_version"] == migrate.NEWEST


@pytest.mark.parametrize("path", OLD, ids=name)
def test_the_command_rewrites_a_report_and_what_is_made_from_it(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = read(path)
    target = tmp_path / "report.json"
    target.write_text(json.dumps(old))
    (tmp_path / "report.md").write_text("stale")
    assert migrate.main([str(target)]) == 0
    assert f"{target}: {old['schema_version']} -> {migrate.NEWEST}" in capsys.readouterr().out
    assert read(target) == migrate.upgrade(old)
    assert "not recorded before 1.3" in (tmp_path / "report.md").read_text()
    assert f"schema {migrate.NEWEST}" in (tmp_path / "report.md").read_text()
    first = target.read_bytes()
    assert migrate.main([str(target)]) == 0
    assert target.read_bytes() == first
    assert not list(tmp_path.glob(".*"))


def test_the_command_leaves_what_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other, torn = tmp_path / "x.json", tmp_path / "report.json"
    other.write_text(OLD[0].read_text())  # whole, but its folder is not that of a run
    torn.write_text('{"schema_version": "1.0.0"}')
    for file in (other, torn):
        kept = file.read_bytes()
        assert migrate.main([str(file)]) == 2
        assert str(file) in capsys.readouterr().err
        assert file.read_bytes() == kept
    assert migrate.main([]) == 2
