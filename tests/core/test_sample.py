"""Completions and what a decoder gives them: the model's tokens, whatever the batch."""

import json

import pytest
import torch
from three_way import DEVICE

from common.config import UserError
from model import ModelConfig, Phi
from sample import Generator, Sampling, TorchDecoder, TritonDecoder, choose, grouped_linear
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


def scripted(text: str) -> Generator:
    """A generator that answers every prompt with the bytes of `text`, then <|endoftext|>."""
    answer = [*text.encode(), 0]

    class Script:
        def __init__(self, *args):
            pass

        def fits(self, *args):
            return True

        def load(self, row, ids, draws):
            self.at = 0

        def move(self, source, row):
            pass

        def steps(self, rows, span, sampling):
            self.at += 3  # three tokens at a time, as on a GPU
            return [[*answer, *[0] * 9][self.at - 3 : self.at]], [[-1.0] * 3]

    generator = Generator(Phi(ModelConfig(256, 64, 1, 1, 8, 8, 2)), Bytes())
    generator.new_decoder = Script
    return generator


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
def test_stop_strings_and_streaming(text, stop, want, tokens, finish):
    generator = scripted(text)
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


# ---- Decoders alone


def large(c: ModelConfig) -> Phi:
    """Untrained, with weights so large that choices are clear, and no bias or gain at its start."""
    torch.manual_seed(0)
    model = Phi(c).eval().to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() == 2 else 1).add_(0.02 * torch.randn_like(p))
    return model


