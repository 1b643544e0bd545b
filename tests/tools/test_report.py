import json
import re

import pytest

from common.config import UserError
from tools import curves


@pytest.fixture
def two_runs(tmp_path):
    folders = []
    for i, name in enumerate(("slow", "fast <&>")):
        folder = tmp_path / name
        folder.mkdir()
        folders.append(folder)
        config = {"lr": 0.1 * (i + 1), "width": 32, "commit": "abc"}
        (folder / "config.json").write_text(json.dumps(config))
        status = {"status": "done", "step": 30, "max_steps": 30}
        (folder / "status.json").write_text(json.dumps(status))
        lines = [
            {"step": s, "tokens": 100 * s, "loss": 5 / (s + i), "lr": 0.1, "grad_norm": 1.5,
             "tokens_per_s": 1000.0, "mfu": 0.25, "loader_wait_frac": 0.01, "memory_gib": 2.0,
             "skipped": 0, "seconds": 3.0}
            for s in (10, 20, 30)
        ]  # fmt: skip
        del lines[1]["loss"]  # every step of that line was skipped
        lines.insert(2, {"step": 20, "tokens": 2000, "val_loss": 0.3125})
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "lo'
        (folder / "metrics.jsonl").write_text(text)
        event = {"time": "T", "event": "skipped", "step": 20, "message": "1 step & more"}
        (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    return folders


def test_page_of_two_runs(two_runs):
    page = curves.runs_page(two_runs)
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page)  # self-contained
    for _, label, _, _ in curves.ROWS:
        assert label in page
    assert page.count("done, step 30") == 2
    assert "0.3125" in page
    assert "<td>lr</td><td>0.1</td><td>0.2</td>" in page  # differs; width does not
    assert "<td>width</td>" not in page
    assert "1 step &amp; more" in page
    assert "fast <&>" not in page.replace("fast &lt;&amp;&gt;", "")


def test_command(cli, two_runs):
    done = cli("-m", "tools.report", *two_runs)
    assert done.returncode == 0, done.stderr
    assert (two_runs[0] / "curves.html").exists()


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is no run: it has no config"):
        curves.runs_page([tmp_path])
