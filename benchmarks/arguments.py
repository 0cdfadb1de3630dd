"""What command lines of several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A number of at least 1; argparse names the argument that holds another."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def new_file(text: str) -> Path:
    """Where results will go: its folder is there."""
    path = Path(text)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
    return path
