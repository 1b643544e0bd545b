"""Reads the folders that evaluations write, for commands that compare them."""

import itertools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from common.config import UserError, parse
from common.files import read_jsonl
from eval.pass_at_k import wilson


@dataclass(frozen=True)
class Result:
    """An evaluation's folder."""

    folder: Path
    result: dict  # results.json

    @property
    def model(self) -> str:
        """What was scored: the checkpoint's folder, or the samples' file."""
        config = self.result["config"]
        return config.get("checkpoint") or config.get("samples") or str(self.folder)

    def rates(self) -> dict[str, float]:
        """{task_id: the share of its samples that passed}. Raises UserError."""
        passed = {}
        for number, sample in enumerate(read_jsonl(self.folder / "samples.jsonl"), 1):
            try:
                passed.setdefault(sample["task_id"], []).append(bool(sample["passed"]))
            except KeyError as e:
                where = self.folder / "samples.jsonl"
                raise UserError(f"{where} sample {number}: no {e}; score it again") from None
        return {task_id: sum(p) / len(p) for task_id, p in passed.items()}


def read_result(folder: Path) -> Result:
    """Raises UserError if `folder` is none that an evaluation wrote."""
    try:
        result = json.loads((folder / "results.json").read_text())
        _ = [result[k] for k in ("benchmark", "protocol", "config", "pass@1", "ci95", "problems")]
    except OSError as e:
        raise UserError(
            f"{folder}/results.json: {e.strerror}; name the --out of an evaluation"
        ) from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}/results.json is no evaluation's result: {e!r}") from None
    return Result(folder, result)


def parse_folders(cls, field: str):
    """parse(cls), where folders may stand first on the command line, without --`field`."""
    folders = list(itertools.takewhile(lambda a: not a.startswith("-"), sys.argv[1:]))
    return parse(cls, [f"--{field}={f}" for f in folders] + sys.argv[1 + len(folders) :])


def mean(rates: list[float]) -> dict | None:
    """{"pass@1", "ci95", "problems"} of problems' rates, None of no problem."""
    if not rates:
        return None
    frac = math.fsum(rates) / len(rates)
    return {"pass@1": frac, "ci95": list(wilson(frac, len(rates))), "problems": len(rates)}


def percent(score: dict | None) -> str:
    if score is None:
        return "-"
    low, high = (100 * x for x in score["ci95"])
    return f"{100 * score['pass@1']:.1f} ({low:.1f} to {high:.1f})"
