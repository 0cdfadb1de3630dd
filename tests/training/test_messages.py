"""What a user gets wrong ends in one line that helps, a non-zero exit, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from training_helpers import final_state, only_line, train


def test_unknown_key_names_the_nearest(tmp_path: Path, cache: Path) -> None:
    line = only_line(train(tmp_path, cache, "train.stepz=3", code=78))
    assert "train.stepz" in line
    assert "train.steps" in line


def test_missing_corpus_file(tmp_path: Path, cache: Path) -> None:
    assert "nowhere.jsonl" in only_line(
        train(tmp_path, cache, "data.sources.en.path=nowhere.jsonl", "train.steps=5", code=77)
    )


def test_bad_row_names_file_and_row(tmp_path: Path, cache: Path) -> None:
    corpus = tmp_path / "bad.jsonl"
    corpus.write_text(json.dumps({"text": "a b c", "lang": "en", "source": "x"}) + "\n{oops\n")
    result = train(tmp_path, cache, f"data.sources.en.path={corpus}", "train.steps=5", code=77)
    assert "bad.jsonl:2" in only_line(result)


def test_all_checkpoints_corrupt_is_an_error_not_a_fresh_start(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, "train.steps=6", "checkpoint.interval=3")
    for folder in (tmp_path / "t" / "r" / "checkpoints").glob("step-*"):
        shard = next(folder.glob("*.distcp"))
        shard.write_bytes(shard.read_bytes()[:-1])
    assert "step-00000006" in only_line(train(tmp_path, cache, "train.steps=6", "checkpoint.interval=3", code=77))


def test_corrupt_newest_checkpoint_falls_back_with_a_warning(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, "train.steps=6", "checkpoint.interval=3")
    expected = final_state(tmp_path)
    shard = next((tmp_path / "t" / "r" / "checkpoints" / "step-00000006").glob("*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    output = train(tmp_path, cache, "train.steps=6", "checkpoint.interval=3")
    assert "step-00000006" in output
    assert "resuming from step 3" in output
    assert final_state(tmp_path) == expected


def test_another_recipe_in_the_same_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, "train.steps=4")
    for change in ("optim.lr=0.5", "model.num_hidden_layers=3"):  # the other shape before its tensors are looked for
        line = only_line(train(tmp_path, cache, "train.steps=4", change, code=78))
        assert "another recipe" in line
        assert change.partition("=")[0] in line


def test_a_run_that_is_done_says_so(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, "train.steps=4")
    output = train(tmp_path, cache, "train.steps=4")
    assert "all 4 steps are done" in output
    assert "resuming" not in output


def test_numerical_abort_exits_76(tmp_path: Path, cache: Path) -> None:
    overrides = ["train.steps=40", "optim.lr=1e30", "train.guard.max_consecutive_skips=4"]
    line = only_line(train(tmp_path, cache, *overrides, code=76))
    assert "skipped" in line


def test_secrets_never_reach_the_run_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "hunter2-planted-value")
    overrides = ["train.steps=4", "telemetry.wandb_project=https://me:${oc.env:PLANTED}@example.org"]
    train(tmp_path, cache, *overrides)
    written = [path for path in (tmp_path / "t").rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if b"hunter2-planted-value" in path.read_bytes()]


def test_another_process_in_the_same_run_is_refused(tmp_path: Path, cache: Path) -> None:
    from test_resume import wait_for_rows
    from training_helpers import start

    first = start(tmp_path, cache, "train.steps=100000")
    wait_for_rows(tmp_path, 1, first)
    try:
        assert "another process" in only_line(train(tmp_path, cache, "train.steps=100000", code=77))
    finally:
        first.kill()
        first.communicate()


def test_more_than_the_memory_is_one_line(tmp_path: Path, cache: Path) -> None:
    huge = ["model.vocab_size=2000000000", "model.hidden_size=1048576"]  # beyond any address space
    line = only_line(train(tmp_path, cache, *huge, "train.steps=5", code=1))
    assert "out of memory" in line
    assert "train.micro_batch_size" in line


def test_widths_that_a_backend_cannot_take_are_refused_at_the_start(tmp_path: Path, cache: Path) -> None:
    wrong = ["model.moe_intermediate_size=97", "runtime.expert_backend=grouped_mm"]
    line = only_line(train(tmp_path, cache, *wrong, "train.steps=5", code=78))
    assert line.startswith("error: runtime.expert_backend: ")
    assert "97" in line


def test_a_failed_compilation_says_what_helps(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    output = train(tmp_path, cache, "train.steps=5", "runtime.compile=true", code=1)
    last = output.strip().splitlines()[-1]
    assert "runtime.compile=false" in last
    assert str(tmp_path / "compiled") in last
