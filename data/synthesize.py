"""Write synthetic data, textbooks or exercises, as the paper had GPT-3.5 write them.

    python -m data.synthesize textbooks --out out/textbooks --count 2000
    OPENAI_BASE_URL=http://host:8000/v1 python -m data.synthesize textbooks --out out/textbooks \\
        --writer llm --model NAME --count 10_000 --budget_tokens 30_000_000 --dry_run

The paper (section 2.2) gets diversity by constraining what is asked for: textbooks by topic and
audience, exercises by the function's name and, as in TinyStories (arXiv 2305.07759), random words.
So does this. PAPER: its prompts, topics and names are undisclosed; ours are in prompts.txt.

    builtin  lessons of synthetic/textbooks.py: offline, correct by construction; when its templates
             give nothing new, the command says so. data.exercises writes exercises offline
    llm      any OpenAI-compatible endpoint, with a budget, a cache and a dry run (data/base/llm.py)

Run all code in the sandbox, an exercise with its tests, a lesson from first to last block. Refuse
duplicates and near-duplicates of what was accepted before, or of `--existing`. Candidate i depends
on i and the seed alone, so the output is the same for any number of ranks.
"""

import functools
import itertools
import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.config import UserError, parse, run
from common.files import write_json
from data.base.documents import batched, document, source_shards
from data.base.llm import Client, Options, Refused
from data.base.minhash import Index
from data.base.ranks import say
from data.base.readers import read_documents_of
from data.base.stage import Part, Stage, total
from data.exercises import Benchmarks, ngrams, normalize
from data.synthetic import prompts, textbooks
from data.synthetic.textbooks import AUDIENCES, LESSONS, LEVELS, TOPICS, Audience
from sandbox.execute import run_programs

BATCH = 100  # candidates that one rank makes and runs at a time
SHARD = 10_000  # documents in a shard
MIN_GAIN = 0.02  # of the candidates of a round; below it, there is no more to be had
MOST_AT_ONCE = 4  # candidates in a round for each document that is missing
RUN_TIMEOUT_S = 10.0  # for the code of one candidate
ASKED_WORDS = 3  # random words that a request demands
TAIL_SHARE = 0.6  # of the function names have a third part

Made = tuple[dict, str] | str  # a candidate: (document, program to run), or why there is none


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """What textbooks and exercises have in common."""

    out: Path  # folder to write
    count: int  # documents to write
    writer: str = "builtin"  # builtin (offline) or llm (an endpoint)
    seed: int = 0  # of all choices
    existing: tuple[Path, ...] = ()  # documents that may not be repeated
    max_similarity: float = 0.8  # Jaccard index over 5-token shingles from which one is refused
    workers: int = 1  # programs run at once, on each rank


@dataclass(frozen=True, kw_only=True)
class Textbooks(Config):
    """Write lessons: prose interleaved with code that runs."""

    reply_tokens: int = 1500  # at most, in a reply

    def draw(self, index: int) -> tuple:
        """Draw topic, audience, level, words, and a generator to go on with. Topics take turns."""
        turn, place = divmod(index, len(TOPICS))
        topic = random.Random(f"topics {self.seed} {turn}").sample(TOPICS, len(TOPICS))[place]
        rng = random.Random(f"lesson {self.seed} {index}")
        audience, level = rng.choice(AUDIENCES), rng.choice([*LEVELS])
        return topic, audience, level, rng.sample(prompts.WORDS, ASKED_WORDS), rng

    def make(self, index: int) -> Made:
        topic, audience, level, _, rng = self.draw(index)
        return self.judge(index, textbooks.write(topic, audience, level, rng), writer="builtin")

    def prompt(self, index: int) -> str:
        topic, audience, level, words, _ = self.draw(index)
        return prompts.TEXTBOOK_PROMPT.format(
            topic=topic.title, audience=reader(audience, level), words=", ".join(words)
        )

    def read(self, index: int, reply: str) -> Made:
        text = reply.strip().replace("\r\n", "\n") + "\n"
        return self.judge(index, text, writer=self.model, words=self.draw(index)[3])

    def judge(self, index: int, text: str, **fields) -> Made:
        program, why_not = prompts.lesson_program(text)
        if why_not:
            return why_not
        topic, audience, level, *_ = self.draw(index)
        fields |= {"topic": topic.title, "difficulty": topic.difficulty}
        fields |= {"audience": reader(audience, level)}
        return document(text, f"textbooks:{topic.title}", **fields), program


