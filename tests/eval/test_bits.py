import json
import math

import numpy as np
import pytest
import torch
from conftest import save_run

from common.config import UserError
from data.base.readers import read_documents
from eval import bits
from eval.gold import Gold, read_gold, starts, token_nats
from eval.mutants import mutants, read
from model import ModelConfig, Phi
from tokenizer import Tokenizer


@pytest.fixture
def model() -> Phi:
    torch.manual_seed(0)
    model = Phi(ModelConfig(512, 16, 2, 2, 32, 64, 8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2)
    return model


def test_each_token_once_as_the_model_predicts_it(model):
    rng, T, end = np.random.default_rng(0), model.c.seq_len, 3
    texts = [rng.integers(4, 512, n).tolist() for n in (40, 1, 15, 16, 17, 0)]
    for ids, nats in zip(texts, token_nats(model, end, texts), strict=True):
        assert nats.shape == (len(ids),)
        sequence = [end, *ids]
        for i in range(len(ids)):  # context starts at the text or at its window
            at = max([a for a in starts(len(sequence), T) if a == 0 or a + T // 2 <= i])
            with torch.no_grad():
                logits = model(torch.tensor([sequence[at : i + 1]]))[0, -1]
            want = -logits.log_softmax(0)[ids[i]].item()
            assert nats[i] == pytest.approx(want, rel=1e-4)


def test_a_model_that_knows_nothing_needs_log2_of_its_pieces(cli, model, tokens, corpus, tmp_path):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    tokenizer = Tokenizer(tokens)
    save_run(tmp_path / "run", model, tokenizer)
    texts = [d["text"] for d in read_documents([corpus])][:80]
    source, out = tmp_path / "code.jsonl", tmp_path / "bits"
    source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    done = cli(
        "-m", "eval.bits", "--checkpoint", tmp_path / "run", "--source", source, "--out", out
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "documents.json").read_text())
    assert json.loads(done.stdout) == {"name": "documents"} | result
    assert (result["documents"], result["bytes"]) == (80, sum(len(t.encode()) for t in texts))
    pieces = sum(len(tokenizer.encode(t)) for t in texts)
    assert result["bits_per_byte"] == pytest.approx(pieces * math.log2(512) / result["bytes"])
    low, high = result["ci95"]
    assert low < result["bits_per_byte"] < high


def problem(name: str, prompt: str, solution: str, test: str, **more) -> dict:
    return {"task_id": name, "prompt": prompt, "canonical_solution": solution, "entry_point": "f",
            "test": f"def check(f):\n    assert {test}\n"} | more  # fmt: skip


LESS = problem("T/0", "def f(a, b):\n", "    return a < b\n", "f(1, 2) and not f(2, 2)")
SUM = problem("T/1", 'def f(a):\n    """1 + 1"""\n', "    return a + 2\n\n\n", "f(3) == 5")


def test_gold_is_the_loss_of_the_solution_given_its_prompt(model, tokens):
    tokenizer = Tokenizer(tokens)
    problems = [LESS | {"mutants": []}, SUM | {"mutants": ["    return a + 2\n", "    return 1\n"]}]
    found = Gold(problems, tokenizer).measure(model)
    for p in problems:
        text = p["prompt"] + p["canonical_solution"].rstrip() + "\n"
        [whole] = token_nats(model, tokenizer.end_of_text, [tokenizer.encode(text)])
        bits = whole[len(tokenizer.encode(p["prompt"])) :].sum() / math.log(2)
        length = len(text) - len(p["prompt"])
        assert found[p["task_id"]][:2] == (pytest.approx(bits, rel=1e-5), length)
    assert found["T/0"][2] is None
    prompt = tokenizer.encode(SUM["prompt"])  # T/1: one tie, one mutant of either rank
    answers = [prompt + tokenizer.encode(f"    return {x}\n") for x in ("a + 2", "1")]
    right, wrong = (nats[len(prompt) :].sum() for nats in token_nats(model, 3, answers))
    assert found["T/1"][2] == (0.75 if right < wrong else 0.25)
    assert Gold(problems, tokenizer).measure(model, mutants=False)["T/1"][2] is None
    both = Gold(problems, tokenizer, shots=1)  # each after the other one, solved
    shot = tokenizer.encode(SUM["prompt"] + "    return a + 2\n\n\n" + LESS["prompt"])
    assert both.texts[0] == [shot + tokenizer.encode(LESS["canonical_solution"])]
    assert Gold(problems, tokenizer, shots=1, context=len(shot)).texts == []


@pytest.mark.parametrize(("text", "message"), [
    ('{"task_id": 1, "text": "Add."}', "a problem has no 'prompt': want HumanEval's format"),
    ("", "no problems in it"),
])  # fmt: skip
def test_other_files_are_refused(tokens, tmp_path, text, message):
    (tmp_path / "mbpp.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_gold(tmp_path / "mbpp.jsonl", Tokenizer(tokens))


def test_mutants_differ_by_one_replacement():
    assert sorted(mutants(LESS)) == ["    return a <= b\n", "    return a > b\n"]
    found = mutants(SUM)
    assert sorted(m.strip() for m in found) == ["return a + 1", "return a + 3", "return a - 2"]
    assert all(m.endswith("\n\n\n") for m in found)
    assert mutants(SUM | {"prompt": 'def f(a):\n    """1 → 2"""\n'}) == found


def test_mutants_are_run_and_fail(cli, tmp_path):
    weak = problem("T/2", "def f(a):\n", "    return a < 9\n", "f(1)")  # `a <= 9` passes
    broken = problem("T/3", "def f(a):\n", "    return a + 1\n", "f(1) == 3")
    endless = problem("T/4", "def f(a):\n", "    while a > 0:\n        a -= 1\n    return a\n",
                      "f(3) == 0")  # fmt: skip
    path, out = tmp_path / "p.jsonl", tmp_path / "deep" / "m.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in (LESS, SUM, weak, broken, endless)))
    options = ("--each", 9, "--sandbox", "C")
    done = cli("-m", "eval.mutants", "--problems", path, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    found = {p["task_id"]: sorted(m.strip() for m in p["mutants"]) for p in read(out)}
    assert found["T/0"] == ["return a <= b", "return a > b"]
    assert len(found["T/1"]) == 3
    assert found["T/2"] == ["return a > 9"]
    assert found["T/3"] == []
    assert not any("+= 1" in m for m in found["T/4"])


@pytest.mark.parametrize(("options", "message"), [
    ([], "give --source, --problems, or both"),
    (["--problems", "P", "--shots", "2"], "has 2 problems; use fewer shots"),
    (["--problems", "P", "--problems", "deep/P"], "two results would share a name"),
    (["--source", "P", "--shots", "1"], "want 0 or more, together with --problems"),
])  # fmt: skip
def test_mistakes_are_told(in_process, model, tokens, tmp_path, options, message):
    save_run(tmp_path / "run", model, Tokenizer(tokens))
    (tmp_path / "P.jsonl").write_text("".join(json.dumps(p) + "\n" for p in (LESS, SUM)))
    options = [tmp_path / f"{x}.jsonl" if x.endswith("P") else x for x in options]
    status, _, said = in_process(bits.main, "--checkpoint", tmp_path / "run", *options)
    assert (status, message in said) == (2, True), said


@pytest.mark.parametrize(("seeds", "measure", "value", "verdict"), [
    ([[-4, -8], [-4, -8]], "gold", -0.3, "better"),  # problems of 10 and 30 bytes
    ([[4, 8], [4, 8], [4, 17]], "gold", 0.375, "worse"),
    ([[-6, -6], [2, 2]], "gold", -0.1, "not resolved"),  # the seeds disagree
    ([[-6, 2], [-6, 2]], "gold", -0.1, "not resolved"),  # the problems disagree
    ([[0.25, 0.75], [0.3, 0.7], [0.3, 0.7]], "preferred", 50, "better"),
    ([[0.25, 0.75]], "preferred", 50, "not resolved"),  # one seed
    ([[-1, -1], [-1, -1], [-10, -10]], "gold", -0.2, "not resolved"),  # seeds too far apart
])  # fmt: skip
def test_a_step_wants_problems_and_seeds_to_agree(seeds, measure, value, verdict):
    before = {"a": [40, 10, 0.25], "b": [40, 30, 0.25], "c": [9, 9, None]}  # c is left out
    after = [{t: [40 + x, before[t][1], 0.25 + x] for t, x in zip("ab", seed)} for seed in seeds]
    cell = bits.difference([before] * len(seeds), after, measure == "gold")
    assert (round(cell.value, 9), cell.verdict) == (value, verdict)
