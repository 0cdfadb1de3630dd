"""Runs on other data settings than the default end as they should, interrupted or not."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from test_resume import interrupt
from training_helpers import final_state, metrics, only_line, train

SETTINGS = {
    "text": ["data.mode=text", "data.streams=4", "data.validation_tokens=256"],
    "packed": ["data.packing=best_fit", "data.intra_document_masking=true", "data.shuffle=full"],
    "ramp": ["train.batch_ramp=[[9,2]]", "train.micro_batch_size=2", "data.skip_ranges=[[10,14]]"],
    "stages": ["data.stages=[{start_step: 7, weights: {zh: 1}}]"],
}
RUN = ["train.steps=24", "checkpoint.interval=5", "train.eval_interval=12"]


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_runs_end_bitwise_equal(name: str, tmp_path: Path, cache: Path) -> None:
    settings = [*RUN, *SETTINGS[name]]
    train(tmp_path / "undisturbed", cache, *settings)
    interrupt(tmp_path / "disturbed", cache, signal.SIGKILL, 2, 0.02, settings)
    train(tmp_path / "disturbed", cache, *settings, "data.workers=2", "data.prefetch=1")
    assert final_state(tmp_path / "disturbed") == final_state(tmp_path / "undisturbed")
    assert metrics(tmp_path / "disturbed") == metrics(tmp_path / "undisturbed")


def test_tokens_count_the_ramp(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, *RUN, *SETTINGS["ramp"])
    rows = [row for row in metrics(tmp_path) if "tokens" in row]
    assert [row["tokens"] for row in rows[:4]] == [32 * n for n in (6, 12, 18, 18 + 3 * 4)]


def test_a_later_stage_trains_on_its_language_alone(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, *RUN, *SETTINGS["stages"])
    seen = [set(row["loss_by_language"]) for row in metrics(tmp_path) if "loss_by_language" in row]
    assert seen[0] == {"en", "zh"}
    assert seen[-1] == {"zh"}


def test_changed_data_is_refused_unless_accepted(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, *RUN, "train.steps=10")
    more = [*RUN, "train.steps=10", "data.skip_ranges=[[60,64]]"]
    line = only_line(train(tmp_path, cache, *more, code=78))
    assert "data.skip_ranges: [] -> [[60, 64]]" in line
    train(tmp_path, cache, *more, "data.accept_change=true")
