"""What was measured before: `edgellm report`, `compare` and `runs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ArgumentValueError
from .options import JsonOption
from .output import exit_codes, files, rendered, say, show

runs_app = typer.Typer(no_args_is_help=True, help="The runs kept in .edgellm/runs: list them, show one.")

_RootOption = Annotated[Path | None, typer.Option("--root", help="Where runs are kept.", show_default=".edgellm/runs")]


@exit_codes()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN.json", help="A report.json, or the folder with one.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the files.", show_default="that of RUN.json")] = None,
) -> None:
    """Make Markdown, page and plots again from the JSON of a run."""
    from ..bench.reporting import report as reports

    run = run / "report.json" if run.is_dir() else run
    folder = out or run.parent
    show(files(folder, reports.remake(run, folder)))


@exit_codes()
def compare(
    paths: Annotated[
        list[Path], typer.Argument(metavar="A B [C ...]", help="Reports, or folders with one. A is the baseline.")
    ],
    fail: Annotated[
        str | None, typer.Option(metavar="METRIC:PERCENT", help="Exit with 1 if a row is slower by more: median:5%.")
    ] = None,
    margin: Annotated[
        str | None,
        typer.Option(metavar="PERCENT", help="Smaller differences are none: 2.5%.", show_default="each row's own"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of a row's samples: median, mean, p99, ...", show_default="each row's own"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Ratios across boundaries, too; they are marked.")] = False,
    every_row: Annotated[bool, typer.Option("--all", help="Show also the rows that are the same.")] = False,
    as_json: JsonOption = False,
    markdown: Annotated[Path | None, typer.Option("--md", metavar="FILE", help="Write Markdown, too.")] = None,
) -> None:
    """Say row by row which run is faster, and whether the difference is more than noise.

    Reads reports of edgellm, llama-bench's JSON and vLLM's.
    """
    from ..bench.comparing import compare as comparing
    from ..bench.reporting.report import replace

    found = comparing.compare(paths, fail=fail, force=force, margin=_fraction("--margin", margin), metric=metric)
    if markdown:
        say(f"written: {replace(markdown, comparing.markdown(found))}")
    as_text = (
        json.dumps(comparing.to_json(found), indent=1) if as_json else rendered(comparing.terminal(found, every_row))
    )
    show(as_text)
    raise typer.Exit(found.exit_code)


def _fraction(option: str, percent: str | None) -> float | None:
    """0.025 for "2.5%" or "2.5"."""
    if percent is None:
        return None
    try:
        return float(percent.removesuffix("%")) / 100
    except ValueError:
        raise ArgumentValueError(f"{option} is {percent!r}, expected a percentage such as 2.5%") from None


@runs_app.command("list")
@exit_codes()
def list_runs(
    root: Annotated[Path | None, typer.Argument(help="Where runs are kept.", show_default=".edgellm/runs")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs, the newest last, also those that were interrupted or are running."""
    from rich.table import Table
    from rich.text import Text

    from ..bench.reporting import runs

    found = runs.listing(root or runs.ROOT)
    if as_json:
        show(json.dumps([run.as_json() for run in found], indent=1))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("no", justify="right", no_wrap=True)
    table.add_column("UTC", no_wrap=True)
    table.add_column("GPU")
    table.add_column("model")
    table.add_column("commit", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("tok/s", justify="right", no_wrap=True)

    def cut(name: str) -> Text:
        """On one line, and what gives way in a narrow terminal: a column that may not wrap would not."""
        return Text(name, no_wrap=True, overflow="ellipsis")

    for run in found:
        table.add_row(
            "-" if run.number is None else str(run.number),
            (run.time or "-")[:16].replace("T", " "),
            cut(run.gpu.removeprefix("NVIDIA ").replace("NumPy backend", "NumPy")),
            cut(run.model or "-"),
            run.commit or "-",
            run.state,
            "-" if run.tok_s is None else f"{run.tok_s:,.0f}" if run.tok_s >= 100 else f"{run.tok_s:.3g}",
        )
    show(rendered(table))


@runs_app.command("show")
@exit_codes()
def show_run(
    which: Annotated[
        str | None, typer.Argument(metavar="[NUMBER|PATH]", help="Of the run.", show_default="the newest")
    ] = None,
    root: _RootOption = None,
) -> None:
    """Show the summary of one run."""
    from ..bench.reporting import report as reports
    from ..bench.reporting import runs, terminal

    run = runs.find(root or runs.ROOT, which)
    if not (run.path / runs.REPORT).is_file():
        show(f"{run.path}: {run.state}, no report; finished rows in rows.jsonl: {run.rows}")
        return
    show(rendered(terminal.summary(reports.load(run.path / runs.REPORT))))
    show(files(run.path, sorted(path for path in run.path.rglob("*") if path.is_file())))
