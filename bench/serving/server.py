"""A live server as its client sees it: time to the first token, time for each next one, tokens and requests a second.

Works with every server that speaks OpenAI's API (llama.cpp, llama-cpp-python, vLLM, bitnet.cpp) or Ollama's. Two
boundaries, never mixed: ``client`` is the clock of this process, with network, queue, template and tokeniser in it;
``server`` is what the server says about itself, where it does (Ollama, llama.cpp).

Tokens are counted by the server (`usage`; Ollama: `eval_count`), never by chunks: a chunk may hold several tokens or
none. A server that sends no usage in a stream is asked again without one, after the clock stopped; its counts are taken
if the text is the same, or both ended at the limit. Times of a request:

    begin        the request is sent, over a connection of its own that is open already
    first, last  the first and the last chunk with output arrive
    tokens/s     (n - 1) / (last - first), for n tokens of output; exact where the first chunk holds one token

All output counts, also what a model thinks. Thinking that the server counts and does not send has passed before the
first chunk: it is no part of that n, only of the tokens/s of all requests together.

Prompts are random words, another beginning for each, so that no prompt is found in the server's cache (the tokens that
a chat template puts before it may be). Greedy, `ignore_eos` where the server takes it: else an output may be short. An
output that ended by itself may count an end token that no chunk shows.

Each answered request is a row of the journal, also one of requests side by side. The main thread writes it, which reads
no answer: those that do go on, save while it makes the line, which is no longer than some chunks of one more answer
would take. Counts are not asked for beside other requests: that waits until all are answered. Requests of which some
were cut off or asked later did not have the planned number beside them all the time: they have no common rate.

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any

from ...errors import ArgumentValueError
from ...version import __version__
from .. import statistics, timing
from ..context import INTERRUPTED, describe
from ..journal import Journal
from ..metrics import Metric, is_metric, measured, missing
from ..parts import hardware, reproducibility
from ..reporting import report as documents
from ..reporting import stability
from .answers import Answer, ollama_events, openai_event, openai_events, told
from .exchange import ENDPOINTS, Exchange, RefusedError, Server, ServerError, json_answer

API_KEY_VARIABLE = "SERVER_API_KEY"
"""Where the command line looks for a key. No EDGELLM_ name: a report lists those with their values."""

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


def run(client: Client, progress: Callable[[str], None] = _silent, journal: Journal | None = None) -> dict[str, Any]:
    """Ask what is planned, and return the figures of the module's table.

    A request that fails is a line of `requests` with its error, and no part of any figure. After Ctrl-C the figures are
    those of the requests that were answered, and `interrupted` is true.

    Args:
        client: knows whom to ask, and how much.
        progress: called with a line for each step.
        journal: keeps each answered request; those that it has already are not asked again. None: nothing keeps them.

    Raises:
        ServerError: no request was answered.
        JournalError: a request cannot be kept.
        KeyboardInterrupt: before a request was answered.
    """
    server, plan = client.server, client.plan
    found: dict[int, dict[str, Any]] = {}
    interruption: KeyboardInterrupt | None = None
    try:
        _ask_all(client, progress, Journal() if journal is None else journal, found)
    except KeyboardInterrupt as e:
        interruption = e
    lines = [{"request": number, **_with_counts(found[number])} for number in sorted(found)]
    answered = [line for line in lines if "error" not in line]
    if interruption and not answered:
        raise interruption
    if not answered:
        raise ServerError(f"{server.url}: none of {len(lines)} requests was answered: {lines[0]['error']}")
    return {
        "boundary": "client",
        "api": server.api,
        "endpoint": client.path,
        "url": server.url,
        "model": client.model,
        "interrupted": interruption is not None,
        **client.about,
        "plan": asdict(plan),
        "options": client.options(answered),
        **_figures(plan, lines),
        "requests": [{key: value for key, value in line.items() if key not in _ONLY_IN_ROWS} for line in lines],
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

_ONLY_IN_ROWS = ("arrivals_ns", "boundary", "origin", "begin_s", "end_s")
"""Of a line: what the figures are made of, and which a reader finds in the series."""

_Keep = Callable[[int, dict[str, Any]], None]


def _ask_all(
    client: Client, progress: Callable[[str], None], journal: Journal, found: dict[int, dict[str, Any]]
) -> None:
    """Fill `found`: number of a request -> its line. What is in it stays there when Ctrl-C ends this."""
    plan = client.plan

    def key(number: int) -> str:
        return f"server/request {number}"

    def keep(number: int, line: dict[str, Any]) -> None:
        found[number] = line
        if "error" not in line:  # else a resumed run tries again
            journal.record(key(number), line["end_s"] - line["begin_s"], {**line, "boundary": "client"}, [])

    for number in range(1, plan.requests + 1):
        if row := journal.recorded(key(number)):
            found[number] = row["figures"]
    left = [number for number in range(1, plan.requests + 1) if number not in found]
    (_side_by_side if plan.concurrency > 1 else _one_by_one)(client, left, progress, keep)
    for number, line in found.items():
        found[number] = client.counted(line)


def _one_by_one(client: Client, left: Sequence[int], progress: Callable[[str], None], keep: _Keep) -> None:
    for number in left:
        progress(f"request {number} of {client.plan.requests}")
        keep(number, client.counted(client.line(client.ask(client.prompt()))))


def _side_by_side(client: Client, left: Sequence[int], progress: Callable[[str], None], keep: _Keep) -> None:
    """`concurrency` threads, each asks again as soon as it has its answer."""
    plan = client.plan
    waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, _Asked]] = queue.SimpleQueue()
    for number in left:
        waiting.put((number, client.prompt()))

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                number, prompt = waiting.get_nowait()
                done.put((number, client.ask(prompt)))

    def keep_next(block: bool) -> None:
        number, asked = done.get(block)
        keep(number, client.line(asked))

    for _ in range(min(plan.concurrency, len(left))):
        # Daemons: after Ctrl-C nobody waits for what is under way.
        threading.Thread(target=work, daemon=True).start()
    try:
        for i in range(len(left)):
            answered = plan.requests - len(left) + i
            progress(f"{answered} of {plan.requests} requests answered, {plan.concurrency} at a time")
            keep_next(block=True)
    except KeyboardInterrupt:
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()  # what was not sent is not sent any more
        with suppress(queue.Empty):
            while True:
                keep_next(block=False)
        raise


def _with_counts(line: dict[str, Any]) -> dict[str, Any]:
    """The line, null in place of counts that Ctrl-C left no time to ask for."""
    if "again" not in line:
        return line
    return {**{key: value for key, value in line.items() if key != "again"}, **_no_counts(INTERRUPTED)}


def _no_counts(reason: str) -> dict[str, Any]:
    names = ("prompt_tokens", "completion_tokens", "hidden_tokens")
    return {"counts": "none", **{name: missing(reason) for name in names}}


@dataclass(frozen=True)
class _Asked:
    """A prompt, and its answer; or the error, and when the request began and ended by `perf_counter`."""

    prompt: str
    answer: Answer | None = None
    error: str = ""
    begin: float = 0.0
    end: float = 0.0


class Client:
    """Asks one server, which it has warmed up: knows its model, and which options it takes.

    Args:
        server, plan: whom, and how much.
        progress: called with a line for each step.

    Attributes:
        model: its name on the server.
        about: `engine` and `weights`, as far as the server tells.

    Raises:
        ServerError: it cannot be reached, lists no model and none was named, or does not answer a request.
    """

    def __init__(self, server: Server, plan: Plan, progress: Callable[[str], None] = _silent):
        progress(f"asking {server.url} what it is")
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
        self._origin, self._began = time.perf_counter(), datetime.now(timezone.utc).isoformat()
        for i in range(plan.warm_up):
            progress(f"warm-up request {i + 1} of {plan.warm_up}")
            self._warm_up()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for requests of two processes to belong to one run.

        Not how long one may take: that changes no answer, and who met the limit goes on with a higher one.
        """
        return {
            "code": reproducibility.code_hash(),
            "url": self.server.url,
            "api": self.server.api,
            "endpoint": self.server.endpoint,
            "model": self.model,
            "engine": self.about["engine"]["value"],
            "weights": {name: figure["value"] for name, figure in self.about["weights"].items()},
            "refused": self._refused,
            **asdict(self.plan),
        }

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

    def _warm_up(self) -> None:
        """A request that is not counted. One that is refused is sent again without one of the extras."""
        try:
            self._stream(self.prompt())
        except RefusedError:
            if not self._extras:
                raise
            self._refused.append(self._extras.popitem()[0])
            self._warm_up()

    def ask(self, prompt: str) -> _Asked:
        """One request; whatever goes wrong is its error."""
        begin = time.perf_counter()
        try:
            return _Asked(prompt, self._stream(prompt))
        except Exception as e:  # also a bug must not cost the other requests
            error = str(e) if isinstance(e, ServerError) else self.server.hide(describe(e))
            return _Asked(prompt, error=error, begin=begin, end=time.perf_counter())

    def line(self, asked: _Asked) -> dict[str, Any]:
        """The line of a request; under `again` what :meth:`counted` needs, where the answer came without counts."""
        if asked.answer is None:
            times = {"begin_s": asked.begin - self._origin, "end_s": asked.end - self._origin}
            return {"error": asked.error, "origin": self._began, **times}
        answer = asked.answer
        line = {**answer.line(self._origin), "origin": self._began}
        if answer.tokens is None:
            return {**line, "again": {"prompt": asked.prompt, "text": answer.text, "thinks": answer.thinks}}
        return {
            **line,
            "counts": "usage" if self.server.api == "openai" else "eval_count",
            "prompt_tokens": told(answer.prompt_tokens, "the server's counts leave the prompt out"),
            "completion_tokens": measured(answer.tokens),
            "hidden_tokens": _hidden(answer, answer.thinks),
        }

    def counted(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line with counts: the server may be asked again for them."""
        if "again" not in line:
            return line
        again = line["again"]
        rest = {key: value for key, value in line.items() if key != "again"}
        return {**rest, **self._counts(again["prompt"], again["text"], again["thinks"], line["finish_reason"])}

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

    def _counts(self, prompt: str, text: str, thinks: bool, finish: str) -> dict[str, Any]:
        """Tokens of prompt and output, of the same request without a stream."""
        reason = "the server sent no usage, neither in the stream nor without one"
        if self._counts_unstreamed and self.server.api == "openai":
            try:
                again = self._unstreamed(prompt)
            except ServerError as e:
                reason = f"the server sent no usage in the stream, and without one: {e}"
            else:
                if again.tokens is not None:
                    # At "length" both met the same limit, whatever they said: rounding may tip one of two close tokens.
                    same = finish == again.finish == "length" or again.text.strip() == text.strip()
                    other = "no usage in the stream; the same request without one gave another text"
                    return {
                        "counts": "usage of the same request without a stream",
                        "prompt_tokens": told(again.prompt_tokens, reason),
                        "completion_tokens": measured(again.tokens) if same else missing(other),
                        "hidden_tokens": _hidden(again, thinks) if same else missing(other),
                    }
                self._counts_unstreamed = False
        return _no_counts(reason)

    def _unstreamed(self, prompt: str) -> Answer:
        answer = Answer(connect_s=0.0, begin=0.0)
        event = openai_event(json_answer(self.server, "POST", self.path, self._body(prompt, False)))
        if event.error is not None:
            raise ServerError(self.server.hide(event.error))
        answer.add(event)
        return answer


def _hidden(counted: Answer, thinks: bool) -> Metric:
    """Tokens that are in the counts of `counted` and in no chunk; `thinks`: the chunks showed thinking."""
    return told(0 if thinks else counted.counts.get("reasoning_tokens"), "the server does not tell")


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
    except (ServerError, AttributeError, TypeError) as e:  # some servers list nothing, and still answer
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
    meta, details = (found if isinstance(found, dict) else {} for found in (entry.get("meta"), entry.get("details")))

    def figure(found: Any, kinds: tuple[type, ...], unit: str | None = None) -> Metric:
        return measured(found, unit) if found and isinstance(found, kinds) else missing("the server does not tell")

    return {
        "bytes": figure(meta.get("size", entry.get("size")), (int,), "bytes"),
        "parameters": figure(meta.get("n_params", details.get("parameter_size")), (int, str)),
        "quantisation": figure(details.get("quantization_level"), (str,)),
    }


# ---- figures --------------------------------------------------------------------------------------------------------


def _figures(plan: Plan, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that is made of the lines of the requests that were asked; at least one was answered."""
    lines = [line for line in asked if "error" not in line]
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
    gaps = [[(b - a) / 1e6 for a, b in pairwise(line["arrivals_ns"])] for line in lines]
    chunk = _gaps(gaps)
    token = chunk if (reason := _not_tokens(lines)) is None else missing(reason, "ms")
    throughput = _throughput(plan, asked)
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
    n, ms = _shown(line), line["first_to_last_ms"]["value"]
    if n["value"] is None:
        return missing(n["reason"], "ms")
    if n["value"] < 2 or not ms:
        return missing(f"{n['value']} tokens came at one time: there is nothing between them", "ms")
    return measured(ms / (n["value"] - 1), "ms")


def _shown(line: dict[str, Any]) -> Metric:
    """Tokens of output that are in the chunks."""
    n, hidden = line["completion_tokens"], line["hidden_tokens"]["value"]
    if n["value"] is None or not hidden:
        return dict(n)
    shown = n["value"] - hidden
    if shown < line["chunks"]:  # then some of it was in the text, as a model's template may have it
        return missing(f"{hidden} of {n['value']} tokens are reasoning, but {line['chunks']} chunks with output came")
    return measured(shown)


def _prompt_rate(line: dict[str, Any]) -> Metric:
    """Tokens a second that were read until the first one came, without those that the server had in its cache."""
    n = line["prompt_tokens"]
    if n["value"] is None:
        return missing(n["reason"], "tok/s")
    if hidden := line["hidden_tokens"]["value"]:
        return missing(f"{hidden} tokens of reasoning may have come before the first one that was sent", "tok/s")
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
    shown = [_shown(line) for line in lines]
    for n in shown:
        if n["value"] is None:
            return f"the number of tokens is unknown: {n['reason']}"
    chunks, tokens = sum(line["chunks"] for line in lines), sum(n["value"] for n in shown)
    if any(line["chunks"] != n["value"] for line, n in zip(lines, shown, strict=True)):
        return f"chunks are not tokens: {chunks} chunks with output, {tokens} tokens"
    return "every answer is one token" if chunks == len(lines) else None


def _wall(plan: Plan, asked: Sequence[dict[str, Any]]) -> float:
    """Seconds of all requests together; one at a time: of those that were answered, without what lies between them."""
    if plan.concurrency == 1:
        return sum(line["end_s"] - line["begin_s"] for line in asked if "error" not in line)
    processes = [[line for line in asked if line["origin"] == origin] for origin in _origins(asked)]
    return sum(max(line["end_s"] for line in each) - min(line["begin_s"] for line in each) for each in processes)


def _origins(asked: Sequence[dict[str, Any]]) -> set[str]:
    """Of each process that asked: the moment from which it counts its seconds."""
    return {line["origin"] for line in asked}


def _throughput(plan: Plan, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all requests together."""
    answered = [line for line in asked if "error" not in line]
    wall = _wall(plan, asked)
    counts = [line["completion_tokens"] for line in answered]
    unknown = next((n["reason"] for n in counts if n["value"] is None), None)
    cut = None
    if plan.concurrency > 1 and (len(asked) < plan.requests or len(_origins(asked)) > 1):
        cut = f"not asked in one go: there were not {plan.concurrency} requests under way all the time"
    return {
        "answered": len(answered),
        "concurrency": plan.concurrency,
        "wall": measured(wall, "s"),
        "requests_s": (
            missing(cut, "requests/s") if cut else measured(len(answered) / wall, "requests/s", n=len(answered))
        ),
        "output_tok_s": (
            missing(cut or unknown or "", "tok/s")
            if cut or unknown
            else measured(sum(n["value"] for n in counts) / wall, "tok/s")
        ),
    }
