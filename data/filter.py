"""The documents that teach: raw code less what the phi-1 paper calls uninstructive.

    python -m data.filter --source out/raw --out out/filtered

The paper (section 2.1) finds raw code not self-contained, full of boilerplate with no meaningful
computation, its logic buried in complex undocumented functions. `measures` puts a number on each of
these, and every number has a threshold among the options, named min_X or max_X after what is asked
of it; a document that misses one is rejected under that name. A leading licence is cut off first.

The thresholds were set by reading what passes and what does not. Of a sample of the standard
library and site-packages a fifth stays, as of the paper's raw code (6 of 35 billion tokens); of the
standard library alone, which is self-contained and documented, half of the files.

Where `data.classify score` has given the documents a `quality`, --keep_frac or --min_quality cut by
it, before the rules; with --rules=false it decides alone, as the paper's random forest did.

Read `samples/rejected.jsonl` and `samples/kept.jsonl` in the output before you trust it.
"""

import ast
import json
import re
import sys
import warnings
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from data.base.documents import document, source_shards, write_json
from data.base.ranks import say
from data.base.readers import read_documents_of
from data.base.stage import Part, Stage, total

LEADING_COMMENTS = re.compile(r"(?:[ \t]*(?:#.*)?\n)*")
COMMENT_BLOCK = re.compile(r"(?:[ \t]*#.*\n)+")
LICENCE = re.compile(r"copyright|licen[cs]e|spdx", re.IGNORECASE)
COMMENT = re.compile(r"^[ \t]*#.*", re.MULTILINE)  # also lines of strings that look like one: few
DIGITS = re.compile(r"[0-9]")
REJECTED_SAMPLES, KEPT_SAMPLES, SAMPLE_CHARS = 5, 10, 2000  # for a person to read in ten minutes

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPUTES = (
    *(ast.For, ast.While, ast.If, ast.IfExp, ast.comprehension),
    *(ast.BinOp, ast.BoolOp, ast.Compare, ast.AugAssign, ast.Subscript),
)


@dataclass(frozen=True)
class Config:
    """Keeps the documents that teach, and says why it rejects each of the others."""

    source: Path  # documents: a file, or a folder of shards
    out: Path  # folder to write
    min_chars: int = 500  # shorter ones are stubs and re-exports
    max_chars: int = 100_000  # longer ones are frameworks in a file, and would outweigh the rest
    max_line_chars: int = 200  # longer lines are minified, generated or data
    max_digit_frac: float = 0.08  # digits among the characters; above it, samples turn into number
    # tables
    min_ascii_frac: float = 0.95  # below it, tables of Unicode or of translations
    min_doc_frac: float = 0.12  # docstrings and comment lines among the characters: undocumented
    max_doc_frac: float = 0.8  # above it, documentation with no code to it
    min_functions: int = 1  # without one there is nothing to learn to write
    min_documented_frac: float = 0.05  # functions that have a docstring
    max_import_frac: float = 0.12  # imports among the statements: re-exports and glue
    max_assign_frac: float = 0.55  # assignments among the statements: settings and declarations
    min_compute_frac: float = 0.25  # loops, conditions and operators per statement: boilerplate
    max_data_frac: float = 0.05  # constants in displays among the syntax nodes: data tables
    max_function_lines: int = 250  # of the longest one, less its docstring: logic that is buried
    max_foreign_names: int = 12  # names imported from outside the standard library: how much a
    # reader has to know from elsewhere
    max_foreign_frac: float = 0.3  # calls that go to those names: not self-contained
    min_quality: float = 0.0  # probability that a document is good, from `data.classify score`
    keep_frac: float = 1.0  # share of the documents, those of highest quality, that may pass
    rules: bool = True  # false: quality alone decides


