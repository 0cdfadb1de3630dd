"""The bundled corpus, prepared once, and a small one that tests may damage."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data import Document, TokenCorpus
from data.prepare import prepare
from data.sources import read_documents
from data.sources.spec import source_of_path

SAMPLE = Path(__file__).parents[2] / "data" / "sample"
SOURCES = [SAMPLE / "en.jsonl", SAMPLE / "zh.jsonl"]
TOKENIZER = SAMPLE / "tokenizer.json"


def documents_of(path: Path) -> list[Document]:
    """The documents of a file."""
    return list(read_documents(source_of_path(path)))


@pytest.fixture(scope="session")
def sample_corpus(tmp_path_factory: pytest.TempPathFactory) -> TokenCorpus:
    return TokenCorpus.open(prepare(SOURCES, TOKENIZER, tmp_path_factory.mktemp("sample") / "corpus"))


@pytest.fixture(scope="session")
def small_sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first 40 documents of each language, cut to 300 characters."""
    folder = tmp_path_factory.mktemp("sources")
    for source in SOURCES:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:40]]
        lines = [json.dumps(row | {"text": row["text"][:300]}, ensure_ascii=False) for row in rows]
        (folder / source.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def small_folder(small_sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(small_sources, TOKENIZER, tmp_path_factory.mktemp("small") / "corpus")


@pytest.fixture(scope="session")
def small_corpus(small_folder: Path) -> TokenCorpus:
    return TokenCorpus.open(small_folder)


@pytest.fixture
def damaged(small_folder: Path, tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A function that copies the small corpus, lets its argument damage the copy, and returns the copy."""

    def damage(change: Callable[[Path], object]) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(small_folder, folder)
        change(folder)
        return folder

    return damage


@pytest.fixture
def make_read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function from whose call on no lock can be had, as on read-only storage."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def call() -> None:
        for module in ("data.files", "data.prepare"):
            monkeypatch.setattr(f"{module}.locked", refuse)

    return call
