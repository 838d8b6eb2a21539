"""A live server as its client sees it: time to the first token, time for each next one, tokens and requests a second.

Works with every server that speaks OpenAI's API (llama.cpp, llama-cpp-python, vLLM, bitnet.cpp) or Ollama's. Two
boundaries, never mixed: ``client`` is the clock of this process, with network, queue, template and tokeniser in it;
``server`` is what the server says about itself, where it does (Ollama, llama.cpp).

Tokens are counted by the server (`usage`; Ollama: `eval_count`), never by chunks: a chunk may hold several tokens or
none. A server that sends no usage in a stream is asked again without one, after the clock stopped; its counts are taken
if the text is the same, or both ended at the limit. All output counts, also what a model thinks. Times of a request:

    begin        the request is sent, over a connection of its own that is open already
    first, last  the first and the last chunk with output arrive
    tokens/s     (n - 1) / (last - first), for n tokens of output; exact where the first chunk holds one token

Prompts are random words, another beginning for each, so that no prompt is found in the server's cache (the tokens that
a chat template puts before it may be). Greedy, `ignore_eos` where the server takes it: else an output may be short. An
output that ended by itself may count an end token that no chunk shows.

Results of :func:`run`:

    api, endpoint, url, model       what was asked
    engine, weights, plan, options  what answered, and how it was asked
    rows                    ``pp`` and ``tg`` as in llama-bench, for each boundary: series in ms, tokens/s. The client's
                            ``pp`` is the time to the first token; its rate leaves out cached tokens that the server
                            tells of
    time_to_first_token     series in ms
    time_per_output_token   series in ms, one of each request: (last - first) / (n - 1)
    inter_chunk             series in ms between neighbouring chunks with output
    inter_token             the same if every chunk was one token, else null
    connect                 series in ms: opening the connection, not part of any other figure
    throughput              all requests together: their number, requests/s and tokens/s over `wall`
    requests                one line for each: its counts and times, or its error
    client_*                the headlines
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from ...errors import ArgumentValueError
from ...version import __version__
from .. import statistics, timing
from ..context import INTERRUPTED, describe
from ..metrics import Metric, is_metric, measured, missing
from ..parts import hardware, reproducibility
from ..reporting import report as documents
from ..reporting import stability
from .answers import Answer, ollama_events, openai_event, openai_events, told
from .exchange import ENDPOINTS, Exchange, RefusedError, Server, ServerError, json_answer

API_KEY_VARIABLE = "SERVER_API_KEY"
"""Where the command line looks for a key. No EDGELLM_ name: a report lists those with their values."""

Row = Callable[[str, str, Callable[[], dict[str, Any]]], dict[str, Any]]

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body "
    "information back parent face others level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education foot boy age policy music market sense nation plan "
    "college interest death experience effect use class control field development role effort rate heart drug show"
)
_INSTRUCTION = "Write a long story in which all of these words occur."
_INSTRUCTION_TOKENS = 24  # of the instruction and a short chat template, roughly


@dataclass(frozen=True)
class Plan:
    """How much to ask.

    Attributes:
        requests: that are measured.
        warm_up: requests before them that are not: the first may load the model. At least 1.
        max_tokens: of output, at least 2.
        prompt_tokens: words of a prompt, and so roughly its tokens; the server says how many they are. At least 32.
        concurrency: requests under way at a time.
        quick: the report says that this was only a look.

    Raises:
        ArgumentValueError: a number below what is said here, or more concurrency than requests.
    """

    requests: int = 20
    warm_up: int = 2
    max_tokens: int = 128
    prompt_tokens: int = 128
    concurrency: int = 1
    quick: bool = False

    def __post_init__(self) -> None:
        least = {"requests": 1, "warm_up": 1, "max_tokens": 2, "prompt_tokens": 32, "concurrency": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ArgumentValueError(f"{name} is {getattr(self, name)}, expected at least {bound}")
        if self.concurrency > self.requests:
            raise ArgumentValueError(f"concurrency is {self.concurrency}, but there are {self.requests} requests")


QUICK = Plan(requests=3, warm_up=1, max_tokens=32, quick=True)


def _silent(message: str) -> None:
    """Progress that nobody watches."""


def _only_measure(key: str, boundary: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row that no journal keeps; see :meth:`..context.Context.row`."""
    return {**measure(), "boundary": boundary}


