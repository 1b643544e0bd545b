"""Whether a model knows libraries: what finetuning does to abilities the exercises do not contain.

    python -m eval.library --source out/raw --out usage.json
    python -m eval.library --checkpoint out/run --source out/heldout --usage usage.json --out L.json

phi-1's section 3 finds that finetuning on exercises, which import nothing but a few standard
modules, makes a model better at using libraries. Its evidence is a few programs; this is a count.
In real files that no model was trained on, at each attribute of something imported (the `join` of
`os.path.join`, after `import os`), is the likeliest continuation, greedily, that attribute? The
model is given all of the file before it that its context holds, from there on the right tokens, and
has to end the name where it ends. The syntax tree says which places count: names that the file
binds in any other way, and what it imports by a relative import, do not.

Beside it stand the bits per byte of those names and of the import statements, and a baseline: the
most frequent attribute of that module in other code, which the first command counts (training data,
say). A score below the baseline shows that the model does not even know what is usual.
"""

import ast
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import checkpoint
from common.config import UserError, parse, run
from common.files import read_json, write_json
from data.base.syntax import parse_python, root_name
from eval.bits import interval, predict, read
from model import load_model
from tokenizer import Pieces, Tokenizer

TOP = 12  # libraries told apart, those used most
OPTIONS = 20  # attributes of a module that a file of counts keeps


@dataclass(frozen=True)
class Config:
    """Score a model on library usage in documents; without --checkpoint, count that usage."""

    source: Path  # documents: a file, or a folder of shards
    out: Path  # JSON file to write
    checkpoint: Path | None = None  # run or checkpoint folder to score
    usage: Path | None = None  # file of counts, for the baseline
    limit_mb: float = 0.0  # read no more than this many megabytes of text, 0 = all
    device: str = "auto"  # auto, cpu or cuda


@dataclass(frozen=True)
class Place:
    """An attribute in a file: bytes [start, end) of its UTF-8 text."""

    module: str  # "os.path"
    name: str  # "join"
    start: int
    end: int


def places(text: str) -> tuple[list[Place], list[tuple[int, int]]]:
    """Return the attributes of imported names in `text`, and the spans of its import statements."""
    try:
        tree = parse_python(text)
    except SyntaxError:
        return [], []
    encoded = text.encode()
    lines = [0, *(m.end() for m in re.finditer(rb"\r\n?|\n", encoded))]  # as Python has them
    imported, bound, spans = {}, set(), []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
            spans.append((first + node.col_offset, last + node.end_col_offset))
            for name, module in names(node):
                if imported.setdefault(name, module) != module:
                    bound.add(name)  # of two modules: not to be told
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or (
            isinstance(node, ast.ExceptHandler) and node.name
        ):
            bound.add(node.name)
    found = []
    for node in ast.walk(tree):
        module = dotted(node.value, imported) if isinstance(node, ast.Attribute) else ""
        if module and root_name(node) not in bound:
            end = lines[node.end_lineno - 1] + node.end_col_offset
            start = end - len(node.attr.encode())
            if encoded[start:end] == node.attr.encode():  # but for names that Python normalises
                found.append(Place(module, node.attr, start, end))
    return sorted(found, key=lambda p: p.start), sorted(spans)


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


def count(config: Config) -> dict:
    """Return {"places", "modules": {module: {attribute: how often}}}, the most frequent ones."""
    found = defaultdict(Counter)
    documents = read(config.source, config.limit_mb)
    for record in tqdm(documents, "count", unit="file", disable=None):
        for place in places(record["text"])[0]:
            found[place.module][place.name] += 1
    modules = {m: dict(c.most_common(OPTIONS)) for m, c in sorted(found.items())}
    return {"places": sum(c.total() for c in found.values()), "modules": modules}


def piece_bytes(tokenizer: Tokenizer, ids: list[int], text: str) -> np.ndarray:
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


def goes_on(tokenizer: Tokenizer, token: int) -> bool:
    """Return whether a token behind a name would make it longer."""
    first = tokenizer.decode([token])[:1]
    return first == "_" or first.isalnum()