@dataclass(frozen=True, kw_only=True)
class Exercises(Config):
    """Write exercises: a docstring to be completed, and a solution that passes its tests."""

    reply_tokens: int = 600  # at most, in a reply
    benchmarks: tuple[Path, ...] = ()  # HumanEval or MBPP file (.jsonl, .jsonl.gz, .json) to avoid

    def draw(self, index: int) -> tuple[str, list[str]]:
        """Return the function's name and the words to ask for."""
        rng = random.Random(f"exercise {self.seed} {index}")
        parts = [rng.choice(prompts.VERBS), rng.choice(prompts.NOUNS)]
        parts += [rng.choice(prompts.TAILS)] * (rng.random() < TAIL_SHARE)
        return "_".join(parts), rng.sample(prompts.WORDS, ASKED_WORDS)

    def prompt(self, index: int) -> str:
        name, words = self.draw(index)
        return prompts.EXERCISE_PROMPT.format(name=name, words=", ".join(words))

    def read(self, index: int, reply: str) -> Made:
        name, words = self.draw(index)
        fields, why_not = prompts.read_exercise(reply, name)
        if why_not:
            return why_not
        benchmarks, told = benchmarks_of(self.benchmarks), normalize(fields["prompt"])
        if name in benchmarks.names or not benchmarks.ngrams.isdisjoint(ngrams(told)):
            return "like a benchmark problem"
        code = fields["prompt"] + fields["solution"]
        fields |= {"words": words, "writer": self.model}
        return document(code, f"exercises:{self.model}", **fields), f"{code}\n{fields['tests']}"


KINDS = {"textbooks": Textbooks, "exercises": Exercises}
benchmarks_of = functools.cache(Benchmarks)


def reader(audience: Audience, level: str) -> str:
    return f"{audience.who} who {LEVELS[level]}"


# ---- The whole job


def synthesize(config: Config) -> dict:
    """Write `config.out` and return its summary, or the price for a dry run. Raises UserError."""
    check(config)
    if config.dry_run:
        with Client(config, config.replies()) as client:  # those that are refused come on top
            tokens = config.reply_tokens
            return client.price((messages(config, i), tokens) for i in range(config.count))
    reads = [*config.existing, *getattr(config, "benchmarks", ()), LESSONS]
    with Stage(config, [], reads) as stage:
        candidates = accepted = batches = 0
        refused: list[dict] = []
        for turn in itertools.count():
            missing = config.count - accepted
            rate = accepted / candidates if candidates else 1.0
            upto = candidates + math.ceil(missing / max(rate, 1 / MOST_AT_ONCE))
            items = [[start, min(start + BATCH, upto)] for start in range(candidates, upto, BATCH)]
            if config.writer == "llm":  # one item, so that one rank asks and holds the budget
                stage.map("ask", [[items, batches]], lambda part: ask(config, part), first=turn)
            refused += stage.map("make", items, lambda part: make(config, part), first=batches)
            batches += len(items)
            (chosen,) = stage.map("choose", [batches], lambda p: choose(config, p), first=turn)
            gained, candidates = chosen["accepted"] - accepted, upto
            accepted = chosen["accepted"]
            if accepted >= config.count:
                break
            if gained < MIN_GAIN * sum(stop - start for start, stop in items):
                raise UserError(
                    f"--count {config.count}: only {accepted} different ones were found in "
                    f"{candidates} candidates ({total([*refused, chosen])}); ask for fewer, raise "
                    "--max_similarity, or take another --seed if --existing was made with this one"
                )
        places = np.load(stage.scratch / f"chosen-{turn:05d}.npy")[: config.count]
        shards = [places[i : i + SHARD].tolist() for i in range(0, len(places), SHARD)]
        count = total(stage.map("write", shards, write))
        refused.append({k: v for k, v in chosen.items() if k != "accepted"})
        reasons = dict(sorted(total(refused).items(), key=lambda kv: (-kv[1], kv[0])))
        return stage.finish({**count, "candidates": candidates, "refused": reasons})


def check(config: Config) -> None:
    if config.writer not in ("builtin", "llm"):
        raise UserError(f"--writer {config.writer}: want builtin or llm")
    if config.writer == "builtin" and isinstance(config, Exercises):
        raise UserError("exercises offline: use python -m data.exercises, or give --writer llm")
    if config.count < 1 or config.workers < 1:
        raise UserError("--count or --workers: want at least 1")
    if not 0 < config.max_similarity <= 1:
        raise UserError(f"--max_similarity {config.max_similarity:g}: want above 0 and at most 1")
    if config.dry_run and config.writer != "llm":
        raise UserError("--dry_run prices the endpoint's work; the builtin writer costs nothing")


