"""Rows of a report: one measured quantity each, by a stable name, for comparing one report with another.

:func:`rows_of` makes them from a report.json, :mod:`.imports` from the files of other engines, with llama-bench's names
(``pp512``, ``tg128``, ``tg128 @ d4096``) where the quantity is the same. A quantity is one row: a latency and the rate
that is made from it are not two. What is derived from other rows (ratios, GB/s, fits, sums) is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import statistics
from ..metrics import Metric, is_metric

METRICS = ("median", "mean", "min", "max", "p10", "p90", "p95", "p99")
"""What of a row's samples can be compared. The median is known without samples too."""

_FEWEST_FOR_P10 = 50
"""Half of what a report asks for: the fast end of a series has no long tail."""

WORK = ("prompt_tokens", "output_tokens", "concurrency")
"""Facts that say what a server was asked for. Where they differ, the quantity is another one."""

OPS = {"rmsnorm_ternary_matmul": "rmsnorm+matmul", "ternary_matmul": "matmul"}


@dataclass(frozen=True)
class Row:
    """One quantity of one file.

    Attributes:
        group: rows that belong together, for example ``"kernel cold"``; the heading over them.
        name: unique within its group and file.
        match: rows of two files are the same quantity if this is equal (and the boundary).
        boundary: ``"kernel"``, ``"engine"``, ``"server"`` or ``"client"``: what lies inside the measured time.
        metric: ``"time"``, ``"rate"`` or ``"energy"``.
        unit: of the value, the interval and the samples.
        value: the median; None where it was not measured, with the `reason`.
        interval: 95 % interval of the value, or None.
        samples: in the order in which they were taken; empty where the file has none.
        positional: sample i is the same work in every run of as many samples (token i of a growing context).
        pace: what the quantity depends on, and so how far two runs of the same thing lie apart: ``"gpu"``, which is
            never waiting for the host, ``"host"``, ``"server"`` or ``"board"``, the sensors of power. See
            :mod:`.verdict`.
        yardstick: a floor or somebody else's library: what is measured beside our own, in the same run.
        facts: what has to be known beside the value: weight bits and bytes, KV type, batch, sampling, l2, ... Those of
            :data:`WORK` must not differ.
        options: of the engine, all by which tests of the same `match` could differ: name -> value, as text. Where a
            file has several such tests, these tell which belong together.
        wrong: the result was checked and found wrong, so that there is no speed.
        throttled: the GPU held its clocks down meanwhile.
        part: of the report, whose error is why a row is missing; empty for other engines' files.
    """

    group: str
    name: str
    boundary: str
    metric: str
    unit: str
    value: float | None
    match: str
    reason: str | None = None
    interval: tuple[float, float] | None = None
    samples: tuple[float, ...] = ()
    positional: bool = False
    pace: str = "gpu"
    yardstick: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    wrong: bool = False
    throttled: bool = False
    part: str = ""

    @property
    def better(self) -> str:
        """``"lower"`` or ``"higher"``."""
        return "higher" if self.metric == "rate" else "lower"

    def costs(self) -> np.ndarray:
        """The samples as costs: times and energies as they are, rates inverted."""
        samples = np.asarray(self.samples, np.float64)
        return 1 / samples if self.better == "higher" else samples

    def figure(self, metric: str) -> float | None:
        """One of :data:`METRICS`, in the row's unit; None where the file does not tell it.

        Percentiles are those of the cost: the 99th of a rate is the rate that 99 % of the samples exceed. One whose
        tail holds too few samples is None, as in a report.
        """
        if metric == "median" or self.value is None:
            return self.value
        if len(self.samples) < 2 or min(self.samples) <= 0:
            return None
        cost = cost_of(self.costs(), metric)
        return None if cost is None else 1 / cost if self.better == "higher" else cost


def cost_of(costs: np.ndarray, metric: str) -> float | None:
    """One of :data:`METRICS` of at least one sample; None for a percentile whose tail holds too few."""
    if metric.startswith("p"):
        percent = float(metric[1:])
        fewest = _FEWEST_FOR_P10 if percent < 50 else statistics.SMALLEST_TAIL * 100 / (100 - percent)
        return float(np.percentile(costs, percent)) if len(costs) >= fewest - 1e-6 else None
    if metric in ("min", "max"):
        return float(costs.min() if metric == "min" else costs.max())
    return float(costs.mean() if metric == "mean" else np.median(costs))


