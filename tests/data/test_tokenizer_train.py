from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SOURCES, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Document, TokenCorpus, Tokenizer
from data.prepare import prepare
from data.sources.spec import SourceSpec
from data.split import SPLIT_KEY, is_held_out, keyed_hash
from data.tokenizer import train as training
from data.tokenizer.__main__ import main
from data.tokenizer.sampling import PIECE_CHARACTERS, Sample, choose
from data.tokenizer.train import train_tokenizer

EVERYTHING = 1 << 40
TEXTS = st.lists(st.sampled_from([f"{number:04}" * 25 for number in range(300)]), min_size=2, max_size=60)


def test_the_bundled_tokenizer_is_what_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "tokenizer.json"
    sources = [part for source in reversed(SOURCES) for part in ("--source", str(source))]
    monkeypatch.setattr(sys, "argv", ["tokenizer", "train", *sources, "--vocab-size", "8192", "--out", str(out)])
    assert main() == 0
    assert out.read_bytes() == TOKENIZER.read_bytes()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("held_out", [True, False])
def test_only_training_documents_are_learned(held_out: bool, tmp_path: Path) -> None:
    """A word that fills one document becomes a token exactly when that document is not held out."""
    base = [Document(f"{word} {number} der die das", "de", "") for number, word in enumerate(["Hund", "Maus"] * 20)]
    marked = (Document(f"QZ{number}" * 40, "de", "") for number in range(1000))
    chosen = next(one for one in marked if is_held_out(keyed_hash(one.text, SPLIT_KEY)) == held_out)
    train_tokenizer([write_rows(tmp_path / "text.jsonl", [*base, chosen])], 265, tmp_path / "tokenizer.json")
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert any("QZ" in token for token in vocabulary) != held_out


def documents(texts: Iterable[str], language: str = "en", source: str = "one") -> list[Document]:
    return [Document(text, language, source) for text in texts]


def taken(sample: Sample, rows: Iterable[Document]) -> list[str]:
    return sorted(sample.pieces(rows))


@given(TEXTS, TEXTS, st.randoms())
def test_the_choice_does_not_depend_on_order(english: list[str], chinese: list[str], random: object) -> None:
    rows = [*documents(english), *documents((f"中{text}" for text in chinese), "zh", "two")]
    mixed = rows.copy()
    random.shuffle(mixed)  # type: ignore[attr-defined]
    one, other = choose(rows, {}, EVERYTHING), choose(mixed, {}, EVERYTHING)
    assert one == other
    assert taken(one, rows) == taken(other, mixed)


def test_languages_are_balanced() -> None:
    rows = [*documents(f"{number:04}" * 25 for number in range(2000)), *documents(["中" * 90 + "a"] * 30, "zh", "two")]
    sample = choose(rows, {}, EVERYTHING)
    assert sample.available["en"] > 180_000
    assert sample.available["zh"] == sample.taken["zh"] == 30 * 271
    assert sample.available["zh"] - 200 <= sample.taken["en"] <= sample.available["zh"]
    chosen = taken(sample, rows)
    for language, size in sample.taken.items():
        assert sum(len(text.encode()) for text in chosen if ("中" in text) == (language == "zh")) == size


@pytest.mark.parametrize(
    ("max_bytes", "english", "chinese"), [(EVERYTHING, 1, Fraction(1, 3)), (40_000, 30_000, 10_000)]
)
def test_shares_and_the_limit_are_met(max_bytes: int, english: int, chinese: int | Fraction) -> None:
    """Of equally much text, shares of 3 to 1 take all of the one and a third of the other, or parts of the limit."""
    rows = [Document(f"{name}{number:04}" * 25, name, name) for name in ("en", "zh") for number in range(2000)]
    sample = choose(rows, {"en": Fraction(3), "zh": Fraction(1)}, max_bytes)
    unit = sample.available["en"] if max_bytes == EVERYTHING else 1
    assert english * unit - 600 <= sample.taken["en"] <= english * unit
    assert chinese * unit - 600 <= sample.taken["zh"] <= chinese * unit


def test_long_documents_are_thinned_piece_by_piece() -> None:
    words = "".join(f"{number} " for number in range(400_000))
    rows = [Document(words, "en", "one"), Document("中" * 50_000, "zh", "two")]
    sample = choose(rows, {}, EVERYTHING)
    assert sample.taken["zh"] == 150_000
    assert 150_000 - PIECE_CHARACTERS <= sample.taken["en"] <= 150_000
    assert max(map(len, sample.pieces(rows))) == PIECE_CHARACTERS


