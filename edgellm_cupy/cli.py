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
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from io import StringIO, TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import typer

from . import formats, runtime
from .arguments import LARGEST_LENGTH
from .errors import ArgumentValueError, CheckpointError, EdgeLLMError, GpuUnavailableError, MissingDependencyError
from .formats.checkpoint import Checkpoint, Rows
from .formats.config import PRESETS, ModelConfig
from .formats.tokenizer import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILE,
    Tokenizer,
    has_tokenizer,
    load_tokenizer,
)
from .sampling import Sampling
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
    """Where a model runs; `auto` takes the GPU where there is one."""

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


class ModelActivation(str, Enum):
    """How activations enter the products of a model."""

    int8 = "int8"
    float = "float"


class ModelDtype(str, Enum):
    """Dtype that a model computes in; `auto` leaves it to the model."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class HeadDtype(str, Enum):
    """What embedding and head are stored as; `auto`: as they come."""

    auto = "auto"
    float16 = "float16"
    bfloat16 = "bfloat16"
    int8 = "int8"
    float32 = "float32"


class CacheDtype(str, Enum):
    """What keys and values are stored as; `auto`: in the model's dtype."""

    auto = "auto"
    int8 = "int8"


class Format(str, Enum):
    """What `convert` writes."""

    compact = "compact"
    huggingface = "huggingface"


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
    except MemoryError as e:  # CuPy's is one, too
        _fail(f"out of memory: {e}", EXIT_USAGE)
    except BrokenPipeError:
        raise
    except OSError as e:  # such as of a path that is too long, or of a folder that must not be read
        _fail(": ".join(str(part) for part in (e.filename, e.strerror or e) if part is not None), EXIT_USAGE)
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
    _put(f"{text}\n")


def _put(text: str) -> bool:
    """Write a piece of the result to stdout, to be seen at once. False: the reader has gone away."""
    with _writing_to(sys.stdout):
        print(text, end="", flush=True)
        return True
    return False


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
    """Ternary (BitNet 1.58-bit) LLM inference on NVIDIA GPUs: generation, benchmark, checks, conversions."""


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
def generate(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint; or a preset, with random weights.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A file with that text, less its last newline; -: stdin.")
    ] = None,
    ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="Token ids in place of text.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="At most so many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token.")] = 0,
    top_k: Annotated[int, typer.Option(help="Only the k most probable tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that reach it together.")] = 1,
    min_p: Annotated[float, typer.Option(help="Only tokens at least this fraction as probable as the first.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said becomes less probable.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind tokens that end the text.")] = False,
    backend: Annotated[Backend, typer.Option(help="auto: the GPU where there is one.")] = Backend.auto,
    activation: Annotated[ModelActivation, typer.Option(help="int8: quantised per token.")] = ModelActivation.int8,
    dtype: Annotated[ModelDtype, typer.Option(help="What the model computes in.")] = ModelDtype.auto,
    head: Annotated[HeadDtype, typer.Option(help="What the output head is stored as.")] = HeadDtype.auto,
    kv_dtype: Annotated[CacheDtype, typer.Option(help="What keys and values are stored as.")] = CacheDtype.auto,
    context: Annotated[
        int | None, typer.Option(min=1, help="At most so many tokens, prompt and text.", show_default="no limit")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Tokens a second, on stderr; on a terminal they always come.")
    ] = False,
) -> None:
    """Continue a text: prints it as it is made. Special tokens may be spelled out in the prompt."""
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    tokenizer = _tokenizer_of(path, needed=ids is None)
    tokens = _prompt_tokens(tokenizer, prompt, prompt_file, ids)
    if context is not None:
        if len(tokens) >= context:
            raise ArgumentValueError(f"--context is {context}, but the prompt alone has {len(tokens)} tokens")
        max_new_tokens = min(max_new_tokens, context - len(tokens))
    if max_new_tokens > LARGEST_LENGTH:  # before the model is read
        raise ArgumentValueError(f"--max-new-tokens is {max_new_tokens}, expected at most {LARGEST_LENGTH}")
    no_gpu, remedy = _why_no_gpu(backend)
    if remedy:
        _say(f"edgellm generate: {no_gpu}; {remedy}. Generating on the NumPy backend, slowly.")
    model = _model_of(path, on_gpu=not no_gpu, activation=activation, dtype=dtype, head=head)
    if (length := len(tokens) + max_new_tokens) > model.config.max_context:
        _say(f"warning: up to {length} tokens, but the model was made for {model.config.max_context}")

    stop_tokens = tokenizer.stop_tokens if tokenizer and not ignore_eos else ()
    made = model.generate(
        tokens, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, **_chosen(kv_dtype=kv_dtype)
    )
    pace = _Pace(len(tokens))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows question marks
    try:
        for piece in tokenizer.stream(pace.of(made)) if tokenizer else _as_numbers(pace.of(made)):
            if not _put(piece):
                return
    finally:
        _put("\n")
    if stats or sys.stderr.isatty():
        _say(str(pace))


