"""The client of live servers: recorded exchanges over a local socket, and servers that do everything wrong.

Times on a loaded machine: exact where they are given to the arithmetic, else compared with the moments at which the
test's own server really sent.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgellm_cupy import cli
from edgellm_cupy.bench import journal
from edgellm_cupy.bench.context import INTERRUPTED
from edgellm_cupy.bench.journal import Journal
from edgellm_cupy.bench.metrics import is_metric, measured, missing
from edgellm_cupy.bench.reporting import markdown, report, schema
from edgellm_cupy.bench.serving import server
from edgellm_cupy.bench.serving.answers import Answer, Event
from edgellm_cupy.errors import ArgumentValueError
from tests.data.server import make_ollama
from tests.fake_server import (
    DONE,
    ROLE,
    FakeServer,
    Pieces,
    Request,
    chunk,
    head,
    openai,
    plain,
    sse,
    stream,
    usage,
    whole,
    words,
)

DATA = Path(__file__).parents[1] / "data" / "server"
FEW = server.Plan(requests=2, warm_up=1, max_tokens=8, prompt_tokens=32)
KEY = "secret-key-123"


def measure(fake: FakeServer, plan: server.Plan = FEW, **options: Any) -> dict[str, Any]:
    return ask(server.Server(fake.url, options.pop("api", "openai"), timeout_s=20, **options), plan)


def ask(
    where: server.Server,
    plan: server.Plan = FEW,
    progress: Callable[[str], None] = str,
    journal: Journal | None = None,
) -> dict[str, Any]:
    return server.run(server.Client(where, plan, progress), progress, journal)


def errors(figures: dict[str, Any]) -> list[str]:
    return [line["error"] for line in figures["requests"] if "error" in line]


def failing(fake: FakeServer, **options: Any) -> str:
    """The one line of a run that cannot be."""
    with pytest.raises(server.ServerError) as caught:
        measure(fake, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def after_warm_up(good: Pieces, bad: Pieces) -> Callable[[Request], Pieces]:
    """`good` for the warm-up and the last of two requests, `bad` for the first."""
    answers = iter([good, bad, good])
    return openai(lambda request: next(answers))


# ---- recorded -------------------------------------------------------------------------------------------------------


class Replay:
    """Answers each request with the next recorded exchange of that method, path and kind, `scale` times as slow."""

    def __init__(self, name: str, scale: float):
        self.exchanges = json.loads((DATA / name).read_text())["exchanges"]
        self._left, self._scale, self._lock = list(self.exchanges), scale, threading.Lock()

    def __call__(self, request: Request) -> Pieces:
        def kind(body: dict[str, Any] | None) -> bool:
            return bool(body and body["stream"])

        with self._lock:
            same = [
                each
                for each in self._left
                if (each["method"], each["path"]) == (request.method, request.path)
                and kind(each["body"]) == kind(request.body)
            ]
            if len(same) > 1:  # the last one again and again
                self._left.remove(same[0])
        times = [0.0, *(ms for ms, _ in same[0]["pieces"])]
        texts = [text.encode("latin-1") for _, text in same[0]["pieces"]]
        return [(self._scale * (b - a) / 1e3, text) for a, b, text in zip(times, times[1:], texts, strict=False)]


def recorded_streams(replay: Replay) -> list[list[tuple[float, int]]]:
    """Of each recorded stream, without the client's parser: ms and chunks with output, for each of its pieces."""
    posts = [each for each in replay.exchanges if each["method"] == "POST" and each["body"]["stream"]]
    return [[(ms, text.count('"content": "')) for ms, text in each["pieces"]] for each in posts]


def test_llama_cpp_python_as_recorded(serve):
    replay = Replay("llama_cpp_python.json", 0.2)
    fake = serve(replay)
    figures = measure(fake, server.Plan(requests=3, warm_up=1, max_tokens=16, prompt_tokens=32))
    assert errors(figures) == []
    assert figures["model"] == "smollm2-135m-instruct-q4_1"
    assert figures["engine"]["value"].endswith("llama.cpp Python API 0.3.36")
    # It ignores stream_options: the counts come from the same request without a stream.
    assert figures["options"]["counts"] == "usage of the same request without a stream"
    posts = [request.body for request in fake.requests if request.method == "POST"]
    assert [body["stream"] for body in posts] == [True, True, False, True, False, True, False]
    assert posts[1]["messages"] == posts[2]["messages"]
    assert posts[0]["stream_options"] == {"include_usage": True}
    assert "stream_options" not in posts[2]
    counts = [json.loads(each["pieces"][-1][1].rpartition("\r\n")[2])["usage"] for each in unstreamed(replay)]
    lines = figures["requests"]
    assert [line["completion_tokens"]["value"] for line in lines] == [each["completion_tokens"] for each in counts]
    assert [line["prompt_tokens"]["value"] for line in lines] == [each["prompt_tokens"] for each in counts]
    assert [line["chunks"] for line in lines] == [
        sum(chunks for _, chunks in pieces) for pieces in recorded_streams(replay)[1:]
    ]
    assert [row["boundary"] for row in figures["rows"]] == ["client", "client"]


def unstreamed(replay: Replay) -> list[dict[str, Any]]:
    return [each for each in replay.exchanges if each["method"] == "POST" and not each["body"]["stream"]]


