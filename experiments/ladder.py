"""The paper's Figure 2.1 in miniature: the same model on better and better data, bar by bar.

    python -m experiments.ladder FOLDER            make the data, train and score every bar
    python -m experiments.ladder FOLDER --list     what that is, and what of it is done
    python -m experiments.ladder FOLDER --only raw-small-s0 --out out/again    one bar, from nothing

A rung is what a model is trained on (RUNGS), a bar is a rung at a model size with a seed. Each job
is one command of this project; its output is in OUT/logs, and OUT/jobs says what it was made from.
A job is done again if its command or the content of what it reads has changed, and only then, not
if code or the installed packages have: kill the ladder at any time, and the same command goes on.
(But a training run that was cut short begins anew if code that it depends on has changed.)
What runs side by side is independent and has threads of its own, so that the result does not depend
on --jobs.

The folder has ladder.toml, whose keys are the options below, and a SIZE.toml for train.py of each
model size. Every rung of a ladder sees (base_steps + finetune_steps) steps; those that are
finetuned on something see base_steps of what `textbooks` has, and then finetune_steps of it.
"""

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse, run
from common.files import read_json, write_json
from data.base.stage import lock
from experiments.jobs import Job, Runner, record


@dataclass(frozen=True)
class Rung:
    label: str  # in the report's table
    base: str  # data/tokens/BASE is what the model is trained on
    finetune: str = ""  # and then on this, if anything


MIX = "textbooks"
RUNGS = {
    "raw": Rung("raw code", "raw"),
    "filtered": Rung("filtered by rules", "filtered"),
    "classified": Rung("filtered by a classifier", "classified"),
    "textbooks": Rung("classified code + textbooks", MIX),
    "base": Rung("the same, cut short: what is then finetuned", MIX),
    "exercises": Rung("code + textbooks, then exercises", MIX, "exercises"),
    "varied": Rung("the same, exercises in many forms", MIX, "exercises_varied"),
    "damaged": Rung("the same, half of the solutions damaged", MIX, "exercises_damaged"),
    "pruned95": Rung("the same, pruned at tau 0.95", MIX, "pruned_95"),
    "pruned90": Rung("the same, pruned at tau 0.90", MIX, "pruned_90"),
    "pruned85": Rung("the same, pruned at tau 0.85", MIX, "pruned_85"),
    "pruned80": Rung("the same, pruned at tau 0.80", MIX, "pruned_80"),
    "pairs": Rung("code + textbooks, then pairs cut from raw code", MIX, "pairs"),
}
HOW = {"out", "only", "list", "check", "jobs"}  # options that change no result
CORE_FLOPS = 80e9  # a second of training on a core: 5,473 tokens/s of demo.toml (LOG.md)
MIN_DOCUMENTS = 500  # that must be left by pruning: fewer would be seen hundreds of times


@dataclass(frozen=True)
class Config:
    """Make, train and score a ladder's bars: python -m experiments.ladder FOLDER [--key=value]"""

    bars: tuple[str, ...]  # "RUNG SIZE SEED SEED ..."; several
    base_steps: int  # of a rung that is finetuned, before that
    finetune_steps: int  # of those; a rung that is not finetuned has both on its one kind of data
    out: Path = Path("out/ladder")  # folder to write
    only: tuple[str, ...] = ()  # bar to make, as exercises-small-s0, all if none; several
    list: bool = False  # print what would be done, and what of it is done, and stop
    check: Path | None = None  # rung.json of another time: say whether --only gave the same
    jobs: int = 1  # commands that run side by side
    threads: int = 1  # CPU threads of each
    device: str = "auto"  # auto, cpu or cuda
    humaneval: Path | None = None  # HumanEval.jsonl.gz; without it no bar is scored on it
    mbpp: Path | None = None  # mbpp.jsonl; likewise. The pruned rungs need one of them

    source: tuple[str, ...] = ("stdlib", "site-packages")  # of raw code, as data.collect has it
    raw_mb: float = 40.0  # megabytes of raw code, 0 = all
    heldout_mb: float = 0.5  # of it for bits per byte, in packages that no rung is trained on
    labels: int = 1000  # raw documents that are labelled, for the classifier to learn
    keep_frac: float = 0.2  # share of the raw documents that the classifier keeps
    textbooks: int = 2000  # lessons to write
    textbooks_weight: float = 0.5  # of the tokens that `textbooks` sees, the rest is classified
    exercises: int = 30_000  # exercises to write
    exercise_options: tuple[str, ...] = ()  # more options of data.exercises
    heldout: int = 500  # held-out exercises of families that are in training
    unseen: int = 0  # held-out exercises of families that are not
    prune_heldout: bool = True  # pruned rungs lose also what is like a held-out exercise
    tokenizer_mb: float = 4.0  # of each of raw code, textbooks and exercises, for the tokenizer
    val_frac: float = 0.02  # share of each kind of data for its validation loss
    finetune_options: tuple[str, ...] = ()  # options of train.py for finetuning, as "--lr=1e-3"

    max_new_tokens: int = 128  # of a completion
    robustness_limit: int = 60  # held-out exercises whose prompts are perturbed
    sandbox: str = "auto"  # tier in which the model's programs run

    def __post_init__(self):
        for name in ("base_steps", "finetune_steps", "jobs", "threads", "textbooks", "exercises"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, want at least 1")


@dataclass(frozen=True)
class Bar:
    rung: str
    size: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rung}-{self.size}-s{self.seed}"


