"""Keep the documents that teach: raw code less what the phi-1 paper calls uninstructive.

    python -m data.filter --source out/raw --out out/filtered

The paper (section 2.1) finds raw code not self-contained, full of boilerplate with no meaningful
computation, its logic buried in complex undocumented functions. `measures` puts a number on each of
these, and every number has a threshold among the options; a document that misses one is rejected
under its name. Of a post in Markdown, the fenced Python is judged. A leading licence is cut off
first. The thresholds were set by reading: a fifth of the standard library and site-packages stays,
as of the paper's raw code (6 of 35 billion tokens).

Where `data.classify score` has given the documents a `quality`, --keep_frac or --min_quality cut by
it, before the rules; with --rules=false it decides alone, as the paper's random forest did.

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

REJECTED_SAMPLES, KEPT_SAMPLES, SAMPLE_CHARS = 5, 10, 2000  # for a person to read in ten minutes


@dataclass(frozen=True)
class Config:
    """Keep the documents that teach, and say why each of the others is rejected."""

    source: tuple[Path, ...]  # documents, files or folders; may be given several times
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


def rejection(text: str, config: Config) -> str:
    """Name the option that `text` misses first, "" to keep.

    "syntax" if its code is not Python, "no code" if it has none.
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
                f"--source {config.source[0]}: nothing is left; rejected: {found}; "
                "a reason is an option to loosen, but for syntax (is it Python 3?) and no code"
            )
        if stage.ranks.rank == 0:
            write_samples(stage.result / "samples", samples)
        rejected = dict(reasons.most_common())
        return stage.finish({**count, "rejected": rejected, "options": {"min_quality": cut}})


def quality_cut(config: Config, stage: Stage) -> float:
    """Return the quality from which on documents pass, 0 for all. Raises UserError if unscored."""
    if not config.min_quality and config.keep_frac == 1:
        return 0.0
    stage.map("quality", stage.shards, save_qualities)
    quality = np.concatenate([np.load(f) for f in sorted(stage.scratch.glob("quality-*.npy"))])
    if np.isnan(quality).any():
        raise UserError(
            f"--source {config.source[0]}: {np.isnan(quality).sum():,} documents lack `quality`; "
            "run `python -m data.classify score` on it first"
        )
    share = share_cut(quality, config.keep_frac) if len(quality) and config.keep_frac < 1 else 0.0
    return max(config.min_quality, share)


def share_cut(quality: np.ndarray, keep_frac: float) -> float:
    """Return the quality from which on a share of `keep_frac` is kept; equals stay together."""
    keep = max(1, round(keep_frac * len(quality)))
    return float(np.partition(quality, len(quality) - keep)[len(quality) - keep])


def save_qualities(part: Part) -> None:
    """Leave the qualities of a shard's documents, NaN for none."""
    known = (record.get("quality") for record in part.documents())
    quality = [x if isinstance(x, (int, float)) else np.nan for x in known]
    np.save(part.scratch / f"quality-{part.index:05d}.npy", np.array(quality, float))


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
    """Keep of each reason the few with the smallest hashes: no order matters to that."""
    for reason, rows in more.items():
        n = REJECTED_SAMPLES if reason else KEPT_SAMPLES
        samples[reason] = sorted([*samples.get(reason, []), *rows])[:n]


def write_samples(folder: Path, samples: dict[str, list]) -> None:
    """Write kept.jsonl and rejected.jsonl."""
    folder.mkdir(exist_ok=True)  # a folder of its own: the next stage reads *.jsonl beside
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
