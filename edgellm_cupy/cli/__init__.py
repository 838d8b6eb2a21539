"""The command `edgellm`. stdout carries the result, stderr progress and errors, the exit code says how it ended.

Exit codes: 0 done, 1 `compare --fail` found a regression, 2 wrong usage or a file that cannot be read or written
(stdout too), 3 no usable GPU although one was demanded, 4 a result was wrong, 5 `--strict` and the machine was not
steady, 6 partial (a part of the benchmark failed), 130 interrupted (Ctrl-C), 143 terminated (SIGTERM).

What takes long to import is imported by the commands themselves, where Ctrl-C is already an exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated

import typer

from ..version import __version__
from . import bench, convert, generate, machine, output, reports, server

app = typer.Typer(
    name="edgellm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an exception that gets this far is a bug of ours: show it as Python does
)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        app()
    except OSError:
        output.show("")  # ends here, with its own message, if it was stdout that could not be written, as by --help
        raise


def _show_version(wanted: bool) -> None:
    if wanted:
        output.show(f"edgellm-cupy {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Ternary (BitNet 1.58-bit) LLM inference on NVIDIA GPUs: generation, benchmark, checks, conversions."""


_MEASURE, _RUN, _MACHINE = "Measure and compare", "Run a model", "This machine"
_COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    _MEASURE: (reports.compare, reports.report),
    _RUN: (generate.generate, convert.convert),
    _MACHINE: (machine.info, machine.doctor, machine.verify, machine.tune),
}

bench.app.command("server", help="A live server, as its client sees it.", rich_help_panel="Other engines")(
    bench.taking(server.ServerOptions, server.measure_server)
)
app.add_typer(bench.app, name="bench", rich_help_panel=_MEASURE)
app.add_typer(reports.runs_app, name="runs", rich_help_panel=_MEASURE)
for _panel, _commands in _COMMANDS.items():
    for _command in _commands:
        app.command(rich_help_panel=_panel)(_command)
