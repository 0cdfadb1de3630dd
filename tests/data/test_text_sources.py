"""Text tokenised while training: units, what is bad in the sources, and what becomes of worker processes."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import DataError, StreamSpec
from data.prepare.filters import Filters
from data.sources import SourceSpec
from data.text import feed, plan
from data.text.corpus import TextCorpus
from data.text.loader import TextLoader
from data.text.reader import Reader
from data.text.stream import TextStream
from tests.data.conftest import TOKENIZER

TEXTS = [f"text {number} " + "of some length " * (number % 9) for number in range(300)]
STREAMS = 4


def lines(texts: list[str], **more: str) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def corpus_of(path: Path, language: str | None = "en", streams: int = STREAMS, **settings: Any) -> TextCorpus:
    source = SourceSpec("en", str(path), language=language)
    cache = path.parent / "cache"
    return TextCorpus.open([source], TOKENIZER, streams=streams, cache_dir=cache, **settings)


def loader_of(corpus: TextCorpus, workers: int = 0, **settings: Any) -> TextLoader:
    stream = TextStream(corpus, StreamSpec.single_stage(64, {"en": 1}))
    return TextLoader(stream, STREAMS, STREAMS, workers=workers, **settings)


def shards(folder: Path, number: int, write: Callable[[Path, list[str]], object]) -> Path:
    folder.mkdir()
    for place in range(number):
        write(folder / f"{place:03}", TEXTS[place::number])
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "large parquet", "arrow", "gzip"])
def test_units_hold_every_row_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def arrow(path: Path) -> None:
        table = pa.table({"text": TEXTS})
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=70)

    if kind == "large parquet":
        monkeypatch.setattr(plan, "MAX_BLOCK_BYTES", 1000)
        monkeypatch.setattr(plan, "MAX_UNIT_BYTES", 300)
    path = tmp_path / "source"
    if kind == "gzip":
        shards(path, 6, lambda file, texts: file.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines(texts))))
    elif kind == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_bytes(lines(TEXTS))
    elif kind == "arrow":
        path = tmp_path / "a.arrow"
        arrow(path)
    else:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=200)
    corpus = corpus_of(path, held_out=0)
    units = range(len(corpus.plan.units[0]))
    assert len(units) >= (6 if kind == "gzip" else 4 * STREAMS)
    reader = Reader(corpus, cache_bytes=1)
    found = [reader.texts(0, number) for number in units]
    assert sorted(str(text) for unit in found for text in unit) == sorted(TEXTS)
    assert all(len(unit) <= plan.MAX_UNIT_ROWS for unit in found)
    blocks = {corpus.plan.block(0, number)[0] for number in units}
    assert len(blocks) == {"parquet": 2, "arrow": 5, "gzip": 6}.get(kind, len(units))
    assert np.array_equal(corpus_of(path, held_out=0).plan.units[0], corpus.plan.units[0])


def test_blocks_are_dropped_when_memory_is_short(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=100)
    corpus = corpus_of(tmp_path / "a.parquet")
    units = range(len(corpus.plan.units[0]))
    opened: list[str] = []
    plenty = Reader(corpus, opened.append)
    whole = [plenty.texts(0, number) for number in (*units, *units)]
    assert len(opened) == 3
    opened.clear()
    short = Reader(corpus, opened.append, cache_bytes=1)
    assert [short.texts(0, number) for number in (*units, *units)] == whole
    assert len(opened) == 6


def test_bad_rows_are_left_out_and_named(tmp_path: Path) -> None:
    rows = lines(TEXTS).splitlines(keepends=True)
    rows[7], rows[120] = b"{broken\n", b'{"text": ""}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(rows))
    for workers in (0, 1):
        reported: list[str] = []
        loader = loader_of(corpus_of(path), workers, report=reported.append)
        for _ in range(40):
            next(loader)
        loader.close()
        assert loader.bad_rows["en"] >= 2
        assert any("not JSON" in line for line in reported)
        assert any(str(path) in line and "must be a string that is not empty" in line for line in reported)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_end_the_run(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [None if number % 5 == 2 else text for number, text in enumerate(TEXTS)]}), path)
    loader = loader_of(corpus_of(path), workers)
    with pytest.raises(DataError, match=r"a\.parquet:3: `text` must be .*; 60 of 300 rows of source en are bad, 1.00%"):
        next(loader)
    assert next(iter([loader.state_dict()["consumed"]])) == 0
    loose = loader_of(corpus_of(path, max_bad_rows=0.5))
    next(loose)
    loose.close()


def test_language_comes_from_the_rows_and_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS, lang="fr"))
    assert corpus_of(path, None).languages == ("fr",)
    path.write_bytes(lines(TEXTS, lang="fr") + lines(TEXTS, lang="de"))
    loader = loader_of(corpus_of(path, None))
    with pytest.raises(DataError, match="source en has rows of fr and de"):  # noqa: PT012
        for _ in range(100):
            next(loader)
    loader.close()


def test_filters_leave_documents_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    corpus = corpus_of(path, filters=Filters(min_chars=60))
    reader = Reader(corpus)
    kept = [text for number in range(len(corpus.plan.units[0])) for text in reader.texts(0, number) if text]
    assert kept
    assert min(map(len, kept)) >= 60
    assert corpus.digest != corpus_of(path).digest
    monkeypatch.setattr(feed, "MOST_BARREN", 500)
    with pytest.raises(DataError, match="source en: 500 rows on end leave nothing to train on"):
        next(loader_of(corpus_of(path, filters=Filters(min_chars=10**6))))


def test_sources_that_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines(TEXTS)))
    with pytest.raises(DataError, match="source en: has 1 units to deal to 4 streams; set data.streams to 1 or less"):
        corpus_of(path)
    monkeypatch.setattr(plan, "MAX_PACKED_BYTES", 10)
    with pytest.raises(DataError, match="unpack it or use data.prepare"):
        corpus_of(path)
    (tmp_path / "ids.npy").write_bytes(bytes(64))
    source = SourceSpec("ids", str(tmp_path / "ids.npy"), language="en", format="olmo")
    with pytest.raises(DataError, match="holds token ids, only data.prepare reads them"):
        TextCorpus.open([source], TOKENIZER, cache_dir=tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_ends_the_run(workers: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    corpus = corpus_of(path)
    path.write_bytes(lines(TEXTS[::-1]) + b"\n")
    with pytest.raises(DataError, match=r"a\.jsonl: has changed since"):
        next(loader_of(corpus, workers))


def test_a_changed_tokenizer_is_noticed_by_workers(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "a.jsonl", tmp_path / "tokenizer.json"
    path.write_bytes(lines(TEXTS))
    tokenizer.write_bytes(TOKENIZER.read_bytes())
    source = SourceSpec("en", str(path), language="en")
    corpus = TextCorpus.open([source], tokenizer, streams=STREAMS, cache_dir=tmp_path)
    tokenizer.write_bytes(TOKENIZER.read_bytes() + b"\n")
    with pytest.raises(DataError, match=r"tokenizer\.json: has changed"):
        next(loader_of(corpus, 1))


def workers_of(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"data.text.worker" in command:
            found.append(int(path.name))
    return found


def test_a_killed_worker_is_an_error_and_the_loader_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    corpus = corpus_of(path)
    straight, loader = loader_of(corpus), loader_of(corpus, 2)
    wanted = [next(straight)[0].input_ids for _ in range(8)]
    straight.close()
    got = [next(loader)[0].input_ids for _ in range(2)]
    for worker in workers_of(os.getpid()):
        os.kill(worker, signal.SIGTERM)  # ends the run, which is the parent's business
    got.append(next(loader)[0].input_ids)
    os.kill(workers_of(os.getpid())[0], signal.SIGKILL)
    with pytest.raises(DataError, match=r"data worker \d was killed by signal 9, the last file it read is .*a\.jsonl"):  # noqa: PT012
        while True:
            got.append(next(loader)[0].input_ids)
    assert workers_of(os.getpid()) == []
    for _ in range(2):
        got.append(next(loader)[0].input_ids)
    loader.close()
    straight = loader_of(corpus)
    for batch in got:
        assert batch.equal(next(straight)[0].input_ids)
    straight.close()
    assert all(a.equal(b) for a, b in zip(wanted, got, strict=False))


PARENT = """
import sys, time
from pathlib import Path
from tests.data.test_text_sources import corpus_of, loader_of
loader = loader_of(corpus_of(Path(sys.argv[1])), 2)
next(loader)
print("ready", flush=True)
time.sleep(600)
"""


def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PARENT, str(path)], stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 2
        parent.kill()
    for _ in range(100):
        if not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlived its parent")
