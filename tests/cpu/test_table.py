"""The table of shapes: its problems and their check, a run on a GPU that is played by NumPy, and what is made of it."""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import edgellm_cupy as ec
from edgellm_cupy import cli, kernels, runtime
from edgellm_cupy.bench import statistics, suite, timing
from edgellm_cupy.bench.context import Context
from edgellm_cupy.bench.journal import Journal
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.parts import baselines, latency, reproducibility, table
from edgellm_cupy.bench.parts.roofline import RoofFacts
from edgellm_cupy.bench.parts.shapes import TABLE, TOKENS, Shape
from edgellm_cupy.bench.reporting import report, table_figures
from edgellm_cupy.formats.checkpoint import Checkpoint
from edgellm_cupy.kernels import launch
from edgellm_cupy.reference import ops

NO_GPU = "the NumPy backend was asked for"
SMALL = (Shape("2B4T", "qkv", 70, 128), Shape("SmolLM", "out", 40, 64))
CONFIG = ec.ModelConfig("tiny", 1, 64, 64, 1, 1, 64, 256, max_context=128)
TIMES = {"adaptive": 4.0, "streaming": 4.0, "separate": 5.0, "alone": 6.0, "cuBLAS": 12.0, "product": 8.0, "floor": 2.0}


def context(no_gpu: str | None, tokens: tuple[int, ...]) -> Context:
    return Context(Checkpoint.random(CONFIG), no_gpu, tokens=tokens)


# ---- the problems ---------------------------------------------------------------------------------------------------


def test_the_shapes_are_the_sixteen_of_the_table():
    assert len({shape.name for shape in TABLE}) == len(TABLE) == 16
    assert max(shape.m * shape.k for shape in TABLE) == 57344 * 8192


def test_a_problem_is_ternary_and_the_same_every_time():
    first, second = (table.Problem.random(SMALL[0], 3) for _ in range(2))
    assert np.array_equal(first.W.packed, second.W.packed)
    assert np.array_equal(first.x, second.x)
    share = np.bincount(first.W.to_int8().reshape(-1) + 1) / first.W.to_int8().size
    assert share == pytest.approx([1 / 3] * 3, abs=0.02)
    assert (first.x.dtype, first.gamma.dtype) == (np.float16, np.float16)


class FakeArray(np.ndarray):
    """A NumPy array with the one method of CuPy's that the check needs."""

    def get(self) -> np.ndarray:
        return np.asarray(self)


def fake_cupy() -> SimpleNamespace:
    def asarray(a):
        return np.array(a).view(FakeArray)

    pool = SimpleNamespace(free_all_blocks=lambda: None)
    return SimpleNamespace(
        asarray=asarray,
        empty=lambda shape, dtype: np.empty(shape, dtype).view(FakeArray),
        empty_like=np.empty_like,
        isnan=np.isnan,
        float16=np.float16,
        get_default_memory_pool=lambda: pool,
        cuda=SimpleNamespace(
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            runtime=SimpleNamespace(runtimeGetVersion=lambda: 13000),
        ),
    )


@pytest.mark.parametrize("activation", ["int8", "float"])
def test_the_sample_finds_a_wrong_row_and_an_unwritten_result(monkeypatch, activation):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(table, "_SAMPLE_TOKENS", 4)
    monkeypatch.setattr(table, "_SAMPLE_WEIGHTS", 20 * 128)
    p = table.Problem.random(SMALL[0], 9)
    y = np.empty((9, 70), np.float16).view(FakeArray)
    ops.rmsnorm_ternary_matmul(p.x, p.gamma, p.W, table.EPS, activation, out=y)
    sample = p.sample(9, activation)
    assert (len(sample.tokens), len(sample.rows)) == (4, 20)
    assert (sample.tokens[-1], sample.rows[-1]) == (8, 69)
    assert sample.check(y) is None
    assert p.sample(1, activation).check(y[0]) is None
    outside = next(row for row in range(70) if row not in sample.rows)
    y[8, outside] = np.nan
    assert sample.check(y) == "1 of 630 results are NaN"
    y[8, outside], y[8, 69] = 0, 9
    assert "in a sample of 4 tokens and 20 rows: y[3, 19] is 9" in sample.check(y)