def run(
    server: Server, plan: Plan, progress: Callable[[str], None] = _silent, row: Row = _only_measure
) -> dict[str, Any]:
    """Ask `server` as `plan` says, and return the figures of the module's table.

    A request that fails is a line of `requests` with its error, and no part of any figure. After Ctrl-C the figures are
    those of the requests that were answered, and `interrupted` is true.

    Args:
        server, plan: whom, and how much.
        progress: called with a line for each step.
        row: measures a row and keeps it, as :meth:`..context.Context.row` does. A row is a request, or with concurrency
            all of them, since one alone would meet another load.

    Raises:
        ServerError: the server cannot be used, or no request was answered.
        KeyboardInterrupt: before a request was answered.
    """
    progress(f"asking {server.url} what it is")
    client = _Client(server, plan)
    interrupted = False
    found: list[dict[str, Any]] = []
    try:
        for i in range(plan.warm_up):
            progress(f"warm-up request {i + 1} of {plan.warm_up}")
            client.warm_up()
        rows = _together(client, progress, row) if plan.concurrency > 1 else _one_by_one(client, progress, row)
        for lines in rows:
            found += lines
    except KeyboardInterrupt:
        interrupted = True
    interrupted = interrupted or any(is_metric(line) and line["reason"] == INTERRUPTED for line in found)
    lines = [line if not is_metric(line) else {"error": line["reason"]} for line in found]
    answered = [line for line in lines if "error" not in line]
    if interrupted and not answered:
        raise KeyboardInterrupt
    if not answered:
        raise ServerError(f"{server.url}: none of {len(lines)} requests was answered: {lines[0]['error']}")
    return {
        "boundary": "client",
        "api": server.api,
        "endpoint": client.path,
        "url": server.url,
        "model": client.model,
        "interrupted": interrupted,
        **client.about,
        "plan": asdict(plan),
        "options": client.options(answered),
        **_figures(plan, answered, _wall(plan, lines)),
        "requests": [
            {"request": i, **{key: value for key, value in line.items() if key not in _ONLY_IN_ROWS}}
            for i, line in enumerate(lines, 1)
        ],
    }


def report(
    server: Server, plan: Plan, figures: dict[str, Any], command: str, resumed_rows: int = 0
) -> documents.Report:
    """The report of one run (:mod:`..reporting.report`), with the backend ``"server"`` and without a model's shape.

    Args:
        server, plan: as :func:`run` had them.
        figures: what it returned.
        command: the command line; the key is taken out of it.
        resumed_rows: how many rows were taken from an earlier run.
    """
    unknown = missing("the server does not tell")
    result: documents.Report = {
        "schema_version": documents.SCHEMA_VERSION,
        "workload": {
            "timestamp": measured(datetime.now(timezone.utc).isoformat(timespec="seconds"), standard="ISO 8601"),
            "benchmark_version": measured(__version__),
            "model_name": measured(figures["model"]),
            "batch_size": missing("the server decides which requests it computes together"),
            "num_layers": unknown,
            "hidden_size": unknown,
            "quantization": figures["weights"]["quantisation"],
            "sampling_method": measured("greedy"),
            "temperature": measured(0.0, meaning="greedy: the largest logit"),
            "kv_cache_enabled": unknown,
        },
        "backend": "server",
        "no_gpu": None,
        "quick": plan.quick,
        "command": server.hide(command),
        "environment": {
            **reproducibility.source(),
            **dict.fromkeys(("gpu_model", "driver_version", "cuda_version"), missing("a client does not see it")),
            "cpu_model": hardware.host()["cpu_model"],
            "server_engine": figures["engine"],
            "server_url": measured(server.url),
        },
        "model": None,
        "decoder_check": missing("a server's results are not checked"),
        "parts": {"server": figures},
        "seconds": {"server": figures["throughput"]["wall"]["value"]},
        "errors": _errors(figures["requests"]),
        "failures": [],
        "interrupted": figures["interrupted"],
        "seed": missing("prompts are drawn anew for each run, so that no server has them in its cache"),
        "resumed_rows": resumed_rows,
        "telemetry": missing("a client does not see the GPU of the server"),
    }
    result["stability"] = stability.findings(result)
    result["summary"] = documents.summary(result)
    return result


