"""Test damage.py: the requested share of solutions is wrong but ends; nothing else changes."""

import random
from dataclasses import replace

import pytest

from data.exercises import check, key
from data.synthetic.damage import damage, damaged_bodies, is_wrong
from data.synthetic.families import FAMILIES
from data.synthetic.forms import POOL, pool, results, tell

TASKS = [task for tasks in FAMILIES.values() for task in tasks]


@pytest.fixture(scope="module")
def train():
    return [tell(t, random.Random(i)) for i, t in enumerate(random.Random(0).sample(TASKS, 120))]


def test_damage_is_what_was_asked_and_allowed_and_wrong(train):
    anything = lambda task, wrong: True  # noqa: E731
    damaged = damage(train, 0.5, 0, anything)
    changed = [(a, b) for a, b in zip(train, damaged, strict=True) if a != b]
    assert len(changed) == len(train) // 2
    for a, b in changed:
        assert b.prompt() == a.prompt()
        assert replace(b, wrong="") == a
        with pytest.raises((AssertionError, Exception)):
            check(b, results(b.task), range(POOL))
    assert damage(train, 0.5, 0, anything) == damaged
    keys = {key(e.task, e.wrong) for e in damaged}
    others = damage(train, 0.5, 0, lambda task, wrong: key(task, wrong) not in keys)
    assert any(e.wrong for e in others)
    assert not keys & {key(e.task, e.wrong) for e in others if e.wrong}


def test_the_errors_that_damage_makes():
    body = "best = 0\nfor x in $a:\n    if x > 3 and x != 7:\n        best = max(best, x)\n"
    body += "return best"
    changes = """x > 3 => x >= 3; x > 3 => x < 3; x > 3 => x > 4; x > 3 and x != 7 => x > 3;
        x > 3 and x != 7 => x != 7; and => or; max( => min(; best = 0 => best = 1;
        return best => best; return best =>     return best"""
    for old, new in (change.strip().split(" => ") for change in changes.split(";")):
        assert body.replace(old, new) in damaged_bodies(body), new
    swapped = damaged_bodies("if $a > 1:\n    return 5\nelse:\n    return 6")
    assert "if $a > 1:\n    return 6\nelse:\n    return 5" in swapped
    assert "return [x for x in $a]" in damaged_bodies("return [x for x in $a if x > 2]")
    assert 'return 6 if $a else "ab"' in damaged_bodies('return "ab" if $a else 6')


def test_a_body_that_never_ends_or_fails_or_is_right_is_no_damage():
    task = FAMILIES["clamp"][0]
    assert is_wrong(task, "return $a")
    assert not is_wrong(task, task.body)
    assert not is_wrong(task, "while True:\n    pass")
    assert not is_wrong(task, "$a = 2\nwhile True:\n    $a *= $a")
    assert not is_wrong(task, "return $a + 'x'")
    # Python drops a trace function that fails, here at the recursion limit
    recurs = f"if $a == {pool(task.args)[0][0]}:\n    return $f($a)\n"
    assert is_wrong(task, recurs)
    assert not is_wrong(task, recurs + "for _ in range(30_000):\n    pass")
    # and ignores exceptions raised on closing a generator.
    for lines in range(12):  # the budget ends at another place in the loop
        loop = "for _ in range(30_000):\n    any(x for x in (0, 1, 2))\n"
        assert not is_wrong(task, "x = 0\n" * lines + loop), lines
