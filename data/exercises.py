"""Writes short programming exercises, signature + docstring -> body, with a held-out split.

An offline stand-in for the language model that wrote phi-1's CodeExercises (arXiv 2306.11644): the
families in data/families.py give the tasks, and a task is told in many wordings and names. Every
solution is executed and compared with an oracle.

    python -m data.exercises --out data/exercises --benchmarks ../shared/eval/HumanEval.jsonl.gz

writes
    train/shard-*.jsonl.zst   documents: prompt + solution, and these two, entry_point, family, task
    heldout.jsonl             problems in HumanEval's format, and their family and task
    summary.json              counts, and what was dropped and why

Training has no held-out task, no held-out solution under other names, and no task that does the
same as a held-out one; but it has every family, test and operation of a held-out task elsewhere.
"""

import ast
import functools
import itertools
import json
import random
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from config import UserError, parse, run
from data.documents import ShardWriter, document, new_folder, read_jsonl, write_json
from data.families import FAMILIES, KINDS, Kind, Task

POOL = 90  # inputs for each signature, from which the tests of a held-out problem are chosen
TESTS = 30  # of these for each problem; with 6 in a prototype, 18 of 371 near misses passed
MAX_SAME = 24  # of the TESTS expected values may be equal: a test that mostly wants False is weak
FAMILY_SHARE = 0.2  # of a family's tasks may be held out
EXAMPLE_SHARE = 0.15  # of the docstrings show a call, if that is ...
EXAMPLE_CHARS = 50  # ... no longer than this
NGRAM = 10  # words in a row that a docstring may not have in common with a benchmark's
MIN_CASES = 3  # a task that passes this many test cases of a benchmark problem, and all that it can
MIN_BOOL_CASES = 8  # be tried on, is taken for that problem; more if the results are bool


@dataclass(frozen=True)
class Config:
    """Write short exercises (signature, docstring, solution) and a held-out split without leaks."""

    out: Path  # folder to write
    count: int = 30_000  # training exercises
    heldout: int = 500  # held-out problems; they do not depend on seed and count
    seed: int = 0  # of the choice of training tasks, wordings and names
    benchmarks: tuple[Path, ...] = ()  # HumanEval or MBPP file (.jsonl, .jsonl.gz, .json) to avoid
    shuffle_docstrings: bool = False  # a control: give each training solution the docstring and
    # function name of another one with the same kinds of arguments


@dataclass(frozen=True)
class Exercise:
    """A task with its wording and names chosen; `$a` and `$b` still stand for the arguments."""

    task: Task
    name: str
    doc: str
    arguments: tuple[str, ...]
    example: str = ""  # a call and its result, as in an interactive session

    def prompt(self) -> str:
        doc = fill(self.doc, self.arguments)
        lines = textwrap.wrap(doc, 88) if len(doc) > 88 else [doc]  # 100 with indent and quotes
        if self.example:
            lines += ["", *self.example.split("\n"), ""]
        doc = "\n".join(lines).replace("\n", "\n    ").replace("\n    \n", "\n\n")
        return f'def {self.name}({", ".join(self.arguments)}):\n    """{doc}"""\n'

    def solution(self) -> str:
        return textwrap.indent(fill(self.task.body, self.arguments), "    ") + "\n"


