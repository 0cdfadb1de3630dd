"""Train a byte-level BPE vocabulary on the training split of some documents.

The text is cut into words before merging as the DeepSeek family does it: line breaks alone, words of cased letters and
runs of punctuation with at most one blank before them, trailing blanks, runs of Chinese, Japanese and Korean
characters, digits one by one. Every language gives equally many bytes, so that none crowds out another.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.documents import Document, read_jsonl
from data.errors import DataError
from data.split import keyed_hash, split_documents
from data.tokenizer import BOS, EOS

ALPHABET_SIZE = 256
BALANCE_KEY = 0x62616C616E6365
WORDS = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    r"[一-龥\u0800-一가-\ud7ff]+",
)


def train_tokenizer(sources: Sequence[str | Path], vocab_size: int, out: str | Path) -> Path:
    """Train on the training documents of `sources` and write `out`, a `tokenizer.json` of exactly `vocab_size` entries.

    The bytes written depend on the documents and `vocab_size` alone.

    Raises:
        DataError: bad input, `vocab_size` below 258, or too little text for `vocab_size` entries.
    """
    if vocab_size < ALPHABET_SIZE + 2:
        raise DataError(f"--vocab-size: {vocab_size} is too small, {ALPHABET_SIZE + 2} entries are bytes, BOS and EOS")
    train, _ = split_documents([document for source in sources for document in read_jsonl(source)])
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in balance(train)), trainer)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(f"--vocab-size: the text yields only {size} entries, {vocab_size} were asked for")
    return _write(Path(out), tokenizer.to_str() + "\n")


def untrained() -> Tokenizer:
    """A byte-level BPE with the family's word boundaries and nothing learned yet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS]
        + [pre_tokenizers.Digits(individual_digits=True)]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def balance(documents: Iterable[Document]) -> list[Document]:
    """Whole documents of every language, up to the bytes of the language that has least.

    Documents are taken in the order of a hash of their text, so that the order of the files does not matter.
    """
    by_language: dict[str, list[Document]] = defaultdict(list)
    for document in sorted(documents, key=lambda document: keyed_hash(document.text, BALANCE_KEY)):
        by_language[document.language].append(document)
    if not by_language:
        raise DataError("--source: no training documents, at least two are needed in one language and source")
    limit = min(sum(document.num_bytes for document in group) for group in by_language.values())
    return [document for group in by_language.values() for document in _up_to(group, limit)]


def _up_to(documents: Iterable[Document], limit: int) -> Iterable[Document]:
    taken = 0
    for document in documents:
        taken += document.num_bytes
        if taken > limit:
            return
        yield document


def _write(out: Path, content: str) -> Path:
    """Write all of the file or none of it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tokenizer-") as folder:
        draft = Path(folder) / out.name
        draft.write_text(content, encoding="utf-8")
        os.replace(draft, out)
    return out
