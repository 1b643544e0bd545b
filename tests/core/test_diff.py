from pathlib import Path

from common.config import parse
from diff import comments, show_differences
from train import TrainConfig


def test_what_differs_and_why(tmp_path, capsys):
    one, two = tmp_path / "a.toml", tmp_path / "b.toml"
    one.write_text('lr = 1e-3\nseed = 7  # a reason of the first\nout = "x#y"  # not a comment\n')
    two.write_text("lr = 2e-3  # twice as fast,\n           # and more\n# of nothing\nseed = 7\n")
    show_differences(TrainConfig, [str(one), str(two)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["out", "x#y", "out/run"], ["lr", "0.001", "0.002"]]  # fmt: skip
    assert lines[2].endswith("twice as fast, and more")
    assert "seed" not in comments(two)


def test_every_departure_of_the_modern_preset_has_a_reason():
    for name in ("phi1", "phi1_base"):
        files = [f"configs/{name}.toml", f"configs/{name}_modern.toml"]
        paper, modern = (parse(TrainConfig, [f], toml=True) for f in files)
        reasons = comments(Path(files[1]))
        for key, value in vars(paper).items():
            if getattr(modern, key) != value:
                assert reasons.get(key), f"{key} differs without a reason"


def test_the_papers_recipe():
    c = parse(TrainConfig, ["configs/phi1.toml"], toml=True)
    assert (c.dtype, c.dropout, c.doc_mask, c.rewinds) == ("float16", 0.1, False, 0)
    assert (c.max_steps, c.seqs_per_step, c.seq_len, c.lr) == (6000, 256, 2048, 1e-4)
    modern = parse(TrainConfig, ["configs/phi1_modern.toml"], toml=True)
    assert (modern.dtype, modern.dropout) == ("bfloat16", 0.0)
