"""Checkpoints on disk: folders that are whole or not there, and nothing in them can execute.

    RUN/config.json                  the run's resolved configuration
    RUN/best.json                    {"step", "val_loss"} of the best evaluation
    RUN/checkpoints/step-00000500/   model.safetensors   weights, fp32, whole: inference reads them
                                     tokenizer.model     what its tokens mean
                                     meta.json           step, shape, fingerprints, counters
                                     training/           Adam's moments and RNG states: a file of
                                                         its own for each rank's part
                                     manifest.json       size and CRC-32 of every file above

`training/` is written and read by torch.distributed.checkpoint in its safetensors format (its own
format holds pickles), so that any number of ranks can load what another number saved; they read
their parts of model.safetensors in the same way. A save copies the state to host memory, and the
rest happens in a thread: write under a temporary name, flush, hash, write the manifest, rename.
"""

import dataclasses
import errno
import hashlib
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

# It says so each time that a single process saves or loads.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk or a quota says


class Saver:
    """Writes a run's checkpoints, one at a time, behind the training."""

    def __init__(self, run: Path, rank: int, group, keep: int, keep_every: int):
        """`group` is a CPU process group of all ranks that nothing else uses, None for one rank."""
        self.run, self.rank, self.group = run, rank, group
        self.keep, self.keep_every = keep, keep_every
        self.stager = BlockingAsyncStager(cache_staged_state_dict=torch.cuda.is_available())
        self.thread, self.problem = None, None

    def save(self, step: int, model: nn.Module, training: dict, tokenizer, meta: dict) -> None:
        """Copy the state, and start to write RUN/checkpoints/step-XXXXXXXX.

        Waits for the copy, and for the save before. `training` holds tensors only. What goes wrong
        later is left in `problem`.
        """
        self.wait()
        meta = {"step": step, **meta, "tokenizer": tokenizer.fingerprint}
        meta["model"] = dataclasses.asdict(model.c)
        weights = {}
        for name, p in model.state_dict().items():  # whole on rank 0, one after the other
            whole = p.full_tensor() if isinstance(p, DTensor) else p
            if self.rank == 0:
                weights[name] = whole.to("cpu", copy=True)
        training = self.stager.stage(training)
        arguments = (step, weights, training, tokenizer, meta)
        self.thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self.thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self.thread:
            self.thread.join()
        self.thread = None

    def finish(self) -> str | None:
        """Wait; what went wrong since the last call, if anything."""
        self.wait()
        problem, self.problem = self.problem, None
        return problem

    def _write(self, step: int, weights: dict, training: dict, tokenizer, meta: dict) -> None:
        final = self.run / "checkpoints" / f"step-{step:08d}"
        temporary = final.with_name(f"tmp-{final.name}")
        files, error = {}, None
        try:  # the ranks' common part first: what fails on one of them fails on all
            writer = dcp.HuggingFaceStorageWriter(temporary / "training", save_distributed=True)
            alone = self.group is None
            dcp.save(training, storage_writer=writer, process_group=self.group, no_dist=alone)
            if self.rank == 0:
                save_file(weights, temporary / "model.safetensors")
                tokenizer.save(temporary)
                write_json(temporary / "meta.json", meta)
            mine = list((temporary / "training").glob(f"shard-{self.rank + 1:05d}-*"))
            if self.rank == 0:
                mine += [p for p in temporary.iterdir() if p.is_file()]
            for path in mine:
                _flush(path)
                files[str(path.relative_to(temporary))] = _size_and_crc(path)
        except dcp.api.CheckpointException as e:  # no Exception; of all ranks, so one will do
            error = next(iter(e.failures.values()))[0]
        except Exception as e:
            error = e
        try:
            for files_there, their_error in self._gather((files, error and _explain(error))):
                files, error = files | files_there, error or their_error
            if self.rank == 0 and not error:
                _finish(temporary, final, files)
                prune(self.run, self.keep, self.keep_every)
        except Exception as e:
            error = e
        if error:
            error = error if isinstance(error, str) else _explain(error)
            self.problem = f"checkpoint {final} was not written: {error}"
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _gather(self, mine: tuple) -> list[tuple]:
        if not self.group:
            return [mine]
        everyone = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


