"""Write short programming exercises (signature + docstring -> body) and a held-out split.

An offline stand-in for the language model that wrote phi-1's CodeExercises (arXiv 2306.11644).
families.txt defines the tasks, with many wordings and names; --concepts adds concepts.txt and
programs.txt. Every solution is checked against an oracle.

    python -m data.exercises --out out/exercises --benchmarks HumanEval.jsonl.gz

writes
    train/shard-*.jsonl.zst   documents: prompt + solution (also apart), entry_point, family, task
    heldout.jsonl             problems in HumanEval's format, plus family and task
    unseen.jsonl              the same, from families removed from training (--unseen)
    summary.json              counts, and drop counts by reason

Training has no held-out task, no held-out solution under other names, and no task that behaves like
a held-out one. It does have every family, test and operation of heldout.jsonl in other tasks.
"""

import ast
import functools
import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.config import UserError, parse, run
from common.files import new_folder, write_json, write_jsonl
from data.base.benchmarks import Mbpp, convert, read_rows
from data.base.documents import ShardWriter, document
from data.synthetic.damage import damage
from data.synthetic.families import FAMILIES, Task, read_concepts
from data.synthetic.forms import (
    GENERIC,
    POOL,
    Exercise,
    argument_types,
    fill,
    pool,
    results,
    tell,
    vary,
)
from data.synthetic.kinds import KINDS

TESTS = 30  # inputs per problem; with 6 in a prototype, 18 of 371 near misses passed
FAMILY_SHARE = 0.2  # maximum held-out share of a family
MAX_SAME = 24  # maximum equal results among TESTS: a test that mostly wants False is weak
MOST_MISSES = 10_000  # consecutive draws without a new exercise before giving up
NGRAM = 10  # drop a docstring that shares this many consecutive words with a benchmark's
MIN_CASES = 3  # minimum applicable cases; a task that passes all solves the benchmark problem
MIN_SHARED = 10  # inputs that two kinds of arguments must share to compare tasks by results
MIN_BOOL_CASES = 8  # MIN_CASES if the results are bool


@dataclass(frozen=True)
class Config:
    """Write short exercises (signature, docstring, solution) and a held-out split without leaks."""

    out: Path  # folder to write
    forms: str = "plain"  # plain: one layout; varied: layout and wording differ (forms.py)
    count: int = 30_000  # training exercises
    heldout: int = 500  # held-out problems, independent of seed and count
    unseen: int = 0  # problems from families removed from training, independent of seed
    seed: int = 0  # random seed for training tasks, wordings and names
    damage_frac: float = 0.0  # share of training solutions to damage so that results are wrong
    concepts: bool = False  # add the families of concepts.txt and programs.txt, and weight families
    # by lines of solutions, so that most exercises take several steps
    benchmarks: tuple[Path, ...] = ()  # HumanEval or MBPP file to avoid (.jsonl, .jsonl.gz, .json);
    # repeatable
    shuffle_docstrings: bool = False  # control: swap docstrings and function names among training
    # solutions with the same kinds of arguments


def main() -> None:
    config = parse(Config)
    if config.count < 1 or config.heldout < 0 or config.unseen < 0:
        raise UserError("--count must be at least 1, --heldout and --unseen at least 0")
    if not 0 <= config.damage_frac <= 1:
        raise UserError(f"--damage_frac {config.damage_frac}: want a share from 0 to 1")
    if config.forms not in ("plain", "varied"):
        raise UserError(f"--forms {config.forms!r}: want plain or varied")
    if config.shuffle_docstrings and config.forms != "plain":
        raise UserError("--shuffle_docstrings needs --forms plain")
    with new_folder(config.out, config.benchmarks) as out:
        s = write(config, out)
    for why, n in s["dropped"].items():
        print(f"{n:9,} dropped, {why}")
    also = f", {s['unseen']} of unseen families" if s["unseen"] else ""
    print(
        f"{config.out}: {s['documents']:,} exercises of {s['tasks']:,} tasks, {s['heldout']} other "
        f"tasks held out{also}"
    )


