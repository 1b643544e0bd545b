"""Keep the documents that teach: drop raw code that the phi-1 paper calls uninstructive.

    python -m data.filter --source out/raw --out out/filtered

The paper (section 2.1) finds raw code not self-contained, full of boilerplate without meaningful
computation, and with logic buried in complex undocumented functions. `measures` quantifies each of
these, and each measure has a threshold option; a document is rejected under the name of the first
option it misses. Leading licences are cut first. Markdown posts are judged by their fenced Python.
Thresholds were set by reading: they keep a fifth of the standard library and site-packages, about
the paper's share of its raw code (6 of 35 billion tokens).

If documents have a `quality` (data.classify score), --keep_frac or --min_quality cut by it before
the rules; with --rules=false it decides alone, like the paper's random forest.

Read `samples/rejected.jsonl` and `samples/kept.jsonl` in the output before you trust it.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import UserError, parse, run
from common.files import write_jsonl
from data.base.documents import document, source_shards
from data.base.ranks import say
from data.base.stage import Part, Stage, total
from data.base.syntax import NoCode, measures, strip_licence

REJECTED_SAMPLES, KEPT_SAMPLES, SAMPLE_CHARS = 5, 10, 2000  # ten minutes of reading


@dataclass(frozen=True)
class Config:
    """Keep the documents that teach, and count why the others are rejected."""

    source: tuple[Path, ...]  # files or folders of documents; repeatable
    out: Path  # folder to write
    min_chars: int = 500  # reject shorter documents: stubs and re-exports
    max_chars: int = 100_000  # reject longer documents: frameworks that outweigh the rest
    max_line_chars: int = 200  # reject documents with longer lines: minified, generated, data
    max_digit_frac: float = 0.08  # reject a larger share of digits: number tables
    min_ascii_frac: float = 0.95  # reject a smaller share of ASCII: Unicode tables, translations
    min_doc_frac: float = 0.12  # reject a smaller share of docstrings and comments
    max_doc_frac: float = 0.8  # reject a larger share of docstrings and comments
    min_functions: int = 1  # reject documents with fewer functions
    min_documented_frac: float = 0.05  # reject a smaller share of functions with docstrings
    max_import_frac: float = 0.12  # reject more imports per statement: re-exports and glue
    max_assign_frac: float = 0.55  # reject more assignments per statement: settings
    min_compute_frac: float = 0.25  # reject fewer loops, conditions, operators per statement
    max_data_frac: float = 0.05  # reject more literal constants per AST node: data tables
    max_function_lines: int = 250  # reject longer functions (docstring aside): buried logic
    max_foreign_names: int = 12  # reject more names imported from outside the standard library
    max_foreign_frac: float = 0.3  # reject a larger share of calls to those names
    min_quality: float = 0.0  # minimum probability of being good, from `data.classify score`
    keep_frac: float = 1.0  # let only this share of the documents pass, by highest quality
    rules: bool = True  # false: quality alone decides


def rejection(text: str, config: Config) -> str:
    """Return the first option that `text` misses, "" to keep it.

    Returns "syntax" if the code is not Python, "no code" if there is none.
    """
    try:
        for option, value in measures(text):
            threshold = getattr(config, option)
            if value < threshold if option.startswith("min_") else value > threshold:
                return option
    except SyntaxError as e:
        return "no code" if isinstance(e, NoCode) else "syntax"
    return ""


def filter_documents(config: Config) -> dict:
    """Write `config.out` and return its summary. Raises UserError if nothing is left."""
    if not 0 < config.keep_frac <= 1:
        raise UserError(f"--keep_frac {config.keep_frac:g}: want above 0 and at most 1")
    with Stage(config, source_shards(*config.source)) as stage:
        cut = quality_cut(config, stage)
        results = stage.map("filter", stage.shards, lambda part: filter_shard(config, part, cut))
        samples: dict[str, list] = {}
        for result in results:
            add_samples(samples, result.pop("samples"))
        count = total(results)
        reasons = Counter(count.pop("rejected", {}))
        if not count.get("documents"):
            found = ", ".join(f"{n:,} {why}" for why, n in reasons.most_common()) or "no document"
            raise UserError(
                f"--source {config.source[0]}: nothing is left; rejected: {found}; loosen these "
                'options ("syntax", perhaps not Python 3, and "no code" have none)'
            )
        if stage.ranks.rank == 0:
            write_samples(stage.result / "samples", samples)
        rejected = dict(reasons.most_common())
        return stage.finish({**count, "rejected": rejected, "options": {"min_quality": cut}})


def quality_cut(config: Config, stage: Stage) -> float:
    """Return the minimum quality to pass, 0 for all. Raises UserError if a document has none."""
    if not config.min_quality and config.keep_frac == 1:
        return 0.0
    stage.map("quality", stage.shards, save_qualities)
    quality = np.concatenate([np.load(f) for f in sorted(stage.scratch.glob("quality-*.npy"))])
    if np.isnan(quality).any():
        raise UserError(
            f"--source {config.source[0]}: {np.isnan(quality).sum():,} documents lack `quality`; "
            "run `python -m data.classify score` first"
        )
    share = share_cut(quality, config.keep_frac) if len(quality) and config.keep_frac < 1 else 0.0
    return max(config.min_quality, share)


def share_cut(quality: np.ndarray, keep_frac: float) -> float:
    """Return the minimum quality that keeps a share of `keep_frac`; ties are all kept."""
    keep = max(1, round(keep_frac * len(quality)))
    return float(np.partition(quality, len(quality) - keep)[len(quality) - keep])


def save_qualities(part: Part) -> None:
    """Save the qualities of a shard's documents, NaN where missing."""
    known = (record.get("quality") for record in part.documents())
    quality = [x if isinstance(x, (int, float)) else np.nan for x in known]
    np.save(part.scratch / f"quality-{part.index:05d}.npy", np.array(quality, float))


def filter_shard(config: Config, part: Part, cut: float) -> dict:
    """Write a shard's kept documents; return counts, and samples of kept and rejected ones."""
    count, reasons, samples = Counter(), Counter(), {}
    with part.writer() as kept:
        for record in part.documents():
            text = strip_licence(record["text"])
            count["documents_in"] += 1
            count["bytes_in"] += len(record["text"].encode())
            count["licences_cut"] += text != record["text"]
            reason = "min_quality" if cut and record["quality"] < cut else ""
            reason = reason or (rejection(text, config) if config.rules else "")
            if reason:
                reasons[reason] += 1
            else:
                kept.write(record | document(text, record["origin"]))
            sample = [record["sha256"], record["origin"], text[:SAMPLE_CHARS]]
            add_samples(samples, {reason: [sample]})
    written = {"documents": kept.documents, "bytes": kept.bytes}
    return {**count, **written, "rejected": reasons, "samples": samples}


def add_samples(samples: dict[str, list], more: dict[str, list]) -> None:
    """Keep the rows with the smallest hashes per reason: independent of the order of calls."""
    for reason, rows in more.items():
        n = REJECTED_SAMPLES if reason else KEPT_SAMPLES
        samples[reason] = sorted([*samples.get(reason, []), *rows])[:n]


def write_samples(folder: Path, samples: dict[str, list]) -> None:
    """Write kept.jsonl and rejected.jsonl."""
    folder.mkdir(exist_ok=True)  # a subfolder, so the next stage does not read it
    for name, of in (("kept", [""]), ("rejected", sorted(samples.keys() - {""}))):
        rows = [{"reason": reason, "origin": origin, "text": text}
                for reason in of for _, origin, text in samples[reason]]  # fmt: skip
        write_jsonl(folder / f"{name}.jsonl", rows)


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