class RunState:
    """What the next step depends on besides the data: saved in checkpoints, restored by a resume.

    step        optimizer steps done
    trained_s   seconds in them, up to the last log line
    losses      fp32 [2], of this rank since the last log line: sum of the losses, steps taken
    """

    def __init__(self, model, optimizer, guard, ranks, tokenizer, saver: Saver, facts: dict):
        """`facts` are JSON values that each checkpoint's meta.json holds too."""
        self.model, self.optimizer, self.guard = model, optimizer, guard
        self.ranks, self.tokenizer, self.saver, self.facts = ranks, tokenizer, saver, facts
        self.step = self.saved_step = 0
        self.trained_s = 0.0
        self.losses = torch.zeros(2, device=ranks.device)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors but the weights; those named rankN. are rank N's own."""
        own = {"losses": self.losses, "rng_cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            own["rng_cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        own = {f"rank{self.ranks.rank}.{k}": v for k, v in own.items()}
        return optimizer_state(self.model, self.optimizer) | self.guard.state() | own

    def save(self) -> None:
        """Begin to write a checkpoint, unless this step has one."""
        if self.step == self.saved_step:
            return
        meta = {"trained_s": self.trained_s, "world_size": self.ranks.world_size} | self.facts
        self.saver.save(self.step, self.model, self.tensors(), self.tokenizer, meta)
        self.saved_step = self.step

    def restore(self, folder: Path) -> str:
        """Take everything from a checkpoint of this run; return what a user should know of it."""
        meta, saved, told = read_meta(folder), self.tensors(), ""
        if meta.get("data_offset"):
            raise UserError(
                f"{folder} is of a run that left out data after a loss spike, which is not done "
                "any more; start from its weights with --init_from"
            )
        if meta["world_size"] != self.ranks.world_size:  # what ranks have of their own begins anew
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


def _finish(temporary: Path, final: Path, files: dict) -> None:
    """Add the manifest to a folder whose files are on disk, and give it its name."""
    absent = [name for name in files if not (temporary / name).exists()]
    if absent:
        raise UserError(f"{absent[0]} of another machine is not seen here; `out` must be shared")
    write_json(temporary / "manifest.json", {"files": files, "blake2b": _digest(files)})
    for path in (temporary / "manifest.json", temporary / "training", temporary):
        _flush(path)
    temporary.rename(final)
    _flush(final.parent)


def _explain(e: BaseException) -> str:
    full = getattr(e, "errno", None) in FULL or any(f"os error {n}" in str(e) for n in FULL)
    where = f" ({e.filename})" if getattr(e, "filename", None) else ""
    text = (getattr(e, "strerror", None) or str(e) or type(e).__name__).strip().splitlines()[-1]
    return text + where + "; free space there, or lower `keep`" * full


def damage(folder: Path, names: list[str] | None = None) -> str:
    """What is wrong with a checkpoint's files (or with `names` of them), "" if nothing is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        files = manifest["files"]
        if manifest["blake2b"] != _digest(files):
            return "manifest.json was changed"
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


def newest_good(run: Path, report=print) -> Path | None:
    """The newest checkpoint whose every file is what was written, or None.

    Newer ones that are damaged are reported and renamed to damaged-step-XXXXXXXX.
    """
    for step in reversed(steps(run)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        if not (wrong := damage(folder)):
            return folder
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        report(f"checkpoint {folder} is damaged: {wrong}; set aside as {aside.name}")
    return None


def sweep(run: Path) -> None:
    """Delete what killed saves left."""
    for path in (run / "checkpoints").glob("tmp-step-*"):
        shutil.rmtree(path)


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, ascending."""
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").glob("step-????????"))


def prune(run: Path, keep: int, keep_every: int) -> None:
    """Delete all checkpoints but the `keep` newest, the best, and those of every n-th step."""
    best = best_step(run)
    for step in steps(run)[:-keep]:
        if step != best and not (keep_every and step % keep_every == 0):
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")


def best_step(run: Path) -> int | None:
    path = run / "best.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def find(path: Path, newest: bool = False) -> Path:
    """The checkpoint folder that `path` names: itself, or of a run its best (or newest) one."""
    path = Path(path)
    if (path / "meta.json").exists():
        return path
    done = steps(path)
    if not done:
        raise UserError(f"no checkpoint at {path}; want a run folder or one of its step folders")
    best = best_step(path)  # its save may have failed
    step = best if best in done and not newest else done[-1]
    return path / "checkpoints" / f"step-{step:08d}"


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights in `folder` into `model`, which is not sharded.

    Raises UserError if the file is damaged or the shapes differ. A folder without a manifest (one
    that was converted) is taken as it is.
    """
    if (folder / "manifest.json").exists() and (wrong := damage(folder, ["model.safetensors"])):
        raise UserError(f"checkpoint {folder} is damaged: {wrong}; name another")
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


def load_training(model: nn.Module, training: dict, folder: Path) -> None:
    """Fill a (sharded) model's weights and the tensors of `training` from a verified checkpoint.

    Every rank calls it, and reads its own parts only. Keys that `training` lacks are left out.
    """
    for state, where in ((model.state_dict(), folder), (training, folder / "training")):
        reader = dcp.HuggingFaceStorageReader(where)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())


def checksum(folder: Path) -> str:
    """CRC-32 of the weights' file, 8 hex digits."""
    return _size_and_crc(folder / "model.safetensors")["crc32"]


def _size_and_crc(path: Path) -> dict:
    crc = 0
    with open(path, "rb") as f:
        while part := f.read(1 << 24):
            crc = zlib.crc32(part, crc)
        return {"bytes": f.tell(), "crc32": f"{crc:08x}"}


def _digest(files: dict) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode(), digest_size=16).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
