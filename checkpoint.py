"""Checkpoints on disk: folders that are whole or not there.

    RUN/config.json                    the run's resolved configuration
    RUN/best.json                      {"step", "val_loss"} of the best checkpoint
    RUN/checkpoints/step-00000500/     model.safetensors   weights, fp32
                                       training.pt         optimiser, scaler and RNG states
                                       tokenizer.model     what its tokens mean
                                       meta.json           step, model shape, losses, fingerprints

A checkpoint is written under a temporary name, flushed to disk, then renamed. Weights are
safetensors; training.pt holds tensors and plain values only and is read with `weights_only=True`.
"""

import dataclasses
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from config import UserError
from data.documents import write_json
from model import ModelConfig, Phi
from tokenizer import Tokenizer


def save(
    run: Path, step: int, model: Phi, training: dict, tokenizer: Tokenizer, meta: dict
) -> Path:
    """Write RUN/checkpoints/step-XXXXXXXX and return it; an interrupted save leaves no such one."""
    final = run / "checkpoints" / f"step-{step:08d}"
    if final.exists():
        return final
    temporary = final.with_name(f"tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    torch.save(training, temporary / "training.pt")
    tokenizer.save(temporary)
    meta = {
        "step": step,
        **meta,
        "tokenizer": tokenizer.fingerprint,
        "model": dataclasses.asdict(model.c),
    }
    write_json(temporary / "meta.json", meta)
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    temporary.rename(final)
    _flush(final.parent)
    return final


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-????????"))


def keep(run: Path, newest: int, best: int | None) -> None:
    """Delete all but the `newest` last checkpoints and the one of step `best`."""
    for step in steps(run)[:-newest]:
        if step != best:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


def find(path: Path, newest: bool = False) -> Path:
    """The checkpoint folder that `path` names: itself, or of a run its best (or newest) one."""
    path = Path(path)
    if (path / "meta.json").exists():
        return path
    done = steps(path)
    if not done:
        raise UserError(f"no checkpoint at {path}; want a run folder or one of its step folders")
    step, best = done[-1], path / "best.json"
    if not newest and best.exists():
        step = json.loads(best.read_text())["step"]
    return path / "checkpoints" / f"step-{step:08d}"


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def load_weights(model: Phi, folder: Path) -> None:
    """Copy the weights in `folder` into `model`. Raises UserError if the shapes differ."""
    try:
        weights = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {e}") from None
    mine = model.state_dict()
    for name in sorted(mine.keys() | weights.keys()):
        want, got = (list(d[name].shape) if name in d else "nothing" for d in (mine, weights))
        if want != got:
            raise UserError(
                f"{folder} holds another model: {name} is {got} there, {want} here; "
                f"its shape is {read_meta(folder)['model']}"
            )
    model.load_state_dict(weights)


def load_training(folder: Path) -> dict:
    """The optimiser, scaler and RNG states in `folder`, on the CPU. Executes nothing it reads."""
    try:
        return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as e:
        raise UserError(f"{folder / 'training.pt'} cannot be read: {e}") from None


def checksum(folder: Path) -> str:
    """CRC-32 of the weights' file, 8 hex digits."""
    crc = 0
    with open(folder / "model.safetensors", "rb") as f:
        while part := f.read(1 << 24):
            crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def load_model(path: Path, device: torch.device) -> tuple[Phi, Tokenizer, Path]:
    """The model of a run or checkpoint folder in eval mode, its tokenizer, and the folder used."""
    folder = find(path)
    model = Phi(ModelConfig(**read_meta(folder)["model"]))
    load_weights(model, folder)
    return model.to(device).eval(), Tokenizer(folder), folder


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