def main() -> None:
    config = parse(Config)
    if config.count < 1:
        raise UserError(f"--count {config.count}: want at least 1 exercise")
    if config.heldout < 0:
        raise UserError(f"--heldout {config.heldout}: want 0 or more problems")
    benchmarks = Benchmarks(config.benchmarks)
    outputs, dropped = run_tasks(benchmarks)
    problems = hold_out(outputs, config.heldout, benchmarks)
    train = {task: v for task, v in outputs.items() if str(task) not in problems}
    exercises = list(draw(train, config.count, config.seed, benchmarks, dropped))
    exchanged = 0
    if config.shuffle_docstrings:
        shuffled = shuffle_docstrings(exercises, config.seed)
        exchanged = sum(a.doc != b.doc for a, b in zip(exercises, shuffled))
        exercises = shuffled
    texts = [e.prompt() + e.solution() for e in exercises]
    summary = {
        "documents": len(exercises),
        "bytes": sum(len(text.encode()) for text in texts),
        "tasks": len({e.task for e in exercises}),
        "heldout": len(problems),
        "heldout_families": len({problem["family"] for problem in problems.values()}),
        "docstrings_exchanged": exchanged,
        "dropped": dropped,
        "train_by_family": Counter(e.task.family for e in exercises),
        "heldout_by_family": Counter(problem["family"] for problem in problems.values()),
        "args": {k: v for k, v in vars(config).items() if k not in ("out", "benchmarks")},
        "benchmarks": [path.name for path in config.benchmarks],
    }
    with new_folder(config.out) as out:
        (out / "train").mkdir()
        with ShardWriter(out / "train") as shards:
            for exercise, text in zip(exercises, texts):
                shards.write(record(exercise, text))
        lines = (json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems.values())
        (out / "heldout.jsonl").write_text("".join(lines))
        write_json(out / "summary.json", summary)
    for why, n in dropped.items():
        print(f"{n:9,} dropped, {why}")
    print(
        f"{config.out}: {len(exercises):,} exercises of {summary['tasks']:,} tasks, "
        f"{len(problems)} other tasks held out"
    )


# ---- Render a task


def tell(task: Task, rng: random.Random) -> Exercise:
    """An exercise for `task`: wording, names, and whether there is an example, chosen by `rng`."""
    name = re.sub("_+", "_", choose(task.name, rng)).strip("_")
    doc = choose(task.doc, rng)
    arguments = tuple(rng.choice(KINDS[kind].names.split()) for kind in task.args.split())
    example = ""
    if rng.random() < EXAMPLE_SHARE:
        inputs = rng.choice(pool(task.args))
        call = f">>> {name}({', '.join(map(repr, inputs))})"
        result = task.oracle(*inputs)
        example = f"{call}\n{result!r}"
        if not all(inputs) or len(example) > EXAMPLE_CHARS or result in (None, "", [], {}):
            example = ""
    return Exercise(task, name, doc[0].upper() + doc[1:], arguments, example)


def choose(text: str, rng: random.Random) -> str:
    """`text` with one of the choices for each `<this|that>`, inner ones first."""
    while m := re.search(r"<([^<>]*\|[^<>]*)>", text):
        text = text[: m.start()] + rng.choice(m[1].split("|")) + text[m.end() :]
    return text


def fill(text: str, arguments: tuple[str, ...]) -> str:
    for placeholder, name in zip(("$a", "$b"), arguments):
        text = text.replace(placeholder, name)
    return text


def record(exercise: Exercise, text: str) -> dict:
    """The training document of an exercise."""
    return document(
        text,
        f"exercises:{exercise.task.family}",
        prompt=exercise.prompt(),
        solution=exercise.solution(),
        entry_point=exercise.name,
        family=exercise.task.family,
        task=str(exercise.task),
    )


# ---- Execute and compare


@functools.cache
def pool(args: str) -> list[tuple]:
    """POOL inputs for these kinds of arguments: every edge value, then random ones."""
    rng, kinds = random.Random(args), [KINDS[kind] for kind in args.split()]
    edges = max(len(kind.edges) for kind in kinds)
    inputs = [tuple(kind.edges[i % len(kind.edges)] for kind in kinds) for i in range(edges)]
    while len(inputs) < POOL:
        for _ in range(9):  # attempts at one that is new
            new = tuple(kind.sample(rng) for kind in kinds)
            if new not in inputs:
                break
        inputs.append(new)
    return inputs


