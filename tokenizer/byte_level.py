"""Load a byte-level BPE from a tokenizer.json, as used by GPT-2, CodeGen and the released phi-1.

SentencePiece cannot load these; the optional `tokenizers` library can.
"""

from pathlib import Path

from common.config import UserError

# A tokenizer that round-trips this normalises nothing, drops no space and has every byte.
PROBE = "\n    def é(e\u0301):\r\n\t\treturn  '漢😀\u2581\ufeff\0' <0x41> <unk> \u00a0\u2028 "


class ByteLevelBPE:
    """Text to token ids and back, with a lossless tokenizer.json."""

    def __init__(self, path: Path, end_of_text: str):
        """Load `path`. Raises UserError if it loses text or has no `end_of_text` token."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs tokenizers, an extra: pip install tokenizers") from None
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises no narrower type
            raise UserError(f"{path} is not a tokenizer.json: {e}") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self.end_of_text = self._model.token_to_id(end_of_text)
        if self.end_of_text is None:
            raise UserError(f"{path} has no {end_of_text} token")
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.start = self._model.encode("").ids  # prefix added by its post-processor
        if self.decode(self.encode([PROBE])[0]) != PROBE:
            raise UserError(f"{path} does not round-trip text; want a byte-level BPE")

    def encode(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text. The library ignores `threads` and picks its own number."""
        return [e.ids for e in self._model.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)
