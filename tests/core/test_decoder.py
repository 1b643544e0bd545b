"""A decoder's tokens: the model's, from torch and from the kernels, whatever the batch."""

import pytest
import torch
from three_way import DEVICE

from common.config import UserError
from decoder import Decoder, Sampling, choose
from decoder_torch import Blocks, grouped_linear
from model import ModelConfig, Phi


def large(c: ModelConfig) -> Phi:
    """Untrained, with weights so large that choices are clear, and no bias or gain at its start."""
    torch.manual_seed(0)
    model = Phi(c).eval().to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(6 if p.dim() == 2 else 1).add_(0.02 * torch.randn_like(p))
    return model


def prompts(count: int, vocab: int, longest: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def generate(model, ids, steps, sampling, kernels=False) -> tuple[list, list]:
    """(tokens, logprobs) [rows][steps] of prompts that are all one batch."""
    draws = torch.rand(len(ids), steps, generator=torch.Generator().manual_seed(2)).double()
    decoder = Decoder(model, len(ids), max(map(len, ids)) + steps, steps, kernels)
    for row, prompt in enumerate(ids):
        decoder.load(row, prompt, draws[row])
    parts, span, done = [], max(map(len, ids)), 0
    while done < steps:
        parts.append(decoder.steps(len(ids), span + done, sampling))
        done += len(parts[-1][0][0])
    return tuple(
        [[x for part in row for x in part][:steps] for row in zip(*rows)] for rows in zip(*parts)
    )


@torch.no_grad()
def by_the_model(model, prompt, steps) -> tuple[list, list]:
    """Greedy tokens and their log-probabilities, the whole text through the model each time."""
    ids, logprobs = list(prompt), []
    for _ in range(steps):
        p = model(torch.tensor([ids], device=DEVICE))[0, -1].log_softmax(-1)
        ids.append(p.argmax().item())
        logprobs.append(p.max().item())
    return ids[len(prompt) :], logprobs


@pytest.mark.parametrize("kernels", [False, True])
def test_greedy_is_the_model_s(kernels):
    model = large(ModelConfig(128, 160, 2, 2, 32, 48, 8))
    ids = [*prompts(2, 128, 9), list(range(1, 128))]  # one crosses a piece of the kernel's cache
    tokens, logprobs = generate(model, ids, 4, Sampling(logprobs=True), kernels)
    for prompt, ours, p in zip(ids, tokens, logprobs):
        want, want_p = by_the_model(model, prompt, 4)
        assert ours == want
        assert p == pytest.approx(want_p, abs=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_bits_do_not_depend_on_the_batch(threads, top_p):
    """At the demo's width: every row alone gives the log-probabilities it has among 33."""
    model = large(ModelConfig(2048, 64, 2, 6, 192, 768, 16))
    ids, sampling = prompts(33, 2048, 40), Sampling(0.8, top_p, logprobs=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = generate(model, ids, 6, sampling)
        draws = torch.rand(33, 6, generator=torch.Generator().manual_seed(2)).double()
        for rows in ([0], [7, 3], [32, 20, 1], list(range(5, 22))):
            decoder = Decoder(model, len(rows), 64, 6, kernels=False)
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
        blocks = Blocks(model)
        tile = blocks.tile
        assert tile in range(2, 65, 2)
        for w in (blocks.layers[0].w_in, blocks.layers[0].w_out, blocks.w_head):
            x, bias = torch.randn(2 * tile, len(w)), torch.randn(w.shape[1])
            want = grouped_linear(x, w, bias, tile)
            for rows in range(2, tile + 1, 2):
                assert torch.equal(grouped_linear(x[:rows], w, bias, tile), want[:rows])
                assert torch.equal(grouped_linear(x[-rows:], w, bias, tile), want[-rows:])
    finally:
        torch.set_num_threads(before)


def test_a_row_moves_and_a_twin_shares_its_prompt():
    model = large(ModelConfig(128, 64, 2, 2, 32, 48, 8))
    ids = prompts(3, 128, 20)
    want, _ = generate(model, ids, 5, Sampling())
    decoder, draws = Decoder(model, 4, 40, 5, kernels=False), torch.zeros(5)
    for row, prompt in enumerate(ids):
        decoder.load(row, prompt, draws)
    decoder.load(3, ids[1], draws, twin=1)
    first, _ = decoder.steps(4, 20, Sampling())
    decoder.move(2, 0)
    second, _ = decoder.steps(4, 21, Sampling())
    assert [t[0] for t in first] == [want[i][0] for i in (0, 1, 2, 1)]
    assert [t[0] for t in second] == [want[i][1] for i in (2, 1, 2, 1)]


@pytest.mark.parametrize("most", [1, 30, 512])
def test_prompts_that_wait_together(most, monkeypatch):
    """Whatever goes through the model at once; a row that is loaded twice holds the second."""
    monkeypatch.setattr("decoder.PREFILL_TOKENS", most)
    model = large(ModelConfig(128, 64, 2, 2, 32, 48, 8))
    ids, sampling = prompts(4, 128, 20), Sampling(logprobs=True)
    want = [generate(model, [prompt], 1, sampling) for prompt in ids]
    decoder, draws = Decoder(model, 4, 40, 5, kernels=False), torch.zeros(5)
    for row, prompt in ((0, 3), (1, 0), (2, 1), (3, 2), (0, 1), (2, 2)):
        twin = {(0, 1): 2, (2, 2): 3}.get((row, prompt))
        decoder.load(row, ids[prompt], draws, twin)
    decoder.load(3, ids[0], draws)
    decoder.move(3, 1)
    tokens, logprobs = decoder.steps(3, 20, sampling)
    for at, prompt in enumerate((1, 0, 2)):
        assert ([tokens[at]], [logprobs[at]]) == want[prompt]


def test_an_odd_head_dim():
    with pytest.raises(UserError, match="even head dim \\(width / n_head, 5\\)"):
        Decoder(Phi(ModelConfig(16, 16, 1, 2, 10, 12, 2)), 1, 16, 4, kernels=False)


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
