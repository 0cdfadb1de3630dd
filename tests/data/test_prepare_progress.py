from __future__ import annotations

import pytest

from data.prepare.progress import Progress, UnitProgress


def test_lines_say_how_far_how_fast_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.prepare.progress.SECONDS_BETWEEN_LINES", 0.0)
    with Progress(total=4000, done=1000, quiet=False) as progress:
        unit = UnitProgress(progress, 2000)
        unit.report(500, 100)
        unit.report(5000, 900)  # text of a compressed file is longer than the file
        unit.finish()
        UnitProgress(progress, 1000).finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["38", "75", "75", "100"]
    assert all("tokens/s" in line and "B/s" in line and "<" in line for line in lines)


def test_lines_are_seldom_and_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with Progress(total=1000, done=0, quiet=quiet) as progress:
            for _ in range(1000):
                progress.advance(1, 1)
        assert capsys.readouterr().err == ""
