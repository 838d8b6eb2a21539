"""Results of other engines as rows: llama-bench, and vLLM's `bench latency` and `bench serve`.

What a file is, is seen from what is in it:

    llama-bench     `-o json`, an array of objects, or `-o jsonl`, an object a line. Boundary `engine`: token ids in and
                    out, no tokeniser. Rates with their samples, by llama-bench's own names (``pp512``, ``tg128``,
                    ``pp512+tg128``, ``tg128 @ d4096``).
    vLLM latency    `vllm bench latency --output-json`. Boundary `engine`. The file does not say how long prompts and
                    outputs were, nor how many there were: it can be compared with another such file only.
    vLLM serve      `vllm bench serve --save-result`, one object or, with `--append-result`, one a line. Boundary
                    `client`: network, queue and tokeniser are inside. ``tg128`` is the inverse of the time per output
                    token, 128 the mean length of the outputs. The samples are there with `--save-detailed`. A figure
                    that is missing or 0 (there is no time per output token where an output has one) is no row.

Every option that a file tells is in the environment, and in `Row.options`. By which of them two tests of one file
differ is part of their names, not of their `match`: what identifies a row is seen from both files.

Keys that are not needed may be missing or unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import EdgeLLMError
from .rows import Row, tg_at_depth

EDGELLM, LLAMA_BENCH, VLLM_LATENCY, VLLM_SERVE = "edgellm", "llama-bench", "vLLM latency", "vLLM serve"


class ImportFileError(EdgeLLMError, ValueError):
    """A file of results cannot be read; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class Imported:
    """What a file of another engine says.

    Attributes:
        kind: which engine wrote it, :data:`LLAMA_BENCH`, :data:`VLLM_LATENCY` or :data:`VLLM_SERVE`.
        rows: in the file's order. Those of a test that was run twice are all there.
        environment: what it says about itself, its machine and its options, as text.
    """

    kind: str
    rows: list[Row]
    environment: dict[str, str] = field(default_factory=dict)


def read_json(path: Path) -> Any:
    """The JSON value of a file; of a file with one value a line, their list.

    Raises:
        ImportFileError: the file cannot be read or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ImportFileError(f"{path}: cannot be read: {e.strerror if isinstance(e, OSError) else e}") from e
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as whole:
        try:
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise ImportFileError(f"{path}: not JSON, nor JSON lines: {whole}") from whole
        return lines


def kind_of(value: Any) -> str | None:
    """Which program wrote this JSON value, :data:`EDGELLM` or one of the others; None if it is unknown."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        return None
    if "schema_version" in first:
        return EDGELLM
    if "model_filename" in first or {"n_prompt", "n_gen"} <= first.keys():
        return LLAMA_BENCH
    if {"avg_latency", "latencies"} & first.keys() and "completed" not in first:
        return VLLM_LATENCY
    if {"request_throughput", "output_throughput"} & first.keys():
        return VLLM_SERVE
    return None


def imported(value: Any, path: Path) -> Imported:
    """Read the JSON value of another engine's file.

    Raises:
        ImportFileError: it is of no engine that is known, or a value that is read is missing or none that can be.
    """
    kind = kind_of(value)
    if kind not in _READERS:
        raise ImportFileError(
            f"{path}: not a result that this program reads: expected a report.json of edgellm, the JSON of "
            f"llama-bench, or that of vLLM's bench latency or bench serve; {_described(value)}"
        )
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, dict):
            raise ImportFileError(f"{path}: not a file of {kind}: expected objects, found {_described(entry)}")
    rows, environment = _READERS[kind]([_Entry(entry, path, kind) for entry in entries])
    return Imported(kind, _named_apart(rows), environment)


def _described(value: Any) -> str:
    if isinstance(value, dict):
        return f"its keys are {', '.join(map(str, list(value)[:5])) or 'none'}"
    return "it is empty" if value == [] else f"it is a {type(value).__name__}"