# ---- a run ----------------------------------------------------------------------------------------------------------


class FakeGpu:
    """NumPy in the GPU's place: real results, and the times of :data:`TIMES`."""

    def __init__(self) -> None:
        self.ran = "adaptive"
        self.seen: list[tuple[str, str, int]] = []

    def fused(self, x, gamma, W, eps, activation, strategy, out):
        self.ran = strategy if launch._overlap else "alone"
        ops.rmsnorm_ternary_matmul(x, gamma, W, eps, activation, None, strategy, out)

    def kernel(self, rotation, rule, prepare=None):
        if prepare is None:  # a glance
            return self.series(TIMES[self.ran], 1, rotation.launches)
        prepare()
        for call in rotation.calls:
            call()
        self.seen.append((self.ran, rotation.l2, rotation.launches))
        factor = 1.0 if rotation.l2 == "cold" else 0.5
        return self.series(TIMES[self.ran] * factor, len(rotation.calls), rotation.launches)

    @staticmethod
    def series(us, copies, launches):
        return statistics.summarise([us] * 10, "us", copies=copies, launches_per_sample=launches)


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    gpu, cp = FakeGpu(), fake_cupy()

    class CuBlas:
        version, library = "13.0.0", "fake"

        def product(self, w, x, y):
            gpu.ran = "cuBLAS" if gpu.ran == "norm" else "product"
            y[...] = (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.float16)

    def norm(x, gamma, eps, out):
        gpu.ran = "norm"
        ops.rmsnorm(x, gamma, eps, out)

    def copies(W):
        packed, scale = cp.asarray(W.packed), cp.asarray(W.scale)
        return [ec.TernaryWeight(packed, scale, W.shape) for _ in range(3)]

    for module, name, stand_in in (
        (ec, "rmsnorm_ternary_matmul", gpu.fused),
        (ec, "rmsnorm", norm),
        (suite, "_examined", lambda ctx: {"found": []}),
        (suite, "_telemetry", lambda ctx: ctx.telemetry),
        (table, "current_roof_facts", lambda: RoofFacts(90, 132, measured(1980.0, "MHz"))),
        (table, "cold_weights", copies),
        (table, "measure_bandwidth", lambda ctx, rule: measured(4000.0, "GB/s")),
        (table, "measure_floor", lambda ctx, data, l2, rule: gpu.series(2.0, 3, 51) | {"blocks": 1, "threads": 2}),
        (table, "TABLE", SMALL),
        (timing, "kernel", gpu.kernel),
        (timing, "l2_bytes", lambda: 1 << 12),
        (baselines, "CuBlas", CuBlas),
        (reproducibility, "environment", lambda ctx: dict.fromkeys(("git_commit", "git_modified"), missing("x"))),
    ):
        monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setitem(sys.modules, "cupy", cp)
    return gpu


def measure(tokens: tuple[int, ...], seed: int = 0) -> report.Report:
    ctx = context(None, tokens)
    ctx.seed = seed
    result = suite.run(ctx, ["latency"], "edgellm bench latency --shapes table")
    assert result["errors"] == {}
    return json.loads(report._json(result))


def test_every_series_of_every_shape(gpu):
    result = measure((1, 2, 16, 2048))
    assert suite.exit_code(result) == 0
    found = list(table_figures.lines(result["parts"]["latency"]["table"]))
    assert len(found) == 2 * 4 * 2
    one, sixteen = found[0], found[4]
    assert {key: one[key]["value"] for key in ("time", "floor", "ratio", "alone", "warm", "cublas", "over_cublas")} == {
        "time": 4.0, "floor": 2.0, "ratio": 2.0, "alone": 6.0, "warm": 2.0, "cublas": 12.0, "over_cublas": 3.0
    }  # fmt: skip
    moved = 70 * 2 * 16 + 70 * 4 + 2 * 128 + 2 * (128 + 70)  # codes, scales, gamma, x and y
    assert one["gb_per_s"]["value"] == pytest.approx(moved / 4e3)
    assert one["bandwidth_pct"]["value"] == pytest.approx(moved / 4e3 / 40)
    assert one["tera_ops"] is None
    assert sixteen["tera_ops"]["value"] == pytest.approx(2 * 16 * 70 * 128 / 4e6)
    assert sixteen["alone"] is None
    assert sixteen["over_better"]["value"] == 1.0
    assert found[2]["over_better"] is None  # N = 2
    assert one["time"]["samples"] == [4.0] * 10
    assert one["ratio"]["ci95"] == pytest.approx([2.0, 2.0])
    assert one["bandwidth_pct"]["ci95_reason"] == "no interval of both"  # the stand-in of the bandwidth has none
    assert all("conditions" in figure for figure in (one["floor"], one["cublas"], one["product"], one["row"]))
    assert one["row"]["correct"]


