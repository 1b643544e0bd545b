"""The tokenizer: SentencePiece BPE with byte fallback that gives back every string exactly."""

import hashlib
import shutil
from pathlib import Path

import sentencepiece

from config import UserError

MODEL_FILE = "tokenizer.model"
END_OF_TEXT = "<|endoftext|>"
# SentencePiece stores a space as U+2581, so a literal U+2581 would come back as a space. It is kept
# from SentencePiece and written as its three UTF-8 bytes instead.
SPACE_MARK = "\u2581"


class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text` for every str UTF-8 can encode."""

    def __init__(self, path: Path):
        """Load `path`, a model file or the folder that holds `tokenizer.model`."""
        path = Path(path)
        self.path = path / MODEL_FILE if path.is_dir() else path
        try:
            model = self.path.read_bytes()
        except OSError as e:
            raise UserError(f"no tokenizer at {self.path} ({e.strerror})") from None
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(f"{self.path} is not a SentencePiece model") from None
        self.vocab_size = self._model.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()[:32]
        self.end_of_text = self._model.piece_to_id(END_OF_TEXT)
        if self._model.is_unknown(self.end_of_text):
            raise UserError(
                f"{self.path} has no {END_OF_TEXT} piece; train it with tokenizer.train"
            )
        self._space_mark = [self._model.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, never END_OF_TEXT. Raises UserError for lone surrogates."""
        try:
            first, *rest = self._model.encode(text.split(SPACE_MARK))
        except (UnicodeEncodeError, RuntimeError, TypeError):  # it differs by version
            raise UserError(f"text with lone surrogates cannot be encoded: {text!r:.60}") from None
        for ids in rest:
            first += self._space_mark + ids
        return first

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """`encode` for many texts, on several threads."""
        if any(SPACE_MARK in text for text in texts):
            return [self.encode(text) for text in texts]
        return self._model.encode(texts, num_threads=threads)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; END_OF_TEXT decodes to nothing, broken UTF-8 to U+FFFD."""
        return self._model.decode(ids)

    def save(self, folder: Path) -> None:
        """Copy the model file into `folder`."""
        shutil.copyfile(self.path, Path(folder) / MODEL_FILE)
