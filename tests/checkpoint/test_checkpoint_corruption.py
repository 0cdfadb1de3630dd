from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_helpers import load_value, reseal, save_value, state

from moe.checkpoint import CheckpointError, CheckpointManager
from moe.checkpoint.__main__ import main
from moe.checkpoint.manifest import MANIFEST_NAME
from moe.checkpoint.reading import METADATA_NAME, TRAIN_STATE_NAME
from moe.checkpoint.writing import DurableFile

SHARD = "__0_0.distcp"
FLIPS = 200


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two intact checkpoints: step 1 with value 1, step 2 with value 2."""
    manager = CheckpointManager(tmp_path / "checkpoints")
    save_value(manager, 1, 1.0)
    save_value(manager, 2, 2.0)
    return tmp_path / "checkpoints"


def newest(folder: Path) -> Path:
    return folder / "step-00000002"


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_every_flipped_bit_is_detected(folder: Path) -> None:
    rng = random.Random(0)
    names = sorted(os.listdir(newest(folder)))
    assert names == [METADATA_NAME, SHARD, MANIFEST_NAME, TRAIN_STATE_NAME]
    detected = 0
    for number in range(FLIPS):
        path = newest(folder) / names[number % len(names)]
        original = path.read_bytes()
        flip(path, rng)
        detected += load_value(folder) == (1, 1.0)
        path.write_bytes(original)
    assert detected == FLIPS
    assert load_value(folder) == (2, 2.0)


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def swap(folder: Path) -> None:
    shutil.copy(folder.parent / "step-00000001" / SHARD, folder / SHARD)


def replace_by_other_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)


def put_folder_in_place_of_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()


def link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, f"{SHARD}: .* bytes, the manifest says"),
    "appended": (lambda f: (f / SHARD).open("ab").write(b"x"), f"{SHARD}: .* bytes, the manifest says"),
    "missing": (lambda f: (f / SHARD).unlink(), f"{SHARD}: missing"),
    "extra": (lambda f: (f / "__1_0.distcp").touch(), "__1_0.distcp: not a file of this checkpoint"),
    "swapped": (swap, f"{SHARD}: content does not match its digest"),
    "other step": (replace_by_other_step, "belongs to step 1, not to step 2"),
    "link": (link, f"{SHARD}: not a regular file"),
    "no manifest": (lambda f: (f / MANIFEST_NAME).unlink(), f"{MANIFEST_NAME}: missing"),
    "manifest is a folder": (put_folder_in_place_of_manifest, "cannot be read"),
    "empty manifest": (lambda f: (f / MANIFEST_NAME).write_bytes(b""), "does not match its own digest"),
    "manifest is a list": (lambda f: (f / MANIFEST_NAME).write_bytes(b"[]"), "does not match its own digest"),
    "deep manifest": (lambda f: (f / MANIFEST_NAME).write_bytes(b"[" * 10**6), "does not match its own digest"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_passed_over(folder: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, message = DAMAGES[kind]
    damage(newest(folder))
    manager = CheckpointManager(folder)
    with pytest.raises(CheckpointError, match=f"step-00000002: .*{message}"):
        manager.verify(2)
    with pytest.raises(CheckpointError, match=f"step-00000002: .*{message}"):
        manager.load(state(0), step=2)
    assert manager.latest_intact() == 1
    caplog.clear()
    assert load_value(folder) == (1, 1.0)
    assert "checkpoint passed over: step-00000002: " in caplog.text


def test_what_this_run_knows_to_be_good_is_told_from_what_lies_in_the_folder(folder: Path) -> None:
    os.truncate(newest(folder) / SHARD, 10)
    manager = CheckpointManager(folder)
    assert manager.newest_sound is None
    manager.load(state(-1))
    assert manager.newest_sound == 1
    with mock.patch.object(DurableFile, "write", side_effect=OSError(28, "No space left on device")):
        save_value(manager, 2, 3.0)
    assert manager.steps() == [1, 2]  # the broken one is still there
    assert manager.newest_sound == 1
    save_value(manager, 2, 3.0)
    assert manager.newest_sound == 2


def test_no_intact_checkpoint_is_an_error_and_never_a_fresh_start(folder: Path) -> None:
    for step in (1, 2):
        truncate(folder / f"step-0000000{step}")
    with pytest.raises(CheckpointError, match=r"step-00000002: __0_0.distcp.*none of 2 checkpoints is intact"):
        CheckpointManager(folder).load(state(0))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("format", 2, "format 2, readable is format 1"), ("files", [], "lacks fields"), ("step", 3, "belongs to step 3")],
)
def test_a_sealed_manifest_of_another_kind(folder: Path, key: str, value: object, message: str) -> None:
    from moe.checkpoint.manifest import _SEAL, _seal

    path = newest(folder) / MANIFEST_NAME
    body = json.loads(path.read_bytes())
    del body[_SEAL]
    path.write_bytes(_seal({**body, key: value}))
    with pytest.raises(CheckpointError, match=message):
        CheckpointManager(folder).verify(2)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff"])
def test_a_train_state_that_is_no_json_object(folder: Path, content: bytes) -> None:
    (newest(folder) / TRAIN_STATE_NAME).write_bytes(content)
    reseal(newest(folder), 2)
    with pytest.raises(CheckpointError, match=TRAIN_STATE_NAME):
        CheckpointManager(folder).verify(2)


class Exploit:
    """Unpickling it creates a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


