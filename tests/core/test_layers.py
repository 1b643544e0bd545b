"""The import rule: a file imports only from layers to its left, at top level and in functions."""

import graphlib

import pytest
from conftest import ROOT

from common.code import dependencies

LAYERS = ("common kernels | tokenizer sandbox | model | decoder | data/base | data/synthetic | "
          "data sample | eval | train | tools | bench experiments")  # fmt: skip
LAYER = {part: i for i, layer in enumerate(LAYERS.split("|")) for part in layer.split()}
FILES = [*ROOT.glob("*.py"), *(p for part in LAYER for p in (ROOT / part).glob("*.py"))]


def part(file: str) -> str:
    return file.rpartition("/")[0] or file.removesuffix(".py")


def allowed(file: str, used: str) -> bool:
    # tokenizer/train.py reads documents, so it counts as data.
    ours, theirs = "data" if file == "tokenizer/train.py" else part(file), part(used)
    if ours == "train" and theirs.startswith("data"):
        return used in ("data/loader.py", "data/shards.py")
    if ours == "train" and theirs == "eval":
        return used == "eval/gold.py"
    if ours.startswith("data") and theirs in ("model", "decoder"):
        return file == "data/base/features.py"
    return ours == theirs or LAYER[theirs] < LAYER[ours]


def imports() -> dict[str, list[str]]:
    """Return {file: project files it imports}, without empty __init__ files."""
    used = {f: [d for d in dependencies(f) - {f} if d.suffix == ".py" and d.stat().st_size]
            for f in FILES}  # fmt: skip
    return {str(f.relative_to(ROOT)): [str(d.relative_to(ROOT)) for d in used[f]] for f in used}


def test_every_file_has_a_layer():
    found = [p for p in ROOT.glob("[a-z]*/**/*.py") if p.relative_to(ROOT).parts[0] != "tests"]
    assert {p for p in found if p.relative_to(ROOT).parts[0] != "out"} <= set(FILES)


def test_a_file_imports_only_leftward():
    assert [f"{f} -> {d}" for f, used in imports().items() for d in used if not allowed(f, d)] == []


def test_no_import_goes_round():
    graphlib.TopologicalSorter(imports()).prepare()  # CycleError names the files


@pytest.mark.parametrize("arrow", [
    "kernels/gemm.py -> common/config.py", "model.py -> sample.py", "data/diversity.py -> model.py",
    "data/base/stage.py -> data/filter.py", "data/filter.py -> eval/harness.py",
    "train.py -> data/base/stage.py", "train.py -> eval/bits.py", "tools/hf.py -> bench/step.py",
])  # fmt: skip
def test_wrong_imports_are_seen(arrow):
    assert not allowed(*arrow.split(" -> "))
