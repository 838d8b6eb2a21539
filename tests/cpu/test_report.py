"""The report: its keys, what a figure may be, and the files."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import edgellm_cupy as ec
from edgellm_cupy.bench import statistics, suite
from edgellm_cupy.bench.context import Context, WrongResultError
from edgellm_cupy.bench.metrics import is_metric, measured, missing
from edgellm_cupy.bench.parts import cpu, hardware, reproducibility, scaling, tokens
from edgellm_cupy.bench.parts.reproducibility import infer_clock_locking
from edgellm_cupy.bench.reporting import document, markdown, report
from edgellm_cupy.formats.checkpoint import Checkpoint

# Copied from the original's final report, so that a renamed key cannot slip through.
KEYS = [
    "timestamp", "benchmark_version", "gpu_model", "driver_version", "cuda_version", "compute_capability",
    "vram_total_mb", "power_limit_w", "avg_power_w", "peak_power_w", "energy_per_token_j", "vram_used_mb",
    "host_ram_used_mb", "pcie_h2d_per_token_bytes", "pcie_d2h_per_token_bytes", "mean_token_latency_ms",
    "p50_token_latency_ms", "p90_token_latency_ms", "p95_token_latency_ms", "p99_token_latency_ms",
    "max_token_latency_ms", "token_gap_variance_ms2", "throughput_tok_s", "throughput_1k_ctx_tok_s",
    "throughput_4k_ctx_tok_s", "throughput_8k_ctx_tok_s", "throughput_16k_ctx_tok_s",
    "throughput_degradation_slope_pct_per_1k", "kernels_per_token", "avg_kernel_exec_time_ms", "gpu_utilization_pct",
    "cpu_utilization_pct", "cpu_peak_pct", "threads_used", "host_sync_calls_per_token", "model_name", "batch_size",
    "num_layers", "hidden_size", "quantization", "sampling_method", "temperature", "kv_cache_enabled", "os",
    "os_version", "nvcc_version", "gcc_version", "build_flags", "clock_locking", "persistence_mode",
]  # fmt: skip
NO_GPU = "the NumPy backend was asked for"


def context() -> Context:
    config = ec.ModelConfig("tiny", 2, 64, 128, 4, 2, 16, 256, max_context=128)
    return Context(Checkpoint.random(config), NO_GPU, quick=True)


@pytest.fixture(scope="module")
def whole() -> report.Report:
    return suite.run(context(), command="edgellm bench --quick")


def summary_table(text: str) -> list[str]:
    return text.rpartition("| Metric | Value |\n| --- | --- |\n")[2].splitlines()


# ---- the whole report -----------------------------------------------------------------------------------------------


def test_the_whole_benchmark_runs_without_a_gpu(whole):
    assert whole["errors"] == {}
    assert whole["failures"] == []
    assert list(whole["parts"]) == list(suite.PARTS)
    assert suite.exit_code(whole) == 0


def test_summary_has_exactly_the_original_keys_in_their_order(whole):
    assert list(whole["summary"]) == KEYS


def test_every_figure_is_a_value_or_null_with_its_reason(whole):
    def figures(x):
        if is_metric(x):
            yield x
        elif isinstance(x, (dict, list)):
            for inner in x.values() if isinstance(x, dict) else x:
                yield from figures(inner)

    seen = list(figures(whole))
    assert len(seen) > 200
    for figure in seen:
        if figure["value"] is None:
            assert isinstance(figure["reason"], str)
            assert figure["reason"]
        else:
            assert isinstance(figure["value"], (str, int, float, bool, list))
            assert figure["value"] != "N/A"
            assert "reason" not in figure


def test_host_figures_are_measured_and_gpu_figures_null(whole):
    summary = whole["summary"]
    for key in ("throughput_tok_s", "throughput_16k_ctx_tok_s", "mean_token_latency_ms", "cpu_utilization_pct"):
        assert summary[key]["value"] > 0
    for key in ("gpu_model", "vram_used_mb", "energy_per_token_j", "kernels_per_token", "persistence_mode"):
        assert summary[key]["value"] is None
        assert NO_GPU in summary[key]["reason"]


def test_timestamp_and_version_are_machine_readable(whole):
    from datetime import datetime

    assert datetime.fromisoformat(whole["summary"]["timestamp"]["value"]).utcoffset().total_seconds() == 0
    assert [int(number) for number in whole["schema_version"].split(".")] == [1, 3, 0]


# ---- parts that fail ------------------------------------------------------------------------------------------------


def test_a_part_that_raises_loses_only_its_own_figures(monkeypatch):
    def broken(ctx):
        raise RuntimeError("the sensor is on fire\nsecond line")

    monkeypatch.setattr(scaling, "run", broken)
    result = suite.run(context(), ["hardware", "scaling", "cpu"])
    assert suite.exit_code(result) == 6
    assert "the sensor is on fire second line" in result["summary"]["throughput_4k_ctx_tok_s"]["reason"]
    assert "Traceback" in result["errors"]["scaling"]["traceback"]
    assert result["summary"]["cpu_utilization_pct"]["value"] > 0
    assert "part tokens not run" in result["summary"]["throughput_tok_s"]["reason"]
    assert "sensor is on fire" in report.markdown(result)


def test_a_figure_that_json_cannot_hold_does_not_cost_the_report(monkeypatch):
    monkeypatch.setattr(hardware, "run", lambda ctx: {"gpu_model": {"value": float("nan")}})
    result = suite.run(context(), ["hardware"])
    assert suite.exit_code(result) == 6
    json.dumps(result, allow_nan=False)


def test_a_wrong_result_ends_with_4_and_no_speed_that_rests_on_it(monkeypatch):
    def wrong(ctx):
        raise WrongResultError("qkv: y[3] is 7, expected 1")

    monkeypatch.setattr(hardware, "run", wrong)
    result = suite.run(context(), ["hardware", "tokens"])
    assert suite.exit_code(result) == 4
    assert result["failures"] == ["qkv: y[3] is 7, expected 1"]
    assert result["summary"]["throughput_tok_s"]["value"] is None
    assert "Wrong result: qkv: y[3] is 7" in report.markdown(result)


def test_ctrl_c_keeps_what_is_finished(monkeypatch):
    def interrupted(ctx):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens, "run", interrupted)
    result = suite.run(context(), ["hardware", "tokens", "cpu"])
    assert suite.exit_code(result) == 130
    assert result["summary"]["os"]["value"]
    assert result["summary"]["cpu_peak_pct"]["reason"] == "interrupted in or before part cpu"
    assert "Interrupted" in report.markdown(result)


# ---- Markdown and files ---------------------------------------------------------------------------------------------


def test_markdown_ends_with_the_summary(whole):
    rows = summary_table(report.markdown(whole))
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == KEYS
    for key, row in zip(KEYS, rows, strict=True):
        cell = row.removeprefix(f"| {key} | ").removesuffix(" |")
        figure = whole["summary"][key]
        assert cell.startswith("null (") == (figure["value"] is None)
        assert cell


def test_markdown_says_first_that_no_gpu_was_measured(whole):
    heading, _, warning = report.markdown(whole).splitlines()[:3]
    assert "NumPy backend" in heading
    assert "No GPU was measured" in warning


def test_a_value_with_a_bar_or_a_line_break_stays_one_cell(whole):
    changed = {**whole, "summary": {**whole["summary"], "os": measured("a | b\nc")}}
    assert "| os | a \\| b c |" in summary_table(report.markdown(changed))


def section(figures: dict, name: str = "kernels") -> str:
    return "\n".join(markdown.write(document.section(name, figures)))


def test_lists_of_flat_rows_become_tables():
    row = {"name": "a", "grid": [7, 1, 1], "measured_pct": measured(12.5, "%"), "flags": ["x", "y"], "deep": [{"b": 1}]}
    text = section({"kernels": [{**row, "measured_pct": missing("not in a token")}, row]})
    assert "| name | grid | measured_pct (%) | flags | deep |" in text
    assert "| a | 7 x 1 x 1 | 12.5 | x, y | 1 in report.json |" in text
    assert "null: not in a token" in text


def test_a_share_says_of_what():
    rows = [{"name": "a", "share_pct": 60.0, "us": measured(300.0, "us")}]
    trace = {"gpu_busy_us": measured(200.0, "us"), "kernels": rows}
    text = section({"launch_share": rows, "trace": trace})
    assert "| name | % of launches | us (us) |" in text
    assert "| name | % of summed time | us (us) |" in text
    assert "their times add up to 300 us, but the GPU is busy for 200 us of a token only." in text


def test_costs_of_a_token_need_not_add_up_and_may_be_negative():
    times = {"meaning": "the times do not add up", "sum_us": measured(343.86, "us"), "token_us": measured(343.38, "us")}
    text = section({"where_the_time_goes": times})
    assert "do not add up" not in text
    assert "add up to 343.9 us, the token takes 343.4 us" in text
    assert "Below 0: the token takes longer without these launches" in text


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        (measured(6.7077e-05, "J", ci95=[6.5e-05, 6.9e-05]), "67.08 uJ | interval 65 to 69 |"),
        (measured(2.1984e-06, "ms^2"), "2.198 us^2 |"),
        (measured(0.0034567, "s"), "3.457 ms |"),
        (measured(0.06386, "J"), "0.06386 J |"),
        (measured(27164160, "bytes"), "25.91 MiB |"),
        (measured(1000, "bytes"), "1,000 bytes |"),
        (measured(143771, "MiB"), "143,771 MiB |"),
        (measured(90976.4, "tok/s"), "90,976 tok/s |"),
        (measured(999.7, "W"), "1,000 W |"),
        (measured(0, "J"), "0 J |"),
        (measured(True), "true |"),
    ],
)
def test_numbers_are_short_and_in_a_unit_that_suits_them(figure, said):
    assert f"| x | {said}" in section({"x": figure})


def test_a_column_has_one_unit():
    text = section({"rows": [{"energy": measured(x, "J"), "n": 2048} for x in (2e-4, 3e-4, 0.2)]})
    assert "| energy (uJ) | n |" in text
    assert [f"| {x} | 2,048 |" in text for x in ("200", "300", "200,000")] == [True] * 3


def test_no_cell_is_a_python_object(whole):
    text = report.markdown(whole)
    assert "{'" not in text
    assert "[{" not in text


def test_plain_groups_take_a_line_and_groups_by_name_a_table():
    group = {"calls": 3, "rate": measured(0.5, "W", ci95=[0.25, 0.75])}
    text = section({"plan": group, "shares": {"a": group, "b": missing("not asked for", "W")}, "list": [1, 2]})
    assert "| plan | calls: 3; rate: 0.5 W (interval 0.25 to 0.75) |  |" in text
    assert "### shares\n\n| name | calls | rate (W) |\n| --- | --- | --- |\n| a | 3 | 0.5 |" in text
    assert "null: `b` (not asked for)" in text


def test_windows_of_power_are_the_rows_of_one_table():
    window = {"joules": measured(2.0, "J"), "conditions": conditions(True)}
    text = section({"idle": window, "token": {"gross_j": measured(1.0, "J"), "windows": [window, window]}}, "power")
    assert "| token | gross_j: 1 J |  |" in text
    assert "| window | joules (J) | conditions |" in text
    cells = "2 | sm_clock_mhz: 1,500 MHz; throttle_reasons: SwPowerCap; throttled: true |"
    assert [f"| {place} | {cells}" in text for place in ("idle", "token windows 1", "token windows 2")] == [True] * 3


def test_conditions_of_a_row_are_one_short_cell():
    clock = {"sm_clock_mhz": measured(1980, "MHz"), "temperature_c": measured(41, "C")}
    during = {"begin_s": 1.0, "before": clock, "after": clock, "sm_clock_mhz": measured(1500.0, "MHz", n=3)}
    hot = {"throttle_reasons": measured(["SwPowerCap"]), "throttled": measured(True)}
    cool = {"throttle_reasons": measured([]), "throttled": measured(False)}
    rows = [{"a": 1, "conditions": {**during, **state}} for state in (hot, cool)]
    text = section({"rows": rows})
    assert "| 1 | 1,500 MHz, 41 C, throttled: SwPowerCap |" in text
    assert "| 1 | 1,500 MHz, 41 C |" in text
    assert "{'" not in text
    assert "2 in report.json" in section({"rows": [{"a": [{"b": 1}, {"c": {"d": 2}}]}]})


def conditions(throttled: bool) -> dict:
    reasons = ["SwPowerCap"] if throttled else []
    return {
        "sm_clock_mhz": measured(1500, "MHz"),
        "throttle_reasons": measured(reasons),
        "throttled": measured(throttled),
    }


def latency_on_a_gpu(throttled: bool) -> dict:
    """What the latency part returns, as far as the report reads it."""

    def series(us: float) -> dict:
        return statistics.summarise([us] * 10, "us")

    def pair(cold: float, warm: float) -> dict:
        return {"cold": series(cold), "warm": series(warm)}

    def ratio(cold: float, warm: float) -> dict:
        return {"cold": measured(cold, "x"), "warm": measured(warm, "x")}

    row = {
        "op": "rmsnorm_ternary_matmul", "activation": "int8", "correct": True, "kernel": pair(3.0, 2.0),
        "device": series(20.0), "end_to_end": series(40.0), "ratio_to_floor": ratio(1.5, 1.25),
        "speedup_over": {"cublas_fp16": ratio(2.5, 2.0), "unfused_ternary_int8": ratio(1.75, 1.5)},
        "gb_per_s": measured(100.0, "GB/s"), "bandwidth_pct": measured(2.5, "%"), "conditions": conditions(throttled),
    }  # fmt: skip
    alone = {**row, "op": "ternary_matmul", "speedup_over": {"cublas_fp16_product": {"cold": missing("no cuBLAS")}}}
    baselines = {"cublas_fp16": pair(7.5, 7.0), "cublas_fp16_product": {"cold": missing("no cuBLAS")}}
    product = {"m": 8, "k": 4, "floor": pair(2.0, 1.6), "baselines": baselines, "rows": [row, alone]}
    return {"bandwidth": measured(4000.0, "GB/s"), "products": {"qkv": product}}


@pytest.mark.parametrize("throttled", [False, True])
def test_products_show_their_ratios_and_what_ran_throttled(whole, throttled):
    changed = {**whole, "no_gpu": None, "parts": {"latency": latency_on_a_gpu(throttled)}}
    text = report.markdown(changed)
    mark = " **throttled**" if throttled else ""
    fused = (
        f"| qkv | 8 x 4 | rmsnorm_ternary_matmul{mark} | int8 | 3 | 2.5 | 1.75 | 1.5 | 100 | 2.5 | 2 | 1.25 | 20 | 40 |"
    )
    alone = f"| qkv | 8 x 4 | ternary_matmul{mark} | int8 | 3 | null |  | 1.5 | 100 | 2.5 | 2 | 1.25 | 20 | 40 |"
    assert fused in text
    assert alone in text
    assert "x vs cuBLAS | x vs unfused | / floor | GB/s cold | % bandwidth cold" in text
    assert "| qkv | 8 x 4 | 2 | 1.6 | 7.5 | null |" in text
    names = [f"latency qkv, {op} int8" for op in ("rmsnorm_ternary_matmul", "ternary_matmul")]
    said = f"the GPU held its clocks down during {'; '.join(names)}. They are marked."
    assert text.partition("## ")[0].count(said) == throttled
    assert ("\n**throttled**: " in text) == throttled


def test_products_name_the_yardstick_that_ran_throttled(whole):
    latency = latency_on_a_gpu(throttled=False)
    latency["products"]["qkv"]["floor"]["cold"]["conditions"] = conditions(True)
    text = report.markdown({**whole, "parts": {**whole["parts"], "latency": latency}})
    assert "| rmsnorm_ternary_matmul **throttled: floor** | int8 | 3 |" in text
    assert "\n**throttled**: " in text
    latency["products"]["qkv"]["baselines"]["cublas_fp16"]["cold"]["conditions"] = conditions(True)
    latency["bandwidth"]["conditions"] = conditions(True)
    text = report.markdown({**whole, "parts": {**whole["parts"], "latency": latency}})
    assert "| rmsnorm_ternary_matmul **throttled: floor, cublas_fp16, bandwidth** | int8 | 3 |" in text
    assert "| ternary_matmul **throttled: floor, bandwidth** | int8 | 3 |" in text  # it is not compared with that


def test_the_floor_is_explained_where_it_is_shown(whole):
    text = report.markdown({**whole, "parts": {**whole["parts"], "latency": latency_on_a_gpu(throttled=False)}})
    assert "only reads the packed weight" in text
    assert "a ratio to the floor below 1 is no error" in text


def test_a_part_says_that_its_figures_rest_on_throttled_rows():
    ratio = measured(1.5, "x")
    rows = [{"context": 0, "conditions": conditions(throttled)} for throttled in (False, True)]
    assert "**throttled: 1 of the measurements below.**" in section({"ratio": ratio, "rows": rows}, "transfer")
    assert "**throttled" not in section({"ratio": ratio, "rows": rows[:1]}, "transfer")


def test_statistics_of_the_main_series_only(whole):
    text = report.markdown(whole)
    rows = [line for line in text.splitlines() if " fused int8, " in line]
    assert len(rows) == len(whole["parts"]["latency"]["products"])  # on NumPy each has one series
    assert "| token latency | ms |" in text
    assert "| token latency at context 16,384 | ms |" in text
    assert text.count("### Statistics") == 3
    assert "median |" not in text


def test_lists_of_numbers_take_one_line_of_the_json(whole):
    tricky = {**whole, "command": "a [\n1,\n2]"}
    text = report._json(tricky)
    assert json.loads(text) == tricky
    assert '"samples": [' in text
    assert '"samples": [\n' not in text


def test_all_other_files_are_made_from_the_json_alone(whole, tmp_path):
    json_file, *others = report.write(whole, tmp_path)
    assert [path.name for path in others[:2]] == ["report.md", "report.html"]
    assert {path.parent.name for path in others[2:]} == {"plots"}
    written = [path.read_bytes() for path in others]
    for path in others:
        path.unlink()
    assert report.remake(json_file, tmp_path) == others
    assert [path.read_bytes() for path in others] == written
    assert written[0].decode() == report.markdown(whole)


def test_writing_leaves_the_old_file_or_the_new_one(whole, tmp_path, monkeypatch):
    report.write(whole, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(old) == {"report.json", "report.md", "report.html"}

    def full(self, text, encoding):
        with self.open("w", encoding=encoding) as f:
            f.write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(report.ReportError, match="No space left"):
        report.write(whole, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == old


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable report"),
        ("[]", "no schema_version"),
        ('{"schema_version": "2.0.0"}', "2.0.0"),
        ('{"schema_version": "1.0.0"}', "'workload' is missing"),
    ],
)
def test_load_refuses_what_is_no_report(tmp_path, text, message):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(report.ReportError, match=message):
        report.load(file)


def test_a_damaged_report_is_an_error_of_its_own(whole, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({**whole, "summary": 7}))
    with pytest.raises(report.ReportError, match="not as this program writes it"):
        report.remake(file, tmp_path)


# ---- the commit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The folder that the package seems to run from, and in which the command is called."""
    monkeypatch.setattr(reproducibility, "_HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGELLM_COMMIT", raising=False)
    return tmp_path


