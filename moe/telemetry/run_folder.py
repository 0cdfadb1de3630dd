"""Read back what a run left in its folder, and nothing else."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe.telemetry.jsonl import read_metrics
from moe.telemetry.redact import redact


class RunFolderError(ValueError):
    """A run folder lacks a file or holds a damaged one; the message names it."""


class NoRowsError(RunFolderError):
    """The run was stopped before its first log row, or has not come to it."""


@dataclass(frozen=True)
class Run:
    """One run folder in memory. `rows` are those of metrics.jsonl; `summary` and `samples` are empty until written."""

    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The experiment's name and the run's, as far as they are known."""
        parts = [str(self.summary[key]) for key in ("name", "run") if self.summary.get(key)]
        return " / ".join(parts) or self.folder.resolve().name

    @property
    def training(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "loss" in row]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The rows that hold a validation."""
        return [row for row in self.rows if row.get("validation")]

    @property
    def with_experts(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row.get("experts")]

    @property
    def languages(self) -> list[str]:
        """In the order of the summary, then of first appearance."""
        names = dict.fromkeys(self.summary.get("languages", []))
        for row in self.rows:
            names |= dict.fromkeys(row.get("loss_by_language", {}))
            names |= dict.fromkeys(row.get("validation", {}).get("by_language", {}))
        return list(names)


def load_run(folder: Path) -> Run:
    """Read config.yaml, metrics.jsonl and, where present, summary.json and samples.json; secrets are redacted.

    Raises RunFolderError (NoRowsError before the first log row) or MetricsError, all ValueErrors, naming the file.
    """
    rows = read_metrics(folder / "metrics.jsonl")
    if not rows:
        raise NoRowsError(f"{folder / 'metrics.jsonl'}: holds no rows yet")
    return Run(
        folder=folder,
        config=redact(_read_config(folder / "config.yaml")),
        rows=rows,
        summary=redact(_read_json(folder / "summary.json", {})),
        samples=_read_json(folder / "samples.json", []),
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RunFolderError(f"{path}: no such file; every run folder has its resolved config")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: is not readable YAML") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{path}: is not a mapping")
    return config


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path}: is not readable JSON") from error
    if not isinstance(content, type(default)):
        raise RunFolderError(f"{path}: must hold a JSON {'object' if isinstance(default, dict) else 'array'}")
    return content
