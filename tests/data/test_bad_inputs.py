"""Malformed inputs, a test each: refused in one line, or left out and counted; nothing executed, nothing left behind."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import Bench, Case, Quarantined, tables

from data.errors import DataError
from data.manifest import QUARANTINE, read_manifest
from moe.config import ConfigError

SECONDS = 10
CASES: dict[str, Case] = {**tables.CASES}


@pytest.fixture
def bench(tmp_path: Path, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A case's surroundings: ends it after SECONDS, and finds what it executes or leaves behind."""

    def end(number: int, frame: object) -> None:
        raise TimeoutError(f"not refused within {SECONDS} s")

    (tmp_path / "files").mkdir()
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    yield Bench(tmp_path / "files", tmp_path / "canary", monkeypatch, small_folder)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert not (tmp_path / "canary").exists()
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, bench: Bench) -> None:
    case = CASES[name]
    attempt = case.make(bench)
    before = set(bench.folder.rglob("*"))
    if isinstance(case, Quarantined):
        attempt()
        check_left_out(bench.folder / "out", case)
        return
    with pytest.raises((DataError, ConfigError), match=case.reason) as caught:
        attempt()
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1000
    left = set(bench.folder.rglob("*")) - before
    assert not [path for path in left if path.relative_to(bench.folder).parts[0] != "cache" or ".tmp-" in path.name]


def check_left_out(folder: Path, case: Quarantined) -> None:
    """The row, and only it, is in the list of bad rows and in the count."""
    (entry,) = [json.loads(line) for line in (folder / QUARANTINE).read_text(encoding="utf-8").splitlines()]
    assert (entry["row"], entry["source"]) == (case.row, "books")
    assert Path(entry["file"]).is_file()
    assert case.reason in entry["reason"]
    assert read_manifest(folder).sources["books"].quarantined == 1