def _named_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the options by which those of one name differ in their names."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    found = []
    for row in rows:
        alike = by_name[row.name]
        keys = dict.fromkeys(key for other in alike for key in other.options)
        differing = [
            f"{key}={row.options.get(key, _UNSET)}"
            for key in keys
            if len({other.options.get(key) for other in alike}) > 1
        ]
        found.append(replace(row, name=f"{row.name} [{', '.join(differing)}]") if differing else row)
    return found


_UNSET = "unset"


def _number(value: Any) -> float | None:
    """None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _numbers(values: Any) -> tuple[float, ...]:
    """Of a list of finite numbers; empty if it is none."""
    numbers = [_number(value) for value in values] if isinstance(values, list) else []
    found = tuple(number for number in numbers if number is not None)
    return found if len(found) == len(numbers) else ()


class _Entry:
    """One object of a file; what is needed of it is asked for by name."""

    def __init__(self, values: dict[str, Any], path: Path, kind: str):
        self.values, self.path, self._kind = values, path, kind

    def number(self, key: str) -> float:
        number = _number(self.values.get(key))
        if number is None:
            found = f"is {self.values[key]!r:.40}" if key in self.values else "is missing"
            raise ImportFileError(f"{self.path}: not a whole result of {self._kind}: {key} {found}, expected a number")
        return number

    def count(self, key: str, default: int | None = None) -> int:
        """`default`: where the key is missing."""
        if default is not None and self.values.get(key) is None:
            return default
        value = self.number(key)
        if value < 0 or value != int(value):
            raise ImportFileError(f"{self.path}: {key} is {value:g}, expected a whole number")
        return int(value)

    def positive(self, key: str) -> float:
        value = self.number(key)
        if not value > 0:
            raise ImportFileError(f"{self.path}: {key} is {value:g}, expected a positive number")
        return value

    def known(self, key: str) -> float | None:
        """None where the key is missing or null, or the number is not above zero."""
        if self.values.get(key) is None:
            return None
        value = self.number(key)
        return value if value > 0 else None

    def samples(self, key: str) -> tuple[float, ...]:
        """A list of numbers above zero; empty if there is none."""
        values = _numbers(self.values.get(key))
        return values if all(value > 0 for value in values) else ()

    def facts(self, names: Mapping[str, str]) -> dict[str, Any]:
        """`names`: key of ours -> key of the file; those that the file has."""
        return {ours: self.values[key] for ours, key in names.items() if self.values.get(key) is not None}

    def texts(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of the keys that have a value. A boolean is 0 or 1: some options were one in older versions."""
        values = {key: self.values.get(key) for key in keys}
        return {
            key: str(int(value) if isinstance(value, bool) else value)
            for key, value in values.items()
            if value not in (None, "")
        }


_Read = tuple[list[Row], dict[str, str]]


