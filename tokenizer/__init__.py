"""Tokenize with a SentencePiece BPE with byte fallback, which round-trips every string.

Imported models may use a byte-level BPE instead (byte_level.py).
"""

import hashlib
import shutil
from pathlib import Path

import sentencepiece

from common.config import UserError
from tokenizer.byte_level import ByteLevelBPE

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"  # byte-level BPE
END_OF_TEXT = "<|endoftext|>"
# SentencePiece stores a space as U+2581, and would decode a literal one to a space. `Pieces` hides
# these from it and emits their three UTF-8 byte tokens instead.
SPACE_MARK = "\u2581"


class Tokenizer:
    """Text to token ids and back; round-trips every str that UTF-8 can encode."""

    def __init__(self, path: Path):
        """Load a model file, or a folder with tokenizer.model or, failing that, tokenizer.json."""
        path = Path(path)
        if path.is_dir():
            only_json = (path / JSON_FILE).exists() and not (path / MODEL_FILE).exists()
            path = path / (JSON_FILE if only_json else MODEL_FILE)
        self.path = path
        try:
            self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        except OSError as e:
            raise UserError(f"no tokenizer at {path} ({e.strerror})") from None
        kind = ByteLevelBPE if path.suffix == ".json" else Pieces
        self.backend = kind(path, END_OF_TEXT)
        self.vocab_size = self.backend.vocab_size
        self.end_of_text = self.backend.end_of_text
        self.start = self.backend.start  # token ids to put before a prompt

    def encode(self, text: str) -> list[int]:
        """Return token ids of `text`, never END_OF_TEXT. Raises UserError on lone surrogates."""
        if text != text.encode(errors="ignore").decode():
            raise UserError(f"lone surrogates cannot be encoded: {text!r:.60}")
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Encode texts on several threads; they must be free of lone surrogates."""
        return self.backend.encode(texts, threads)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`; END_OF_TEXT decodes to nothing, broken UTF-8 to U+FFFD."""
        return self.backend.decode(ids)

    def save(self, folder: Path) -> None:
        """Copy the model file into `folder`."""
        name = JSON_FILE if self.path.suffix == ".json" else MODEL_FILE
        shutil.copyfile(self.path, Path(folder) / name)


class Pieces:
    """SentencePiece model from tokenizer.train."""

    def __init__(self, path: Path, end_of_text: str):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError:
            raise UserError(f"{path} is not a SentencePiece model") from None
        self.vocab_size = self.model.vocab_size()
        self.end_of_text = self.model.piece_to_id(end_of_text)
        if self.model.is_unknown(self.end_of_text):
            raise UserError(f"{path} has no {end_of_text} piece; train it with tokenizer.train")
        self.start = [self.end_of_text]  # precedes every document in training
        self._space_mark = [self.model.piece_to_id(f"<0x{b:02X}>") for b in SPACE_MARK.encode()]

    def encode(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        if not any(SPACE_MARK in text for text in texts):
            return self.model.encode(texts, num_threads=threads)
        encoded = []
        for text in texts:
            first, *rest = self.model.encode(text.split(SPACE_MARK), num_threads=threads)
            for ids in rest:
                first += self._space_mark + ids
            encoded.append(first)
        return encoded

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)
