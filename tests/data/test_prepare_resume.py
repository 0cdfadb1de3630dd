"""Preparations that are killed, share a folder, or find their inputs changed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import SOURCES, TOKENIZER
from test_prepare import contents, numbered, rows

from data import DataError, TokenCorpus
from data.prepare import Selection, prepare, prepare_cached
from data.sources import SourceSpec

ROOT = Path(__file__).parents[2]

# A preparation in many small units that kills itself when it comes to a step, or the n-th time it does.
PREPARE = """
import os, sys
import data.prepare, data.prepare.encode, data.prepare.gather, data.files
data.prepare.plan.UNIT_BYTES = 60_000
tokenizer, out, deadly, nth, workers, *sources = sys.argv[1:]
places = {"baseline": (data.prepare.gather, "baselines_of"), "rename": (data.files.os, "rename"),
          "replace": (data.files.os, "replace")}
if deadly:
    module, name = places[deadly]
    real, calls = getattr(module, name), []
    def step(*arguments):
        calls.append(1)
        if len(calls) == int(nth):
            os.kill(os.getpid(), 9)
        return real(*arguments)
    setattr(module, name, step)
if workers == "cached":
    print(data.prepare.prepare_cached(sources, tokenizer, out))
else:
    print(data.prepare.prepare(sources, tokenizer, out, workers=int(workers)))
