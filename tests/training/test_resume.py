"""A run that was stopped, killed or restarted ends exactly where an undisturbed one does."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from training_helpers import final_state, metrics, start, train

STEPS = "train.steps=60"
SAVE = "checkpoint.interval=7"
EVALUATE = "train.eval_interval=20"
SETTINGS = (STEPS, SAVE, EVALUATE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, cache, STEPS, SAVE, EVALUATE)
    return folder


def assert_equal_runs(folder: Path, undisturbed: Path) -> None:
    assert final_state(folder) == final_state(undisturbed)
    assert metrics(folder) == metrics(undisturbed)


def test_same_seed_is_bitwise_equal_and_another_is_not(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    train(tmp_path / "again", cache, STEPS, SAVE, EVALUATE, "train.micro_batch_size=4")
    assert_equal_runs(tmp_path / "again", undisturbed)
    train(tmp_path / "other", cache, STEPS, SAVE, EVALUATE, "train.seed=1")
    assert final_state(tmp_path / "other")["shards"] != final_state(undisturbed)["shards"]


def test_finished_run_changes_nothing_when_run_again(undisturbed: Path, cache: Path) -> None:
    before = final_state(undisturbed), metrics(undisturbed)
    train(undisturbed, cache, STEPS, SAVE, EVALUATE)
    assert (final_state(undisturbed), metrics(undisturbed)) == before


def test_a_run_that_only_measures_leaves_no_last_checkpoint(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    train(tmp_path, cache, STEPS, "checkpoint.interval=50", EVALUATE, "checkpoint.at_end=false")
    assert [folder.name for folder in (tmp_path / "t" / "r" / "checkpoints").glob("step-*")] == ["step-00000050"]
    assert metrics(tmp_path) == metrics(undisturbed)
    train(tmp_path, cache, STEPS, "checkpoint.interval=50", EVALUATE)
    assert_equal_runs(tmp_path, undisturbed)


def test_the_last_validation_can_be_left_out(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    train(tmp_path, cache, STEPS, SAVE, "train.eval_at_end=false")
    assert metrics(tmp_path) == [row for row in metrics(undisturbed) if "validation" not in row]


def test_repeatable_kernels_change_no_bit_on_a_cpu(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    """And torch has such a kernel for everything a step does, as far as a CPU can tell."""
    train(tmp_path, cache, STEPS, SAVE, EVALUATE, "runtime.deterministic=true")
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["TERM", "INT", "KILL"])
def test_interrupted_run_ends_bitwise_equal(
    tmp_path: Path, cache: Path, undisturbed: Path, number: signal.Signals
) -> None:
    interrupt(tmp_path, cache, number, rows=4, delay=0.02)
    train(tmp_path, cache, STEPS, SAVE, EVALUATE)
    assert_equal_runs(tmp_path, undisturbed)


@pytest.mark.slow
def test_twenty_random_interruptions(tmp_path: Path, cache: Path, undisturbed: Path) -> None:
    chance = random.Random(0)
    for trial in range(20):
        folder = tmp_path / str(trial)
        number = chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
        for _ in range(chance.choice([1, 2])):
            interrupt(folder, cache, number, rows=chance.randrange(0, 20), delay=chance.random() * 0.3)
        train(folder, cache, STEPS, SAVE, EVALUATE)
        assert_equal_runs(folder, undisturbed)


def test_a_signal_saves_within_two_steps(tmp_path: Path, cache: Path) -> None:
    """The run sends itself the signal inside step 11; the checkpoint it leaves may be of step 11 to 13."""
    process = start(tmp_path, cache, "train.steps=100000", "checkpoint.interval=0", "train.log_interval=1")
    wait_for_rows(tmp_path, 11, process)
    seen = len(metrics(tmp_path))
    process.send_signal(signal.SIGTERM)
    sent = len(metrics(tmp_path))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped by a signal" in err
    step = int(final_state(tmp_path)["step"].removeprefix("step-"))
    assert seen <= step <= sent + 2
    assert len(metrics(tmp_path)) == step


def interrupt(
    folder: Path, cache: Path, number: signal.Signals, rows: int, delay: float, settings: Sequence[str] = SETTINGS
) -> None:
    """Start a run and signal it some moments after the folder holds so many rows.

    That may be before the run listens to signals, which kills it, or after it is done; neither may lose anything.
    """
    process = start(folder, cache, *settings)
    wait_for_rows(folder, rows, process)
    time.sleep(delay)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode in (0, 75, -number)


def wait_for_rows(folder: Path, rows: int, process: subprocess.Popen[str]) -> None:
    path = folder / "t" / "r" / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.005)