def test_times_are_those_of_the_recording(serve):
    """Against the moments at which the replay really sent, which a loaded machine may delay: then once more."""
    scale = 0.2
    tries = []
    for _ in range(4):
        replay = Replay("llama_cpp_python.json", scale)
        fake = serve(replay)
        figures = measure(fake, server.Plan(requests=3, warm_up=1, max_tokens=16, prompt_tokens=32))
        seen, really = [], []
        for line, sent, pieces in zip(figures["requests"], fake.sent[1:], recorded_streams(replay)[1:], strict=True):
            output = [i for i, (_, chunks) in enumerate(pieces) if chunks]
            # A replay may be late, never early.
            assert line["first_token_ms"]["value"] >= scale * pieces[output[0]][0]
            assert line["total_ms"]["value"] >= scale * pieces[output[-1]][0]
            assert line["total_ms"]["value"] >= line["first_token_ms"]["value"] + line["first_to_last_ms"]["value"]
            seen.append(line["first_to_last_ms"]["value"])
            really.append(1e3 * (sent[output[-1]] - sent[output[0]]))
        tries.append((seen, really))
        if seen == pytest.approx(really, abs=10):
            return
    pytest.fail(f"ms between the first and the last chunk, seen and really: {tries}")


def test_ollama_as_documented(serve):
    fake = serve(Replay("ollama.json", 0.25))
    figures = measure(fake, api="ollama")
    assert errors(figures) == []
    assert figures["model"] == "llama3.2:latest"
    assert figures["engine"]["value"] == "Ollama 0.5.1"
    assert figures["weights"]["quantisation"]["value"] == "Q4_K_M"
    assert figures["weights"]["bytes"]["value"] == make_ollama.MODEL["size"]
    rows = {(row["name"], row["boundary"]): row for row in figures["rows"]}
    assert set(rows) == {(name, boundary) for name in ("pp32", "tg8") for boundary in ("client", "server")}
    told = rows["tg8", "server"]["tok_s"]["value"]
    assert told == pytest.approx(1e9 * make_ollama.TOKENS / make_ollama.OUTPUT_NS)
    told = rows["pp32", "server"]["tok_s"]["value"]
    assert told == pytest.approx(1e9 * make_ollama.PROMPT_TOKENS / make_ollama.PROMPT_NS)
    assert rows["pp32", "server"]["latency"]["median"]["value"] == pytest.approx(make_ollama.PROMPT_NS / 1e6)
    line = figures["requests"][0]
    assert (line["prompt_tokens"]["value"], line["completion_tokens"]["value"], line["counts"]) == (41, 8, "eval_count")
    assert line["chunks"] == 8  # the one that thinks too, and not the last one, which only counts
    assert figures["one_token_a_chunk"]["value"] is True
    body = fake.requests[-1].body
    assert body["options"] == {"temperature": 0, "num_predict": 8}
    assert "max_tokens" not in body


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def answered(at: list[float], tokens: int | None, hidden: int = 0, **counts: int) -> dict[str, Any]:
    """The line of an answer whose chunks came at these seconds after it was asked for."""
    answer = Answer(connect_s=0.002, begin=100.0, end=100.0 + at[-1] + 0.01)
    for t in at:
        answer.add(Event(at=100.0 + t, text="x"))
    answer.add(Event(finish="length", counts=counts))
    told = {"completion_tokens": missing("not told") if tokens is None else measured(tokens)}
    told |= {"prompt_tokens": measured(50), "hidden_tokens": measured(hidden), "counts": "usage"}
    return {**answer.line(100.0), "origin": "noon", **told}


def figures_of(*lines: dict[str, Any], plan: server.Plan = FEW) -> dict[str, Any]:
    return server._figures(plan, lines)


def test_rates_are_of_the_tokens_behind_the_first():
    figures = figures_of(answered([0.5, 0.6, 0.9], 3), answered([0.25, 0.5, 0.75], 3))
    prompt, output = figures["rows"]
    assert figures["time_to_first_token"]["samples"] == [500, 250]
    assert figures["time_per_output_token"]["samples"] == [200, 250]
    assert output["tok_s"]["value"] == pytest.approx((5 + 4) / 2)
    assert prompt["tok_s"]["value"] == pytest.approx((50 / 0.5 + 50 / 0.25) / 2)
    assert figures["inter_token"]["samples"] == [100, 300, 250, 250]
    assert figures["time_to_first_token"]["relative_error"] == pytest.approx(125 / 375)
    assert figures["throughput"]["wall"]["value"] == pytest.approx(0.91 + 0.76)
    assert figures["throughput"]["output_tok_s"]["value"] == pytest.approx(6 / (0.91 + 0.76))


def test_chunks_of_several_tokens_are_no_tokens():
    figures = figures_of(answered([0.5, 0.7, 0.9], 9))
    assert figures["time_per_output_token"]["samples"] == [50]
    assert figures["inter_chunk"]["samples"] == [200, 200]
    assert figures["inter_token"]["value"] is None
    assert "3 chunks with output, 9 tokens" in figures["inter_token"]["reason"]
    assert figures["one_token_a_chunk"]["value"] is False


