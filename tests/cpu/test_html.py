"""The HTML page: that it is whole, alone, escaped, and that a browser shows it without complaint."""

from __future__ import annotations

import copy
import itertools
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from edgellm_cupy.bench import suite
from edgellm_cupy.bench.metrics import measured, missing
from edgellm_cupy.bench.reporting import document, html, layout, plots, report, stability

RESULTS = Path(__file__).parents[2] / "bench" / "results"
REPORTS = ["h200/smollm-135m", "h200/table", "numpy/smollm-135m"]
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
EVIL = "<script>alert(\"1\")</script> & 'x' | `y` **z**"


class Page(HTMLParser):
    """Elements, and what stands in them; fails where they are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def load(name: str) -> report.Report:
    return report.load(RESULTS / name / "report.json")


@pytest.fixture(scope="module", params=REPORTS)
def each(request) -> tuple[report.Report, str]:
    """A committed report and its page."""
    loaded = load(request.param)
    return loaded, html.html(loaded)


@pytest.fixture(scope="module")
def h200() -> report.Report:
    return load("h200/smollm-135m")


@pytest.fixture
def changed(h200) -> report.Report:
    return copy.deepcopy(h200)


def page(of: report.Report) -> str:
    return html.html(of, [])  # without plots


def visible(text: str) -> str:
    """The text of the page with one space between words."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join("".join(Page(body).texts.get("body", [])).split())


# ---- structure ------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_has_one_title(each):
    of, text = each
    found = Page(text)
    name = f"{layout.subject(of)} on {layout.place(of)}"
    assert found.texts["h1"] == [name]
    assert found.texts["title"] == [f"edgellm benchmark: {name}"]
    assert found.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")


def test_the_page_loads_nothing(each):
    _, text = each
    found = Page(text)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"link", "img", "iframe", "object", "embed", "base", "source", "image"}
    for tag, attributes in found.elements:
        assert not {"src", "srcset", "onclick", "onload"} & set(attributes), tag
        for name in ("href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert len(text) < 1_000_000


def test_ids_are_there_once_and_every_link_has_its_target(each):
    _, text = each
    found = Page(text)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {str(a["href"])[1:] for a in found.all("a")} | {
        str(a["aria-labelledby"]) for a in found.all("section") if "aria-labelledby" in a
    }
    assert {"headline-figures", "plots", "summary", "all-parts"} <= links <= set(ids)


def test_headings_go_down_one_level_at_a_time(each):
    _, text = each
    levels = [int(tag[1]) for tag, _ in Page(text).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_tables_have_captions_and_heads_and_can_be_reached(each):
    _, text = each
    found = Page(text)
    assert len(found.all("table")) == len(found.all("caption")) > 3
    assert all(caption.strip() for caption in found.texts["caption"])
    assert all(heading.get("scope") in ("col", "row") for heading in found.all("th"))
    regions = [a for a in found.all("div") if a.get("role") == "region"]
    assert len(regions) == len(found.all("table"))
    assert all(a["aria-label"] and a["tabindex"] == "0" for a in regions)


def test_every_key_of_the_summary_is_there_with_value_or_reason(each):
    of, text = each
    said = visible(text)
    for key, figure in of["summary"].items():
        value = layout.with_unit(figure)
        assert f"{key}{value}" in said or f"{key} {value}" in said, key


def test_every_reason_of_a_null_figure_is_on_the_page(each):
    of, text = each
    said = visible(text)
    for part in of["parts"].values():
        for reason in layout.reasons(part):
            assert " ".join(reason.replace("`", "").split()) in said  # what stands in backticks is set as code


def test_plots_are_inside_with_a_name_and_a_caption(each):
    _, text = each
    found = Page(text)
    drawn = found.all("svg")
    assert len(drawn) == len(found.all("figure")) == len(found.all("figcaption")) >= 2
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert all(caption.strip() for caption in found.texts["figcaption"])


def test_all_parts_are_behind_details(each):
    of, text = each
    titles = [document.title(name) for name in of["parts"]]
    assert Page(text).texts["summary"] == titles


def test_both_themes_have_the_same_variables():
    css = html._file("page.css")
    blocks = [set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r"\{([^{}]*--ground:[^{}]*)\}", css)]
    assert len(blocks) == 3
    assert blocks[0] == blocks[1] == blocks[2]
    assert "prefers-color-scheme: dark" in css
    assert set(re.findall(r"var\((--[\w-]+)\)", css)) <= blocks[0]


# ---- content --------------------------------------------------------------------------------------------------------


def test_headlines_with_their_intervals(h200):
    said = visible(page(h200))
    latency = h200["parts"]["latency"]["products"]
    ratios = [p["rows"][0]["ratio_to_floor"]["cold"]["value"] for p in latency.values()]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} x" in said
    rate, energy = h200["summary"]["throughput_tok_s"], h200["summary"]["energy_per_token_j"]
    low, high = rate["ci95"]
    assert f"Generation{rate['value']:,.0f} tok/s95 %: {low:,.0f} to {high:,.0f}context 68" in said
    low, high = energy["ci95"]
    assert f"Energy a token, gross{energy['value']:.4g} J95 %: {low:.4g} to {high:.4g}context 1,024" in said


