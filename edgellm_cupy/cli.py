"""The command `edgellm`. stdout carries the result, stderr progress and errors, the exit code says how it ended.

Exit codes: 0 done, 2 wrong usage or a bad file, 3 no usable GPU although one was demanded, 4 a result was wrong,
6 partial (a part of the benchmark failed), 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import formats, runtime, verify
from .bench import hardware, report, suite
from .bench.context import Context
from .errors import ArgumentValueError, EdgeLLMError, GpuUnavailableError
from .formats import compact
from .formats.checkpoint import Checkpoint
from .formats.config import ModelConfig
from .version import __version__

EXIT_USAGE, EXIT_NO_GPU = 2, 3  # the other codes are those of a benchmark, in bench.suite

DEFAULT_MODEL = "smollm-135m"
DEFAULT_OUT = Path("edgellm-report")

_NO_COLOR = bool(os.environ.get("NO_COLOR"))  # https://no-color.org

app = typer.Typer(
    name="edgellm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an exception that gets this far is a bug of ours: show it as Python does
)


class Backend(str, Enum):
    """Where the benchmark runs; `auto` takes the GPU where there is one."""

    auto = "auto"
    cuda = "cuda"
    numpy = "numpy"


def main() -> None:
    """Entry point of the command."""
    app()


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and an exit code, never a traceback."""
    try:
        yield
    except GpuUnavailableError as e:
        _fail(str(e), EXIT_NO_GPU)
    except EdgeLLMError as e:
        _fail(str(e), EXIT_USAGE)
    except KeyboardInterrupt:
        _fail("interrupted", suite.EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    _say(f"error: {message.splitlines()[0]}")
    raise typer.Exit(code)


def _print(text: str, stream: TextIO | None = None) -> None:
    """Write to stdout, or to `stream`. A reader that has gone away (`edgellm bench | head`) is no error of ours."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # The interpreter flushes its streams once more at exit; give this one somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text: str) -> None:
    """Write progress to stderr."""
    _print(text, sys.stderr)


# ---- the commands ---------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        _print(f"edgellm-cupy {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Ternary (BitNet 1.58-bit) LLM inference on NVIDIA GPUs: benchmark, checks and conversions."""


@app.command()
@_exit_codes()
def info(as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False) -> None:
    """Show GPU, driver, CUDA, clocks, power and host; where there is no usable GPU, what exactly is missing."""
    try:
        runtime.require_gpu()
        no_gpu = None
    except GpuUnavailableError as e:
        no_gpu = str(e)
    figures = hardware.describe(no_gpu)
    if as_json:
        _print(json.dumps({"no_gpu": no_gpu, **figures}, indent=1))
        return
    known = {key: figure for key, figure in figures.items() if figure["value"] is not None}
    _print(no_gpu or f"usable GPU: {known['gpu_model']['value']}")
    width = max(map(len, known))
    for key, figure in known.items():
        _print(f"{key:{width}}  {report.with_unit(figure)}")


def _known_part(name: str | None) -> str | None:
    if name is not None and name not in suite.PARTS:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(suite.PARTS)}")
    return name


@app.command()
@_exit_codes()
def bench(
    part: Annotated[
        str | None,
        typer.Argument(callback=_known_part, help=f"One part only: {', '.join(suite.PARTS)}.", show_default="all"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A preset, or a JSON file with a configuration.", show_default=DEFAULT_MODEL)
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="GGUF or compact safetensors, with its configuration.", show_default="random")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="auto: the GPU where there is one.")] = Backend.auto,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.json and report.md.", show_default=f"{DEFAULT_OUT}, {DEFAULT_OUT}/PART"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short windows, few samples: a first look.")] = False,
) -> None:
    """Measure a model on this machine and write the report."""
    folder = out or (DEFAULT_OUT / part if part else DEFAULT_OUT)
    names = [part] if part else list(suite.PARTS)
    no_gpu = _why_no_gpu(backend)
    with _progress(names) as (begin, step):
        step("reading or making the weights")
        ctx = Context(_checkpoint(model, weights), no_gpu, quick, step)
        report.make_folder(folder)  # now, not after minutes of work
        result = suite.run(ctx, names, shlex.join(["edgellm", *sys.argv[1:]]), begin)
    written = report.write(result, folder)
    _print(_rendered(report.terminal(result)))
    _print("\n".join(f"written: {path}" for path in written))
    raise typer.Exit(suite.exit_code(result))


