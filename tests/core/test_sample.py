"""Completions and decoders: the model's tokens, independent of the batch."""

from functools import partial

import pytest
import torch
from conftest import save_run
from three_way import DEVICE

import decoder
import sample
from common.config import UserError
from decoder import GREEDY, SAMPLED, SORTED, TorchDecoder, TritonDecoder
from model import ModelConfig, Phi
from sample import Generator

FAST = partial(TorchDecoder, fast=True)
PROMPTS = ["def append_0(", "x", "    return y * append + 9\n", "class", "def f(a, b):\n    if a"]


@torch.no_grad()
def greedy_without_a_cache(generator, prompt, new_tokens):
    """Generate by running the whole text through the model for every token."""
    ids = generator.encode(prompt)
    start = len(ids)
    while len(ids) < min(start + new_tokens, generator.context_tokens):
        token = generator.model(torch.tensor([ids]))[0, -1].argmax().item()
        if token == generator.tokenizer.end_of_text:
            break
        ids.append(token)
    return generator.tokenizer.decode(ids[start:])


def test_greedy_equals_the_whole_forward(generator):
    for new_tokens in (12, 1000):  # 1000 reaches the end of the context
        want = [greedy_without_a_cache(generator, p, new_tokens) for p in PROMPTS]
        assert len(set(want)) == len(PROMPTS)
        for batch_size in (1, 2, 64):
            assert generator.generate(PROMPTS, new_tokens, batch_size=batch_size) == want


def test_sampling_depends_on_the_seed_and_the_prompts_index_alone(generator):
    def draw(prompts=PROMPTS, **options):
        return generator.generate(prompts, 12, temperature=1.0, top_p=0.9, **options)

    assert draw(seed=1) == draw(seed=1, batch_size=2)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=-1) != draw(seed=1)
    assert draw(seed=1)[:2] == draw(PROMPTS[:2], seed=1)
    assert len(set(draw(["x"] * 20))) > 10


def test_a_prompt_that_fills_the_context(generator):
    assert not generator.fits("x" * 200)
    with pytest.raises(UserError, match="context of 48 tokens; shorten it"):
        generator.generate(["x", "x y " * 200])


def test_rows_are_refilled_as_they_finish(generator):
    """Many prompts on few rows, stopping at different lengths, match each prompt alone."""
    prompts = [p + str(i) for i in range(3) for p in PROMPTS] + ["x"] * 3
    options = {"stop": ("a", "9"), "temperature": 1.0, "top_p": 0.95, "seed": 3}
    whole = dict(generator.stream(prompts, 14, batch_size=16, **options))
    assert len({len(row.tokens) for row in whole.values()}) > 4, "they end at many lengths"
    for batch_size in (1, 3):
        again = dict(generator.stream(prompts, 14, batch_size=batch_size, **options))
        assert again == whole


def test_two_streams_at_once(generator):
    want = generator.generate(["def f", "x", "def fy"], 8)
    one, two = (generator.stream([p, p + "y"], 8, batch_size=1) for p in ("def f", "x"))
    assert [next(row.text for _, row in s if row.done) for s in (one, two, one)] == want


class Bytes:
    """Byte tokenizer, so that tokens can split characters."""

    end_of_text = 0
    start = (0,)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def scripted(text: str) -> Generator:
    """Return a generator that answers with the bytes of `text`, then <|endoftext|>."""
    answer = [*text.encode(), *[0] * 9]

    class Script:
        def __init__(self, *args):
            self.at = 0

        def load(self, *args):
            pass

        def steps(self, rows, longest):
            self.at += 3  # three tokens at a time, as on a GPU
            return [answer[self.at - 3 : self.at]]

    generator = Generator(Phi(ModelConfig(256, 64, 1, 1, 8, 8, 2)), Bytes())
    generator.new_decoder = Script
    return generator


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("no stop", ("\ndef",), "no stop"),
        ("x = 1\n\ndef f", ("\ndef", "never"), "x = 1\n"),
        ("a\ndeb\nde", ("\ndef",), "a\ndeb\nde"),
        ("first, last", ("last", "st,"), "fir"),
        ("naïve → 日本", (), "naïve → 日本"),
        ("日本", ("本",), "日"),
        ("stop at once", ("s",), ""),
        ("0123456789" * 7, (), ("0123456789" * 7)[:63]),
    ],
)
def test_where_a_text_ends(text, stop, want):
    assert scripted(text).generate([""], 100, stop=stop) == [want]