def test_the_sections_say_which_figures_are_null(changed):
    changed["parts"]["power"]["energy_per_token_net_j"] = missing("no idle baseline")
    said = visible(page(changed))
    assert "null: over_greedy_us (this is greedy)" in said
    assert said.partition("All parts")[2].count("null: energy_per_token_net_j (no idle baseline)") == 2


def test_headlines_come_before_everything_and_warnings_stand_above_them(changed):
    changed["quick"] = True
    changed["failures"] = ["qkv: y[3] is 7"]
    said = visible(page(changed))
    rate = f"{changed['summary']['throughput_tok_s']['value']:,.0f} tok/s"
    order = ["Quick run", "Wrong result: qkv: y[3] is 7", rate, "What was run", "Medians in microseconds"]
    assert [said.index(text) for text in order] == sorted(said.index(text) for text in order)


def test_a_warning_for_what_made_the_run_unstable_and_for_rows_that_failed(changed):
    rows = changed["parts"]["scaling"]["rows"]
    for row, error in zip(rows, (0.03, 0.5, 0.25, 0.06, 0.07), strict=False):
        row["latency"]["relative_error"] = error
    changed["errors"]["scaling/context 1024"] = {"reason": "RuntimeError: on fire", "traceback": ""}
    said = visible(page(changed))
    worst = "scaling context 1024, latency (50.0%); scaling context 2048, latency (25.0%); "
    assert (
        f"Unstable: a relative standard error above 2% was left in {worst}" in said
    )  # said with names, the worst first
    assert all(f"scaling.rows[{i}].latency" in stability.findings(changed)[0] for i in range(5))  # and none is lost
    assert "Row scaling/context 1024 failed: RuntimeError: on fire" in said


def test_what_the_doctor_found(changed):
    changed["doctor"] = [
        {"level": "warning", "what": "load 4.3 on 2 processors", "why": "times of the host will vary"},
        {"level": "note", "what": "no ncu", "why": "occupancy is theoretical"},
    ]
    text = page(changed)
    assert ">Doctor</h2>" in text
    assert '<strong class="mark">warning</strong></th><td>load 4.3 on 2 processors</td>' in text
    assert "| **warning** | load 4.3 on 2 processors | times of the host will vary |" in report.markdown(changed)
    del changed["doctor"]
    assert "Doctor" not in page(changed)


def test_everything_is_escaped(changed):
    changed["command"] = changed["no_gpu"] = EVIL
    changed["workload"]["model_name"] = measured(EVIL)
    changed["environment"]["cpu_model"] = measured(EVIL)
    changed["parts"]["hardware"]["cpu_model"] = measured(EVIL)
    changed["parts"]["tokens"]["first_token"] = missing(EVIL)
    changed["parts"]["tokens"]["sampling"][0]["sampling"] = EVIL
    changed["parts"]["latency"]["products"][EVIL] = changed["parts"]["latency"]["products"].pop("qkv")
    changed["parts"][EVIL] = {EVIL: EVIL}
    changed["summary"]["os"] = measured(EVIL)
    changed["failures"] = changed["stability"] = [EVIL]
    changed["doctor"] = [{"level": EVIL, "what": EVIL, "why": EVIL}]
    changed["errors"] = {EVIL: {"reason": EVIL, "traceback": ""}}
    text = html.html(changed)  # in the plots, too
    assert text.count("<script>") == text.count("</script>") == 1  # its own
    assert "alert(" in text
    assert not any("alert" in value for _, attributes in Page(text).elements for value in attributes if value)


