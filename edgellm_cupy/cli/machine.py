"""The machine: `edgellm info`, `doctor`, `verify` and `tune`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import runtime
from ..errors import ArgumentValueError, GpuUnavailableError
from ..exit_codes import EXIT_UNSTABLE, EXIT_WRONG_RESULT
from .options import Activation, Dtype, JsonOption, ModelOption, Shapes, config_of, numbers
from .output import exit_codes, rendered, say, show, status


@exit_codes()
def info(as_json: JsonOption = False) -> None:
    """Show GPU, driver, CUDA, clocks, power and host; where there is no usable GPU, what exactly is missing."""
    from ..bench.parts import hardware
    from ..bench.reporting import layout

    try:
        runtime.require_gpu()
        no_gpu = None
    except GpuUnavailableError as e:
        no_gpu = str(e)
    figures = hardware.describe(no_gpu)
    if as_json:
        show(json.dumps({"no_gpu": no_gpu, **figures}, indent=1))
        return
    known = {key: figure for key, figure in figures.items() if figure["value"] is not None}
    show(no_gpu or f"usable GPU: {known['gpu_model']['value']}")
    width = max(map(len, known))
    for key, figure in known.items():
        show(f"{key:{width}}  {layout.with_unit(figure)}")


@exit_codes()
def doctor(
    as_json: JsonOption = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 5 when there is a warning.")] = False,
) -> None:
    """Look for what makes results unsteady, and say how the owner could change it. Changes nothing."""
    from ..bench.machine import doctor as examination

    try:
        runtime.require_gpu()
        no_gpu = None
    except GpuUnavailableError as e:
        no_gpu = str(e)
    findings = examination.examine(no_gpu)
    show(json.dumps(examination.as_json(findings), indent=1) if as_json else rendered(examination.terminal(findings)))
    if strict and any(finding.warns for finding in findings):
        raise typer.Exit(EXIT_UNSTABLE)


@exit_codes()
def verify() -> None:
    """Check every kernel against the NumPy reference on this machine's GPU."""
    runtime.require_gpu()
    from .. import verify as kernels
    from ..tuning import specialisations
    from ..tuning.device import current_facts

    with status() as step:
        failures = kernels.run(step)
    for failure in failures:
        show(f"wrong: {failure}")
    cases = sum(1 for _ in kernels.cases(current_facts()))
    what = f"{cases} cases and {len(list(specialisations()))} kernel specialisations on {runtime.device_name()}"
    if failures:
        show(f"{len(failures)} failures in {what}")
        raise typer.Exit(EXIT_WRONG_RESULT)
    show(f"{what}: every result agrees with the reference")


@exit_codes()
def tune(
    model: ModelOption = None,
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
    token_counts, config = numbers(tokens), config_of(model)
    runtime.require_gpu()
    from ..bench import tune as tuner

    products = tuner.of_table(dtype.value) if shapes else tuner.of_model(config)
    activations = ("int8", "float") if activation is Activation.both else (activation.value,)
    with status(elsewhere=say) as step:
        outcome = tuner.run(products, token_counts, activations, dtype.value, step)
    show(tuner.text(outcome))
    for failure in outcome.failures:
        show(f"wrong: {failure}")
    show(f"written: {outcome.path}")
    if outcome.failures:
        raise typer.Exit(EXIT_WRONG_RESULT)
