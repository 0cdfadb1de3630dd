from __future__ import annotations

import json
import lzma
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import SOURCES, TOKENIZER

from data import DataError, Document, TokenCorpus, Tokenizer, read_jsonl
from data.baseline import xz_bits_per_byte, xz_primed_bits_per_byte
from data.prepare import main, prepare, prepare_cached
from data.split import HELD_OUT, split_documents


def sample_documents() -> list[Document]:
    return [document for source in SOURCES for document in read_jsonl(source)]


def test_the_split_is_disjoint_and_large_enough() -> None:
    documents = sample_documents()
    train, validation = split_documents(documents)
    assert {d.text for d in train}.isdisjoint(d.text for d in validation)
    assert sorted((*train, *validation), key=repr) == sorted(documents, key=repr)
    for language in ("en", "zh"):
        assert sum(d.num_bytes for d in validation if d.language == language) >= 110_000
    for group in {(d.language, d.source) for d in documents}:
        sizes = [sum(d.num_bytes for d in part if (d.language, d.source) == group) for part in (train, validation)]
        assert HELD_OUT * sum(sizes) <= sizes[1] < sizes[0] / 5


def test_the_split_does_not_depend_on_order_or_on_other_groups() -> None:
    documents = sample_documents()
    _, validation = split_documents(documents)
    assert set(split_documents(documents[::-1])[1]) == set(validation)
    poems = [d for d in documents if d.source == "poetry"]
    assert split_documents(poems)[1] == [d for d in validation if d.source == "poetry"]


def test_a_repeated_text_stays_on_one_side() -> None:
    documents = [Document(f"text {number}", "en", "a") for number in range(50)]
    copies = [Document(d.text, "en", "b") for d in documents] + documents
    train, validation = split_documents(documents + copies)
    assert validation
    assert {d.text for d in train}.isdisjoint(d.text for d in validation)
    assert split_documents([Document("same", "en", "a")] * 3)[1] == []


def test_tokens_in_the_folder_are_the_documents(sample_corpus: TokenCorpus) -> None:
    tokenizer = Tokenizer.load(sample_corpus.tokenizer_path)
    parts = dict(zip(("train", "validation"), split_documents(sample_documents()), strict=True))
    for split, documents in parts.items():
        for language in sample_corpus.languages:
            source = sample_corpus.split(split).source(language)
            tokens = source.tokens(0, source.num_tokens)
            starts = np.flatnonzero(source.document_starts(0, source.num_tokens))
            pieces = np.split(tokens, starts[1:])
            assert all(p[0] == tokenizer.bos_id and p[-1] == tokenizer.eos_id for p in pieces)
            texts = [tokenizer.decode(piece.tolist()) for piece in pieces]
            expected = [d.text for d in documents if d.language == language]
            assert sorted(texts) == sorted(expected)
            assert texts != expected
            assert source.text_bytes == sum(len(text.encode()) for text in texts)
    sample_corpus.verify()


def test_baselines_are_those_of_xz(sample_corpus: TokenCorpus, tmp_path: Path) -> None:
    _, validation = split_documents(sample_documents())
    for language, baseline in sample_corpus.manifest.validation.items():
        source = sample_corpus.split("validation").source(language)
        tokens = source.tokens(0, source.num_tokens).tolist()
        text = Tokenizer.load(TOKENIZER).decode(tokens).encode()
        assert len(text) == sum(d.num_bytes for d in validation if d.language == language)
        packed = subprocess.run([sys.executable, "-c", XZ], input=text, capture_output=True, check=True).stdout
        assert baseline.xz_bits_per_byte == len(packed) * 8 / len(text)
        assert 1 < baseline.xz_primed_bits_per_byte < baseline.xz_bits_per_byte < 4


XZ = "import sys, lzma; sys.stdout.buffer.write(lzma.compress(sys.stdin.buffer.read(), preset=9))"


def test_priming_counts_only_what_the_text_adds() -> None:
    text = os.urandom(4000)
    assert xz_primed_bits_per_byte(text, text) < 1
    assert 8 < xz_bits_per_byte(text) < 8.2
    assert round(xz_bits_per_byte(text) * 500) == len(lzma.compress(text, preset=9))


def test_the_seed_orders_documents_and_files_do_not(small_sources: list[Path], tmp_path: Path) -> None:
    digests = {
        name: TokenCorpus.open(prepare(sources, TOKENIZER, tmp_path / name, seed)).digest
        for name, sources, seed in (
            ("first", small_sources, 0),
            ("reversed", small_sources[::-1], 0),
            ("other", small_sources, 1),
        )
    }
    assert digests["first"] == digests["reversed"] != digests["other"]


def test_large_vocabularies_get_wide_ids(small_sources: list[Path], tmp_path: Path) -> None:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"unused{number}" * 3: number for number in range(8192, 70_000)}
    (tmp_path / "wide.json").write_text(json.dumps(content), encoding="utf-8")
    wide = TokenCorpus.open(prepare(small_sources, tmp_path / "wide.json", tmp_path / "wide"))
    plain = TokenCorpus.open(prepare(small_sources, TOKENIZER, tmp_path / "plain"))
    assert (wide.manifest.dtype, plain.manifest.dtype) == ("uint32", "uint16")
    assert np.array_equal(*(c.split("train").source("zh").tokens(0, 500) for c in (wide, plain)))


