import json
import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoint, distributed
from common.config import UserError
from model import ModelConfig, Phi, load_model
from tokenizer import Tokenizer

ODD = ModelConfig(61, 19, 2, 3, 42, 50, 6)
DAMAGES = 300  # flips and truncations tried


@pytest.fixture
def tokenizer(tokens):
    return Tokenizer(tokens)


def training():
    return {
        "exp_avg.x": torch.randn(7, 5),
        "step.x": torch.tensor(3.0),
        "rank0.rng": torch.get_rng_state(),
    }


@pytest.fixture
def saved(tmp_path, tokenizer):
    """A run folder with one checkpoint, its model, and its training state."""
    model, state = Phi(ODD), training()
    saver = checkpoint.Saver(tmp_path / "run", 0, None, keep=2)
    saver.save(5, model, state, tokenizer, {"world_size": 1})
    assert saver.finish() is None
    return tmp_path / "run", model, state


def test_round_trip(saved, tokenizer):
    run, model, state = saved
    folder = checkpoint.find(run)
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == [
        "manifest.json", "meta.json", "model.safetensors", "tokenizer.model",
        "training/shard-00001-model-00001-of-00001.safetensors"]  # fmt: skip
    assert checkpoint.damage(folder) == ""
    loaded, read, where = load_model(run, "cpu")
    assert (where, read.fingerprint) == (folder, tokenizer.fingerprint)
    other, back = Phi(ODD), {k: torch.zeros_like(v) for k, v in state.items()}
    checkpoint.load_training(other, back, folder)
    for a in (loaded, other):
        for name, p in a.state_dict().items():
            assert torch.equal(p, model.state_dict()[name])
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)


def test_the_state_is_copied_before_save_returns(saved, tokenizer):
    run, model, state = saved
    saver = checkpoint.Saver(run, 0, None, keep=2)
    weights, moments = model.embed.weight.detach().clone(), state["exp_avg.x"].clone()
    saver.save(6, model, state, tokenizer, {})
    with torch.no_grad():
        model.embed.weight.zero_()
        state["exp_avg.x"].zero_()
    saver.wait()
    folder = checkpoint.find(run, newest=True)
    assert torch.equal(load_file(folder / "model.safetensors")["embed.weight"], weights)
    [shard] = (folder / "training").iterdir()
    assert torch.equal(load_file(shard)["exp_avg.x"], moments)


def test_every_flip_and_truncation_is_caught(saved):
    run, _, _ = saved
    folder, draw = checkpoint.find(run), random.Random(0)
    files = [p for p in folder.rglob("*") if p.is_file()]
    for i in range(DAMAGES):
        path = files[i % len(files)]
        whole = path.read_bytes()
        if draw.random() < 0.5:
            at = draw.randrange(len(whole))
            path.write_bytes(
                whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
            )
        else:
            path.write_bytes(whole[: draw.randrange(len(whole))])
        wrong = checkpoint.damage(folder)
        same = path.name == "manifest.json" and _means_the_same(path.read_bytes(), whole)
        assert wrong or same, f"damage {i} to {path.name} was not seen"
        path.write_bytes(whole)
    assert checkpoint.damage(folder) == ""
    files[0].unlink()
    assert "No such file" in checkpoint.damage(folder)


def _means_the_same(damaged: bytes, whole: bytes) -> bool:
    """Whether a manifest says what it said: a flipped bit of its white space does no harm."""
    try:
        return json.loads(damaged) == json.loads(whole)
    except ValueError:
        return False


def test_damaged_weights_are_not_loaded(saved):
    path = checkpoint.find(saved[0]) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"damaged: model\.safetensors was changed"):
        load_model(saved[0], "cpu")


def test_newest_good_walks_back(saved, tokenizer, capsys):
    run, model, state = saved
    saver = checkpoint.Saver(run, 0, None, keep=9)
    for step in (6, 7):
        saver.save(step, model, state, tokenizer, {})
    saver.wait()
    (run / "checkpoints/step-00000007/meta.json").write_text("{}")
    shutil.rmtree(run / "checkpoints/step-00000006/training")
    (run / "checkpoints/tmp-step-00000008").mkdir()  # of a save that was killed
    assert checkpoint.newest_good(run) == run / "checkpoints/step-00000005"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "meta.json has 2 bytes of" in said[0]
    assert not list((run / "checkpoints").glob("tmp-*"))
    assert checkpoint.steps(run) == [5]
    saver.save(7, model, state, tokenizer, {})  # the name is free again
    assert saver.finish() is None
    assert checkpoint.newest_good(run).name == "step-00000007"


def test_retention(saved, tokenizer):
    run, model, state = saved
    saver = checkpoint.Saver(run, 0, None, keep=2, keep_every=10)
    (run / "best.json").write_text('{"step": 6, "val_loss": 1.0}')
    for step in (6, 7, 8, 9, 10, 11, 12, 13):
        saver.save(step, model, state, tokenizer, {})
    saver.wait()
    assert checkpoint.steps(run) == [6, 10, 12, 13]
    assert checkpoint.find(run).name == "step-00000006"
    (run / "best.json").write_text('{"step": 14, "val_loss": 1.0}')  # its save failed
    assert checkpoint.find(run).name == "step-00000013"


def test_a_checkpoint_is_never_overwritten(saved, tokenizer):
    run, model, state = saved
    before = checkpoint.checksum(checkpoint.find(run))
    saver = checkpoint.Saver(run, 0, None, keep=2)
    with torch.no_grad():
        model.embed.weight.zero_()
    saver.save(5, model, state, tokenizer, {})
    assert "step-00000005 was not written: Directory not empty" in saver.finish()
    assert checkpoint.checksum(checkpoint.find(run)) == before
    assert not list((run / "checkpoints").glob("tmp-*"))


def test_nothing_in_a_checkpoint_is_unpickled(saved, monkeypatch):
    """Neither the loader nor torch.distributed.checkpoint reads a pickle, whatever lies there."""
    run, model, state = saved
    folder = checkpoint.find(run)
    (folder / "training/.metadata").write_bytes(pickle.dumps("not read"))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("a pickle was read"))
    checkpoint.load_training(model, state, folder)
    load_model(run, "cpu")


def test_a_run_that_left_out_data_is_refused(tmp_path):
    """Older versions went back after a loss spike, and on with later data."""
    (tmp_path / "meta.json").write_text('{"step": 1, "world_size": 1, "data_offset": 5}')
    model, ranks = Phi(ODD), distributed.Ranks(0, 1, 0, 1, 0, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    guard = distributed.Guard(ranks.device, scaled=False)
    state = checkpoint.RunState(model, optimizer, guard, ranks, None, None, {})
    with pytest.raises(UserError, match="start from its weights with --init_from"):
        state.restore(tmp_path)