def metadata_of(folder: Path) -> dcp.metadata.Metadata:
    return pickle.loads((folder / METADATA_NAME).read_bytes())


def plant_in_metadata(folder: Path, marker: Path) -> None:
    (folder / METADATA_NAME).write_bytes(pickle.dumps(Exploit(marker)))


def plant_inside_metadata(folder: Path, marker: Path) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = Exploit(marker)
    (folder / METADATA_NAME).write_bytes(pickle.dumps(metadata))


def plant_bytes_item(folder: Path, marker: Path) -> None:
    shutil.rmtree(folder)
    dcp.save({**state(2.0), "payload": Exploit(marker)}, checkpoint_id=folder, no_dist=True)
    (folder / TRAIN_STATE_NAME).write_text("{}")


def plant_in_shard(folder: Path, marker: Path) -> None:
    metadata = metadata_of(folder)
    torch.save(Exploit(marker), folder / SHARD)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, (folder / SHARD).stat().st_size
    (folder / METADATA_NAME).write_bytes(pickle.dumps(metadata))


ATTACKS = [plant_in_metadata, plant_inside_metadata, plant_bytes_item, plant_in_shard]


@pytest.mark.parametrize("plant", ATTACKS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_never_executes_anything(folder: Path, plant: Callable[[Path, Path], None]) -> None:
    marker = folder / "executed"
    plant(newest(folder), marker)
    reseal(newest(folder), 2)
    with pytest.raises(CheckpointError, match="step-00000002"):
        CheckpointManager(folder).load({**state(0), "payload": torch.zeros(1)}, step=2)
    assert not marker.exists()


@pytest.mark.parametrize("plant", [plant_in_metadata, plant_inside_metadata, plant_bytes_item])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_attacks_are_real(folder: Path, plant: Callable[[Path, Path], None]) -> None:
    marker = folder / "executed"
    plant(newest(folder), marker)
    with contextlib.suppress(BaseException):  # Whether it then fails or not, the damage is done.
        dcp.load({**state(0), "payload": 0}, checkpoint_id=newest(folder), no_dist=True)
    assert marker.exists()


def test_metadata_that_points_outside(folder: Path) -> None:
    metadata = metadata_of(newest(folder))
    for place in metadata.storage_data.values():
        place.relative_path = f"../step-00000001/{SHARD}"
    (newest(folder) / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    reseal(newest(folder), 2)
    with pytest.raises(CheckpointError, match="points outside this checkpoint"):
        CheckpointManager(folder).verify(2)


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.serialization", "load"), ("pathlib", "Path")],
)
def test_names_that_metadata_never_needs(folder: Path, module: str, name: str) -> None:
    (newest(folder) / METADATA_NAME).write_bytes(f"c{module}\n{name}\n.".encode())
    reseal(newest(folder), 2)
    with pytest.raises(CheckpointError, match=f"names {module}.{name}, which a checkpoint never needs"):
        CheckpointManager(folder).verify(2)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps({"a": 1}), pickle.dumps([])])
def test_metadata_that_is_none(folder: Path, content: bytes) -> None:
    (newest(folder) / METADATA_NAME).write_bytes(content)
    reseal(newest(folder), 2)
    with pytest.raises(CheckpointError, match=METADATA_NAME):
        CheckpointManager(folder).verify(2)
    assert load_value(folder) == (1, 1.0)


def test_command_verifies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["step-00000001", "intact"],
        ["step-00000002", "intact"],
    ]
    swap(newest(folder))
    assert main(["list", str(folder)]) == 0, "list does not read the shards"
    assert all(" not verified " in line for line in capsys.readouterr().out.splitlines())
    assert main(["verify", str(folder), "--json"]) == 77
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert [(fact["step"], fact["error"]) for fact in facts] == [
        (1, None),
        (2, f"{SHARD}: content does not match its digest"),
    ]
    assert printed.err == "error: 1 of 2 checkpoints are not intact\n"


def test_command_on_a_folder_without_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe.checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 77
    assert done.stderr == f"error: {tmp_path}: no checkpoints (folders named step-00000100) here\n"
