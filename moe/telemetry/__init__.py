"""The host side of telemetry: metrics.jsonl, console, wandb, expert statistics, report."""

from __future__ import annotations

from moe.telemetry.console import ConsoleLogger
from moe.telemetry.experts import expert_statistics
from moe.telemetry.jsonl import ROW_FIELDS, TIMING_FIELDS, MetricsError, MetricsFile, read_metrics
from moe.telemetry.redact import redact
from moe.telemetry.run_folder import RunFolderError
from moe.telemetry.wandb_logger import WandbLogger, WandbMode

__all__ = [
    "ROW_FIELDS",
    "TIMING_FIELDS",
    "ConsoleLogger",
    "MetricsError",
    "MetricsFile",
    "RunFolderError",
    "WandbLogger",
    "WandbMode",
    "expert_statistics",
    "read_metrics",
    "redact",
]
