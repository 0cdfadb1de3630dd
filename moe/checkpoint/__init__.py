"""Checkpoints that survive kills, full disks, flipped bits and a changed number of ranks."""

from __future__ import annotations

from moe.checkpoint.manager import CheckpointManager
from moe.checkpoint.manifest import CheckpointError

__all__ = ["CheckpointError", "CheckpointManager"]
