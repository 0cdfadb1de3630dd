"""Malformed inputs, a test each: refused in one line, or left out and counted; nothing executed, nothing left."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import (
    Bench,
    Case,
    Quarantined,
    folders,
    lines,
    remote,
    settings,
    states,
    stores,
    tables,
    tokens,
    vocabularies,
)

from data.errors import DataError
from data.manifest import QUARANTINE, read_manifest
from data.packing import BestFit
from moe.config import ConfigError

SECONDS = 60
FAMILIES = (tables, lines, vocabularies, folders, tokens, states, remote, stores, settings)
CASES: dict[str, Case] = {name: case for family in FAMILIES for name, case in family.CASES.items()}


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
    assert "hunter2" not in message  # the secret in all of these inputs
    left = set(bench.folder.rglob("*")) - before
    assert not [path for path in left if path.relative_to(bench.folder).parts[0] != "cache" or ".tmp-" in path.name]


def check_left_out(folder: Path, case: Quarantined) -> None:
    """The row, and only it, is in the list of bad rows and in the count."""
    (entry,) = [json.loads(line) for line in (folder / QUARANTINE).read_text(encoding="utf-8").splitlines()]
    assert (entry["row"], entry["source"]) == (case.row, "books")
    assert Path(entry["file"]).is_file()
    assert case.reason in entry["reason"]
    assert read_manifest(folder).sources["books"].quarantined == 1


@pytest.mark.parametrize("name", states.PAST_THE_END)
def test_a_position_past_the_end_begins_the_next_pass(name: str, bench: Bench) -> None:
    states.PAST_THE_END[name](bench)()


def test_a_damaged_packing_plan_is_made_anew(tmp_path: Path) -> None:
    ends = np.cumsum(np.random.default_rng(1).integers(2, 90, 200)).astype(np.uint64)
    path = tmp_path / "plan"
    BestFit.cached(path, ends, 64)
    good = path.read_bytes()
    for damaged in states.damaged_plans(path):
        path.write_bytes(damaged)
        plan = BestFit.cached(path, ends, 64)
        assert plan.padding == BestFit.plan(ends, 64).padding
        assert path.read_bytes() == good
    moved = ends.copy()
    moved[0] += 1
    assert BestFit.cached(path, moved, 64).spans(0) == BestFit.plan(moved, 64).spans(0)
    assert path.read_bytes() != good
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]


def test_a_pickled_plan_of_units_is_made_anew_and_not_executed(bench: Bench) -> None:
    corpus = states.text_corpus(bench)
    (units,) = corpus.plan.folder.glob("*.npy")
    content = units.read_bytes()
    with units.open("wb") as file:
        np.save(file, np.array([tokens.Touch(bench.canary)], dtype=object), allow_pickle=True)
    assert states.text_corpus(bench).digest == corpus.digest
    assert units.read_bytes() == content


def test_there_are_enough() -> None:
    assert len(CASES) >= 150