def score(config: Config) -> dict:
    """Score the checkpoint; shares are from 0 to 1. Raises UserError."""
    usage = (read_json(config.usage, strict=False) or {}).get("modules") if config.usage else {}
    if usage is None:
        raise UserError(f"--usage {config.usage}: no counts; make it without --checkpoint")
    usual = {module: max(c, key=c.get) for module, c in usage.items()}
    documents = list(read(config.source, config.limit_mb))
    model, tokenizer, folder = load_model(config.checkpoint, config.device)
    ids = [tokenizer.encode(record["text"]) for record in documents]
    rows, per_document = [], []
    for record, tokens, (nats, likeliest) in zip(
        documents, ids, predict(model, tokenizer.end_of_text, ids, "library")
    ):
        text, tokens = record["text"], np.array(tokens, np.int64)
        ends = piece_bytes(tokenizer, tokens.tolist(), text)
        begins = np.concatenate([[0], ends[:-1]])
        c = Counter(places=0, right=0, usual=0)
        found, imports = places(text)
        for place in found:
            first = np.searchsorted(ends, place.start, side="right")  # the token that it begins in
            last = np.searchsorted(ends, place.end, side="left") + 1
            right = bool((likeliest[first:last] == tokens[first:last]).all())
            if ends[last - 1] == place.end:
                right = right and not goes_on(tokenizer, int(likeliest[last]))
            easy = usual.get(place.module) == place.name
            rows.append((place.module.split(".")[0], right, easy))
            c.update(places=1, right=right, usual=easy, name_bytes=int(ends[last - 1]) - int(
                begins[first]), name_nats=float(nats[first:last].sum()))  # fmt: skip
        for start, end in imports:
            inside = (begins >= start) & (begins < end)
            c.update(import_bytes=int((ends - begins)[inside].sum()),
                     import_nats=float(nats[inside].sum()))  # fmt: skip
        per_document.append(c)
    if not rows:
        raise UserError(f"--source {config.source}: no attribute of an imported name there")

    def column(key: str) -> np.ndarray:
        return np.array([c[key] for c in per_document], float)

    def ratio(above: str, below: str, scale: float = 1.0) -> dict:
        a, b = column(above) * scale, column(below)
        return {"value": a.sum() / max(b.sum(), 1), "ci95": interval(a, b)}

    right, usual_right = ratio("right", "places"), ratio("usual", "places")
    bits = 1 / math.log(2)
    return {
        "right_frac": right["value"],
        "ci95": right["ci95"],
        "baseline_frac": usual_right["value"],
        "baseline_ci95": usual_right["ci95"],
        "places": len(rows),
        "documents": sum(c["places"] > 0 for c in per_document),
        "name_bits_per_byte": ratio("name_nats", "name_bytes", bits),
        "import_bits_per_byte": ratio("import_nats", "import_bytes", bits),
        "libraries": by_library(rows),
        "weights": checkpoint.checksum(folder),
    }


def by_library(rows: list[tuple[str, bool, bool]]) -> dict[str, dict]:
    """Count places of the most used libraries, and shares that model and baseline have right."""
    table = {}
    for library, n in Counter(row[0] for row in rows).most_common(TOP):
        of = [row for row in rows if row[0] == library]
        table[library] = {
            "places": n,
            "right_frac": sum(right for _, right, _ in of) / n,
            "baseline_frac": sum(easy for _, _, easy in of) / n,
        }
    return table


def main() -> None:
    config = parse(Config)
    if config.checkpoint and not config.usage:
        raise UserError("--checkpoint wants --usage, a file that this makes without --checkpoint")
    if config.checkpoint is None:
        result = count(config)
        print(f"{result['places']:,} attributes of {len(result['modules']):,} modules")
    else:
        result = score(config)
        print(json.dumps({k: v for k, v in result.items() if k != "libraries"}))
    write_json(config.out, result)


if __name__ == "__main__":
    run(main)