def bars_of(c: Config, folder: Path) -> list[Bar]:
    """The bars that `c.bars` and `c.only` name. Raises UserError for one that cannot be."""
    bars = []
    for line in c.bars:
        if len(words := line.split()) < 3 or not all(word.isdecimal() for word in words[2:]):
            raise UserError(f"bars: {line!r}: want RUNG SIZE SEED ..., with seeds from 0")
        rung, size, *seeds = words
        if rung not in RUNGS:
            raise UserError(f"bars: {line!r}: no rung {rung!r}; want one of {', '.join(RUNGS)}")
        if not (folder / f"{size}.toml").exists():
            raise UserError(f"bars: {line!r}: there is no {folder / size}.toml")
        bars += [Bar(rung, size, int(seed)) for seed in seeds]
    known = {bar.name: bar for bar in bars}
    for name in c.only:
        if name not in known:
            raise UserError(f"--only {name}: no such bar; want one of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(c.only or known)]


class Plan:
    """All jobs that some bars need, by name, each after those that it needs."""

    def __init__(self, c: Config, folder: Path, command: str):
        self.c, self.folder, self.command = c, folder, command
        self.data, self.runs, self.rungs = c.out / "data", c.out / "runs", c.out / "rungs"
        self.jobs: dict[str, Job] = {}
        self.benchmarks = {k: p for k, p in (("humaneval", c.humaneval), ("mbpp", c.mbpp)) if p}
        self.skipped: dict[str, str] = {}  # bars that cannot be made, and why

    def add(self, name: str, out: Path, *command, needs=(), **more) -> str:
        arguments = [str(a) for a in command]
        self.jobs[name] = Job(name, out, arguments, tuple(needs), **more)
        return name

    def make(self, name: str) -> str:
        """The job that makes data/NAME, added with those before it unless it is there."""
        if name in self.jobs:
            return name
        c, data, out = self.c, self.data, self.data / name
        write = ["--out", out]
        if name == "collected":
            sources = itertools.chain(*(("--source", s) for s in c.source))
            return self.add(name, out, "data.collect", *sources, "--max_mb", c.raw_mb, *write)
        if name in ("raw", "heldout_code"):
            side = ["--keep", "heldout"] if name == "heldout_code" else []
            options = ["--heldout_mb", c.heldout_mb, *side, *write]
            return self.on(name, "experiments.holdout", ["collected"], *options)
        if name == "filtered":
            return self.on(name, "data.filter", ["raw"], *write, work_s=20)
        if name == "labels":
            options = ["--labeller", "rules", "--sample", c.labels, *write]
            return self.on(name, "data.annotate", ["raw"], *options)
        if name == "forest":  # on the syntax tree: at 2.6M parameters hidden states were no better
            return self.on(name, "data.classify train", ["labels"], *write, work_s=20)  # (LOG.md)
        if name == "scored":
            forest = ["--forest", data / self.make("forest")]
            return self.on(name, "data.classify score", ["raw"], *forest, *write, more=["forest"],
                           work_s=40)  # fmt: skip
        if name == "classified":  # the classifier decides alone, as in the paper
            options = ["--keep_frac", c.keep_frac, "--rules=false", *write]
            return self.on(name, "data.filter", ["scored"], *options, work_s=20)
        if name == "textbooks":
            return self.add(name, out, "data.synthesize", "textbooks", "--count", c.textbooks,
                            *write, work_s=c.textbooks / 40)  # fmt: skip
        if name.startswith("exercises"):
            options = ["--count", c.exercises, "--heldout", c.heldout, *c.exercise_options]
            options += ["--unseen", c.unseen] if c.unseen else []
            options += ["--damage_frac", 0.5] if name == "exercises_damaged" else []
            options += ["--forms", "varied"] if name == "exercises_varied" else []
            return self.add(name, out, "data.exercises", *options, *write, work_s=40)
        if name == "pairs":
            return self.on(name, "experiments.pairs", ["raw"], *write, work_s=20)
        if name.startswith("decontaminate_"):
            heldout = [data / "exercises" / "heldout.jsonl"] if c.prune_heldout else []
            against = [*self.benchmarks.values(), *heldout]
            flags = itertools.chain(*(("--benchmarks", path) for path in against))
            options = [*flags, "--tau", int(name[-2:]) / 100, *write]
            return self.on(name, "data.decontaminate", ["exercises/train"], *options, work_s=30,
                           reads=tuple(self.benchmarks.values()))  # fmt: skip
        if name == "diversity":
            sets = ["raw", "filtered", "classified", "textbooks", "exercises/train"]
            return self.on(name, "data.diversity", sets, *write, work_s=60)
        if name == "tokenizer":
            options = ["--vocab_size", self.vocab_size(), "--max_mb", c.tokenizer_mb]
            options += ["--threads", c.threads, *write]
            sources = ["raw", "textbooks", "exercises/train"]
            return self.on(name, "tokenizer.train", sources, *options, work_s=40)
        assert name.startswith("tokens/"), name
        return self.pack(name, name.partition("/")[2])

    def on(self, name: str, command: str, sources: list[str], *options, more=(), **about) -> str:
        """A job that reads folders of data/ with --source."""
        needs = [self.make(source.split("/")[0]) for source in sources]
        flags = itertools.chain(*(("--source", self.data / source) for source in sources))
        out = self.data / name
        return self.add(name, out, *command.split(), *flags, *options, needs=[*needs, *more],
                        **about)  # fmt: skip

    def pack(self, name: str, kind: str) -> str:
        c, more, skip = self.c, [], None
        sources = [f"{kind}/train" if kind.startswith("exercises") else kind]
        if kind == MIX:
            sources = ["classified", "textbooks"]
            more = ["--weight", 1 - c.textbooks_weight, "--weight", c.textbooks_weight]
        if kind.startswith("pruned_"):
            sources = [f"decontaminate_{kind[-2:]}"]
            summary = self.data / sources[0] / "summary.json"

            def skip() -> str:
                left = read_json(summary)["documents"]
                few = f"pruning left {left:,} documents, fewer than {MIN_DOCUMENTS}"
                return few if left < MIN_DOCUMENTS else ""

        tokenizer = self.make("tokenizer")
        options = ["--tokenizer", self.data / tokenizer, "--val_frac", c.val_frac]
        options += [*more, "--threads", c.threads, "--out", self.data / name]
        return self.on(name, "data.pack", sources, *options, more=[tokenizer], skip=skip)

    def size(self, name: str):
        """The TrainConfig of SIZE.toml."""
        from train import TrainConfig

        return parse(TrainConfig, [str(self.folder / f"{name}.toml")], toml=True)

    def vocab_size(self) -> int:
        sizes = {line.split()[1] for line in self.c.bars}
        found = {self.size(name).vocab_size for name in sizes}
        if len(found) > 1:
            raise UserError(f"{self.folder}: sizes with vocab_size {sorted(found)}; want one")
        return found.pop()

    def train(self, name: str, bar: Bar, tokens: str, steps: int, init: str = "") -> str:
        """The job that makes runs/NAME, unless another bar has it too."""
        if name in self.jobs:
            return name
        c, config = self.c, self.folder / f"{bar.size}.toml"
        options = ["--data", self.data / tokens, "--max_steps", steps, "--seed", bar.seed]
        options += ["--threads", c.threads, "--device", c.device]
        options += ["--init_from", self.runs / init, *c.finetune_options] if init else []
        out, size = self.runs / name, self.size(bar.size)
        flops = self.flops(bar.size) * steps * size.seqs_per_step * size.seq_len
        return self.add(name, out, "train", config, "--out", out, *options, "--resume", "--restart",
                        needs=[self.make(tokens), *([init] if init else [])], reads=(config,),
                        work_s=flops / CORE_FLOPS)  # fmt: skip

    def tokens(self, bar: Bar) -> str:
        """Of what the last run of a bar is trained on."""
        return f"tokens/{RUNGS[bar.rung].finetune or RUNGS[bar.rung].base}"

    def flops(self, size: str) -> int:
        """FLOPs to train a model of this size on a token."""
        from model import flops_per_token

        return flops_per_token(self.size(size).model)

    def bar(self, bar: Bar) -> None:
        """Add all jobs of a bar, unless it cannot be made."""
        rung, c, where = RUNGS[bar.rung], self.c, f"{bar.size}-s{bar.seed}"
        if bar.rung.startswith("pruned") and not self.benchmarks:
            self.skipped[bar.name] = "pruned of what? it needs --humaneval or --mbpp"
            return
        if rung.finetune:
            base = self.train(f"base-{where}", bar, f"tokens/{rung.base}", c.base_steps)
            steps = c.finetune_steps
            runs = [base, self.train(bar.name, bar, self.tokens(bar), steps, init=base)]
        else:
            steps = c.base_steps + (c.finetune_steps if bar.rung != "base" else 0)
            runs = [self.train(bar.name, bar, self.tokens(bar), steps)]
        scores = list(self.score(bar.name))

        def write() -> None:
            self.write_rung(bar, runs, scores)

        self.add(f"{bar.name} rung", self.rungs / bar.name / "rung.json", "rung.json",
                 needs=[*runs, *scores], call=write, work_s=0)  # fmt: skip

    def score(self, run_name: str) -> Iterator[str]:
        """The names of the jobs that score a run, added."""
        c, folder = self.c, self.rungs / run_name
        exercises = self.data / self.make("exercises")
        model = ["--checkpoint", self.runs / run_name, "--device", c.device]
        options = ["--max_new_tokens", c.max_new_tokens, "--workers", c.threads]
        options += ["--sandbox", c.sandbox]
        problems = {"heldout": ("exercises", exercises / "heldout.jsonl")}
        if c.unseen:
            problems["unseen"] = ("exercises", exercises / "unseen.jsonl")
        problems |= {name: (name, path) for name, path in self.benchmarks.items()}

        def evaluate(name: str, module: str, path: Path, *more, **about) -> str:
            known = ["--self_check", c.out / "self_check" / f"{name}.json"]
            needs = [run_name, *(["exercises"] if module in ("exercises", "robustness") else [])]
            return self.add(f"{run_name} {name}", folder / name, f"eval.{module}", *model,
                            "--problems", path, *options, *known, *more, "--out", folder / name,
                            needs=needs, reads=() if "exercises" in needs else (path,),
                            work_s=30, **about)  # fmt: skip

        for name, (module, path) in problems.items():
            yield evaluate(name, module, path)
        heldout = folder / "heldout" / "results.json"

        def solves_nothing() -> str:
            nothing = read_json(heldout)["pass@1"] == 0
            return "a model that solves nothing has nothing to lose" if nothing else ""

        robustness = evaluate("robustness", "robustness", exercises / "heldout.jsonl", "--limit",
                              c.robustness_limit, skip=solves_nothing, optional=True)  # fmt: skip
        self.jobs[robustness].needs += (f"{run_name} heldout",)
        yield robustness
        code = ["--source", self.data / self.make("heldout_code")]
        usage = self.data / "usage.json"
        self.add("usage", usage, "eval.library", "--source", self.data / self.make("raw"), "--out",
                 usage, needs=["raw"], work_s=60)  # fmt: skip
        for name, more, needs in (("bits", [], []), ("library", ["--usage", usage], ["usage"])):
            out = folder / f"{name}.json"
            yield self.add(f"{run_name} {name}", out, f"eval.{name}", *model, *code, *more,
                           "--out", out, needs=[run_name, "heldout_code", *needs],
                           work_s=20)  # fmt: skip

    def write_rung(self, bar: Bar, runs: list[str], scores: list[str]) -> None:
        """rung.json: what a bar is, cost and scored, and the command that makes it again."""
        from common import checkpoint
        from common.runlog import environment
        from model import parameter_count

        size = self.size(bar.size)
        summaries = [read_json(self.runs / name / "summary.json") for name in runs]
        tokens = sum(s["tokens"] for s in summaries)
        last = read_json(self.data / self.tokens(bar) / "summary.json")
        seconds = [read_json(record(self.c.out, name)) for name in scores]
        rung = {
            "name": bar.name, "rung": bar.rung, "size": bar.size, "seed": bar.seed,
            "label": RUNGS[bar.rung].label, "parameters": parameter_count(size.model),
            "tokens": tokens, "flops": tokens * self.flops(bar.size),
            "epochs": round(summaries[-1]["tokens"] / last["train_tokens"], 2),
            "train_s": round(sum(s["trained_s"] for s in summaries), 1),
            "score_s": round(sum(s["seconds"] for s in seconds if s), 1),
            "runs": [f"runs/{r}" for r in runs],
            "weights": checkpoint.checksum(checkpoint.find(self.runs / bar.name)),
            "scores": self.scores(scores),
            "command": f"{self.command} --only {bar.name} --out out/again "
                       f"--check {self.rungs / bar.name / 'rung.json'}",
            "versions": {k: v for k, v in environment().items() if k != "command"},
        }  # fmt: skip
        write_json(self.rungs / bar.name / "rung.json", rung)

    def scores(self, jobs: list[str]) -> dict[str, float]:
        """What these jobs measured of a bar, in one number each."""
        keys = {"bits": "bits_per_byte", "library": "right_frac"}
        results = {name.split()[-1]: read_json(self.jobs[name].proof) for name in jobs}
        return {name: r[keys.get(name, "pass@1")] for name, r in results.items() if r}


def again(c: Config, folder: Path) -> str:
    """The command line that makes the same as `c`, less where, which of it and how."""
    plain = parse(Config, [str(folder / "ladder.toml")], toml=True)
    words = ["python", "-m", "experiments.ladder", str(folder)]
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.name not in HOW and value != getattr(plain, field.name):
            values = value if isinstance(value, tuple) else (value,)
            values = (str(v).lower() if isinstance(v, bool) else v for v in values)
            words += [f"--{field.name}={v}" for v in values]
    return shlex.join(words)


def same(before: dict, now: dict) -> bool:
    """Print whether a rung.json says what another one does, weights and scores."""
    rows = [("weights", before["weights"], now["weights"])]
    rows += [(k, v, now["scores"].get(k, "not scored")) for k, v in before["scores"].items()]
    for name, theirs, ours in rows:
        print(f"{name:12} {theirs!s:24} {ours!s:24} {'same' if theirs == ours else 'DIFFERS'}")
    return all(theirs == ours for _, theirs, ours in rows)


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0].startswith("-"):
        if "--help" not in words and "-h" not in words:
            raise UserError(
                "name a folder first: python -m experiments.ladder experiments/ladder_cpu"
            )
        words = ["experiments/ladder_cpu", "--help"]
    folder = Path(words[0])
    c = parse(Config, [str(folder / "ladder.toml"), *words[1:]], toml=True)
    for path in (c.humaneval, c.mbpp):
        if path and not path.is_file():
            raise UserError(f"{path}: no such file")
    bars = bars_of(c, folder)
    plan = Plan(c, folder, again(c, folder))
    for bar in bars:
        plan.bar(bar)
    if not c.only:
        plan.make("diversity")
    for name, why in plan.skipped.items():
        print(f"{name} is skipped: {why}")
    before = read_json(c.check) if c.check else None
    if c.check and (not before or f"{before.get('name')} rung" not in plan.jobs):
        raise UserError(f"--check {c.check}: no rung.json of a bar that is made; see --only")
    runner = Runner(plan.jobs, c.out, c.jobs, c.threads)
    if c.list:
        return runner.show()
    c.out.mkdir(parents=True, exist_ok=True)
    ok = runner.run(lock(c.out / ".lock", c.out))
    if ok and before:
        now = read_json(plan.rungs / before["name"] / "rung.json")  # none of a bar that was skipped
        ok = now is not None and same(before, now)
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    run(main)