def _environment(of_entries: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """All values that occur, each once."""
    keys = dict.fromkeys(key for entry in of_entries for key in entry)
    return {key: ", ".join(dict.fromkeys(entry.get(key, _UNSET) for entry in of_entries)) for key in keys}


# ---- llama-bench ----------------------------------------------------------------------------------------------------

_LLAMA_ENVIRONMENT = {"build_commit": "commit", "build_number": "build", "gpu_info": "gpu", "cpu_info": "cpu",
                      "backends": "backend", "model_type": "model", "model_size": "model bytes",
                      "model_n_params": "model parameters"}  # fmt: skip
_LLAMA_TEST = ("n_prompt", "n_gen", "n_depth")
_LLAMA_RESULTS = ("test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts")


def _llama_bench(entries: Sequence[_Entry]) -> _Read:
    rows, environment = [], []
    for entry in entries:
        options = _llama_options(entry)
        rows.append(_llama_row(entry, options))
        about = entry.texts(_LLAMA_ENVIRONMENT)
        environment.append({_LLAMA_ENVIRONMENT[key]: text for key, text in about.items()} | options)
    return rows, _environment(environment)


def _llama_options(entry: _Entry) -> dict[str, str]:
    """Whatever is nothing else: each version of llama-bench has options of its own. None of them is a fraction."""
    others = (*_LLAMA_ENVIRONMENT, *_LLAMA_TEST, *_LLAMA_RESULTS)
    return entry.texts(
        key for key, value in entry.values.items() if key not in others and isinstance(value, (str, bool, int))
    )


def _llama_row(entry: _Entry, options: dict[str, str]) -> Row:
    prompt, generated, depth = entry.count("n_prompt"), entry.count("n_gen"), entry.count("n_depth", 0)
    if not prompt and not generated:
        raise ImportFileError(f"{entry.path}: a test of llama-bench has n_prompt and n_gen 0, expected one above 0")
    if prompt:
        name = match = f"pp{prompt}" + (f"+tg{generated}" if generated else "") + (f" @ d{depth}" if depth else "")
    else:
        name, match = tg_at_depth(generated, depth)
        if depth:  # no part of `match`, so that it tells two such tests of one file apart
            options = {"n_gen": str(generated), **options}
    samples = entry.samples("samples_ts")
    size, parameters = entry.known("model_size"), entry.known("model_n_params")
    facts = {
        "model": entry.values.get("model_type"),
        "weight_bytes": int(size) if size else None,
        "weight_bits": round(8 * size / parameters, 2) if size and parameters else None,
        "kv_type": _kv_type(entry),
        "batch": 1,
        "sampling": "none: random tokens are fed",
    }
    return Row(
        group="depth" if depth else "tokens",
        name=name,
        match=match,
        boundary="engine",
        metric="rate",
        unit="tok/s",
        value=float(np.median(samples)) if samples else entry.positive("avg_ts"),
        samples=samples,
        pace="host" if _on_cpu(entry) else "gpu",
        facts={key: value for key, value in facts.items() if value is not None},
        options=options,
    )


def _on_cpu(entry: _Entry) -> bool:
    """Does the CPU compute at least some layers? `backends` are those of the program: it need not have used them."""
    backends = entry.values.get("backends")
    return (
        (isinstance(backends, str) and {name.strip() for name in backends.split(",")} <= {"CPU", "BLAS"})
        or entry.values.get("gpu_info") == ""
        or entry.values.get("n_gpu_layers") == 0
        or entry.values.get("devices") == "none"
        or entry.known("n_cpu_moe") is not None
    )


def _kv_type(entry: _Entry) -> str | None:
    """`type_k`, or both types where they differ; in the names that reports of ours have."""
    names = {"f16": "float16", "f32": "float32", "bf16": "bfloat16"}
    kinds = [names.get(kind, kind) for kind in entry.texts(("type_k", "type_v")).values()]
    return " and ".join(dict.fromkeys(kinds)) or None


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _vllm_latency(entries: Sequence[_Entry]) -> _Read:
    name, facts = "vLLM latency of a batch", {"lengths": "not in the file", "sampling": "temperature 1"}
    rows = []
    for entry in entries:
        average, samples = entry.positive("avg_latency"), entry.samples("latencies")
        value = float(np.median(samples)) if samples else average
        rows.append(Row("tokens", name, "engine", "time", "s", value, name, samples=samples, facts=facts))
    return rows, {}


_SERVE_ENVIRONMENT = {"date": "timestamp", "model_id": "model", "backend": "engine"}
_SERVE_NO_OPTIONS = ("date", "endpoint_type")
"""Texts that are no option; `endpoint_type` is `backend` once more."""
_SERVE_NUMBERS = ("request_rate", "burstiness", "max_concurrency", "num_prompts", "ramp_up_start_rps",
                  "ramp_up_end_rps")  # fmt: skip


def _vllm_serve(entries: Sequence[_Entry]) -> _Read:
    rows: list[Row] = []
    environment = []
    for entry in entries:
        completed = entry.number("completed")
        if completed < 1:
            raise ImportFileError(f"{entry.path}: vLLM serve completed 0 requests: there is nothing to compare")
        totals = {"prompt_tokens": "total_input_tokens", "output_tokens": "total_output_tokens"}
        means = {ours: total / completed for ours, key in totals.items() if (total := entry.known(key)) is not None}
        facts = entry.facts({"model": "model_id", "request_rate": "request_rate", "failed": "failed",
                             "tokenizer": "tokenizer_id"})  # fmt: skip
        if concurrency := entry.count("max_concurrency", 0):
            facts["concurrency"] = concurrency
        facts |= {key: round(mean) for key, mean in means.items()}
        options = _serve_options(entry, means)
        found = _serve_figures(entry, means)
        if not found:
            raise ImportFileError(
                f"{entry.path}: not a result of vLLM serve that is read: expected one of median_ttft_ms, "
                "median_tpot_ms, median_itl_ms and output_throughput above 0, found none"
            )
        for name, value, unit, match, samples in found:
            metric = "rate" if unit == "tok/s" else "time"
            rows.append(
                Row("server", name, "client", metric, unit, value, match, samples=samples, pace="server", facts=facts,
                    options=options)
            )  # fmt: skip
        about = entry.texts(_SERVE_ENVIRONMENT)
        environment.append(
            {key: text for key, text in options.items() if key not in _SERVE_ENVIRONMENT}
            | {_SERVE_ENVIRONMENT[key]: text for key, text in about.items()}
        )
    return rows, _environment(environment)


_Figure = tuple[str, float, str, str, tuple[float, ...]]


def _serve_figures(entry: _Entry, means: Mapping[str, float]) -> list[_Figure]:
    """(name, value, unit, match, samples) of each figure that is there: `--percentile-metrics` leaves some out."""
    found: list[_Figure] = []
    if ttft := entry.known("median_ttft_ms"):
        firsts = tuple(1e3 * s for s in _numbers(_answered(entry, "ttfts")) if s > 0)
        found.append(("ttft", ttft, "ms", "client ttft", firsts))
    if (tpot := entry.known("median_tpot_ms")) and "output_tokens" in means:
        name = f"tg{round(means['output_tokens'])}"
        found.append((name, 1e3 / tpot, "tok/s", name, ()))
    if itl := entry.known("median_itl_ms"):
        gaps = tuple(1e3 * gap for request in _answered(entry, "itls") for gap in _numbers(request) if gap > 0)
        found.append(("inter-token latency", itl, "ms", "client inter-token latency", gaps))
    if throughput := entry.known("output_throughput"):
        found.append(("output throughput", throughput, "tok/s", "client output throughput", ()))
    return found


def _answered(entry: _Entry, key: str) -> list[Any]:
    """Values of a list with one a request, of those requests that did not fail; empty if there is none."""
    values, errors = entry.values.get(key), entry.values.get("errors")
    if not isinstance(values, list):
        return []
    if isinstance(errors, list) and len(errors) == len(values):
        return [value for value, error in zip(values, errors, strict=True) if not error]
    return values


def _serve_options(entry: _Entry, means: Mapping[str, float]) -> dict[str, str]:
    """The load, the lengths of requests, and texts: those are never results, and may be the user's (`--metadata`).

    A mean length that is no whole number is that of requests that differ. Of prompts it is told to two digits, so that
    a few failed requests do not change it. How long the outputs were was the model's choice then, and is no option.
    """
    texts = [key for key, value in entry.values.items() if isinstance(value, str) and key not in _SERVE_NO_OPTIONS]
    options = entry.texts(dict.fromkeys((*texts, *_SERVE_NUMBERS)))
    for key, mean in means.items():
        if mean == int(mean):
            options[key] = str(int(mean))
        elif key == "prompt_tokens":
            options[key] = f"{float(f'{mean:.2g}'):.0f}"
    return options


_READERS = {LLAMA_BENCH: _llama_bench, VLLM_LATENCY: _vllm_latency, VLLM_SERVE: _vllm_serve}
