"""What a `tokenizer.json` must say: checks on the file itself, where the library is silent or changes its mind.

The library accepts two tokens with one id, renumbers added tokens whose ids leave a gap, and runs models and
normalizers that do not give the text back. Here such files are refused.

A file names its BOS and EOS by the template `BOS $A EOS` of its post-processor; without one they are the DeepSeek
family's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import pre_tokenizers

from data.errors import DataError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

MAX_FILE_BYTES = 1 << 27
ID_LIMIT = 1 << 31
MAX_HOLES_PER_ENTRY = 1
DROPS_TEXT = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "Metaspace")

Content = dict[str, Any]


def parse(content: bytes) -> Content:
    """The JSON object of a tokenizer file.

    Raises:
        ValueError, RecursionError: not JSON, or not an object with a model and its vocabulary.
    """
    layout = json.loads(content)
    if not isinstance(layout, dict) or not isinstance(layout.get("model"), dict):
        raise ValueError("no model in it")
    if not isinstance(layout.get("added_tokens", []), list):
        raise ValueError("added_tokens must be a list")
    return layout


def special_names(layout: Content) -> tuple[str, str]:
    """BOS and EOS as the file names them."""
    processor = layout.get("post_processor") or {}
    if processor.get("type") != "TemplateProcessing":
        return BOS, EOS
    match processor.get("single"):
        case [{"SpecialToken": {"id": bos}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": eos}}]:
            return bos, eos
    return BOS, EOS


def name_specials(layout: Content, bos: str, eos: str) -> Content:
    """A copy of `layout` whose post-processor says that `bos` opens and `eos` closes a document."""
    ids = {entry["content"]: entry["id"] for entry in layout.get("added_tokens", [])}
    first, last = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (bos, eos))
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B"))
    processor = {
        "type": "TemplateProcessing",
        "single": [first, text, last],
        "pair": [first, text, last, first, other, last],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos) if token in ids
        },
    }
    return {**layout, "post_processor": processor}


def check_lossless(layout: Content, name: str) -> None:
    """Raise DataError unless the model is a byte-level BPE that can spell every text and give it back."""
    model = layout["model"]
    if (kind := model.get("type", "BPE")) != "BPE":
        raise DataError(f"{name}: model: {kind} is not supported, a byte-level BPE is needed")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"{name}: model.{key}: {model[key]!r:.40} is not supported, it must be null")
    if missing := [letter for letter in letters_of_text() if letter not in model["vocab"]]:
        raise DataError(f"{name}: text would be lost, no token for {len(missing)} bytes: not a byte-level BPE")
    if changing := [kind for kind in _kinds(layout.get("normalizer")) if kind != "Sequence"]:
        raise DataError(
            f"{name}: normalizer: {', '.join(changing)} changes text, `import --drop-normalizer` removes it"
        )
    for part in _parts(layout.get("pre_tokenizer")):
        if part.get("type") in DROPS_TEXT or part.get("behavior") == "Removed":
            raise DataError(f"{name}: pre_tokenizer: {part.get('type')} loses blanks or other text")


def check_entries(layout: Content, vocabulary: Mapping[str, int], name: str) -> None:
    """Raise DataError unless every id of the file is in range, unique, and the one that the library uses."""
    tokens = dict(layout["model"]["vocab"])
    for entry in layout.get("added_tokens", []):
        if tokens.setdefault(entry["content"], entry["id"]) != entry["id"]:
            raise DataError(f"{name}: token {entry['content']!r:.60} has two ids, ids must be unique")
    if outside := [token for token, index in tokens.items() if not 0 <= index < ID_LIMIT]:
        raise DataError(f"{name}: token {outside[0]!r:.60} has id {tokens[outside[0]]}, ids must be below 2^31")
    (index, count), *_ = Counter(tokens.values()).most_common(1)
    if count > 1:
        names = ", ".join(repr(token) for token, other in tokens.items() if other == index)
        raise DataError(f"{name}: id {index} belongs to {names:.120}, ids must be unique")
    if changed := [token for token, index in tokens.items() if vocabulary.get(token) != index]:
        token = changed[0]
        was, becomes = tokens[token], vocabulary.get(token)
        raise DataError(
            f"{name}: ids must be without gaps before added tokens: {token!r:.60} is {was}, read as {becomes}"
        )
    holes = max(tokens.values()) + 1 - len(tokens)
    if holes > MAX_HOLES_PER_ENTRY * len(tokens):
        raise DataError(f"{name}: ids must be dense: {len(tokens)} tokens leave {holes} ids unused")


def byte_letters() -> dict[int, str]:
    """The character that spells each byte: printable ones spell themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip([*printable, *others], sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))


def letters_of_text() -> list[str]:
    """The characters that spell the bytes which occur in UTF-8; the released models lack the 13 others."""
    return [letter for byte, letter in byte_letters().items() if byte not in (0xC0, 0xC1) and byte < 0xF5]


def check_unspeakable(layout: Content, specials: tuple[str, str], name: str) -> None:
    """Raise DataError where ordinary text can produce one of `specials`, being bytes or a merge of them."""
    merges = layout["model"]["merges"]
    made = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges}
    for token in specials:
        if token in made or token in byte_letters().values():
            raise DataError(f"{name}: special token {token} is also made from ordinary text")


def _parts(component: object) -> Iterator[Content]:
    """A normalizer or pre-tokenizer and, for sequences, everything in it."""
    if not isinstance(component, dict):
        return
    yield component
    for part in [*component.get("normalizers", []), *component.get("pretokenizers", [])]:
        yield from _parts(part)


def _kinds(component: object) -> list[str]:
    return [str(part.get("type")) for part in _parts(component)]
