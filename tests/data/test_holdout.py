import json

import pytest

from common.config import UserError
from data.base.documents import ShardWriter, document
from data.base.readers import read_documents
from experiments.holdout import Config, choose, holdout


def test_packages_go_to_one_side_as_a_whole(tmp_path):
    source = tmp_path / "raw"
    source.mkdir()
    with ShardWriter(source, shard_bytes=2000) as writer:  # several shards
        for package in range(60):
            for file in range(1 + package % 4):
                text = f"x = {package}\n" + "y = 1\n" * (50 if package else 5000)
                writer.write(document(text + f"z = {file}\n", f"site:{package}/{file}.py"))
    sides = {}
    for keep in ("rest", "heldout"):
        out = tmp_path / keep
        summary = holdout(Config((source,), out, heldout_mb=0.005, keep=keep))
        found = list(read_documents([out]))
        assert summary["documents"] == len(found)
        assert summary == json.loads((out / "summary.json").read_text())
        sides[keep] = {d["origin"].split("/")[0] for d in found}
    assert not sides["rest"] & sides["heldout"]
    assert len(sides["rest"] | sides["heldout"]) == 60
    assert sorted(sides["heldout"]) == summary["heldout_packages"]
    assert 5000 <= summary["bytes"] < 5000 * 1.2
    assert "site:0" in sides["rest"]  # too large


def test_more_is_a_superset():
    sizes = {f"p{i}": 10 for i in range(200)}
    assert choose(sizes, 500) < choose(sizes, 1000)
    assert len(choose(sizes, 500)) == 50


@pytest.mark.parametrize(("options", "message"), [
    ({"keep": "both"}, "--keep 'both'"), ({"heldout_mb": 0}, "cannot split"),
])  # fmt: skip
def test_what_cannot_be(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        holdout(Config((corpus,), tmp_path / "out", **options))