def test_the_summary_is_computed_from_the_json(gpu):
    figures = measure((1, 2, 16, 2048))["parts"]["latency"]
    assert figures["summary"] == table_figures.summary(figures["table"])
    values = {key: figure["value"] for key, figure in figures["summary"].items()}
    assert values["ratio_to_floor_int8_geomean"] == pytest.approx(2.0)
    assert values["alone_over_time_float_geomean"] == pytest.approx(1.5)
    assert values["time_2_tokens_over_1_geomean"] == 1.0
    assert values["time_4_tokens_over_1_geomean"] is None  # not asked for
    assert values["rate_over_cublas_product_2048_int8_min"] == 2.0
    assert values["warm_over_cold_max"] == 0.5
    assert values["adaptive_over_better_strategy_max"] == 1.0
    faster = figures["summary"]["faster_than_cublas_16_to_256"]
    assert (faster["value"], faster["of"]) == (1, 1)  # of the two shapes only one belongs to 2B4T and Llama-8B


def test_extremes_name_their_line(gpu):
    figures = measure((1,))["parts"]["latency"]["table"]
    figures["shapes"][1]["tokens"][0]["rows"][1]["ratio_to_floor"]["cold"] = measured(7.0, "x")
    worst = table_figures.summary(figures)["ratio_to_floor_float_max"]
    assert (worst["value"], worst["where"]) == (7.0, "SmolLM out, N = 1, float")


def test_a_wrong_result_has_no_speed(gpu, monkeypatch):
    right = gpu.fused

    def wrong(x, gamma, W, eps, activation, strategy, out):
        right(x, gamma, W, eps, activation, strategy, out)
        if activation == "float" and strategy != "streaming" and W.shape[0] == 70:
            out[..., 7] = 9

    monkeypatch.setattr(ec, "rmsnorm_ternary_matmul", wrong)
    result = measure((1,))
    assert suite.exit_code(result) == 4
    assert sorted(line.partition(": ")[0] for line in result["failures"]) == [
        "2B4T qkv, N = 1, float, adaptive",
        "2B4T qkv, N = 1, float, separate",
    ]
    right_row, wrong_row = result["parts"]["latency"]["table"]["shapes"][0]["tokens"][0]["rows"]
    assert right_row["correct"]
    assert not wrong_row["correct"]
    nulls = [*wrong_row["kernel"].values(), wrong_row["gb_per_s"], wrong_row["ratio_to_floor"]["cold"]]
    assert all(figure["reason"].startswith("wrong result: ") for figure in nulls)
    assert wrong_row["strategies"]["streaming"]["value"] == 4.0
    assert result["parts"]["latency"]["summary"]["ratio_to_floor_float_max"]["value"] is None
    assert "| 2B4T qkv **wrong** | 70 x 128 | 1 | float | null |" in report.markdown(result)


def test_a_result_that_is_wrong_after_timing_only(gpu, monkeypatch):
    kernel = gpu.kernel

    def late(rotation, rule, prepare=None):
        series = kernel(rotation, rule, prepare)
        if prepare:
            prepare()  # the graph wrote nothing
        return series

    monkeypatch.setattr(timing, "kernel", late)
    result = measure((1,))
    assert suite.exit_code(result) == 4
    assert "results are NaN" in result["failures"][0]
    cublas = result["parts"]["latency"]["table"]["shapes"][0]["tokens"][0]["baselines"]["cublas_fp16"]["cold"]
    assert cublas["value"] is None
    assert not any("cuBLAS" in line for line in result["failures"])  # somebody else's failure is none of ours


