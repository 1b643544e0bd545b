"""Checkpoints on disk: written atomically, and free of pickles, so loading one runs no code.

    RUN/checkpoints/step-00000500/   model.safetensors   unsharded fp32 weights, for inference
                                     tokenizer.model     the tokenizer
                                     meta.json           step, shape, fingerprints, counters
                                     training/           Adam's moments, RNG states: a file per rank
                                     manifest.json       size and CRC-32 of every file above

torch.distributed.checkpoint reads and writes `training/` as safetensors (its own format contains
pickles), so a run can resume on a different number of ranks. A save copies the state to host
memory; a thread writes it under a temporary name, flushes, hashes, adds the manifest and renames.
"""

import dataclasses
import errno
import json
import os
import shutil
import threading
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from common.config import UserError
from common.distributed import optimizer_state
from common.files import write_json

# torch warns on every save or load of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk or quota


class Saver:
    """Background writer of a run's checkpoints, one at a time."""

    def __init__(self, run: Path, rank: int, group, keep: int, keep_every: int = 0):
        """Set up; `group` is a dedicated CPU process group of all ranks, None for one rank."""
        self.run, self.rank, self.group = run, rank, group
        self.keep, self.keep_every = keep, keep_every
        self.stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self.thread, self.problem = None, None

    def save(self, step: int, model: nn.Module, training: dict, tokenizer, meta: dict) -> None:
        """Copy the state and start writing RUN/checkpoints/step-XXXXXXXX.

        Wait for the previous save first. `training` holds only tensors. `finish` returns errors.
        """
        self.wait()
        meta = {"step": step, **meta, "tokenizer": tokenizer.fingerprint,
                "model": dataclasses.asdict(model.c)}  # fmt: skip
        weights = {}
        for name, p in model.state_dict().items():  # gather one tensor at a time, keep on rank 0
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            if self.rank == 0:
                weights[name] = whole.to("cpu", copy=True)
        arguments = (step, weights, self.stager.stage(training), tokenizer, meta)
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Wait for the save in progress, if any."""
        if self.thread:
            self.thread.join()
        self.thread = None

    def finish(self) -> str | None:
        """Wait for the save in progress; return the error since the last call, or None."""
        self.wait()
        problem, self.problem = self.problem, None
        return problem

    def _write(self, step: int, weights: dict, training: dict, tokenizer, meta: dict) -> None:
        final = folder_of(self.run, step)
        temporary = final.with_name(f"tmp-{final.name}")
        files, error, first = {}, "", self.rank == 0
        try:  # the collective save goes first: an error on one rank is raised on all
            writer = dcp.HuggingFaceStorageWriter(temporary / "training", save_distributed=True)
            alone = self.group is None
            dcp.save(training, storage_writer=writer, process_group=self.group, no_dist=alone)
            if first:
                save_file(weights, temporary / "model.safetensors")
                tokenizer.save(temporary)
                write_json(temporary / "meta.json", meta)
            mine = list((temporary / "training").glob(f"shard-{self.rank + 1:05d}-*"))
            mine += [p for p in temporary.iterdir() if p.is_file() and first]
            for path in mine:
                _flush(path)
                files[str(path.relative_to(temporary))] = _size_and_crc(path)
        except (Exception, dcp.api.CheckpointException) as e:  # the latter is a BaseException only
            error = _explain(e)
        try:
            everyones = [(files, error)]
            if self.group:
                everyones = [None] * dist.get_world_size(self.group)
                dist.all_gather_object(everyones, (files, error), group=self.group)
            for theirs, their_error in everyones:
                files, error = files | theirs, error or their_error
            if first and not error:
                absent = [name for name in files if not (temporary / name).exists()]
                if absent:
                    raise UserError(f"{absent[0]} is on another machine; `out` must be shared")
                write_json(temporary / "manifest.json", {"files": files})
                for path in (temporary / "manifest.json", temporary / "training", temporary):
                    _flush(path)
                temporary.rename(final)
                _flush(final.parent)
                self._prune()
        except Exception as e:
            error = _explain(e)
        if error:
            self.problem = f"checkpoint {final} was not written: {error}"
            if first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        """Delete all checkpoints except the newest, the best, and multiples of keep_every."""
        best = best_step(self.run)
        for step in steps(self.run)[: -self.keep]:
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(folder_of(self.run, step))


class RunState:
    """All state a step depends on, except the data; `facts` are JSON values for meta.json."""

    def __init__(self, model, optimizer, guard, ranks, tokenizer, saver: Saver, facts: dict):
        self.model, self.optimizer, self.guard = model, optimizer, guard
        self.ranks, self.tokenizer, self.saver, self.facts = ranks, tokenizer, saver, facts
        self.step = self.saved_step = 0
        self.trained_s = 0.0  # up to the last log line
        # This rank's sum of losses and count of steps taken, since the last log line.
        self.losses = torch.zeros(2, device=ranks.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors except the weights; a rankN. prefix marks rank N's own."""
        own = {"losses": self.losses, "rng_cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        own = {f"rank{self.ranks.rank}.{k}": v for k, v in own.items()}
        return optimizer_state(self.model, self.optimizer) | self.guard.state() | own

    def save(self) -> None:
        """Start writing a checkpoint, unless this step already has one."""
        if self.step == self.saved_step:
            return
        meta = {"trained_s": self.trained_s, "world_size": self.ranks.world_size} | self.facts
        self.saver.save(self.step, self.model, self.tensors(), self.tokenizer, meta)
        self.saved_step = self.step

    def restore(self, folder: Path) -> str:
        """Restore everything from a checkpoint of this run; return a message for the user."""
        meta, saved, told = read_meta(folder), self.tensors(), ""
        if meta["world_size"] != self.ranks.world_size:  # drop the per-rank state
            saved = {k: v for k, v in saved.items() if not k.startswith("rank")}
            told = f"saved by {meta['world_size']} ranks: the same batches, but new dropout masks\n"
        load_training(self.model, saved, folder)
        mine = f"rank{self.ranks.rank}"
        torch.set_rng_state(saved.get(f"{mine}.rng_cpu", torch.get_rng_state()))
        if f"{mine}.rng_cuda" in saved:
            torch.cuda.set_rng_state(saved[f"{mine}.rng_cuda"], self.ranks.device)
        self.step = self.saved_step = meta["step"]
        self.trained_s = meta["trained_s"]
        return f"{told}resuming from step {self.step:,} ({folder})"


def _explain(e: BaseException) -> str:
    if isinstance(e, dcp.api.CheckpointException):  # carries every rank's error; report one
        e = next(iter(e.failures.values()))[0]
    full = getattr(e, "errno", None) in FULL or any(f"os error {n}" in str(e) for n in FULL)
    where = f" ({e.filename})" if getattr(e, "filename", None) else ""
    text = (getattr(e, "strerror", None) or str(e) or type(e).__name__).strip().splitlines()[-1]
    return text + where + "; free space there, or lower `keep`" * full


def damage(folder: Path, names: list[str] | None = None) -> str:
    """Check a checkpoint's files (or only `names`); return what is wrong, or ""."""
    try:
        files = json.loads((folder / "manifest.json").read_bytes())["files"]
        for name in names or files:
            path, want = folder / name, files[name]
            if path.stat().st_size != want["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes of {want['bytes']:,}"
            if _size_and_crc(path) != want:
                return f"{name} was changed: its CRC-32 differs"
    except OSError as e:
        return f"{Path(e.filename).name}: {e.strerror}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "manifest.json cannot be read"
    return ""


def newest_good(run: Path) -> Path | None:
    """Return the newest undamaged checkpoint, or None.

    Rename newer, damaged ones to damaged-step-XXXXXXXX, and delete leftovers of killed saves.
    """
    for path in (run / "checkpoints").glob("tmp-step-*"):
        shutil.rmtree(path)
    for step in reversed(steps(run)):
        folder = folder_of(run, step)
        if not (wrong := damage(folder)):
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"checkpoint {folder} is damaged: {wrong}; set aside as {aside.name}", flush=True)
    return None


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Return the steps with a complete checkpoint, ascending."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-????????"))


