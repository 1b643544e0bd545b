import json
import random
import re
from html.parser import HTMLParser

import pytest

import ladder_page
from config import UserError
from data import decontaminate, diversity
from data.documents import ShardWriter, document, write_json
from eval import ladder as reading
from eval.pass_at_k import score
from eval.robustness import paired

SCORES = {  # share solved by (small, large) of held-out exercises; the rest follows from it
    "raw": (0.02, 0.03),
    "filtered": (0.03, 0.05),
    "classified": (0.03, 0.06),
    "textbooks": (0.10, 0.15),
    "exercises": (0.50, 0.70),
    "damaged": (0.42, 0.64),
    "pairs": (0.02, 0.02),
    "pruned95": (0.45, 0.66),
    "pruned80": (0.30, 0.50),
}
SHARES = {"heldout": 1, "unseen": 0.4, "HumanEval": 0.05, "MBPP": 0.08}
FOLDERS = {"heldout": "heldout", "unseen": "unseen", "HumanEval": "humaneval", "MBPP": "mbpp"}
IDS = {
    "heldout": "exercises/{}",
    "unseen": "unseen/{}",
    "HumanEval": "HumanEval/{}",
    "MBPP": "MBPP/{}",
}
BODY = "    total = 0\n    for x in values:\n        if x > {0}:\n            total += x * {0}\n    return total\n"


def problem(task_id: str, i: int) -> dict:
    name = f"sum_over_{i}"
    head = f'def {name}(values):\n    """Add the values over {i}, each times {i}."""\n'
    test = f"def check(candidate):\n    assert candidate([{i + 1}]) == {(i + 1) * i}\n"
    return {"task_id": task_id, "prompt": head, "canonical_solution": BODY.format(i),
            "entry_point": name, "test": test}  # fmt: skip


def write_lines(path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_result(folder, name: str, problems: int, frac: float, seed: int) -> None:
    """As eval.harness writes it: `frac` of the problems solved."""
    rng = random.Random(f"{folder.parent.name} {name} {seed}")
    passed = {IDS[name].format(i): [rng.random() < frac] for i in range(problems)}
    config = {"checkpoint": str(folder), "problems": "p.jsonl"}
    result = {"benchmark": "exercises" if name in ("heldout", "unseen") else name,
              "protocol": "function body", **score(passed), "problems_sha256": "0" * 64,
              "config": config}  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / "results.json", result)
    write_lines(
        folder / "samples.jsonl", ({"task_id": t, "passed": p[0]} for t, p in passed.items())
    )


