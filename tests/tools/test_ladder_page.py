import json
import random
import re
import shutil

import pytest

from common.config import UserError
from common.files import write_json
from data import decontaminate, diversity
from data.base.documents import ShardWriter, document
from eval.robustness import paired
from eval.scores import score
from tools import ladder_page
from tools import ladder_scores as reading

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
BODY = """    total = 0
    for x in values:
        if x > {0}:
            total += x * {0}
    return total
"""
OTHER = (
    'def join_{0}(a, b):\n    """Words."""\n    return [a[i] + str(b) for i in range({0}) if a]\n'
)


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
    after = [[b * (j % (k + 2) > 0) for j, b in enumerate(before)] for k in range(8)]
    found = {f"perturbation {k}": paired(before, a) for k, a in enumerate(after)}
    found["applies to none"] = {"problems": 0}
    if rung in ("exercises", "damaged"):
        (folder / "robustness").mkdir()
        whole = score({str(i): [bool(b)] for i, b in enumerate(before)})
        whole |= {"perturbations": found, "config": {"checkpoint": str(folder)}}
        write_json(folder / "robustness" / "results.json", whole)
    bits = {"bits_per_byte": 2.1 - frac / 3, "ci95": [1.6, 2.2], "bytes": 9, "documents": 2}
    write_json(folder / "bits.json", bits)
    write_json(
        folder / "library.json",
        {"right_frac": 0.4 + frac / 4, "ci95": [0.3, 0.6], "baseline_frac": 0.255},
    )
    write_json(folder / "rung.json", {
        "name": name, "rung": rung, "size": size, "seed": seed, "label": f"label of <{rung}>",
        "parameters": 400_000 + 2_000_000 * large, "tokens": 4_000_000, "epochs": 1.5,
        "flops": 1e13 * (1 + 5 * large), "train_s": 300.5, "score_s": 60.25,
        "runs": [run for run, _ in runs],
        "command": f"python -m experiments.ladder here --only <{name}>",
        "scores": {FOLDERS[of]: frac * share for of, share in SHARES.items() if problems[of]},
    })  # fmt: skip


def write_data(out, problems: dict) -> None:
    """Small data folders, by the stages themselves where they are quick."""
    train = out / "data" / "exercises" / "train"
    train.mkdir(parents=True)
    with ShardWriter(train) as writer:
        for i in range(60):
            p = problem("", i)
            text = p["prompt"] + p["canonical_solution"] if i % 2 else OTHER.format(i)
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
    diversity.diversity(diversity.Config(source=(train,), out=out / "data" / "diversity"))
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


FEW = {"heldout": 40, "unseen": 20, "HumanEval": 10, "MBPP": 0}


@pytest.fixture(scope="module")
def drawn(cli, tmp_path_factory):
    """(the ladder's folder, the PNGs' folder, the page, what was printed)"""
    out = tmp_path_factory.mktemp("ladder")
    write_ladder(out, FEW)
    done = cli("-m", "tools.report", "--ladder", out, "--png", out / "png")
    assert done.returncode == 0, done.stderr
    return out, out / "png", (out / "report.html").read_text(), done.stdout


@pytest.fixture(scope="module")
def ladder(drawn):
    return reading.read_ladder(drawn[0])


def test_page(drawn):
    out, _, page, printed = drawn
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)  # self-contained
    assert str(out) not in page
    for title in ladder_page.SECTIONS:
        assert f"<h2>{title}</h2>" in page
    svgs, labels = page.count("<svg"), page.count('role="img" aria-label="')
    assert svgs == labels == 9
    for rung, fracs in SCORES.items():  # each bar's command, and its name as text
        for size in ("small", "large")[: 1 if rung == "damaged" else len(fracs)]:
            assert f"python -m experiments.ladder here --only &lt;{rung}-{size}-s0&gt;" in page
            assert f"{rung}-{size}-s0" in printed
    assert "label of &lt;raw&gt;" in page
    assert "label of <raw>" not in page
    for word in (
        "kept &lt;1&gt;",
        "rejected one",
        "classified good",
        "The paper's, not ours",
        "25.5%",
    ):
        assert word in page


def test_what_is_absent_is_said(drawn, ladder):
    page = drawn[2]
    assert (
        "Not run: base, varied, pruned90, pruned85, MBPP, damaged-large-s0 (not finished)." in page
    )
    assert ladder.unfinished == ["damaged-large-s0"]
    assert ">not run<" in page  # in the figure, where the bar would be
    assert ladder.sets == ["heldout", "unseen", "humaneval"]


def test_pngs_and_numbers_are_small_and_bare(drawn):
    out, png, _, _ = drawn
    names = {"exercises", "benchmarks", "paper", "compute", "loss", "robustness", "library",
             "pruning", "diversity"}  # fmt: skip
    assert {p.stem for p in png.glob("*.png")} == names
    for path in png.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sum(p.stat().st_size for p in png.iterdir()) < 400_000
    text = (png / "ladder.json").read_text()
    assert len(text) < 100_000
    assert str(out) not in text
    assert text == (out / "ladder.json").read_text()
    rungs = {r["name"]: r for r in json.loads(text)["rungs"]}
    assert len(rungs) == 18
    result = json.loads((out / "rungs/raw-large-s0/heldout/results.json").read_text())
    assert rungs["raw-large-s0"]["scores"]["heldout"]["pass@1"] == pytest.approx(result["pass@1"])
    assert "mbpp" not in rungs["raw-large-s0"]["scores"]


