"""Real wandb, offline, in a process of its own; what it stored is read back from the bytes on disk."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe.telemetry import WandbLogger
from moe.telemetry.wandb_logger import flatten_row

ROOT = Path(__file__).parents[2]
SECRET = "PLANTED9f2c"
PROGRAM = """
import json, sys
from pathlib import Path
from moe.telemetry import WandbLogger
mode, folder, rows = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
config = {"lr": 0.001, "data": {"hf_token": "%s", "url": "https://me:%s@example.org/x"}}
logger = WandbLogger(mode, folder, "moesaic", "run-hash", "moe_tiny", config, print)
for row in rows:
    logger.log(row)
logger.close()
""" % (SECRET, SECRET)  # noqa: UP031
ROWS: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 4.0 - step / 100,
        "loss_by_language": {"en": 3.5},
        "mfu": None,
        "experts": [{"layer": 1, "load": [0.5, 1.5], "max_violation": 0.5, "dead": 0, "entropy": 0.9}],
    }
    for step in (10, 20, 30)
]


def _train(mode: str, folder: Path, blocked: str = "", **variables: str) -> str:
    hidden = {"WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    environment |= {"HOME": str(folder / "home"), "PYTHONPATH": f"{blocked}{os.pathsep}{ROOT}"} | variables
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(folder), json.dumps(ROWS)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _records(path: Path) -> Iterator[Any]:
    """The protocol buffers in a .wandb file: blocks of 32 KiB with chunks of 7 bytes header and data (LevelDB log)."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, record = 7, b""
    while position + 7 <= len(data):
        rest_of_block = 32_768 - position % 32_768
        if rest_of_block < 7:
            position += rest_of_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            yield message
            record = b""


def _history(path: Path) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in _records(path)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("offline")
    return folder, _train("offline", folder)


def test_an_offline_run_can_be_read_back(offline_run: tuple[Path, str]) -> None:
    (path,) = offline_run[0].rglob("*.wandb")
    history = _history(path)
    assert len(history) == len(ROWS)
    for row, stored in zip(ROWS, history, strict=True):
        assert flatten_row(row).items() <= stored.items()
    assert "experts/load/layer_01/bins" in history[0]
    assert "experts/load/layer_01/bins" not in history[1]


def test_the_run_has_the_callers_id_and_the_step_axis(offline_run: tuple[Path, str]) -> None:
    (path,) = offline_run[0].rglob("*.wandb")
    records = list(_records(path))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == ("run-hash", "moesaic", "moe_tiny")
    metrics = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    assert json.loads(next(item.value_json for item in run.config.update if item.key == "lr")) == 0.001


def test_no_written_byte_holds_the_planted_secret(offline_run: tuple[Path, str]) -> None:
    folder, output = offline_run
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert written
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in output


def test_everything_is_written_below_the_run_folder(offline_run: tuple[Path, str]) -> None:
    home = offline_run[0] / "home"
    assert not home.exists() or [path for path in home.rglob("*") if path.is_file()] == []


def test_the_line_for_uploading_later_names_the_folder(offline_run: tuple[Path, str]) -> None:
    folder, output = offline_run
    (path,) = folder.rglob("*.wandb")
    assert f"wandb sync {path.parent}" in output


def test_online_without_an_account_falls_back_to_offline(tmp_path: Path) -> None:
    output = _train("online", tmp_path)
    assert "no wandb account is configured" in output
    assert "wandb sync" in output
    (path,) = tmp_path.rglob("*.wandb")
    assert len(_history(path)) == len(ROWS)


def test_online_with_an_unreachable_server_falls_back_to_offline(tmp_path: Path) -> None:
    key = SECRET + "0" * 40
    output = _train("online", tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=key)
    assert "wandb is not reachable" in output
    (path,) = tmp_path.rglob("*.wandb")
    assert len(_history(path)) == len(ROWS)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


def test_a_missing_wandb_costs_one_line(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "wandb.py").write_text("raise ImportError('not here')\n")
    output = _train("online", tmp_path, blocked=str(tmp_path / "blocked"))
    assert output.splitlines() == [
        "warning: wandb cannot be imported (not here); logging to metrics.jsonl only",
    ]


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "wandb.py").write_text("raise SystemExit('imported')\n")
    assert _train("disabled", tmp_path, blocked=str(tmp_path / "blocked")) == ""


class _BrokenRun:
    def log(self, row: object) -> None:
        raise BrokenPipeError("service is gone")


def test_a_failure_in_training_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    messages: list[str] = []
    logger = WandbLogger("disabled", tmp_path, "p", "id", "n", {}, messages.append)
    logger._run = _BrokenRun()
    for step in range(3):
        logger.log({"step": step})
    logger.close()
    assert len(messages) == 1
    assert "service is gone" in messages[0]