def random_ids(count: int, vocab: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def steps(model, ids, count, sampling, new_decoder=TorchDecoder) -> tuple[list, list]:
    """(tokens, logprobs) [rows][steps] of prompts that are all one batch."""
    draws = torch.rand(len(ids), count, generator=torch.Generator().manual_seed(2)).double()
    decoder = new_decoder(model, len(ids), max(map(len, ids)) + count, count)
    for row, prompt in enumerate(ids):
        decoder.load(row, prompt, draws[row])
    parts, span, done = [], max(map(len, ids)), 0
    while done < count:
        parts.append(decoder.steps(len(ids), span + done, sampling))
        done += len(parts[-1][0][0])
    return tuple(
        [[x for part in row for x in part][:count] for row in zip(*rows)] for rows in zip(*parts)
    )


@torch.no_grad()
def by_the_model(model, prompt, count) -> tuple[list, list]:
    """Greedy tokens and their log-probabilities, the whole text through the model each time."""
    ids, logprobs = list(prompt), []
    for _ in range(count):
        p = model(torch.tensor([ids], device=DEVICE))[0, -1].log_softmax(-1)
        ids.append(p.argmax().item())
        logprobs.append(p.max().item())
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("new_decoder", [TorchDecoder, TritonDecoder])
def test_a_decoder_s_greedy_tokens_are_the_model_s(new_decoder):
    model = large(ModelConfig(128, 160, 2, 2, 32, 48, 8))
    ids = [*random_ids(2, 128, 9), list(range(1, 128))]  # one crosses a piece of the kernel's cache
    tokens, logprobs = steps(model, ids, 4, Sampling(logprobs=True), new_decoder)
    for prompt, ours, p in zip(ids, tokens, logprobs):
        want, want_p = by_the_model(model, prompt, 4)
        assert ours == want
        assert p == pytest.approx(want_p, abs=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_bits_do_not_depend_on_the_batch(threads, top_p):
    """At the demo's width: every row alone gives the log-probabilities it has among 33."""
    model = large(ModelConfig(2048, 64, 2, 6, 192, 768, 16))
    ids, sampling = random_ids(33, 2048, 40), Sampling(0.8, top_p, logprobs=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = steps(model, ids, 6, sampling)
        draws = torch.rand(33, 6, generator=torch.Generator().manual_seed(2)).double()
        for rows in ([0], [7, 3], [32, 20, 1], list(range(5, 22))):
            decoder = TorchDecoder(model, len(rows), 64, 6)
            for at, row in enumerate(rows):
                decoder.load(at, ids[row], draws[row])
            for step in range(6):
                span = max(len(ids[row]) for row in rows) + step
                tokens, logprobs = decoder.steps(len(rows), span, sampling)
                for at, row in enumerate(rows):
                    assert (tokens[at][0], logprobs[at][0]) == (
                        whole[0][row][step],
                        whole[1][row][step],
                    ), (rows, row, step)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_same_rows_agree(threads):
    """What the probe of a decoder promises, for rows that it has not seen."""
    model = Phi(ModelConfig(2048, 64, 1, 6, 192, 768, 16))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = TorchDecoder(model, 1, 64, 1)
        tile = decoder.same
        assert tile in range(2, 65, 2)
        _, _, w_in, _, w_out, _ = decoder.layers[0]
        for w in (w_in, w_out, decoder.w_head):
            x, bias = torch.randn(2 * tile, len(w)), torch.randn(w.shape[1])
            want = grouped_linear(x, w, bias, tile)
            for rows in range(2, tile + 1, 2):
                assert torch.equal(grouped_linear(x[:rows], w, bias, tile), want[:rows])
                assert torch.equal(grouped_linear(x[-rows:], w, bias, tile), want[-rows:])
    finally:
        torch.set_num_threads(before)


def test_a_row_moves_and_a_twin_shares_its_prompt():
    model = large(ModelConfig(128, 64, 2, 2, 32, 48, 8))
    ids = random_ids(3, 128, 20)
    want, _ = steps(model, ids, 5, Sampling())
    decoder, draws = TorchDecoder(model, 4, 40, 5), torch.zeros(5)
    for row, prompt in enumerate(ids):
        decoder.load(row, prompt, draws)
    decoder.load(3, ids[1], draws)
    first, _ = decoder.steps(4, 20, Sampling())
    decoder.move(2, 0)
    second, _ = decoder.steps(4, 21, Sampling())
    assert [t[0] for t in first] == [want[i][0] for i in (0, 1, 2, 1)]
    decoder.load(3, ids[2], draws)
    assert not decoder.waiting, "rows 0 and 2 have its keys and values"
    third, _ = decoder.steps(4, 22, Sampling())
    assert [t[0] for t in second] == [want[i][1] for i in (2, 1, 2, 1)]
    assert [t[0] for t in third] == [want[2][2], want[1][2], want[2][2], want[2][0]]


@pytest.mark.parametrize("most", [1, 30, 512])
def test_prompts_that_wait_together(most, monkeypatch):
    """Whatever goes through the model at once; a row that is loaded twice holds the second."""
    monkeypatch.setattr("sample.TorchDecoder.prefill_tokens", most)
    model = large(ModelConfig(128, 64, 2, 2, 32, 48, 8))
    ids, sampling = random_ids(4, 128, 20), Sampling(logprobs=True)
    want = [steps(model, [prompt], 1, sampling) for prompt in ids]
    decoder, draws = TorchDecoder(model, 4, 40, 5), torch.zeros(5)
    for row, prompt in ((0, 3), (1, 0), (2, 1), (3, 2), (0, 1), (2, 2)):
        decoder.load(row, ids[prompt], draws)
    decoder.load(3, ids[0], draws)
    decoder.move(3, 1)
    tokens, logprobs = decoder.steps(3, 20, sampling)
    for at, prompt in enumerate((1, 0, 2)):
        assert ([tokens[at]], [logprobs[at]]) == want[prompt]


def test_an_odd_head_dim():
    with pytest.raises(UserError, match="even head dim \\(width / n_head, 5\\)"):
        TorchDecoder(Phi(ModelConfig(16, 16, 1, 2, 10, 12, 2)), 1, 16, 4)


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


def test_the_ends_of_a_draw():
    """0 and the largest number below 1 choose tokens that have a probability."""
    logits = torch.tensor([[-1e9, 0.0, -1e9, 1.0, -1e9]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, draws, 1.0, 1.0).tolist() == [1, 3]
    assert choose(logits, draws, 1.0, 0.99).tolist() == [3, 1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_diverged_model_chooses_some_token(top_p):
    logits = torch.full((2, 5), float("nan"))
    assert (choose(logits, torch.rand(2), 1.0, top_p) < 5).all()