def commit(folder: Path) -> str:
    """Everything in the folder; the commit's name."""
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True)
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_commit_of_a_checkout_that_belongs_to_someone_else(checkout, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(checkout / "none"))
    name = commit(checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own tests use it
    source = reproducibility.source()
    assert source["git_commit"]["value"] == name
    assert source["git_modified"] == {"value": False}
    (checkout / "new").touch()
    assert reproducibility.source()["git_modified"] == {"value": True}


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_what_git_complains_about_is_the_reason(checkout):
    (checkout / ".git").write_text("nonsense")
    assert "invalid gitfile" in reproducibility.source()["git_commit"]["reason"]


def test_commit_of_a_copy_comes_from_the_environment(checkout, monkeypatch):
    assert reproducibility.source()["git_commit"] == {"value": None, "reason": "not run from a git checkout"}
    monkeypatch.setenv("EDGELLM_COMMIT", "e621a06")
    source = reproducibility.source()
    assert source["git_commit"] == {"value": "e621a06", "source": "EDGELLM_COMMIT"}
    assert source["git_modified"]["value"] is None


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_commit_of_what_was_installed_from_the_checkout_around_it(checkout, monkeypatch):
    root = Path(__file__).parents[2]
    clone = checkout / "clone"
    for name in ("edgellm_cupy", "bench", "kernels_cu"):
        ignore = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(root / name, clone / name, symlinks=True, ignore=ignore)
    name = commit(clone)
    monkeypatch.chdir(clone / "kernels_cu")
    source = reproducibility.source()
    assert (source["git_commit"]["value"], source["git_modified"]["value"]) == (name, False)
    with (clone / "kernels_cu" / "embed.cu").open("a") as f:
        f.write("// another one\n")
    assert reproducibility.source()["git_commit"]["reason"] == "not run from a git checkout"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ('{"url": "https://x/y.git", "vcs_info": {"vcs": "git", "commit_id": "e621a06"}}', "e621a06"),
        ('{"url": "file:///x", "dir_info": {}}', None),
        ("nonsense", None),
        (None, None),
    ],
)
def test_commit_that_pip_fetched(checkout, monkeypatch, told, expected):
    monkeypatch.setattr(reproducibility, "distribution", lambda name: SimpleNamespace(read_text=lambda file: told))
    assert reproducibility.source()["git_commit"]["value"] == expected


# ---- figures of the small parts -------------------------------------------------------------------------------------


def test_busy_windows_are_at_least_as_long_as_asked():
    # Half busy for 0.1 s, then fully busy for 0.1 s, then a rest too short for a window.
    stamps = [(0.0, 0.0), (0.06, 0.03), (0.1, 0.05), (0.2, 0.15), (0.22, 0.15)]
    assert cpu.busy_pct(stamps, 0.1) == pytest.approx([50, 100])


@pytest.mark.parametrize(
    ("clocks", "highest", "slowed", "value"),
    [
        ([1500, 1980, 1755], 1980, [], "inferred: not locked, 1500 to 1980 MHz under load"),
        ([1500] * 3, 1980, [], "inferred: locked at 1500 MHz, below the highest 1980 MHz"),
        ([1500] * 3, 1980, ["SwPowerCap"], None),
        ([1980] * 3, 1980, [], None),
        ([1500] * 3, None, [], None),
    ],
)
def test_clock_locking_is_inferred_or_null(clocks, highest, slowed, value):
    assert infer_clock_locking(clocks, highest, slowed)["value"] == value