def test_cached_prompt_tokens_make_no_speed():
    figures = figures_of(answered([0.5, 0.6], 2, cached_tokens=30), answered([0.5, 0.6], 2, cached_tokens=50))
    assert figures["rows"][0]["tok_s"]["value"] == pytest.approx((50 - 30) / 0.5)
    assert figures["rows"][0]["tok_s"]["n"] == 1


def test_hidden_tokens_are_in_no_rate_but_that_of_the_wall():
    figures = figures_of(answered([0.5, 0.6, 0.9], 60, hidden=57), answered([0.5, 0.7, 0.9], 3))
    prompt, output = figures["rows"]
    assert figures["time_per_output_token"]["samples"] == [200, 200]
    assert output["tok_s"]["value"] == pytest.approx(5)
    assert figures["inter_token"]["samples"] == [100, 300, 200, 200]
    assert figures["one_token_a_chunk"]["value"] is True
    assert prompt["tok_s"]["value"] == pytest.approx(50 / 0.5)
    assert prompt["tok_s"]["n"] == 1  # of the other one: what came first was thought first
    assert figures["throughput"]["output_tok_s"]["value"] == pytest.approx(63 / (0.91 + 0.91))


def test_reasoning_that_may_be_in_the_chunks_is_no_rate():
    figures = figures_of(answered([0.5, 0.6, 0.9], 3, hidden=2))
    assert figures["client_tok_s"]["value"] is None
    assert figures["client_tok_s"]["reason"] == "2 of 3 tokens are reasoning, but 3 chunks with output came"
    assert figures["inter_token"]["value"] is figures["one_token_a_chunk"]["value"] is None


@pytest.mark.parametrize(("at", "tokens"), [([0.5], 1), ([0.5], 8), ([0.5, 0.5, 0.5], 3)])
def test_nothing_between_the_first_and_the_last_is_no_rate(at, tokens):
    figures = figures_of(answered(at, tokens))
    assert figures["client_tok_s"]["value"] is None
    assert "at one time" in figures["client_tok_s"]["reason"]
    assert figures["client_first_token_ms"]["value"] == 500


def test_wall_of_requests_side_by_side_holds_the_failed_ones():
    plan = server.Plan(requests=3, concurrency=2)
    failed = {"error": "no", "origin": "noon", "begin_s": 0.2, "end_s": 3.0}
    assert server._wall(plan, [answered([0.5, 0.6], 2), failed]) == pytest.approx(3.0)
    assert server._wall(FEW, [answered([0.5, 0.6], 2), failed]) == pytest.approx(0.61)


# ---- streams that are awkward ---------------------------------------------------------------------------------------


def test_usage_counts_and_not_chunks(serve):
    many = [ROLE, chunk(" a b c"), chunk(""), chunk(" d e"), chunk(), chunk(" f"), chunk(finish="stop")]
    fake = serve(openai(lambda request: stream(*many, sse({"choices": [], "usage": usage(6)}), DONE, gap=0.004)))
    figures = measure(fake)
    for line in figures["requests"]:
        assert (line["chunks"], line["completion_tokens"]["value"], line["counts"]) == (3, 6, "usage")
    assert figures["inter_token"]["value"] is None
    assert figures["options"]["finish_reasons"] == {"stop": 2}
    assert figures["client_tok_s"]["value"] > 0


def test_thinking_is_output(serve):
    thinking = [sse({"choices": [{"delta": {key: "hm"}}]}) for key in ("reasoning_content", "reasoning")]
    pieces = [ROLE, *thinking, chunk(" so", "length", usage=usage(3)), DONE]
    figures = measure(serve(openai(lambda request: stream(*pieces, gap=0.004))))
    assert figures["requests"][0]["chunks"] == 3
    assert figures["one_token_a_chunk"]["value"] is True


