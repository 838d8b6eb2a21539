"""The README's figures are those of the committed reports. When a report changes, this test prints the new block."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
REPORTS = [f"{where}/{model}" for where in ("h200", "numpy") for model in ("smollm-135m", "smollm2-135m")]
REPORTS.insert(1, "h200/smollm-135m-notebook")
LAYERS = ["h200/bitnet-2b4t-layer", "h200/llama-8b-layer"]  # the latency part alone, on one layer of larger models
BEGIN = "<!-- results: made by `pytest tests/cpu/test_readme.py` from the files named below -->"
END = "<!-- end of results -->"


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name / "report.json").read_text(encoding="utf-8"))


def figure(metric: dict[str, Any], digits: int = 3) -> str:
    value = metric["value"]
    if value is None:
        return "null"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def median(series: dict[str, Any]) -> str:
    cold = series["cold"]
    return figure(cold.get("median", cold))


def block() -> Iterator[str]:
    """The results section, from the JSON files alone."""
    reports = {name: load(name) for name in REPORTS}
    yield "Whole models, batch 1, greedy, tokens a second (`throughput_*` of the report):"
    yield ""
    yield "| report | weights | tok/s | 1k context | 4k | 8k | 16k | J a token | kernels a token |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, report in reports.items():
        keys = ("throughput_tok_s", *(f"throughput_{d}_ctx_tok_s" for d in ("1k", "4k", "8k", "16k")))
        cells = [figure(report["summary"][key]) for key in (*keys, "energy_per_token_j", "kernels_per_token")]
        link = f"[{name}](bench/results/{name}/report.md)"
        yield f"| {link} | {report['model']['weights']} | {' | '.join(cells)} |"
    yield ""
    reports |= {name: load(name) for name in LAYERS}
    bandwidth = reports["h200/smollm-135m"]["parts"]["latency"]["bandwidth"]
    yield (
        "One product in float16, batch 1, microseconds in a CUDA graph with a cold L2. `fused` is RMSNorm + int8 "
        "quantisation + product in one launch; `floor` only reads the same bytes (this GPU reads "
        f"{figure(bandwidth)} GB/s):"
    )
    yield ""
    yield "| product | M x K | floor | fused int8 | / floor | fused float | unfused int8 | RMSNorm + cuBLAS float16 |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name in ("h200/smollm-135m", *LAYERS):
        for layer, product in reports[name]["parts"]["latency"]["products"].items():
            fused = {r["activation"]: r for r in product["rows"] if r["op"] == "rmsnorm_ternary_matmul"}
            cells = [
                median(product["floor"]),
                median(fused["int8"]["kernel"]),
                figure(fused["int8"]["ratio_to_floor"]["cold"]),
                median(fused["float"]["kernel"]),
                median(product["baselines"]["unfused_ternary_int8"]),
                median(product["baselines"]["cublas_fp16"]),
            ]
            link = f"[{name.removeprefix('h200/')}](bench/results/{name}/report.md) {layer}"
            yield f"| {link} | {product['m']} x {product['k']} | {' | '.join(cells)} |"
    yield ""
    yield "The commands that made these reports:"
    yield ""
    yield "```sh"
    yield from (report["command"] for report in reports.values())
    yield "```"


def test_readme_shows_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(f"{re.escape(BEGIN)}\n(.*?){re.escape(END)}", readme, re.DOTALL)
    assert match, "the README has lost the markers of its results"
    expected = "\n".join(block()) + "\n"
    assert match[1] == expected, f"put this between the markers:\n{expected}"


@pytest.mark.parametrize("name", [*REPORTS, *LAYERS])
def test_committed_reports_are_whole(name):
    report = load(name)
    assert not report["quick"]
    assert not report["failures"]
    assert not report["errors"]
    assert not report["interrupted"]
    assert report["backend"] == ("cuda" if name.startswith("h200") else "numpy")