def _errors(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The requests that failed, those with the same reason under the first of them."""
    alike: dict[str, list[int]] = {}
    for line in lines:
        if "error" in line:
            alike.setdefault(line["error"], []).append(line["request"])
    return {
        f"server/request {which[0]}": {
            "reason": reason if len(which) == 1 else f"{reason}; {len(which)} requests alike",
            "traceback": "",
        }
        for reason, which in alike.items()
    }


# ---- requests -------------------------------------------------------------------------------------------------------

_ONLY_IN_ROWS = ("gaps_ms", "boundary", "conditions", "begin_s", "end_s")
"""Of a line: what the figures are made of, and which a reader finds in the series."""


def _one_by_one(client: _Client, progress: Callable[[str], None], row: Row) -> Iterator[list[dict[str, Any]]]:
    """Each request is a row of its own."""
    plan = client.plan
    for i in range(plan.requests):
        progress(f"request {i + 1} of {plan.requests}")
        yield [row(f"server/request {i + 1}", "client", client.measure)]


def _together(client: _Client, progress: Callable[[str], None], row: Row) -> Iterator[list[dict[str, Any]]]:
    """All requests are one row: `concurrency` threads, each asks again as soon as it has its answer."""

    def measure() -> dict[str, Any]:
        prompts: queue.SimpleQueue[str] = queue.SimpleQueue()
        done: queue.SimpleQueue[_Asked] = queue.SimpleQueue()
        for _ in range(client.plan.requests):
            prompts.put(client.prompt())

        def work() -> None:
            try:
                while True:
                    done.put(client.ask(prompts.get_nowait()))
            except queue.Empty:
                return

        for _ in range(client.plan.concurrency):
            # Daemons: after Ctrl-C nobody waits for what is under way.
            threading.Thread(target=work, daemon=True).start()
        asked = []
        for i in range(client.plan.requests):
            progress(f"{i} of {client.plan.requests} requests answered, {client.plan.concurrency} at a time")
            asked.append(done.get())
        return {"lines": [client.counted(each) for each in asked]}

    found = row("server/requests", "client", measure)
    yield found.get("lines", [found])


@dataclass(frozen=True)
class _Asked:
    """A prompt, and its answer; or the error, and when the request began and ended by `perf_counter`."""

    prompt: str
    answer: Answer | None = None
    error: str = ""
    begin: float = 0.0
    end: float = 0.0


class _Client:
    """Asks one server: knows its model, and which options it takes.

    Raises:
        ServerError: it cannot be reached, or lists no model and none was named.
    """

    def __init__(self, server: Server, plan: Plan):
        self.server, self.plan = server, plan
        self.path = ENDPOINTS[server.api, server.endpoint]
        self.model, self.about = _about(server)
        # Not every server takes them; the last one is given up first.
        self._extras: dict[str, Any] = (
            {"stream_options": {"include_usage": True}, "ignore_eos": True} if server.api == "openai" else {}
        )
        self._refused: list[str] = []
        self._counts_unstreamed = True
        self._dice = random.SystemRandom()  # prompts of an earlier run may still be in the server's cache
        self._words = _WORDS.split()
        self._beginnings: list[str] = []
        self._origin = time.perf_counter()

    def options(self, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What was asked for, what the server made of it."""
        return {
            "temperature": 0,
            "max_tokens": self.plan.max_tokens,
            "sent": ", ".join(self._extras) or "nothing else",
            "refused": ", ".join(self._refused) or "nothing",
            "counts": ", ".join(sorted({line["counts"] for line in lines})),
            "finish_reasons": dict(Counter(line["finish_reason"] for line in lines)),
        }

    def warm_up(self) -> None:
        """A request that is not counted. One that is refused is sent again without one of the extras.

        Raises:
            ServerError: the server does not answer it.
        """
        try:
            self._stream(self.prompt())
        except RefusedError:
            if not self._extras:
                raise
            self._refused.append(self._extras.popitem()[0])
            self.warm_up()

    def measure(self) -> dict[str, Any]:
        """The line of one request."""
        return self.counted(self.ask(self.prompt()))

    def ask(self, prompt: str) -> _Asked:
        """One request; whatever goes wrong is its error."""
        begin = time.perf_counter()
        try:
            return _Asked(prompt, self._stream(prompt))
        except Exception as e:  # also a bug must not cost the other requests
            error = str(e) if isinstance(e, ServerError) else self.server.hide(describe(e))
            return _Asked(prompt, error=error, begin=begin, end=time.perf_counter())

    def counted(self, asked: _Asked) -> dict[str, Any]:
        """The line of a request; the server may be asked again for its counts."""
        if asked.answer is None:
            return {"error": asked.error, "begin_s": asked.begin - self._origin, "end_s": asked.end - self._origin}
        return {**asked.answer.line(self._origin), **self._counts(asked.prompt, asked.answer)}

    def prompt(self) -> str:
        """Another one each time, from its first word on."""
        if not self._beginnings:
            self._beginnings = self._dice.sample(self._words, len(self._words))
        more = max(1, self.plan.prompt_tokens - _INSTRUCTION_TOKENS)
        words = " ".join([self._beginnings.pop(), *self._dice.choices(self._words, k=more)])
        # Without a template the words go on: behind a whole sentence a model may see the end of the text.
        return f"{words}. {_INSTRUCTION}" if self.server.endpoint == "chat" else words

    def _body(self, prompt: str, stream: bool) -> dict[str, Any]:
        chat = self.server.endpoint == "chat"
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        if self.server.api == "ollama":
            options = {"temperature": 0, "num_predict": self.plan.max_tokens}
            raw = {} if chat else {"raw": True}
            return {"model": self.model, **asked, **raw, "stream": stream, "options": options}
        extras = {key: value for key, value in self._extras.items() if stream or key != "stream_options"}
        return {
            "model": self.model,
            **asked,
            "max_tokens": self.plan.max_tokens,
            "temperature": 0,
            "stream": stream,
            **extras,
        }

    def _stream(self, prompt: str) -> Answer:
        """Send a prompt, and read what comes, with the time of each piece."""
        read = ollama_events if self.server.api == "ollama" else openai_events
        with Exchange(self.server, self.server.timeout_s) as exchange:
            answer = Answer(connect_s=exchange.connect_s, begin=time.perf_counter())
            response = exchange.send("POST", self.path, self._body(prompt, True))
            if response.status != 200:
                raise exchange.refusal(response)
            for event in read(exchange.lines(response), response.getheader("Content-Type") or "nothing"):
                if event.error is not None:
                    raise exchange.error(f"error after {len(answer.arrivals)} chunks: {event.error}")
                answer.add(event)
                if event.ends:
                    break
        answer.end = time.perf_counter()
        if answer.finish is None:
            chunks = len(answer.arrivals)
            raise exchange.error(f"the stream was cut off after {chunks} chunks: it gave no reason to finish")
        if not answer.arrivals:
            raise exchange.error(f"no output came, finished by {answer.finish!r}")
        return answer

    def _counts(self, prompt: str, answer: Answer) -> dict[str, Any]:
        """Tokens of prompt and output: `counts` says from where."""
        if answer.tokens is not None:
            return {
                "counts": "usage" if self.server.api == "openai" else "eval_count",
                "prompt_tokens": told(answer.prompt_tokens, "the server's counts leave the prompt out"),
                "completion_tokens": measured(answer.tokens),
            }
        reason = "the server sent no usage, neither in the stream nor without one"
        if self._counts_unstreamed and self.server.api == "openai":
            try:
                again = self._unstreamed(prompt)
            except ServerError as e:
                reason = f"the server sent no usage in the stream, and without one: {e}"
            else:
                if again.tokens is not None:
                    # At "length" both met the same limit, whatever they said: rounding may tip one of two close tokens.
                    same = answer.finish == again.finish == "length" or again.text.strip() == answer.text.strip()
                    other = "no usage in the stream; the same request without one gave another text"
                    return {
                        "counts": "usage of the same request without a stream",
                        "prompt_tokens": told(again.prompt_tokens, reason),
                        "completion_tokens": measured(again.tokens) if same else missing(other),
                    }
                self._counts_unstreamed = False
        return {"counts": "none", "prompt_tokens": missing(reason), "completion_tokens": missing(reason)}

    def _unstreamed(self, prompt: str) -> Answer:
        answer = Answer(connect_s=0.0, begin=0.0)
        event = openai_event(json_answer(self.server, "POST", self.path, self._body(prompt, False)))
        if event.error is not None:
            raise ServerError(self.server.hide(event.error))
        answer.add(event)
        return answer


# ---- who answers ----------------------------------------------------------------------------------------------------


def _about(server: Server) -> tuple[str, dict[str, Any]]:
    """The model's name, and `engine` and `weights` as far as the server tells.

    Raises:
        ServerError: nothing answers, or no model is listed and none was named.
    """
    with Exchange(server, server.question_s):
        pass  # a wrong URL ends here, with one clear line
    path, key, name = ("/api/tags", "models", "name") if server.api == "ollama" else ("/v1/models", "data", "id")
    refused = ""
    try:
        found = json_answer(server, "GET", path)
        listed = [x for x in found.get(key) or [] if isinstance(x, dict) and isinstance(x.get(name), str)]
    except (ServerError, AttributeError) as e:  # some servers list nothing, and still answer
        listed, refused = [], f": {e}"
    if not server.model and not listed:
        raise ServerError(f"{server.url}: the server lists no model, name one{refused}")
    model = server.model or listed[0][name]
    entry = next((x for x in listed if x[name] == model), {})
    return model, {"engine": _engine(server, entry), "weights": _weights(entry)}


def _engine(server: Server, entry: dict[str, Any]) -> Metric:
    """Name and version of the program behind the URL, from the places where such programs tell them."""

    def ask(path: str) -> dict[str, Any]:
        try:
            found = json_answer(server, "GET", path)
        except ServerError:
            return {}
        return found if isinstance(found, dict) else {}

    if server.api == "ollama":
        version = ask("/api/version").get("version")
        return measured(f"Ollama {version}", source="/api/version") if version else missing("no /api/version")
    if build := ask("/props").get("build_info"):
        return measured(f"llama.cpp {build}", source="/props")
    if entry.get("owned_by") == "vllm":
        return measured(f"vLLM {ask('/version').get('version', 'of unknown version')}", source="/version")
    info = ask("/openapi.json").get("info")
    if isinstance(info, dict) and info.get("title"):
        return measured(server.hide(f"{info['title']} {info.get('version', '')}"), source="/openapi.json")
    return missing("the server tells its name neither in /props, /v1/models nor /openapi.json")


def _weights(entry: dict[str, Any]) -> dict[str, Metric]:
    """Of an entry in the list of models: llama.cpp has `meta`, Ollama `size` and `details`."""
    meta, details = entry.get("meta") or {}, entry.get("details") or {}
    unknown = missing("the server does not tell")
    size, parameters = meta.get("size", entry.get("size")), meta.get("n_params", details.get("parameter_size"))
    quantisation = details.get("quantization_level")
    return {
        "bytes": measured(size, "bytes") if size else unknown,
        "parameters": measured(parameters) if parameters else unknown,
        "quantisation": measured(quantisation) if quantisation else unknown,
    }


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(plan: Plan, lines: list[dict[str, Any]], wall: float) -> dict[str, Any]:
    """Everything that is made of the answered requests, which took `wall` seconds."""
    prompts, outputs = f"pp{plan.prompt_tokens}", f"tg{plan.max_tokens}"
    each_token = [_per_token(line) for line in lines]
    first_token = _series([line["first_token_ms"] for line in lines], "ms")
    per_token = _series(each_token, "ms")
    client = [
        {
            "name": prompts,
            "boundary": "client",
            "tokens": _median([line["prompt_tokens"] for line in lines], "tokens"),
            "latency": first_token,
            "tok_s": _median([_prompt_rate(line) for line in lines], "tok/s"),
        },
        {
            "name": outputs,
            "boundary": "client",
            "tokens": _median([line["completion_tokens"] for line in lines], "tokens"),
            "latency": per_token,
            "tok_s": _median([_inverse(ms) for ms in each_token], "tok/s"),
        },
    ]
    server = [row for name, key in ((prompts, "pp"), (outputs, "tg")) if (row := _server_row(name, key, lines))]
    gaps = [line["gaps_ms"] for line in lines]
    chunk = _gaps(gaps)
    token = chunk if (reason := _not_tokens(lines)) is None else missing(reason, "ms")
    throughput = _throughput(plan, lines, wall)
    return {
        "rows": client + server,
        "time_to_first_token": first_token,
        "time_per_output_token": per_token,
        "inter_chunk": chunk,
        "inter_token": token,
        "one_token_a_chunk": missing(reason) if reason and "unknown" in reason else measured(reason is None),
        "connect": statistics.summarise([line["connect_ms"]["value"] for line in lines], "ms"),
        "throughput": throughput,
        "client_first_token_ms": first_token["median"],
        "client_token_ms": per_token if is_metric(per_token) else per_token["median"],
        "client_tok_s": client[1]["tok_s"],
        "client_requests_s": throughput["requests_s"],
    }


def _per_token(line: dict[str, Any]) -> Metric:
    """Milliseconds a token, behind the first one."""
    n, ms = line["completion_tokens"], line["first_to_last_ms"]["value"]
    if n["value"] is None:
        return missing(n["reason"], "ms")
    if n["value"] < 2 or not ms:
        return missing(f"{n['value']} tokens came at one time: there is nothing between them", "ms")
    return measured(ms / (n["value"] - 1), "ms")


def _prompt_rate(line: dict[str, Any]) -> Metric:
    """Tokens a second that were read until the first one came, without those that the server had in its cache."""
    n = line["prompt_tokens"]
    if n["value"] is None:
        return missing(n["reason"], "tok/s")
    tokens = n["value"] - (line["cached_tokens"]["value"] or 0)
    if tokens <= 0:
        return missing("the whole prompt was in the server's cache", "tok/s")
    return measured(1e3 * tokens / line["first_token_ms"]["value"], "tok/s")


def _inverse(ms: Metric) -> Metric:
    return missing(ms["reason"], "tok/s") if ms["value"] is None else measured(1e3 / ms["value"], "tok/s")


def _server_row(name: str, key: str, lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The server's own clock for prompts (``"pp"``) or output (``"tg"``); None if it tells none."""
    told = [line["server_ms"][key] for line in lines if key in line["server_ms"]]
    if not told:
        return None
    each = [measured(x["ms"]["value"] / (1 if key == "pp" else x["tokens"]), "ms") for x in told]
    return {
        "name": name,
        "boundary": "server",
        "tokens": _median([measured(x["tokens"]) for x in told], "tokens"),
        "latency": _series(each, "ms"),
        "tok_s": _median([measured(1e3 * x["tokens"] / x["ms"]["value"], "tok/s") for x in told], "tok/s"),
    }


def _series(figures: Sequence[Metric], unit: str) -> dict[str, Any]:
    """The series of those that are measured; null with the first reason if none is."""
    known = [figure["value"] for figure in figures if figure["value"] is not None]
    if not known:
        return missing(figures[0]["reason"], unit)
    detail: dict[str, Any] = {"left_out": len(figures) - len(known)} if len(known) < len(figures) else {}
    if len(known) > 1:
        detail["relative_error"] = timing.Samples(unit, known).relative_error  # what .stability looks at
    return statistics.summarise(known, unit, **detail)


def _median(figures: Sequence[Metric], unit: str) -> Metric:
    known = [figure["value"] for figure in figures if figure["value"] is not None]
    return statistics.median(known, unit) if known else missing(figures[0]["reason"], unit)


def _gaps(gaps: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Between chunks of one request; its `gap_variance` too, where all requests have as many."""
    flat = [ms for each in gaps for ms in each]
    if not flat:
        return missing("every answer came in one chunk", "ms")
    same = len(set(map(len, gaps))) == 1
    return statistics.summarise(flat, "ms", run=len(gaps[0]) if same else None)


def _not_tokens(lines: Sequence[dict[str, Any]]) -> str | None:
    """Why the gaps between chunks are not those between tokens, or None."""
    for line in lines:
        n = line["completion_tokens"]
        if n["value"] is None:
            return f"the number of tokens is unknown: {n['reason']}"
    chunks = sum(line["chunks"] for line in lines)
    tokens = sum(line["completion_tokens"]["value"] for line in lines)
    if any(line["chunks"] != line["completion_tokens"]["value"] for line in lines):
        return f"chunks are not tokens: {chunks} chunks with output, {tokens} tokens"
    return "every answer is one token" if chunks == len(lines) else None


def _wall(plan: Plan, lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of all requests together; one at a time: of those that were answered, without what lies between them."""
    if plan.concurrency == 1:
        return sum(line["end_s"] - line["begin_s"] for line in lines if "error" not in line)
    return max(line["end_s"] for line in lines) - min(line["begin_s"] for line in lines)


def _throughput(plan: Plan, lines: Sequence[dict[str, Any]], wall: float) -> dict[str, Any]:
    """Of all requests together."""
    counts = [line["completion_tokens"] for line in lines]
    unknown = next((n["reason"] for n in counts if n["value"] is None), None)
    return {
        "answered": len(lines),
        "concurrency": plan.concurrency,
        "wall": measured(wall, "s"),
        "requests_s": measured(len(lines) / wall, "requests/s", n=len(lines)),
        "output_tok_s": (
            missing(unknown, "tok/s") if unknown else measured(sum(n["value"] for n in counts) / wall, "tok/s")
        ),
    }