def measures(text: str) -> Iterator[tuple[str, float]]:
    """The rules, as (option, measured value), in the order they are asked: the cheap ones first.

    A rule more is one `yield` here and one field in Config. Lazy: a document rejected by an early
    rule is never parsed. Raises SyntaxError.
    """
    chars = max(len(text), 1)
    yield "min_chars", len(text)
    yield "max_chars", len(text)
    yield "max_line_chars", max(map(len, text.split("\n")))
    yield "max_digit_frac", len(DIGITS.findall(text)) / chars
    yield "min_ascii_frac", 1 if text.isascii() else sum(map(str.isascii, text)) / chars
    tree = parse_python(text)
    c = count_syntax(tree)
    doc_chars = c["docstring_chars"] + sum(map(len, COMMENT.findall(text)))
    statements = max(c["statements"], 1)
    yield "min_doc_frac", doc_chars / chars
    yield "max_doc_frac", doc_chars / chars
    yield "min_functions", c["functions"]
    yield "min_documented_frac", c["documented"] / c["functions"] if c["functions"] else 1
    yield "max_import_frac", c["imports"] / statements
    yield "max_assign_frac", c["assigns"] / statements
    yield "min_compute_frac", c["computes"] / statements
    yield "max_data_frac", c["data"] / max(c["nodes"], 1)
    yield "max_function_lines", c["function_lines"]
    names = foreign_names(tree)
    calls = [root_name(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
    yield "max_foreign_names", len(names)
    yield "max_foreign_frac", sum(name in names for name in calls) / max(len(calls), 1)


def rejection(text: str, config: Config) -> str:
    """The option whose threshold `text` misses first, "syntax" if it is not Python, "" to keep."""
    try:
        for option, value in measures(text):
            threshold = getattr(config, option)
            if value < threshold if option.startswith("min_") else value > threshold:
                return option
    except SyntaxError:
        return "syntax"
    return ""


def parse_python(text: str) -> ast.Module:
    """The syntax tree of `text`. Raises SyntaxError, whatever it is that ast.parse cannot take."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes: other people's
            return ast.parse(text)
    except (RecursionError, MemoryError, ValueError) as e:  # nesting, nesting, NUL or surrogates
        raise SyntaxError(str(e)) from None


def count_syntax(tree: ast.Module) -> Counter:
    """What the rules ask of a syntax tree, in one walk."""
    c = Counter()
    for node in ast.walk(tree):
        c["nodes"] += 1
        c["statements"] += isinstance(node, ast.stmt)
        if isinstance(node, COMPUTES):
            c["computes"] += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            c["assigns"] += 1
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            c["imports"] += 1
        elif isinstance(node, (ast.List, ast.Tuple, ast.Set)):
            c["data"] += sum(isinstance(e, ast.Constant) for e in node.elts)
        elif isinstance(node, ast.Dict):
            c["data"] += sum(isinstance(e, ast.Constant) for e in node.values)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
            doc = docstring(node)
            c["docstring_chars"] += len(doc.value) if doc else 0
            if isinstance(node, FUNCTIONS):
                c["functions"] += 1
                c["documented"] += doc is not None
                lines = node.end_lineno - (doc.end_lineno if doc else node.lineno - 1)
                c["function_lines"] = max(c["function_lines"], lines)
    return c


def docstring(node) -> ast.Constant | None:
    """The constant that is the docstring of a module, class or function."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first.value if isinstance(first.value.value, str) else None
    return None


def foreign_names(tree: ast.Module) -> set[str]:
    """The names that imports from outside the standard library bind; relative ones are outside."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                if package not in sys.stdlib_module_names:
                    names.add(alias.asname or package)
        elif isinstance(node, ast.ImportFrom) and (
            node.level or node.module.split(".")[0] not in sys.stdlib_module_names
        ):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def root_name(node: ast.expr) -> str:
    """The name that a.b.c starts from, "" if it starts from none."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def strip_licence(text: str) -> str:
    """`text` without those of its leading comment blocks that speak of a licence or copyright."""
    head = LEADING_COMMENTS.match(text)[0]
    kept = COMMENT_BLOCK.sub(lambda block: "" if LICENCE.search(block[0]) else block[0], head)
    return text if kept == head else kept.lstrip("\n") + text[len(head) :]


def filter_documents(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if nothing is left."""
    if not 0 < config.keep_frac <= 1:
        raise UserError(f"--keep_frac {config.keep_frac:g}: want above 0 and at most 1")
    with Stage(config, source_shards(config.source)) as stage:
        cut = quality_cut(config, stage)
        count = total(stage.map("filter", stage.shards, lambda p: filter_shard(config, p, cut)))
        reasons = Counter(count.pop("rejected", {}))
        if not count.get("documents"):
            raise UserError(f"--source {config.source}: nothing is left; {advice(reasons)}")
        if stage.ranks.rank == 0:
            merge_samples(stage)
        options = {k: v for k, v in asdict(config).items() if k not in ("source", "out")}
        options["min_quality"] = cut
        return stage.finish({**count, "rejected": dict(reasons.most_common()), "options": options})


def quality_cut(config: Config, stage: Stage) -> float:
    """The quality from which on documents pass, 0 if none is asked for.

    Raises UserError where a document has no quality.
    """
    if not config.min_quality and config.keep_frac == 1:
        return 0.0
    unscored = stage.map("quality", stage.shards, save_qualities)
    if n := total(unscored).get("unscored"):
        raise UserError(
            f"--source {config.source}: {n:,} documents without `quality`; "
            "run `python -m data.classify score` on it first"
        )
    files = [stage.scratch / f"quality-{i:05d}.npy" for i in range(len(stage.shards))]
    quality = np.concatenate([np.load(file) for file in files])
    share = share_cut(quality, config.keep_frac) if len(quality) and config.keep_frac < 1 else 0.0
    return max(config.min_quality, share)


def share_cut(quality: np.ndarray, keep_frac: float) -> float:
    """The quality from which on a share of `keep_frac` is kept; equals stay together."""
    keep = max(1, round(keep_frac * len(quality)))
    return float(np.partition(quality, len(quality) - keep)[len(quality) - keep])


def save_qualities(part: Part) -> dict:
    """Leave the qualities of a shard's documents; what is bad is counted when it is filtered."""
    records = read_documents_of(part.item, lambda *_: None, part.progress)
    quality = [record.get("quality") for record in records]
    known = [q for q in quality if type(q) in (int, float)]
    np.save(part.scratch / f"quality-{part.index:05d}.npy", np.array(known, float))
    return {"unscored": len(quality) - len(known)}


def filter_shard(config: Config, part: Part, cut: float) -> dict:
    """Write what is kept of one shard, and samples of both; its counts."""
    count, reasons, samples = Counter(), Counter(), {}
    with part.writer() as kept:
        for record in part.documents():
            text = strip_licence(record["text"])
            count["documents_in"] += 1
            count["bytes_in"] += len(record["text"].encode())
            count["licences_cut"] += text != record["text"]
            reason = "min_quality" if cut and record["quality"] < cut else ""
            if config.rules:
                reason = reason or rejection(text, config)
            if reason:
                reasons[reason] += 1
            else:
                kept.write(record | document(text, record["origin"]))
            add_sample(samples, reason, record["sha256"], record["origin"], text[:SAMPLE_CHARS])
    write_json(part.scratch / f"{part.name}.samples.json", samples)
    return {**count, "documents": kept.documents, "bytes": kept.bytes, "rejected": reasons}


def add_sample(samples: dict[str, list], reason: str, *sample: str) -> None:
    """Keep (sha256, origin, text) if it is among the smallest hashes: no order matters to that."""
    keep = samples.setdefault(reason, [])
    insort(keep, list(sample))
    del keep[REJECTED_SAMPLES if reason else KEPT_SAMPLES :]


def merge_samples(stage: Stage) -> None:
    """Write samples/kept.jsonl and samples/rejected.jsonl from those of all shards."""
    samples: dict[str, list] = {}
    for path in sorted(stage.scratch.glob("*.samples.json")):
        for reason, of in json.loads(path.read_text()).items():
            for sample in of:
                add_sample(samples, reason, *sample)
    folder = stage.result / "samples"  # a folder of its own: the next stage reads *.jsonl beside
    folder.mkdir(exist_ok=True)
    for name, of in (("kept", [""]), ("rejected", sorted(samples.keys() - {""}))):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as f:
            for reason in of:
                for _, origin, text in samples[reason]:
                    line = {"reason": reason, "origin": origin, "text": text}
                    f.write(json.dumps(line, ensure_ascii=False) + "\n")


def advice(reasons: Counter) -> str:
    """What to do where everything was rejected."""
    if not reasons:
        return "it holds no documents"
    found = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common())
    options = [f"--{reason}" for reason, _ in reasons.most_common() if reason != "syntax"]
    return f"rejected: {found}; " + (f"loosen {options[0]}" if options else "is it Python 3?")


def main() -> None:
    config = parse(Config)
    s = filter_documents(config)
    for reason, n in s["rejected"].items():
        say(f"{n:9,} {reason}")
    say(
        f"{config.out}: {s['documents']:,} of {s['documents_in']:,} documents, "
        f"{s['bytes'] / 1e6:.1f} of {s['bytes_in'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run(main)
