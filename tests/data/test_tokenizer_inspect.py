from __future__ import annotations

import base64
import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import SOURCES, TOKENIZER, documents_of
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Tokenizer
from data.split import SPLIT_KEY, is_held_out, keyed_hash
from data.tokenizer.__main__ import main
from data.tokenizer.layout import byte_letters
from data.tokenizer.ranks import load_ranks

PLAIN = Tokenizer.load(TOKENIZER)
WORDS = ["th", "the", " th", " the", "in", "ing", "中", "é", "  ", "\n\n"]


def inspect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: object) -> str:
    monkeypatch.setattr(sys, "argv", ["tokenizer", "inspect", str(TOKENIZER), *map(str, options)])
    assert main() == 0
    return capsys.readouterr().out


def ranks_file(path: Path, words: list[str]) -> Path:
    tokens = [bytes([byte]) for byte in range(256)] + [b"\xe4\xb8", *(word.encode() for word in words)]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines), encoding="ascii")
    return path


def test_bytes_per_token(
    small_sources: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [part for source in small_sources for part in ("--source", source)]
    facts = json.loads(inspect(monkeypatch, capsys, *sources, "--json"))
    assert (facts["vocab_size"], facts["unused_ids"], facts["digest"]) == (8192, 0, PLAIN.digest)
    for language, source in zip(("en", "zh"), small_sources, strict=True):
        text = [document.text for document in documents_of(source)]
        size, tokens = len("".join(text).encode()), sum(map(len, PLAIN.encode_batch(text)))
        assert (facts["text_bytes"][language], facts["tokens"][language]) == (size, tokens)
        assert facts["bytes_per_token"][language] == round(size / tokens, 3)


def test_held_out_documents_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    facts = json.loads(inspect(monkeypatch, capsys, "--source", SOURCES[0], "--held-out", "--json"))
    documents = [one for one in documents_of(SOURCES[0]) if is_held_out(keyed_hash(one.text, SPLIT_KEY))]
    assert facts["text_bytes"] == {"en": sum(document.num_bytes for document in documents)}
    assert 10 < len(documents) < 100


def test_comparison(
    small_sources: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bytewise = ranks_file(tmp_path / "bytes.tiktoken", [])
    copy = tmp_path / "copy.json"
    copy.write_bytes(TOKENIZER.read_bytes())
    options = ["--source", small_sources[1], "--against", copy, "--tiktoken", bytewise]
    facts = json.loads(inspect(monkeypatch, capsys, *options, "--json"))
    assert facts["against"][str(copy)]["tokens"] == facts["tokens"]
    assert 1 < facts["against"][str(bytewise)]["bytes_per_token"]["zh"] < 1.6
    lines = inspect(monkeypatch, capsys, *options).splitlines()
    row = next(line for line in lines if line.startswith("zh "))
    counts = [facts["tokens"]["zh"], facts["tokens"]["zh"], facts["against"][str(bytewise)]["tokens"]["zh"]]
    assert row.replace(",", "").split()[3::2] == [str(count) for count in counts]


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenizer", "inspect", "nowhere.json"])
    assert main() == 77
    assert capsys.readouterr().err == "error: nowhere.json: no such file\n"
    monkeypatch.setattr(sys, "argv", ["tokenizer", "inspect", str(TOKENIZER), "--against", "nowhere.json"])
    assert main() == 77
    assert capsys.readouterr().err == "error: nowhere.json: no such file\n"


def by_ranks(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge the neighbours whose union has the lowest rank until none has one: the definition, slowly."""
    parts = [bytes([byte]) for byte in word]
    while True:
        unions = [left + right for left, right in pairwise(parts)]
        pairs = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def ranks_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ranks_file(tmp_path_factory.mktemp("ranks") / "words.tiktoken", WORDS)


@given(text=st.text(alphabet="theing中é \n"))
def test_ranks_merge_as_they_are_defined(ranks_path: Path, text: str) -> None:
    tokenizer = load_ranks(ranks_path)
    lines = [line.split() for line in ranks_path.read_bytes().splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    bytes_of = {letter: bytes([byte]) for byte, letter in byte_letters().items()}
    words = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    expected = [rank for word in words for rank in by_ranks(b"".join(bytes_of[letter] for letter in word), ranks)]
    assert tokenizer.encode(text).ids == expected
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "256 of 256 bytes have no rank"),
        (b"YQ== 0\n%% 1\n", ":2: must be a token in base64 and its rank"),
        (b"YQ== x\n", ":1: must be a token in base64 and its rank"),
        (b"YQ==\n", ":1: must be a token in base64 and its rank"),
    ],
)
def test_bad_ranks_are_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_ranks(path)


def test_a_token_that_no_merge_makes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no merge of tokens with lower ranks makes b'xyz'"):
        load_ranks(ranks_file(tmp_path / "bad.tiktoken", ["xyz"]))
