"""Corpora that other programs tokenised: Megatron `.bin` with `.idx`, OLMo `.npy`."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import TOKENIZER
from test_prepare import contents, numbered, rows, texts_of

from data import DataError, TokenCorpus, Tokenizer
from data.prepare import Selection, prepare
from data.sources import SourceSpec, plan_units, read_unit, resolve

CODES = {"uint8": 1, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}
TEXTS = [*numbered(40), "学而时习之，不亦说乎？", "two\n\nlines"]


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    """Documents of sequences of ids, in the layout of Megatron's indexed data set, version 1."""
    sequences = [np.array(ids, dtype) for document in documents for ids in document]
    sizes = np.array([len(sequence) for sequence in sequences], "<i4")
    offsets = np.cumsum([0, *(sequence.nbytes for sequence in sequences)], dtype="<i8")[:-1]
    starts = np.cumsum([0, *(len(document) for document in documents)], dtype="<i8")
    prefix.with_suffix(".bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sizes), len(starts))
    prefix.with_suffix(".idx").write_bytes(head + sizes.tobytes() + offsets.tobytes() + starts.tobytes())


def write_olmo(path: Path, documents: list[list[int]], eos_id: int, dtype: str, closed: bool = True) -> None:
    ids = [number for document in documents for number in [*document, eos_id]]
    path.write_bytes(np.array(ids if closed else ids[:-1], dtype).tobytes())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    """The same texts prepared from JSON Lines, under the same source name."""
    folder = tmp_path_factory.mktemp("expected")
    return TokenCorpus.open(prepare([rows(folder / "old.jsonl", TEXTS)], TOKENIZER, folder / "out"))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("limit", [50, 1 << 20])
def test_megatron(
    dtype: str,
    limit: int,
    tokenizer: Tokenizer,
    expected: TokenCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.prepare.plan.UNIT_BYTES", limit)
    documents = [[[*ids[:3]], [*ids[3:], tokenizer.eos_id]] for ids in tokenizer.encode_batch(TEXTS)]
    write_megatron(tmp_path / "old_text_document", documents, dtype)
    for path in ("old_text_document", "old_text_document.bin"):
        source = SourceSpec("old", str(tmp_path / path), language="en", format="megatron")
        corpus = TokenCorpus.open(prepare([source], TOKENIZER, tmp_path / f"out-{path}"))
        assert corpus.digest == expected.digest
    corpus.verify()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("limit", [7, 50, 1 << 20])
def test_olmo(
    dtype: str,
    closed: bool,
    limit: int,
    tokenizer: Tokenizer,
    expected: TokenCorpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data.prepare.plan.UNIT_BYTES", limit)
    monkeypatch.setattr("data.sources.tokens.READ_AT_ONCE", 16)
    half = len(TEXTS) // 2
    documents = tokenizer.encode_batch(TEXTS)
    write_olmo(tmp_path / "part-0.npy", documents[:half], tokenizer.eos_id, dtype)
    write_olmo(tmp_path / "part-1.npy", documents[half:], tokenizer.eos_id, dtype, closed)
    source = SourceSpec("old", str(tmp_path / "*.npy"), language="en", format="olmo", dtype=dtype)
    corpus = TokenCorpus.open(prepare([source], TOKENIZER, tmp_path / "out"))
    assert corpus.digest == expected.digest
    assert [file.name for file in corpus.manifest.sources["old"].files] == ["part-0.npy", "part-1.npy"]


def test_repetitions_are_found_across_formats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_olmo(tmp_path / "a.npy", tokenizer.encode_batch(TEXTS[:10]), tokenizer.eos_id, "uint16")
    old = SourceSpec("old", str(tmp_path / "a.npy"), language="en", format="olmo")
    new = SourceSpec("new", str(rows(tmp_path / "b.jsonl", TEXTS)))
    corpus = TokenCorpus.open(prepare([old, new], TOKENIZER, tmp_path / "out", selection=Selection(dedup=False)))
    train = {name: set(texts_of(corpus, "train", name)) for name in ("old", "new")}
    assert train["old"].isdisjoint(texts_of(corpus, "validation", "new"))
    with pytest.raises(DataError, match="source old: .* no documents are left"):
        prepare([old, new], TOKENIZER, tmp_path / "none")


def test_bad_documents_are_listed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = [[8192], [5, tokenizer.bos_id, 6], [], [tokenizer.eos_id]]
    documents = [[[tokenizer.bos_id, *ids]] for ids in tokenizer.encode_batch(TEXTS)] + [[ids] for ids in bad]
    write_megatron(tmp_path / "old", documents, "int32")
    source = SourceSpec("old", str(tmp_path / "old"), language="en", format="megatron")
    out = prepare([source], TOKENIZER, tmp_path / "out", selection=Selection(max_bad_rows=0.1))
    listed = (out / "quarantine.jsonl").read_text().splitlines()
    for line, reason in zip(
        listed,
        ["id 8192 is outside the vocabulary of 8192", "BOS or EOS inside", "holds no text", "holds no text"],
        strict=True,
    ):
        assert reason in line
    assert f'"row": {len(TEXTS) + 1},' in listed[0]
    assert TokenCorpus.open(out).manifest.sources["old"].documents == len(TEXTS)
    assert contents(out).keys() >= {"train-old-00000.bin", "train-old-00000.idx"}


def test_bad_files_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = tmp_path / "old"
    write_megatron(prefix, [[ids] for ids in tokenizer.encode_batch(TEXTS)], "uint16")
    index = prefix.with_suffix(".idx").read_bytes()
    ids = prefix.with_suffix(".bin").read_bytes()
    source = SourceSpec("old", str(prefix), language="en", format="megatron")
    cases = {
        "not the index of a Megatron data set": (b"x" + index[1:], ids),
        "old.idx: is cut": (index[:-1], ids),
        "type code 7: only version 1": (index[:17] + b"\x07" + index[18:], ids),
        "points outside": (index, ids[:-2]),
        "documents are out of order": (index[:-8] + struct.pack("<q", 1), ids),
    }
    for reason, (changed_index, changed_ids) in cases.items():
        prefix.with_suffix(".idx").write_bytes(changed_index)
        prefix.with_suffix(".bin").write_bytes(changed_ids)
        with pytest.raises(DataError, match=reason):
            prepare([source], TOKENIZER, tmp_path / "out")
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match="old.idx: no such file"):
        resolve(source)
    olmo = SourceSpec("old", str(tmp_path / "a.npy"), language="en", format="olmo")
    np.save(tmp_path / "a.npy", np.array([1, 2, 3], np.uint16))
    with pytest.raises(DataError, match=r"a.npy: has a numpy header"):
        prepare([olmo], TOKENIZER, tmp_path / "out")
    (tmp_path / "a.npy").write_bytes(b"abc")
    with pytest.raises(DataError, match=r"a.npy: 3 bytes are no whole number of uint16 ids"):
        prepare([olmo], TOKENIZER, tmp_path / "out")
    (tmp_path / "a.npy").write_bytes(b"ab")
    with pytest.raises(DataError, match="give language="):
        prepare([SourceSpec("old", str(tmp_path / "a.npy"), format="olmo")], TOKENIZER, tmp_path / "out")
    (unit,) = plan_units(olmo, resolve(olmo), rows=9, num_bytes=9)
    with pytest.raises(DataError, match="holds token ids, only data.prepare reads them"):
        list(read_unit(olmo, unit))
    with pytest.raises(DataError, match="says no format that is read, give format="):
        resolve(SourceSpec("old", str(tmp_path / "a.npy")))