def test_headlines_and_sections_say_what_ran_throttled(changed):
    table = visible(page(load("h200/table"))).partition("What was run")[0]
    assert re.search(r"Rate over cuBLAS, 2,048 tokens, int8\S+ x.*?throttled: 8 of 8", table)
    assert table.count("the GPU held its clocks down") == 1  # said once, and of what
    assert "during latency 2B4T qkv, N = 2048, int8; latency 2B4T qkv, N = 2048, float; " in table
    assert "throttled" not in visible(page(changed)).partition("What was run")[0]
    changed["parts"]["latency"]["products"]["qkv"]["rows"][0]["conditions"]["throttled"] = measured(True)
    changed["parts"]["scaling"]["rows"][2]["conditions"]["throttled"] = measured(True)
    said = visible(page(changed))
    assert said.count("4 products, int8, cold L2throttled: 1 of 4") == 2
    assert said.count("throttled: 1 of the measurements below, see Conditions.") == 1


def test_a_head_of_a_wide_table_may_break(h200):
    assert '<th scope="col" class=n>counter_<wbr>minus_<wbr>integral_<wbr>pct (%)</th>' in page(h200)


def test_random_keys_and_values_are_not_called_decoded(h200):
    rows = h200["parts"]["scaling"]["rows"]
    said = visible(page(h200)).partition("Speed against the tokens in the context")
    assert "Keys and values are random in all rows but the shortest" in said[0]
    assert "decoded" not in said[2].partition("What more context costs")[0]
    for row in rows:
        where = "beyond it" if row["synthetic"] else "within"
        assert re.search(rf"{row['context']:,} ?{where} ?{row['tok_s']['value']:,.0f}", said[2]), row["context"]
    assert {row["synthetic"] for row in rows} == {True, False}


def test_conditions_say_when_and_what_was_throttled(changed):
    row = changed["parts"]["scaling"]["rows"][2]
    row["conditions"] = {
        **copy.deepcopy(changed["parts"]["scaling"]["conditions"]),
        **{"begin_s": 61.25, "end_s": 62.5, "throttled": measured(True), "throttle_reasons": measured(["SwPowerCap"])},
        **{place: {"sm_clock_mhz": measured(1980, "MHz")} for place in ("before", "after")},
    }
    row["conditions"]["temperature_c"] = measured(42.64, "C", min=42, max=43, n=9)
    said = visible(page(changed)).partition("Clocks and temperature")[2]
    assert re.search(r"scaling context 2048 ?61\.25 ?62\.5 ?1,980 ?3,201 ?42\.64 \(42 to 43\) ?true ?SwPowerCap", said)


def test_a_single_part(h200):
    one = {**h200, "parts": {"scaling": h200["parts"]["scaling"]}, "seconds": {"scaling": 1.0}}
    one["summary"] = report.summary(one)
    text = page(one)
    assert re.findall(r"<h2[^>]*>([^<]*)", text) == [
        "Headline figures", "Run and machine", "Doctor", "Context", "Conditions", "Summary", "All parts",
    ]  # fmt: skip
    assert "part tokens not run" in text


def test_a_part_that_failed_and_rows_that_an_interrupted_run_lacks(changed):
    changed["interrupted"] = True
    changed["parts"]["scaling"]["rows"][3:] = [missing("interrupted before it")] * 4
    changed["parts"]["scaling"]["fit"] = missing("interrupted before it")
    changed["parts"]["latency"]["products"]["down"] = missing("interrupted before it")
    del changed["parts"]["power"]
    changed["errors"]["power"] = {"reason": "RuntimeError: on fire", "traceback": "Traceback"}
    said = visible(html.html(changed))
    assert "Interrupted: the parts that are missing did not run." in said
    assert "EnergyPart power failed: RuntimeError: on fire" in said.replace("Energy ", "Energy")
    assert "interrupted before it" in said
    assert "4 products" not in said
    assert "3 products, int8, cold L2" in said
    assert report.markdown(changed)


