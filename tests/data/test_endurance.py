"""Long reading and many kills: memory, file descriptors, shared memory, processes, and the order of what is read."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from data import TokenCorpus
from tests.data.reading import CACHE, CORPUS, MODES, SIZE, STATE, digest, open_loader

ROOT = Path(__file__).parents[2]
MARK = "READING_TEST"
BATCHES, WARM = 20_000, 2_000
KILLS = 20
MOST_GROWTH = 16  # MiB; a leak of a step of 16 x 64 tokens would be 150 or more

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc"),
]


class Reading:
    """A reading process with its workers, which are known by a mark in their environment."""

    def __init__(self, mode: str, folder: Path, steps: int) -> None:
        self._mark = f"{MARK}={uuid.uuid4()}".encode()
        environment = {**os.environ, **dict([self._mark.decode().split("=")]), "TMPDIR": str(folder / "tmp")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.data.reading", mode, str(folder), str(steps)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def lines(self) -> Iterator[tuple[int, str]]:
        """Steps and their digests as they are printed; a line cut by a kill is left out."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                step, content = line.split()
                yield int(step), content.decode()

    def members(self) -> list[Path]:
        """The /proc folders of the process and its workers, as far as they live."""
        return [path for path in Path("/proc").glob("[0-9]*") if self._mark in _read(path / "environ")]

    def wait_until_gone(self, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < end, f"outlived their parent: {[_read(path / 'cmdline') for path in left]}"
            time.sleep(0.05)


@dataclass(frozen=True)
class Usage:
    """Of a process and its workers together: MiB that are resident and that no file backs, open files."""

    processes: int
    resident: int
    anonymous: int
    descriptors: int

    @classmethod
    def of(cls, reading: Reading) -> Usage:
        members = reading.members()
        rollups = [(path / "smaps_rollup").read_text() for path in members]
        resident, anonymous = (
            sum(int(kilobytes) for text in rollups for kilobytes in re.findall(rf"^{name}: +(\d+) kB", text, re.M))
            >> 10
            for name in ("Rss", "Anonymous")
        )
        return cls(len(members), resident, anonymous, sum(len(list((path / "fd").iterdir())) for path in members))


def shared_memory(reading: Reading) -> list[str]:
    """What the process and its workers have of /dev/shm, mapped or open."""
    found = []
    for path in reading.members():
        found += [line for line in _read(path / "maps").decode().splitlines() if "/dev/shm" in line]
        with suppress(OSError):  # it has just ended
            found += [str(link) for link in (path / "fd").iterdir() if str(link.readlink()).startswith("/dev/shm")]
    return found


def _read(path: Path) -> bytes:
    with suppress(OSError):  # it has just ended
        return path.read_bytes()
    return b""


@contextmanager
def started(mode: str, folder: Path, steps: int) -> Iterator[Reading]:
    reading = Reading(mode, folder, steps)
    try:
        yield reading
    finally:
        reading.process.kill()
        reading.process.communicate()


@pytest.fixture
def folder(tmp_path: Path, sample_corpus: TokenCorpus) -> Path:
    """A prepared corpus, the plan of a streamed one, and a folder for temporary files."""
    (tmp_path / CORPUS).symlink_to(sample_corpus.folder)
    open_loader("text", tmp_path, workers=0).close()
    (tmp_path / "tmp").mkdir()
    return tmp_path


@pytest.mark.parametrize("mode", MODES)
def test_nothing_grows_over_20000_batches(mode: str, folder: Path) -> None:
    with started(mode, folder, WARM + BATCHES) as reading:
        lines = reading.lines()
        for _ in range(WARM):
            next(lines)
        before = Usage.of(reading)
        assert sum(1 for _, _ in zip(range(BATCHES), lines, strict=False)) == BATCHES
        after = Usage.of(reading)
        print(f"\n{mode}: {before}\n{' ' * len(mode)}  {after}")
        assert before.processes == after.processes == {"tokens": 1, "text": 3}[mode]
        assert after.anonymous - before.anonymous < MOST_GROWTH
        assert after.descriptors <= before.descriptors + 2  # a worker may just read a file
        assert shared_memory(reading) == []
        reading.process.communicate(b"")
        assert reading.process.returncode == 0
        assert reading.members() == []
    assert list((folder / "tmp").iterdir()) == []


@pytest.mark.parametrize("mode", MODES)
def test_20_kills_leave_nothing_behind_and_change_nothing(mode: str, folder: Path) -> None:
    kept = sorted(path for part in (CORPUS, CACHE) for path in (folder / part).rglob("*"))
    dice = random.Random(mode)
    seen: dict[int, str] = {}
    for _ in range(KILLS):
        saved = _saved(folder)
        with started(mode, folder, 10**9) as reading:
            found = _read_and_kill(reading, dice)
            reading.wait_until_gone()
        assert [step for step, _ in found] == list(range(saved, saved + len(found)))
        assert saved <= _saved(folder) <= saved + len(found)
        for step, content in found:
            assert seen.setdefault(step, content) == content
    straight = open_loader(mode, folder, workers=0)
    assert [seen[step] for step in sorted(seen)] == [digest(next(straight)) for _ in seen]
    straight.close()
    assert sorted(seen) == list(range(len(seen)))
    print(f"\n{mode}: {len(seen)} steps, {_saved(folder)} of them saved")
    assert sorted(path for part in (CORPUS, CACHE) for path in (folder / part).rglob("*")) == kept
    assert list((folder / "tmp").iterdir()) == []


def _saved(folder: Path) -> int:
    """Steps of the saved state."""
    path = folder / STATE
    return json.loads(path.read_bytes())["consumed"] // SIZE if path.exists() else 0


def _read_and_kill(reading: Reading, dice: random.Random) -> list[tuple[int, str]]:
    """Kill the process while it starts, or after some steps; all that it had printed."""
    lines = reading.lines()
    wanted = dice.choice([0, 1, dice.randint(2, 200)])
    found = [line for _, line in zip(range(wanted), lines, strict=False)]
    time.sleep(dice.uniform(0, 0.02 if wanted else 3.0))
    assert shared_memory(reading) == []
    reading.process.kill()
    return found + list(lines)
