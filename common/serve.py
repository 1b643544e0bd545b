"""Serve OpenAI's completions API on this machine, with continuous batching.

    POST /v1/completions    GET /v1/models    GET /health

The main thread steps the batch; a free slot goes to the row that has waited longest. One thread per
connection turns a request into rows and waits for them. With a seed, choice i of a request is
sample i of `sample.py --samples N --seed SEED`. Fields that would have to be ignored are refused,
and so is another model's name; max_tokens is capped at the context, as in sample.py.

Web pages cannot use it: browsers block cross-site JSON requests, and a non-local Host header (DNS
rebinding) is refused.
"""

import contextlib
import json
import queue
import re
import secrets
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from common.config import UserError, printable

MAX_BYTES, MAX_CHOICES, MAX_STOPS = 2**24, 4096, 64  # per request
SILENCE_S, LOOK_S = 60, 0.5  # client timeout; interval between checks that it is still connected
EXAMPLE = """curl {}/completions -H 'Content-Type: application/json' -d '{{"prompt": "def f("}}'"""
FIELDS = {  # request fields and defaults; a value must have the default's type, or MORE_TYPES'
    "model": "", "user": "", "prompt": "", "max_tokens": 16, "temperature": 1.0, "top_p": 1.0,
    "n": 1, "stop": [], "seed": 0, "stream": False, "echo": False, "stream_options": {},
}  # fmt: skip
MORE_TYPES = {"prompt": list, "stop": str, "temperature": int, "top_p": int}
NEUTRAL = {"suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0}


class Refused(UserError):
    """Error response to a request; `param` is the offending field."""

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status, self.param = status, param


def read(body: bytes, model: str) -> dict:
    """Parse a request into a value per FIELDS. Raise Refused if any of it cannot be honoured."""
    try:
        got = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is not JSON: {e}") from None
    if not isinstance(got, dict):
        raise Refused("the body is not a JSON object; send one with a prompt")
    got = {name: value for name, value in got.items() if value is not None}
    asked = {**FIELDS, "model": model, "seed": secrets.randbits(64), **got}

    def want(name: str, ok: bool, what: str, status: int = 400) -> None:
        if not ok:
            raise Refused(f"{name:.60} is {asked[name]!r:.60}, want {what}", status, name)

    for name, value in got.items():
        if name not in FIELDS:
            same = value == (asked["n"] if name == "best_of" else NEUTRAL.get(name))
            want(name, same, "it omitted: it is not supported")
        else:
            kind, more = type(FIELDS[name]), MORE_TYPES.get(name)
            told = f"{kind.__name__} or {more.__name__}" if more else kind.__name__
            want(name, type(value) in (kind, more), told)
    want("model", asked["model"] == model, repr(model), 404)
    want("n", 1 <= asked["n"] <= 128, "1 to 128")
    want("max_tokens", asked["max_tokens"] >= 1, "1 or more")
    options, stop, prompt = asked["stream_options"], asked["stop"], asked["prompt"]
    want("stream_options", options.keys() <= {"include_usage"}, "only include_usage")
    asked["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    fine = len(stop) <= MAX_STOPS and all(isinstance(x, str) for x in stop)
    want("stop", fine or isinstance(stop, str), f"a text or a list of up to {MAX_STOPS}")
    asked["prompt"] = [prompt] if isinstance(prompt, str) or tokens(prompt) else prompt
    fine = all(isinstance(x, str) or tokens(x) for x in asked["prompt"])
    want("prompt", fine, "a text, a list of tokens, or a list of these")
    count = len(asked["prompt"]) * asked["n"]
    want("prompt", 1 <= count <= MAX_CHOICES, f"1 to {MAX_CHOICES} completions, n for each prompt")
    return asked


def tokens(x) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(type(i) is int for i in x)


class Server(ThreadingHTTPServer):
    """HTTP server on 127.0.0.1:port that steps `batch`, a sample.Batch, for its requests."""

    request_queue_size = 128

    def __init__(self, batch, model: str, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.batch, self.model = batch, model
        self.arrivals: queue.SimpleQueue = queue.SimpleQueue()  # rows of a request; None to stop

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*args)

    def run(self) -> None:
        """Serve until `arrivals` yields None, or an interrupt."""
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()
        try:
            while self.step():
                pass
        finally:
            self.shutdown()
            self.server_close()
            self.drop(Refused("the server is stopping", 503))

    def step(self) -> bool:
        """Queue new rows and step the batch; return False to stop."""
        batch = self.batch
        with contextlib.suppress(queue.Empty):
            while True:  # the timeout lets a signal that arrives just before the wait through
                idle = not (batch.rows or batch.waiting)
                if (rows := self.arrivals.get(idle, LOOK_S)) is None:
                    return False
                batch.waiting.extend(rows)
        try:
            for row in batch.step():
                news, stream = row.owner
                if row.done or stream:
                    news.put((row.index, batch.generator.settled(row), row.done))
        except Exception as e:
            traceback.print_exc()
            self.drop(Refused(f"the model failed: {e!r:.200}", 500))
        return True

    def drop(self, why: Refused) -> None:
        """Fail all running and waiting rows with `why`."""
        for row in [*self.batch.rows, *self.batch.waiting]:
            row.owner[0].put(why)
        self.batch.rows.clear()
        self.batch.waiting.clear()


class Handler(BaseHTTPRequestHandler):
    """Handler for the requests of one connection."""

    protocol_version, timeout, disable_nagle_algorithm = "HTTP/1.1", SILENCE_S, True
    streams = False  # a stream ends with the connection

    def do_POST(self) -> None:
        start, self.status, self.counts = time.monotonic(), 200, ""
        try:
            self.route()
        except (ConnectionError, TimeoutError):
            self.close_connection, self.status = True, "client left"
        except UserError as e:
            self.send_error(getattr(e, "status", 400), str(e), getattr(e, "param", None))
        except Exception as e:
            traceback.print_exc()
            self.send_error(500, f"the server failed: {e!r:.200}")
        took = f"{self.status}, {self.counts}{time.monotonic() - start:.2f} s"
        sys.stderr.write(printable(f"{self.command} {self.path:.80}: {took}") + "\n")

    do_GET = do_POST

    def route(self) -> None:
        batch, host, path = self.server.batch, self.headers.get("Host", ""), self.path.split("?")[0]
        if not re.fullmatch(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", host, re.IGNORECASE):
            raise Refused(f"Host is {host!r:.60}, want 127.0.0.1 or localhost", 403)
        match self.command, path:
            case "POST", "/v1/completions":
                self.complete()
            case "GET", "/v1/models":
                model = {"object": "model", "owned_by": "nanophi", "created": 0}
                self.reply({"object": "list", "data": [{"id": self.server.model, **model}]})
            case "GET", "/health":
                self.reply({"status": "ok", "rows": len(batch.rows), "waiting": len(batch.waiting)})
            case _:
                here = "POST /v1/completions, GET /v1/models and GET /health"
                raise Refused(f"no {self.command} {path!r:.60} here; there are {here}", 404)

    def complete(self) -> None:
        kind, length = self.headers.get_content_type(), self.headers.get("Content-Length", "")
        if kind != "application/json":
            raise Refused(f"Content-Type is {kind!r:.60}, want application/json", 415)
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MAX_BYTES:
            raise Refused(f"Content-Length is {length!r:.20}, want 0 to {MAX_BYTES}", 413)
        asked = read(self.rfile.read(int(length)), self.server.model)
        generator, stream, n = self.server.batch.generator, asked["stream"], asked["n"]
        options = {name: asked[name] for name in ("temperature", "top_p", "stop", "seed")}
        rows, echo, news = [], [], queue.SimpleQueue()
        for prompt in asked["prompt"]:
            ids = prompt
            for _ in range(n):
                rows.append(generator.row(len(rows), ids, asked["max_tokens"], **options))
                rows[-1].owner, ids = (news, stream), rows[-1].ids  # encode a text only once
            text = prompt if isinstance(prompt, str) else generator.tokenizer.decode(prompt)
            echo += [text if asked["echo"] else ""] * n
        about = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion",
                 "created": int(time.time()), "model": self.server.model}  # fmt: skip
        choices = [{"index": row.index, "text": "", "logprobs": None} for row in rows]
        self.server.arrivals.put(rows)
        try:
            if stream:
                self.streams = self.close_connection = True
                self.head(200, {"Content-Type": "text/event-stream"})
            for index, text, done in self.until_done(rows, news):
                old, text = choices[index], echo[index] + text
                new = {**old, "text": text[len(old["text"]) :], "finish_reason": done or None}
                if stream and (new["text"] or done):
                    self.event({**about, "choices": [new]})
                choices[index] = {**new, "text": text}
        finally:
            for row in rows:
                row.done = row.done or "left"  # frees the slot if the client left
            asks, makes = sum(len(r.ids) for r in rows[::n]), sum(len(r.tokens) for r in rows)
            self.counts = f"{asks} prompt tokens, {makes} new, "
        usage = {"prompt_tokens": asks, "completion_tokens": makes, "total_tokens": asks + makes}
        if not stream:
            return self.reply({**about, "choices": choices, "usage": usage})
        if asked["stream_options"].get("include_usage"):
            self.event({**about, "choices": [], "usage": usage})
        self.event("[DONE]")

    def until_done(self, rows: list, news: queue.SimpleQueue) -> Iterator[tuple[int, str, str]]:
        """Yield (row index, text so far, why it ended or "") as they arrive, until all are done."""
        left, line = len(rows), select.poll()
        line.register(self.connection, select.POLLRDHUP)
        while left:
            with contextlib.suppress(queue.Empty):
                told = news.get(timeout=LOOK_S)
                if isinstance(told, Refused):
                    raise told
                left -= bool(told[2])
                yield told
            if line.poll(0):
                raise ConnectionAbortedError

    def event(self, data: dict | str) -> None:
        self.wfile.write(f"data: {data if data == '[DONE]' else json.dumps(data)}\n\n".encode())

    def reply(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.head(status, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def head(self, status: int, headers: dict) -> None:
        self.send_response(status)
        headers |= {"Connection": "close"} if self.close_connection else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, param: str | None = None) -> None:
        """Send an error response; http.server also calls this for requests it cannot parse."""
        self.status, self.close_connection = code, True  # the body may be unread
        kind = "invalid_request_error" if code < 500 or code == 501 else "server_error"
        error = {"message": message or "bad HTTP", "type": kind, "param": param, "code": None}
        if self.streams:
            return self.event({"error": error})
        self.reply({"error": error}, code)

    def log_message(self, *args) -> None:
        """Do nothing: `do_POST` logs."""


def serve(batch, model: str, port: int) -> None:
    """Serve `batch`, a sample.Batch, as `model` on 127.0.0.1:port until Ctrl-C or SIGTERM."""
    try:
        server = Server(batch, model, port)
    except OSError as e:
        told = f"cannot serve on port {port}: {e.strerror}"
        raise UserError(f"{told}; use another --port, or 0 for any free one") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    url, gb = f"http://127.0.0.1:{server.server_port}/v1", batch.decoder.cache.nbytes / 1e9
    print(f"{printable(model)} at {url}: {batch.size} rows, {gb:.2f} GB of cache; Ctrl-C stops it")
    print(EXAMPLE.format(url), flush=True)
    try:
        server.run()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
