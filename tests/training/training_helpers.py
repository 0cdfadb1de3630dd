"""Small real runs of train.py, and what two of them must have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from moe.telemetry import TIMING_FIELDS

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.standard_ffn_size=64",
    "data.seq_len=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=4",
    "train.log_interval=3",
    "train.eval_interval=0",
    "optim.schedule.warmup_steps=2",
    "runtime.num_threads=1",
    "telemetry.report=false",
    "run=r",
    "name=t",
]


def command(folder: Path, cache: Path, *overrides: str) -> list[str]:
    sources = [f"data.sources.{language}.path={cache}/{language}.jsonl" for language in ("en", "zh")]
    flags = [override for override in overrides if override.startswith("-")]
    overrides = tuple(override for override in overrides if not override.startswith("-"))
    return [
        sys.executable,
        str(ROOT / "train.py"),
        *flags,
        *SMALL,
        *sources,
        f"output_dir={folder}",
        f"data.cache_dir={cache}",
        *overrides,
    ]


def start(folder: Path, cache: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(folder, cache, *overrides),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def train(folder: Path, cache: Path, *overrides: str, code: int = 0) -> str:
    """Run to the end, expect the exit code, return what was printed."""
    process = start(folder, cache, *overrides)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out + err


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All rows of the run, without the fields that time decides."""
    lines = (folder / "t" / "r" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_FIELDS} for line in lines]


def final_state(folder: Path) -> dict[str, Any]:
    """Digests of every tensor file of the last checkpoint, and its data position."""
    last = sorted((folder / "t" / "r" / "checkpoints").glob("step-*"))[-1]
    manifest = json.loads((last / "manifest.json").read_text())
    train_state = json.loads((last / "train_state.json").read_text())
    files = manifest["files"]
    shards = {name: record for name, record in files.items() if name.endswith(".distcp")}
    assert shards
    return {
        "step": last.name,
        "shards": shards,
        "data": train_state["data"],
        "validated": train_state["validated_step"],
    }


def only_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]
