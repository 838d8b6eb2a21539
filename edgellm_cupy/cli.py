"""The command `edgellm`. stdout carries the result, stderr progress and errors, the exit code says how it ended.

Exit codes: 0 done, 2 wrong usage or a file that cannot be read or written (stdout too), 3 no usable GPU although one
was demanded, 4 a result was wrong, 6 partial (a part of the benchmark failed), 130 interrupted.

What takes long to import is imported by the commands themselves, where Ctrl-C is already an exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from . import formats, runtime
from .errors import ArgumentValueError, EdgeLLMError, GpuUnavailableError
from .formats.checkpoint import Checkpoint
from .formats.config import ModelConfig
from .version import __version__

EXIT_USAGE, EXIT_NO_GPU, EXIT_WRONG_RESULT, EXIT_INTERRUPTED = 2, 3, 4, 130

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


class Part(str, Enum):
    """The parts of the benchmark: those of `bench.suite`, in its order."""

    hardware = "hardware"
    reproducibility = "reproducibility"
    latency = "latency"
    transfer = "transfer"
    tokens = "tokens"
    scaling = "scaling"
    power = "power"
    kernels = "kernels"
    utilisation = "utilisation"
    cpu = "cpu"


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except OSError:
        _print("")  # ends here, with its own message, if it was stdout that could not be written, as by --help
        raise


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
        _fail("interrupted", EXIT_INTERRUPTED)


def _fail(message: str, code: int) -> NoReturn:
    _say(f"error: {message.splitlines()[0]}")
    sys.exit(code)


@contextmanager
def _writing_to(stream: TextIO) -> Iterator[None]:
    """A stdout that is full or broken ends the command with one line on stderr.

    A reader that has gone away (`edgellm bench | head`) is no error of ours, and with stderr there is no one to tell.
    """
    try:
        yield
    except OSError as e:
        # The interpreter flushes its streams once more at exit; give this one somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is sys.stdout and not isinstance(e, BrokenPipeError):
            _fail(f"stdout: cannot be written: {e.strerror}", EXIT_USAGE)


def _print(text: str) -> None:
    """Write the result to stdout."""
    with _writing_to(sys.stdout):
        print(text, flush=True)


def _say(text: str) -> None:
    """Write progress to stderr."""
    with _writing_to(sys.stderr):
        print(text, file=sys.stderr, flush=True)


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
    from .bench import hardware, report

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


@app.command()
@_exit_codes()
def bench(
    part: Annotated[Part | None, typer.Argument(help="One part only.", show_default="all")] = None,
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
    from .bench import report, suite
    from .bench.context import Context

    folder = out or (DEFAULT_OUT / part.value if part else DEFAULT_OUT)
    names = [part.value] if part else list(suite.PARTS)
    no_gpu, remedy = _why_no_gpu(backend)
    if remedy:
        _say(f"edgellm bench: {no_gpu}; {remedy}. Measuring on the NumPy backend.")
    report.make_folder(folder)  # now, not after minutes of work
    with _progress(names) as (begin, step):
        step("reading or making the weights")
        ctx = Context(_checkpoint(model, weights), no_gpu, quick, step)
        result = suite.run(ctx, names, shlex.join(["edgellm", *sys.argv[1:]]), begin)
    if remedy:
        result["no_gpu"] = f"{no_gpu}; {remedy}"  # once, at the top; a null figure has the reason alone
    try:
        written = report.write(result, folder)
    finally:  # a disk that is full by now must not cost the run
        _print(_rendered(report.terminal(result)))
    _print("\n".join(f"written: {path}" for path in written))
    raise typer.Exit(suite.exit_code(result))


@app.command("verify")
@_exit_codes()
def verify_command() -> None:
    """Check every kernel against the NumPy reference on this machine's GPU."""
    runtime.require_gpu()
    from . import verify
    from .tuning import specialisations
    from .tuning.device import current_facts

    with _status() as step:
        failures = verify.run(step)
    for failure in failures:
        _print(f"wrong: {failure}")
    cases = sum(1 for _ in verify.cases(current_facts()))
    what = f"{cases} cases and {len(list(specialisations()))} kernel specialisations on {runtime.device_name()}"
    if failures:
        _print(f"{len(failures)} failures in {what}")
        raise typer.Exit(EXIT_WRONG_RESULT)
    _print(f"{what}: every result agrees with the reference")


@app.command()
@_exit_codes()
def convert(
    source: Annotated[Path, typer.Argument(help="GGUF or compact safetensors.")],
    target: Annotated[Path, typer.Argument(help="The compact safetensors file to write.")],
) -> None:
    """Quantise a checkpoint to ternary and write it in the compact format."""
    from .formats import compact

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
    from .bench import report

    _print(f"written: {report.remake(run, out or run.parent)}")


# ---- their parts ----------------------------------------------------------------------------------------------------


def _why_no_gpu(backend: Backend) -> tuple[str | None, str | None]:
    """Why the GPU is not used, in one line (None: it is), and what to do about it, where that was not the wish.

    Raises:
        GpuUnavailableError: `backend` demands a GPU and none is usable.
    """
    if backend is Backend.numpy:
        return "the NumPy backend was asked for", None
    try:
        runtime.require_gpu()
    except GpuUnavailableError as e:
        if backend is Backend.cuda:
            raise
        return f"no usable GPU: {e.layer}: {e.reason}", e.remedy
    return None, None


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
    from rich.console import Console

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
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from .bench import suite

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
    from rich.console import Console

    text = StringIO()
    console = Console(file=text, color_system=None if _NO_COLOR else "auto", force_terminal=sys.stdout.isatty() or None)
    console.width = min(console.width, 80)
    console.print(content)
    return text.getvalue().rstrip("\n")
