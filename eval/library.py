"""Whether a model knows libraries: what finetuning does to abilities the exercises do not contain.

    python -m eval.library --source out/raw --out usage.json
    python -m eval.library --checkpoint out/run --source out/heldout --usage usage.json --out L.json

phi-1's section 3 finds, in a few programs, that finetuning on exercises makes a model better at
using libraries; this is a count. At each attribute of something imported (the `join` of
`os.path.join`) in files that no model was trained on, is that attribute the likeliest continuation?
The model sees the file before it, as far as its context goes, and has to end the name where it
ends. Names that the file binds in any other way, and relative imports, do not count. The baseline
is the most frequent attribute of that module in other code, which the first command counts.
"""

import ast
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import checkpoint
from common.config import UserError, parse, run
from common.files import read_documents, read_json, write_json
from data.base.syntax import FUNCTIONS, parse_python, root_name
from eval.bits import interval, predict, read
from model import load_model
from tokenizer import Pieces, Tokenizer

OPTIONS = 20  # attributes of a module that a file of counts keeps


@dataclass(frozen=True)
class Config:
    """Score a model on library usage in documents; without --checkpoint, count that usage."""

    source: Path  # documents: a file, or a folder of shards
    out: Path  # JSON file to write
    checkpoint: Path | None = None  # run or checkpoint folder to score
    usage: Path | None = None  # file of counts, for the baseline
    device: str = "auto"  # auto, cpu or cuda


class Place(NamedTuple):
    """An attribute in a file: bytes [start, end) of its UTF-8 text."""

    start: int
    end: int
    module: str  # "os.path"
    name: str  # "join"


def places(text: str) -> list[Place]:
    """Return the attributes of imported names in `text`."""
    try:
        tree = parse_python(text)
    except SyntaxError:
        return []
    imported, bound = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name, module in names(node):
                if imported.setdefault(name, module) != module:
                    bound.add(name)  # of two modules: not to be told
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.ExceptHandler)):
            bound.add(node.name)
    encoded = text.encode()
    lines = [0, *(m.end() for m in re.finditer(rb"\r\n?|\n", encoded))]  # as Python has them
    found = []
    for node in ast.walk(tree):
        module = dotted(node.value, imported) if isinstance(node, ast.Attribute) else ""
        if module and root_name(node) not in bound:
            end = lines[node.end_lineno - 1] + node.end_col_offset
            start = end - len(node.attr.encode())
            if encoded[start:end] == node.attr.encode():  # but for names that Python normalises
                found.append(Place(start, end, module, node.attr))
    return sorted(found)


def names(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
    """Yield (name, what it stands for) of an import, none of one from the file's own package."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif not node.level and alias.name != "*":
            yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node: ast.expr, imported: dict[str, str]) -> str:
    """Return the module that `os.path` or `np` stands for, "" for what is not imported."""
    if isinstance(node, ast.Attribute):
        of = dotted(node.value, imported)
        return f"{of}.{node.attr}" if of else ""
    return imported.get(node.id, "") if isinstance(node, ast.Name) else ""


def count(config: Config) -> dict[str, dict[str, int]]:
    """Return {module: {attribute: how often}}, the most frequent ones."""
    found = defaultdict(Counter)
    documents = read_documents([config.source])
    for document in tqdm(documents, "count", unit="file", disable=None):
        for place in places(document["text"]):
            found[place.module][place.name] += 1
    return {m: dict(c.most_common(OPTIONS)) for m, c in sorted(found.items())}


def piece_ends(tokenizer: Tokenizer, ids: list[int], text: str) -> np.ndarray:
    """Return where each token of `text` ends, in UTF-8 bytes: int64 [tokens].

    Raises UserError for a byte-level BPE.
    """
    if not isinstance(tokenizer.backend, Pieces):
        raise UserError(f"{tokenizer.path}: want a tokenizer.model, as tokenizer.train makes it")
    known = tokenizer.backend.model
    pieces = {i: known.id_to_piece(i).replace("\u2581", " ") for i in set(ids)}
    sizes = {i: 1 if known.is_byte(i) else len(piece.encode()) for i, piece in pieces.items()}
    ends = np.cumsum([sizes[i] for i in ids], dtype=np.int64)
    assert not len(ids) or ends[-1] == len(text.encode()), "tokens that are not the text"
    return ends


def score(config: Config) -> dict:
    """Score the checkpoint; shares are from 0 to 1. Raises UserError."""
    if (usage := config.usage and read_json(config.usage)) is None:
        raise UserError("--checkpoint wants --usage, a file that this makes without --checkpoint")
    usual = {module: max(c, key=c.get) for module, c in usage.items()}
    texts = read(config.source)
    model, tokenizer, folder = load_model(config.checkpoint, config.device)
    ids = [tokenizer.encode(text) for text in texts]
    found = predict(model, tokenizer.end_of_text, ids)
    counts = []  # of each text: places, those that the model has right, and the baseline
    for text, tokens, (_, likeliest) in zip(texts, ids, found):
        ends, here, right = piece_ends(tokenizer, tokens, text), places(text), 0
        for place in here:
            first = np.searchsorted(ends, place.start, side="right")  # the token that it begins in
            last = np.searchsorted(ends, place.end, side="left") + 1
            after = tokenizer.decode([int(likeliest[last])])[:1]
            longer = ends[last - 1] == place.end and (after == "_" or after.isalnum())
            right += not longer and list(likeliest[first:last]) == tokens[first:last]
        counts.append((len(here), right, sum(usual.get(p.module) == p.name for p in here)))
    n, right, easy = np.array(counts, float).T
    if not n.sum():
        raise UserError(f"--source {config.source}: no attribute of an imported name there")
    return {
        "right_frac": right.sum() / n.sum(),
        "ci95": interval(right, n),
        "baseline_frac": easy.sum() / n.sum(),
        "places": int(n.sum()),
        "weights": checkpoint.checksum(folder),
    }


def main() -> None:
    config = parse(Config)
    result = score(config) if config.checkpoint else count(config)
    write_json(config.out, result)
    print(json.dumps(result) if config.checkpoint else f"attributes of {len(result):,} modules")


if __name__ == "__main__":
    run(main)