@pytest.mark.parametrize(("shown", "hidden"), [([], 56), (["hm"] * 56, 0)])
@pytest.mark.parametrize("in_stream", [True, False])
def test_thinking_is_hidden_if_no_chunk_shows_it(serve, shown, hidden, in_stream):
    told = usage(64, completion_tokens_details={"reasoning_tokens": 56})
    thinking = [sse({"choices": [{"delta": {"reasoning_content": text}}]}) for text in shown]
    last = chunk(finish="length", **({"usage": told} if in_stream else {}))

    def answer(request: Request) -> Pieces:
        if request.body["stream"]:
            return stream(*thinking, *words(8), last, DONE, gap=0.001)
        return whole({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": told})

    figures = measure(serve(openai(answer)))
    line = figures["requests"][0]
    assert (line["hidden_tokens"]["value"], line["completion_tokens"]["value"]) == (hidden, 64)
    each_token = [line["first_to_last_ms"]["value"] / (64 - hidden - 1) for line in figures["requests"]]
    assert figures["time_per_output_token"]["samples"] == pytest.approx(each_token, rel=1e-4)
    assert figures["one_token_a_chunk"]["value"] is True


def test_completions_without_a_template(serve):
    pieces = [sse({"choices": [{"text": f" w{i}", "finish_reason": None}], "usage": None}) for i in range(3)]
    last = sse({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage(3)})
    fake = serve(openai(lambda request: stream(*pieces, last, DONE, gap=0.004)))
    figures = measure(fake, endpoint="completion")
    assert figures["endpoint"] == "/v1/completions"
    assert figures["requests"][0]["chunks"] == 3
    assert "messages" not in fake.requests[-1].body
    assert isinstance(fake.requests[-1].body["prompt"], str)


def test_lines_in_pieces_comments_and_crlf(serve):
    """Pieces that end inside a line, and inside a character; CR LF; pings; a field name and data without a space."""
    text = (": ping\r\n\r\nevent: message\r\n" + plain(3).decode() + "\r\n").replace("word1", "wörd1")
    data = text.replace("\\u00f6", "ö").replace("\n\n", "\r\n\r\n").replace("data: ", "data:").encode()
    pieces = [data[i : i + 7] for i in range(0, len(data), 7)]
    figures = measure(serve(openai(lambda request: stream(*pieces))))
    assert [line["chunks"] for line in figures["requests"]] == [3, 3]


def test_llama_cpp_tells_its_own_times(serve):
    timings = {"cache_n": 8, "prompt_n": 32, "prompt_ms": 16.0, "predicted_n": 4, "predicted_ms": 50.0}
    last = chunk(finish="length", timings=timings)
    pieces = [ROLE, *words(4), last, sse({"choices": [], "usage": usage(4), "timings": timings}), DONE]
    figures = measure(serve(openai(lambda request: stream(*pieces, gap=0.004))))
    rows = {(row["name"], row["boundary"]): row for row in figures["rows"]}
    assert rows["pp32", "server"]["tok_s"]["value"] == pytest.approx(2000)
    assert rows["tg8", "server"]["tok_s"]["value"] == pytest.approx(80)
    assert rows["tg8", "server"]["latency"]["median"]["value"] == pytest.approx(12.5)
    assert figures["requests"][0]["cached_tokens"]["value"] == 8
    client = rows["pp32", "client"]
    assert client["tok_s"]["value"] * client["latency"]["median"]["value"] == pytest.approx(32e3, rel=0.5)


def test_without_any_usage_chunks_are_no_count(serve):
    def answer(request: Request) -> Pieces:
        if request.body["stream"]:
            return stream(*words(4), chunk(finish="stop"), DONE, gap=0.004)
        return whole({"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]})

    fake = serve(openai(answer))
    figures = measure(fake)
    assert figures["client_tok_s"]["value"] is None
    assert "sent no usage" in figures["client_tok_s"]["reason"]
    assert figures["throughput"]["output_tok_s"]["value"] is None
    assert [line["chunks"] for line in figures["requests"]] == [4, 4]
    assert figures["inter_chunk"]["n"] == 6
    assert figures["client_first_token_ms"]["value"] > 0
    assert sum(not request.body["stream"] for request in fake.requests if request.body) == 1  # asked once, not again


@pytest.mark.parametrize(
    ("finish", "text", "known"), [("stop", " word0 word1", True), ("stop", "other", False), ("length", "other", True)]
)
def test_counts_without_a_stream_are_of_the_same_output(serve, finish, text, known):
    def answer(request: Request) -> Pieces:
        if request.body["stream"]:
            return stream(*words(2), chunk(finish=finish), DONE, gap=0.004)
        return whole({"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage(2)})

    line = measure(serve(openai(answer)))["requests"][0]
    assert line["prompt_tokens"]["value"] == 40
    assert line["completion_tokens"]["value"] == (2 if known else None)
    assert known or "another text" in line["completion_tokens"]["reason"]


# ---- servers that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (stream(ROLE, *words(2), sse({"error": {"message": "out of memory", "code": 500}})), "after 2 chunks: out of"),
        (stream(*words(1), b'error: {"code":500,"message":"slot lost"}\n\n'), "after 1 chunks: slot lost"),
        (stream(*words(3)), "cut off after 3 chunks"),
        (stream(*words(3), DONE), "cut off after 3 chunks"),  # llama-cpp-python, when another request comes
        (stream(ROLE, chunk(finish="stop"), DONE), "no output came, finished by 'stop'"),
        (stream(b"data: {not json}\n\n"), "after 0 chunks: no JSON came: ' {not json}'"),
        (stream(sse({"choices": "strange"})), "not what OpenAI's API says"),
        (stream(sse([1, 2])), "not what OpenAI's API says"),
        ([(0, head("text/html") + b"<html>Welcome</html>")], "no server-sent event came but text/html: '<html>Wel"),
        (whole({"choices": []}), "no server-sent event came but application/json"),
        (
            whole({"error": {"message": "model is busy"}}, "503 Service Unavailable"),
            "status 503 Service Unavailable: mod",
        ),
        (whole({"detail": "Not Found"}, "404 Not Found"), "status 404 Not Found: Not Found"),
        (
            [(0, head("text/plain", "500 Internal Server Error") + b"Traceback\nof a bug")],
            r"status 500 .*'Traceback\\n",
        ),
        ([(0, head("text/html", "301 Moved", "Location: https://elsewhere/v1"))], "has moved to https://elsewhere/v1"),
        ([(0, b"SSH-2.0-OpenSSH_9.6\r\n")], "no HTTP: BadStatusLine"),
        ([(0, b"")], "closed the connection in the middle"),
        (
            [(0, head("text/event-stream", "200 OK", "Transfer-Encoding: chunked") + b"40\r\ndata: {")],
            "closed the conn",
        ),
    ],
)
def test_a_request_that_fails_is_a_line_and_no_figure(serve, bad, said):
    fake = serve(after_warm_up(stream(plain()), bad))
    figures = measure(fake)
    assert sorted(figures["requests"][0]) == ["error", "request"]
    assert re.search(said, errors(figures)[0])
    assert errors(figures)[0].startswith(f"POST {fake.url[7:]}/v1/chat/completions: ")
    assert figures["time_to_first_token"]["n"] == figures["throughput"]["answered"] == 1
    made = server.report(server.Server(fake.url, "openai"), FEW, figures, "")
    assert made["errors"] == {"server/request 1": {"reason": errors(figures)[0], "traceback": ""}}


def test_a_connection_that_is_reset(serve):
    assert "closed the connection in the middle" in failing(serve(openai(lambda r: stream(*words(2))), reset=True))


def test_all_requests_fail(serve):
    answers = iter([stream(plain()), *2 * [whole({"error": "full"}, "429 Too Many Requests")]])
    said = failing(serve(openai(lambda request: next(answers))))
    assert "none of 2 requests was answered" in said
    assert "status 429 Too Many Requests: full" in said


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(server.ServerError, match=f"^{url}: connection refused: no server listens there$"):
        ask(server.Server(url, "openai"), FEW)


def test_silence_ends_at_the_limit(serve):
    """Pings keep a connection alive for ever; the limit is of the whole request."""
    fake = serve(openai(lambda request: stream(*60 * [b": ping\n\n"], gap=0.05)))
    start = time.perf_counter()
    with pytest.raises(server.ServerError, match=r"not finished after 0\.4 s"):
        ask(server.Server(fake.url, "openai", timeout_s=0.4), FEW)
    assert time.perf_counter() - start < 2.5  # the pings go on for 3 s


def test_a_head_that_does_not_end_ends_at_the_limit(serve):
    drip = [(0.05, b"HTTP/1.1 200 OK\r\n"), *60 * [(0.05, b"X-Wait: 1\r\n")]]
    start = time.perf_counter()
    with pytest.raises(server.ServerError, match=r"not finished after 0\.4 s"):
        ask(server.Server(serve(openai(lambda request: drip)).url, "openai", timeout_s=0.4))
    assert time.perf_counter() - start < 2.5  # the head goes on for 3 s


@pytest.fixture
def certificate(tmp_path):
    """Of 127.0.0.1, signed by itself, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path / "certificate.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *options.split(), "-keyout", path, "-out", tmp_path / "c"], check=True, capture_output=True
    )
    path.write_bytes(path.read_bytes() + (tmp_path / "c").read_bytes())
    return path


def test_https(serve, certificate, monkeypatch):
    fake = serve(openai(lambda request: stream(plain())), certificate=certificate)
    where = server.Server(fake.url, "openai", timeout_s=20)
    with pytest.raises(server.ServerError, match=r"certificate is not trusted: self.signed"):
        ask(where, FEW)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert errors(ask(where, FEW)) == []


def test_https_to_a_server_without_it(serve):
    fake = serve(openai(lambda request: stream(plain())))
    with pytest.raises(server.ServerError, match=r"no TLS: .*; is it http instead of https"):
        ask(server.Server(fake.url.replace("http", "https"), "openai", timeout_s=5), FEW)


def test_ollama_errors(serve):
    tags = {"models": [{"name": "m"}]}
    for bad, said in (
        (b'{"error":"model \'m\' not found"}\n', "after 0 chunks: model 'm' not found"),
        (b"<html>", "no line of Ollama's came but application/x-ndjson: '<html>'"),
        (b'{"choices": []}\n', "no line of Ollama's came"),
        (b'{"message":{"content":"a"},"done":false}\n', "cut off after 1 chunks"),
    ):
        line = head("application/x-ndjson") + bad
        fake = serve(lambda r, line=line: [(0, line)] if r.method == "POST" else whole(tags))
        assert said in failing(fake, api="ollama")


# ---- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity"])
def test_a_server_that_refuses_extras_is_asked_without(serve, status):
    def answer(request: Request) -> Pieces:
        if "ignore_eos" in request.body:
            return whole({"error": {"message": "unknown field ignore_eos"}}, status)
        return stream(plain())

    fake = serve(openai(answer))
    figures = measure(fake)
    assert figures["options"]["refused"] == "ignore_eos"
    assert figures["options"]["sent"] == "stream_options"
    assert errors(figures) == []
    assert sum("ignore_eos" in request.body for request in fake.requests if request.body) == 1


def test_a_server_that_refuses_everything(serve):
    fake = serve(openai(lambda request: whole({"error": {"message": "no template"}}, "400 Bad Request")))
    assert "status 400 Bad Request: no template" in failing(fake)


def test_prompts_differ_from_their_first_word(serve):
    fake = serve(openai(lambda request: stream(plain())))
    measure(fake, server.Plan(requests=20, warm_up=2, max_tokens=8, prompt_tokens=32))
    prompts = [request.body["messages"][0]["content"] for request in fake.requests if request.body]
    assert len(prompts) == 22
    assert len({prompt.split()[0] for prompt in prompts}) == 22
    assert fake.requests[-1].body["temperature"] == 0
    assert fake.requests[-1].body["max_tokens"] == 8


def test_prompts_of_another_run_differ(serve):
    fake = serve(openai(lambda request: stream(plain())))
    measure(fake)
    measure(fake)
    prompts = [request.body["messages"][0]["content"] for request in fake.requests if request.body]
    assert len(set(prompts)) == 6


def test_model_is_the_first_or_the_named(serve):
    fake = serve(openai(lambda request: stream(plain())))
    assert measure(fake)["model"] == "tiny"
    assert measure(fake, model="other")["model"] == fake.requests[-1].body["model"] == "other"


@pytest.mark.parametrize("said", [whole({"detail": "Not Found"}, "404 Not Found"), whole({"data": 7}), whole([1])])
def test_no_list_of_models(serve, said):
    fake = serve(lambda r: stream(plain()) if r.method == "POST" else said)
    assert "lists no model, name one" in failing(fake)
    assert measure(fake, model="mine")["model"] == "mine"


def test_engines_that_tell(serve):
    def server_of(path: str, found: Any, owner: str = "me") -> Callable[[Request], Pieces]:
        meta = {"n_params": 134515008, "size": 98362432}

        def answer(request: Request) -> Pieces:
            if request.method == "POST":
                return stream(plain())
            if request.path == "/v1/models":
                return whole({"data": [{"id": "m", "owned_by": owner, "meta": meta}]})
            return whole(found) if request.path == path else whole({}, "404 Not Found")

        return answer

    llama = measure(serve(server_of("/props", {"build_info": "b4567-abc"})))
    assert llama["engine"]["value"] == "llama.cpp b4567-abc"
    assert llama["weights"]["bytes"] == {"value": 98362432, "unit": "bytes"}
    assert measure(serve(server_of("/version", {"version": "0.9.1"}, "vllm")))["engine"]["value"] == "vLLM 0.9.1"
    nobody = measure(serve(server_of("/none", {})))["engine"]
    assert nobody["value"] is None
    assert nobody["reason"]


@pytest.mark.parametrize("odd", [["x"], "x", 3, {"size": "big", "n_params": [1]}])
def test_a_list_of_models_that_tells_odd_things(serve, odd):
    listed = {"data": [{"id": "m", "meta": odd, "details": odd}]}
    fake = serve(lambda r: stream(plain()) if r.method == "POST" else whole(listed))
    weights = measure(fake)["weights"]
    assert {figure["value"] for figure in weights.values()} == {None}


@pytest.mark.parametrize("odd", ["x", [1], {"a": 1}, True, -1, float("inf")])
def test_an_answer_that_tells_odd_things(serve, odd):
    """Neither a count nor a time: nobody told one."""
    timings = dict.fromkeys(("cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms"), odd)
    last = chunk(finish="length", timings={**timings, "prompt_n": 3}, usage=dict.fromkeys(usage(8), odd))
    fake = serve(openai(lambda request: stream(*words(8), last.replace(b'"length"', b'["length"]'), DONE, gap=0.002)))
    figures = measure(fake)
    assert errors(figures) == []
    assert figures["client_tok_s"]["value"] is figures["requests"][0]["cached_tokens"]["value"] is None
    assert {row["boundary"] for row in figures["rows"]} == {"client"}


def test_url_may_end_with_v1_and_have_a_path(serve):
    fake = serve(lambda request: stream(plain()) if request.method == "POST" else whole({"data": [{"id": "m"}]}))
    ask(server.Server(fake.url + "/proxy/v1/", "openai"), FEW)
    assert {r.path for r in fake.requests if r.method == "POST"} == {"/proxy/v1/chat/completions"}


@pytest.mark.parametrize(
    "url",
    ["localhost:8080", "ftp://x", "http://", "http://x:99999", "http://me:pw@x", "http://x?api_key=1", "http://x/\n"],
)
def test_urls_that_are_none(url):
    with pytest.raises(ArgumentValueError) as caught:
        server.Server(url, "openai")
    assert "url" in str(caught.value)
    assert "pw" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"requests": 0}, {"warm_up": 0}, {"max_tokens": 1}, {"prompt_tokens": 8}, {"concurrency": 0}, {"concurrency": 21}],
)
def test_plans_that_are_none(wrong):
    with pytest.raises(ArgumentValueError, match=next(iter(wrong))):
        server.Plan(**wrong)


def test_servers_that_are_none():
    limits = [{"timeout_s": limit} for limit in (0.0, float("nan"), float("inf"), 1e10)]
    for wrong in ({"api": "grpc"}, {"endpoint": "embeddings"}, {"api_key": "a\nb"}, *limits):
        with pytest.raises(ArgumentValueError, match=next(iter(wrong))):
            server.Server(**{"url": "http://x", "api": "openai", **wrong})


# ---- the key --------------------------------------------------------------------------------------------------------


def test_key_is_sent_and_never_written(serve):
    echoes = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
    fake = serve(after_warm_up(stream(plain()), whole(echoes, "401 Unauthorized")))
    where = server.Server(fake.url, "openai", api_key=KEY)
    figures = ask(where, FEW)
    made = server.report(where, FEW, figures, f"edgellm bench server --api-key {KEY}")
    assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in fake.requests)
    assert KEY not in json.dumps(made)
    assert "***" in made["command"]
    assert "Incorrect API key provided: ***" in errors(figures)[0]
    assert KEY not in repr(where)


def test_without_a_key_none_is_sent(serve):
    fake = serve(openai(lambda request: stream(plain())))
    measure(fake)
    assert all("authorization" not in request.headers for request in fake.requests)


# ---- rows, threads, Ctrl-C ------------------------------------------------------------------------------------------


SIDE_BY_SIDE = server.Plan(requests=6, warm_up=1, max_tokens=8, prompt_tokens=32, concurrency=2)


def kept_in(folder: Path) -> list[str]:
    """Keys of the rows that are on the disk."""
    return [row["key"] for row in journal.read(folder / journal.FILE)[1]]


def test_requests_side_by_side(serve, tmp_path):
    """Two at a time: the server holds every request until a second one is there, or gives up."""
    both = threading.Barrier(2, timeout=20)
    warm = iter([True])

    def answer(request: Request) -> Pieces:
        if not next(warm, False):
            both.wait()
        return stream(*words(8), chunk(finish="length", usage=usage(8)), DONE, gap=0.002)

    rows = Journal.open(tmp_path, {"run": 1})
    figures = ask(server.Server(serve(openai(answer)).url, "openai", timeout_s=30), SIDE_BY_SIDE, journal=rows)
    assert errors(figures) == []
    assert sorted(kept_in(tmp_path)) == [f"server/request {number}" for number in range(1, 7)]
    assert schema.check(tmp_path / journal.FILE) == []
    throughput = figures["throughput"]
    assert throughput["answered"] == 6
    wall = throughput["wall"]["value"]
    assert throughput["requests_s"]["value"] == pytest.approx(6 / wall)
    assert throughput["output_tok_s"]["value"] == pytest.approx(48 / wall)
    assert wall < sum(line["total_ms"]["value"] for line in figures["requests"]) / 1e3


def test_requests_side_by_side_are_kept_as_they_are_answered(serve, tmp_path):
    """The server sends the last answer when the row of another one is on the disk."""
    rows = Journal.open(tmp_path, {"run": 1})
    seen: list[int] = []

    def answer(request: Request) -> Pieces:
        if len(fake.sent) == SIDE_BY_SIDE.warm_up + SIDE_BY_SIDE.requests:
            end = time.perf_counter() + 10
            while not kept_in(tmp_path) and time.perf_counter() < end:
                time.sleep(0.01)
            seen.append(len(kept_in(tmp_path)))
        return stream(plain())

    fake = serve(openai(answer))
    ask(server.Server(fake.url, "openai", timeout_s=30), SIDE_BY_SIDE, journal=rows)
    assert min(seen) > 0


def interrupting(at: str) -> Callable[[str], None]:
    """Progress that is interrupted by Ctrl-C at a step that begins so."""

    def progress(step: str) -> None:
        if step.startswith(at):
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_loses_no_request_of_those_side_by_side(serve, tmp_path):
    numbers = itertools.count()
    goes_on = threading.Event()

    def answer(request: Request) -> Pieces:
        if next(numbers) >= SIDE_BY_SIDE.warm_up + 4:
            goes_on.wait(20)
        return stream(plain())

    rows = Journal.open(tmp_path, {"run": 1})
    where = server.Server(serve(openai(answer)).url, "openai", timeout_s=30)
    first = ask(where, SIDE_BY_SIDE, interrupting("3 of 6 requests answered"), rows)
    goes_on.set()
    rows.close()
    assert first["interrupted"] is True
    assert len(first["requests"]) == first["time_to_first_token"]["n"] == len(kept_in(tmp_path)) >= 3
    assert "not asked in one go" in first["client_requests_s"]["reason"]
    assert first["throughput"]["output_tok_s"]["value"] is None

    kept = len(kept_in(tmp_path))
    rows = Journal.open(tmp_path, {"run": 1}, resume=True)
    fake = serve(openai(lambda request: stream(plain())))
    again = ask(server.Server(fake.url, "openai", timeout_s=20), SIDE_BY_SIDE, journal=rows)
    assert again["interrupted"] is False
    assert len(rows.taken) == kept
    assert len(fake.sent) == SIDE_BY_SIDE.warm_up + 6 - kept
    assert [line["request"] for line in again["requests"]] == [1, 2, 3, 4, 5, 6]
    assert set(first["time_to_first_token"]["samples"]) <= set(again["time_to_first_token"]["samples"])
    assert (again["throughput"]["answered"], again["client_requests_s"]["value"]) == (6, None)


def test_counts_are_not_asked_for_beside_other_requests(serve, tmp_path):
    def answer(request: Request) -> Pieces:
        if request.body["stream"]:
            return stream(*words(8), chunk(finish="length"), DONE, gap=0.002)
        return whole({"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": usage(8)})

    def of_streams(fake: FakeServer) -> list[bool]:
        return [request.body["stream"] for request in fake.requests if request.body]

    fake = serve(openai(answer))
    where = server.Server(fake.url, "openai", timeout_s=20)
    assert ask(where, SIDE_BY_SIDE)["client_tok_s"]["value"] > 0
    assert of_streams(fake) == 7 * [True] + 6 * [False]

    fake = serve(openai(answer))
    where = server.Server(fake.url, "openai", timeout_s=20)
    rows = Journal.open(tmp_path, {"run": 1})
    first = ask(where, SIDE_BY_SIDE, interrupting("5 of 6"), rows)
    rows.close()
    assert first["client_tok_s"]["reason"] == INTERRUPTED
    assert False not in of_streams(fake)
    resumed = ask(where, SIDE_BY_SIDE, journal=Journal.open(tmp_path, {"run": 1}, resume=True))
    assert [line["completion_tokens"]["value"] for line in resumed["requests"]] == 6 * [8]
    assert of_streams(fake).count(False) == 6


def test_rows_that_are_kept_are_not_asked_again(serve):
    fake = serve(openai(lambda request: stream(plain())))
    rows = Journal()
    where = server.Server(fake.url, "openai")
    first = ask(where, journal=rows)
    asked = len(fake.sent)
    again = ask(where, journal=rows)
    assert len(fake.sent) == asked + FEW.warm_up
    assert again["time_to_first_token"]["samples"] == first["time_to_first_token"]["samples"]


def test_ctrl_c_keeps_what_was_answered(serve):
    fake = serve(openai(lambda request: stream(plain())))
    plan = server.Plan(requests=5, warm_up=1, max_tokens=8, prompt_tokens=32)

    where = server.Server(fake.url, "openai")
    figures = ask(where, plan, interrupting("request 4 of 5"))
    assert (figures["interrupted"], len(figures["requests"])) == (True, 3)
    assert server.report(where, plan, figures, "")["interrupted"] is True
    with pytest.raises(KeyboardInterrupt):
        ask(where, plan, interrupting("warm-up"))


def interrupted_run(fake: FakeServer, *more: str) -> list[str]:
    """The arguments of a run in out/ whose first request alone was answered."""
    arguments = ["bench", "server", "--url", fake.url, "--api", "openai", "--requests", "2", "--max-tokens", "8"]
    arguments += ["--prompt-tokens", "32", "--warm-up", "1", "--out", "out", *more]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 6, done.output
    return [*arguments, "--resume"]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"id": "b", "meta": {"size": 7}}, 'model was "a", and is "b" now'),
        ({"id": "a", "meta": {"size": 8}}, "weights bytes was 7, and is 8 now"),
        ({"id": "a", "meta": {"size": 7}, "owned_by": "vllm"}, 'engine was null, and is "vLLM of unknown version" now'),
        ({"id": "a", "meta": {"size": 7}, "refuses": "ignore_eos"}, 'refused was [], and is ["ignore_eos"] now'),
    ],
)
def test_requests_of_two_servers_are_no_run(serve, tmp_path, monkeypatch, now, said):
    monkeypatch.chdir(tmp_path)
    listed: dict[str, Any] = {"id": "a", "meta": {"size": 7}}
    answers = iter([stream(plain()), stream(plain()), whole({"error": "no"}, "500 Oops")])

    def answer(request: Request) -> Pieces:
        if request.method == "POST":
            refused = listed.get("refuses") in request.body
            return whole({"error": "no"}, "400 Bad Request") if refused else next(answers, stream(plain()))
        return whole({"data": [listed]}) if request.path == "/v1/models" else whole({}, "404 Not Found")

    resume = interrupted_run(serve(answer))
    listed |= now
    done = CliRunner().invoke(cli.app, resume)
    assert done.exit_code == 2, done.output
    assert f"out/rows.jsonl: cannot be resumed: {said}" in done.stderr


def test_a_run_goes_on_with_another_limit_of_time(serve, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = iter([stream(plain()), stream(plain()), stream(*words(3), gap=0.3)])
    resume = interrupted_run(serve(openai(lambda request: next(answers, stream(plain())))), "--timeout", "0.5")
    done = CliRunner().invoke(cli.app, [*resume, "--timeout", "20"])
    assert done.exit_code == 0, done.output
    made = json.loads(Path("out/report.json").read_text())
    assert (made["resumed_rows"], len(made["parts"]["server"]["requests"])) == (1, 2)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_is_whole(serve, tmp_path):
    fake = serve(openai(lambda request: stream(plain())))
    where = server.Server(fake.url, "openai")
    made = server.report(where, FEW, ask(where, FEW), "edgellm bench server")
    (tmp_path / "report.json").write_text(json.dumps(made, allow_nan=False))
    assert report.load(tmp_path / "report.json") == made
    assert schema.faults(made) == []
    assert list(made["summary"]) == list(report.KEYS)
    assert made["summary"]["model_name"]["value"] == "tiny"
    assert all(is_metric(figure) for figure in made["summary"].values())
    text = markdown.markdown(made)
    assert "tiny" in text
    assert "tg8" in text
    assert fake.url in text


def test_requests_that_fail_alike_are_one_error(serve):
    bad = whole({"error": "full"}, "429 Too Many Requests")
    answers = iter([stream(plain()), bad, stream(plain()), bad, whole({"error": "gone"}, "410 Gone")])
    plan = server.Plan(requests=4, warm_up=1, max_tokens=8, prompt_tokens=32)
    fake = serve(openai(lambda request: next(answers)))
    found = server.report(server.Server(fake.url, "openai"), plan, measure(fake, plan), "")["errors"]
    assert list(found) == ["server/request 1", "server/request 4"]
    assert found["server/request 1"]["reason"].endswith("full; 2 requests alike")
    assert found["server/request 4"]["reason"].endswith("gone")
