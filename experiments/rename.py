"""Rename the arguments of exercises, so that a model learns to copy names instead of guessing.

    python -m experiments.rename --source out/exercises/train --words out/raw --out out/renamed

Exercises call a list `numbers` or `xs`; a small model memorises that instead of reading. A new name
is unguessable: one to four letters, a word from the documents in --words, or two such words. It
replaces the old one in signature, docstring and solution. --frac sets how many exercises change.
"""

import builtins
import keyword
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from tqdm import tqdm

from common.config import UserError, parse, require, run
from common.files import new_folder, write_json
from data.base.documents import ShardWriter, document
from data.base.readers import read_documents
from eval.perturb import ARGUMENT, rename, split

WORDS, LEAST = 6000, 6  # number of most common words, minimum occurrences of a word
TRIES = 5  # attempts per exercise (a new name may already be in use)
TAKEN = {*keyword.kwlist, *dir(builtins), "a"}  # "a" is an English word


@dataclass(frozen=True)
class Config:
    """Rename the arguments of exercises to unguessable names."""

    source: tuple[Path, ...]  # exercises; repeatable
    words: tuple[Path, ...]  # documents to take words for names from; repeatable
    out: Path  # folder to write
    frac: float = 0.8  # fraction of exercises to rename
    seed: int = 0  # random seed

    def __post_init__(self):
        require(self, "frac", 0 <= self.frac <= 1, "from 0 to 1")
        require(self, "words", all(p.exists() for p in self.words), "existing documents")


def read_words(source: tuple[Path, ...]) -> list[str]:
    """List the most common words of 3 to 9 letters. Raises UserError if too few."""
    count = Counter()
    for record in read_documents(source):
        count.update(word.lower() for word in re.findall("[A-Za-z]{3,9}", record["text"]))
    words = [word for word, n in count.most_common(WORDS) if n >= LEAST]
    if len(words) < 2:
        raise UserError(f"--words {source[0]}: too few words; name more documents")
    return words


def new_name(words: list[str], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return "".join(rng.choices(ascii_lowercase, k=rng.randint(1, 4)))
    return "_".join(rng.sample(words, 1 if kind < 0.65 else 2))


def renamed(exercise: dict, words: list[str], rng: random.Random) -> dict:
    """Return the exercise with new names, or unchanged if none fit."""
    problem = {"prompt": exercise["prompt"], "canonical_solution": exercise["solution"],
               "entry_point": exercise["entry_point"], "test": ""}  # fmt: skip
    parts = split(problem)
    for _ in range(TRIES if parts and parts.arguments else 0):
        names = {old: new_name(words, rng) for old in parts.arguments}
        if TAKEN & {*names.values()} or len({*names.values()}) < len(names):
            continue
        if new := rename(problem, parts, names, ARGUMENT):
            prompt, solution = new["prompt"], new["canonical_solution"]
            made = document(prompt + solution, exercise["origin"])
            return exercise | made | {"prompt": prompt, "solution": solution}
    return exercise


def main() -> None:
    config = parse(Config)
    rng, count = random.Random(config.seed), Counter()
    with new_folder(config.out, [*config.source, *config.words]) as out, ShardWriter(out) as writer:
        words = read_words(config.words)
        for exercise in tqdm(read_documents(config.source), "rename", disable=None):
            if missing := {"prompt", "solution", "entry_point"} - exercise.keys():
                raise UserError(f"--source {config.source[0]}: not exercises: no {min(missing)}")
            made = renamed(exercise, words, rng) if rng.random() < config.frac else exercise
            writer.write(made)
            count.update(documents=1, renamed=made is not exercise)
        write_json(out / "summary.json", dict(count))
    print(f"{config.out}: {count['documents']:,} exercises, {count['renamed']:,} renamed")


if __name__ == "__main__":
    run(main)