@app.command("verify")
@_exit_codes()
def verify_command() -> None:
    """Check every kernel against the NumPy reference on this machine's GPU."""
    runtime.require_gpu()
    with _status() as step:
        failures = verify.run(step)
    for failure in failures:
        _print(f"wrong: {failure}")
    if failures:
        raise typer.Exit(suite.EXIT_WRONG_RESULT)
    _print(f"every kernel agrees with the reference on {runtime.device_name()}")


@app.command()
@_exit_codes()
def convert(
    source: Annotated[Path, typer.Argument(help="GGUF or compact safetensors.")],
    target: Annotated[Path, typer.Argument(help="The compact safetensors file to write.")],
) -> None:
    """Quantise a checkpoint to ternary and write it in the compact format."""
    checkpoint = formats.load_checkpoint(source)
    compact.write(checkpoint, target)
    _print(f"{target}: {checkpoint.config.name}, {target.stat().st_size / 1e6:.1f} MB")


@app.command("report")
@_exit_codes()
def report_command(
    run: Annotated[Path, typer.Argument(metavar="RUN.json", help="A report.json.")],
    out: Annotated[Path | None, typer.Option(help="Folder for report.md.", show_default="that of RUN.json")] = None,
) -> None:
    """Make the Markdown again from the JSON of a run."""
    _print(f"written: {report.remake(run, out or run.parent)}")


# ---- their parts ----------------------------------------------------------------------------------------------------


def _why_no_gpu(backend: Backend) -> str | None:
    """None: the GPU is used; else why it is not, in one line.

    Raises:
        GpuUnavailableError: `backend` demands a GPU and none is usable.
    """
    if backend is Backend.numpy:
        return "the NumPy backend was asked for"
    try:
        runtime.require_gpu()
    except GpuUnavailableError as e:
        if backend is Backend.cuda:
            raise
        return f"no usable GPU: {e.layer}: {e.reason}"
    return None


def _checkpoint(model: str | None, weights: Path | None) -> Checkpoint:
    if weights:
        if model:
            raise ArgumentValueError("--model and --weights exclude each other: the file brings its configuration")
        return formats.load_checkpoint(weights)
    name = model or DEFAULT_MODEL
    from_file = name.endswith(".json")
    return Checkpoint.random(ModelConfig.from_json(name) if from_file else ModelConfig.preset(name))


def _on_terminal() -> bool:
    """May progress be drawn over itself?"""
    return sys.stderr.isatty() and not _NO_COLOR


@contextmanager
def _status() -> Iterator[Callable[[str], None]]:
    """A function that shows the current step on a terminal, and nothing elsewhere."""
    if not _on_terminal():
        yield lambda step: None
        return
    with Console(stderr=True).status("") as status:
        yield status.update


@contextmanager
def _progress(names: list[str]) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two functions: one to call with a part's name as it begins, one with each step inside it.

    A bar on a terminal, one line a part elsewhere and under NO_COLOR, both on stderr.
    """
    if not _on_terminal():
        yield (lambda name: _say(f"edgellm bench: {name}")), (lambda step: None)
        return
    done = 0
    bar = Progress(
        TextColumn("{task.description:<34.34}"),
        BarColumn(None),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        refresh_per_second=2,  # drawing takes CPU time from what is measured
        transient=True,
    )
    task = bar.add_task("", total=sum(suite.PARTS[name].share for name in names))

    def begin(name: str) -> None:
        nonlocal done
        bar.update(task, completed=done, description=name)
        done += suite.PARTS[name].share

    with bar:
        yield begin, lambda step: bar.update(task, description=step)


def _rendered(content: Any) -> str:
    """Rich content as text for stdout: at most 80 columns, coloured only on a terminal that wants it."""
    console = Console(color_system=None if _NO_COLOR else "auto")
    console.width = min(console.width, 80)
    with console.capture() as captured:
        console.print(content)
    return captured.get().rstrip("\n")
