import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import read_metrics
from ranks import Run, back_to, curve, status

import model
from common import checkpoint, distributed
from common.config import parse
from common.runlog import RunLog
from data.shards import write_shard
from model import ModelConfig, Phi, parameter_count
from tokenizer import Tokenizer
from train import TrainConfig, get_lr, main, make_optimizer


def train(tiny, tokens, out, *flags, ranks=1, ok=True):
    """Run train.py and return its output; it must succeed, or if not `ok` end in a UserError."""
    run = Run(out, [*tiny, f"--data={tokens}", *flags], ranks)
    return run.finish(*[0 if ok else 2] * ranks)


@pytest.fixture(scope="module")
def reference(tiny, tokens, tmp_path_factory):
    """Return an uninterrupted run of 12 steps with dropout."""
    out = tmp_path_factory.mktemp("train") / "reference"
    train(tiny, tokens, out, "--max_steps=12", "--eval_interval=4", "--log_interval=2",
          "--dropout=0.1", "--keep=9")  # fmt: skip
    return out


GOLDEN = [6.2176, 6.1986, 6.1256, 6.0949, 6.0427, 6.0347]  # of the reference run
LIKE_PHI1_SMALL = ["--seq_len=256", "--n_layer=4", "--n_head=16", "--width=1024",
                   "--mlp_width=4096", "--rotary_dim=32"]  # fmt: skip


def weights(run):
    return checkpoint.checksum(checkpoint.find(run, newest=True))


def test_learns_and_keeps_the_best(reference):
    losses = [r["loss"] for r in read_metrics(reference) if "loss" in r]
    assert losses == pytest.approx(GOLDEN, abs=2e-3)
    best = json.loads((reference / "best.json").read_text())
    vals = {r["step"]: r["val_loss"] for r in read_metrics(reference) if "val_loss" in r}
    assert list(vals) == [4, 8, 12]
    assert vals[best["step"]] == best["val_loss"] == min(vals.values())
    summary = json.loads((reference / "summary.json").read_text())
    assert summary["tokens"] == 12 * 4 * 32
    assert summary["weights"] == weights(reference)


@pytest.mark.parametrize(
    ("device", "dtype", "shape"),
    [
        ("cpu", "float32", ["--lr=0.01"]),
        ("cpu", "float32", ["--lr=0.01", "--optimizer=muon"]),
        ("cpu", "bfloat16", ["--width=64", "--lr=0.01"]),
        ("cpu", "bfloat16", ["--width=64", "--lr=0.01", "--matmul=fp8"]),
        pytest.param("cuda", "bfloat16", LIKE_PHI1_SMALL, marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", [*LIKE_PHI1_SMALL, "--optimizer=muon"],
                     marks=pytest.mark.gpu),
        pytest.param("cuda", "float16", LIKE_PHI1_SMALL, marks=pytest.mark.gpu),
    ],
)
def test_resume_is_bitwise(tiny, tokens, tmp_path, record_property, device, dtype, shape):
    """Half precision tests FSDP2 over a mesh of one; a GPU also tests the Triton kernels."""
    flags = ["--max_steps=8", "--eval_interval=4", "--log_interval=2", "--dropout=0.1", "--keep=9",
             f"--device={device}", f"--dtype={dtype}", *shape]  # fmt: skip
    said = train(tiny, tokens, tmp_path / "whole", *flags)
    assert ("kernels: triton" in said) == (device == "cuda")
    losses = [r["loss"] for r in read_metrics(tmp_path / "whole") if "loss" in r]
    record_property("told", f"loss {' '.join(f'{loss:.3f}' for loss in losses)}")
    assert losses[-1] < losses[0] - 0.1
    # Rewind the run to step 4, with later log lines and a leftover of a killed save.
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    (tmp_path / "run/checkpoints/tmp-step-00000008").mkdir()
    train(tiny, tokens, tmp_path / "run", *flags, "--resume")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def plant_a_cpu_that_is_fast_in_bfloat16(_rank: int) -> None:
    """Advance the clock by 1 s per float32 forward and by 0.5 s per bfloat16 forward."""
    clock, forward = [0.0], model.Phi.forward

    def timed(self, *args, **kwargs):
        clock[0] += 0.5 if self.embed.weight.dtype == torch.bfloat16 else 1.0
        return forward(self, *args, **kwargs)

    model.Phi.forward = timed
    model.time = types.SimpleNamespace(perf_counter=lambda: clock[0])
    torch.cpu.get_capabilities = lambda: {"amx_bf16": True}