def write(config: Config, out: Path) -> dict:
    """Write exercises and problems to `out`; return the summary."""
    if config.concepts:
        FAMILIES.update(read_concepts())
    told = tell if config.forms == "plain" else vary
    asked = tell if told is tell else functools.partial(vary, mbpp_frac=0)  # as HumanEval does
    benchmarks = Benchmarks(config.benchmarks)
    outputs, dropped = run_tasks(benchmarks)
    unseen = hold_out(outputs, config.unseen, benchmarks, asked, unseen=True)
    seen = leave_families_out(outputs, dropped) if config.unseen else outputs
    problems = hold_out(seen, config.heldout, benchmarks, asked)
    train = {task: v for task, v in seen.items() if str(task) not in problems}
    exercises = list(
        draw(train, config.count, config.seed, benchmarks, dropped, told, config.concepts)
    )
    hidden = {
        solution_key(p["prompt"] + p["canonical_solution"])
        for p in [*problems.values(), *unseen.values()]
    }
    allowed = lambda task, wrong: key(task, wrong) not in hidden  # noqa: E731
    exercises = damage(exercises, config.damage_frac, config.seed, allowed)
    if config.shuffle_docstrings:
        exercises = shuffle_docstrings(exercises, config.seed)
    records = [training_record(exercise) for exercise in exercises]
    summary = {
        "documents": len(records),
        "bytes": sum(len(record["text"].encode()) for record in records),
        "tasks": len({e.task for e in exercises}),
        "heldout": len(problems),
        "unseen": len(unseen),
        "damaged": sum(bool(e.wrong) for e in exercises),
        "dropped": dropped,
        "train_by_family": Counter(e.task.family for e in exercises),
        "args": {k: v for k, v in vars(config).items() if k not in ("out", "benchmarks")},
        "benchmarks": [path.name for path in config.benchmarks],
    }
    (out / "train").mkdir()
    with ShardWriter(out / "train") as shards:
        for record in records:
            shards.write(record)
    write_jsonl(out / "heldout.jsonl", problems.values())
    if unseen:
        write_jsonl(out / "unseen.jsonl", unseen.values())
    write_json(out / "summary.json", summary)
    return summary


def training_record(exercise: Exercise) -> dict:
    """Return the training document of an exercise."""
    prompt, solution = exercise.prompt(), exercise.solution()
    fields = {"prompt": prompt, "solution": solution, "entry_point": exercise.name}
    fields |= {"family": exercise.task.family, "task": str(exercise.task)}
    if exercise.wrong:
        fields["damaged"] = True
    return document(prompt + solution, f"exercises:{exercise.task.family}", **fields)


# ---- Execute and compare


def check(exercise: Exercise, outputs: list, indexes: Iterator[int]) -> None:
    """Assert that the solution returns these outputs, types included, for inputs of the pool."""
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
    """Run every task on the pool; return the outputs of usable tasks, and drop counts by reason.

    Drops constant tasks and benchmark problems. Asserts that body and oracle agree.
    """
    outputs, dropped = {}, Counter()
    for task in tqdm([*itertools.chain(*FAMILIES.values())], "tasks", disable=None):
        found = results(task)
        check(tell(task, random.Random(0)), found, range(POOL))
        if all(result == found[0] for result in found):
            dropped["task: constant"] += 1
        elif benchmarks.has(task, found):
            dropped["task: solves a benchmark problem"] += 1
        else:
            outputs[task] = found
    for args in {task.args: None for task in outputs}:
        assert pool(args) == pool.__wrapped__(args), f"a task over ({args}) changed its arguments"
    return outputs, dropped


def solution_key(source: str) -> str:
    """Dump the AST of a function with neutral names and no docstring: equal for renamed copies."""
    function = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    function.returns = None
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
            node.arg, node.annotation = new[node.arg], None
        elif isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
    function.name = "f"
    return ast.dump(function)


# ---- Hold out


# Families that --unseen removes from training. They cover numbers, text, lists, two lists, dicts
# and grids; loops, slices and comprehensions.
UNSEEN = {"longest_run", "before", "in_base", "steps_below", "shift_letters", "rejoin", "unclosed"}
UNSEEN |= {"windows", "column", "count_pairs"}


def hold_out(
    outputs: dict[Task, list],
    wanted: int,
    benchmarks: "Benchmarks",
    told: Callable = tell,
    unseen: bool = False,
) -> dict[str, dict]:
    """Choose held-out problems by task, taking turns among families.

    A task qualifies if no other task has its solution or its outputs on the pool, and if training
    keeps all its parts or, with `unseen`, its family is in UNSEEN. Raises UserError if fewer than
    `wanted` qualify.
    """
    queues, rivals, left, copies = defaultdict(list), defaultdict(list), Counter(), Counter()
    for task in outputs if wanted else ():
        if not unseen or task.family in UNSEEN:
            queues[task.family].append(task)
        rivals[task.args].append(outputs[task])
        left.update(parts(task))
        copies[key(task)] += 1
    for queue in queues.values():
        random.Random(0).shuffle(queue)

    def found_in(queue: list[Task]) -> Iterator[tuple[str, dict]]:
        room = int(len(queue) * (1 if unseen else FAMILY_SHARE))
        while queue and room:
            task = queue.pop()
            scarce = not unseen and min(left[part] for part in parts(task)) < 2
            if copies[key(task)] > 1 or scarce:
                continue
            rng = random.Random(f"heldout {task}")
            exercise = told(task, rng)
            indexes = choose_tests(task, outputs[task], rivals[task.args], rng)
            if indexes and not benchmarks.overlap(exercise):
                left.subtract(parts(task))
                room -= 1
                yield str(task), as_problem(exercise, outputs[task], indexes)

    rounds = itertools.zip_longest(*map(found_in, queues.values()))  # one per family
    each = filter(None, itertools.chain.from_iterable(rounds))
    found = dict(itertools.islice(each, wanted))
    if len(found) < wanted:
        few = f"{wanted}: only {len(found)} tasks qualify; ask for fewer"
        raise UserError(f"--{'unseen' if unseen else 'heldout'} {few}")
    name = "unseen" if unseen else "exercises"
    return {
        task: {"task_id": f"{name}/{i}", **problem}
        for i, (task, problem) in enumerate(found.items())
    }


