"""`edgellm bench server`: a live server, as its client sees it."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from .bench import command_line, finish, folder_of
from .output import interruptible, say, status


class Api(str, Enum):
    """What a server speaks."""

    openai = "openai"
    ollama = "ollama"


class Endpoint(str, Enum):
    """What a server is asked for."""

    chat = "chat"
    completion = "completion"


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Of a run, each one an option of the command line."""

    url: Annotated[str, typer.Option(metavar="URL", help="Such as http://127.0.0.1:8080.")]
    api: Annotated[Api, typer.Option(help="What it speaks.")]
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its name there.", show_default="the first that is listed")
    ] = None
    endpoint: Annotated[Endpoint, typer.Option(help="completion: no chat template.")] = Endpoint.chat
    requests: Annotated[
        int | None, typer.Option(metavar="N", help="Requests that are measured.", show_default="20")
    ] = None
    warm_up: Annotated[int | None, typer.Option(metavar="N", help="Requests before them.", show_default="2")] = None
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens of output.", show_default="128")] = None
    prompt_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a prompt, roughly.", show_default="128")
    ] = None
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", help="Requests under way at a time.", show_default="1")
    ] = None
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="A request may take so long.")] = 300
    quick: Annotated[bool, typer.Option("--quick", help="Three short requests: a first look.")] = False
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report.", show_default="a new one in .edgellm/runs"),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in --out, or the newest one kept.")
    ] = False


_OF_PLAN = ("requests", "warm_up", "max_tokens", "prompt_tokens", "concurrency")


def measure_server(options: ServerOptions) -> NoReturn:
    """Ask the server, write the report and show its summary."""
    from ..bench import suite
    from ..bench.journal import Journal
    from ..bench.reporting import report
    from ..bench.serving import server
    from ..bench.serving.exchange import Server

    key = os.environ.get(server.API_KEY_VARIABLE) or None
    where = Server(options.url, options.api.value, options.model, key, options.timeout, options.endpoint.value)
    told = {name: getattr(options, name) for name in _OF_PLAN if getattr(options, name) is not None}
    plan = replace(server.QUICK if options.quick else server.Plan(), **told)
    if options.out:
        report.make_folder(options.out)
    with ExitStack() as stack:
        signalled = stack.enter_context(interruptible())
        place = f"server {urlsplit(where.url).netloc}"
        folder = stack.enter_context(folder_of(options.out, options.resume, place))
        with status(elsewhere=lambda step: say(f"edgellm bench server: {step}")) as step:
            client = server.Client(where, plan, step)
            journal = stack.enter_context(closing(Journal.open(folder, client.identity, options.resume)))
            figures = server.run(client, step, journal)
        result = server.report(where, plan, figures, command_line(), len(journal.taken))
        finish(result, folder)
    raise typer.Exit(signalled() or suite.exit_code(result))
