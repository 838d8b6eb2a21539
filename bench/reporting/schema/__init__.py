"""The published JSON Schemas (draft 2020-12) of report.json and of a line of rows.jsonl, and what they cannot say.

    python -m edgellm_cupy.bench.reporting.schema FILE...    what is wrong with a report.json or rows.jsonl; then ends
                                                              with 1

A schema cannot compare two numbers and knows no NaN: :func:`faults` checks these too. It needs the package
`jsonschema`, which the extra `test` brings; the program itself does not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ....errors import EdgeLLMError

REPORT, ROW = "report.schema.json", "row.schema.json"


class SchemaError(EdgeLLMError):
    """A file cannot be checked; the message names it, or what is not installed."""


@cache
def load(name: str) -> dict[str, Any]:
    """The schema :data:`REPORT` or :data:`ROW`."""
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def faults(document: Any, name: str = REPORT) -> list[str]:
    """What is wrong with a report, or with a line of rows.jsonl (`name` :data:`ROW`): one line each, place first.

    Raises:
        SchemaError: the package `jsonschema` is not installed.
    """
    found = [f"{_place(error.absolute_path)}: {_said(error)}" for error in _validator(name).iter_errors(document)]
    return found + [f"{_place(path)}: {fault}" for path, fault in _beyond(document, ())]


@cache
def _validator(name: str) -> Any:
    try:
        from jsonschema import Draft202012Validator
        from referencing import Registry, Resource
    except ImportError as e:
        raise SchemaError("checking against the schema needs jsonschema: pip install edgellm-cupy[test]") from e
    registry = Registry().with_resources((key, Resource.from_contents(load(key))) for key in (REPORT, ROW))
    return Draft202012Validator(load(name), registry=registry)


def _said(error: Any) -> str:
    """The innermost message, which names the fault and not the whole branch that failed."""
    while error.context:
        error = min(error.context, key=lambda inner: -len(inner.absolute_path))
    return error.message if len(error.message) <= 300 else f"{error.message[:150]} ... {error.message[-150:]}"


def _beyond(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Numbers that are not finite, and intervals that do not ascend, anywhere inside `value`."""
    if isinstance(value, float) and not math.isfinite(value):
        yield path, f"{value} is not a number of JSON"
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _beyond(inner, (*path, i))
    elif isinstance(value, dict):
        ends = value.get("ci95")
        numbers = isinstance(ends, list) and all(isinstance(end, (int, float)) for end in ends)
        if isinstance(ends, list) and numbers and ends != sorted(ends):
            yield (*path, "ci95"), f"{ends} does not ascend"
        for key, inner in value.items():
            yield from _beyond(inner, (*path, key))


def _place(path: Any) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".") or "the whole"


def check(path: Path) -> list[str]:
    """:func:`faults` of a file: each line of one that ends in .jsonl is a row, any other is a report.

    Raises:
        SchemaError: it cannot be read, or is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return faults(json.loads(text))
        lines = [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as e:
        raise SchemaError(f"{path}: cannot be checked: {e}") from e
    if not lines or "identity" not in lines[0]:
        return ["line 1: not the header {schema_version, identity}"]
    return [f"line {i}: {fault}" for i, line in enumerate(lines, 1) for fault in faults(line, ROW)]
