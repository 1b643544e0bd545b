"""Test the report pages of runs, a demo and a ladder, on made-up results."""

import dataclasses
import json
import re
import sys

import pytest

from common.config import UserError
from eval.scores import score
from tools import report
from train import TrainConfig


def write(path, *rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))


def write_run(folder, data: str, steps: int, init="", width=32, **config) -> None:
    """Write the files of a finished run with loss 5 / step."""
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
    del lines[1]["loss"]  # every step of this interval was skipped
    write(folder / "metrics.jsonl", *lines, {"step": steps, "val_loss": 0.3125})
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "lo')  # cut short by a kill
    event = {"time": "T", "event": "skipped", "step": 20, "message": "1 step & more"}
    write(folder / "events.jsonl", event)


def write_scores(folder, solved: int, of: int) -> None:
    """Write an evaluation of `of` problems; the first `solved` pass."""
    passed = {f"<{folder.name}>/{i}": [i < solved] for i in range(of)}
    write(folder / "results.json", score(passed))
    said = {"completion": "    return <x>\n", "detail": "E & F"}
    rows = ({"task_id": t, "passed": p[0], **said} for t, p in passed.items())
    write(folder / "samples.jsonl", *rows)


def write_bar(out, rung: str, size: str, seed: int, solved: int) -> None:
    name, width = f"{rung}-{size}-s{seed}", {"small": 32, "large": 64}[size]
    base = f"base-{size}-s{seed}" if rung != "textbooks" else ""
    if base and not (out / "runs" / base).exists():
        write_run(out / "runs" / base, "textbooks", 30, width=width)
    write_run(out / "runs" / name, rung, 60, base, width=width)
    write_scores((folder := out / "rungs" / name) / "heldout", solved, 40)
    write(folder / "gold/documents.json", {"bits_per_byte": 2.25, "ci95": [2.0, 2.5]})
    bits = 1 if rung == "exercises" else 2  # a byte
    tasks = {f"t/{i}": [bits * (100 + i), 100 + i, 0.75 if i else None] for i in range(9)}
    gold = {"bits_per_byte": bits, "ci95": [bits - 0.5, bits + 0.5], "tasks": tasks}
    write(folder / "gold" / "mbpp.json", {**gold, "preferred": 0.75, "preferred_ci95": [0.5, 1]})
    write(folder / "gold" / "humaneval.json", {**gold, "preferred": None})  # no mutants


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


def test_page_of_a_ladder(command, tmp_path):
    ladder, out, png = tmp_path / "ladder", tmp_path / "page.html", tmp_path / "png"
    for bar in (("exercises", "small", 0, 20), ("exercises", "large", 0, 28),
                ("textbooks", "small", 0, 0), ("exercises", "small", 1, 10),
                ("pruned80", "small", 0, 5)):  # fmt: skip
        write_bar(ladder, *bar)
    (ladder / "rungs" / "pairs-small-s0").mkdir()  # not finished
    mixed = [{"share": 0.5, "tokens": 1000}, {"share": 0.5, "tokens": 6000}]
    write(ladder / "data/tokens/pruned80/summary.json", {"train_tokens": 7000, "mixture": mixed})
    write(ladder / "data/tokens/exercises/summary.json", {"train_tokens": 3000})
    write(ladder / "best/humaneval/results.json", {"pass_at": {"1": 0.5}, "fit": {"a": 1, "b": 1}})
    rows = ({"task_id": f"<heldout>/{i}", "prompt": f"def f{i}():\n"} for i in range(40))
    write(ladder / "data/exercises/heldout.jsonl", *rows)
    command("--ladder", ladder, "--best", ladder / "best", "--png", png, "--out", out)
    page = out.read_text()
    assert stands_alone(page)
    assert str(ladder) not in page
    figures = {p.stem for p in png.glob("*.png")}
    assert figures == {"headline", "gold", "steps", "mutants", "exercises", "passk"}
    assert page.count("<svg") == len(figures)
    assert sum(p.stat().st_size for p in png.iterdir()) < 300_000
    for word in ("0.00M textbooks + 0.01M exercises", "70.0 (54.6 - 81.9)", "37.5 (25.0 - 50.0)",
                 "3.00 + 0.50", "-1.000 (-1.000 to -1.000) not resolved", "not solved: E &amp; F",
                 "return &lt;x&gt;", "abc&lt;1&gt;", "exercises-large-s0; comp"):  # fmt: skip
        assert word in page, word
    assert "pairs" not in page[: page.index("does <b>not</b>")]
    told = json.loads((png / "ladder.json").read_text())
    names = ["textbooks-small-s0", "exercises-small-s0", "exercises-small-s1", "exercises-large-s0"]
    assert [m["name"] for m in told["rungs"]] == [*names, "pruned80-small-s0"]
    large = told["rungs"][3]
    assert large["scores"]["heldout"] + large["epochs"] == [70, 54.57, 81.925, 2]
    assert [*large["tokens"], large["train_s"]] == [["textbooks", 3000], ["exercises", 6000], 5]
    steps = [(x["step"], x["value"], x["verdict"]) for x in told["steps"]]
    found = [("textbooks → exercises", -1), ("exercises → pruned80", 1)]  # of one seed
    gold = [(*step, "not resolved") for step in found]
    assert steps == [*gold, *gold, *((step, 0, "not resolved") for step, _ in found)]


def test_page_of_a_demo(command, tmp_path, capsys):
    for name, solved in (("pairs", 0), ("exercises", 3)):
        write_run(tmp_path / "runs" / name, name, 60, "base")
        write_scores(tmp_path / "eval" / name, solved, 4)
    write_run(tmp_path / "runs" / "base", "filtered", 30)
    command("--demo", tmp_path)
    assert stands_alone((tmp_path / "report.html").read_text())
    said = capsys.readouterr().out
    row = r"^exercises +0.00M filtered \+ 0.01M exercises +75.0 \(30.1 - 95.4\)"
    assert re.search(row, said, re.MULTILINE)
    assert said.index("\nexercises") < said.index("\npairs cut")


def test_nothing_to_report(command, tmp_path):
    for flag in ("--ladder", "--demo"):
        with pytest.raises(UserError, match="no finished run with a score; run make train"):
            command(flag, tmp_path)
    write_bar(tmp_path, "raw", "small", 0, 0)
    with pytest.raises(UserError, match=r"no humaneval/results\.json with several"):
        command("--ladder", tmp_path, "--best", tmp_path)
    with pytest.raises(UserError, match="is not a run folder: it has no config"):
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
    assert "<td>width</td>" not in page  # same in both
    assert "step 20 skipped 1 step &amp; more" in page
    assert "fast <&>" not in page
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text("{}")
    command(tmp_path / "begun")  # a run that has logged no step
