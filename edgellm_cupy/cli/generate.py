"""`edgellm generate`: a model continues a text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import formats
from ..arguments import LARGEST_LENGTH
from ..errors import ArgumentValueError
from ..formats.checkpoint import Checkpoint
from ..formats.config import PRESETS
from ..formats.tokenizer import Tokenizer, load_tokenizer
from ..sampling import Sampling
from .convert import tokenizer_if_any
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
    chosen,
    why_no_gpu,
)
from .output import exit_codes, put, say, status


@exit_codes()
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
    backend: BackendOption = Backend.auto,
    activation: ActivationOption = ModelActivation.int8,
    dtype: DtypeOption = ModelDtype.auto,
    head: HeadOption = HeadDtype.auto,
    kv_dtype: CacheOption = CacheDtype.auto,
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
    no_gpu, remedy = why_no_gpu(backend)
    if remedy:
        say(f"edgellm generate: {no_gpu}; {remedy}. Generating on the NumPy backend, slowly.")
    model = _model_of(path, on_gpu=not no_gpu, activation=activation, dtype=dtype, head=head)
    if (length := len(tokens) + max_new_tokens) > model.config.max_context:
        say(f"warning: up to {length} tokens, but the model was made for {model.config.max_context}")

    stop_tokens = tokenizer.stop_tokens if tokenizer and not ignore_eos else ()
    made = model.generate(
        tokens, max_new_tokens, sampling=sampling, stop_tokens=stop_tokens, **chosen(kv_dtype=kv_dtype)
    )
    pace = _Pace(len(tokens))
    try:
        for piece in tokenizer.stream(pace.of(made)) if tokenizer else _as_numbers(pace.of(made)):
            if not put(piece):
                return
    finally:
        put("\n")
    if stats or sys.stderr.isatty():
        say(str(pace))


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


def _is_preset(path: str) -> bool:
    return path in PRESETS and not Path(path).exists()


def _tokenizer_of(path: str, needed: bool) -> Tokenizer | None:
    """Of a checkpoint; None when there is none and it is not needed."""
    if _is_preset(path):
        if needed:
            raise ArgumentValueError(f"{path} is a preset with random weights and no tokenizer: give --ids")
        return None
    return load_tokenizer(path) if needed else tokenizer_if_any(path)


def _model_of(path: str, on_gpu: bool, **options: Enum) -> Any:
    """Of a checkpoint or a preset; `options` go to its constructor."""
    from ..model import decoder as device
    from ..reference import decoder as host

    with status() as step:
        step("reading or making the weights")
        checkpoint = Checkpoint.random(PRESETS[path]) if _is_preset(path) else formats.load_checkpoint(path)
        step("preparing the model")
        kind: Any = (device if on_gpu else host).TernaryTransformer
        return kind(checkpoint, **chosen(**options))


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