def plant_a_cpu_without_bfloat16(_rank: int) -> None:
    torch.cpu.get_capabilities = dict


def test_the_dtype_that_is_measured_stays(tiny, tokens, tmp_path):
    flags = [*tiny, f"--data={tokens}", "--eval_interval=2", "--dtype=auto"]
    plant = plant_a_cpu_without_bfloat16
    said = Run(tmp_path / "run", [*flags, "--max_steps=2"], plant=plant).finish()
    assert "in float32 (this CPU has no bfloat16 matmul)" in said
    plant = plant_a_cpu_that_is_fast_in_bfloat16
    said = Run(tmp_path / "fast", [*flags, "--max_steps=4"], plant=plant).finish()
    assert "in bfloat16 (a bfloat16 step takes 0.50x the float32 time here)" in said
    back_to(tmp_path / "fast", 2, tmp_path / "resumed")
    said = Run(tmp_path / "resumed", [*flags, "--max_steps=4", "--resume"]).finish()
    assert "in bfloat16 (as before)" in said
    assert curve(tmp_path / "resumed") == curve(tmp_path / "fast")


@pytest.mark.parametrize(
    ("ranks", "optimizer", "dtype", "tolerance"),
    [(2, "adamw", "float32", 1e-5), (2, "adamw", "float16", 2e-3), (4, "muon", "float32", 1e-5),
     (2, "muon", "float16", 2e-3)],
)  # fmt: skip
def test_ranks_see_the_same_as_one(tiny, tokens, tmp_path, ranks, optimizer, dtype, tolerance):
    problem = {"task_id": "T/0", "prompt": "def f(a):\n", "canonical_solution": "    return a\n",
               "entry_point": "f", "test": "def check(f): pass"}  # fmt: skip
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem))
    flags = ["--max_steps=6", "--eval_interval=3", "--log_interval=1", "--grad_clip=0",
             "--micro_batch=1", "--n_layer=3", "--lr=0.01", "--warmup_steps=1",
             f"--optimizer={optimizer}", f"--dtype={dtype}",
             f"--eval_problems={tmp_path}/problems.jsonl"]  # fmt: skip
    said = train(tiny, tokens, tmp_path / "1", *flags)
    gold = [r["gold_bits_per_byte"] for r in curve(tmp_path / "1") if "val_loss" in r]
    assert 0 < gold[1] < gold[0]
    assert f"gold bits per byte {gold[1]:.4f}" in said
    train(tiny, tokens, tmp_path / "all", *flags, ranks=ranks)
    for a, b in zip(curve(tmp_path / "1"), curve(tmp_path / "all"), strict=True):
        assert a == pytest.approx(b, rel=tolerance)


def test_a_run_on_two_folders_packed_and_scored(tiny, tokens, tmp_path):
    """Memorise the one function of the first folder; a resumed run ends with the same bits."""
    problem = {"task_id": "T/0", "prompt": "def one(x):\n", "canonical_solution": "    return x\n",
               "entry_point": "one", "test": "def check(f):\n    assert f(3) == 3\n"}  # fmt: skip
    problems, tokenizer = tmp_path / "problems.jsonl", Tokenizer(tokens)
    problems.write_text(json.dumps(problem))
    ids = tokenizer.encode(problem["prompt"] + problem["canonical_solution"])
    (tmp_path / "one").mkdir()
    tokenizer.save(tmp_path / "one")
    for split in ("train", "val"):
        file, document = tmp_path / "one" / f"{split}_00000.bin", [*ids, tokenizer.end_of_text]
        write_shard(file, [np.array(document)] * 50, 512, 50, tokenizer.fingerprint)
    flags = [*tiny, f"--data={tmp_path / 'one'}:9", f"--data={tokens}:1", "--doc_mask",
             "--best_fit", "--max_steps=60", "--eval_interval=15", "--lr=0.02", "--keep=9",
             f"--eval_problems={problems}", "--score_every=2"]  # fmt: skip
    said = Run(tmp_path / "run", flags).finish()
    assert "padding" in said
    scores = {r["step"]: r["pass@1"] for r in read_metrics(tmp_path / "run") if "pass@1" in r}
    assert scores == {30: scores[30], 60: 1.0}
    assert "pass@1 1.0000" in said
    back_to(tmp_path / "run", 30, tmp_path / "resumed")
    Run(tmp_path / "resumed", [*flags, "--resume", "--score_every=0"]).finish()
    assert weights(tmp_path / "resumed") == weights(tmp_path / "run")
    problems.write_text(json.dumps(problem | {"test": "def check(f):\n    assert f(3) == 4\n"}))
    back_to(tmp_path / "run", 45, tmp_path / "wrong")
    said = Run(tmp_path / "wrong", [*flags, "--resume"], ranks=2).finish(0, 0)
    assert f"eval.humaneval gave no pass@1 on {problems}" in said
    assert status(tmp_path / "wrong")["status"] == "done"


