"""Run folders with plausible contents for the report's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moe.telemetry import MetricsFile, expert_statistics

SECRET = "PLANTED5d1e"
COMPLETION = "the sea <script>document.title='pwned'</script> & the harbour"


def make_run(
    folder: Path,
    rows: int = 12,
    layers: int = 3,
    experts: int = 8,
    languages: tuple[str, ...] = ("en", "zh"),
    validate_every: int = 4,
    summary: bool = True,
    seed: int = 0,
) -> Path:
    """A run folder; `layers=0` is a dense model, `validate_every=0` never validates."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    file = MetricsFile(folder / "metrics.jsonl")
    for index in range(1, rows + 1):
        file.append(_row(index, layers, experts, languages, random))
        if validate_every and index % validate_every == 0:
            file.append({"step": 10 * index, "validation": _validation(languages)})
    file.close()
    (folder / "config.yaml").write_text(f"model:\n  experts: {experts}\ndata:\n  hf_token: {SECRET}\nseed: {seed}\n")
    if summary:
        _write_summary(folder, rows, languages)
    return folder


def _row(
    index: int, layers: int, experts: int, languages: tuple[str, ...], random: np.random.Generator
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": 10 * index,
        "tokens": 81_920 * index,
        "loss": 9.0 / index,
        "loss_by_language": dict.fromkeys(languages, 9.0 / index),
        "lr": 1e-3,
        "grad_norm": None if index == 2 else 1.0,
        "tokens_per_second": 5000.0 + index,
        "memory_gib": 1.5,
    }
    if layers:
        counts = random.poisson(50, (layers, len(languages), experts))
        row["experts"] = expert_statistics(counts, np.full(layers, 1.5), list(range(1, layers + 1)), languages)
        row["expert_balance_loss"] = 0.01
    return row


def _validation(languages: tuple[str, ...]) -> dict[str, Any]:
    scores = {"loss": 3.0, "bits_per_byte": 1.234, "tokens": 100, "bytes": 300}
    return {"loss": 3.0, "bits_per_byte": 1.5, "by_language": {name: dict(scores) for name in languages}}


def _write_summary(folder: Path, rows: int, languages: tuple[str, ...]) -> None:
    baselines = {"xz_bits_per_byte": 2.61, "xz_primed_bits_per_byte": 2.21, "validation_bytes": 131_072}
    summary = {
        "name": "moe_tiny",
        "run": "3f9a",
        "command": f"python train.py data.hf_token={SECRET}",
        "device": "cpu",
        "num_params": 11_534_336,
        "num_active_params": 4_200_000,
        "training_seconds": 201.4,
        "steps": 10 * rows,
        "tokens": 81_920 * rows,
        "languages": list(languages),
        "baselines": dict.fromkeys(languages, baselines),
        "environment": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    sample = {"language": "en", "prompt": "We saw ", "completion": COMPLETION, "words": 5, "known_words": 4}
    (folder / "samples.json").write_text(json.dumps([sample]))
