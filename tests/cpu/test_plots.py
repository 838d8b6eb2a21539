"""The plots: which a report has, what they say, and their files."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.reporting import plots, report

RESULTS = Path(__file__).parents[2] / "bench" / "results"
OF_A_MODEL = {"token_latency", "kernel_latency", "roofline", "scaling", "energy", "kernels", "telemetry"}


def load(name: str) -> report.Report:
    return report.load(RESULTS / name / "report.json")


@pytest.fixture(scope="module")
def h200() -> report.Report:
    return load("h200/smollm-135m")


@pytest.fixture
def changed(h200) -> report.Report:
    """A copy to change."""
    return copy.deepcopy(h200)


def one(of: report.Report, name: str) -> plots.Plot:
    return next(plot for plot in plots.each(of) if plot.name == name)


def telemetry(seconds: float = 300.0) -> dict[str, Any]:
    at = [round(t, 1) for t in np.arange(0, seconds, 0.1)]
    wave = [200 + 50 * float(np.sin(t / 9)) for t in at]
    units = {"power_w": "W", "sm_clock_mhz": "MHz", "memory_clock_mhz": "MHz", "temperature_c": "C"}
    series = {name: {"unit": unit, "at_s": at, "values": wave} for name, unit in units.items()}
    halves = [{"name": name, "begin_s": i * seconds / 2, "end_s": (i + 1) * seconds / 2} for i, name in enumerate("ab")]
    return {"every_s": 0.1, "series": series, "parts": halves}


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_every_plot_of_a_model_is_drawn_or_has_its_reason(h200):
    found = plots.each(h200)
    assert {plot.name for plot in found} == OF_A_MODEL
    for plot in found:
        assert (plot.figure is None) == bool(plot.reason)
        assert (plot.figure is None) == (not plot.says)
    assert set(plots.draw(h200)) == {plot.name for plot in found if plot.figure is not None} >= {"energy", "kernels"}


def test_title_says_model_gpu_and_series_and_axes_have_units(h200):
    h200 = {**h200, "telemetry": telemetry()}
    drawn = plots.draw(h200)
    assert set(drawn) == OF_A_MODEL
    for name, figure in drawn.items():
        title = figure.get_suptitle()
        assert "smollm-135m, NVIDIA H200" in title
        assert title.startswith(f"{plots.PLOTS[name][0]}: ")
        assert figure.axes[-1].get_xlabel()
    y_axes = {name: [axes.get_ylabel() for axes in figure.axes] for name, figure in drawn.items()}
    assert y_axes["telemetry"] == ["power (W)", "clock (MHz)", "temp. (°C)"]
    assert y_axes["token_latency"] == ["samples (%)", "no larger than x (%)"]
    assert drawn["token_latency"].axes[1].get_xlabel() == "time a token (ms)"
    assert drawn["energy"].axes[0].get_xlabel() == "energy of one token (J)"


def test_numpy_has_what_the_host_can_measure_and_reasons_for_the_rest():
    found = {plot.name: plot for plot in plots.each(load("numpy/smollm-135m"))}
    assert {name for name, plot in found.items() if plot.figure} == {"token_latency", "kernel_latency", "scaling"}
    assert "end to end" in found["kernel_latency"].figure.get_suptitle()
    assert found["energy"].reason == found["roofline"].reason == "the NumPy backend was asked for"


def test_a_table_of_shapes_has_plots_of_its_own():
    found = {plot.name: plot for plot in plots.each(load("h200/table"))}
    assert {name for name, plot in found.items() if plot.figure} == {"roofline", "shapes", "telemetry"}
    assert found["energy"].reason == "part power not run"
    assert re.search(r"\d+\.\d+ to \d+\.\d+ times as fast", found["shapes"].says)


def test_failed_and_interrupted_parts_are_the_reason(changed):
    del changed["parts"]["power"]
    changed["errors"]["power"] = {"reason": "RuntimeError: on fire", "traceback": ""}
    changed["parts"]["scaling"]["rows"] = [missing("interrupted")] * 7
    changed["parts"]["tokens"]["token_latency"] = missing("interrupted")
    reasons = {plot.name: plot.reason for plot in plots.each(changed)}
    assert reasons["energy"] == "part power failed: RuntimeError: on fire"
    assert reasons["scaling"] == reasons["token_latency"] == "interrupted"


def test_a_row_that_is_missing_leaves_the_others(changed):
    changed["parts"]["scaling"]["rows"][1] = missing("interrupted")
    changed["parts"]["latency"]["products"]["down"] = missing("interrupted")
    changed["parts"]["latency"]["roofline"] = missing("not recorded before 1.3")
    deepest = changed["parts"]["scaling"]["rows"][-1]["tok_s"]["value"]
    assert f"{deepest:,.0f} at 16,384" in one(changed, "scaling").says
    assert "12 measured points" in one(changed, "roofline").says
    assert "down" not in one(changed, "kernel_latency").says


def test_without_matplotlib_every_plot_has_that_reason(h200, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = plots.each(h200)
    assert {plot.name for plot in found} == OF_A_MODEL
    assert all("matplotlib" in (plot.reason or "") for plot in found)
    assert plots.write(h200, tmp_path / "plots") == []
    written = report.write(h200, tmp_path)
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    assert "no plots without matplotlib" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- what the plots show --------------------------------------------------------------------------------------------


def test_distribution_of_many_samples_keeps_its_ends():
    samples = np.random.default_rng(0).lognormal(size=5000)
    x, share = plots._steps(samples)
    assert len(x) <= 420
    assert (x[0], x[-1]) == (samples.min(), samples.max())
    assert list(x[-20:]) == sorted(samples)[-20:]
    assert share[-1] == 100
    for value, percent in zip(x, share, strict=True):
        assert percent == pytest.approx(100 * np.mean(samples <= value))


def test_few_far_samples_do_not_squash_the_axis():
    near = list(np.linspace(1.0, 1.1, 1152))
    start, end, beyond = plots._shown([[*near, 50.0, 60.0]])
    assert start < 1.0
    assert 1.1 < end < 1.3
    assert beyond == 2
    assert plots._shown([near])[2] == 0
    assert plots._shown([[2.0, 2.0]])[0] < 2.0 < plots._shown([[2.0, 2.0]])[1]


def test_percentiles_and_samples_beyond_the_axis_are_said(changed):
    changed["parts"]["tokens"]["token_latency"]["samples"][3:5] = [40.0, 41.0]
    changed["parts"]["tokens"]["token_latency_streamed"] = missing("not here")
    said = one(changed, "token_latency").says
    assert f"p50 {changed['parts']['tokens']['token_latency']['p50']['value']:.4g} ms" in said
    assert "2 samples lie beyond the axis, up to 41" in said


def test_scaling_marks_the_synthetic_region_and_draws_the_fit(h200, changed):
    def labels(of: report.Report) -> list[str]:
        return [text.get_text() for text in plots.draw(of)["scaling"].legends[0].get_texts()]

    assert labels(h200) == ["beyond the model's context", "fitted: ms a token = straight line", "median, 95 % interval"]
    fit = h200["parts"]["scaling"]["fit"]
    line = plots.draw(h200)["scaling"].axes[0].lines[0]
    at_4096 = np.interp(4096, line.get_xdata(), line.get_ydata())
    assert at_4096 == pytest.approx(1000 / (fit["ms_at_1k"]["value"] + 3 * fit["ms_per_1k"]["value"]), rel=1e-3)
    for row in changed["parts"]["scaling"]["rows"]:
        row["synthetic"] = False
    changed["parts"]["scaling"]["fit"] = missing("two depths or more are needed")
    assert labels(changed) == ["median, 95 % interval"]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (
            [-18.7, 32.4],
            "no slope can be told: 6.84 % for each 1,024 tokens, 95 % interval -18.7 to 32.4, which includes",
        ),
        ([5.0, 8.5], "each 1,024 tokens cost 6.84 % (95 % interval 5 to 8.5)."),
    ],
)
def test_a_slope_has_its_interval_and_is_none_where_that_includes_zero(changed, ends, said):
    changed["parts"]["scaling"]["throughput_degradation_slope_pct_per_1k"] = measured(6.84, "%", ci95=ends)
    assert said in one(changed, "scaling").says


def test_every_window_is_a_dot_and_net_leaves_out_idle(h200):
    axes = plots.draw(h200)["energy"].axes[0]
    token = h200["parts"]["power"]["token"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in dots] == [len(token["windows"])] * 2
    for line, key in zip(dots, ("gross_j", "net_j"), strict=True):
        assert np.median(line.get_xdata()) == pytest.approx(token[key]["value"], rel=0.01)


def test_roofline_from_rows_and_from_the_part_that_has_it(h200, changed):
    changed["parts"]["latency"]["roofline"] = missing("not recorded before 1.3")
    from_rows = one(changed, "roofline")
    points = [
        {
            "name": p.name, "n": p.n, "l2": p.l2, "activation": p.activation,
            "intensity_ops_per_byte": measured(p.intensity, "operations/byte"),
            "tera_ops_per_s": measured(p.tera_ops, "TOP/s"),
        }
        for p in plots._points(h200["parts"]["latency"])
    ]  # fmt: skip
    peak = {"int8_tops": measured(1979.0, "TOP/s"), "float16_tflops": missing("not known"), "how": "x"}
    bandwidth = h200["parts"]["latency"]["bandwidth"]
    changed["parts"]["latency"]["roofline"] = {"bandwidth_gb_s": bandwidth, "peak": peak, "points": points}
    given = one(changed, "roofline")
    assert from_rows.says == f"{given.says} The peaks of the arithmetic units are not in this report."
    labels = [text.get_text() for text in given.figure.legends[0].get_texts()]
    assert "peak int8: 1,979 TOP/s" in labels
    assert not any("float16" in label for label in labels)


def test_names_in_the_roofline_do_not_lie_on_each_other(h200):
    figure = one(h200, "roofline").figure
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == len(h200["parts"]["latency"]["products"])
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))


def test_operations_are_2_m_k_n(h200):
    product = h200["parts"]["latency"]["products"]["qkv"]
    row = product["rows"][0]
    point = plots._points(h200["parts"]["latency"])[0]
    assert (point.name, point.activation, point.l2) == ("qkv", "int8", "cold")
    operations = 2 * product["m"] * product["k"]
    assert point.tera_ops == pytest.approx(operations / (row["kernel"]["cold"]["median"]["value"] * 1e-6) / 1e12)
    assert point.intensity == operations / row["bytes"]["value"]


def test_traced_kernels_take_the_floors_of_what_they_do(changed):
    kinds = {kind["kind"]: kind for kind in changed["parts"]["kernels"]["where_the_time_goes"]["kernels"]}
    rows = [("rmsnorm_ternary_matmul", 60, 90.0), ("attention_decode", 30, 60.0), ("embed", 1, 0.5)]
    changed["parts"]["kernels"]["trace"] = {
        "kernels": [{"name": name, "launches": n, "us": us, "share_pct": 1.0} for name, n, us in rows]
    }
    plot = one(changed, "kernels")
    assert [tick.get_text() for tick in plot.figure.axes[0].get_yticklabels()] == [name for name, *_ in rows]
    floors = [float(line.get_xdata()[0]) for line in plot.figure.axes[0].lines]
    both = kinds["qkv"]["floor_us"]["value"] + kinds["gate_up"]["floor_us"]["value"]
    assert floors == pytest.approx([both, kinds["attention_decode"]["floor_us"]["value"]])  # embed has none
    assert "GPU time, traced" in plot.says
    assert "Kernels overlap: their times add up to 150.5 us." in plot.says


def test_telemetry_keeps_its_extremes(changed):
    changed["telemetry"] = telemetry()
    changed["telemetry"]["series"]["power_w"]["values"][1234] = 999.0
    plot = one(changed, "telemetry")
    assert plot.figure.axes[0].get_ylim()[1] > 999
    assert "to 999 W" in plot.says
    changed["telemetry"]["series"]["memory_clock_mhz"]["values"] = [3201] * 3000
    assert "memory clock 3,201 MHz," in one(changed, "telemetry").says
    names = [text.get_text() for text in plot.figure.axes[0].texts]
    assert names == ["a", "b"]
    _, smallest, mean, largest = plots._thinned(range(1000), [0.0] * 500 + [7.0] + [0.0] * 499)
    assert largest.max() == 7
    assert smallest.max() == 0
    assert len(mean) == 400


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_of_the_plots(h200, tmp_path):
    written = plots.write(h200, tmp_path / "plots")
    names = {path.name for path in written}
    assert names == {f"{name}.{kind}" for name in OF_A_MODEL for kind in ("svg", "png")}
    assert names == {path.name for path in (tmp_path / "plots").iterdir()}  # nothing left beside
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
            assert path.stat().st_size < 200_000


def parts(of: report.Report, *names: str) -> report.Report:
    return {**of, "parts": {name: of["parts"][name] for name in names}}


def test_the_same_report_gives_the_same_files(h200, tmp_path):
    some = parts(h200, "scaling", "kernels")
    first = {path.name: path.read_bytes() for path in plots.write(some, tmp_path)}
    assert {path.name: path.read_bytes() for path in plots.write(some, tmp_path)} == first


def test_a_plot_that_is_gone_leaves_no_old_file(h200, tmp_path):
    plots.write(parts(h200, "power", "kernels"), tmp_path)
    assert (tmp_path / "energy.svg").exists()
    plots.write(parts(h200, "kernels"), tmp_path)
    assert not (tmp_path / "energy.svg").exists()
    assert (tmp_path / "kernels.png").exists()


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(h200, tmp_path):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(plots.PlotError, match="plots"):
        plots.write(h200, tmp_path / "plots")


def test_inline_svg_has_ids_of_its_own_and_colours_of_the_page(h200):
    elements = {plot.name: plots.inline_svg(plot, "A &amp; B") for plot in plots.each(h200) if plot.figure}
    ids = [id_ for text in elements.values() for id_ in re.findall(r'\bid="([^"]+)"', text)]
    assert len(ids) == len(set(ids)) > 100
    for text in elements.values():
        root = ElementTree.fromstring(text)
        assert (root.get("role"), root.get("aria-label")) == ("img", "A & B")
        assert not re.search(r"#[0-9a-fA-F]{6}\b(?!\")", text.replace("url(#", ""))
        assert "var(--plot-ink)" in text
        used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        assert used <= set(ids)
        assert "http" not in text


def test_colours_are_those_of_the_page_in_both_themes():
    css = (Path(plots.__file__).parent / "page.css").read_text(encoding="utf-8")
    for name, colour in plots.COLOURS.items():
        values = re.findall(rf"--plot-{name}: (#[0-9a-f]{{6}});", css)
        assert len(values) == 3, name  # light, dark by choice, dark by preference
        assert values[0] == colour
        assert values[1] == values[2]


def test_series_can_be_told_apart_and_read():
    def light(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = (Path(plots.__file__).parent / "page.css").read_text(encoding="utf-8")
    dark = dict(re.findall(r"--plot-([\w]+): (#[0-9a-f]{6});", css.partition("data-theme")[2]))
    for colours in (plots.COLOURS, dark):
        ground = light(colours["ground"])
        for name in ("ink", "muted", *"abcdef"):
            high, low = sorted((light(colours[name]), ground), reverse=True)
            assert (high + 0.05) / (low + 0.05) > (4.5 if name in ("ink", "muted") else 3), name


def test_a_damaged_roofline_is_an_error_of_its_own(changed, tmp_path):
    changed["parts"]["latency"]["products"]["qkv"]["rows"][0]["kernel"] = 7
    file = tmp_path / "x.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(report.ReportError, match="not as this program writes it"):
        report.remake(file, tmp_path)
