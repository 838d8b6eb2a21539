"""`edgellm bench`: the whole report, or one part of it; :mod:`.server` is the command for a live server.

Options stand behind the part's name or in front of it; what a part does not know is refused in either place.
"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperGroup

from .. import formats, runtime
from ..errors import ArgumentValueError
from ..formats.checkpoint import Checkpoint
from .options import (
    ActivationOption,
    Backend,
    BackendOption,
    CacheDtype,
    CacheOption,
    DtypeOption,
    HeadDtype,
    HeadOption,
    ModelActivation,
    ModelDtype,
    ModelOption,
    Shapes,
    chosen,
    config_of,
    numbers,
    why_no_gpu,
)
from .output import exit_codes, files, interruptible, rendered, say, show
from .progress import Remaining, expected, progress

if TYPE_CHECKING:
    from ..bench.reporting.layout import Report

PARTS = {
    "hardware": "GPU, driver, host.",
    "reproducibility": "Versions, commit, options, how the clocks behave.",
    "latency": "Every product of the model, beside its floor and baselines.",
    "transfer": "Bytes and time between host and device.",
    "tokens": "Time to first token, gaps, prompts, batches, sampling.",
    "scaling": "Tokens a second at depths up to 16k.",
    "power": "Power and energy, per token and per product.",
    "utilisation": "Idle share of the GPU, memory.",
    "cpu": "CPU time, threads, context switches of a token.",
    "kernels": "Launches and synchronisations of a token, traced.",
}
"""The parts of `bench.suite`, in its order."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of a run, each one an option of the command line."""

    model: ModelOption = None
    weights: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A checkpoint, a file or a folder.", show_default="random")
    ] = None
    backend: BackendOption = Backend.auto
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report.", show_default="a new one in .edgellm/runs"),
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Short windows, few samples: a first look.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out, or the newest one kept.")
    ] = False
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 5 when the machine was not steady, or could not be read.")
    ] = False
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Of the order in which rows are measured.", show_default="0, or of --resume's run"
        ),
    ] = None
    activation: ActivationOption = ModelActivation.int8
    dtype: DtypeOption = ModelDtype.auto
    head: HeadOption = HeadDtype.auto
    kv_dtype: CacheOption = CacheDtype.auto


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(Options):
    """Of the latency part, which can also measure a table of shapes."""

    shapes: Annotated[
        Shapes | None, typer.Option(help="The products of public models.", show_default="the model's")
    ] = None
    tokens: Annotated[
        str | None,
        typer.Option(metavar="1,4", help="--shapes: numbers of tokens at once.", show_default="1,2,4,...,2048"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _BeforePart(LatencyOptions):
    """Those in front of a part's name; a whole run has those of :class:`Options` alone."""

    shapes: Annotated[Shapes | None, typer.Option(hidden=True)] = None
    tokens: Annotated[str | None, typer.Option(hidden=True)] = None


class Parts(TyperGroup):
    """A group that names its commands when it is given another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            ctx.fail(f"no part {args[0]!r}, expected one of {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


def taking(kind: type[Any], run: Callable[..., None], *before: inspect.Parameter) -> Callable[..., None]:
    """`run` as Typer wants it: with a parameter for each field of `kind`, behind the parameters `before`."""

    def command(**given: Any) -> None:
        with exit_codes():
            run(*(given.pop(parameter.name) for parameter in before), kind(**given))

    hints = get_type_hints(kind, include_extras=True)
    options = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]
    command.__signature__ = inspect.Signature([*before, *options])  # type: ignore[attr-defined]
    return command


# ---- a run ----------------------------------------------------------------------------------------------------------


def _whole_or_part(ctx: typer.Context, options: _BeforePart) -> None:
    """The whole report; or what stood in front of a part's name, handed on to the part."""
    part = ctx.invoked_subcommand
    # By name: Click's enumeration is another class in those versions of Typer that bring their own Click.
    given = [f.name for f in fields(options) if getattr(ctx.get_parameter_source(f.name), "name", "") == "COMMANDLINE"]
    if part is None:
        for name in given:
            if name in ("shapes", "tokens"):
                raise ArgumentValueError(f"--{name}: only for `edgellm bench latency`")
        _measure(list(PARTS), options)
    known = {parameter.name for parameter in ctx.command.commands[part].params}  # type: ignore[attr-defined]
    for name in given:
        if name not in known:
            raise ArgumentValueError(f"--{name.replace('_', '-')}: not an option of `edgellm bench {part}`")
    ctx.default_map = {part: {name: _plain(getattr(options, name)) for name in given}}


def _plain(value: Any) -> Any:
    """A choice as it is written."""
    return value.value if isinstance(value, Enum) else value


def _measure(names: list[str], options: Options) -> NoReturn:
    """Run these parts, write the report and show its summary."""
    from ..bench import suite
    from ..bench.context import Context
    from ..bench.journal import Journal
    from ..bench.reporting import report

    table_tokens = _table_tokens(options)
    no_gpu, remedy = why_no_gpu(options.backend)
    if remedy:
        say(f"edgellm bench: {no_gpu}; {remedy}. Measuring on the NumPy backend.")
    if options.out:
        report.make_folder(options.out)  # now, not after minutes of work
    remaining = Remaining(expected(names, "numpy" if no_gpu else "cuda", options.quick), learn=not options.resume)
    with ExitStack() as stack:
        signalled = stack.enter_context(interruptible())
        with progress(remaining) as (begin, step):
            step("reading or making the weights")
            ctx = Context(
                _checkpoint(options),
                no_gpu,
                options.quick,
                step,
                table_tokens,
                options.activation.value,
                options.dtype.value,
                options.head.value,
                options.kv_dtype.value,
                seed=options.seed or 0,
            )
            gpu = f"numpy {_cpu()}" if no_gpu else runtime.device_name()
            folder = stack.enter_context(folder_of(options.out, options.resume, gpu))
            if options.resume and options.seed is None:
                ctx.seed = suite.seed_of(folder)
            journal = Journal.open(folder, suite.identity(ctx, names, options.weights), options.resume)
            ctx.journal = stack.enter_context(closing(journal))
            result = suite.run(ctx, names, command_line(), begin)
        if remedy:
            result["no_gpu"] = f"{no_gpu}; {remedy}"  # once, at the top; a null figure has the reason alone
        finish(result, folder)
    raise typer.Exit(signalled() or suite.exit_code(result, strict=options.strict))


def folder_of(out: Path | None, resume: bool, gpu: str) -> AbstractContextManager[Path]:
    """Where a run on `gpu` is kept: `out`, a new folder, or to `resume` that of the newest interrupted run."""
    from ..bench import journal
    from ..bench.parts import reproducibility
    from ..bench.reporting import runs

    if out:
        run = runs.read(out)
        if not resume and run.state == "interrupted" and run.rows:
            raise ArgumentValueError(
                f"--out: {out} has the {run.rows} finished rows of an interrupted run: go on with it by --resume, "
                f"or give another folder, or remove {journal.FILE} there"
            )
        if not resume and (out / runs.REPORT).is_file():
            say(f"edgellm bench: {out}: its report is replaced ({run.model or 'unreadable'}, {run.time or 'no time'})")
        return runs.held(out)
    if resume:
        return runs.held(runs.unfinished(runs.ROOT, gpu))
    return runs.kept(runs.ROOT, gpu, reproducibility.source()["git_commit"]["value"])


def finish(result: Report, folder: Path) -> None:
    """Write the report and show its summary; after Ctrl-C say how to go on."""
    from ..bench import journal
    from ..bench.reporting import layout, report, table_figures, terminal

    written: list[Path] = []
    try:
        written = report.write(result, folder)
    finally:  # a disk that is full by now must not cost the run
        show(rendered(terminal.summary(result)))
        if result["backend"] == "cuda" and (table := layout.shapes_table(result)):
            show(f"\n{table_figures.text(table, result['parts']['latency'].get('bandwidth'))}\n")
    show(files(folder, [*written, folder / journal.FILE]))
    if result["interrupted"]:
        again = [argument for argument in sys.argv[1:] if argument != "--resume"]
        if not any(argument.split("=")[0] == "--out" for argument in again):  # a newer one may be interrupted, too
            again += ["--out", str(folder)]
        say(f"finished rows are kept in {folder}; to go on: {shlex.join(['edgellm', *again, '--resume'])}")


def command_line() -> str:
    """This command, as one would type it."""
    return shlex.join(["edgellm", *sys.argv[1:]])


def _cpu() -> str:
    from ..bench.parts import hardware

    return str(hardware.host()["cpu_model"]["value"] or "")


def _table_tokens(options: Options) -> tuple[int, ...]:
    """Numbers of tokens of the table of shapes, rising; empty when the workload's own products are asked for."""
    from ..bench.parts.shapes import TOKENS

    if not isinstance(options, LatencyOptions):
        return ()
    if options.shapes is None:
        if options.tokens is not None:
            raise ArgumentValueError("--tokens: only together with --shapes")
        return ()
    decoder = chosen(dtype=options.dtype, head=options.head, kv_dtype=options.kv_dtype)
    if options.model or options.weights or decoder or options.activation is ModelActivation.float:
        raise ArgumentValueError("--shapes: only without --model, --weights and the options of a model")
    return numbers(options.tokens) if options.tokens is not None else TOKENS


def _checkpoint(options: Options) -> Checkpoint:
    if options.weights:
        if options.model:
            raise ArgumentValueError("--model and --weights exclude each other: the file brings its configuration")
        return formats.load_checkpoint(options.weights)
    return Checkpoint.random(config_of(options.model))


# ---- the command ----------------------------------------------------------------------------------------------------


def _part(name: str) -> Callable[[Options], None]:
    return lambda options: _measure([name], options)


def _app() -> typer.Typer:
    app = typer.Typer(
        cls=Parts,
        invoke_without_command=True,
        subcommand_metavar="[PART]",
        help="Measure a model on this machine and write the report: the whole of it, or one part.",
    )
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    app.callback()(taking(_BeforePart, _whole_or_part, context))
    for name, about in PARTS.items():
        kind = LatencyOptions if name == "latency" else Options
        app.command(name, help=about, rich_help_panel="Parts")(taking(kind, _part(name)))
    return app


app = _app()
