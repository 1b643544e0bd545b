"""Our SentencePiece BPE as a tokenizer.json of Hugging Face's `tokenizers`, with the same ids.

Both merge neighbouring pieces until none can be merged. They differ in what ranks a merge:

    SentencePiece  the score of the piece it makes; of equal ones, the leftmost
    tokenizers     the rank of the pair of pieces it joins; of equal ones, the leftmost

so a piece that several pairs make ("ab" + "a" and "a" + "ba" both make "aba") has one score there
and several ranks here. Yet only one of those pairs ever occurs: until a piece is made, no merge
reaches across its ends, so its text is merged as it would be alone, and that ends with one certain
pair. Any ranks will do, then, that keep the order of the pieces' scores.

U+2581, which SentencePiece puts for a space and our Tokenizer keeps from it, is no piece in the
JSON: spaces stay spaces, and U+2581 falls back to its bytes like any unknown character.
"""

import json

from common.config import UserError
from tokenizer import END_OF_TEXT, SPACE_MARK, Tokenizer
from tokenizer.byte_level import PROBE, ByteLevelBPE

UNKNOWN_TEXT = " \u2047 "  # what SentencePiece decodes its unknown piece to


def to_json(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that encodes and decodes as `tokenizer` does.

    Broken UTF-8 is the one difference: both decode it to U+FFFD, but tokenizers also gives up the
    whole characters written in bytes next to it. Raises UserError if the ids are not the same,
    which is so for SentencePiece models that tokenizer.train does not make.
    """
    if isinstance(tokenizer.backend, ByteLevelBPE):
        return tokenizer.path.read_text(encoding="utf-8")
    model = tokenizer.backend.model
    names = [model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.vocab_size())]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": tokenizer.end_of_text, "content": END_OF_TEXT, **special, "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {  # a prompt follows an end of text, as every document in training
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": END_OF_TEXT, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {
                END_OF_TEXT: {
                    "id": END_OF_TEXT,
                    "ids": [tokenizer.end_of_text],
                    "tokens": [END_OF_TEXT],
                }
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {
                    "type": "Replace",
                    "pattern": {"Regex": f"^{names[model.unk_id()]}$"},
                    "content": UNKNOWN_TEXT,
                },
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # bytes stand for what is no piece
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": merges(model, names),
        },
    }
    text = json.dumps(value, ensure_ascii=False, indent=1)
    _check(tokenizer, text)
    return text


def merges(model, names: list[str]) -> list[tuple[str, str]]:
    """Every pair that makes a piece of a SentencePiece BPE, in the order of the pieces' scores."""
    learned = [
        i
        for i in range(model.vocab_size())
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))
    ]
    known = {names[i] for i in learned}
    pairs = []
    for i in sorted(learned, key=model.get_score, reverse=True):
        cuts = ((names[i][:n], names[i][n:]) for n in range(1, len(names[i])))
        pairs += [pair for pair in cuts if known.issuperset(pair)]
    return pairs


def _check(tokenizer: Tokenizer, text: str) -> None:
    """Raises UserError unless the tokenizer.json `text` gives the ids of `tokenizer`."""
    from_json = ByteLevelBPE(tokenizer.path, END_OF_TEXT, text)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    texts = [*pieces, "".join(pieces), "".join(reversed(pieces)), PROBE]
    for given, want, got in zip(texts, tokenizer.encode_batch(texts), from_json.encode(texts)):
        if want != got:
            raise UserError(
                f"{tokenizer.path} cannot be written as a tokenizer.json: {given!r:.60} has the "
                f"ids {want} there and {got} here; want a BPE made by tokenizer.train"
            )