def rows_of(report: Mapping[str, Any]) -> list[Row]:
    """Every row of a report.json (a dictionary), in a stable order. Parts that did not run have none.

    A figure that a part tried to measure is a row even where it is null; what a backend never measures is not.
    """
    parts, facts, numpy = report["parts"], _facts(report), report["backend"] == "numpy"
    shortest = _shortest_prompt_ms(parts)
    board = _dict_value(_dict(parts.get("hardware")).get("gpu_uuid"))
    readers: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
        "latency": _latency,
        "transfer": _transfer,
        "tokens": lambda part: _tokens(part, facts, numpy, shortest),
        "scaling": lambda part: _scaling(part, facts, numpy, shortest),
        "power": lambda part: _power(part, facts, board),
        "cpu": lambda part: _cpu(part, facts),
        "server": _server,
    }
    found = [replace(row, part=name) for name, rows in readers.items() for row in rows(parts.get(name, {}))]
    unmeasurable = {report["no_gpu"]}  # on NumPy: no row, rather than hundreds without a value
    return [row for row in found if row.value is not None or row.reason not in unmeasurable]


# ---- one figure -----------------------------------------------------------------------------------------------------


def row(
    figure: Any,
    group: str,
    name: str,
    boundary: str,
    match: str | None = None,
    per: float | None = None,
    rate: Metric | None = None,
    **detail: Any,
) -> Row:
    """A row of a figure, of one with `samples`, or of a series of :func:`..statistics.summarise`.

    per: the row is a rate, this amount over each sample (of milliseconds, per second).
    rate: the figure of that rate, where the report has one.
    """
    series = isinstance(figure, dict) and "median" in figure
    known = figure["median"] if series else figure
    shown = rate if rate is not None and rate["value"] is not None else known
    samples: Sequence[float] = figure.get("samples") or ()
    value, interval = shown["value"], shown.get("ci95")
    if per is not None:
        samples = [per / s if s > 0 else float("nan") for s in samples]
        if shown is known and value is not None:
            value, interval = per / value, [per / limit for limit in reversed(interval)] if interval else None
    reason = known.get("reason") if value is None else None
    return Row(
        group=group,
        name=name,
        boundary=boundary,
        metric=detail.pop("metric", "time" if per is None and rate is None else "rate"),
        unit=(known if per is None else {"unit": "tok/s"}).get("unit") or "",
        value=None if value is None else float(value),
        match=match or f"{group}/{name}",
        reason=reason,
        interval=(float(interval[0]), float(interval[1])) if interval else None,
        samples=tuple(samples) if np.isfinite(samples).all() else (),
        wrong=bool(known.get("wrong")) or (reason or "").startswith("wrong result"),
        **detail,
    )


def _list(value: Any) -> list[dict[str, Any]]:
    """The rows of a section, none where a null figure stands in their place. A row may be null too (not reached)."""
    return [entry for entry in value if not is_metric(entry)] if isinstance(value, list) else []


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) and not is_metric(value) else {}


def _throttled(*conditions: Any) -> bool:
    return any(_dict(c).get("throttled", {}).get("value") is True for c in conditions)


