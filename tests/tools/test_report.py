"""The pages: of runs, of a demo, of a ladder whose results are made up here."""

import dataclasses
import json
import re
import sys

import pytest

from common.config import UserError
from eval.scores import score
from tools import report
from tools.report import Scores
from train import TrainConfig


def write(path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))


def write_run(folder, data: str, steps: int, init="", width=32, **config) -> None:
    """Write the files of a finished run, whose loss is 5 / step."""
    c = dataclasses.asdict(TrainConfig(
        out="out", data=f"elsewhere/tokens/{data}", init_from=init and f"elsewhere/runs/{init}",
        vocab_size=64, seq_len=16, n_layer=1, n_head=2, width=width, mlp_width=64,
        rotary_dim=4))  # fmt: skip
    c |= {"parameters": 1000 * width, "commit": "abc<1>", "torch": "2", "device": "cpu"} | config
    write(folder / "config.json", c)
    write(folder / "summary.json", {"tokens": 100 * steps, "trained_s": 2.5, "weights": "12ab"})
    write(folder / "status.json", {"status": "done", "step": steps})
    lines = [
        {"step": s, "tokens": 100 * s, "loss": 5 / s, "lr": 0.1, "grad_norm": 1.5, "mfu": 0.25,
         "tokens_per_s": 1000.0, "loader_wait_frac": 0.01, "memory_gib": 2.0, "seconds": 3.0}
        for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    del lines[1]["loss"]  # every step of that line was skipped
    write(folder / "metrics.jsonl", *lines, {"step": steps, "val_loss": 0.3125})
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "lo')  # cut short by a kill
    event = {"time": "T", "event": "skipped", "step": 20, "message": "1 step & more"}
    write(folder / "events.jsonl", event)


def write_scores(folder, solved: int, of: int, sets) -> None:
    """Write evaluations of `of` problems, of which the first `solved` are."""
    for name in sets:
        passed = {f"<{name}>/{i}": [i < solved] for i in range(of)}
        write(folder / name / "results.json", {"benchmark": name, **score(passed)})
        said = {"completion": "    return <x>\n", "detail": "E & F"}
        samples = ({"task_id": t, "passed": p[0], **said} for t, p in passed.items())
        write(folder / name / "samples.jsonl", *samples)


def write_bar(out, rung: str, size: str, seed: int, solved: int) -> None:
    name, width = f"{rung}-{size}-s{seed}", {"small": 32, "large": 64}[size]
    base = f"base-{size}-s{seed}" if rung not in ("raw", "base") else ""
    if base and not (out / "runs" / base).exists():
        write_run(out / "runs" / base, "textbooks", 30, width=width)
    write_run(out / "runs" / name, rung, 60, base, width=width)
    folder = out / "rungs" / name
    write_scores(folder, solved, 40, ["heldout", "humaneval"])
    write(folder / "bits.json", {"bits_per_byte": 2.25, "ci95": [2.0, 2.5]})
    if rung == "exercises":
        told = {"typos": {"drop": 0.25}, "quotes": {"problems": 0}}
        write(folder / "robustness" / "results.json", {"perturbations": told})


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ladder")
    for size, more in (("small", 0), ("large", 8)):
        write_bar(out, "exercises", size, 0, 20 + more)
    write_bar(out, "raw", "small", 0, 0)
    write_bar(out, "exercises", "small", 1, 10)
    write_bar(out, "pruned80", "small", 0, 5)
    (out / "rungs" / "pairs-small-s0").mkdir()  # not finished
    rows = [{"task_id": f"<heldout>/{i}", "prompt": f"def f{i}():\n"} for i in range(40)]
    write(out / "data" / "exercises" / "heldout.jsonl", *rows)
    return out


@pytest.fixture(scope="module")
def command():
    """command("--ladder", out, ...): run tools.report in this process."""

    def call(*words):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["tools.report", *map(str, words)])
            report.main()

    return call


