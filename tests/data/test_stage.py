"""Test Stage, the base of every data script, directly and through scripts."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from common.config import UserError
from data.base.documents import ShardWriter, document, source_shards
from data.base.readers import read_documents
from data.base.stage import Stage, total

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
needs_mpi = pytest.mark.skipif(not MPIRUN, reason="no mpirun")


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    factor: int = 1


def count_letters(config, shards):
    """Run a stage of two maps; the second needs the first's results from all shards."""

    def measure(part):
        n = [len(d["text"]) for d in part.documents()]
        np.save(part.scratch / f"{part.name}.npy", n)
        return {"letters": sum(n)}

    def write(part):
        lengths = np.load(part.stage.scratch / f"{part.name}.npy")
        with part.writer() as out:
            for d, n in zip(part.documents(), lengths, strict=True):
                out.write(d | {"frac": config.factor * int(n) / letters})
        return {"documents": out.documents, "bytes": out.bytes}

    with Stage(config, shards) as stage:
        letters = total(stage.map("measure", stage.shards, measure))["letters"]
        return stage.finish(total(stage.map("write", stage.shards, write)))


def shards_of(folder, n_shards=4, each=10, planted=()):
    """Make a folder of shards; append the lines `planted` to the first."""
    folder.mkdir(parents=True)
    for i in range(n_shards):
        lines = [json.dumps(document(f"x{i} = {j}\n" * (i + j + 1), f"code:{i}.{j}"))
                 for j in range(each)]  # fmt: skip
        (folder / f"{i}.jsonl").write_text("\n".join(lines + list(planted if i == 0 else [])))
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}  # fmt: skip