def test_init_from_starts_at_the_other_runs_loss(tiny, tokens, reference, tmp_path):
    out = tmp_path / "finetuned"
    train(tiny, tokens, out, "--max_steps=2", "--eval_interval=1", "--lr=1e-9",
          f"--init_from={reference}")  # fmt: skip
    best = json.loads((reference / "best.json").read_text())["val_loss"]
    assert read_metrics(out)[-1]["val_loss"] == pytest.approx(best, abs=1e-3)


def test_a_run_is_not_overwritten(tiny, tokens, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "run")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    same = ["--max_steps=12", "--eval_interval=4", "--log_interval=2", "--dropout=0.1"]
    for flags, message in [
        (same, "already holds a run; --resume it"),
        ([*same, "--resume", "--lr=3e-3"], "lr was 0.001 and is 0.003 now (1 changed)"),
    ]:
        said = train(tiny, tokens, tmp_path / "run", *flags, ok=False)
        assert message in said
        after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
        assert after == before
    train(tiny, f"{tokens}/", tmp_path / "run", *same, "--resume")  # the same folder
    train(tiny, tokens, tmp_path / "run", "--max_steps=2", "--resume", "--restart")
    assert checkpoint.steps(tmp_path / "run") == [2]


def test_restart_leaves_a_folder_that_is_no_run(tiny, tokens, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    assert "holds no run" in train(tiny, tokens, tmp_path, "--restart", ok=False)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--seqs_per_step=5", "seqs_per_step 5 is not divisible by micro_batch 2 x 1 ranks"),
        ("--data=nowhere", "data nowhere: no such folder"),
        ("--vocab_size=100", "has 512 pieces, more than the model's vocab_size 100"),
        ("--init_from=nowhere", "no checkpoint at nowhere"),
        ("--lr=0", "lr is 0.0"),
        ("--best_fit", "best_fit is True, want --doc_mask as well"),
        ("--score_every=1", "score_every is 1, want --eval_problems as well"),
    ],
)
def test_bad_input(tiny, tokens, tmp_path, in_process, flag, message):
    out = f"--out={tmp_path / 'run'}"
    status, _, error = in_process(main, *tiny, f"--data={tokens}", out, "--threads=1", flag)
    assert (status, message in error) == (2, True), error
    assert not (tmp_path / "run").exists()


def test_another_shape_and_another_tokenizer(tiny, tokens, reference, tmp_path):
    for flag, why in (("--mlp_width=48", "holds another model: size mismatch for blocks.0."),
                      ("--qk_norm=true", "has qk_norm = False")):  # fmt: skip
        said = train(tiny, tokens, tmp_path / "a", f"--init_from={reference}", flag, ok=False)
        assert why in said
    other = tmp_path / "other"
    shutil.copytree(checkpoint.find(reference), other)
    (other / "meta.json").write_text('{"tokenizer": "another"}')
    said = train(tiny, tokens, tmp_path / "a", f"--init_from={other}", ok=False)
    assert "trained with another tokenizer" in said
    assert not (tmp_path / "a").exists()


