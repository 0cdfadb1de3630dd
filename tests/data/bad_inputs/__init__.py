"""Malformed inputs by family, each with the line that must refuse it; `tests/data/test_bad_inputs.py` runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TOKENIZER

from data.prepare import Selection, prepare
from data.sources import SourceSpec

Attempt = Callable[[], object]
GOOD_ROWS = 4


@dataclass(frozen=True)
class Bench:
    """What a case may use.

    Attributes:
        folder: empty, for the bad input.
        canary: a path that appears when something in the input has been executed.
        patch: undone after the case.
        corpus: a good prepared corpus, not to be touched.
    """

    folder: Path
    canary: Path
    patch: pytest.MonkeyPatch
    corpus: Path

    def write(self, name: str, content: bytes) -> Path:
        """A file in `folder`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def prepare(self, path: object, language: str | None = "en", **fields: Any) -> Attempt:
        """An attempt to prepare `path` as the only source, all rows but one allowed to be bad."""
        return lambda: prepare(
            [SourceSpec("books", str(path), language=language, **fields)],
            TOKENIZER,
            self.folder / "out",
            selection=Selection(max_bad_rows=1.0),
        )


@dataclass(frozen=True)
class Refused:
    """`make` writes the input and returns what reads it; one line matching `reason` must refuse it."""

    make: Callable[[Bench], Attempt]
    reason: str


@dataclass(frozen=True)
class Quarantined:
    """`make` writes a file of good rows and a bad one, number `row`, and returns how to prepare it: it must be left
    out, counted once, and listed with `reason`."""

    make: Callable[[Bench], Attempt]
    reason: str
    row: int = GOOD_ROWS + 1


Case = Refused | Quarantined


def json_line(**row: object) -> bytes:
    """A row of JSON Lines."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


GOOD_LINES = b"".join(json_line(text=f"Good row {number}", lang="en") for number in range(GOOD_ROWS))


def flipped(content: bytes, place: int) -> bytes:
    """`content` with all bits of one byte turned round."""
    damaged = bytearray(content)
    damaged[place] ^= 0xFF
    return bytes(damaged)