def test_an_empty_run_is_a_page_too(h200):
    empty = {**h200, "parts": {}, "seconds": {}, "interrupted": True}
    empty["summary"] = report.summary(empty)
    text = html.html(empty)
    assert "None of them was measured" in text
    assert "interrupted in or before part tokens" in text


def test_a_part_that_the_page_does_not_know_has_a_section(changed):
    changed["parts"]["weather"] = {"rain": measured(3.5, "mm"), "rows": [{"hour": 1, "wind": measured(7.0, "m/s")}]}
    text = page(changed)
    assert ">Weather</h2>" in text
    assert "3.5 mm" in text
    assert "wind (m/s)" in text


def test_a_server(changed):
    series = changed["parts"]["tokens"]["first_token"]
    for key, value in (("server_url", measured("http://127.0.0.1:8080")), ("server_engine", measured("llama.cpp"))):
        changed["environment"][key] = value
    changed |= {"backend": "server", "model": None, "decoder_check": missing("a server's results are not checked")}
    changed["parts"] = {
        "server": {
            "rows": [{"name": "tg", "latency": series}],
            "throughput": {"requests": 4},
            "time_to_first_token": series,
            "inter_token": missing("some chunks held two"),
            "inter_chunk": series,
            "client_first_token_ms": series["median"],
        }
    }
    changed["summary"] = report.summary(changed)
    text = html.html(changed)
    assert "smollm-135m on the server at http://127.0.0.1:8080" in text
    assert not Page(text).all("link")
    assert ">Server</h2>" in text
    median = series["median"]
    low, high = median["ci95"]
    assert f"First token, at the client{median['value']:.4g} ms95 %: {low:.4g} to {high:.4g}" in visible(text)
    assert [plot.name for plot in plots.each(changed)] == ["server_first_token", "server_tokens"]
    assert "time between chunks (ms, clock of the client)" in text
    assert "# edgellm benchmark: smollm-135m on the server at" in report.markdown(changed)


def test_without_gpu_or_matplotlib_data_the_page_of_a_fresh_run(tmp_path):
    from tests.cpu.test_report import context

    result = suite.run(context(), ["hardware", "scaling"], command="edgellm bench --quick")
    names = [path.name for path in report.write(result, tmp_path)]
    assert names[:3] == ["report.json", "report.md", "report.html"]
    assert set(names[3:]) == {"scaling.svg", "scaling.png"}
    assert "Quick run" in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---- a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: playwright's own, or the one on PATH."""
    sync_api: Any = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with sync_api.sync_playwright() as p:
        own = Path(p.chromium.executable_path)
        found = own if own.exists() else next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        if not found:
            pytest.skip("no Chromium: neither playwright's own nor one on PATH")
        started = p.chromium.launch(executable_path=str(found), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_shows_the_page_without_complaint(browser, each, tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(each[1], encoding="utf-8")
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark")
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    wide, inner = tab.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('svg.plot text')).fill"
    dark = tab.evaluate(f"[{ground}, {ink}]")
    tab.click("button.theme")
    light = tab.evaluate(f"[{ground}, {ink}]")
    assert light == ["rgb(255, 255, 255)", "rgb(31, 35, 40)"]
    assert all(a != b for a, b in zip(dark, light, strict=True))
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.plot text')].map((t) => t.getBoundingClientRect().height))"
    )
    assert smallest > 7
    assert complaints == []
    assert requests == [file.as_uri()]
    tab.close()


def test_a_click_on_a_heading_sorts_by_number(browser, h200, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page(h200), encoding="utf-8")
    tab = browser.new_page()
    tab.goto(file.as_uri())
    table = "section[aria-labelledby=context] table.sorts"
    cells = f"[...document.querySelector('{table}').tBodies[0].rows].map((r) => r.cells[2].textContent)"
    before = tab.evaluate(cells)

    def value(cell: str) -> float:
        return float(cell.replace(",", ""))

    tab.click(f"{table} thead th:nth-child(3) button")
    assert tab.evaluate(cells) == sorted(before, key=value) != before
    tab.click(f"{table} thead th:nth-child(3) button")
    assert tab.evaluate(cells) == sorted(before, key=value, reverse=True)
    assert tab.get_attribute(f"{table} thead th:nth-child(3)", "aria-sort") == "descending"
    tab.close()