def test_gradients_that_stay_not_finite_stop_the_run(tiny, tokens, tmp_path):
    said = train(tiny, tokens, tmp_path / "run", "--lr=1e30", "--warmup_steps=1",
                 "--grad_clip=0", "--log_interval=1", ok=False)  # fmt: skip
    assert "the gradients of 20 steps in a row, up to step 21, were not finite" in said
    assert status(tmp_path / "run")["status"] == "failed"


@pytest.mark.parametrize(
    ("schedule", "at_9", "at_12"),
    [("linear", 0.55, 0.28), ("cosine", 0.55, 0.1859), ("wsd", 1, 0.46)],
)
def test_get_lr(schedule, at_9, at_12):
    c = TrainConfig(lr=1.0, schedule=schedule, decay_frac=5 / 14, warmup_steps=4, max_steps=14,
                    final_lr_frac=0.1)  # fmt: skip
    assert [get_lr(s, c) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    got = [get_lr(s, c) for s in (9, 12, 14)]
    assert got == pytest.approx([at_9, at_12, 0.1], abs=1e-4)


def test_decay_groups():
    model = Phi(ModelConfig(61, 19, 2, 3, 42, 50, 6))
    decay, no_decay = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.3, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    matrices = {names[id(p)].split(".")[-1] for p in decay["params"]}
    assert matrices == {"weight", "w_in", "w_out"}
    assert not any("ln" in names[id(p)] for p in decay["params"])


def test_paper_presets():
    want = {"phi1": 1_418_270_720, "phi1_base": 1_418_270_720, "phi1_small": 356_794_368}
    for name, parameters in want.items():
        c = parse(TrainConfig, [f"configs/{name}.toml"], toml=True)
        assert parameter_count(c.model) == parameters


def test_where_things_are_kept_changes_nothing(tiny, tokens, tmp_path):
    flags = ["--max_steps=4", "--eval_interval=4", "--log_interval=1", "--dropout=0.1",
             "--micro_batch=1", "--optimizer=muon"]  # fmt: skip
    plain, regathered, replicas = (tmp_path / name for name in ("plain", "regathered", "replicas"))
    train(tiny, tokens, plain, *flags, ranks=2)
    train(tiny, tokens, regathered, *flags, "--recompute", "--regather", ranks=2)
    train(tiny, tokens, replicas, *flags, "--shard=1", ranks=2)
    assert curve(regathered) == curve(plain)
    assert weights(regathered) == weights(plain)
    # Replicas sum the clipping norm in another order.
    want, got = ([r["loss"] for r in curve(run) if "loss" in r] for run in (plain, replicas))
    assert got == pytest.approx(want, rel=1e-6)


def test_the_loss_scale_finds_its_place():
    """Overflow halves the scale and leaves the weights; then the step matches an unscaled one."""
    guard = distributed.Guard(torch.device("cpu"), scaled=True)
    model = torch.nn.Linear(1, 1, bias=False).half()
    master = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(master.parameters(), 0.1, fused=True, weight_decay=0.0)
    before, taken_at = master.weight.item(), []
    for step in range(4):
        loss = (model.weight * 3).float().sum()
        (loss * guard.scale).backward()  # 3 * 2^16 is beyond fp16's 65,504
        master.weight.grad, model.weight.grad = model.weight.grad.float(), None
        norm = guard.clip(master, optimizer, max_norm=1.0)
        optimizer.step()
        if guard.update(optimizer):
            taken_at.append((step, guard.scale.item(), norm.item()))
        else:
            assert master.weight.item() == before
    assert taken_at == [(2, 2.0**14, 3.0), (3, 2.0**14, 3.0)]
    assert guard.skipped.item() == 2
    assert guard.most_in_a_row.item() == 2
    assert guard.in_a_row.item() == 0
    assert master.weight.item() == pytest.approx(before - 0.2, abs=1e-5)


def test_wandb_gets_every_record(tmp_path, monkeypatch):
    told, run = [], types.SimpleNamespace(log=lambda record, step: told.append((record, step)))
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    ranks = distributed.Ranks(0, 1, 0, 1, 0, torch.device("cpu"))
    log = RunLog(TrainConfig(out=tmp_path, wandb="mine"), ranks, {})
    log.write({"step": 2, "loss": 0.5})
    assert (told[0]["project"], told[0]["resume"]) == ("mine", "allow")
    assert told[1:] == [({"step": 2, "loss": 0.5}, 2)]
