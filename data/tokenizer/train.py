"""Train a byte-level BPE vocabulary on the training split of some sources.

The text is cut into words before merging as the DeepSeek family does it: line breaks alone, words of cased letters and
runs of punctuation with at most one blank before them, trailing blanks, runs of Chinese, Japanese and Korean
characters, digits one by one. `data.tokenizer.sampling` says what is learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from data.documents import Document
from data.errors import DataError
from data.files import write_whole
from data.sources.read import read_documents
from data.sources.spec import SourceSpec
from data.tokenizer import BOS, EOS, errors_name
from data.tokenizer.sampling import Sample, choose

ALPHABET_SIZE = 256
MAX_ENTRIES = 1 << 24
MAX_BYTES = 400_000_000
WORDS = (
    r"[\r\n]",
    r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
    r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    r"[一-龥\u0800-一가-\ud7ff]+",
)
# The trainer alone cuts long words: a merge walks through every word that has it, and a page without a stop is one.
LONG_WORD = r"[\s\S]{64}"


def train_tokenizer(
    sources: Sequence[SourceSpec],
    vocab_size: int,
    out: str | Path,
    *,
    shares: Mapping[str, Fraction] | None = None,
    max_bytes: int = MAX_BYTES,
    report: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Sample:
    """Train on the training documents of `sources` and write `out`, a `tokenizer.json` of exactly `vocab_size` entries.

    The bytes written depend on the set of documents and the arguments alone. `shares` are the languages' parts of the
    text, equal by default; no more than `max_bytes` of it are used, each costing about 40 bytes of memory. `report`
    gets a line for every stage, `progress` draws bars.

    Raises:
        DataError: bad input, `vocab_size` below 258 or above 2^24, or too little text for `vocab_size` entries.
    """
    if vocab_size < ALPHABET_SIZE + 2:
        raise DataError(f"--vocab-size: {vocab_size} is too small, {ALPHABET_SIZE + 2} entries are bytes, BOS and EOS")
    if vocab_size > MAX_ENTRIES:  # the library takes memory for all of them beforehand, and aborts when there is none
        raise DataError(f"--vocab-size: {vocab_size} is too large, {MAX_ENTRIES} is the most")
    counted = tqdm(_read(sources), "reading", unit=" documents", disable=not progress)
    sample = choose(counted, shares or {}, max_bytes)
    for language, available in sample.available.items():
        report(f"{language}: {sample.taken[language] / 1e6:.1f} of {available / 1e6:.1f} MB")
    tokenizer = _learn(sample.pieces(_read(sources)), vocab_size, progress)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise DataError(f"--vocab-size: the text yields only {size} entries, {vocab_size} were asked for")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(Path(out), (tokenizer.to_str() + "\n").encode())
    return sample


def family_words() -> list[pre_tokenizers.PreTokenizer]:
    """The steps that cut text into words as the DeepSeek family does."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS]
    return [*splits, pre_tokenizers.Digits(individual_digits=True)]


def _learn(pieces: Iterable[str], vocab_size: int, progress: bool) -> Tokenizer:
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    cut = pre_tokenizers.Split(Regex(LONG_WORD), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*family_words(), cut, spelling])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress,
    )
    with errors_name("training", "text cannot be learned"):
        tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*family_words(), spelling])
    return tokenizer


def _read(sources: Iterable[SourceSpec]) -> Iterable[Document]:
    return chain.from_iterable(read_documents(source) for source in sources)
