"""What a run writes beside its checkpoints, on the first rank alone: configuration, metrics, console, wandb, report."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml

from data import Text
from moe.config import Config, ModelConfig
from moe.kernels.experts import describe_backend
from moe.parallel import World
from moe.telemetry import ConsoleLogger, MetricsFile, WandbLogger, WandbMode, redact
from moe.telemetry.hardware import device_name, peak_memory_gib


class RunLog:
    """The run folder's writer. On other ranks than the first every method does nothing."""

    def __init__(
        self, config: Config, folder: Path, world: World, backends: dict[str, str], command: Sequence[str]
    ) -> None:
        self.config, self.folder, self.world, self.backends = config, folder, world, backends
        self.command = list(command)
        self.active = world.is_main
        self.console = ConsoleLogger(config.train.steps, self.active and sys.stdout.isatty())

    def open(self, step: int, validated_step: int, text: Text, model: ModelConfig) -> None:
        """Write what identifies the run, drop metrics that the checkpoint does not know, start wandb."""
        if not self.active:
            return
        config = redact(dataclasses.asdict(dataclasses.replace(self.config, run=self.folder.name)))
        content = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (self.folder / "config.yaml").write_text(content, encoding="utf-8")
        shutil.copyfile(text.tokenizer_path, self.folder / "tokenizer.json")  # what `moe.generate` reads
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        self.metrics.truncate_after(step, validated_step)
        name, run = self.config.name, self.folder.name
        telemetry = self.config.telemetry
        self.wandb = WandbLogger(
            cast(WandbMode, telemetry.wandb),
            self.folder,
            telemetry.wandb_project,
            f"{name}-{run}",
            f"{name}/{run}",
            config,
            self.message,
        )
        layout = f" ({self.world.layout})" if self.world.size > 1 else ""
        self.message(
            f"{redact(' '.join([name, *self.command[1:]]))}: {model.num_params():,} parameters, "
            f"{model.num_active_params():,} active; {self.world.size} x {device_name(self.world.device)}{layout}, "
            f"experts by {describe_backend(self.backends['expert_backend'])}, "
            f"attention by {self.backends['attention_backend']}; "
            f"run folder {self.folder}"
        )

    def message(self, text: str) -> None:
        if self.active:
            self.console.message(text)

    def row(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl, shown and sent as well."""
        if not self.active:
            return
        self.metrics.append(row)
        self.console.log(row)
        self.wandb.log(row)

    def close(self) -> None:
        if self.active:
            self.console.close()
            self.metrics.close()
            self.wandb.close()

    def environment(self) -> dict[str, Any]:
        """What ran the run; recorded, but no part of its identity."""
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(self.world.device),
            "world_size": self.world.size,
            "layout": str(self.world.layout),
            "threads": torch.get_num_threads(),
            **self.backends,
            "compile": self.config.runtime.compile,
        }

    def report(
        self, samples: list[dict[str, Any]], text: Text, model: ModelConfig, steps: int, tokens: int, seconds: float
    ) -> None:
        """summary.json, samples.json and report.html."""
        if not self.active:
            return
        _write_json(self.folder / "samples.json", samples)
        _write_json(self.folder / "summary.json", self._summary(text, model, steps, tokens, seconds))
        from moe.telemetry.report import write_report  # plotly loads slowly

        self.message(f"report: {write_report(self.folder)}")

    def _summary(self, text: Text, model: ModelConfig, steps: int, tokens: int, seconds: float) -> dict[str, Any]:
        config = self.config
        baselines = {
            language: {**vars(baseline), "validation_bytes": text.validation_bytes(language)}
            for language, baseline in text.baselines.items()
        }
        return {
            "name": config.name,
            "run": self.folder.name,
            "command": redact(" ".join(self.command)),
            "device": device_name(self.world.device),
            "num_params": model.num_params(),
            "num_active_params": model.num_active_params(),
            "flops_per_token": model.flops_per_token(config.data.seq_len),
            "training_seconds": seconds,
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "steps": steps,
            "tokens": tokens,
            "languages": list(text.languages),
            "baselines": baselines,
            "environment": self.environment(),
        }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
