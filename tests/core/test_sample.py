import json

import pytest
import torch

from common.config import UserError
from decoder import Sampling
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
    assert draw(seed=-1) != draw(seed=1)
    assert len(set(generator.generate(["x"] * 20, 8, temperature=1.0))) > 10


def test_a_prompt_that_fills_the_context(generator):
    assert generator.fits("x", 10)
    assert not generator.fits("x" * 200)
    with pytest.raises(UserError, match="context of 48 leaves no room to answer"):
        generator.generate(["x", "x y " * 200])


def stream(generator, prompts, new_tokens, **options):
    """({index: completion}, {index: the text that on_text was given})."""
    pieces = {i: [] for i in range(len(prompts))}
    done = generator.stream(
        prompts, new_tokens, on_text=lambda i, text: pieces[i].append(text), **options
    )
    return dict(done), {i: "".join(p) for i, p in pieces.items()}, pieces


def test_rows_are_refilled_as_they_finish(generator):
    """Many prompts through two rows, with stops at different lengths: as each alone."""
    prompts = [p + str(i) for i in range(3) for p in PROMPTS] + ["x"] * 3
    options = {"stop": ("a", "9"), "sampling": Sampling(1.0, 0.95, logprobs=True), "seed": 3}
    whole, texts, _ = stream(generator, prompts, 14, batch_size=16, **options)
    assert len({len(done.tokens) for done in whole.values()}) > 4, "they end at many lengths"
    for batch_size in (1, 3):
        again, _, _ = stream(generator, prompts, 14, batch_size=batch_size, **options)
        assert again == whole, "tokens and log-probabilities too"
    assert texts == {i: done.text for i, done in whole.items()}


def test_a_later_prompt_does_not_change_an_earlier_one(generator):
    options = {"temperature": 1.0, "seed": 5}
    few = generator.generate(PROMPTS[:2], 12, **options)
    assert generator.generate(PROMPTS, 12, **options)[:2] == few
    short = generator.generate(PROMPTS, 6, **options)
    long = generator.generate(PROMPTS, 12, **options)
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(short, long))


def test_two_streams_at_once(generator):
    want = generator.generate(["def f", "x"], 8)
    streams = [generator.stream([prompt], 8) for prompt in ("def f", "x")]
    assert [next(s)[1].text for s in streams] == want
    one, two = (generator.stream([p, p + "y"], 8, batch_size=1) for p in ("def f", "x"))
    assert [next(one)[1].text, next(two)[1].text] == want
    assert next(one)[1].text == generator.generate(["def fy"], 8)[0]


@torch.no_grad()
def test_log_probabilities(generator):
    sampling = Sampling(1.5, logprobs=True)
    [(_, done)] = generator.stream(["def f"], 10, sampling, seed=2)
    ids = generator.encode("def f")
    p = generator.model(torch.tensor([ids + done.tokens]))[0, len(ids) - 1 : -1].log_softmax(-1)
    want = p.gather(1, torch.tensor(done.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(done.logprobs), want, atol=1e-4, rtol=0)
    assert not next(generator.stream(["def f"], 10))[1].logprobs


class Bytes:
    """A tokenizer of bytes, in which most tokens are parts of characters."""

    end_of_text = 0
    start = (0,)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def scripted(text: str, monkeypatch, prompt: str = "") -> Generator:
    """A generator that answers every prompt with the bytes of `text`, then <|endoftext|>."""
    answer = [*text.encode(), 0]

    class Script:
        def __init__(self, *args):
            pass

        def fits(self, *args):
            return True

        def load(self, row, ids, draws, twin=None):
            self.at = 0

        def move(self, source, row):
            pass

        def steps(self, rows, span, sampling):
            self.at += 3  # three tokens at a time, as on a GPU
            return [[*answer, *[0] * 9][self.at - 3 : self.at]], [[-1.0] * 3]

    monkeypatch.setattr("sample.Decoder", Script)
    return Generator(Phi(ModelConfig(256, 64, 1, 1, 8, 8, 2)), Bytes())


@pytest.mark.parametrize(
    ("text", "stop", "want", "tokens", "finish"),
    [
        ("no stop", ("\ndef",), "no stop", 7, "end"),
        ("x = 1\n\ndef f", ("\ndef", "never"), "x = 1\n", 6, "stop"),
        ("a\ndeb\nde", ("\ndef",), "a\ndeb\nde", 8, "end"),  # held back, then given
        ("first, last", ("last", "st,"), "fir", 3, "stop"),
        ("naïve → 日本", (), "naïve → 日本", 17, "end"),
        ("日本", ("本",), "日", 3, "stop"),
        ("stop at once", ("s",), "", 0, "stop"),
        ("0123456789" * 7, (), ("0123456789" * 7)[:63], 63, "context"),
    ],
)
def test_stop_strings_and_streaming(text, stop, want, tokens, finish, monkeypatch):
    generator = scripted(text, monkeypatch)
    done, texts, pieces = stream(generator, [""], 100, stop=stop)
    assert (done[0].text, len(done[0].tokens), done[0].finish) == (want, tokens, finish)
    assert texts[0] == want
    assert not any("\ufffd" in piece for piece in pieces[0]), "characters are given whole"
    assert "".join(pieces[0][:1]) != want or len(want) < 4, "text is given as it comes"


def test_a_token_that_holds_more_than_the_stop_string_is_kept_whole(generator):
    """Our pieces are longer than characters: the text is cut inside the last token."""
    [(_, whole)] = generator.stream(["def f"], 20)
    pieces = [generator.tokenizer.decode([token]) for token in whole.tokens]
    at = next(i for i, piece in enumerate(pieces) if i > 3 and len(piece) > 2)
    before = "".join(pieces[:at])
    stop = whole.text[len(before) + 1 : len(before) + 3]
    if stop in whole.text[: len(before) + 1]:
        pytest.skip("the stop string happens to come earlier")
    [(_, done)] = generator.stream(["def f"], 20, stop=(stop,))
    assert done.text == whole.text[: len(before) + 1]
    assert done.tokens == whole.tokens[: at + 1]


def test_max_new_tokens(generator):
    [(_, done)] = generator.stream(["x"], 5)
    assert (len(done.tokens), done.finish) == (5, "length")


def test_command(cli, tiny, tokens, tmp_path):
    run = tmp_path / "run"
    done = cli("train.py", *tiny, f"--data={tokens}", f"--out={run}", "--max_steps=2")
    assert done.returncode == 0, done.stderr
    command = ["sample.py", "--checkpoint", run, "--max_new_tokens=5", "--device=cpu"]
    asked = cli(*command, "--prompt", "def f")
    piped = cli(*command, "--samples=2", stdin="def f")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("def f")
    assert piped.stdout == asked.stdout + "-" * 40 + "\n" + asked.stdout
    done = cli(*command, "--prompt", "def f", "--logprobs")
    [row] = map(json.loads, done.stdout.splitlines())
    assert "def f" + row["text"] + "\n" == asked.stdout
    assert len(row["tokens"]) == len(row["logprobs"]) == len(row["pieces"]) <= 5
    assert all(p <= 0 for p in row["logprobs"])
    for flags, message in [
        (["--prompt", "x y " * 100], "leaves no room to answer; shorten it"),
        (["--prompt", "x", "--top_p=0"], "0 < top_p <= 1"),
    ]:
        done = cli(*command, *flags)
        assert done.returncode == 2
        assert message in done.stderr