def leave_families_out(outputs: dict[Task, list], dropped: Counter) -> dict[Task, list]:
    """Remove tasks of UNSEEN families, and tasks that behave like one; count them in `dropped`."""
    keys, hidden, seen = set(), defaultdict(list), {}
    for task in outputs:
        if task.family in UNSEEN:
            keys.add(key(task))
            hidden[task.args].append(outputs[task])

    @functools.cache
    def hidden_results(args: str) -> list[tuple[list[tuple], set[str]]]:
        """Return [(inputs that tasks over `args` accept, results of hidden tasks on them)]."""
        found = []
        for other, results_there in hidden.items():
            can = [i for i, inputs in enumerate(pool(other)) if within(inputs, args)]
            if argument_types(other) == argument_types(args) and len(can) >= MIN_SHARED:
                made = {repr([result[i] for i in can]) for result in results_there}
                found.append(([pool(other)[i] for i in can], made))
        return found

    for task in outputs:
        if task.family in UNSEEN:
            dropped["task: of an unseen family"] += 1
        elif key(task) in keys or any(
            outcome(task, inputs) in made for inputs, made in hidden_results(task.args)
        ):
            dropped["task: does what one of an unseen family does"] += 1
        else:
            seen[task] = outputs[task]
    return seen


def within(inputs: tuple, args: str) -> bool:
    """Return whether every integer in `inputs` is in the bounds of its kind of argument."""
    kinds = [KINDS[kind] for kind in args.split()]
    return all(k.low <= v <= k.high for v, k in zip(inputs, kinds) if isinstance(v, int))


def outcome(task: Task, inputs: list[tuple]) -> str:
    try:
        return repr([task.oracle(*x) for x in inputs])
    except Exception:  # the oracle expects another kind of argument
        return ""


def parts(task: Task) -> list[str]:
    """List the parts that training must keep: family, tests, operations and words, no numbers."""
    return [task.family, *(str(p) for p in task.params if not isinstance(p, int))]


@functools.cache
def key(task: Task, wrong: str = "") -> str:
    """Return the solution_key of a task's solution, or of its damaged body `wrong`."""
    exercise = replace(tell(task, random.Random(0)), wrong=wrong)
    return solution_key(exercise.prompt() + exercise.solution())


def choose_tests(task: Task, outputs: list, rivals: list[list], rng: random.Random) -> list[int]:
    """Return indexes of TESTS pool inputs that expose every rival and every body that returns a
    constant or an argument; [] if there are none."""
    inputs, shuffled = pool(task.args), rng.sample(range(POOL), POOL)
    chosen = [*range(8), *(i for i in shuffled if i >= 8)][:20]  # the first 8 are edge values
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
    """Return the problem record of a held-out exercise, without its task_id."""
    cases = [(", ".join(map(repr, pool(exercise.task.args)[i])), outputs[i]) for i in indexes]
    asserts = [f"    assert candidate({given}) == {result!r}\n" for given, result in cases]
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
    outputs: dict[Task, list],
    count: int,
    seed: int,
    benchmarks: "Benchmarks",
    dropped: Counter,
    told: Callable = tell,
    by_lines: bool = False,
) -> Iterator[Exercise]:
    """Yield `count` exercises. A family with n tasks (or solution lines, `by_lines`) gets a share
    proportional to sqrt(n), and its tasks take turns. Raises UserError if too few exist."""
    rng, seen, misses = random.Random(seed), set(), 0
    families = defaultdict(list)
    for task in outputs:
        families[task.family].append(task)
    for tasks in families.values():
        rng.shuffle(tasks)
    turns = [itertools.cycle(tasks) for tasks in families.values()]
    lines = lambda task: task.body.count("\n") + 1 if by_lines else 1  # noqa: E731
    weights = [*itertools.accumulate(sum(map(lines, v)) ** 0.5 for v in families.values())]
    progress = tqdm(total=count, desc="exercises", disable=None)
    while len(seen) < count:
        task = next(rng.choices(turns, cum_weights=weights)[0])
        exercise = told(task, rng)
        text = exercise.prompt() + exercise.solution()
        reason = "exercise: repeated" if text in seen else benchmarks.overlap(exercise)
        if reason:
            dropped[reason] += 1
            misses += 1
            if misses > MOST_MISSES:
                raise UserError(f"--count {count}: only about {len(seen)} exercises; ask for fewer")
            continue
        check(exercise, outputs[task], range(POOL - 3, POOL))
        seen.add(text)
        misses = 0
        progress.update()
        yield exercise