def check(exercise: Exercise, outputs: list, indexes: Iterator[int]) -> None:
    """Assert that the solution gives these outputs for inputs of the pool, type and all."""
    namespace = {}
    exec(exercise.prompt() + exercise.solution(), namespace)
    inputs = pool(exercise.task.args)
    for i in indexes:
        got = namespace[exercise.name](*inputs[i])
        if got != outputs[i] or type(got) is not type(outputs[i]):
            raise AssertionError(
                f"{exercise.task} as {exercise.name}{inputs[i]}: got {got!r}, want {outputs[i]!r}"
            )


def run_tasks(benchmarks: "Benchmarks") -> tuple[dict[Task, list], Counter]:
    """The outputs on the pool of every task that is neither constant nor a benchmark's problem.

    Asserts that body and oracle agree. Also returns how many tasks were dropped, by reason.
    """
    outputs, dropped = {}, Counter()
    for task in tqdm([*itertools.chain(*FAMILIES.values())], "tasks", disable=None):
        inputs = pool(task.args)
        results = [task.oracle(*x) for x in inputs]
        check(tell(task, random.Random(0)), results, range(POOL))
        if all(result == results[0] for result in results):
            dropped["task: constant"] += 1
        elif benchmarks.has(task, results):
            dropped["task: solves a benchmark problem"] += 1
        else:
            outputs[task] = results
    for args in {task.args: None for task in outputs}:
        assert pool(args) == pool.__wrapped__(args), f"a task over ({args}) changed its arguments"
    return outputs, dropped


def solution_key(source: str) -> str:
    """The function in `source` without docstring and with neutral names, the same for all copies
    that differ in names alone."""
    function = ast.parse(source).body[0]
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    new = {function.name: "f"}
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            new.setdefault(node.arg, f"v{len(new)}")
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            new.setdefault(node.id, f"v{len(new)}")
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.arg = new[node.arg]
        elif isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
    function.name = "f"
    return ast.dump(function)


# ---- Hold out


def hold_out(outputs: dict[Task, list], wanted: int, benchmarks: "Benchmarks") -> dict[str, dict]:
    """Held-out problems by task, taken from the families in turn.

    A task qualifies if no other one has the same solution or the same outputs on the pool, and if
    all that it is made of is left in training. Raises UserError if fewer than `wanted` qualify.
    """
    queues, rivals, left, copies = defaultdict(list), defaultdict(list), Counter(), Counter()
    for task in outputs if wanted else ():
        queues[task.family].append(task)
        rivals[task.args].append(outputs[task])
        left.update(parts(task))
        copies[key(task)] += 1
    for queue in queues.values():
        random.Random(0).shuffle(queue)
    room = {family: int(len(queue) * FAMILY_SHARE) for family, queue in queues.items()}
    problems = {}
    while len(problems) < wanted and any(queues.values()):
        for family, queue in queues.items():
            while queue and room[family] and len(problems) < wanted:
                task = queue.pop()
                if copies[key(task)] > 1 or min(left[part] for part in parts(task)) < 2:
                    continue
                rng = random.Random(f"heldout {task}")
                exercise = tell(task, rng)
                indexes = choose_tests(task, outputs[task], rivals[task.args], rng)
                if indexes and not benchmarks.overlap(exercise):
                    left.subtract(parts(task))
                    room[family] -= 1
                    problem = as_problem(exercise, outputs[task], indexes)
                    problems[str(task)] = {"task_id": f"exercises/{len(problems)}", **problem}
                    break
            else:
                queue.clear()
    if len(problems) < wanted:
        raise UserError(f"--heldout {wanted}: only {len(problems)} tasks qualify; ask for fewer")
    return problems


def parts(task: Task) -> list[str]:
    """What must be left in training: the family, tests, operations and words, but no number."""
    return [task.family, *(str(p) for p in task.params if not isinstance(p, int))]


@functools.cache
def key(task: Task) -> str:
    exercise = tell(task, random.Random(0))
    return solution_key(exercise.prompt() + exercise.solution())


