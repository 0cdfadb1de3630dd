from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SOURCES, TOKENIZER, documents_of
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from data import DataError, Tokenizer
from data.tokenizer import BOS, EOS
from data.tokenizer.layout import MAX_FILE_BYTES, byte_letters

PLAIN = Tokenizer.load(TOKENIZER)
Change = Callable[[dict[str, Any]], object]


def changed(tmp_path: Path, change: Change) -> Path:
    """The bundled tokenizer after `change`."""
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    change(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def added(token: str, index: int, special: bool = False, **flags: bool) -> dict[str, object]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **flags}
    return {"id": index, "content": token, "special": special, **flags}


def test_vocabulary_layout() -> None:
    vocabulary = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
    assert len(vocabulary) == PLAIN.vocab_size == PLAIN.num_entries == 8192
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert (vocabulary[BOS], vocabulary[EOS]) == (PLAIN.bos_id, PLAIN.eos_id) == (0, 1)
    assert not [token for token in vocabulary if token.strip("0123456789") == "" and len(token) > 1]


@given(st.text())
def test_any_text_survives(text: str) -> None:
    ids = PLAIN.encode(text)
    assert PLAIN.decode(ids) == text
    assert PLAIN.byte_lengths()[ids].sum() == len(text.encode())


def test_real_text_survives_and_every_byte_is_counted() -> None:
    documents = [document for source in SOURCES for document in documents_of(source)[::10]]
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


@pytest.mark.parametrize("after", ["x", "!", "中", "7", "\n", ""])
def test_a_long_run_of_blanks_is_cut_without_loss(after: str) -> None:
    """Uncut, 200,000 blanks before a character that is no letter keep the family's pattern busy for minutes."""
    text = "a" + " \t" * 100_000 + after + "b" + "\u2003" * 600 + "c"
    one, two = PLAIN.encode_batch([text, "plain"])
    assert PLAIN.decode(one) == text
    assert PLAIN.byte_lengths()[one].sum() == len(text.encode())
    assert two == PLAIN.encode("plain")


def test_short_runs_of_blanks_are_encoded_as_the_library_does() -> None:
    text = "a" + " " * 500 + "中" + "\t" * 511 + "b"
    assert PLAIN.encode(text) == PLAIN._backend.encode(text, add_special_tokens=False).ids


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be encoded"):
        PLAIN.encode("a\ud800")


def test_every_byte_has_its_letter() -> None:
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, [*range(0x250), 0x4E2D, 0xD7FF, 0x1F600, 0x10FFFF, *range(0x10000, 0x110000, 0x1000)]))
    ((spelled, _),) = spell.pre_tokenize_str(text)
    letters = byte_letters()
    assert spelled == "".join(letters[byte] for byte in text.encode())
    assert len(set(letters.values())) == 256


def _model(change: Change) -> Change:
    return lambda content: change(content["model"])


def _split(content: dict[str, Any], **values: object) -> None:
    content["pre_tokenizer"]["pretokenizers"][0].update(values)


