from __future__ import annotations

import errno
import logging
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_helpers import at_storage_call, fail_with, leftovers, load_value, save_value, start, state

from moe.checkpoint import CheckpointError, CheckpointManager
from moe.checkpoint.writing import ShardWriter


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def all_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    counts = torch.randint(0, 2**62, (9,))
    half = torch.randn(6, 2).to(torch.bfloat16).t()
    # A view into larger storage, a transposed tensor, and an empty one.
    extra = {"counts": counts, "half": half, "view": torch.randn(100)[3:9], "empty": torch.zeros(0, 4)}
    optimizer_state = optimizer.state_dict()["state"]
    return {"model": model.state_dict(), "optimizer": optimizer_state, "extra": extra, "rng": torch.get_rng_state()}


def flat(tensors: dict[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_roundtrip_is_bitwise_for_every_kind_of_tensor(tmp_path: Path) -> None:
    saved = all_tensors(*trained(seed=0))
    expected = {key: value.clone() for key, value in flat(saved).items()}
    manager = CheckpointManager(tmp_path)
    manager.save(7, saved, {"consumed": 11, "note": "中文"})
    manager.wait()
    target = all_tensors(*trained(seed=1))
    addresses = {key: value.data_ptr() for key, value in flat(target).items()}
    assert manager.load(target) == {"consumed": 11, "note": "中文", "step": 7}
    loaded = flat(target)
    assert loaded.keys() == expected.keys()
    assert any(value.dim() == 0 for key, value in loaded.items() if key.endswith("step"))
    for key, value in loaded.items():
        assert value.dtype == expected[key].dtype
        assert torch.equal(value, expected[key]), key
        assert value.data_ptr() == addresses[key], f"{key} was replaced, not filled"


def test_nothing_to_load(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "never" / "made")
    assert manager.load(state(0)) is None
    assert manager.latest_intact() is None
    assert not (tmp_path / "never").exists()


def test_loading_without_a_step_takes_the_newest_and_with_one_takes_that(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    save_value(manager, 5, 50.0)
    save_value(manager, 100000000, 60.0)
    assert load_value(tmp_path) == (100000000, 60.0)
    found = manager.load(state(0), step=5)
    assert found == {"value": 50.0, "step": 5}
    with pytest.raises(CheckpointError, match=r"step 6: no such checkpoint.*there are: 5, 100000000"):
        manager.load(state(0), step=6)


def test_a_background_save_keeps_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    write_shard = ShardWriter.write_shard
    monkeypatch.setattr(ShardWriter, "write_shard", lambda *args: release.wait(30) and write_shard(*args))
    manager = CheckpointManager(tmp_path)
    tensors = state(1.0)
    manager.save(1, tensors, {"value": 1.0})
    for tensor in flat(tensors).values():
        tensor.fill_(99)
    manager.poll()
    assert manager.steps() == []
    release.set()
    deadline = time.monotonic() + 30
    while not manager.steps():
        assert time.monotonic() < deadline
        manager.poll()
        time.sleep(0.005)
    assert load_value(tmp_path) == (1, 1.0)


def test_a_synchronous_save_is_committed_on_return(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, asynchronous=False)
    manager.save(1, state(1.0), {"value": 1.0})
    assert load_value(tmp_path) == (1, 1.0)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=5)
    for step in range(1, 5):
        manager.save(step, state(float(step)), {"value": float(step)})
        assert manager.steps() == list(range(1, step))
    manager.wait()
    assert load_value(tmp_path) == (4, 4.0)


def test_retention(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        save_value(manager, step, float(step))
    assert manager.steps() == [4, 8, 9, 10]
    assert leftovers(tmp_path) == []


def test_retention_never_removes_the_step_just_saved(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=1)
    save_value(manager, 300, 3.0)
    save_value(manager, 150, 1.5)
    assert manager.steps() == [150, 300]


def test_a_broken_step_takes_no_place_in_retention(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        save_value(manager, step, float(step))
    (tmp_path / "step-00000003" / "__0_0.distcp").write_bytes(b"")
    resumed = CheckpointManager(tmp_path, keep_last=2)
    resumed.load(state(0))
    save_value(resumed, 4, 4.0)
    assert resumed.steps() == [2, 3, 4]
    save_value(resumed, 3, 3.5)
    assert resumed.steps() == [3, 4]


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, 0), (2, -1)])
def test_limits_that_make_no_sense(tmp_path: Path, keep_last: int, keep_every: int) -> None:
    with pytest.raises(ValueError, match=f"keep_last={keep_last}, keep_every={keep_every}: at least 1 and 0"):
        CheckpointManager(tmp_path, keep_last=keep_last, keep_every=keep_every)


@pytest.mark.parametrize("value", [3, 0.5, "text", None, [1, 2], b"bytes"])
def test_only_tensors_are_saved(tmp_path: Path, value: object) -> None:
    manager = CheckpointManager(tmp_path)
    with pytest.raises(CheckpointError, match=f"optim.lr: {type(value).__name__} instead of a tensor"):
        manager.save(1, {"optim": {"lr": value}}, {})
    assert manager.steps() == []
    save_value(manager, 1, 1.0)
    assert load_value(tmp_path) == (1, 1.0)


def test_the_train_state_is_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train_state: not JSON"):
        CheckpointManager(tmp_path).save(1, state(1.0), {"tensor": torch.zeros(1)})


def change(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    model = tensors["model"]
    if key == "missing":
        model["extra"] = torch.zeros(1)
    elif key == "unexpected":
        del model["bias"]
    elif key == "shape":
        model["bias"] = torch.zeros(4, dtype=torch.bfloat16)
    elif key == "dtype":
        model["bias"] = torch.zeros(3)
    return tensors


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "model.extra: not in the checkpoint"),
        ("unexpected", "model.bias: in the checkpoint, but nothing here takes it"),
        ("shape", r"model.bias: shape \[3\] in the checkpoint, \[4\] here"),
        ("dtype", "model.bias: torch.bfloat16 in the checkpoint, torch.float32 here"),
    ],
)
def test_a_model_that_differs_is_an_error_and_no_reason_to_fall_back(tmp_path: Path, kind: str, message: str) -> None:
    manager = CheckpointManager(tmp_path)
    save_value(manager, 1, 1.0)
    save_value(manager, 2, 2.0)
    with pytest.raises(CheckpointError, match=f"step-00000002: {message}"):
        manager.load(change(state(0), kind))