def test_memory_that_does_not_last_is_no_failure(gpu, monkeypatch):
    def full(rotation, rule, prepare=None):
        raise MemoryError("out of memory")

    monkeypatch.setattr(timing, "kernel", full)
    result = measure((1,))
    assert suite.exit_code(result) == 0
    row = result["parts"]["latency"]["table"]["shapes"][0]["tokens"][0]["rows"][0]
    assert row["kernel"]["cold"] == {"value": None, "unit": "us", "reason": "out of memory"}


def test_the_series_of_a_row_have_as_many_launches(gpu, monkeypatch):
    glances = iter(range(1, 1000))
    monkeypatch.setattr(timing, "launches_of", lambda call: 51 * next(glances))  # no two are alike
    measure((1, 16))
    series = Counter(launches for _, _, launches in gpu.seen)
    assert len(series) == 2 * 2 * 4  # shapes, numbers of tokens, baselines and activations
    assert sorted(series.values()) == [1] * 4 + [2] * 4 + [4] * 4 + [5] * 4  # with `alone` and the strategies


def test_ctrl_c_between_two_rows_keeps_all_that_are_finished(gpu, monkeypatch, tmp_path):
    measures = table._Product.measure

    def interrupted(product):
        figures = measures(product)
        if product._ctx.interrupted:
            return figures
        raise KeyboardInterrupt  # as between two shapes

    monkeypatch.setattr(table._Product, "measure", interrupted)
    ctx = context(None, (1,))
    with closing(Journal.open(tmp_path, {"x": 1}, resume=False)) as ctx.journal:
        result = suite.run(ctx, ["latency"], "edgellm bench latency --shapes table")
    assert result["interrupted"]
    known = [line["time"]["value"] for line in table_figures.lines(result["parts"]["latency"]["table"])]
    assert sorted(known, key=str) == [4.0, 4.0, None, None]  # of the first of two shapes


def test_nothing_in_a_row_always_follows_the_same(gpu, monkeypatch):
    monkeypatch.setattr(table, "TABLE", SMALL[:1])
    first, pairs = set(), set()
    for seed in range(12):
        gpu.seen.clear()
        measure((1, 16), seed)
        ran = [(what, l2) for what, l2, _ in gpu.seen]
        first.add(next(what for what, _ in ran if what in ("cuBLAS", "product", "adaptive")))
        pairs |= {l2 for what, l2 in ran[:1]}
    assert first == {"cuBLAS", "product", "adaptive"}
    assert pairs == {"cold", "warm"}


@pytest.mark.parametrize(("us", "launches"), [(1.0, 51), (230.0, 24), (4000.0, 9)])
def test_a_floor_that_takes_long_needs_fewer_launches(monkeypatch, us, launches):
    data = [np.arange(8, dtype=np.uint32).view(FakeArray) for _ in range(3)]
    sink = np.zeros(1, np.uint32).view(FakeArray)
    cp = fake_cupy()
    cp.zeros, cp.uint32 = (lambda size, dtype: sink), np.uint32
    cp.cuda.Device = lambda: SimpleNamespace(attributes={"MultiProcessorCount": 4})
    seen = []

    def kernel(rotation, rule):
        if rule is not timing.GLANCE:
            seen.append(rotation.launches)
        return FakeGpu.series(us, 3, rotation.launches)

    def load(spec):
        return lambda grid, block, arguments: sink.fill(np.bitwise_xor.reduce(data[0]))

    monkeypatch.setitem(sys.modules, "cupy", cp)
    monkeypatch.setattr(kernels, "load", load)
    monkeypatch.setattr(timing, "kernel", kernel)
    ctx = context(None, ())
    floor = latency.measure_floor(ctx, data, "cold", timing.QUICK)
    assert ctx.failures == []
    assert floor["median"]["value"] == us
    assert set(seen) == {launches}  # whole rounds through three copies
    assert len(seen) == 13


