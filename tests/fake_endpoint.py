"""A fake OpenAI-compatible endpoint on loopback that misbehaves like real ones.

The faults of a request, and their order, depend only on its body, so tests are reproducible. The
endpoint records every request and the tokens it would bill.
"""

import hashlib
import json
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

REFUSALS = ("429", "503", "408")  # not billed: no work was done
LOST = ("500", "drop", "half", "half json", "timeout", "error", "nested")  # may have been billed
FAULTS = (*REFUSALS, *LOST)
# Complete replies without text: (replacement for the good reply's choice, error name)
TEXTLESS = {
    "null": ({"message": {"content": None}}, "empty"),
    "blank": ({"message": {"content": " \n"}}, "empty"),
    "filter": ({"message": {"content": None}, "finish_reason": "content_filter"}, "filtered"),
    "refusal": ({"message": {"content": None, "refusal": "I can't."}}, "refused by the model"),
    "thought": ({"message": {"content": "<think>Hm"}, "finish_reason": "length"}, "cut short"),
    "surrogate": ({"message": {"content": "\udc80"}}, "not Unicode"),
    "no choice": (None, "no choices"),
}
WHOLE = {  # status 200 bodies that are not an answer
    "error": b'{"error": {"code": 502}}', "nested": b"[" * 100_000,
    "stream": b'data: {"choices": []}', "page": b"<!DOCTYPE html>",
}  # fmt: skip


class FakeEndpoint:
    """`with FakeEndpoint(answer) as endpoint:` serves at endpoint.url.

    `answer(request)` returns the text of a good reply. `faults(request)` lists the faults to play
    before it: names in FAULTS, TEXTLESS or WHOLE, other statuses, "429 SECONDS", "finish REASON",
    "no usage" or "chatter". Default: up to `max_faults` of FAULTS, chosen by the request's hash.
    """

    def __init__(self, answer, faults=None, max_faults=0, delay_s=0.0, tokens=(50, 20)):
        pytest.importorskip("openai", reason="the client of endpoints is the openai package")
        self.answer, self.delay_s, self.tokens = answer, delay_s, tokens
        self.faults = faults or (lambda request: some_faults(request, max_faults))
        self.lock = threading.Lock()
        self.seen: Counter = Counter()  # requests by body, in canonical JSON
        self.replied: Counter = Counter()  # requests that got a complete good reply
        self.met: Counter = Counter()  # faults played
        self.billed = 0  # tokens
        self.in_flight = self.most_in_flight = 0
        self.keys: set = set()  # values of the Authorization header
        self.on_request = lambda body: None

    def __enter__(self):
        self.stopped = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def canonical(request: dict) -> bytes:
    return json.dumps(request, ensure_ascii=False, sort_keys=True).encode()


def some_faults(request: dict, most: int) -> list[str]:
    rng = random.Random(hashlib.sha256(canonical(request)).hexdigest())
    return [rng.choice(FAULTS) for _ in range(rng.randint(0, most))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # a killed client


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        fake = self.server.fake
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = canonical(request)
        with fake.lock:
            fake.keys.add(self.headers.get("Authorization"))
            nth = fake.seen[body]
            fake.seen[body] += 1
            fake.in_flight += 1
            fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
        fake.on_request(body)
        faults = fake.faults(request)
        fault = faults[nth] if nth < len(faults) else ""
        with fake.lock:
            fake.met[fault] += bool(fault)
            fake.billed += 0 if fault in REFUSALS or fault.startswith("4") else sum(fake.tokens)
        try:
            fake.stopped.wait(fake.delay_s)
            self.play(fault, request, body)
        finally:
            with fake.lock:
                fake.in_flight -= 1

    def play(self, fault: str, request: dict, body: bytes) -> None:
        fake = self.server.fake
        content = "Sure! I would give it a 7." if fault == "chatter" else fake.answer(request)
        choice = {"message": {"content": content}, "finish_reason": "stop"}
        if fault.startswith("finish"):
            choice["finish_reason"] = fault[7:]
        choice = TEXTLESS[fault][0] if fault in TEXTLESS else choice
        reply = {
            "choices": [choice] if choice else [],
            "usage": {"prompt_tokens": fake.tokens[0], "completion_tokens": fake.tokens[1]},
        }
        good = json.dumps(reply).encode()
        match fault.split():
            case ["chatter" | "finish", *_] | []:
                with fake.lock:
                    fake.replied[body] += 1
                self.send(200, good)
            case _ if fault in TEXTLESS:
                self.send(200, good)
            case [name] if name in WHOLE:
                self.send(200, WHOLE[name])
            case ["no", "usage"]:
                self.send(200, json.dumps({"choices": [choice]}).encode())
            case ["429", value]:
                self.send(429, b"slow down", {"Retry-After": value})
            case ["drop"]:
                self.close_connection = True
            case ["half"]:
                self.send(200, good[: len(good) // 2], {"Content-Length": str(len(good))})
                self.close_connection = True
            case ["half", "json"]:
                self.send(200, good[: len(good) // 2])
            case ["timeout"]:
                fake.stopped.wait(0.5)
            case ["307"]:
                self.send(307, b"", {"Location": "http://host:8000/v1/chat/completions"})
            case [status, *more]:
                key = self.headers.get("Authorization", "")  # some endpoints echo it
                told = json.dumps({"error": " ".join([key, *more])})
                self.send(int(status), told.encode())

    def send(self, status: int, body: bytes, headers=()):
        headers = {"Content-Length": str(len(body)), "Content-Type": "application/json",
                   **dict(headers)}  # fmt: skip
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
