"""The report as Markdown, from its JSON alone."""

from __future__ import annotations

from . import document, layout
from .document import Block, Heading, Paragraph
from .layout import Report


def markdown(report: Report) -> str:
    """The whole report as text; it ends with the table of the summary."""
    lines = [f"# edgellm benchmark: {layout.subject(report)} on {layout.place(report)}"]
    for warning in document.warnings(report):
        lines += ["", f"> **{_escape(warning)}**"]
    facts = document.Table(["Run", ""], [[key, value] for key, value in document.facts(report).items()])
    lines += write([facts, Paragraph(document.INTERVALS), *document.doctor(report)])
    for name, figures in report["parts"].items():
        lines += write([Heading(2, document.title(name)), *document.section(name, figures)])
    summary = [[key, layout.with_unit(figure)] for key, figure in report["summary"].items()]
    lines += write([Heading(2, "Summary"), document.Table(["Metric", "Value"], summary)])
    return "\n".join(lines) + "\n"


def write(blocks: list[Block]) -> list[str]:
    """The lines of these blocks, an empty one before each."""
    lines = []
    for block in blocks:
        lines.append("")
        if isinstance(block, Heading):
            lines.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            lines.append("  \n".join(map(_escape, block.text.split("\n"))))
        else:
            lines += [_row(block.columns), _row(["---"] * len(block.columns)), *map(_row, block.rows)]
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