def test_refusals(small_sources: list[Path], tmp_path: Path) -> None:
    en = small_sources[0]
    empty, single, copy, bad = (tmp_path / name for name in ("empty.jsonl", "single.jsonl", "copy.jsonl", "bad.jsonl"))
    empty.write_bytes(b"")
    single.write_text('{"text": "one", "lang": "fr"}\n', encoding="utf-8")
    copy.write_bytes(en.read_bytes())
    bad.write_text('{"text": "one", "lang": "fr"}\n{"text": ""}\n', encoding="utf-8")
    cases = {
        "no source files": [],
        "empty.jsonl: is empty": [en, empty],
        "language fr: too few documents": [en, single],
        "en.jsonl: has the same content as en.jsonl": [en, en],
        "copy.jsonl: has the same content as en.jsonl": [en, copy],
        "bad.jsonl:2: `text` must be": [en, bad],
        "none.jsonl: no such file": [tmp_path / "none.jsonl"],
    }
    before = sorted(tmp_path.iterdir())
    for reason, sources in cases.items():
        with pytest.raises(DataError, match=reason):
            prepare(sources, TOKENIZER, tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DataError, match="seed: -1 is out of range"):
        prepare([en], TOKENIZER, tmp_path / "out", seed=-1)
    with pytest.raises(DataError, match="none.json: no such file"):
        prepare_cached([en], tmp_path / "none.json", tmp_path / "cache")
    with pytest.raises(DataError, match="exists already"):
        prepare([en], TOKENIZER, tmp_path)


def test_a_full_disk_leaves_nothing(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("data.files._sync", full)
    sources = [part for source in small_sources for part in ("--source", str(source))]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare", *sources, "--tokenizer", str(TOKENIZER), "--out", str(out)])
    assert main() == 77
    assert capsys.readouterr().err.endswith("No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_facts(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [part for source in small_sources for part in ("--source", str(source))]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["prepare", *sources, "--tokenizer", str(TOKENIZER), "--out", str(out), "--json"])
    assert main() == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["folder"] == str(out)
    assert facts["splits"]["train"]["zh"]["tokens"] == TokenCorpus.open(out).split("train").source("zh").num_tokens
    assert main() == 77
    assert capsys.readouterr().err == f"error: {out}: exists already, choose another folder or remove it\n"


def test_the_cache_is_reused_until_an_input_changes(small_sources: list[Path], tmp_path: Path) -> None:
    first = prepare_cached(small_sources, TOKENIZER, tmp_path)
    written = (first / "manifest.json").stat().st_mtime_ns
    assert prepare_cached(small_sources[::-1], TOKENIZER, tmp_path) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert prepare_cached(small_sources, TOKENIZER, tmp_path, seed=1) != first
    assert prepare_cached(small_sources[:1], TOKENIZER, tmp_path) != first


@pytest.mark.parametrize("name", ["train-en-00000.bin", "train-en-00000.idx", "manifest.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(name: str, small_sources: list[Path], tmp_path: Path) -> None:
    folder = prepare_cached(small_sources, TOKENIZER, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert prepare_cached(small_sources, TOKENIZER, tmp_path) == folder
    assert (folder / name).read_bytes() == content


PREPARE = """
import sys
import data.prepare
from data.files import os
tokenizer, cache, deadly, *sources = sys.argv[1:]
if deadly:
    module, name = {"baseline": (data.prepare, "_baseline"), "rename": (os, "rename")}[deadly]
    setattr(module, name, lambda *_: os.kill(os.getpid(), 9))
print(data.prepare.prepare_cached(sources, tokenizer, cache))
"""


def start(sources: list[Path], cache: Path, deadly: str = "") -> subprocess.Popen[str]:
    """Prepare in a new process that kills itself when it comes to the step `deadly`."""
    command = [sys.executable, "-c", PREPARE, str(TOKENIZER), str(cache), deadly, *map(str, sources)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("deadly", ["baseline", "rename"])
def test_a_killed_prepare_leaves_no_half_folder(deadly: str, small_sources: list[Path], tmp_path: Path) -> None:
    process = start(small_sources, tmp_path, deadly)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*.tmp-*/train-en-00000.bin"))
    assert visible(tmp_path) == []
    TokenCorpus.open(prepare_cached(small_sources, TOKENIZER, tmp_path)).verify()


@pytest.mark.slow
def test_kills_at_any_moment(tmp_path: Path) -> None:
    """Killed after growing delays; whatever is visible then is whole, and the next call succeeds."""
    delay = 1.0
    while not visible(tmp_path):
        process = start(SOURCES, tmp_path)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=delay)
        process.kill()
        process.communicate()
        for folder in visible(tmp_path):
            TokenCorpus.open(folder).verify()
        delay += 0.4
    assert delay > 1.4


def test_processes_share_one_cache(small_sources: list[Path], tmp_path: Path) -> None:
    processes = [start(small_sources, tmp_path) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [error for _, error in outputs] == [""] * 2
    assert len({folder for folder, _ in outputs}) == 1
    TokenCorpus.open(outputs[0][0].strip()).verify()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_without_locks_the_first_rename_wins(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    together = threading.Barrier(3)
    renames: list[str] = []
    rename = os.rename

    def meet(source: Path, target: Path) -> None:
        together.wait(timeout=60)
        renames.append(str(source))
        rename(source, target)

    monkeypatch.setattr("fcntl.flock", no_locks)
    monkeypatch.setattr("os.rename", meet)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(prepare_cached(small_sources, TOKENIZER, tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(renames) == len(folders) == 3
    assert len(set(folders)) == 1
    TokenCorpus.open(folders[0]).verify()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