@app.command()
@_exit_codes()
def bench(
    part: Annotated[Part | None, typer.Argument(help="One part only.", show_default="all")] = None,
    model: Annotated[
        str | None, typer.Option(help="A preset, or a JSON file with a configuration.", show_default=DEFAULT_MODEL)
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A checkpoint, a file or a folder.", show_default="random")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="auto: the GPU where there is one.")] = Backend.auto,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.json and report.md.", show_default=f"{DEFAULT_OUT}, {DEFAULT_OUT}/PART"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Short windows, few samples: a first look.")] = False,
    activation: Annotated[ModelActivation, typer.Option(help="int8: quantised per token.")] = ModelActivation.int8,
    dtype: Annotated[ModelDtype, typer.Option(help="What the model computes in.")] = ModelDtype.auto,
    head: Annotated[HeadDtype, typer.Option(help="What the output head is stored as.")] = HeadDtype.auto,
    kv_dtype: Annotated[CacheDtype, typer.Option(help="What keys and values are stored as.")] = CacheDtype.auto,
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

    of_a_model = (model, weights, activation is ModelActivation.float, _chosen(dtype=dtype, head=head, kv=kv_dtype))
    table_tokens = _table_tokens(part, shapes, tokens, any(of_a_model))
    folder = out or (DEFAULT_OUT / part.value if part else DEFAULT_OUT)
    names = [part.value] if part else list(suite.PARTS)
    no_gpu, remedy = _why_no_gpu(backend)
    if remedy:
        _say(f"edgellm bench: {no_gpu}; {remedy}. Measuring on the NumPy backend.")
    report.make_folder(folder)  # now, not after minutes of work
    with _progress(names) as (begin, step):
        step("reading or making the weights")
        decoder = (activation.value, dtype.value, head.value, kv_dtype.value)
        ctx = Context(_checkpoint(model, weights), no_gpu, quick, step, table_tokens, *decoder)
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
    source: Annotated[Path, typer.Argument(help="A checkpoint, a file or a folder.")],
    target: Annotated[Path, typer.Argument(help="The safetensors file, or the folder for --to huggingface.")],
    to: Annotated[Format, typer.Option(help="compact: our own file, 2 bits a weight.")] = Format.compact,
    head: Annotated[
        HeadDtype,
        typer.Option(help="What embedding and head are stored as. Those of a quantised GGUF file come as int8."),
    ] = HeadDtype.auto,
) -> None:
    """Write a checkpoint, quantised to ternary where it is not, in another format, with its tokenizer beside it."""
    if to is Format.huggingface and head is HeadDtype.int8:
        raise ArgumentValueError("--to huggingface has no int8 rows: --head may be float16, bfloat16 or float32")
    _check_target(source, target, to)
    checkpoint = _with_head(formats.load_checkpoint(source), head, source)
    tokenizer = _tokenizer_if_any(source)
    files = tokenizer.files() if tokenizer else {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be written: {e.strerror}: {e.filename}") from e
    if to is Format.compact:
        from .formats import compact

        _check_replaceable(source, target.parent, files)  # before the work, and before anything is written
        compact.write(checkpoint, target)
        _write_files(target.parent, files)
        written = [target, *(target.parent / name for name in files)]
    else:
        from .formats import huggingface

        huggingface.write(_noting_int8(checkpoint), target, files)
        written = sorted(target.iterdir())
    for path in written:
        size = path.stat().st_size
        _print(f"written: {path}, {f'{size / 1e6:.1f} MB' if size >= 1e5 else f'{size} bytes'}")
    if not tokenizer and not has_tokenizer(source):
        _say(f"warning: {source} has no tokenizer: `edgellm generate` will need --ids")


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


def _is_preset(path: str) -> bool:
    return path in PRESETS and not Path(path).exists()


def _tokenizer_of(path: str, needed: bool) -> Tokenizer | None:
    """Of a checkpoint; None when there is none and it is not needed."""
    if _is_preset(path):
        if needed:
            raise ArgumentValueError(f"{path} is a preset with random weights and no tokenizer: give --ids")
        return None
    return load_tokenizer(path) if needed else _tokenizer_if_any(path)


def _tokenizer_if_any(path: str | Path) -> Tokenizer | None:
    """None where there is none, and with a warning where there is one that cannot be used."""
    if not has_tokenizer(path):
        return None
    try:
        return load_tokenizer(path)
    except (CheckpointError, MissingDependencyError) as e:
        _say(f"warning: going on without the tokenizer: {str(e).splitlines()[0]}")
        return None


def _model_of(path: str, on_gpu: bool, **options: Enum) -> Any:
    """Of a checkpoint or a preset; `options` go to its constructor."""
    from .model import decoder as device
    from .reference import decoder as host

    with _status() as step:
        step("reading or making the weights")
        checkpoint = Checkpoint.random(PRESETS[path]) if _is_preset(path) else formats.load_checkpoint(path)
        step("preparing the model")
        kind: Any = (device if on_gpu else host).TernaryTransformer
        return kind(checkpoint, **_chosen(**options))


def _prompt_tokens(
    tokenizer: Tokenizer | None, prompt: str | None, prompt_file: str | None, ids: str | None
) -> list[int]:
    """The one prompt that was given, as token ids."""
    if sum(given is not None for given in (prompt, prompt_file, ids)) != 1:
        raise ArgumentValueError("give one of --prompt, --prompt-file and --ids")
    if ids is not None:
        try:
            return [int(token) for token in ids.split(",")]
        except ValueError:
            raise ArgumentValueError(f"--ids is {ids!r}, expected token ids such as 1,2,3") from None
    assert tokenizer
    tokens = tokenizer.encode(_text_of(prompt_file) if prompt_file is not None else str(prompt))
    if not tokens:
        raise ArgumentValueError("the prompt is empty, and this tokenizer puts no token in front of it")
    return tokens


def _text_of(file: str) -> str:
    """UTF-8 text of a file, or of stdin for "-", without the newline that an editor or `echo` ends it with."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except OSError as e:
        raise ArgumentValueError(f"--prompt-file: {file}: not a readable file: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ArgumentValueError(f"--prompt-file: {file}: byte {e.start} is not UTF-8") from e


def _chosen(**options: Enum) -> dict[str, str]:
    """The options that are not left to the model."""
    return {name: option.value for name, option in options.items() if option.value != "auto"}


def _as_numbers(tokens: Iterable[int]) -> Iterator[str]:
    """Token ids with spaces between them."""
    for i, token in enumerate(tokens):
        yield f" {token}" if i else str(token)


@dataclass
class _Pace:
    """How fast tokens came. The first one ends the prefill, whose time includes the compilation of kernels."""

    prompt: int
    made: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def of(self, tokens: Iterable[int]) -> Iterator[int]:
        """`tokens`, timed as they pass."""
        start = time.perf_counter()
        for token in tokens:
            passed = time.perf_counter() - start
            if not self.made:
                self.prefill_s = passed
            self.made, self.decode_s = self.made + 1, passed - self.prefill_s
            yield token
        if not self.made:
            self.prefill_s = time.perf_counter() - start

    def __str__(self) -> str:
        def rate(tokens: int, seconds: float) -> str:
            return f"{tokens} tokens in {seconds:.3f} s" + (f", {tokens / seconds:,.1f} tok/s" if seconds else "")

        decoded = max(self.made - 1, 0)
        return f"prefill: {rate(self.prompt, self.prefill_s)}; decode: {rate(decoded, self.decode_s)}"


def _with_head(checkpoint: Checkpoint, head: HeadDtype, source: Path) -> Checkpoint:
    """The checkpoint with embedding and head stored as `head`."""
    if head is HeadDtype.auto:
        return checkpoint

    def stored(name: str, read: Callable[[], Rows]) -> Rows:
        try:
            return read().astype(head.value)
        except ArgumentValueError as e:
            raise CheckpointError(f"{source}: {name}: {e}") from e

    return replace(
        checkpoint,
        read_embedding=lambda: stored("embedding", checkpoint.read_embedding),
        read_head=lambda: stored("head", checkpoint.read_head),
    )


def _noting_int8(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with a warning for a format without int8 rows when its embedding or its head is int8."""
    warned = False

    def noting(read: Callable[[], Rows]) -> Rows:
        nonlocal warned
        rows = read()
        if rows.dtype == "int8" and not warned:
            warned = True
            _say("warning: embedding and head are int8, which this format does not have; written as float32")
        return rows

    return replace(
        checkpoint,
        read_embedding=lambda: noting(checkpoint.read_embedding),
        read_head=lambda: noting(checkpoint.read_head),
    )


def _check_target(source: Path, target: Path, to: Format) -> None:
    """What can be known to go wrong before a large file is read."""
    if target.exists() and source.exists() and target.samefile(source):
        raise ArgumentValueError(f"{target}: this is the checkpoint that is to be converted")
    if to is Format.compact and target.is_dir():
        raise ArgumentValueError(f"{target}: a folder; name the file, such as {target / 'model.safetensors'}")
    if to is Format.huggingface and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ArgumentValueError(f"{target}: expected a folder that is new or empty")
    folder = source if source.is_dir() else source.parent
    if target.is_file() and folder.is_dir() and any(p.exists() and p.samefile(target) for p in folder.iterdir()):
        raise ArgumentValueError(f"{target}: lies in the folder of the checkpoint that is to be converted")


def _check_replaceable(source: Path, folder: Path, files: dict[str, bytes]) -> None:
    """Another model's tokenizer is neither overwritten nor adopted; the source's own may stand there."""
    beside = source if source.is_dir() else source.parent
    for name in {*files, TOKENIZER_FILE, CONFIG_FILE, GENERATION_FILE}:
        path = folder / name
        if not path.exists():
            continue
        if name in files:
            wanted: bytes | None = files[name]
        else:
            wanted = (beside / name).read_bytes() if (beside / name).is_file() else None
        if not (path.is_file() and path.read_bytes() == wanted):
            raise ArgumentValueError(f"{path}: belongs to another model; choose a folder of its own")


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    try:
        for name, data in files.items():
            (folder / name).write_bytes(data)
    except OSError as e:
        raise CheckpointError(f"{e.filename}: cannot be written: {e.strerror}") from e


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


def _table_tokens(part: Part | None, shapes: Shapes | None, tokens: str | None, of_a_model: bool) -> tuple[int, ...]:
    """Numbers of tokens of the table of shapes, rising; empty when the workload's own products are asked for."""
    from .bench.shapes import TOKENS

    if shapes is None:
        if tokens is not None:
            raise ArgumentValueError("--tokens: only together with --shapes")
        return ()
    if part is not Part.latency or of_a_model:
        raise ArgumentValueError(
            "--shapes: only for `edgellm bench latency`, without --model, --weights and the options of a model"
        )
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