def split_of(texts: list[str]) -> list[bool]:
    return [is_held_out(keyed_hash(text, SPLIT_KEY)) for text in texts]


def test_small_sources_hold_out_one_document_and_keep_one() -> None:
    texts = sorted((f"text {number}" for number in range(500)), key=lambda text: keyed_hash(text, SPLIT_KEY))
    held_out, kept = ([text for text in texts if split_of([text]) == [value]] for value in (True, False))
    assert taken(choose(documents(kept[:3]), {}, EVERYTHING), documents(kept[:3])) == sorted(kept[1:3])
    assert taken(choose(documents(held_out[:3]), {}, EVERYTHING), documents(held_out[:3])) == [held_out[2]]
    both = [held_out[0], kept[0]]
    assert taken(choose(documents(both), {}, EVERYTHING), documents(both)) == [kept[0]]
    for lone in (held_out[:1], kept[:1]):
        assert taken(choose(documents(lone), {}, EVERYTHING), documents(lone)) == lone


def test_what_is_learned_is_what_prepare_trains_on(tmp_path: Path) -> None:
    """Sources of 1 to 12 documents: both commands agree on the held-out ones, the exceptions included."""
    specs, rows = [], []
    for size in range(1, 13):
        name = f"source-{size}"
        rows += (part := documents((f"{name} text {number}" for number in range(size)), "en", name))
        path = write_rows(tmp_path / f"{name}.jsonl", part).path
        specs.append(SourceSpec(name=name, path=path))
    corpus = TokenCorpus.open(prepare(specs, TOKENIZER, tmp_path / "corpus"))
    tokenizer = Tokenizer.load(TOKENIZER)
    trained = []
    for name in corpus.sources:
        source = corpus.split("train").source(name)
        ends = source.document_ends().astype(int).tolist()
        trained += [tokenizer.decode(source.tokens(start, stop).tolist()) for start, stop in pairwise([0, *ends])]
    assert sorted(trained) == taken(choose(rows, {}, EVERYTHING), rows)
    assert any(not any(split_of([row.text for row in rows if row.source == name])) for name in corpus.sources)


def test_long_words_are_cut_for_the_trainer_alone(tmp_path: Path) -> None:
    """The tokenizer that comes out cuts words as the family does."""
    row = Document("".join(chr(0x4E00 + number * 7 % 2000) for number in range(60_000)), "zh", "")
    train_tokenizer([write_rows(tmp_path / "text.jsonl", [row])], 1500, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(content["pre_tokenizer"]["pretokenizers"]) == len(training.WORDS) + 2
    assert training.LONG_WORD not in json.dumps(content)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(row.text)) == row.text


def test_training_refusals(tmp_path: Path) -> None:
    rows = [Document("ein Satz", "de", ""), Document("noch ein Satz", "de", "")]
    source, out = write_rows(tmp_path / "few.jsonl", rows), tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="257 is too small"):
        train_tokenizer([source], 257, out)
    with pytest.raises(DataError, match="yields only"):
        train_tokenizer([source], 8192, out)
    with pytest.raises(DataError, match="--share: shares of de, en for text in de"):
        train_tokenizer([source], 300, out, shares={"de": Fraction(1), "en": Fraction(1)})
    with pytest.raises(DataError, match="no training documents"):
        choose([], {}, EVERYTHING)
    assert not out.exists()


@pytest.mark.parametrize("share", ["en", "en=", "en=0", "en=-1", "=1", "en=x", "en=1/0", "en=nan"])
def test_a_share_that_is_none_is_refused(
    share: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tokenizer", "train", "--source", str(SOURCES[0]), "--vocab-size", "300", "--out", "x", "--share", share]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 77
    assert capsys.readouterr().err == f"error: --share: {share!r} must be LANGUAGE=NUMBER, the number above 0\n"


def test_shares_reach_the_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sources = [part for source in SOURCES for part in ("--source", str(source))]
    options = ["--share", "en=0.75", "--share", "zh=1/4", "--max-bytes", "400000"]
    command = [
        "tokenizer",
        "train",
        *sources,
        *options,
        "--vocab-size",
        "512",
        "--out",
        str(tmp_path / "tokenizer.json"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    english, chinese = capsys.readouterr().err.splitlines()
    assert english.startswith("en: 0.3 of 1.")
    assert chinese.startswith("zh: 0.1 of 1.")


def write_rows(path: Path, rows: list[Document]) -> SourceSpec:
    lines = [json.dumps({"text": row.text, "lang": row.language, "source": row.source}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return SourceSpec(name="text", path=str(path))
