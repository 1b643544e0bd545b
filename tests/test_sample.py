import pytest
import torch

from config import UserError
from decoder import choose
from model import ModelConfig, Phi
from sample import Generator
from tokenizer import Tokenizer

PROMPTS = ["def append_0(", "x", "    return y * append + 9\n", "class", "def f(a, b):\n    if a"]


@pytest.fixture(scope="module")
def generator(tokens):
    """An untrained model whose weights are large, so that its choices are clear and varied."""
    torch.manual_seed(0)
    model = Phi(ModelConfig(512, 48, 2, 2, 32, 64, 8)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() == 2 else 1)
    return Generator(model, Tokenizer(tokens))


@torch.no_grad()
def greedy_without_a_cache(generator, prompt, new_tokens):
    """What generation should give: the whole text through the model for every token."""
    ids = generator.encode(prompt)
    start = len(ids)
    while len(ids) < min(start + new_tokens, generator.context_tokens):
        token = generator.model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == generator.tokenizer.end_of_text:
            break
        ids.append(token)
    return generator.tokenizer.decode(ids[start:])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_greedy_equals_the_whole_forward(generator, batch_size):
    want = [greedy_without_a_cache(generator, p, 12) for p in PROMPTS]
    assert generator.generate(PROMPTS, 12, batch_size=batch_size) == want
    assert len(set(want)) == len(PROMPTS)


def test_stops_at_the_context(generator):
    want = greedy_without_a_cache(generator, "x", 1000)
    assert generator.generate(["x"], 1000) == [want]


def test_stop_strings_cut_the_text(generator):
    [whole] = generator.generate(["def f"], 30)
    for stop in (whole[5:8], whole[3], whole[10:12]):
        assert generator.generate(["def f"], 30, stop=("never there", stop)) == [
            whole[: whole.index(stop)]
        ]


def test_sampling_depends_on_the_seed_not_the_batch(generator):
    def draw(**kwargs):
        return generator.generate(PROMPTS, 12, temperature=1.0, top_p=0.9, **kwargs)

    assert draw(seed=1) == draw(seed=1, batch_size=2)
    assert draw(seed=1) != draw(seed=2)
    assert len(set(generator.generate(["x"] * 20, 8, temperature=1.0))) > 10


def test_a_prompt_that_fills_the_context(generator):
    assert generator.fits("x", 10)
    assert not generator.fits("x" * 200)
    with pytest.raises(UserError, match="context of 48 leaves no room to answer"):
        generator.generate(["x", "x y " * 200])


def test_choices_follow_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.6, 0.05, 0.25])).expand(20000, -1)
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))

    def shares(temperature, top_p):
        return torch.bincount(choose(logits, draws, temperature, top_p), minlength=4) / 20000

    close = {"rtol": 0, "atol": 0.01}
    torch.testing.assert_close(shares(1.0, 1.0), torch.tensor([0.1, 0.6, 0.05, 0.25]), **close)
    torch.testing.assert_close(
        shares(1.0, 0.8), torch.tensor([0, 0.6 / 0.85, 0, 0.25 / 0.85]), **close
    )
    p2 = torch.tensor([0.1, 0.6, 0.05, 0.25]) ** 2
    torch.testing.assert_close(shares(0.5, 1.0), p2 / p2.sum(), **close)
    assert shares(1.0, 1e-6)[1] == shares(0, 1.0)[1] == 1


def test_command(cli, tiny, tokens, tmp_path):
    run = tmp_path / "run"
    done = cli("train.py", *tiny, f"--data={tokens}", f"--out={run}", "--max_steps=2")
    assert done.returncode == 0, done.stderr
    command = ["sample.py", "--checkpoint", run, "--max_new_tokens=5", "--device=cpu"]
    asked = cli(*command, "--prompt", "def f")
    piped = cli(*command, stdin="def f")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == piped.stdout
    assert asked.stdout.startswith("def f")
    for flags, message in [
        (["--prompt", "x y " * 100], "leaves no room to answer; shorten it"),
        (["--prompt", "x", "--top_p=0"], "0 < top_p <= 1"),
        (["--prompt", "x", "--checkpoint", tmp_path], "no checkpoint at"),
    ]:
        done = cli(*command, *flags)
        assert done.returncode == 2
        assert message in done.stderr
