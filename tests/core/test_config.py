import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import train
from common.config import UserError, _comments, differences, parse, run

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Example:
    """An example command."""

    out: Path  # folder to write
    lr: float = 0.5  # rate, 10% of something
    # and more about it
    steps: int = 3  # steps
    fast: bool = False  # be fast
    source: tuple[Path, ...] = ()  # sources
    init: Path | None = None  # start

    # A heading, no help text.
    name: str = "x"  # a name


def test_flags_in_every_spelling():
    c = parse(
        Example,
        ["--out", "a", "--lr=2", "--steps", "1_000", "--fast", "--source", "p", "--source=q"],
    )
    assert c == Example(Path("a"), 2.0, 1000, True, (Path("p"), Path("q")))
    assert isinstance(c.lr, float)
    assert parse(Example, ["--out", "a", "--fast=false"]).fast is False
    assert parse(train.TrainConfig, ["--max-steps=7"]).max_steps == 7


def test_toml_then_flags(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('out = "a"\nlr = 1\nfast = true\nsource = ["p"]\n')
    c = parse(Example, [str(file), "--lr=3"], toml=True)
    assert c == Example(Path("a"), 3.0, fast=True, source=(Path("p"),))
    assert differences(c) == {"out": Path("a"), "lr": 3.0, "fast": True, "source": (Path("p"),)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--out a --stepz=3", "unknown argument '--stepz', did you mean '--steps'"),
        ("--out a --steps=1.5", "--steps: got '1.5', want int"),
        ("--out a --fast=1", "--fast: got '1', want true|false"),
        ("--out a --lr", "--lr: expected one argument"),
        ("--out a stray", "unknown argument 'stray'"),
        ("--out a c.toml", "c.toml must be the first argument"),
        ("nowhere.toml", "cannot read config nowhere.toml"),
        ("--lr=1", "missing required option --out"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises(UserError) as e:
        parse(Example, argv.split(), toml=True)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", "unknown key 'stepz', did you mean 'steps'"),
        ("steps = true", "steps: got True, want int"),
        ("steps = '3", "not valid TOML"),
        ("fast = 1", "fast: got 1, want true|false"),
        ("out = 3", "out: got 3, want path"),
    ],
)
def test_bad_toml(tmp_path, text, message):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        parse(Example, [str(file), "--out=a"], toml=True)
    assert message in str(e.value)
    assert str(file) in str(e.value)


def test_help_comes_from_the_comments(capsys):
    with pytest.raises(SystemExit) as e:
        parse(Example, ["--help"])
    assert e.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rate, 10% of something and more about it (default: 0.5)" in text
    assert "folder to write (required)" in text
    assert "a name (default: x)" in text
    assert "A heading" not in text


CONFIGS = sorted([*(ROOT / "configs").glob("*.toml"), *(ROOT / "experiments").rglob("*.toml")])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: "/".join(p.parts[-2:]))
def test_every_config_file_loads(path):
    c = parse(train.TrainConfig, [str(path)], toml=True)
    assert c.seqs_per_step % c.micro_batch == 0


def test_every_field_is_read_and_has_help():
    source = "".join((ROOT / f).read_text() for f in ("train.py", "model.py", "common/runlog.py"))
    comments = _comments(train.TrainConfig)
    for name in train.TrainConfig.__dataclass_fields__:
        assert f"c.{name}" in source or f'"{name}"' in source, f"nothing reads {name}"
        assert comments[name]


def test_a_reader_that_has_enough_ends_a_command_in_silence():
    program = "from common.config import run; run(lambda: [print(i) for i in range(10**5)])"
    ran = subprocess.run(["bash", "-c", f'{sys.executable} -c "{program}" | head -1'],
                         cwd=ROOT, capture_output=True, text=True, timeout=60)  # fmt: skip
    assert (ran.stdout, ran.stderr) == ("0\n", "")


def test_another_broken_pipe_is_no_silent_end():
    def main():
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        run(main)


@pytest.mark.parametrize(
    ("action", "told"),
    [
        (lambda p: (p / "file" / "x").mkdir(), "file/x: Not a directory; use another path"),
        (lambda p: Path("/dev/full").write_text("x"), "No space left on device; free some space"),
    ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, capsys, action, told):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        run(lambda: action(tmp_path))
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    c = parse(Example, ["--out=~/x", "--source=~/y"])
    assert (c.out, c.source) == (Path("/home/ada/x"), (Path("/home/ada/y"),))
    with pytest.raises(UserError, match="want path"):
        parse(Example, ["--out=~nobody-of-this-name/x"])


def test_error_is_one_line_and_status_2(in_process):
    status, _, error = in_process(train.main, ROOT / "configs/demo.toml", "--max_stepz=3")
    assert (status, error) == (2, "error: unknown argument '--max_stepz', did you mean "
                               "'--max_steps'?; --help lists the options\n")  # fmt: skip
