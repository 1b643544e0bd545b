"""The completions server, through OpenAI's client: same texts as sample.py, under any load."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, save_run
from test_sample import Bytes

import sample
from common.serve import Server
from model import ModelConfig, Phi
from sample import Batch, Generator

openai = pytest.importorskip("openai")
JSON = {"Content-Type": "application/json"}
PROMPTS = ["def append_0(", "x", "class"]
ASKED = [
    dict(zip(("temperature", "top_p", "stop", "seed", "max_tokens"), row)) for row in (
        (0, 1, [], 0, 12), (1, 1, [], 7, 12), (1, 0.9, ["a", "9"], 7, 30), (0.7, 0.5, "e", -3, 5),
        (0, 0.5, ["i"], 1, 9), (2, 1, ["never"], 2**64, 40), (0, 1, [], 2, 1), (1, 0.2, [], 7, 20),
    )
]  # fmt: skip


def client(url: str):
    return openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=60)


@contextlib.contextmanager
def serving(generator: Generator, rows: int = 3):
    """Serve; yield the port and a function that requests completions with OpenAI's client."""
    server = Server(Batch(generator, rows, generator.context_tokens), "tiny", 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    with client(f"http://127.0.0.1:{server.server_port}/v1") as c:
        try:
            yield server.server_port, lambda **asked: c.completions.create(model="tiny", **asked)
        finally:
            server.arrivals.put(None)
            thread.join(60)
    assert not thread.is_alive()


def texts(completion) -> list[str]:
    """Return the texts of a completion, streamed or not."""
    found = {}
    for part in completion if isinstance(completion, openai.Stream) else [completion]:
        for choice in part.choices:
            found[choice.index] = found.get(choice.index, "") + choice.text
    return [found[index] for index in sorted(found)]


def test_requests_at_once_get_what_sample_gives_each_alone(generator):
    """More requests than rows, each with its own options, streamed and not."""
    ways = [(stream, asked) for stream in (False, True) for asked in ASKED]
    with serving(generator) as (_, create), ThreadPoolExecutor(len(ways)) as pool:
        got = list(pool.map(
            lambda way: texts(create(prompt=PROMPTS, n=2, stream=way[0], **way[1])), ways
        ))  # fmt: skip
    for (_, asked), answer in zip(ways, got):
        options = {**asked, "stop": tuple(asked["stop"])}
        new = options.pop("max_tokens")
        assert answer == generator.generate([p for p in PROMPTS for _ in "12"], new, **options)


def test_what_an_answer_says(generator):
    ids = generator.encode("x")
    with serving(generator) as (_, create):
        one = create(prompt="x", temperature=0, user="me")
        [choice], text = one.choices, one.choices[0].text
        assert (one.object, one.model) == ("text_completion", "tiny")
        assert choice.finish_reason == "length"
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (len(ids), 16)
        many = create(prompt=[ids, ids], n=2, best_of=2, temperature=0, stop=[text[3:5], "never"])
        assert [c.finish_reason for c in many.choices] == ["stop"] * 4
        assert (texts(many), many.usage.prompt_tokens) == ([text[:3]] * 4, 2 * len(ids))
        assert texts(create(prompt=ids, echo=True, temperature=0)) == ["x" + text]
        assert len({texts(create(prompt="x"))[0] for _ in range(5)}) > 1, "no seed"
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        *_, last = create(prompt="x", temperature=0, **usage)
        assert (last.choices, last.usage.total_tokens) == ([], len(ids) + 16)


REFUSED = {  # field named by the error: bad values of it
    None: [b"{", b"[]", b"[" * 10**5, b"\xff", {"prompt": "x y " * 200}, {"prompt": [512]},
           {"top_p": 0}, {"stop": ""}, {"temperature": float("nan")}, {"prompt": "\ud800"}],
    "prompt": [[], [[]], 1, [1, "x"]], "stop": [[1]], "stream_options": [{"x": True}], "n": [True],
    "max_tokens": [0], "temperature": ["1"], "seed": [0.5], "stream": [1], "logprobs": [0],
    "suffix": ["x"], "best_of": [2], "logit_bias": [{"1": 1}], "presence_penalty": [0.1],
    "top_k": [5], "messages": [[]], "model": ["gpt"],
}  # fmt: skip


def test_what_is_refused(generator):
    def ask(body=b"", method="POST", path="/v1/completions", **headers) -> tuple[int, dict]:
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        c.request(method, path, body, {"Content-Type": "application/json", **headers})
        with contextlib.closing(c), c.getresponse() as response:
            return response.status, json.load(response)

    with serving(generator) as (port, _):
        for param, values in REFUSED.items():
            for value in values:
                status, told = ask({param: value} if param else value)
                assert (status, told["error"]["param"]) == (404 if param == "model" else 400, param)
                assert told["error"].keys() == {"message", "type", "param", "code"}
        for status, request in {
            403: {"Host": "evil.example:8000"}, 404: {"path": "/v1/chat/completions"},
            501: {"method": "DELETE"}, 413: {"Content-Length": "99999999"},
            415: {"Content-Type": "text/plain"},
        }.items():  # fmt: skip
            got, told = ask({}, **request)
            assert (got, told["error"]["type"]) == (status, "invalid_request_error")
        for host in ("localhost", "[::1]:80", "127.0.0.1:1"):
            assert ask(method="GET", path="/health", Host=host)[1]["status"] == "ok"
        assert ask({"temperature": 10**400, "max_tokens": 1, "logit_bias": {}, "n": None})[0] == 200


class Endless:
    """Decoder that writes "é" forever, one byte at a time, or fails."""

    def __init__(self, model, *args):
        self.model = model

    def load(self, *args):
        self.at = 0

    def steps(self, rows, longest):
        assert self.model.training, "out of order"
        self.at += 1
        return [["é".encode()[(self.at - 1) % 2]]] * rows


@pytest.fixture
def endless():
    generator = Generator(Phi(ModelConfig(256, 64, 1, 1, 8, 8, 2)), Bytes())
    generator.new_decoder, generator.context_tokens = Endless, 10**5
    return generator


def test_a_client_that_leaves_frees_its_row(endless):
    with serving(endless, rows=1) as (port, create):
        stream = create(prompt="x", stream=True, max_tokens=10**5)
        assert [next(stream).choices[0].text for _ in range(3)] == ["é"] * 3
        waits = http.client.HTTPConnection("127.0.0.1", port)
        waits.request("POST", "/v1/completions", b'{"max_tokens": 100000}', JSON)
        stream.close()
        waits.close()
        assert texts(create(prompt="x", max_tokens=4)) == ["éé"]


def test_a_failure_is_told_and_over(endless):
    with serving(endless, rows=1) as (_, create), ThreadPoolExecutor(3) as pool:
        stream = create(prompt="x", stream=True, max_tokens=10**5)
        next(stream)
        answers = [pool.submit(create, prompt="x", max_tokens=10**5) for _ in range(3)]
        endless.model.eval()
        with pytest.raises(openai.APIError, match="the model failed"):
            list(stream)
        for answer in answers:
            with pytest.raises(openai.InternalServerError, match="out of order"):
                answer.result()
        endless.model.train()
        assert texts(create(prompt="x", max_tokens=2)) == ["é"]


def test_command(in_process, generator, tmp_path):
    run = save_run(tmp_path / "run", generator.model, generator.tokenizer)
    command = ["--checkpoint", str(run), "--device=cpu"]
    options = ["--temperature=1", "--seed=5", "--samples=3", "--max_new_tokens=16", "--prompt=x"]
    asked = in_process(sample.main, *command, *options)[1]
    server = subprocess.Popen(
        [sys.executable, "sample.py", *command, "--serve", "--port=0"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with server, contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        url = server.stdout.readline().split(" at ")[1].split(": ")[0]
        assert f"curl {url}/completions" in server.stdout.readline()
        with client(url) as c:
            name = c.models.list().data[0].id
            got = c.completions.create(model=name, prompt="x", n=3, seed=5, echo=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert "POST /v1/completions: 200" in server.stderr.read()
    assert (name, ("\n" + "-" * 40 + "\n").join(texts(got)) + "\n") == (run.name, asked)
    for flag, want in {"--prompt=x": "takes no --prompt", "--port=65536": "0 to 65535"}.items():
        status, _, error = in_process(sample.main, *command, "--serve", flag)
        assert (status, want in error) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"--port={taken.getsockname()[1]}"
        assert "use another --port" in in_process(sample.main, *command, "--serve", port)[2]