@pytest.mark.parametrize(("us", "least"), [(1.0, 50), (100.0, 50), (250.0, 20), (1e4, 8)])
def test_a_long_launch_needs_fewer_in_a_graph(monkeypatch, us, least):
    monkeypatch.setattr(timing, "kernel", lambda rotation, rule: FakeGpu.series(us, 1, rotation.launches))
    assert timing.launches_of(lambda: None) == least


# ---- what a reader sees ---------------------------------------------------------------------------------------------


def test_text_and_markdown_have_a_line_for_each_row(gpu):
    result = measure((1, 16))
    text = table_figures.text(result["parts"]["latency"]["table"])
    rows = [line for line in text.splitlines() if line.startswith(("2B4T qkv", "SmolLM out"))]
    assert len(rows) == 8
    assert max(map(len, rows)) <= 140
    assert "ratio_to_floor_int8_geomean" in text
    markdown = report.markdown(result)
    assert markdown.startswith("# edgellm benchmark: a table of 2 shapes on ")
    assert markdown.count("\n| 2B4T qkv | 70 x 128 | ") == 4
    assert "| ratio_to_floor_int8_geomean | 2 x | n: 2; interval 2 to 2 |" in markdown
    assert "throttled" not in text
    assert "programmatic dependent launch" in markdown
    assert "| Model |" not in markdown


THROTTLED = {"sm_clock_mhz": measured(1500.0, "MHz"), "throttled": measured(True)}


def marked(result: report.Report) -> tuple[set[str], dict[str, str]]:
    """Names and marks of the lines of Markdown, and `throttled` of each figure of the summary, made from this JSON."""
    lines = report.markdown(json.loads(report._json(result))).splitlines()
    summary = table_figures.summary(result["parts"]["latency"]["table"])
    return (
        {" |".join(line.split(" |")[:4]) for line in lines if " **throttled" in line and line.startswith("| ")},
        {key: figure["throttled"] for key, figure in summary.items() if "throttled" in figure},
    )


def test_what_rests_on_a_throttled_row_is_marked(gpu):
    result = measure((1, 2, 2048))
    assert marked(result) == (set(), {})
    row = result["parts"]["latency"]["table"]["shapes"][0]["tokens"][2]["rows"][0]
    row["conditions"] = THROTTLED
    lines, summary = marked(result)
    assert lines == {
        "| 2B4T qkv **throttled** | 70 x 128 | 2,048 | int8",
        "| 2B4T qkv, N = 2048 **throttled** | 2,048 | cold | int8",  # of the roofline
        "| 2B4T qkv, N = 2048 **throttled** | 2,048 | warm | int8",
    }
    rate = "rate_over_cublas_product_2048_int8"
    assert summary == {f"{rate}_geomean": "1 of 1", f"{rate}_min": "1 of 1", "warm_over_cold_max": "1 of 12"}
    found = table_figures.summary(result["parts"]["latency"]["table"])
    assert found[f"{rate}_min"]["where"] == "2B4T qkv, N = 2048, int8, throttled"
    text = table_figures.text(result["parts"]["latency"]["table"])
    assert [line.split()[5:7] for line in text.splitlines() if " * " in line] == [["2048", "int8"]]
    assert f"{rate}_min" in text
    assert "(2B4T qkv, N = 2048, int8, throttled; throttled: 1 of 1)" in text


def test_what_rests_on_a_throttled_yardstick_is_marked(gpu):
    result = measure((1, 2048))
    latency = result["parts"]["latency"]
    latency["table"]["shapes"][1]["floor"]["cold"]["conditions"] = THROTTLED
    first, second = latency["table"]["shapes"][0]["tokens"]
    first["baselines"]["cublas_fp16"]["cold"]["conditions"] = THROTTLED
    second["baselines"]["cublas_fp16_product"]["cold"]["conditions"] = THROTTLED
    lines, summary = marked(result)
    assert lines == {
        *(f"| SmolLM out **throttled: floor** | 40 x 64 | {n:,} | {a}" for n in (1, 2048) for a in ("int8", "float")),
        *(f"| 2B4T qkv **throttled: cuBLAS** | 70 x 128 | 1 | {a}" for a in ("int8", "float")),
        *(f"| 2B4T qkv **throttled: GEMM** | 70 x 128 | 2,048 | {a}" for a in ("int8", "float")),
    }
    assert summary == {
        **{f"ratio_to_floor_{a}_{how}": "1 of 2" for a in ("int8", "float") for how in ("geomean", "max")},
        **{
            f"rate_over_cublas_product_2048_{a}_{how}": "1 of 1"
            for a in ("int8", "float")
            for how in ("geomean", "min")
        },
    }
    latency["bandwidth"]["conditions"] = THROTTLED
    lines, _ = marked(result)
    assert "| SmolLM out **throttled: floor, bandwidth** | 40 x 64 | 1 | int8" in lines
    assert "| SmolLM out, N = 1 **throttled: bandwidth** | 1 | cold | int8" in lines


