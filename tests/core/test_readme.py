"""Run every command of README.md and docs/, page by page in one copy of the project, made small.

A fenced block without a language holds commands, unless its first word is a file of the project:
then it is the file tree. New commands are covered as they stand; SMALL says how to shrink one. What
the prose names in backticks (files, flags, modules, make targets) must exist.
"""

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

# Flags to append to commands that match the pattern; the last value of a flag wins.
TINY = ("--seq_len=64 --n_layer=1 --n_head=2 --width=32 --mlp_width=64 --rotary_dim=8 "
        "--seqs_per_step=4 --micro_batch=2 --eval_seqs=4 --max_steps=2")  # fmt: skip
PRESET = f"--vocab_size=2048 {TINY} --dtype=float32"
SETTINGS = "RAW_MB=1 EXERCISES=300 HELDOUT=4 BASE_STEPS=2 FINETUNE_STEPS=3"
SMALL = {
    r"^make train": SETTINGS,
    r"^(python|torchrun).* train\.py configs/demo": TINY,
    r"^torchrun.* train\.py configs/phi1": PRESET,
    r"^torchrun.* configs/(phi1|phi1_small|phi1_modern)\.toml": "--init_from=out/phi1_base",
    r"^python sample\.py": "--max_new_tokens=4",
    r"data\.synthesize": "--count=20",
    r"tokenizer\.train": "--vocab_size=512",
    r"data\.pack": "--val_frac=0.2",
    r"--data out/mine": "--vocab_size=512",
    r"eval\.(humaneval|mbpp|robustness|judge)": "--limit=2 --max_new_tokens=4",
    r"eval\.mutants": "--limit=4 --each=1",
    r"eval\.robustness": "--only=rename_function",
    r"data\.classify train": "--trees=10 --folds=2",
    r"bench\.resources": "--sm=80 --kernel=layernorm",
    r"bench\.step": f"--vocab_size=512 {TINY} --device=cpu --steps=1",
}

# Then replace each pattern.
CHANGES = {
    r"\bFILE\b": "out/demo/exercises/heldout.jsonl",
    r"--source phi-1 ": "--source out/demo/hf ",
    r"--nnodes=2 --nproc_per_node=8": "--nnodes=2 --nproc_per_node=1",
    r"--nproc_per_node=8": "--nproc_per_node=2",
    r"FIRST_MACHINE:29400": "localhost:{port}",
    r"(?s)^(torchrun .*--nnodes=2.*)$": (
        r"set -e; (\1 --out=out/machines) & \1 --out=out/machines; wait $!"
    ),
}

# Without a visible GPU these must exit with status 2 and one line that says so.
NEEDS_GPU = r"^make gpu|bench\.(ops|tune)"

# Commands to skip, with the reason; make commands run as `make -n`.
LEFT_OUT = {
    r"^make (test|check)": "would run this test",
    r"^make demo-full": "more runs like make train's",
    r"^make .*ladder": "takes hours; test_ladder.py runs a tiny one",
    r"^make report": "reads the output of make ladder; test_report.py draws one",
    r"^make best": "takes an hour and needs both benchmarks",
}

# Later pages use the files that earlier ones wrote.
NAMES = ("training", "data", "evaluation", "huggingface", "kernels", "results", "paper",
         "contributing", "agreement")  # fmt: skip
PAGES = ["README.md", *(f"docs/{name}.md" for name in NAMES)]
ELSEWHERE = {"Posts.xml"}  # files in the prose that belong to other projects or the reader


def blocks() -> list[tuple[str, int, str, str]]:
    """Return (page, number of first line, language, text) for each fenced block."""
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        for m in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            found.append((page, text.count("\n", 0, m.start(2)) + 1, m[1].strip(), m[2]))
    return found


def is_tree(block: str) -> bool:
    return (ROOT / block.split()[0]).exists()


