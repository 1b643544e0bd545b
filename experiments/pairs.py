"""Cut function/docstring pairs out of raw code: the exercises' format without their quality.

    python -m experiments.pairs --source out/raw --out out/pairs

A model trained on raw files scores 0 on exercises, but that may be due to format as much as to
quality. These pairs are the control: every documented function of the raw code, good or bad, in the
exercises' format. A document has text = prompt + solution, prompt (signature and docstring,
dedented, decorators dropped), solution (the rest of the body) and entry_point.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from data.base.documents import document, source_shards
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.base.syntax import docstring, is_pair, parse_python
from data.base.unique import Candidates, choose, write_chosen

MAX_CHARS = 1200  # per pair; 256 tokens hold about 750 at vocabulary 4k


@dataclass(frozen=True)
class Config:
    """Cut documented functions out of raw code as prompt/solution pairs."""

    source: tuple[Path, ...]  # documents: file or folder; repeatable
    out: Path  # folder to write


def cut_pairs(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield (line, name, prompt, solution) of each documented function and method in `text`.

    Skips functions with only a docstring, and those that cannot be cut at line ends, such as a
    docstring that shares a line with code. Raises SyntaxError.
    """
    lines = text.split("\n")
    functions = [n for n in ast.walk(parse_python(text)) if isinstance(n, ast.FunctionDef)]
    for node in sorted(functions, key=lambda n: n.lineno):
        indent, doc = lines[node.lineno - 1][: node.col_offset], docstring(node)
        cut = lines[node.lineno - 1 : node.end_lineno]
        if not doc or any(line.strip() and not line.startswith(indent) for line in cut):
            continue
        cut = [line[len(indent) :] for line in cut]
        split = doc.end_lineno - node.lineno + 1
        prompt, solution = "\n".join(cut[:split]) + "\n", "\n".join(cut[split:]) + "\n"
        if is_pair(prompt, solution):
            yield node.lineno, node.name, prompt, solution


def pairs(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError without any pair."""
    with Stage(config, source_shards(*config.source)) as stage:
        count = total(stage.map("pairs", stage.shards, cut_shard))
        [chosen] = stage.map("choose", [len(stage.shards)], choose)
        if not chosen["documents"]:
            raise UserError(f"--source {config.source[0]}: no documented functions found ({count})")
        stage.map("write", chosen.pop("items"), write_chosen)
        return stage.finish({**chosen, **count})


def cut_shard(part: Part) -> dict:
    """Write one shard's pairs to scratch, duplicates included; return counts of the rest."""
    count = Counter(too_long=0, does_not_parse=0, documents_in=0)
    with Candidates(part) as candidates:
        for source in part.documents():
            count["documents_in"] += 1
            try:
                for line, name, prompt, solution in cut_pairs(source["text"]):
                    if len(prompt + solution) > MAX_CHARS:
                        count["too_long"] += 1
                        continue
                    fields = {"prompt": prompt, "solution": solution, "entry_point": name}
                    origin = f"{source['origin']}:{line}"
                    candidates.write(document(prompt + solution, origin, **fields))
            except SyntaxError:
                count["does_not_parse"] += 1
    return count


def main() -> None:
    config = parse(Config)
    s = pairs(config)
    told = f"{s['documents']:,} pairs from {s['documents_in']:,} documents"
    left_out = f"{s['too_long']:,} too long, {s['left_out']['duplicate']:,} duplicates"
    say(f"{config.out}: {told}, {s['bytes'] / 1e6:.1f} MB; left out: {left_out}")


if __name__ == "__main__":
    run(main)
