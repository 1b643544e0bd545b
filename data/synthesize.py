"""Write synthetic textbooks or exercises, as the paper did with GPT-3.5.

    python -m data.synthesize textbooks --out out/textbooks --count 2000
    OPENAI_BASE_URL=http://host:8000/v1 python -m data.synthesize textbooks --out out/textbooks \\
        --writer llm --model NAME --count 10_000 --budget_tokens 30_000_000 --dry_run

The paper (section 2.2) gets diversity by constraining the request: textbooks by topic and audience,
exercises by function name and, as in TinyStories (arXiv 2305.07759), random words. So do we.
PAPER: its prompts, topics and names are undisclosed; ours are in prompts.txt.

    builtin  lessons from synthetic/textbooks.py: offline, correct by construction; fails when the
             templates give nothing new. data.exercises writes exercises offline
    llm      any OpenAI-compatible endpoint, with a budget, a cache and a dry run (data/base/llm.py)

All code runs in the sandbox: an exercise with its tests, a lesson from first to last block.
Duplicates and near-duplicates of accepted documents are refused. Candidate i depends only on i and
the seed. A killed run starts over, but the cache saves it from paying for a reply twice.

Models write code better than they predict its results. So the tests of an exercise use the calls in
the reply's asserts with the values returned here. Such tests show that the code runs and is
deterministic, not that it is right. As evidence of correctness, the docstring must pass doctest and
half of the asserts must hold as written (a docstring with examples counts as one more assert).
`wrong` counts a document's failed asserts.
"""

import contextlib
import functools
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.config import UserError, parse, run
from common.files import new_folder, write_json
from data.base.documents import ShardWriter, batched, document
from data.base.llm import Client, Options, Refused
from data.base.minhash import Index
from data.exercises import Benchmarks, fold, ngrams, normalize
from data.synthetic import prompts, textbooks
from data.synthetic.textbooks import AUDIENCES, LEVELS, TOPICS
from sandbox.execute import Verdict, run_programs

BATCH = 100  # candidates run per batch
MAX_SIMILARITY = 0.8  # refuse a candidate at this Jaccard index over 5-token shingles
MOST_BARREN = 100  # consecutive candidates without a new document before giving up
RUN_TIMEOUT_S = 10.0  # per candidate
CALL_TIMEOUT_S = 3.0  # per call of an exercise
ASKED_WORDS = 3  # random words per request
TAIL_SHARE = 0.6  # share of function names with a third part

# A candidate (document, program or an exercise's claims), or the reason there is none
Made = tuple[dict, str | list[prompts.Claim]] | str


@dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options common to textbooks and exercises."""

    out: Path  # folder to write
    count: int  # documents to write
    writer: str = "builtin"  # builtin (offline) or llm (an endpoint)
    seed: int = 0  # random seed
    workers: int = 1  # programs to run in parallel

    def messages(self, index: int) -> list[dict]:
        return [{"role": "user", "content": self.prompt(index)}]

    def finish(self, batch: list[Made]) -> list[Made]:
        """Return `batch` with a program for each candidate."""
        return batch


@dataclass(frozen=True, kw_only=True)
class Textbooks(Config):
    """Write lessons: prose interleaved with code that runs."""

    reply_tokens: int = 1500  # maximum tokens per reply

    def draw(self, index: int) -> tuple:
        """Draw topic (in turns), audience, level and words; also return the generator."""
        turn, place = divmod(index, len(TOPICS))
        topic = random.Random(f"topics {self.seed} {turn}").sample(TOPICS, len(TOPICS))[place]
        rng = random.Random(f"lesson {self.seed} {index}")
        audience, level = rng.choice(AUDIENCES), rng.choice([*LEVELS])
        return topic, audience, level, rng.sample(prompts.WORDS, ASKED_WORDS), rng

    def fields(self, index: int) -> dict:
        topic, audience, level, *_ = self.draw(index)
        reader = f"{audience['who']} who {LEVELS[level]}"
        return {"topic": topic.title, "difficulty": topic.difficulty, "audience": reader}

    def make(self, index: int) -> Made:
        topic, audience, level, _, rng = self.draw(index)
        return self.judge(index, textbooks.write(topic, audience, level, rng), writer="builtin")

    def prompt(self, index: int) -> str:
        words = ", ".join(self.draw(index)[3])
        return prompts.TEXTBOOK_PROMPT.format(words=words, **self.fields(index))

    def read(self, index: int, reply: str) -> Made:
        text, why_not = prompts.read_lesson(reply)
        return why_not or self.judge(index, text, writer=self.model, words=self.draw(index)[3])

    def judge(self, index: int, text: str, **more) -> Made:
        program, why_not = prompts.lesson_program(text)
        if why_not:
            return why_not
        fields = more | self.fields(index)
        return document(text, f"textbooks:{fields['topic']}", **fields), program


@dataclass(frozen=True, kw_only=True)
class Exercises(Config):
    """Write exercises: a docstring to complete, and a solution that passes its tests."""

    reply_tokens: int = 600  # maximum tokens per reply
    benchmarks: tuple[Path, ...] = ()  # HumanEval or MBPP file to avoid (.jsonl, .jsonl.gz, .json);
    # repeatable

    def draw(self, index: int) -> tuple[str, list[str]]:
        """Draw the function name and the words to ask for."""
        rng = random.Random(f"exercise {self.seed} {index}")
        parts = [rng.choice(prompts.VERBS), rng.choice(prompts.NOUNS)]
        parts += [rng.choice(prompts.TAILS)] * (rng.random() < TAIL_SHARE)
        return "_".join(parts), rng.sample(prompts.WORDS, ASKED_WORDS)

    def prompt(self, index: int) -> str:
        name, words = self.draw(index)
        return prompts.EXERCISE_PROMPT.format(name=name, words=", ".join(words))

    def read(self, index: int, reply: str) -> Made:
        name, words = self.draw(index)
        fields, claims, why_not = prompts.read_exercise(reply, name)
        if why_not:
            return why_not
        benchmarks, told = benchmarks_of(self.benchmarks), normalize(fields["prompt"])
        if fold(name) in benchmarks.names or not benchmarks.ngrams.isdisjoint(ngrams(told)):
            return "like a benchmark problem"
        code = fields["prompt"] + fields["solution"]
        fields |= {"words": words, "writer": self.model}
        return document(code, f"exercises:{self.model}", **fields), claims

    def finish(self, batch: list[Made]) -> list[Made]:
        """Run the claims of each exercise; turn their results into its tests, or refuse it."""
        programs = [
            f"{made[0]['text']}\nraise LookupError(repr((bool({test}), {call})))"
            for made in batch if not isinstance(made, str) for call, test, _ in made[1]
        ]  # fmt: skip
        told = (verdict.detail for verdict in run_all(programs, CALL_TIMEOUT_S, self.workers))
        return [
            made if isinstance(made, str) else tested(*made, [next(told) for _ in made[1]])
            for made in batch
        ]


def tested(record: dict, claims: list[prompts.Claim], told: list[str]) -> Made:
    """Return an exercise with tests from the claims' results `told`, its program, or why not."""
    results, held = {}, []
    for (call, _, in_docstring), detail in zip(claims, told):
        outcome = re.match(r"LookupError: \((True|False), (.*)\)$", detail)  # None: failed or cut
        held.append(detail.startswith("LookupError: (True, "))
        if in_docstring and not held[-1]:
            return "the docstring's example is wrong"
        if outcome and not in_docstring and prompts.is_plain(outcome[2]):
            results[call] = outcome[2]
    if sum(held) * 2 < len(held):
        return "most tests are wrong"
    if len(results) < prompts.MIN_ASSERTS or {*results.values()} == {"None"}:
        return "no tests"
    tests = "".join(prompts.asserted(*result) + "\n" for result in results.items())
    return record | {"tests": tests, "wrong": held.count(False)}, f"{record['text']}\n{tests}"


KINDS = {"textbooks": Textbooks, "exercises": Exercises}
benchmarks_of = functools.cache(Benchmarks)


# ---- The whole job