def commands() -> list[tuple[str, str]]:
    """Return (page:line, text) for each command, joining lines until bash can parse them."""
    found = []
    for page, start, language, block in blocks():
        if language not in ("", "sh", "bash") or is_tree(block):
            continue
        held, first = "", start
        for number, line in enumerate(block.splitlines(), start + 1):
            held += line + "\n"
            parsed = subprocess.run(["bash", "-n"], input=held, capture_output=True, text=True)
            if parsed.stderr or line.endswith("\\"):
                continue
            if text := re.sub(r"(^|\s+)#.*", "", held).strip():
                found.append((f"{page}:{first}", text))
            held, first = "", number
        assert not held, f"{page}:{first}: bash cannot parse {held}"
    return found


COMMANDS = commands()


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the project with all that README.md expects of the reader: Python in .venv,
    code in ~/code, benchmark files, samples."""
    root = tmp_path_factory.mktemp("readme") / "nanophi"
    ignored = (ROOT / ".gitignore").read_text().replace("/", "").split()
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".git", *ignored))
    bin = root / ".venv" / "bin"
    bin.mkdir(parents=True)
    python = f'#!/bin/sh\nexec "{sys.executable}"'
    torchrun = f"{python} -m torch.distributed.run"
    for name, start in (("python", python), ("python3", python), ("torchrun", torchrun)):
        (bin / name).write_text(f'{start} "$@"\n')
        (bin / name).chmod(0o755)
    (bin / "activate").write_text(f'PATH="{bin}:$PATH"\n')
    (root / ".venv" / "installed").touch()
    code = root / "home" / "code"
    for package in ("json", "asyncio", "concurrent", "importlib", "html", "wsgiref", "sqlite3"):
        shutil.copytree(Path(sysconfig.get_path("stdlib")) / package, code / package)
    rows = [
        {"task_id": f"HumanEval/{name}", "entry_point": name,
         "prompt": f'def {name}(a, b):\n    """Add {name} to a and b."""\n',
         "canonical_solution": f"    return a + b + {len(name)}\n",
         "test": f"def check(candidate):\n    assert candidate(1, 2) == {3 + len(name)}\n"}
        for name in ("first", "second", "third")
    ]  # fmt: skip
    plus = {"base_input": [[1, 2]], "plus_input": [[3, 4]], "atol": 0, "contract": ""}
    for name, more in (("HumanEval", {}), ("HumanEvalPlus", plus)):
        with gzip.open(root / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row | more) + "\n" for row in rows)
    samples = [{"task_id": r["task_id"], "completion": r["canonical_solution"]} for r in rows]
    (root / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    mbpp = [
        {"task_id": i, "text": f"Write a function to add {i} to a number.",
         "code": f"def add_{i}(x):\n    return x + {i}",
         "test_list": [f"assert add_{i}({x}) == {x + i}" for x in (0, 5, 7)],
         "test_setup_code": "", "challenge_test_list": []} for i in range(1, 20)
    ]  # fmt: skip
    (root / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mbpp))
    tokens = root / "out" / "tokens"  # input of the presets: links to later outputs
    tokens.mkdir(parents=True)
    (tokens / "code_textbook").symlink_to("../demo/tokens/filtered")
    (tokens / "code_exercises").symlink_to("../demo/tokens/exercises")
    (root / "shell").write_text(f'. "{bin}/activate"\ncd "{root}"\n')
    return root


def shell(root: Path, script: str) -> subprocess.CompletedProcess:
    """Run `script` in bash, starting with the variables and folder of the previous script."""
    hidden = ("TRITON_INTERPRET", "MAKEFLAGS", "MAKELEVEL", "OPENAI_BASE_URL")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env |= {"HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = (
        f'. "{root}/shell"\n{script}\nrc=$?\n'
        f'(export -p; echo "cd \'$PWD\'") > "{root}/shell"; exit $rc'
    )
    process = subprocess.Popen(
        ["bash", "-c", script], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        stdout, stderr = process.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):  # kill leftover children
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return subprocess.CompletedProcess(script, process.returncode, stdout, stderr)


def made_small(command: str) -> str:
    flags = (f for pattern, f in SMALL.items() if re.search(pattern, command, re.DOTALL))
    command = " ".join([command, *flags])
    for pattern, replacement in CHANGES.items():
        command = re.sub(pattern, replacement, command)
    if "{port}" in command:
        with socket.create_server(("localhost", 0)) as probe:
            command = command.replace("{port}", str(probe.getsockname()[1]))
    return command


def test_every_page_is_covered():
    assert {"README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))} == set(PAGES)


@pytest.mark.parametrize(("place", "text"), COMMANDS, ids=[f"{n}: {t:.60}" for n, t in COMMANDS])
def test_command(place, text, copy):
    script = made_small(text)
    why = next((why for p, why in LEFT_OUT.items() if re.search(p, text)), "")
    if why:
        script = script.replace("make ", "make -n ", 1) if script.startswith("make ") else "true"
    done = shell(copy, script)
    said = f"{place}: {script}\n-> {done.returncode}\n{done.stderr[-3000:]}"
    if re.search(NEEDS_GPU, text):
        assert done.returncode == 2, said
        assert re.fullmatch(r"error: .*no CUDA device here.*\n(make: .*\n)?", done.stderr), said
        pytest.skip("needs a GPU; fails cleanly without one")
    assert done.returncode == 0, said
    if why:
        pytest.skip(why)
    for out in re.findall(r"--out[= ]([\w./-]+)", script):
        assert (copy / out).exists(), f"{said}\n{out} was not written"


# ---- names in the prose ----


def prose() -> str:
    pages = "\n".join((ROOT / page).read_text() for page in PAGES)
    return re.sub(r"(?ms)^```.*?^```$", "", pages)


def spans() -> list[list[str]]:
    """Return the words of each backticked span in the prose."""
    return [span.split() for span in re.findall(r"`([^`]+)`", prose())]


def exists(name: str, copy: Path) -> bool:
    """Return whether the project or its commands' outputs have file `name`; XX.. is a wildcard."""
    name = re.sub("X{2,}", "*", name.removeprefix("~/").rstrip("/"))
    return next(copy.rglob(name), None) is not None


