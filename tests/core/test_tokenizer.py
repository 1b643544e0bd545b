import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import UserError
from tokenizer import END_OF_TEXT, Tokenizer, train

AWKWARD = [" ", "    ", "\t", "\r\n", "\r", "\n\n\n", "\0", "\u2581", "\u2028", "\ufeff", "é", "漢",
           "😀", END_OF_TEXT, "<0x41>", "<unk>", "<s>", "def f(x):\n", "e\u0301"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokens):
    return Tokenizer(tokens)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from(AWKWARD) | st.text(max_size=20)).map("".join))
def test_round_trip_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.end_of_text, *ids]) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_batch_equals_one_by_one(tokenizer):
    for texts in (["a  b", "def f():\n"], ["a\u2581b", "\u2581", ""], []):
        assert tokenizer.encode_batch(texts, 2) == [tokenizer.encode(t) for t in texts]


def test_the_same_documents_give_the_same_bytes(in_process, corpus, tokenizer, tmp_path):
    args = ["--source", corpus, "--vocab_size", 512, "--out", tmp_path / "again"]
    assert in_process(train.main, *args)[0] == 0
    model = (tmp_path / "again" / "tokenizer.model").read_bytes()
    assert model == tokenizer.path.read_bytes()
    assert str(tmp_path).encode() not in model


def test_fingerprint_follows_the_model(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    model = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model + b"\x22\x00")  # an empty unknown field
    assert Tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


def test_clear_errors(tokenizer, tmp_path):
    with pytest.raises(UserError, match="lone surrogates"):
        tokenizer.encode("a\ud800")
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(100, "want 512 to 65536"), (30000, "lower --vocab_size")]
)
def test_vocab_size_that_cannot_be(in_process, corpus, tmp_path, vocab_size, message):
    arguments = "--source", corpus, "--out", tmp_path / "tok", "--vocab_size", vocab_size
    status, _, stderr = in_process(train.main, *arguments)
    assert status == 2
    assert message in stderr
    assert not (tmp_path / "tok").exists()