def test_what_a_stage_leaves(tmp_path):
    source = shards_of(tmp_path / "in", planted=['{"text": ', '{"text": "a\\u0000"}', '{"a": 1}'])
    out, shards = tmp_path / "out", source_shards(source)
    summary = count_letters(Config(out, 3), shards)
    assert summary == json.loads((out / "summary.json").read_text())
    quarantined = {"not JSON": 1, "NUL": 1, "no text or content": 1}
    assert summary.pop("quarantined") == quarantined  # once, though both maps read them
    documents = list(read_documents([out]))
    assert summary == {"documents": 40, "bytes": sum(len(d["text"]) for d in documents)}
    assert sum(d["frac"] for d in documents) == pytest.approx(3)
    assert len(source_shards(out)) == 4  # quarantine/ is not an input
    [path] = (out / "quarantine").iterdir()
    bad = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(b["position"], b["reason"]) for b in bad] == list(zip([11, 12, 13], quarantined))
    assert bad[0]["path"] == str(shards[0])
    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["arguments"] == {"factor": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_finished_shard_is_not_repeated(tmp_path):
    config, shards = Config(tmp_path / "out"), source_shards(shards_of(tmp_path / "in"))
    other, did = dataclasses.replace(config, factor=2), []

    def go(config, fail_at=None):
        """Return the items a run processes until it fails at `fail_at`."""

        def work(part):
            if part.index == fail_at:
                raise OSError("the machine")
            did.append(part.index)
            with part.writer() as out:
                for d in part.documents():
                    out.write(d)

        did.clear()
        with contextlib.suppress(OSError), Stage(config, shards) as stage:
            stage.map("copy", shards, work)
            stage.finish({})
        assert config.out.exists() == (fail_at is None)
        return did

    assert go(config, 2) == [0, 1]
    assert go(config, 3) == [2]
    # No resume with other arguments or inputs, or from a complete output.
    assert go(other, 3) == [0, 1, 2]
    os.utime(shards[0], (1, 1))
    assert go(other, 3) == [0, 1, 2]
    (tmp_path / ".out.work" / "state" / "copy-00000.json").write_text("")
    assert go(other) == [0, 3]
    assert not list(tmp_path.glob(".*"))
    assert go(other) == [0, 1, 2, 3]


def test_a_users_mistake_leaves_the_old_output_and_nothing_else(tmp_path, capsys):
    config, shards = Config(tmp_path / "out"), source_shards(shards_of(tmp_path / "in"))
    count_letters(config, shards)
    before = content(config.out)
    capsys.readouterr()


    def read(part):
        part.bad("NUL", f"a{part.item}", 7, b"\xffx")
        if part.item == 4:
            raise UserError("mend it")

    with pytest.raises(UserError, match="mend it"), Stage(config, shards) as stage:
        stage.map("read", range(5), read)
    told = capsys.readouterr().err.splitlines()
    assert told == ["quarantined: 4 NUL", *(f"  a{i} at 7: NUL '\ufffdx'" for i in range(3))]
    assert content(config.out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for out, inputs, why in [("out", source_shards(config.out), "holds the input"),
                             ("mine", [], "no nanophi stage wrote it")]:  # fmt: skip
        with pytest.raises(UserError, match=why), Stage(Config(tmp_path / out), inputs):
            pytest.fail("entered")
    refused = pytest.raises(UserError, match="another run")
    with Stage(config, shards), refused, Stage(config, shards):
        pytest.fail("entered")


# ---- The scripts, under mpirun and random kills


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """Make a folder of Python files with duplicates, a shard of it, and a bad line."""
    root = tmp_path_factory.mktemp("code")
    for i in range(60):
        name = f"f{i % 50}"  # ten are copies
        text = (
            f'def {name}(x):\n    """Adds {i % 50} to x, if x is small enough."""\n'
            f"    if x < {i % 50}:\n        return x + {i % 50}\n    return x\n\n\n"
        )
        (root / f"m{i}.py").write_text(text * (1 if i % 50 % 3 else 20))
    folder = root / "shards"
    folder.mkdir()
    with ShardWriter(folder, shard_bytes=6000) as writer:
        for i in range(0, 60, 2):
            writer.write(document((root / f"m{i}.py").read_text() + "#", f"old:m{i}.py"))
    (folder / "x.jsonl").write_text('{"text": "x = 1"}\n{"text": "x = \\ud800"}\n')
    return root


FUNCTIONS = {"raw": "collect", "pairs": "pairs", "filtered": "filter_documents", "tokens": "pack"}

# Run script commands, with groups and shards small enough to get several.
RUN = textwrap.dedent("""
    import importlib, json, sys
    import data.collect, data.pack
    from common.config import parse
    data.collect.GROUP_BYTES, data.pack.SHARD_TOKENS = 6000, 2000

    def run(module, function, *args):
        script = importlib.import_module(module)
        getattr(script, function)(parse(script.Config, list(args)))

    commands = json.loads(sys.argv[1])
""")
ALL = RUN + "for c in commands: run(*c)"


def scripts(code, tokens, out):
    """Return {name of the output folder in `out`: arguments of `run` above}."""
    commands = {
        "raw": ["data.collect", "--source", code, "--source", code / "shards", "--max_mb=0.03"],
        "pairs": ["experiments.pairs", "--source", code / "shards"],
        "filtered": ["data.filter", "--source", code / "shards", "--min_chars=1"],
        "tokens": ["data.pack", "--source", out / "pairs", "--source", out / "raw", "--epochs=1",
                   "--epochs=2", "--tokenizer", tokens, "--val_frac=0.2"],
    }  # fmt: skip
    return {
        name: [module, FUNCTIONS[name], *map(str, args), "--out", str(out / name)]
        for name, (module, *args) in commands.items()
    }


def mpirun(n, *args, mpi4py=True):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(n), sys.executable,
               *["-m", "mpi4py"] * mpi4py, *map(str, args)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


@needs_mpi
def test_any_number_of_ranks_writes_the_same(cli, code, tokens, tmp_path):
    found = []
    for n in (1, 3):
        now = tmp_path / "now"
        commands = json.dumps(list(scripts(code, tokens, now).values()))
        done = cli("-c", ALL, commands) if n == 1 else mpirun(n, "-c", ALL, commands)
        assert done.returncode == 0, done.stderr
        found.append(content(now))
        now.rename(tmp_path / f"{n}")
    assert found[0] == found[1]
    for name in ("raw", "pairs", "filtered"):
        assert len([path for path in found[0] if path.startswith(f"{name}/shard")]) > 3
    summary = json.loads(found[0]["raw/summary.json"])
    assert summary["bytes"] > 30_000 > summary["bytes"] - 2000
    assert summary["left_out"]["duplicate"] > 1


# Run a script repeatedly; each process kills itself before its nth file access, n random, until one
# run finishes.
KILLER = RUN + textwrap.dedent("""
    import os, random, signal, traceback
    [command], rng, out = commands, random.Random(int(sys.argv[2])), commands[0][-1]
    run(*command)  # so that all is imported

    def child(die_at):
        read, write = os.pipe()
        if pid := os.fork():
            status = os.waitpid(pid, 0)[1]
            os.close(write)
            events = os.read(read, 99)
            os.close(read)
            return status, int(events or 0)
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event.startswith(("open", "os.", "shutil.")):
                seen += 1
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            run(*command)
            os.write(write, str(seen).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    status, events = child(0)
    assert events > 50, events
    kills = 0
    while kills < 8:
        status, seen = child(rng.randrange(1, events))
        if os.WIFSIGNALED(status):
            kills += 1
        else:
            assert seen, "failed"
    status, seen = child(0)
    assert seen
""")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_killed_at_random_points_it_ends_with_the_same_bytes(cli, code, tokens, tmp_path, name):
    commands = scripts(code, tokens, tmp_path)
    before = list(FUNCTIONS)[: list(FUNCTIONS).index(name) + 1]
    done = cli("-c", ALL, json.dumps([commands[n] for n in before]))
    assert done.returncode == 0, done.stderr
    wanted = content(tmp_path / name)
    done = cli("-c", KILLER, json.dumps([commands[name]]), 7)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / name) == wanted
    assert not list(tmp_path.glob(".*"))


@needs_mpi
def test_a_dead_rank_ends_the_job(code, tmp_path):
    dying = """
import os, signal
import data.filter
from common.config import run
from data.base.ranks import Ranks

data.filter.rejection = lambda *_: Ranks().rank and os.kill(os.getpid(), signal.SIGKILL) or ""
run(data.filter.main)
"""
    _, _, *args = scripts(code, None, tmp_path)["filtered"]
    done = mpirun(2, "-c", dying, *args)
    assert done.returncode != 0
    assert "signal 9 (Killed)" in " ".join((done.stderr + done.stdout).split())
    assert not (tmp_path / "filtered").exists()
    done = mpirun(2, "-m", "data.filter", *args, mpi4py=False)
    assert "mpirun -n 2 python -m mpi4py" in done.stderr