def is_path(word: str) -> bool:
    ends = r"[\w*]\.(py|toml|mk|jsonl?|md|txt|bin|html|csv|svg|png|xml|model|gz|zst|safetensors)"
    return "--" not in word and ("/" in word or bool(re.search(f"{ends}$", word)))


def test_named_files_and_folders_exist(copy):
    named = {w for span in spans() for w in span if is_path(w)}
    named |= {w for *_, b in blocks() if is_tree(b) for w in b.split() if is_path(w)}
    links = re.findall(r"""(?:\]\(|src=["'])(?!https?:|#)([^)#"']+)""", prose())
    named |= {link.removeprefix("../") for link in links}
    missing = {w for w in named if w not in ELSEWHERE and not exists(w, copy)}
    assert not missing
    assert len(named) > 20


def test_only_what_changed_is_made_again(copy):
    def would(*arguments: str) -> str:
        return shell(copy, f"make -n train {SETTINGS} {' '.join(arguments)}").stdout

    assert "python" not in would()
    assert "--max_steps 4" in would("FINETUNE_STEPS=4")
    assert "--max_steps 2" not in would("FINETUNE_STEPS=4")
    assert "data.collect" in would("RAW_MB=3")
    for touched, runs, rests in [
        ("tools/report.py", "-m tools.report", "-m eval"),
        ("sandbox/tagged.py", "-m eval.humaneval", "train.py"),
        ("data/filter.py", "train.py", "-m data.collect"),
        ("data/synthetic/concepts.txt", "-m data.exercises", "-m data.filter"),
        ("kernels/tuning.json", "train.py", "-m data"),
        ("model.py", "-m eval.humaneval", "-m tokenizer"),
        ("bench/step.py", "", "-m "),
    ]:
        said = would("-W", touched)
        assert runs in said, (touched, said)
        assert rests not in said, (touched, said)
