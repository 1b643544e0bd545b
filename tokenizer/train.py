"""Train the SentencePiece tokenizer on document shards.

    python -m tokenizer.train --source out/demo/filtered --source out/demo/exercises/train \
        --vocab_size 2048 --out out/demo/tokenizer
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from common.config import UserError, parse, run
from common.files import new_folder, write_json
from data.base.readers import read_documents
from tokenizer import END_OF_TEXT, MODEL_FILE, SPACE_MARK, Tokenizer

# Whole documents are too long for the trainer, and single lines hide the newline-and-indent pieces
# that code needs, so train on chunks of many lines.
CHUNK_CHARS = 2000
SMALLEST_VOCAB = 512  # 256 bytes, two special pieces, and room for characters found in code


@dataclass(frozen=True)
class Config:
    """Train a SentencePiece BPE tokenizer with byte fallback that round-trips every string."""

    out: Path  # folder to write tokenizer.model and summary.json to
    source: tuple[Path, ...]  # files or folders of documents to learn from; repeatable
    vocab_size: int = 2048  # pieces, including 256 bytes and <|endoftext|>
    max_mb: float = 8.0  # megabytes of text to read per source, 0 = all
    threads: int = 2  # trainer threads


def main() -> None:
    config = parse(Config)
    if not SMALLEST_VOCAB <= config.vocab_size <= 65536:
        raise UserError(f"--vocab_size {config.vocab_size}: want {SMALLEST_VOCAB} to 65536")
    used, model = {}, io.BytesIO()
    with new_folder(config.out, config.source) as folder:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=chunks(config.source, config.max_mb, used),
                model_writer=model,  # model_prefix would store its path in the model
                model_type="bpe",
                vocab_size=config.vocab_size,
                num_threads=config.threads,
                byte_fallback=True,  # can write any byte
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,  # for indentation
                split_digits=True,
                character_coverage=0.9995,
                max_sentence_length=4 * CHUNK_CHARS + 16,  # bytes
                bos_id=-1,
                pad_id=-1,
                eos_piece=END_OF_TEXT,
                minloglevel=2,
            )
        except RuntimeError as e:
            raise UserError(
                f"SentencePiece could not learn {config.vocab_size} pieces from "
                f"{sum(used.values()):,} bytes; lower --vocab_size or add documents: "
                f"{str(e).splitlines()[-1]}"
            ) from None
        (folder / MODEL_FILE).write_bytes(model.getvalue())
        made = Tokenizer(folder / MODEL_FILE)
        summary = {"vocab_size": made.vocab_size, "fingerprint": made.fingerprint}
        write_json(folder / "summary.json", {**summary, "source_bytes": used})
    mb = sum(used.values()) / 1e6
    print(f"tokenizer: {made.vocab_size} pieces from {mb:.1f} MB -> {config.out}")


def chunks(sources: tuple[Path, ...], max_mb: float, used: dict[str, int]) -> Iterator[str]:
    """Yield documents cut at line ends into chunks of up to CHUNK_CHARS; count bytes in `used`."""
    for source in sources:
        used[source.name] = 0
        for document in read_documents([source]):
            if max_mb and used[source.name] >= max_mb * 1e6:
                break
            used[source.name] += len(document["text"].encode())
            # The trainer cuts a sentence at a NUL, and takes U+2581 for a space.
            text, chunk = re.sub(f"[\0{SPACE_MARK}]", "", document["text"]), ""
            for line in text.splitlines(keepends=True):
                for start in range(0, len(line), CHUNK_CHARS):
                    part = line[start : start + CHUNK_CHARS]
                    if len(chunk) + len(part) > CHUNK_CHARS:
                        yield chunk
                        chunk = ""
                    chunk += part
            if chunk:
                yield chunk


if __name__ == "__main__":
    run(main)