def test_text_appears_as_it_is_generated(in_process, monkeypatch):
    """Text is printed as it is generated, except partial characters and possible stop strings."""
    shown = []
    monkeypatch.setattr(sample, "print", lambda text="", **_: shown.append(text), raising=False)
    monkeypatch.setattr(Generator, "load", lambda *_: scripted("naïve 日本\nde\ndef f(x):"))
    status, _, error = in_process(sample.main, "--checkpoint=x", "--prompt=> ", r"--stop=\ndef")
    assert status == 0, error
    assert "".join(shown) == "> naïve 日本\nde"
    assert len(set(shown)) > 4
    assert not any("\ufffd" in text for text in shown)


def test_command(cli, in_process, generator, tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", generator.model, generator.tokenizer)
    command = ["--checkpoint", run, "--max_new_tokens=5", "--device=cpu"]
    status, asked, _ = in_process(sample.main, *command, "--prompt", "def f")
    assert (status, asked[:5]) == (0, "def f")
    piped = cli("sample.py", *command, "--samples=2", stdin="def f")
    assert piped.stdout == asked + "-" * 40 + "\n" + asked
    wrong = {"--top_p=0": "0 < top_p", "--stop=": "no empty stop", "--prompt=\udcff": "surrogates",
             "--prompt=" + "x y " * 200: "shorten it"}  # fmt: skip
    wrong |= {f"--temperature={t}": "0 <= temperature < inf" for t in ("inf", "-1")}
    wrong["--temperature=nan"] = "got 'nan', want float"
    for flag, want in wrong.items():
        status, shown, error = in_process(sample.main, *command, "--prompt=x", flag)
        assert (status, shown, want in error) == (2, "", True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert in_process(sample.main, *command, "--prompt=\x1b[2J\n")[1].startswith("\\x1b[2J\n")


# ---- Decoders alone


def large(c: ModelConfig) -> Phi:
    """Return an untrained model with large weights, for clear choices, and random biases, gains."""
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


def steps(model, ids, count, sampling=(0.0, 1.0), new_decoder=TorchDecoder) -> tuple[list, list]:
    """Decode prompts in one batch; return tokens [rows][steps] and each step's logits [rows, V]."""
    longest, logits = max(map(len, ids)), []
    decoder = new_decoder(model, len(ids), longest + count)
    for row, prompt in enumerate(ids):
        draws = torch.rand(count, generator=torch.Generator().manual_seed(sum(prompt)))
        decoder.load(row, prompt, draws.double(), *sampling)
    computed = decoder._logits
    decoder._logits = lambda *args: logits.append(computed(*args)) or logits[-1]
    tokens = [[] for _ in ids]
    while len(tokens[0]) < count:
        new = decoder.steps(len(ids), longest + len(tokens[0]))
        tokens = [old + more for old, more in zip(tokens, new)]
    return [row[:count] for row in tokens], logits


@torch.no_grad()
def by_the_model(model, prompt, count) -> list:
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids], device=DEVICE))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("new_decoder", [TorchDecoder, FAST, TritonDecoder])
def test_a_decoder_s_greedy_tokens_are_the_model_s(new_decoder):
    qk_norm = new_decoder is not TritonDecoder  # not supported by the kernels
    model = large(ModelConfig(128, 160, 1, 2, 32, 48, 8, qk_norm=qk_norm))
    ids = [*random_ids(2, 128, 9), list(range(1, 128))]  # one spans two pieces of the cache
    tokens, _ = steps(model, ids, 3, new_decoder=new_decoder)
    assert tokens == [by_the_model(model, prompt, 3) for prompt in ids]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_the_batch(threads, onednn, monkeypatch):
    """At the demo's width, a row has the same logits in small batches as among 17 rows."""
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: onednn)
    torch.set_num_threads(threads)
    try:
        model = large(ModelConfig(512, 64, 2, 6, 192, 768, 16, qk_norm=True))
        ids = random_ids(17, 512, 40)
        tokens, logits = steps(model, ids, 3, (0.8, 0.9))
        for rows in ([0], [7, 3], [16, 13, 1], list(range(4, 15))):
            some, theirs = steps(model, [ids[row] for row in rows], 3, (0.8, 0.9))
            assert some == [tokens[row] for row in rows]
            for want, got in zip(logits, theirs):
                assert torch.equal(got[: len(rows)], want[rows])
    finally:
        torch.set_num_threads(1)