def write_run(folder, tokens: int, loss: float, init: str | None, width: int) -> None:
    folder.mkdir(parents=True)
    config = {"out": str(folder), "data_checksum": "aa11", "tokenizer": "e2331", "code": "4a11ea41",
              "init_checksum": init, "commit": "1d8175285911", "torch": "2.13.0", "device": "cpu",
              "cpus": 2, "width": width}  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", {"tokens": tokens, "weights": f"{tokens % 9973:08x}"})
    lines = [
        {"step": s, "tokens": s * tokens // 50, "loss": loss + 4 / (1 + s / 6)}
        for s in range(1, 51)
    ]
    write_lines(folder / "metrics.jsonl", lines)


def write_rung(out, rung: str, size: str, seed: int, frac: float, problems: dict) -> None:
    name, large = f"{rung}-{size}-s{seed}", size == "large"
    runs = [(f"runs/{name}", 4_000_000)]
    if rung not in ("raw", "filtered", "classified", "textbooks"):
        runs = [(f"runs/base-{size}-s{seed}", 1_000_000), (f"runs/{name}", 3_000_000)]
    for i, (run, tokens) in enumerate(runs):
        if not (out / run).exists():
            write_run(
                out / run, tokens, 2.5 - large / 2 - frac, "7fc5" if i else None, 64 + 64 * large
            )
    folder = out / "rungs" / name
    for of, share in SHARES.items():
        if problems[of]:
            write_result(folder / FOLDERS[of], of, problems[of], frac * share, seed)
    before = [1] * round(100 * frac) + [0] * (100 - round(100 * frac))
    found = {f"perturbation {k}": paired(before, [b * (j % (k + 2) > 0) for j, b in enumerate(before)])
             for k in range(8)} | {"none apply": {"problems": 0}}  # fmt: skip
    if rung in ("exercises", "damaged"):
        (folder / "robustness").mkdir()
        whole = score({str(i): [bool(b)] for i, b in enumerate(before)})
        write_json(folder / "robustness" / "results.json", {**whole, "perturbations": found})
    bits = {"bits_per_byte": 2.1 - frac / 3, "ci95": [1.6, 2.2], "bytes": 9, "documents": 2}
    write_json(folder / "bits.json", bits)
    write_json(folder / "library.json", {"right_frac": 0.4 + frac / 4, "ci95": [0.3, 0.6]})
    write_json(folder / "rung.json", {
        "name": name, "rung": rung, "size": size, "seed": seed, "label": f"label of <{rung}>",
        "parameters": 400_000 + 2_000_000 * large, "tokens": 4_000_000,
        "flops": 1e13 * (1 + 5 * large), "train_s": 300.5, "score_s": 60.25,
        "runs": [run for run, _ in runs], "command": f"python ladder.py configs/ladder --only {name}",
    })  # fmt: skip


def write_data(out, problems: dict) -> None:
    """Small data folders, by the stages themselves where they are quick."""
    train = out / "data" / "exercises" / "train"
    train.mkdir(parents=True)
    other = 'def join_{0}(a, b):\n    """Words."""\n    return [a[i] + str(b) for i in range({0}) if a]\n'
    with ShardWriter(train) as writer:
        for i in range(60):
            p = problem("", i)
            text = p["prompt"] + p["canonical_solution"] if i % 2 else other.format(i)
            writer.write(document(text, f"exercise:{i}"))
    files = []
    for of in ("heldout", "HumanEval"):
        files.append(out / "data" / f"{of}.jsonl")
        some = (problem(IDS[of].format(i), 100 + i) for i in range(problems[of]))
        write_lines(files[-1], (p if i % 2 else p | {
            "canonical_solution": "    return [v for v in sorted(set(values)) if v][::-1]\n",
            "prompt": p["prompt"].replace("Add the values", "The values in falling order"),
        } for i, p in enumerate(some)))  # fmt: skip
    for tau in (95, 80):
        decontaminate.decontaminate(decontaminate.Config(
            source=(train,), out=out / "data" / f"decontaminate_{tau}", benchmarks=tuple(files),
            tau=tau / 100))  # fmt: skip
    diversity.diversity(diversity.Config(source=(train, files[0]), out=out / "data" / "diversity"))
    filtered = out / "data" / "filtered"
    write_lines(
        filtered / "samples" / "kept.jsonl", [{"reason": "", "origin": "a.py", "text": "kept <1>"}]
    )
    write_lines(filtered / "samples" / "rejected.jsonl",
                [{"reason": "min_chars", "origin": "b.py", "text": "rejected one"}])  # fmt: skip
    write_json(filtered / "summary.json",
               {"documents_in": 20, "documents": 7, "bytes_in": 4e6, "bytes": 1e6})  # fmt: skip
    write_lines(out / "data" / "scored" / "samples" / "kept.jsonl",
                [{"quality": 0.91, "origin": "c.py", "text": "classified good"}])  # fmt: skip


def write_ladder(out, problems: dict) -> None:
    write_data(out, problems)
    for rung, fracs in SCORES.items():
        for size, frac in zip(("small", "large"), fracs):
            for seed in range(2 if rung == "exercises" and size == "small" else 1):
                if (rung, size) != ("damaged", "large"):
                    write_rung(out, rung, size, seed, frac, problems)
    (out / "rungs" / "damaged-large-s0" / "heldout").mkdir(parents=True)