def test_every_storage_call_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each mkdir, write, fsync and rename of a save fails once, when saving a new step and when replacing one."""
    failures = 0
    for step, renames in ((2, 2), (1, 3)):
        for number in range(1, 1000):
            folder = tmp_path / f"{step}-{number}"
            manager = CheckpointManager(folder)
            save_value(manager, 1, 1.0)
            caplog.clear()
            with at_storage_call(number, fail_with(errno.ENOSPC)) as calls:
                save_value(manager, step, 2.0)
            if len(calls) < number:
                assert manager.failed_saves == 0
                break
            assert manager.failed_saves == 1
            assert f"the checkpoint of step {step} was not saved: No space left on device" in caplog.text
            assert [record.levelno for record in caplog.records] == [logging.WARNING]
            # The fsync after the last rename only makes it durable: by then the new content is in its place.
            is_committed = calls[-1] == "fsync" and calls.count("rename") == renames
            assert load_value(folder) == ((step, 2.0) if is_committed else (1, 1.0))
            assert (folder / "step-00000001").is_dir()
            assert [name for name in leftovers(folder) if ".tmp-" in name] == []
            save_value(manager, 3, 3.0)
            assert load_value(folder) == (3, 3.0)
            failures += 1
    assert failures > 20


def save_beyond_limit(folder: Path) -> None:
    manager = CheckpointManager(folder)
    save_value(manager, 1, 1.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save_value(manager, 2, 2.0, numel=1_000_000)
    if manager.failed_saves != 1 or leftovers(folder):
        raise SystemExit(3)
    save_value(manager, 3, 3.0)


def test_the_kernel_refuses_a_write(tmp_path: Path) -> None:
    process = start(save_beyond_limit, tmp_path)
    process.join(60)
    assert process.exitcode == 0
    assert CheckpointManager(tmp_path).steps() == [1, 3]
    assert load_value(tmp_path) == (3, 3.0)


def test_staging_that_fails_fails_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("no pinned memory")

    manager = CheckpointManager(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("moe.checkpoint.writing.StagingPlanner.stage", no_memory)
        save_value(manager, 1, 1.0)
    assert manager.failed_saves == 1
    assert manager.steps() == []
    save_value(manager, 2, 2.0)
    assert manager.steps() == [2]


def test_the_first_save_clears_what_a_killed_run_left(tmp_path: Path) -> None:
    for name in (".tmp-step-00000009-abc", ".trash-step-00000001-abc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"partial")
    manager = CheckpointManager(tmp_path)
    assert manager.load(state(0)) is None
    assert len(leftovers(tmp_path)) == 2, "reading must not touch what a live run may be writing"
    save_value(manager, 1, 1.0)
    assert leftovers(tmp_path) == []


def test_a_second_writer_leaves_the_first_ones_files_alone(tmp_path: Path) -> None:
    first = CheckpointManager(tmp_path)
    save_value(first, 1, 1.0)
    being_written = tmp_path / ".tmp-step-00000002-abc"
    being_written.mkdir()
    second = CheckpointManager(tmp_path)
    save_value(second, 3, 3.0)
    assert being_written.exists()


def test_no_path_of_this_machine_is_in_a_checkpoint(tmp_path: Path) -> None:
    save_value(CheckpointManager(tmp_path), 1, 1.0)
    content = b"".join(path.read_bytes() for path in (tmp_path / "step-00000001").iterdir())
    assert str(tmp_path).encode() not in content