def choose_tests(task: Task, outputs: list, rivals: list[list], rng: random.Random) -> list[int]:
    """Indexes of TESTS inputs in the pool that no rival's outputs pass, nor a body that returns a
    constant or an argument; [] if there are none."""
    inputs, shuffled = pool(task.args), rng.sample(range(POOL), POOL)
    chosen = [*range(8), *(i for i in shuffled if i >= 8)][:20]  # the first are edge values
    for rival in rivals:
        if rival is not outputs and all(rival[i] == outputs[i] for i in chosen):
            apart = [i for i in shuffled if rival[i] != outputs[i]]
            if not apart:
                return []
            chosen.append(apart[0])
    usual = Counter(map(repr, outputs)).most_common(1)[0][0]
    rest = sorted(shuffled, key=lambda i: (i in chosen, repr(outputs[i]) == usual))
    chosen += rest[: max(0, TESTS - len(chosen))]
    same = Counter(repr(outputs[i]) for i in chosen).most_common(1)[0][1]
    echo = any(all(inputs[i][j] == outputs[i] for i in chosen) for j in range(len(inputs[0])))
    return [] if len(chosen) > TESTS or same > MAX_SAME or echo else sorted(chosen)


def as_problem(exercise: Exercise, outputs: list, indexes: list[int]) -> dict:
    """The problem record of a held-out exercise, without its task_id."""
    inputs = pool(exercise.task.args)
    asserts = [
        f"    assert candidate({', '.join(map(repr, inputs[i]))}) == {outputs[i]!r}\n"
        for i in indexes
    ]
    return {
        "prompt": exercise.prompt(),
        "canonical_solution": exercise.solution(),
        "entry_point": exercise.name,
        "test": "def check(candidate):\n" + "".join(asserts),
        "family": exercise.task.family,
        "task": str(exercise.task),
    }


# ---- Training


def draw(
    outputs: dict[Task, list], count: int, seed: int, benchmarks: "Benchmarks", dropped: Counter
) -> Iterator[Exercise]:
    """`count` different exercises. A family with n tasks gets a share in proportion to sqrt(n), and
    its tasks take turns. Raises UserError if there are too few."""
    rng, seen, misses = random.Random(seed), set(), 0
    families = defaultdict(list)
    for task in outputs:
        families[task.family].append(task)
    for tasks in families.values():
        rng.shuffle(tasks)
    turns = [itertools.cycle(tasks) for tasks in families.values()]
    weights = [*itertools.accumulate(len(tasks) ** 0.5 for tasks in families.values())]
    progress = tqdm(total=count, desc="exercises", disable=None)
    while len(seen) < count:
        task = next(rng.choices(turns, cum_weights=weights)[0])
        exercise = tell(task, rng)
        text = exercise.prompt() + exercise.solution()
        reason = "exercise: repeated" if text in seen else benchmarks.overlap(exercise)
        if reason:
            dropped[reason] += 1
            misses += 1
            if misses > 10_000:
                raise UserError(f"--count {count}: only about {len(seen)} different exercises")
            continue
        check(exercise, outputs[task], range(POOL - 3, POOL))
        seen.add(text)
        misses = 0
        progress.update()
        yield exercise


def shuffle_docstrings(exercises: list[Exercise], seed: int) -> list[Exercise]:
    """The exercises with docstrings and function names exchanged among equal kinds of arguments."""
    groups = defaultdict(list)
    for exercise in exercises:
        groups[exercise.task.args].append(exercise)
    others = {}
    for args, group in groups.items():
        others[args] = iter(random.Random(seed).sample(group, len(group)))
    return [
        replace(e, name=o.name, doc=o.doc, example=o.example)
        for e in exercises
        for o in [next(others[e.task.args])]
    ]


# ---- Benchmarks to avoid


