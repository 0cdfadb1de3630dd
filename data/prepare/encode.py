"""Turn one unit of a source into tokens: read, filter, hash, encode, and write three files that appear in one order.

`<number>.bin` holds ids of all documents, BOS and EOS included; `<number>.npy` a row for every document;
`<number>.json`, written last, what was read and left out. A unit with its `.json` is finished for good.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from data.errors import DataError
from data.files import write_whole, writing_whole
from data.prepare.plan import Plan
from data.sources import SourceSpec, Unit, check_unchanged, read_unit
from data.sources.spec import TOKEN_FORMATS
from data.sources.tokens import read_tokens
from data.split import SPLIT_KEY
from data.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 19
BATCH_DOCUMENTS = 1 << 10
# hash of the text (two halves), row in the unit, ids with BOS and EOS, bytes of UTF-8
TABLE = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])


@dataclass
class UnitFacts:
    """What was found in a unit: rows, reasons of filtered documents, bad rows, first row of every language."""

    rows: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[int, str]] = field(default_factory=list)
    languages: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """A document on its way: row in the unit, text, and its ids where the source has them already."""

    row: int
    text: str
    ids: list[int] | None = None


def encode_unit(plan: Plan, number: int, tokenizer: Tokenizer, work: Path, report: Callable[[int, int], None]) -> None:
    """Write the files of unit `number` into `work`. `report` gets bytes of text and tokens as they are made.

    Raises:
        DataError: the file is damaged or not what it was when the plan was made.
    """
    planned = plan.units[number]
    spec, unit = plan.sources[planned.source], planned.unit
    facts = UnitFacts()
    tables = []
    check_unchanged(spec, unit.file)
    with writing_whole(work / f"{number}.bin") as file:
        for batch in _batches(_documents(spec, unit, tokenizer, facts, plan)):
            ids, table = _encode(batch, tokenizer)
            file.write(ids.tobytes())
            tables.append(table)
            report(int(table["bytes"].sum()), len(ids))
        check_unchanged(spec, unit.file)
    rows = np.concatenate([np.empty(0, TABLE), *tables])
    write_whole(work / f"{number}.npy", rows.tobytes())
    write_whole(work / f"{number}.json", json.dumps(asdict(facts), ensure_ascii=False).encode())


def read_facts(work: Path, number: int) -> UnitFacts | None:
    """What `encode_unit` found in unit `number`; None while it is not finished."""
    path = work / f"{number}.json"
    return UnitFacts(**json.loads(path.read_bytes())) if path.exists() else None


def _documents(spec: SourceSpec, unit: Unit, tokenizer: Tokenizer, facts: UnitFacts, plan: Plan) -> Iterator[Piece]:
    """Documents that pass, while `facts` notes the others."""
    for row, text, language, problem, ids in _rows(spec, unit, tokenizer):
        facts.rows += 1
        if text is None or language is None:
            facts.bad.append((row, str(problem)))
            continue
        facts.languages.setdefault(language, row)
        if reason := plan.filters.reason(text, language):
            facts.filtered[reason] = facts.filtered.get(reason, 0) + 1
            continue
        yield Piece(row, text, ids)


Found = tuple[int, str | None, str | None, str | None, list[int] | None]


def _rows(spec: SourceSpec, unit: Unit, tokenizer: Tokenizer) -> Iterator[Found]:
    """(row, text, language, problem, ids)"""
    if unit.file.format not in TOKEN_FORMATS:
        for row in read_unit(spec, unit):
            yield row.position, row.text, row.language, row.problem, None
        return
    if spec.language is None:
        raise DataError(f"source {spec.name}: token files do not say their language, give language=")
    for number, document in enumerate(read_tokens(spec, unit, tokenizer.eos_id)):
        yield number, *_imported(document, spec.language, tokenizer)


def _imported(
    document: np.ndarray, language: str, tokenizer: Tokenizer
) -> tuple[str | None, str | None, str | None, list[int] | None]:
    """(text, language, problem, ids) of a document that came as ids, its own BOS and EOS taken off."""
    if len(document) and not 0 <= document.min() <= document.max() < tokenizer.vocab_size:
        worst = document.max() if document.max() >= tokenizer.vocab_size else document.min()
        return None, None, f"id {worst} is outside the vocabulary of {tokenizer.vocab_size}", None
    ids = document.tolist()
    while ids and ids[-1] == tokenizer.eos_id:
        ids.pop()
    ids = ids[1:] if ids and ids[0] == tokenizer.bos_id else ids
    if tokenizer.bos_id in ids or tokenizer.eos_id in ids:
        return None, None, "BOS or EOS inside the document", None
    text = tokenizer.decode(ids)
    return (text, language, None, ids) if text.strip() else (None, None, "holds no text", None)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Ids of all documents, each with BOS and EOS, and their rows of the table."""
    new = iter(tokenizer.encode_batch([piece.text for piece in batch if piece.ids is None]))
    ids = [next(new) if piece.ids is None else piece.ids for piece in batch]
    texts = [piece.text.encode() for piece in batch]
    hashes = b"".join(xxhash.xxh3_128_digest(text, SPLIT_KEY) for text in texts)
    table = np.empty(len(batch), TABLE)
    table["high"], table["low"] = np.frombuffer(hashes, ">u8").reshape(-1, 2).T
    table["row"] = [piece.row for piece in batch]
    out, table["tokens"] = tokenizer.frame(ids)
    table["bytes"] = [len(text) for text in texts]
    return out, table
