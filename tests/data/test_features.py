import numpy as np
import pytest

from data.base.features import Lexical

TEXTS = ["def is_even(n): return n", "def isEven(n): return n", "class Tree: pass" * 9, ""]


def test_lexical_distance():
    lexical = Lexical([TEXTS[0], TEXTS[2]])
    distances = lexical.distances(TEXTS)
    assert distances[[0, 1], 0] == pytest.approx([0, 0], abs=1e-3)
    assert distances[[2, 3], 0] == pytest.approx([2**0.5] * 2, abs=1e-3)
    more = lexical.distances(["def is_even(n): return n, elephant", "def even(k): elephant"])
    assert 0 < more[0, 0] < more[1, 0] < 2**0.5
    assert more.dtype == np.float32
