"""Function/docstring pairs cut from raw code: the format of the exercises without their quality.

    python -m experiments.pairs --source out/raw --out out/pairs

A model trained on raw files scores 0 on exercises, but that shows a difference of format as much as
one of quality. These pairs are the control: every documented function of the raw code, whatever it
is worth, in the shape of an exercise. A document has text = prompt + solution and

    prompt       str   signature and docstring, dedented, decorators dropped
    solution     str   the body after the docstring, indented, newline-terminated
    entry_point  str   the function's name
"""

import ast
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import read_jsonl
from data.base.documents import DocumentFile, document, source_shards
from data.base.ranks import digest_key, say
from data.base.stage import Part, Stage, total
from data.base.syntax import docstring, is_pair, parse_python


@dataclass(frozen=True)
class Config:
    """Cut documented functions out of raw code, as pairs of prompt and solution."""

    source: Path  # documents: a file, or a folder of shards
    out: Path  # folder to write
    max_chars: int = 1200  # of a pair; 256 tokens hold about 750 at a vocabulary of 4k


def cut_pairs(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield the (line, name, prompt, solution) of the documented functions and methods in `text`.

    Left out are functions with nothing but a docstring, and those that lines cannot cut: a
    docstring that shares a line with other code, or a string that is indented less than the code.
    Raises SyntaxError.
    """
    lines = text.split("\n")
    functions = [n for n in ast.walk(parse_python(text)) if isinstance(n, ast.FunctionDef)]
    for node in sorted(functions, key=lambda n: n.lineno):
        doc = docstring(node)
        if not doc:
            continue
        indent = lines[node.lineno - 1][: node.col_offset]
        cut = lines[node.lineno - 1 : node.end_lineno]
        if not all(line.startswith(indent) or not line.strip() for line in cut):
            continue
        cut = [line[len(indent) :] for line in cut]
        split = doc.end_lineno - node.lineno + 1
        prompt, solution = "\n".join(cut[:split]) + "\n", "\n".join(cut[split:]) + "\n"
        if is_pair(prompt, solution):
            yield node.lineno, node.name, prompt, solution


def pairs(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is no pair."""
    with Stage(config, source_shards(config.source)) as stage:
        cut = total(stage.map("pairs", stage.shards, lambda part: cut_shard(config, part)))
        mine = range(stage.ranks.rank, len(stage.shards), stage.ranks.size)
        keys = {i: np.load(stage.scratch / f"shard-{i:05d}.npy") for i in mine}
        for i, keep in stage.ranks.first_seen(keys).items():
            np.save(stage.scratch / f"keep-{i:05d}.npy", keep)
        stage.ranks.gather(None)  # all of them are there
        written = total(stage.map("write", list(range(len(stage.shards))), write_shard))
        count = {
            key: cut[key] for key in ("too_long", "does_not_parse", "documents_in", "bytes_in")
        }
        if not written["documents"]:
            raise UserError(
                f"--source {config.source}: no documented function of up to {config.max_chars} "
                f"characters in {count['documents_in']} documents ({count['too_long']} longer ones)"
            )
        return stage.finish({**written, **count, "max_chars": config.max_chars})


def cut_shard(config: Config, part: Part) -> dict:
    """Write the pairs of one shard to scratch, copies among them, with the keys of their texts."""
    count, keys = Counter(too_long=0, does_not_parse=0, documents_in=0, bytes_in=0), array("Q")
    with DocumentFile(part.scratch / f"{part.name}.jsonl.zst") as found:
        for source in part.documents():
            count["documents_in"] += 1
            count["bytes_in"] += len(source["text"].encode())
            try:
                for line, name, prompt, solution in cut_pairs(source["text"]):
                    record = document(
                        prompt + solution,
                        f"{source['origin']}:{line}",
                        prompt=prompt,
                        solution=solution,
                        entry_point=name,
                    )
                    if len(record["text"]) > config.max_chars:
                        count["too_long"] += 1
                    else:
                        keys.extend(digest_key(record["sha256"]))
                        found.write(record)
            except SyntaxError:
                count["does_not_parse"] += 1
    np.save(part.scratch / f"{part.name}.npy", np.array(keys, np.uint64).reshape(-1, 2))
    return count


def write_shard(part: Part) -> dict:
    """Write the pairs of one shard that no earlier shard or line has."""
    keep = np.load(part.stage.scratch / f"keep-{part.index:05d}.npy")
    with part.writer() as out:
        if len(keep):
            found = read_jsonl(part.stage.scratch / f"{part.name}.jsonl.zst")
            for record, kept in zip(found, keep, strict=True):
                if kept:
                    out.write(record)
    return {"documents": out.documents, "bytes": out.bytes, "duplicates": int((~keep).sum())}


def main() -> None:
    config = parse(Config)
    s = pairs(config)
    say(
        f"{config.out}: {s['documents']:,} pairs, {s['bytes'] / 1e6:.1f} MB, from "
        f"{s['documents_in']:,} documents, {s['bytes_in'] / 1e6:.1f} MB; left out: "
        f"{s['too_long']:,} too long, {s['duplicates']:,} duplicates"
    )


if __name__ == "__main__":
    run(main)
