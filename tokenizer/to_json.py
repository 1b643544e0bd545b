"""Convert our SentencePiece BPE to a Hugging Face `tokenizers` tokenizer.json with the same ids.

SentencePiece ranks a merge by the score of the resulting piece, `tokenizers` by the rank of the
merged pair. Several pairs can form one piece ("ab" + "a" and "a" + "ba"), but only one ever occurs:
until the piece is formed, no merge crosses its ends, so its text merges as it would alone. Any
ranks that preserve the order of piece scores are therefore equivalent.

Spaces stay spaces in the JSON, and U+2581 falls back to its bytes like any unknown character.
"""

from tokenizer import END_OF_TEXT, SPACE_MARK, Tokenizer
from tokenizer.byte_level import ByteLevelBPE

UNKNOWN_TEXT = " \u2047 "  # SentencePiece decodes its unknown piece to this


def to_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json that encodes and decodes like `tokenizer`.

    Exception: next to broken UTF-8, `tokenizers` also loses whole characters.
    """
    if isinstance(tokenizer.backend, ByteLevelBPE):
        return tokenizer.path.read_text(encoding="utf-8")
    from tokenizers import AddedToken, Regex, decoders, models, processors
    from tokenizers import Tokenizer as Fast

    model = tokenizer.backend.model
    names = [model.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(model.vocab_size())]
    vocab = {name: i for i, name in enumerate(names)}
    fast = Fast(models.BPE(vocab, merges(model, names), byte_fallback=True))
    fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    unknown = decoders.Replace(Regex(f"^{names[model.unk_id()]}$"), UNKNOWN_TEXT)
    fast.decoder = decoders.Sequence([unknown, decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",  # prefix prompts like documents in training
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT}:1 $B:1",
        special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)],
    )
    return fast.to_str(pretty=True)


def merges(model, names: list[str]) -> list[tuple[str, str]]:
    """Return all pairs that form a piece of a SentencePiece BPE, by descending piece score."""
    special = model.is_control, model.is_unknown, model.is_byte
    learned = [i for i in range(model.vocab_size()) if not any(of(i) for of in special)]
    known = {names[i] for i in learned}
    pairs = []
    for i in sorted(learned, key=model.get_score, reverse=True):
        cuts = ((names[i][:n], names[i][n:]) for n in range(1, len(names[i])))
        pairs += [pair for pair in cuts if known.issuperset(pair)]
    return pairs