"""


def start(sources: list[Path], out: Path, workers: str, deadly: str = "", nth: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(TOKENIZER), str(out), deadly, str(nth), workers, *map(str, sources)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    return output.strip()


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize(("deadly", "nth"), [("replace", 3), ("replace", 8), ("baseline", 1), ("rename", 1)])
def test_a_killed_prepare_goes_on(deadly: str, nth: int, small_sources: list[Path], tmp_path: Path) -> None:
    process = start(small_sources, tmp_path / "out", "1", deadly, nth)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert visible(tmp_path) == []
    (work,) = tmp_path.iterdir()
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("*.json") if path.stem.isdigit()}
    kept = {path: path.stat().st_ino for path in work.glob("[0-9]*.bin") if path.with_suffix(".json").exists()}
    assert bool(done) == (nth == 8 or deadly != "replace")
    opened = [os.open(path, os.O_RDONLY) for path in kept]  # their inodes are not given to others while they are open
    prepare(small_sources, TOKENIZER, tmp_path / "out")
    assert [os.fstat(descriptor).st_ino for descriptor in opened] == list(kept.values())
    for descriptor in opened:
        os.close(descriptor)
    assert contents(tmp_path / "out") == contents(prepare(small_sources, TOKENIZER, tmp_path / "undisturbed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_finished_units_are_not_read_again(
    small_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(small_sources, tmp_path / "out", "1", "baseline").communicate()

    def unexpected(*_: object) -> None:
        raise AssertionError("a finished unit is encoded again")

    monkeypatch.setattr("data.prepare.workers.encode_unit", unexpected)
    chosen = Selection(seed=5, dedup=False)  # what comes after the tokens may differ from the first run
    sources = [SourceSpec(source.stem, str(source), weight=3.0) for source in small_sources]
    corpus = TokenCorpus.open(prepare(sources, TOKENIZER, tmp_path / "out", selection=chosen))
    corpus.verify()
    assert [source.weight for source in corpus.manifest.sources.values()] == [3.0, 3.0]


def kill_until_done(sources: list[Path], out: Path, kills: int, expected: dict[str, bytes], seconds: float) -> None:
    """Kill preparations of `out` after random times, then let one finish."""
    delays = random.Random(kills)
    for _ in range(kills):
        process = start(sources, out, "2")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=delays.uniform(0, seconds))
        process.kill()
        process.communicate()
        if out.exists():
            assert contents(out) == expected
            return
    finish(start(sources, out, "2"))
    assert contents(out) == expected


def test_kills_at_a_few_moments(small_sources: list[Path], tmp_path: Path) -> None:
    expected = contents(prepare(small_sources, TOKENIZER, tmp_path / "expected"))
    kill_until_done(small_sources, tmp_path / "out", 3, expected, seconds=5.0)


@pytest.mark.slow
def test_kills_at_any_moment(tmp_path: Path) -> None:
    expected = contents(prepare(SOURCES, TOKENIZER, tmp_path / "expected"))
    for attempt in range(4):
        kill_until_done(SOURCES, tmp_path / f"out{attempt}", 5, expected, seconds=8.0)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    process = start(SOURCES, tmp_path / "out", "2")
    wait_for(lambda: len(children(process.pid)) == 2)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_worker_that_is_killed_is_reported(tmp_path: Path) -> None:
    process = start(SOURCES, tmp_path / "out", "2")
    wait_for(lambda: len(children(process.pid)) == 2)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "the worker that read it was killed by signal 9; fewer --workers need less memory" in errors


def test_bad_input_in_a_worker_is_one_line(tmp_path: Path) -> None:
    bad = rows(tmp_path / "bad.jsonl", numbered(5))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(b"\x1f\x8b\x08\x00" + bytes(40))
    with pytest.raises(DataError, match=r"cut.jsonl.gz:1: damaged") as caught:
        prepare([bad, cut], TOKENIZER, tmp_path / "out", workers=2)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "cut.jsonl.gz"]


def test_a_changed_input_is_refused_on_going_on(small_sources: list[Path], tmp_path: Path) -> None:
    copies = [tmp_path / "in" / source.name for source in small_sources]
    copies[0].parent.mkdir()
    for source, copy in zip(small_sources, copies, strict=True):
        copy.write_bytes(source.read_bytes())
    start(copies, tmp_path / "out", "1", "baseline").communicate()
    original = copies[0].stat()
    copies[0].write_bytes(copies[0].read_bytes() + b'{"text": "more", "lang": "en"}\n')
    with pytest.raises(DataError, match=r"en.jsonl: has changed since this preparation began; remove .*out.work-"):
        prepare(copies, TOKENIZER, tmp_path / "out")
    copies[0].write_bytes(small_sources[0].read_bytes())
    os.utime(copies[0], ns=(original.st_atime_ns, original.st_mtime_ns))
    prepare(copies, TOKENIZER, tmp_path / "out")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = rows(tmp_path / "a.jsonl", numbered(50))
    encode = __import__("data.prepare.encode", fromlist=["_encode"])._encode

    def meddle(*arguments: object) -> object:
        os.utime(source, ns=(1, 1))
        return encode(*arguments)

    monkeypatch.setattr("data.prepare.encode._encode", meddle)
    with pytest.raises(DataError, match=r"a.jsonl: has changed since the work began"):
        prepare([source], TOKENIZER, tmp_path / "out")


def test_the_cache_is_reused_until_an_input_changes(small_sources: list[Path], tmp_path: Path) -> None:
    first = prepare_cached(small_sources, TOKENIZER, tmp_path)
    written = (first / "manifest.json").stat().st_mtime_ns
    assert prepare_cached(small_sources[::-1], TOKENIZER, tmp_path) == first
    assert (first / "manifest.json").stat().st_mtime_ns == written
    assert prepare_cached(small_sources, TOKENIZER, tmp_path, seed=1) != first
    assert prepare_cached(small_sources[:1], TOKENIZER, tmp_path) != first
    with pytest.raises(DataError, match="none.json: no such file"):
        prepare_cached(small_sources[:1], tmp_path / "none.json", tmp_path / "cache")


@pytest.mark.parametrize("name", ["train-en-00000.bin", "train-en-00000.idx", "manifest.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(name: str, small_sources: list[Path], tmp_path: Path) -> None:
    folder = prepare_cached(small_sources, TOKENIZER, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert prepare_cached(small_sources, TOKENIZER, tmp_path) == folder
    assert (folder / name).read_bytes() == content


def test_a_cache_on_read_only_storage_is_read(
    small_sources: list[Path], tmp_path: Path, make_read_only: Callable[[], None]
) -> None:
    folder = prepare_cached(small_sources, TOKENIZER, tmp_path)
    make_read_only()
    assert prepare_cached(small_sources, TOKENIZER, tmp_path) == folder
    with pytest.raises(OSError, match="Read-only"):
        prepare_cached(small_sources, TOKENIZER, tmp_path, seed=1)


def test_processes_share_one_cache(small_sources: list[Path], tmp_path: Path) -> None:
    processes = [start(small_sources, tmp_path, "cached") for _ in range(2)]
    outputs = [finish(process) for process in processes]
    assert len(set(outputs)) == 1
    TokenCorpus.open(outputs[0]).verify()
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