class Benchmarks:
    """The function names, docstrings and test cases of HumanEval and MBPP files."""

    def __init__(self, paths: tuple[Path, ...]):
        self.names, self.texts, self.ngrams = set(), set(), set()
        self.problems = defaultdict(list)  # by shapes of the arguments: [(arguments, result), ...]
        for path in paths:
            for row in read_rows(path):
                try:
                    self.add(row)
                except KeyError as e:
                    raise UserError(
                        f"{path}: a problem lacks {e}; want HumanEval or MBPP"
                    ) from None

    def add(self, row: dict) -> None:
        if "entry_point" in row:
            text = " ".join(re.findall(r'"""(.*?)"""|$', row["prompt"], re.S))
            self.names.add(row["entry_point"])
            tests = row["test"]
        else:
            text = row["text"] if "text" in row else row["prompt"]
            self.names.update(re.findall(r"^def (\w+)", row["code"], re.M))
            tests = "\n".join(row["test_list"])
        words = normalize(text)
        self.texts.add(tuple(words))
        self.ngrams.update(ngrams(words))
        cases = defaultdict(list)
        for arguments, result in test_cases(tests):
            cases[tuple(map(shape, arguments))].append((arguments, result))
        for shapes, found in cases.items():
            if len(found) > 1:
                self.problems[shapes].append(found)

    def overlap(self, exercise: Exercise) -> str:
        """Why this exercise must be dropped, or ""."""
        if exercise.name in self.names:
            return "exercise: function name of a benchmark problem"
        words = normalize(fill(exercise.doc, exercise.arguments))
        if tuple(words) in self.texts or not self.ngrams.isdisjoint(ngrams(words)):
            return "exercise: docstring like a benchmark problem's"
        return ""

    def has(self, task: Task, outputs: list) -> bool:
        """Whether the oracle of a task with these outputs passes a benchmark problem's test."""
        kinds = [KINDS[kind] for kind in task.args.split()]
        types = {type(output) for output in outputs}
        shapes = tuple(max(map(shape, kind.edges), key=len) for kind in kinds)  # of a full value
        return any(
            type(cases[0][1]) in types and passes(task, kinds, cases)
            for cases in self.problems[shapes]
        )


def passes(task: Task, kinds: list[Kind], cases: list[tuple]) -> bool:
    """Whether the oracle gives the results of all cases that it can be tried on, and of enough."""
    tried = 0
    for arguments, result in cases:
        ints = [(a, kind) for a, kind in zip(arguments, kinds) if isinstance(a, int)]
        if not all(kind.low <= a <= kind.high for a, kind in ints):
            continue
        try:
            got = task.oracle(*arguments)
        except (IndexError, ValueError):
            return False
        if got != result or type(got) is not type(result):
            return False
        tried += 1
    return tried >= (MIN_BOOL_CASES if isinstance(result, bool) else MIN_CASES)


def read_rows(path: Path) -> Iterator[dict]:
    if path.suffix != ".json":
        yield from read_jsonl(path)
        return
    try:
        yield from json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read benchmark {path}: {e}") from None


def normalize(text: str) -> list[str]:
    """The words of `text`, without what every MBPP problem begins with."""
    text = re.sub(r"^write a (python )?function (to|that|which) ", "", text.lower().strip())
    return re.findall("[a-z0-9]+", text)


def ngrams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def test_cases(source: str) -> Iterator[tuple[tuple, object]]:
    """(arguments, result) of each `assert f(...) == ...` between literals; nothing is executed."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assert(ast.Compare(ast.Call(ast.Name(), arguments), [ast.Eq()], [result])):
                try:
                    yield tuple(map(ast.literal_eval, arguments)), ast.literal_eval(result)
                except ValueError:
                    continue


def shape(value) -> str:
    """The type of a value and of what is in it: "list[int]"."""
    inner = []
    if isinstance(value, (list, dict)):
        inner = sorted({shape(v) for v in value})
    if isinstance(value, dict):
        inner += sorted({shape(v) for v in value.values()})
    return f"{type(value).__name__}{inner}"


if __name__ == "__main__":
    run(main)