def synthesize(config: Config) -> dict:
    """Write `config.out` and return its summary, or the price on a dry run. Raises UserError."""
    check(config)
    client = Client(config, config.replies()) if config.writer == "llm" else None
    with client or contextlib.nullcontext():
        if config.dry_run:  # excludes requests to replace refused candidates
            tokens = config.reply_tokens
            return client.price((config.messages(i), tokens) for i in range(config.count))
        with new_folder(config.out, getattr(config, "benchmarks", ())) as out:
            summary = accept(config, client, out)
            if client:  # not in the summary: a cached run spends nothing
                write_json(out / "endpoint.json", client.summary())
            write_json(out / "summary.json", summary)
    return summary


def accept(config: Config, client: Client | None, out: Path) -> dict:
    """Write candidates that run and resemble no earlier one; return the summary."""

    def ask(index: int) -> Made:
        try:
            reply = client.ask(config.messages(index), config.reply_tokens)
        except Refused:
            return "refused by the endpoint"
        return reply.why or config.read(index, reply.text)

    seen, refused = Index(MAX_SIMILARITY), Counter()
    asked = accepted = size = wrong = barren = 0
    bar = tqdm(total=config.count, desc="accepted", disable=None)
    with ShardWriter(out) as shards, bar:
        while accepted < config.count:
            indexes = range(asked, asked + config.count - accepted)  # no more: replies cost money
            asked = indexes.stop
            made = client.in_order(ask, indexes) if client else map(config.make, indexes)
            for batch in batched(made, BATCH):
                passed = passing(config.finish(batch), config.workers, refused)
                reasons = seen.add([record["text"] for record in passed])
                refused.update(filter(None, reasons))
                new = [record for record, reason in zip(passed, reasons) if not reason]
                for record in new:
                    shards.write(record)
                    size += len(record["text"].encode())
                    wrong += record.get("wrong", 0)
                accepted += len(new)
                bar.update(len(new))
                barren = 0 if new else barren + len(batch)
            if barren >= MOST_BARREN:
                [(reason, n)] = refused.most_common(1)
                advice = "ask for fewer"
                if "duplicate" not in reason:
                    advice = f"inspect the replies in {config.replies()}"
                raise UserError(
                    f"--count {config.count}: only {accepted} of {asked} candidates were accepted; "
                    f"main refusal: {reason!r} ({n} of {dict(refused)}); {advice}"
                )
    told = {"wrong_tests": wrong} if isinstance(config, Exercises) else {}
    return {"documents": accepted, "bytes": size, "candidates": asked, **told,
            "refused": dict(refused.most_common())}  # fmt: skip


def passing(batch: list[Made], workers: int, refused: Counter) -> list[dict]:
    """Return the documents of `batch` with passing programs; count refusals by reason."""
    made = [candidate for candidate in batch if not isinstance(candidate, str)]
    refused.update(candidate for candidate in batch if isinstance(candidate, str))
    verdicts = run_all([program for _, program in made], RUN_TIMEOUT_S, workers)
    refused.update(f"code: {v.status}" for v in verdicts if v.status != "passed")
    return [record for (record, _), v in zip(made, verdicts) if v.status == "passed"]


def run_all(programs: list[str], timeout_s: float, workers: int) -> list[Verdict]:
    verdicts = run_programs(programs, timeout_s, workers)
    for verdict in verdicts:
        if verdict.status == "infrastructure":
            raise UserError(f"the sandbox does not work on this machine: {verdict.detail}")
    return verdicts


def check(config: Config) -> None:
    if config.writer not in ("builtin", "llm"):
        raise UserError(f"--writer {config.writer}: want builtin or llm")
    if config.writer == "builtin" and isinstance(config, Exercises):
        raise UserError("offline exercises: use python -m data.exercises; else set --writer llm")
    if config.count < 1 or config.workers < 1:
        raise UserError("--count and --workers must be at least 1")
    if config.dry_run and config.writer != "llm":
        raise UserError("--dry_run: the builtin writer costs nothing; use it with --writer llm")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in KINDS:
        raise UserError(f"want {' or '.join(KINDS)} first, then options or --help")
    config = parse(KINDS[name], sys.argv[2:])
    summary = synthesize(config)
    if config.dry_run:
        return print(json.dumps(summary, indent=2))
    for reason, n in summary["refused"].items():
        print(f"{n:9,} refused, {reason}")
    print(
        f"{config.out}: {summary['documents']:,} {name} of {summary['candidates']:,} candidates, "
        f"{summary['bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run(main)