def best_step(run: Path) -> int | None:
    path = run / "best.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def find(path: Path, newest: bool = False) -> Path:
    """Return `path` if it is a checkpoint folder, else the run's best (or newest) checkpoint."""
    path = Path(path)
    if (path / "meta.json").exists():
        return path
    done = steps(path)
    if not done:
        raise UserError(f"no checkpoint at {path}; want a run folder or one of its step folders")
    best = best_step(path)  # may be missing: its save can fail
    step = best if best in done and not newest else done[-1]
    return folder_of(path, step)


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights in `folder` into `model`, which must not be sharded."""
    # tools.hf writes no manifest.
    if (folder / "manifest.json").exists() and (wrong := damage(folder, ["model.safetensors"])):
        raise UserError(f"checkpoint {folder} is damaged: {wrong}; use another one")
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{folder / 'model.safetensors'} cannot be read: {e}") from None
    except RuntimeError as e:  # its second line names a tensor and both shapes
        shape = read_meta(folder)["model"]
        said = str(e).splitlines()[1].strip()
        raise UserError(f"{folder} holds another model: {said}; its shape is {shape}") from None


def load_training(model: nn.Module, training: dict, folder: Path) -> None:
    """Load the weights of a (sharded) model and the tensors in `training`, each rank its shards."""
    for state, where in ((model.state_dict(), folder), (training, folder / "training")):
        reader = dcp.HuggingFaceStorageReader(where)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def checksum(folder: Path) -> str:
    """Return the CRC-32 of the weights file, 8 hex digits."""
    return _size_and_crc(folder / "model.safetensors")["crc32"]


def _size_and_crc(path: Path) -> dict:
    crc = 0
    with open(path, "rb") as f:
        while part := f.read(1 << 24):
            crc = zlib.crc32(part, crc)
        return {"bytes": f.tell(), "crc32": f"{crc:08x}"}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