def _facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of the model that decodes; empty for a report of shapes or of a server."""
    model = report["model"]
    if not model or model.get("head_bytes") is None:
        return {}
    decoder = model.get("decoder") or {}
    return {
        "model": model["config"]["name"],
        "weight_bits": 2,
        "weight_bytes": model["body_bytes"] + model["head_bytes"],
        "kv_type": decoder.get("kv_cache", "float16"),
        "head": decoder.get("head", "int8"),  # before 1.2 there was no other
        "batch": 1,
        "sampling": "greedy",
    }


# ---- the parts ------------------------------------------------------------------------------------------------------

YARDSTICKS = "floors and baselines"
_SERIES = {"kernel cold": ("kernel", "cold"), "kernel warm": ("kernel", "warm"), "device": ("device",),
           "end_to_end": ("end_to_end",)}  # fmt: skip


def _latency(part: dict[str, Any]) -> Iterator[Row]:
    products = _dict(part.get("products"))
    for group, path in _SERIES.items():
        for layer, product in products.items():
            for entry in _list(_dict(product).get("rows")):
                figure: Any = entry
                for key in path:
                    figure = figure if is_metric(figure) else figure.get(key)
                if figure is None:
                    continue
                strategy = "" if entry["strategy"] == "adaptive" else f" {entry['strategy']}"
                facts = {key: entry[key] for key in ("dtype", "n") if key in entry}
                yield row(
                    figure, group, f"{layer} {OPS.get(entry['op'], entry['op'])} {entry['activation']}{strategy}",
                    "kernel", facts={**facts, "shape": f"{product['m']} x {product['k']}"},
                    pace="gpu" if path[0] == "kernel" else "host", throttled=_throttled(entry.get("conditions")),
                )  # fmt: skip
    for layer, product in products.items():
        yield from _yardsticks(layer, "floor", _dict(product).get("floor"))
        for name, pair in _dict(_dict(product).get("baselines")).items():
            yield from _yardsticks(layer, name, pair)
    if part.get("bandwidth"):
        yield row(part["bandwidth"], YARDSTICKS, "memory bandwidth", "kernel", metric="rate", yardstick=True)
    yield from _shapes(_dict(part.get("table")))


def _yardsticks(layer: str, name: str, pair: Any, **facts: Any) -> Iterator[Row]:
    for l2, figure in _dict(pair).items():
        yield row(figure, YARDSTICKS, f"{layer} {name} {l2}", "kernel", yardstick=True, facts=facts)


def _shapes(table: dict[str, Any]) -> Iterator[Row]:
    """Of a table of shapes: our kernels by series, then its floors and baselines."""
    lines = [
        (shape, tokens, f"{shape['model']} {shape['layer']}", f"N={tokens['n']}")
        for shape in _list(table.get("shapes"))
        for tokens in _list(shape["tokens"])
    ]
    for series in ("cold", "warm", "alone"):
        for shape, tokens, label, n in lines:
            facts = {"n": tokens["n"], "shape": f"{shape['m']} x {shape['k']}"}
            for entry in _list(tokens["rows"]):
                if series in entry["kernel"]:
                    name, throttled = f"{label} {n} {entry['activation']}", _throttled(entry.get("conditions"))
                    yield row(
                        entry["kernel"][series], f"table {series}", name, "kernel", facts=facts, throttled=throttled
                    )
    for shape in _list(table.get("shapes")):
        yield from _yardsticks(f"{shape['model']} {shape['layer']}", "floor", shape["floor"])
    for _, tokens, label, n in lines:
        for name, pair in _dict(tokens["baselines"]).items():
            yield from _yardsticks(f"{label} {n}", name, pair, n=tokens["n"])


def _transfer(part: dict[str, Any]) -> Iterator[Row]:
    for series in ("device", "end_to_end"):
        for copy in _list(part.get("copies")):
            name = f"{copy['direction']} {copy['bytes']} bytes {series}"
            yield row(copy[series], "transfer", name, "kernel", pace="host", facts={"bytes": copy["bytes"]},
                      throttled=_throttled(copy.get("conditions")))  # fmt: skip


def _shortest_prompt_ms(parts: Mapping[str, Any]) -> float | None:
    """Of the prompts of a report; None if it has none."""
    prompts = [entry for name in ("tokens", "scaling") for entry in _list(_dict(parts.get(name)).get("prompts"))]
    known = [ms for entry in prompts if (ms := _dict_value(_dict(entry["latency"]).get("median"))) is not None]
    return min(known, default=None)


def _prompt(entry: dict[str, Any], numpy: bool, shortest: float | None) -> dict[str, Any]:
    """What the row of a prompt needs, beside its names.

    A prompt is timed by the host's clock while the host launches kernel by kernel, as many kernels whatever its length.
    So its pace is the host's, unless it takes twice as long as the shortest of the report: the launches took at most
    the whole of that one, and so end long before the GPU does.
    """
    ms = _dict_value(_dict(entry["latency"]).get("median"))
    on_gpu = not numpy and ms is not None and shortest is not None and ms > 2 * shortest
    return {"per": 1e3 * entry["tokens"], "rate": entry.get("tok_s"), "pace": "gpu" if on_gpu else "host"}


def _tokens(part: dict[str, Any], facts: dict[str, Any], numpy: bool, shortest: float | None) -> Iterator[Row]:
    def figure(value: Any, name: str, match: str | None = None, entry: Any = None, **detail: Any) -> Row:
        throttled = _throttled(part.get("conditions"), _dict(entry).get("conditions"))
        detail["facts"] = facts | detail.pop("facts", {})
        return row(value, "tokens", name, "engine", match, throttled=throttled, **detail)

    if "first_token" in part:
        first = part["first_token"]
        name = f"ttft {first.get('prompt_tokens', '')}".strip()
        yield figure(first, name, pace="host", entry=first)
    for entry in _list(part.get("prompts")):
        name = f"pp{entry['tokens']}"
        yield figure(entry["latency"], name, name, entry, **_prompt(entry, numpy, shortest))
    if "throughput_tok_s" in part:
        rate = part["throughput_tok_s"]
        name = f"tg{rate.get('run_tokens', part.get('plan', {}).get('run_tokens', ''))}"
        # On NumPy its runs are those of token_latency: one quantity.
        yield figure(rate, name, name, metric="rate", pace="host" if numpy else "gpu")
    for key, name in (("token_latency", "token latency"), ("token_latency_streamed", "token latency streamed")):
        if key in part and not numpy:
            pace = "gpu" if key == "token_latency" else "host"
            yield figure(part[key], name, entry=part[key], positional=True, pace=pace)
    for entry in _list(part.get("batches")):
        batch = entry["batch"]
        yield figure(
            entry["latency"], f"tg batch {batch}", None, entry, per=1e3 * batch, rate=entry.get("tok_s"),
            positional=True, facts={"batch": batch}, pace="host" if numpy else "gpu",
        )  # fmt: skip
    for entry in _list(part.get("sampling")):
        yield figure(
            entry["latency"], f"tg {_short(entry['sampling'])}", None, entry, per=1e3, positional=True,
            facts={"sampling": entry["sampling"]}, pace="host" if numpy else "gpu",
        )  # fmt: skip


def _short(sampling: str) -> str:
    """The names of :func:`..parts.tokens.name`, short enough for a column."""
    return sampling.replace("temperature ", "T=").replace("top_k ", "k=").replace("top_p ", "p=").replace(",", "")


def tg_at_depth(tokens: int, depth: int) -> tuple[str, str]:
    """Name and identity of generating so many tokens at that depth. There the number of tokens is no part of what is
    measured: the context is what the time depends on."""
    return (f"tg{tokens} @ d{depth}", f"tg @ d{depth}") if depth else (f"tg{tokens}", f"tg{tokens}")


def _scaling(part: dict[str, Any], facts: dict[str, Any], numpy: bool, shortest: float | None) -> Iterator[Row]:
    def detail(entry: dict[str, Any]) -> dict[str, Any]:
        throttled = _throttled(part.get("conditions"), entry.get("conditions"))
        return {"facts": facts | {"synthetic": entry["synthetic"]}, "throttled": throttled}

    for entry in _list(part.get("rows")):
        latency = entry["latency"]
        name, match = tg_at_depth(latency.get("n", 0), entry["context"])
        yield row(
            latency, "depth", name, "engine", match, per=1e3, rate=entry.get("tok_s"), positional=True,
            pace="host" if numpy else "gpu", **detail(entry),
        )  # fmt: skip

    for entry in _list(part.get("prompts")):
        name = f"pp{entry['tokens']} @ d{entry['context']}"
        yield row(entry["latency"], "depth", name, "engine", name, **_prompt(entry, numpy, shortest), **detail(entry))


def _power(part: dict[str, Any], facts: dict[str, Any], board: str | None) -> Iterator[Row]:
    """Energy, not watts: those say nothing without the work that was done meanwhile. `board`: UUID of the GPU."""
    token = _dict(part.get("token"))
    windows = [_dict(w) for w in _list(token.get("windows"))]
    found = [("token", "engine", token, windows, facts | {"board": board})]
    for layer, product in _dict(part.get("products")).items():
        # Net is gross without the idle draw: with one window it is known too coarsely to be a row of its own.
        gross = {key: value for key, value in _dict(product).items() if key == "gross_j"}
        windows = [_dict(w) for w in _list(_dict(product).get("windows")) or [_dict(_dict(product).get("window"))]]
        found.append((layer, "kernel", gross, windows, {"board": board}))
    for name, boundary, figures, of, about in found:
        for key in ("gross_j", "net_j"):
            if key in figures:
                one = row(
                    figures[key], "energy", f"{name} {key.removesuffix('_j')}", boundary, metric="energy",
                    pace="board", facts=about, throttled=_throttled(*(w.get("conditions") for w in of)),
                )  # fmt: skip
                yield one if one.interval else _to_a_tick(one, figures["gross_j"], of)


def _to_a_tick(row: Row, gross: Metric, windows: list[dict[str, Any]]) -> Row:
    """With too few windows for an interval: a window's energy is known to one step of the counter."""
    ticks = [w["ticks"] for w in windows if isinstance(w.get("ticks"), int) and w["ticks"] > 0]
    if row.value is None or not ticks:
        return row
    half = gross["value"] / min(ticks)
    return replace(row, interval=(row.value - half, row.value + half))


