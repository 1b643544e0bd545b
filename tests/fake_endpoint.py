"""An OpenAI-compatible endpoint on the loopback that misbehaves in every way that real ones do.

Which faults a request meets, and in what order, is a function of its body, so that a test can be
repeated. The endpoint keeps its own books: what it would bill, and every request it saw.
"""

import email.utils
import hashlib
import json
import random
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What costs the client nothing, as the endpoint says that it did no work.
REFUSALS = ("429", "429 seconds", "429 date", "503", "408")
# What may have been billed: the work was done, or begun.
LOST = (
    "500", "502", "drop", "half", "half chunked", "half json", "timeout", "drip", "html", "list",
    "no choices", "null content", "empty content", "surrogate", "nested", "not utf-8",
)  # fmt: skip
FAULTS = (*REFUSALS, *LOST)


class FakeEndpoint:
    """`with FakeEndpoint(answer) as endpoint:` serves at endpoint.url.

    `answer(request)` is the text of a good reply; `faults(request)` lists what goes wrong before
    it: names of FAULTS, or "no usage" or "chatter" for replies that are good HTTP. By default
    `max_faults` of FAULTS, chosen by the hash of the request.
    """

    def __init__(self, answer, faults=None, max_faults=0, delay_s=0.0, tokens=(50, 20)):
        self.answer, self.delay_s, self.tokens = answer, delay_s, tokens
        self.faults = faults or (lambda request: some_faults(request, max_faults))
        self.lock = threading.Lock()
        self.seen: Counter = Counter()  # requests by body
        self.replied: Counter = Counter()  # of them, those that got a whole good reply
        self.met: Counter = Counter()  # faults that were played
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


def some_faults(request: dict, most: int) -> list[str]:
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    rng = random.Random(digest)
    return [rng.choice(FAULTS) for _ in range(rng.randint(0, most))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # clients that were killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        fake = self.server.fake
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
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
        text = "Sure! I would give it a 7." if fault == "chatter" else fake.answer(request)
        usage = {"prompt_tokens": fake.tokens[0], "completion_tokens": fake.tokens[1]}
        reply = {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "usage": usage,
        }
        if fault == "length":
            reply["choices"][0]["finish_reason"] = "length"
        good = json.dumps(reply).encode()
        match fault:
            case "" | "chatter" | "length":
                with fake.lock:
                    fake.replied[body] += 1
                self.send(200, good)
            case "no usage":
                del reply["usage"]
                self.send(200, json.dumps(reply).encode())
            case "429 seconds":
                self.send(429, b'{"error": "slow down"}', {"Retry-After": "0.05"})
            case "429 date":
                when = email.utils.formatdate(time.time() + 0.05, usegmt=True)
                self.send(429, b"slow down", {"Retry-After": when})
            case "drop":
                self.close_connection = True
            case "half":
                self.send(200, good[: len(good) // 2], {"Content-Length": str(len(good))})
                self.close_connection = True
            case "half chunked":
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n%s" % (len(good), good[: len(good) // 2]))
                self.close_connection = True
            case "half json":
                self.send(200, good[: len(good) // 2])
            case "timeout":
                fake.stopped.wait(0.5)
            case "drip":
                self.send(200, b"", {"Content-Length": str(len(good))})
                for i in range(len(good)):
                    if fake.stopped.wait(0.1):
                        break
                    self.wfile.write(good[i : i + 1])
            case "html":
                self.send(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
            case "list":
                self.send(200, b'[{"choices": []}]')
            case "no choices":
                self.send(200, json.dumps({"choices": [], "usage": usage}).encode())
            case "null content" | "empty content" | "surrogate":
                contents = {"null content": None, "empty content": " ", "surrogate": "\udc80"}
                reply["choices"][0]["message"]["content"] = contents[fault]
                self.send(200, json.dumps(reply).encode())
            case "nested":
                self.send(200, b"[" * 100_000)
            case "not utf-8":
                self.send(200, good[:-1] + b"\xff}")
            case _:
                key = self.headers.get("Authorization", "")  # some endpoints repeat it
                self.send(int(fault), b'{"error": "' + key.encode() + b'"}')

    def send(self, status: int, body: bytes, headers=()):
        headers = {"Content-Length": str(len(body)), **dict(headers)}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
