"""Read a byte-level BPE from a tokenizer.json: what GPT-2, CodeGen and the released phi-1 use.

SentencePiece cannot load one; the `tokenizers` library, an extra, can.
"""

from pathlib import Path

from common.config import UserError

# A tokenizer that gives this back normalises nothing, drops no space and knows every byte.
PROBE = "\n    def é(e\u0301):\r\n\t\treturn  '漢😀\u2581\ufeff\0' <0x41> <unk> \u00a0\u2028 "


class ByteLevelBPE:
    """Text to token ids and back, by a tokenizer.json that loses nothing."""

    def __init__(self, path: Path, end_of_text: str):
        """Load `path`. Raises UserError where it loses text or has no token `end_of_text`."""
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path} needs tokenizers, an extra: pip install tokenizers") from None
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises nothing more special
            raise UserError(f"{path} is not a tokenizer.json: {e}") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # text that has "<|endoftext|>" does not end there
        self.end_of_text = self._model.token_to_id(end_of_text)
        if self.end_of_text is None:
            raise UserError(f"{path} has no {end_of_text} token")
        self.vocab_size = max(self._model.get_vocab().values()) + 1
        self.start = self._model.encode("").ids  # what its post-processor puts before a text
        if self.decode(self.encode([PROBE])[0]) != PROBE:
            raise UserError(f"{path} does not give back the text it encodes; want a byte-level BPE")

    def encode(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Return the ids of each text; the library takes as many threads as it likes."""
        return [e.ids for e in self._model.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)
