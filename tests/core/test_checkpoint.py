import pickle
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from common import checkpoint
from common.config import UserError
from model import ModelConfig, Phi, load_model
from tokenizer import Tokenizer

ODD = ModelConfig(61, 19, 2, 3, 42, 50, 6)


@pytest.fixture
def tokenizer(tokens):
    return Tokenizer(tokens)


@pytest.fixture
def saved(tmp_path, tokenizer):
    """Return a run folder with one checkpoint, its model and its training state."""
    model, state = Phi(ODD), {"exp_avg.x": torch.randn(7, 5), "rank0.rng": torch.get_rng_state()}
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
    folder, draw = checkpoint.find(saved[0]), random.Random(0)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    for path in files * 5:
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        flipped = bytes([whole[at] ^ 1 << draw.randrange(8)])
        for damaged in (whole[:at], whole[:at] + flipped + whole[at + 1 :]):
            path.write_bytes(damaged)
            assert path.name in checkpoint.damage(folder)
            if path.name == "model.safetensors":
                with pytest.raises(UserError, match=r"damaged: model\.safetensors"):
                    load_model(saved[0], "cpu")
        path.write_bytes(whole)
    assert checkpoint.damage(folder) == ""
    files[0].unlink()
    assert "No such file" in checkpoint.damage(folder)
    (folder / "manifest.json").write_text("{")
    assert checkpoint.damage(folder) == "manifest.json cannot be read"


def test_newest_good_walks_back(saved, tokenizer, capsys):
    run, model, state = saved
    saver = checkpoint.Saver(run, 0, None, keep=9)
    for step in (6, 7):
        saver.save(step, model, state, tokenizer, {})
    saver.wait()
    (run / "checkpoints/step-00000007/meta.json").write_text("{}")
    shutil.rmtree(run / "checkpoints/step-00000006/training")
    (run / "checkpoints/tmp-step-00000008").mkdir()  # left by a killed save
    assert checkpoint.newest_good(run) == run / "checkpoints/step-00000005"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert "meta.json has 2 bytes of" in said[0]
    assert not list((run / "checkpoints").glob("tmp-*"))
    assert checkpoint.steps(run) == [5]
    saver.save(7, model, state, tokenizer, {})  # the name is free again
    assert saver.finish() is None
    assert checkpoint.newest_good(run).name == "step-00000007"


def test_which_are_kept_and_none_is_overwritten(saved, tokenizer):
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
    with torch.no_grad():
        model.embed.weight.zero_()
    saver.save(13, model, state, tokenizer, {})
    assert "step-00000013 was not written: Directory not empty" in saver.finish()
    assert checkpoint.damage(checkpoint.find(run)) == ""
    assert not list((run / "checkpoints").glob("tmp-*"))


def test_nothing_in_a_checkpoint_is_unpickled(saved, monkeypatch):
    """Neither our loader nor torch.distributed.checkpoint reads a pickle, even if one is there."""
    run, model, state = saved
    folder = checkpoint.find(run)
    (folder / "training/.metadata").write_bytes(pickle.dumps("not read"))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("a pickle was read"))
    checkpoint.load_training(model, state, folder)
    load_model(run, "cpu")
