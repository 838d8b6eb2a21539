"""The README's figures are those of the committed reports. When a report changes, this test prints the new block."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from edgellm_cupy.bench.comparing.compare import compare
from edgellm_cupy.bench.comparing.verdict import AMBIGUOUS, FASTER, SAME, SLOWER
from edgellm_cupy.bench.reporting import table_figures
from tests.planted import slower

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
REPORTS = [f"{where}/{model}" for where in ("h200", "numpy") for model in ("smollm-135m", "smollm2-135m")]
REPORTS[1:1] = ["h200/smollm-135m-notebook", "h200/bitnet-2b4t", "h200/bitnet-2b4t-int8-head"]
TABLE = "h200/table"  # the latency part on sixteen shapes
ONCE, AGAIN = "h200/smollm-135m", "h200/smollm-135m-again"  # one command twice, with another order of rows
BEGIN = "<!-- results: made by `pytest tests/cpu/test_readme.py` from the files named below -->"
END = "<!-- end of results -->"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "report.json").read_text(encoding="utf-8"))


def figure(metric: dict[str, Any], digits: int = 3) -> str:
    value = metric["value"]
    if value is None:
        return "null"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def block() -> Iterator[str]:
    """The results section, from the JSON files alone."""
    reports = {name: load(name) for name in REPORTS}
    yield "Whole models, batch 1, greedy, tokens a second (`throughput_*` of the report):"
    yield ""
    yield "| report | weights | tok/s | 1k context | 4k | 8k | 16k | J a token | kernels a token | commit |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, report in reports.items():
        keys = ("throughput_tok_s", *(f"throughput_{d}_ctx_tok_s" for d in ("1k", "4k", "8k", "16k")))
        cells = [figure(report["summary"][key]) for key in (*keys, "energy_per_token_j", "kernels_per_token")]
        link = f"[{name}](bench/results/{name}/report.md)"
        commit = re.sub(r"^([0-9a-f]{7})[0-9a-f]{33}$", r"\1", report["environment"]["git_commit"]["value"])
        changed = " with changes" if report["environment"]["git_modified"]["value"] else ""
        yield f"| {link} | {report['model']['weights']} | {' | '.join(cells)} | {commit}{changed} |"
    yield ""
    report = reports[TABLE] = load(TABLE)
    latency = report["parts"]["latency"]
    yield (
        "One token, float16 x and gamma, microseconds in a CUDA graph with a cold L2: RMSNorm, quantisation and "
        "product in one launch. `floor` only reads the packed weight "
        f"(this GPU reads {figure(latency['bandwidth'])} GB/s), starting when its predecessor has ended; ours starts "
        "before and waits for it inside, `alone` is without that "
        f"([report](bench/results/{TABLE}/report.md)):"
    )
    yield ""
    yield "| shape | M x K | floor | int8 | / floor | alone | float | / floor | RMSNorm + cuBLAS float16 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    lines = list(table_figures.lines(latency["table"]))
    one = {(line["shape"], line["activation"]): line for line in lines if line["n"] == 1}
    for (shape, activation), line in one.items():
        if activation == "int8":
            other = one[shape, "float"]
            figures = [line[key] for key in ("floor", "time", "ratio", "alone")]
            figures += [other["time"], other["ratio"], line["cublas"]]
            mark = table_figures.mark(line["throttled"]) or table_figures.mark(other["throttled"])
            name = f"{shape} **{mark}**" if mark else shape
            yield f"| {name} | {line['size']} | {' | '.join(figure(f) for f in figures)} |"
    yield ""
    yield "All of its lines, up to 2048 tokens, in short:"
    yield ""
    yield "| figure | value |"
    yield "| --- | --- |"
    for name, metric in table_figures.summary(latency["table"]).items():
        of = f" of {metric['of']}" if "of" in metric else ""
        notes = [metric["where"]] if "where" in metric else []
        notes += [f"**throttled: {metric['throttled']}**"] if "throttled" in metric else []
        about = f" ({'; '.join(notes)})" if notes else ""
        yield f"| {name} | {figure(metric)}{of}{about} |"
    yield ""
    yield from comparison(reports[ONCE], reports.setdefault(AGAIN, load(AGAIN)))
    yield ""
    yield "The commands that made these reports:"
    yield ""
    yield "```sh"
    yield from (report["command"] for report in reports.values())
    yield "```"


def comparison(once: dict[str, Any], again: dict[str, Any]) -> Iterator[str]:
    """Two runs of one thing, and the second with 5 % planted."""
    yield (
        f"One command twice in separate processes (`edgellm compare bench/results/{ONCE} bench/results/{AGAIN}`, "
        f"[all rows](bench/results/{AGAIN}/compare.md)), and the second run with every time and energy made 5 % longer:"
    )
    yield ""
    yield "| rows | runs of one thing | 5 % planted |"
    yield "| --- | --- | --- |"
    with TemporaryDirectory() as folder:
        paths = []
        for name, report in (("once", once), ("again", again), ("planted", slower(again, 1.05))):
            paths.append(Path(folder) / f"{name}.json")
            paths[-1].write_text(json.dumps(report))
        same, planted = compare(paths).others
    for title, pace in (("paced by the GPU", "gpu"), ("energy", "board"), ("paced by the host", "host"), ("all", None)):
        cells = []
        for found in (same, planted):
            counts = found.counts(pace)
            cells.append(", ".join(f"{counts[v]} {v}" for v in (SAME, FASTER, SLOWER, AMBIGUOUS) if counts[v]))
        yield f"| {title} | {' | '.join(cells)} |"
    yardsticks = Counter(row.ratio.verdict for row in same.judged if row.old.yardstick)
    cells = [f"{yardsticks[v]} {v}" for v in (SAME, FASTER, SLOWER, AMBIGUOUS) if yardsticks[v]]
    yield f"| floors and baselines, in no count above | {', '.join(cells)} | not planted |"
    shares = [found.counts()[v] / sum(found.counts().values()) for found, v in ((same, SAME), (planted, SLOWER))]
    yield ""
    yield (
        "The goal is 95 % SAME and 90 % SLOWER. What the GPU paces and energy reach it, all rows together do not: "
        f"{shares[0]:.0%} and {shares[1]:.0%}. The host's speed changed between the two runs, and FASTER in the same "
        "thing measured twice is its doing: from one run each, believe no change of a row that the host paces."
    )


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", readme, re.DOTALL)
    assert match, "the README has lost the markers of its results"
    expected = "\n".join(block()) + "\n"
    assert match[1] == expected, f"put this between the markers:\n{expected}"


@pytest.mark.parametrize("name", [*REPORTS, TABLE, AGAIN])
def test_committed_reports_are_whole(name):
    report = load(name)
    assert not report["quick"]
    assert not report["failures"]
    assert not report["errors"]
    assert not report["interrupted"]
    assert report["backend"] == ("cuda" if name.startswith("h200") else "numpy")


def test_the_method_page_names_tests_that_exist():
    text = (ROOT / "bench" / "METHOD.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/gpu/)?(test_\w+\.py)::(\w+)`", text)
    assert len(named) > 15
    for folder, file, name in named:
        source = (ROOT / (folder or "tests/cpu/") / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{file}::{name}"
    for number in range(1, 16):
        assert f"\n| {number} | " in text