def _cpu(part: dict[str, Any], facts: dict[str, Any]) -> Iterator[Row]:
    if "enqueue_us" in part:
        yield row(part["enqueue_us"], "cpu", "enqueue a token", "engine", pace="host", facts=facts)
    if "cpu_time_per_token_ms" in part:
        total = row(part["cpu_time_per_token_ms"], "cpu", "CPU time a token", "engine", pace="host", facts=facts)
        # Of the whole loop, so without samples; how much it varied is seen from the load in windows of the loop.
        yield _scaled(total, part.get("windows_pct") or [])


def _server(part: dict[str, Any]) -> Iterator[Row]:
    """Of :mod:`..serving.server`: each row has its own boundary."""
    weights, plan = _dict(part.get("weights")), _dict(part.get("plan"))
    facts = {
        "model": part.get("model"),
        "weight_bytes": _dict_value(weights.get("bytes")),
        "quantisation": _dict_value(weights.get("quantisation")),
        "prompt_tokens": plan.get("prompt_tokens"),
        "output_tokens": plan.get("max_tokens"),
        "concurrency": plan.get("concurrency"),
    }
    about: dict[str, Any] = {"facts": {key: value for key, value in facts.items() if value is not None}}
    about["pace"] = "server"
    for entry in _list(part.get("rows")):
        name, boundary = entry["name"], entry["boundary"]
        if name.startswith("tg"):
            yield row(entry["latency"], "server", name, boundary, name, per=1e3, rate=entry["tok_s"], **about)
        elif boundary == "server":  # the client's is its time to the first token, which is a row below
            yield row(entry["tok_s"], "server", name, boundary, name, metric="rate", **about)
    boundary = part.get("boundary", "client")
    for key, name in (("time_to_first_token", "ttft"), ("inter_token", "inter-token latency")):
        if key in part:
            yield row(part[key], "server", name, boundary, f"client {name}", **about)
    output = _dict(part.get("throughput")).get("output_tok_s")
    if output:
        name = "output throughput"
        total = row(output, "server", name, boundary, f"client {name}", metric="rate", **about)
        yield _as_the_requests(total, _list(part.get("requests")))


def _as_the_requests(total: Row, lines: list[dict[str, Any]]) -> Row:
    """The rate of all requests together, with the interval of the median request's own rate."""
    rates = []
    for line in lines:
        tokens = _dict_value(line.get("completion_tokens"))
        ms = [_dict_value(line.get(key)) for key in ("first_token_ms", "first_to_last_ms")]
        if tokens and None not in ms and sum(ms) > 0:
            rates.append(1e3 * tokens / sum(ms))
    return _scaled(total, rates)


def _scaled(total: Row, pieces: Sequence[float]) -> Row:
    """A row without samples, whose relative interval is that of the median of `pieces` of the same loop."""
    limits = statistics.median_interval(pieces)
    if total.value is None or not limits or (middle := float(np.median(pieces))) <= 0:
        return total
    return replace(total, interval=(total.value * limits[0] / middle, total.value * limits[1] / middle))


def _dict_value(figure: Any) -> Any:
    return figure["value"] if is_metric(figure) else None