def test_the_same_drawing_twice_has_the_same_bytes(drawn, tmp_path):
    out, png, _, _ = drawn
    ladder_page.write(out, tmp_path / "again.html", tmp_path)
    for path in png.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_seeds_are_averaged_and_the_interval_is_over_problems(drawn, ladder):
    seeds = [
        json.loads((drawn[0] / f"rungs/exercises-small-s{s}/heldout/results.json").read_text())
        for s in (0, 1)
    ]
    found = ladder.scores("heldout")["exercises", "small"]
    assert found["seeds"] == [100 * r["pass@1"] for r in seeds]
    assert found["value"] == pytest.approx(sum(found["seeds"]) / 2)
    assert found["low"] < found["value"] < found["high"]
    alone = ladder.scores("heldout")["raw", "large"]  # of one seed: the evaluation's own interval
    result = json.loads((drawn[0] / "rungs/raw-large-s0/heldout/results.json").read_text())
    assert [alone["low"], alone["high"]] == pytest.approx([100 * x for x in result["ci95"]])


def test_gain_is_problem_by_problem(drawn, ladder):
    def solved(name):
        lines = (drawn[0] / "rungs" / name / "heldout" / "samples.jsonl").read_text().splitlines()
        return [json.loads(line)["passed"] for line in lines]

    a, b = solved("textbooks-large-s0"), solved("exercises-large-s0")
    found = reading.gain(ladder, ("textbooks", "large"), ("exercises", "large"), "heldout")
    assert found["gain"] == pytest.approx((sum(b) - sum(a)) / 40)
    assert found["ci95"][0] < found["gain"] < found["ci95"][1]
    assert found["problems"] == 40
    assert reading.gain(ladder, ("raw", "large"), ("exercises", "large"), "mbpp") is None
    compared = reading.comparisons(ladder)
    assert ("size", ("raw", "large"), ("exercises", "small")) in compared
    assert not any("damaged" in b and "large" in b for _, _, b in compared)


def test_pruning_splits_scores_at_its_own_tau(drawn, tmp_path):
    shutil.copytree(drawn[0], tmp_path / "copy")
    report = tmp_path / "copy" / "data" / "decontaminate_80" / "report" / "problems.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    write_lines(report, (line | {"close": line["close"] | {"0.95": 0}} for line in lines))
    ladder = reading.read_ladder(tmp_path / "copy")
    rows = {(r["size"], r["set"], r["tau"]): r for r in reading.pruning(ladder)}
    assert len(rows) == 2 * 2 * 2  # of MBPP there are no scores, of unseen exercises no report
    row = rows["small", "heldout", 0.8]
    summary = json.loads((drawn[0] / "data/decontaminate_80/summary.json").read_text())
    assert (row["removed"], row["of"]) == (summary["removed"], 60)
    n = [row["exercises"][k]["problems"] for k in ("similar", "other", "total")]
    assert n == [20, 20, 40]
    similar, other, total = (row["exercises"][k]["pass@1"] for k in ("similar", "other", "total"))
    assert (similar + other) / 2 == pytest.approx(total)
    assert total == pytest.approx(ladder.scores("heldout")["exercises", "small"]["value"] / 100)
    pruned = row["pruned"]["total"]["pass@1"]
    assert pruned == pytest.approx(ladder.scores("heldout")["pruned80", "small"]["value"] / 100)


def test_lineage_follows_the_content(drawn):
    data = drawn[0] / "data"
    before = {row["data"]: row["content"] for row in reading.data_lineage(data)}
    assert {"decontaminate_95", "diversity", "filtered"} <= before.keys()
    path = data / "filtered" / "samples" / "kept.jsonl"
    text = path.read_text()
    path.write_text(text.replace("1", "2"))
    after = {row["data"]: row["content"] for row in reading.data_lineage(data)}
    path.write_text(text)
    assert {name for name in before if before[name] != after[name]} == {"filtered"}


def test_what_did_not_work():
    log = """# Log
## Today: a thing that worked
good
## Today: what did not work
first
### details
second
```
# no heading
## nor this
```
## Yesterday
bad
### What DID NOT work either
third
### more
fourth
"""
    found = reading.did_not_work(log)
    for word in ("first", "details", "second", "# no heading", "## nor this", "third"):
        assert word in found
    for word in ("good", "bad", "fourth", "Yesterday"):
        assert word not in found
    assert reading.did_not_work("# Log\nit did not work\n") == ""


def test_one_finished_rung_is_enough(tmp_path):
    write_rung(tmp_path, "raw", "small", 0, 0.5, {**FEW, "unseen": 0, "HumanEval": 0})
    for name in ("bits.json", "library.json"):
        (tmp_path / "rungs" / "raw-small-s0" / name).unlink()
    ladder_page.write(tmp_path, tmp_path / "report.html", None)
    page = (tmp_path / "report.html").read_text()
    assert page.count("Not run: nothing of this is there.") >= 4
    assert "HumanEval, MBPP." in page
    assert not list(tmp_path.glob("*.png"))


def test_errors(cli, tmp_path):
    done = cli("-m", "tools.report", "--ladder", tmp_path / "none")
    assert done.returncode == 2
    assert "no finished rung with a score in rungs/; run" in done.stderr
    assert "Traceback" not in done.stderr
    write_rung(tmp_path, "raw", "small", 0, 0.5, FEW)
    (tmp_path / "rungs" / "raw-small-s0" / "bits.json").write_text("{")
    with pytest.raises(UserError, match=r"bits\.json: no JSON"):
        reading.read_ladder(tmp_path)