def test_baselines_of_an_older_report_ran_in_the_row(gpu):
    result = measure((2048,))
    entry = result["parts"]["latency"]["table"]["shapes"][0]["tokens"][0]
    for pair in entry["baselines"].values():
        for figure in pair.values():
            del figure["conditions"]
    for row in entry["rows"]:
        row["conditions"] = THROTTLED
    line = next(table_figures.lines(result["parts"]["latency"]["table"]))
    assert line["throttled"] == ["time", "cuBLAS", "GEMM"]
    assert table_figures.mark(line["throttled"]) == "throttled"


def test_without_a_gpu_everything_is_null_with_the_reason(tmp_path):
    arguments = ["bench", "latency", "--shapes", "table", "--backend", "numpy", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "a table of 16 shapes on the NumPy backend" in done.stdout
    assert "Llama-70B" not in done.stdout  # a table of nulls tells nothing
    result = report.load(tmp_path / "report.json")
    found = list(table_figures.lines(result["parts"]["latency"]["table"]))
    assert len(found) == 16 * len(TOKENS) * 2
    for line in found:
        for key in table_figures.COLUMNS:
            assert line[key] is None or line[key]["reason"] == NO_GPU
    assert result["summary"]["model_name"]["value"] is None
    assert (tmp_path / "report.md").read_text().count(NO_GPU) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shapes", "table"], "--shapes: only for `edgellm bench latency`"),
        (["bench", "--shapes", "table", "tokens"], "--shapes: not an option of `edgellm bench tokens`"),
        (["bench", "tokens", "--shapes", "table"], "No such option: --shapes"),
        (["bench", "latency", "--shapes", "table", "--model", "smollm-135m"], "without --model"),
        (["bench", "latency", "--shapes", "table", "--head", "int8"], "and the options of a model"),
        (["bench", "latency", "--shapes", "table", "--activation", "float"], "and the options of a model"),
        (["bench", "latency", "--tokens", "1"], "--tokens: only together with --shapes"),
        (["bench", "latency", "--shapes", "table", "--tokens", "1,x"], "--tokens is '1,x', expected"),
        (["bench", "latency", "--shapes", "table", "--tokens", "0"], "--tokens is '0', expected"),
    ],
)
def test_wrong_usage(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_tokens_are_sorted_and_each_is_taken_once():
    assert cli.options.numbers("16, 1,4,4") == (1, 4, 16)


def test_the_report_of_a_part_knows_its_commit_and_machine(monkeypatch):
    monkeypatch.setenv("EDGELLM_COMMIT", "e621a06")
    result = suite.run(context(NO_GPU, ()), ["transfer"])
    assert set(result["environment"]) >= {"git_commit", "git_modified", "gpu_model", "driver_version", "cuda_version"}
    assert "| Source | commit " in report.markdown(result)
    assert result["summary"]["gpu_model"]["reason"] == NO_GPU


def test_the_environment_names_the_gpu(monkeypatch):
    nvml = SimpleNamespace(driver_version=lambda: measured("580.1"))
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    monkeypatch.setattr(runtime, "device_name", lambda: "Test GPU")
    monkeypatch.setattr(reproducibility.hardware, "current_nvml_device", lambda: nvml)
    found = reproducibility.environment(context(None, ()))
    assert [found[key]["value"] for key in ("gpu_model", "driver_version", "cuda_version")] == [
        "Test GPU", "580.1", "13.0"
    ]  # fmt: skip
