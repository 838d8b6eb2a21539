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
MOST_TOKENS = 65_535

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


class Shapes(str, Enum):
    """Which products the latency part measures in place of the model's."""

    table = "table"


class Activation(str, Enum):
    """Which activations to tune for."""

    int8 = "int8"
    float = "float"
    both = "both"


class Dtype(str, Enum):
    """Dtype of x and y."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


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
    shapes: Annotated[
        Shapes | None, typer.Option(help="latency: the products of public models.", show_default="the model's")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="--shapes: numbers of tokens at once.", show_default="1,2,4,...,2048")
    ] = None,
) -> None:
    """Measure a model on this machine and write the report."""
    from .bench import report, suite, table_figures
    from .bench.context import Context

    table_tokens = _table_tokens(part, shapes, tokens, model or weights)
    folder = out or (DEFAULT_OUT / part.value if part else DEFAULT_OUT)
    names = [part.value] if part else list(suite.PARTS)
    no_gpu, remedy = _why_no_gpu(backend)
    if remedy:
        _say(f"edgellm bench: {no_gpu}; {remedy}. Measuring on the NumPy backend.")
    report.make_folder(folder)  # now, not after minutes of work
    with _progress(names) as (begin, step):
        step("reading or making the weights")
        ctx = Context(_checkpoint(model, weights), no_gpu, quick, step, table_tokens)
        result = suite.run(ctx, names, shlex.join(["edgellm", *sys.argv[1:]]), begin)
    if remedy:
        result["no_gpu"] = f"{no_gpu}; {remedy}"  # once, at the top; a null figure has the reason alone
    try:
        written = report.write(result, folder)
    finally:  # a disk that is full by now must not cost the run
        _print(_rendered(report.terminal(result)))
        if not no_gpu and (table := report.shapes_table(result)):
            _print(f"\n{table_figures.text(table)}\n")
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


@app.command("tune")
@_exit_codes()
def tune_command(
    model: Annotated[
        str | None, typer.Option(help="A preset, or a JSON file with a configuration.", show_default=DEFAULT_MODEL)
    ] = None,
    shapes: Annotated[
        Shapes | None, typer.Option(help="The products of public models.", show_default="the model's")
    ] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens at once; each is tuned for itself.")] = "1,2,4,8",
    activation: Annotated[Activation, typer.Option(help="How activations enter the product.")] = Activation.both,
    dtype: Annotated[Dtype, typer.Option(help="Of the activations.")] = Dtype.float16,
) -> None:
    """Time every kernel configuration on this GPU and keep those that beat the default, for later runs to use."""
    if model and shapes:
        raise ArgumentValueError("--model and --shapes exclude each other")
    numbers, config = _numbers(tokens), _config(model)
    runtime.require_gpu()
    from .bench import tune

    products = tune.of_table(dtype.value) if shapes else tune.of_model(config)
    activations = ("int8", "float") if activation is Activation.both else (activation.value,)
    with _status(elsewhere=_say) as step:
        outcome = tune.run(products, numbers, activations, dtype.value, step)
    _print(tune.text(outcome))
    for failure in outcome.failures:
        _print(f"wrong: {failure}")
    _print(f"written: {outcome.path}")
    if outcome.failures:
        raise typer.Exit(EXIT_WRONG_RESULT)


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


def _table_tokens(part: Part | None, shapes: Shapes | None, tokens: str | None, model: object) -> tuple[int, ...]:
    """Numbers of tokens of the table of shapes, rising; empty when the workload's own products are asked for."""
    from .bench.shapes import TOKENS

    if shapes is None:
        if tokens is not None:
            raise ArgumentValueError("--tokens: only together with --shapes")
        return ()
    if part is not Part.latency or model:
        raise ArgumentValueError("--shapes: only for `edgellm bench latency`, without --model and --weights")
    return _numbers(tokens) if tokens is not None else TOKENS


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers of tokens in "1,2,4", each once, rising."""
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1 or numbers[-1] > MOST_TOKENS:
        raise ArgumentValueError(f"--tokens is {text!r}, expected numbers of 1 to {MOST_TOKENS} such as 1,4,16")
    return tuple(numbers)


def _checkpoint(model: str | None, weights: Path | None) -> Checkpoint:
    if weights:
        if model:
            raise ArgumentValueError("--model and --weights exclude each other: the file brings its configuration")
        return formats.load_checkpoint(weights)
    return Checkpoint.random(_config(model))


def _config(model: str | None) -> ModelConfig:
    """Of a preset or of a JSON file."""
    name = model or DEFAULT_MODEL
    return ModelConfig.from_json(name) if name.endswith(".json") else ModelConfig.preset(name)


def _on_terminal() -> bool:
    """May progress be drawn over itself?"""
    return sys.stderr.isatty() and not _NO_COLOR


def _nothing(step: str) -> None:
    """Progress that is not shown."""


@contextmanager
def _status(elsewhere: Callable[[str], None] = _nothing) -> Iterator[Callable[[str], None]]:
    """A function that shows the current step on a terminal; `elsewhere` takes it where there is none."""
    if not _on_terminal():
        yield elsewhere
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
