from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES, TOKENIZER
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Document, Tokenizer, read_jsonl
from data.split import split_documents
from data.tokenizer import BOS, EOS
from data.tokenizer.__main__ import main
from data.tokenizer.train import balance, train_tokenizer

PLAIN = Tokenizer.load(TOKENIZER)


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
    base = [Document(f"{word} {number} der die das", "de", "") for number, word in enumerate(["Hund", "Maus"] * 10)]
    marked = (Document(f"QZ{number}" * 40, "de", "") for number in range(1000))
    chosen = next(one for one in marked if (one in split_documents([*base, one])[1]) == held_out)
    write_rows(tmp_path / "text.jsonl", [*base, chosen])
    out = train_tokenizer([tmp_path / "text.jsonl"], 265, tmp_path / "tokenizer.json")
    vocabulary = json.loads(out.read_text(encoding="utf-8"))["model"]["vocab"]
    assert any("QZ" in token for token in vocabulary) != held_out


def test_languages_are_balanced() -> None:
    documents = [Document(f"{number:04}" * 25, "en", "") for number in range(100)]
    documents += [Document(f"{number:04}" * 25, "zh", "") for number in range(10)]
    chosen = balance(documents)
    assert [sum(document.num_bytes for document in chosen if document.language == name) for name in ("en", "zh")] == [
        1000,
        1000,
    ]
    assert balance(documents[::-1]) != []
    assert set(balance(documents[::-1])) == set(chosen)


def test_vocabulary_layout() -> None:
    vocabulary = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    assert len(vocabulary) == PLAIN.vocab_size == 8192
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert (vocabulary[BOS], vocabulary[EOS]) == (PLAIN.bos_id, PLAIN.eos_id) == (0, 1)
    assert not [token for token in vocabulary if token.strip("0123456789") == "" and len(token) > 1]


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = PLAIN.encode(text)
    assert PLAIN.decode(ids) == text
    assert PLAIN.byte_lengths()[ids].sum() == len(text.encode())


def test_real_text_survives_and_every_byte_is_counted() -> None:
    documents = [document for source in SOURCES for document in list(read_jsonl(source))[::10]]
    lengths = PLAIN.byte_lengths()
    for document, ids in zip(documents, PLAIN.encode_batch([d.text for d in documents]), strict=True):
        assert PLAIN.decode(ids) == document.text
        assert lengths[ids].sum() == document.num_bytes
    assert lengths[[PLAIN.bos_id, PLAIN.eos_id]].tolist() == [0, 0]


def test_text_cannot_forge_document_boundaries() -> None:
    ids = PLAIN.encode(f"a{BOS}b{EOS}c")
    assert {PLAIN.bos_id, PLAIN.eos_id}.isdisjoint(ids)
    assert PLAIN.decode(ids) == f"a{BOS}b{EOS}c"
    assert PLAIN.decode([PLAIN.bos_id, *PLAIN.encode("hi"), PLAIN.eos_id]) == "hi"


def test_words_are_cut_as_in_the_family() -> None:
    pieces = [PLAIN.decode([index]) for index in PLAIN.encode("of the 2024\n的，")]
    assert pieces == ["of", " the", " ", "2", "0", "2", "4", "\n", "的", "，"]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be encoded"):
        PLAIN.encode("a\ud800")


def _model(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda content: change(content["model"])


BAD_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "duplicate ids": (_model(lambda model: model["vocab"].update({"zzq": 5})), "ids must be"),
    "huge id": (_model(lambda model: model["vocab"].update({"zzq": 4294967295})), "ids must be"),
    "gap in ids": (_model(lambda model: model["vocab"].update({"zzq": 9000})), "ids must be"),
    "no vocabulary": (_model(lambda model: model.pop("vocab")), "not a tokenizer.json"),
    "merge of unknown tokens": (_model(lambda model: model["merges"].append(["qqqq", "zzzz"])), "not a tokenizer.json"),
    "no special tokens": (lambda content: content.update(added_tokens=[]), "is missing"),
    "only BOS": (lambda content: content["added_tokens"].pop(), f"{EOS} is missing"),
    "ordinary EOS": (lambda content: content["added_tokens"][1].update(special=False), f"{EOS} is missing"),
    "not byte level": (lambda content: content.update(pre_tokenizer=None, decoder=None), "text changes"),
    "lower case": (lambda content: content.update(normalizer={"type": "Lowercase"}), "text changes"),
    "composing": (lambda content: content.update(normalizer={"type": "NFC"}), "text changes"),
    "stripping": (lambda content: content.update(normalizer={"type": "StripAccents"}), "text changes"),
    "bad regex": (
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["}),
        "not a tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TOKENIZERS[case]
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=rf"tokenizer\.json: .*{reason}") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"null", b"\x80\x04K\x01.", b'{"model": 3}'])
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a tokenizer.json"):
        Tokenizer.load(path)


def test_a_panic_of_the_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Backend:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
            raise PanicException("regex went astray\nmore")

    tokenizer = Tokenizer.load(TOKENIZER)
    monkeypatch.setattr(tokenizer, "_backend", Backend())
    with pytest.raises(DataError, match=r"cannot be encoded: regex went astray$"):
        tokenizer.encode("a")


def test_settings_in_the_file_do_not_cut_or_pad(tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = Tokenizer.load(path)
    assert tokenizer.encode("a b c d e") == PLAIN.encode("a b c d e")
    assert tokenizer.digest != PLAIN.digest


def test_training_refusals(tmp_path: Path) -> None:
    source, out = tmp_path / "few.jsonl", tmp_path / "tokenizer.json"
    write_rows(source, [Document("ein Satz", "de", ""), Document("noch ein Satz", "de", "")])
    with pytest.raises(DataError, match="257 is too small"):
        train_tokenizer([source], 257, out)
    with pytest.raises(DataError, match="yields only"):
        train_tokenizer([source], 8192, out)
    assert not out.exists()


def test_inspect_measures_bytes_per_token(
    small_sources: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [part for source in small_sources for part in ("--source", str(source))]
    monkeypatch.setattr(sys, "argv", ["tokenizer", "inspect", str(TOKENIZER), *sources, "--json"])
    assert main() == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vocab_size"] == 8192
    for language, source in zip(("en", "zh"), small_sources, strict=True):
        text = [document.text for document in read_jsonl(source)]
        figure = len("".join(text).encode()) / sum(map(len, PLAIN.encode_batch(text)))
        assert facts["bytes_per_token"][language] == round(figure, 3)
    monkeypatch.setattr(sys, "argv", ["tokenizer", "inspect", "nowhere.json"])
    assert main() == 77
    assert capsys.readouterr().err == "error: nowhere.json: no such file\n"


def write_rows(path: Path, documents: list[Document]) -> None:
    rows = [{"text": d.text, "lang": d.language, "source": d.source} for d in documents]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