def messages(config: Config, index: int) -> list[dict]:
    return [{"role": "user", "content": config.prompt(index)}]


def ask(config: Config, part: Part) -> None:
    """Ask the endpoint for the candidates of all batches, and leave the replies batch by batch."""
    items, first = part.item

    def asked(index: int) -> dict:
        try:
            reply = client.ask(messages(config, index), config.reply_tokens)
        except Refused:
            return {"refused": "refused by the endpoint"}
        return {"text": reply.text} if reply.complete else {"refused": "cut short"}

    with Client(config, config.replies()) as client:
        indexes = (i for start, stop in items for i in range(start, stop))
        replies = client.in_order(asked, indexes)
        bar = tqdm(desc="replies", unit=" replies", disable=None)
        for number, (start, stop) in enumerate(items, first):
            with open(part.scratch / f"replies-{number:05d}.jsonl", "w", encoding="utf-8") as f:
                for reply in itertools.islice(replies, stop - start):
                    f.write(json.dumps(reply) + "\n")
                    bar.update()
                    bar.set_postfix_str(client.ledger.describe())
        bar.close()
        next(replies, None)  # lets it end
        # Apart from the summary: it differs where a run was killed and went on.
        write_json(part.stage.result / "endpoint.json", client.summary())


def make(config: Config, part: Part) -> dict:
    """Make a batch of candidates, run them, and leave those that pass; why the others did not."""
    start, stop = part.item
    if config.writer == "llm":
        path = part.stage.scratch / f"replies-{part.index:05d}.jsonl"
        replies = [json.loads(line) for line in path.read_text().splitlines()]
        found = [
            reply.get("refused") or config.read(i, reply["text"])
            for i, reply in zip(range(start, stop), replies, strict=True)
        ]
    else:
        found = [config.make(i) for i in range(start, stop)]
    refused = Counter(f for f in found if isinstance(f, str))
    made = [f for f in found if not isinstance(f, str)]
    programs = [program for _, program in made]
    verdicts = run_programs(programs, RUN_TIMEOUT_S, config.workers)
    with open(part.scratch / f"made-{part.index:05d}.jsonl", "w", encoding="utf-8") as f:
        for (record, _), verdict in zip(made, verdicts):
            if verdict.status == "infrastructure":
                raise UserError(f"the sandbox does not work here: {verdict.detail}")
            if verdict.status == "passed":
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                refused[f"code: {verdict.status}"] += 1
    return dict(refused)


def choose(config: Config, part: Part) -> dict:
    """Accept, in their order, the candidates that are unlike all before them."""
    seen = Index(config.max_similarity)
    for path in source_shards(*config.existing):
        for batch in batched(read_documents_of(path), BATCH):
            seen.add([record["text"] for record in batch], always=True)
    places, refused = [], Counter()
    for number in range(part.item):
        with open(part.stage.scratch / f"made-{number:05d}.jsonl", encoding="utf-8") as f:
            texts = [json.loads(line)["text"] for line in f]
        for line, reason in enumerate(seen.add(texts)):
            refused[reason] += bool(reason)
            if not reason:
                places.append((number, line))
    np.save(part.scratch / f"chosen-{part.index:05d}.npy", np.array(places).reshape(-1, 2))
    return {"accepted": len(places), **{k: v for k, v in refused.items() if k}}


def write(part: Part) -> dict:
    """Write one shard of the accepted candidates."""
    with part.writer() as out:
        for number, places in itertools.groupby(part.item, key=lambda place: place[0]):
            path = part.stage.scratch / f"made-{number:05d}.jsonl"
            lines = path.read_text(encoding="utf-8").split("\n")
            for _, line in places:
                out.write(json.loads(lines[line]))
    return {"documents": out.documents, "bytes": out.bytes}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in KINDS:
        raise UserError(f"say what to write: {' or '.join(KINDS)}, then the options or --help")
    config = parse(KINDS[name], sys.argv[2:])
    summary = synthesize(config)
    if config.dry_run:
        say(json.dumps(summary, indent=2))
        return
    for reason, n in summary["refused"].items():
        say(f"{n:9,} refused, {reason}")
    say(
        f"{config.out}: {summary['documents']:,} {name} of {summary['candidates']:,} candidates, "
        f"{summary['bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run(main)