def test_products_that_disagree_are_found(monkeypatch):
    """Fake matmuls whose last row differs beyond 10 rows."""

    def product(x):
        return x + (torch.arange(len(x)) == max(10, len(x) - 1))[:, None]

    monkeypatch.setattr(decoder, "make_linear", lambda *_: product)
    assert decoder.same_rows([torch.eye(4)], onednn=False) == 10
    assert decoder.same_rows([torch.eye(4)], onednn=True) < 64


@pytest.mark.parametrize("most", [1, 30, 512])
def test_prompts_that_wait_together(most, monkeypatch):
    """Prefill gives the same tokens for any batch size; reload, move and share prompts too."""
    monkeypatch.setattr(TorchDecoder, "prefill_tokens", most)
    model = large(ModelConfig(128, 64, 2, 2, 32, 48, 8))
    ids = random_ids(3, 128, 20)
    want = [by_the_model(model, prompt, 2) for prompt in ids]
    decoder, draws = TorchDecoder(model, 4, 40), torch.zeros(5)
    for row, prompt in ((0, 2), (1, 0), (2, 2), (0, 1), (3, 0)):
        decoder.load(row, ids[prompt], draws)
    decoder.move(3, 1)
    assert decoder.steps(3, 20) == [want[prompt][:1] for prompt in (1, 0, 2)]
    decoder.move(2, 0)
    assert decoder.steps(2, 21) == [want[prompt][1:] for prompt in (2, 0)]


def choose(logits, draws, temperature, top_p):
    """Call `decoder.choose` on rows with the same options."""
    way = GREEDY if temperature == 0 else SORTED if top_p < 1 else SAMPLED
    temperature = torch.full((len(draws), 1), temperature)
    top_p = torch.full((len(draws), 1), top_p, dtype=torch.float64)
    return decoder.choose(logits, draws[:, None], temperature, top_p, way)


def test_choices_follow_the_distribution():
    p = torch.tensor([0.1, 0.6, 0.05, 0.25])
    draws = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature, top_p, want in [
        (1.0, 1.0, p),
        (1.0, 0.8, torch.tensor([0, 0.6, 0, 0.25]) / 0.85),
        (0.5, 1.0, p**2 / (p**2).sum()),
        (1.0, 1e-6, torch.tensor([0.0, 1, 0, 0])),
        (0, 1.0, torch.tensor([0.0, 1, 0, 0])),
    ]:
        chosen = choose(p.log().expand(20000, -1), draws, temperature, top_p)
        shares = torch.bincount(chosen, minlength=4) / 20000
        torch.testing.assert_close(shares, want, rtol=0, atol=0.01)


def test_a_choice_does_not_depend_on_other_rows_options():
    """Rows of all three kinds, with ties, get the same tokens mixed as alone, without sorting."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 200, generator=generator).mul(2).round()
    draws = torch.rand(60, generator=generator, dtype=torch.float64)
    temperature = torch.tensor([0.0, 0.7, 1.3]).repeat(20)[:, None]
    top_p = torch.tensor([1.0, 1.0, 1.0, 0.8, 0.3], dtype=torch.float64).repeat(12)[:, None]
    mixed = decoder.choose(logits, draws[:, None], temperature, top_p, SORTED)
    for row in range(60):
        one = slice(row, row + 1)
        options = temperature[row].item(), top_p[row].item()
        assert choose(logits[one], draws[one], *options) == mixed[one]


def test_the_ends_of_a_draw():
    """0 and the largest number below 1 choose tokens with non-zero probability."""
    logits = torch.tensor([[-1e9, 0.0, -1e9, 1.0, -1e9]]).expand(2, -1)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, draws, 1.0, 1.0).tolist() == [1, 3]
    assert choose(logits, draws, 1.0, 0.99).tolist() == [3, 1]
    diverged = torch.full((2, 5), float("nan"))
    assert all((choose(diverged, draws, 1.0, top_p) < 5).all() for top_p in (1.0, 0.9))
