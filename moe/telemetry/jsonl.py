"""metrics.jsonl: one JSON object a logging step, the record every picture and comparison is drawn from."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROW_FIELDS = (
    "step",
    "tokens",
    "loss",
    "loss_by_language",
    "lr",
    "grad_norm",
    "expert_balance_loss",
    "device_balance_loss",
    "router_z_loss",
    "skipped_steps",
    "tokens_per_second",
    "tflops",
    "mfu",
    "memory_gib",
    "elapsed_seconds",
    "experts",
    "validation",
)
# The only fields in which an interrupted run may differ from an undisturbed one.
TIMING_FIELDS = ("tokens_per_second", "tflops", "mfu", "memory_gib", "elapsed_seconds")


class MetricsError(ValueError):
    """metrics.jsonl is missing or damaged; the message names file and row."""


class MetricsFile:
    """Append-only metrics.jsonl.

    Rows keep the order of `ROW_FIELDS` and hold no NaN: numbers that are not finite are written as null. Each row is
    one unbuffered write, so a kill tears at most the last line, which the next opening drops.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises OSError, and leaves no half row behind, when the disk is full."""
        line = encode_row(row)
        end = os.fstat(self._file.fileno()).st_size
        written: int | None = None
        try:
            written = self._file.write(line)
        finally:
            if written != len(line):
                self._file.truncate(end)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def truncate_after(self, step: int, validated_step: int | None = None) -> None:
        """Drop the rows later than `step`, and validations later than `validated_step`; the others keep their bytes.

        Atomic: a kill leaves the old or the new file. Raises MetricsError naming the row that cannot be read.
        """
        limits = {True: step if validated_step is None else validated_step, False: step}
        rows = [(line, _decode(self.path, number, line)) for number, line in _lines(self.path)]
        kept = [line for line, row in rows if row["step"] <= limits["validation" in row]]
        self._file.close()
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows. A torn last line is left out; any other unreadable row raises MetricsError."""
    if not path.is_file():
        raise MetricsError(f"{path}: no such file; a run folder with at least one logged step has it")
    return [_decode(path, number, line) for number, line in _lines(path) if line.endswith(b"\n")]


def encode_row(row: Mapping[str, Any]) -> bytes:
    """One line of metrics.jsonl: known fields first and in order, numbers JSON can hold."""
    ordered = {name: row[name] for name in ROW_FIELDS if name in row} | dict(row)
    return json.dumps(_plain(ordered), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, start=1)


def _decode(path: Path, number: int, line: bytes) -> dict[str, Any]:
    row: Any = None
    with contextlib.suppress(ValueError):
        row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise MetricsError(f"{path}: row {number} is not a JSON object with an integer step")
    return row


def _drop_torn_line(path: Path) -> None:
    """Cut the file after its last newline."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65_536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)