def stands_alone(page: str) -> bool:
    return not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)|<script""", page)


def test_page_of_a_ladder(command, ladder, tmp_path):
    command("--ladder", ladder, "--png", tmp_path, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert stands_alone(page)
    assert str(ladder) not in page
    figures = {"exercises", "benchmarks", "code", "loss", "compute", "pruning"}
    assert {p.stem for p in tmp_path.glob("*.png")} == figures
    assert page.count("<svg") == len(figures)
    assert sum(p.stat().st_size for p in tmp_path.iterdir() if p.suffix != ".html") < 300_000
    for word in ("exercises-small-s1", "0.00M textbooks + 0.01M exercises", "70.0 (54.6 - 81.9)",
                 ">not run<", "phi-1", "not solved: E &amp; F", "return &lt;x&gt;",
                 "<td>typos</td><td class=n>25</td>", "abc&lt;1&gt;"):  # fmt: skip
        assert word in page, word
    assert "exercises-large-s0; completions in blue" in page
    assert "Problems: 40 heldout, 40 humaneval." in page
    assert "pairs-small-s0" not in page
    rungs = {r["name"]: r for r in json.loads((tmp_path / "ladder.json").read_text())}
    assert len(rungs) == 5
    told = rungs["exercises-large-s0"]
    result = json.loads((ladder / "rungs/exercises-large-s0/heldout/results.json").read_text())
    scores = [70, *(100 * x for x in result["ci95"])]
    assert told["scores"]["heldout"] == pytest.approx(scores, 1e-4)
    assert told["tokens"] == [["textbooks", 3000], ["exercises", 6000]]
    assert told["train_s"] == 5.0
    assert told["flops"] > 3 * rungs["raw-small-s0"]["flops"]  # more tokens, a larger model


def test_seeds_are_averaged(ladder):
    found = Scores(ladder, None)
    assert found.mean("heldout", "exercises", "small") == pytest.approx(100 * 15 / 40)
    assert [m.name for m in found.models][:2] == ["raw-small-s0", "exercises-small-s0"]
    assert found.models[-1].rung == "pruned80"


def test_page_of_a_demo(command, tmp_path, capsys):
    for name, solved in (("pairs", 0), ("exercises", 3)):
        write_run(tmp_path / "runs" / name, name, 60, "base")
        write_scores(tmp_path / "eval", solved, 4, [name])
    write_run(tmp_path / "runs" / "base", "filtered", 30)
    command("--demo", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert stands_alone(page)
    assert "then exercises" in page
    said = capsys.readouterr().out
    row = r"^then exercises +0.00M filtered \+ 0.01M exercises +75.0 \(30.1 - 95.4\)"
    assert re.search(row, said, re.MULTILINE)
    assert said.index("\nthen exercises") < said.index("\npairs cut")


def test_nothing_to_report(command, tmp_path):
    for flag in ("--ladder", "--demo"):
        with pytest.raises(UserError, match="no finished run with a score; see make train"):
            command(flag, tmp_path)
    with pytest.raises(UserError, match="is no run: it has no config"):
        command(tmp_path)


def test_page_of_two_runs(command, tmp_path):
    write_run(tmp_path / "slow", "raw", 30, lr=0.1)
    write_run(tmp_path / "fast <&>", "raw", 30, lr=0.2)
    command(tmp_path / "slow", tmp_path / "fast <&>")
    page = (tmp_path / "slow" / "curves.html").read_text()
    assert stands_alone(page)
    for title in report.CURVES.values():
        assert title in page
    assert page.count("done, step 30") == 2
    assert "0.3125" in page
    assert "<td>lr</td><td>0.1</td><td>0.2</td>" in page
    assert "<td>width</td>" not in page  # it is the same
    assert "step 20 skipped 1 step &amp; more" in page
    assert "fast <&>" not in page
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    command(tmp_path / "begun")  # it has not logged a step
