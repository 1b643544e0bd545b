"""Function/docstring pairs cut from raw code: the format of the exercises without their quality.

    python -m data.pairs --source out/raw --out out/pairs

A model trained on raw files scores 0 on exercises, but that shows a difference of format as much as
one of quality. These pairs are the control: every documented function of the raw code, whatever it
is worth, in the shape of an exercise. A document has text = prompt + solution and

    prompt       str   signature and docstring, dedented, decorators dropped
    solution     str   the body after the docstring, indented, newline-terminated
    entry_point  str   the function's name
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config import UserError, parse, run
from data.documents import ShardWriter, document, new_folder, write_json
from data.filter import docstring, parse_python, raw_documents


@dataclass(frozen=True)
class Config:
    """Cuts documented functions out of raw code, as pairs of prompt and solution."""

    source: Path  # folder of documents, as data.collect writes it
    out: Path  # folder to write
    max_chars: int = 1200  # of a pair; 256 tokens hold about 750 at a vocabulary of 4k


def cut_pairs(text: str) -> Iterator[tuple[int, str, str, str]]:
    """The (line, name, prompt, solution) of the documented functions and methods in `text`.

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


def is_pair(prompt: str, solution: str) -> bool:
    """Whether `prompt` alone is a function of one statement, and `solution` adds more to it."""
    try:
        (alone,), (whole,) = parse_python(prompt).body, parse_python(prompt + solution).body
    except (SyntaxError, ValueError):
        return False
    return len(alone.body) == 1 < len(whole.body)


def pairs(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if there is no pair."""
    count, seen = Counter(too_long=0, duplicates=0, does_not_parse=0), set()
    with new_folder(config.out, [config.source]) as folder, ShardWriter(folder) as shards:
        sources = raw_documents(config.source)
        for source in tqdm(sources, "pairs", unit=" documents", disable=None):
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
                    elif record["sha256"] in seen:
                        count["duplicates"] += 1
                    else:
                        seen.add(record["sha256"])
                        shards.write(record)
            except SyntaxError:
                count["does_not_parse"] += 1
        summary = {"documents": shards.documents, "bytes": shards.bytes, **count}
        summary["max_chars"] = config.max_chars
        if not shards.documents:
            raise UserError(
                f"--source {config.source}: no documented function of up to {config.max_chars} "
                f"characters in {count['documents_in']} documents ({count['too_long']} longer ones)"
            )
        write_json(folder / "summary.json", summary)
    return summary


def main() -> None:
    config = parse(Config)
    s = pairs(config)
    print(
        f"{config.out}: {s['documents']:,} pairs, {s['bytes'] / 1e6:.1f} MB, from "
        f"{s['documents_in']:,} documents, {s['bytes_in'] / 1e6:.1f} MB; left out: "
        f"{s['too_long']:,} too long, {s['duplicates']:,} duplicates"
    )


if __name__ == "__main__":
    run(main)