def _spell_bos(content: dict[str, Any]) -> None:
    """BOS becomes a token that ordinary text produces."""
    content["added_tokens"][0].update(content="Ġthe", id=content["model"]["vocab"]["Ġthe"])
    single = [{"SpecialToken": {"id": "Ġthe", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    single.append({"SpecialToken": {"id": EOS, "type_id": 0}})
    tokens = {name: {"id": name, "ids": [1], "tokens": [name]} for name in ("Ġthe", EOS)}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": tokens,
    }


BAD_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "duplicate ids": (_model(lambda model: model["vocab"].update({"zzq": 5})), "id 5 belongs to .*ids must be unique"),
    "huge id": (_model(lambda model: model["vocab"].update({"zzq": 4294967295})), "ids must be below 2\\^31"),
    "mostly holes": (_model(lambda model: model["vocab"].update({"zzq": 99000})), "ids must be dense"),
    "added huge id": (lambda content: content["added_tokens"].append(added("<x>", 4294967295)), "ids must be below"),
    "added duplicate id": (lambda content: content["added_tokens"].append(added("<x>", 5)), "ids must be unique"),
    "added token of two ids": (lambda content: content["added_tokens"].append(added("a", 9000)), "has two ids"),
    "gap before an added token": (
        lambda content: content["added_tokens"].append(added("<x>", 8200)),
        "'<x>' is 8200, read as 8192",
    ),
    "no vocabulary": (_model(lambda model: model.pop("vocab")), "not a tokenizer.json"),
    "merge of unknown tokens": (_model(lambda model: model["merges"].append(["qqqq", "zzzz"])), "not a tokenizer.json"),
    "no special tokens": (lambda content: content.update(added_tokens=[]), "is missing"),
    "only BOS": (lambda content: content["added_tokens"].pop(), f"{EOS} is missing"),
    "ordinary EOS": (lambda content: content["added_tokens"][1].update(special=False), f"{EOS} is missing"),
    "BOS that text can spell": (_spell_bos, "special token Ġthe is also made from ordinary text"),
    "not byte level": (lambda content: content.update(pre_tokenizer=None, decoder=None), "text changes"),
    "prefix blank": (
        lambda content: content["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
        "text changes",
    ),
    "added token that eats blanks": (
        lambda content: content["added_tokens"].append(added("<x>", 8192, lstrip=True)),
        "text changes",
    ),
    "a byte missing": (
        lambda content: content.update(
            model={"type": "BPE", "vocab": {BOS: 0, EOS: 1, **{chr(33 + i): 2 + i for i in range(94)}}, "merges": []}
        ),
        "no token for 149 bytes",
    ),
    "lower case": (lambda content: content.update(normalizer={"type": "Lowercase"}), "normalizer: Lowercase changes"),
    "composing, nested": (
        lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        "normalizer: NFC changes text",
    ),
    "dropping text": (lambda content: _split(content, behavior="Removed"), "pre_tokenizer: Split loses"),
    "dropping blanks": (
        lambda content: content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"}),
        "pre_tokenizer: WhitespaceSplit loses",
    ),
    "dropout": (_model(lambda model: model.update(dropout=0.1)), "model.dropout: 0.1 is not supported"),
    "suffix of words": (_model(lambda model: model.update(end_of_word_suffix="</w>")), "is not supported"),
    "word level": (
        lambda content: content.update(model={"type": "WordLevel", "vocab": {BOS: 0, EOS: 1}, "unk_token": BOS}),
        "model: WordLevel is not supported",
    ),
    "bad regex": (lambda content: _split(content, pattern={"Regex": "(["}), "not a tokenizer.json"),
    "regex bomb": (lambda content: _split(content, pattern={"Regex": "(a+)+$"}), "cannot be encoded: .*retry-limit"),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_bad_tokenizer_is_refused(case: str, tmp_path: Path) -> None:
    change, reason = BAD_TOKENIZERS[case]
    with pytest.raises(DataError, match=rf"tokenizer\.json: .*{reason}") as caught:
        Tokenizer.load(changed(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b"null", b"[" * 100_000, b"\x80\x04K\x01.", b'{"model": 3}', b'{"model": {}}']
)
def test_a_file_that_is_no_tokenizer_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a tokenizer.json"):
        Tokenizer.load(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DataError, match=rf"1,073,741,824 bytes are too many for a tokenizer, {MAX_FILE_BYTES:,}"):
        Tokenizer.load(path)


def test_unused_ids_are_rows_that_stand_for_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(changed(tmp_path, _model(lambda model: model["vocab"].update({"zzq": 9000}))))
    assert (tokenizer.vocab_size, tokenizer.num_entries) == (9001, 8193)
    assert tokenizer.byte_lengths()[[8192, 8999, 9000]].tolist() == [0, 0, 3]
    assert tokenizer.decode([*PLAIN.encode("one"), 8500, *PLAIN.encode(" two")]) == "one two"


def test_added_letters_of_the_released_layout_survive(tmp_path: Path) -> None:
    """The released models lack the 13 bytes that UTF-8 never has and add the letters that spell them as tokens."""
    letters = [letter for byte, letter in byte_letters().items() if byte in (0xC0, 0xC1) or byte >= 0xF5]

    def release(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        kept = [token for token in sorted(vocabulary, key=vocabulary.get) if token not in [BOS, EOS, *letters]]
        content["model"]["vocab"] = {token: index for index, token in enumerate(kept)}
        names = [(BOS, True), (EOS, True), *((letter, False) for letter in letters)]
        content["added_tokens"] = [added(token, len(kept) + i, special) for i, (token, special) in enumerate(names)]

    tokenizer = Tokenizer.load(changed(tmp_path, release))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (8177, 8178, 8192)
    text = "für Öl, schöne Grüße; Ýmir þÿÿ 中文 ü"
    ids = tokenizer.encode(text)
    assert max(ids) > tokenizer.eos_id
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


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
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer = Tokenizer.load(changed(tmp_path, lambda content: content.update(truncation=truncation)))
    assert tokenizer.encode("a b c d e") == PLAIN.encode("a b c d e")
    assert tokenizer.digest != PLAIN.digest
