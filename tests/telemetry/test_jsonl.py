from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe.telemetry import ROW_FIELDS, MetricsError, MetricsFile, read_metrics
from moe.telemetry.jsonl import encode_row


def _write(path: Path, steps: range) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.append({"step": step, "loss": 1.0 / step})
    file.close()


def test_rows_keep_the_order_of_the_schema() -> None:
    row = dict.fromkeys(reversed(ROW_FIELDS), 1) | {"extra": 2}
    assert list(json.loads(encode_row(row))) == [*ROW_FIELDS, "extra"]


def test_non_finite_numbers_become_null_at_any_depth() -> None:
    row = {"step": 1, "loss": float("nan"), "experts": [{"load": [1.0, float("inf")]}], "lr": np.float32("-inf")}
    assert encode_row(row) == b'{"step":1,"loss":null,"lr":null,"experts":[{"load":[1.0,null]}]}\n'


def test_numpy_values_are_written_as_numbers() -> None:
    assert encode_row({"step": np.int64(3), "loss": np.float64(0.5)}) == b'{"step":3,"loss":0.5}\n'


def test_a_row_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    file.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(kept=st.integers(0, 200))
def test_a_torn_last_line_is_dropped_on_open(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    _write(path, range(1, 6))
    content = path.read_bytes()[:kept]
    path.write_bytes(content)
    assert all(row["step"] <= 5 for row in read_metrics(path))
    MetricsFile(path).close()
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1]


def test_a_torn_line_longer_than_a_block_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n{"step":2,"x":"' + b"a" * 200_000)
    MetricsFile(path).close()
    assert path.read_bytes() == b'{"step":1}\n'


def test_truncate_after_keeps_the_prefix_byte_for_byte_and_appends_go_on(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    _write(straight, range(1, 11))
    _write(resumed, range(1, 9))
    file = MetricsFile(resumed)
    file.truncate_after(5)
    assert [row["step"] for row in read_metrics(resumed)] == [1, 2, 3, 4, 5]
    for step in range(6, 11):
        file.append({"step": step, "loss": 1.0 / step})
    file.close()
    assert resumed.read_bytes() == straight.read_bytes()
    assert list(tmp_path.glob("*.tmp")) == []


def test_truncate_after_keeps_a_validation_row_of_the_same_step(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in ({"step": 4, "loss": 1.0}, {"step": 4, "validation": {"loss": 2.0}}, {"step": 5, "loss": 1.0}):
        file.append(row)
    file.truncate_after(4)
    file.close()
    assert [row["step"] for row in read_metrics(file.path)] == [4, 4]


def test_truncate_after_drops_a_validation_that_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for row in ({"step": 2, "validation": {"loss": 3.0}}, {"step": 4, "loss": 1.0}, {"step": 4, "validation": {}}):
        file.append(row)
    file.truncate_after(4, validated_step=2)
    file.close()
    assert [(row["step"], "validation" in row) for row in read_metrics(file.path)] == [(2, True), (4, False)]


def test_a_full_disk_leaves_no_half_row() -> None:
    program = """
import resource, signal, sys, tempfile
from pathlib import Path
from moe.telemetry import MetricsFile, read_metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
file = MetricsFile(path)
file.append({"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    file.append({"step": 2, "text": "a" * 100})
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    file.append({"step": 3})
    print([row["step"] for row in read_metrics(path)])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[1, 3]"


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"step":oops}\n{"step":3}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl: row 2 "):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