def shuffle_docstrings(exercises: list[Exercise], seed: int) -> list[Exercise]:
    """Permute docstrings and function names among exercises with the same kinds of arguments."""
    groups = defaultdict(list)
    for exercise in exercises:
        groups[exercise.task.args].append(exercise)
    others = {k: iter(random.Random(seed).sample(v, len(v))) for k, v in groups.items()}
    pairs = [(exercise, next(others[exercise.task.args])) for exercise in exercises]
    return [
        replace(e, name=o.name, doc=o.doc, prose=o.prose, lines=o.lines, end=o.end)
        for e, o in pairs
    ]


# ---- Benchmarks to avoid


class Benchmarks:
    """Function names, docstrings and test cases of HumanEval and MBPP files."""

    def __init__(self, paths: tuple[Path, ...]):
        self.names, self.texts, self.ngrams = set(), set(), set()
        self.problems = defaultdict(list)  # by argument shapes: [(arguments, result), ...]
        for path in paths:
            convert(path, "HumanEval or MBPP", self.add, read_rows(path))

    def add(self, row: dict) -> None:
        if "entry_point" in row:
            text = " ".join(re.findall(r'"""(.*?)"""|$', row["prompt"], re.S))
            self.names.add(fold(row["entry_point"]))
            tests = row["test"]
        else:
            mbpp = Mbpp.of(row)
            text, tests = mbpp.text, "\n".join(mbpp.tests)
            self.names.update(map(fold, re.findall(r"^def (\w+)", mbpp.code, re.M)))
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
        """Return why to drop this exercise, or ""."""
        if exercise.name not in GENERIC and fold(exercise.name) in self.names:
            return "exercise: function name of a benchmark problem"
        for text in {exercise.doc, exercise.prose}:  # without and with its frame
            words = normalize(fill(text, exercise.arguments))
            if tuple(words) in self.texts or not self.ngrams.isdisjoint(ngrams(words)):
                return "exercise: docstring like a benchmark problem's"
        return ""

    def has(self, task: Task, outputs: list) -> bool:
        """Return whether a task's oracle passes the test of any benchmark problem."""
        edges = [KINDS[kind].edges for kind in task.args.split()]
        types = {type(output) for output in outputs}
        shapes = tuple(max(map(shape, values), key=len) for values in edges)  # not of []
        return any(
            type(cases[0][1]) in types and passes(task, cases) for cases in self.problems[shapes]
        )


def passes(task: Task, cases: list[tuple]) -> bool:
    """Return whether the oracle is right on all applicable cases, and on enough of them."""
    cases = [(inputs, result) for inputs, result in cases if within(inputs, task.args)]
    if not cases or len(cases) < (MIN_BOOL_CASES if isinstance(cases[-1][1], bool) else MIN_CASES):
        return False
    try:
        tried = ((task.oracle(*inputs), result) for inputs, result in cases)
        return all(got == result and type(got) is type(result) for got, result in tried)
    except Exception:  # the oracle expects another kind of argument
        return False


@functools.cache
def fold(name: str) -> str:
    return name.replace("_", "").lower()


def normalize(text: str) -> list[str]:
    """Return the lower-case words of `text`, without the opening of every MBPP problem."""
    text = re.sub(r"^write a (python )?function (to|that|which) ", "", text.lower().strip())
    return re.findall("[a-z0-9]+", text)


def ngrams(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


def test_cases(source: str) -> Iterator[tuple[tuple, object]]:
    """Yield (arguments, result) of each literal `assert f(...) == ...`, without executing it."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Assert(ast.Compare(ast.Call(ast.Name(), arguments), [ast.Eq()], [result])):
                try:
                    yield tuple(map(ast.literal_eval, arguments)), ast.literal_eval(result)
                except ValueError:
                    continue


def shape(value) -> str:
    """Return a value's type and the types inside it: "list['int[]']" for a list of int."""
    inner = []
    if isinstance(value, (list, dict)):
        inner = sorted({shape(v) for v in value})
    if isinstance(value, dict):
        inner += sorted({shape(v) for v in value.values()})
    return f"{type(value).__name__}{inner}"


if __name__ == "__main__":
    run(main)
