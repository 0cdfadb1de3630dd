"""What command lines of several benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moe.config import ConfigError, compose
from moe.parallel import resolve


def positive(text: str) -> int:
    """A number of at least 1; argparse names the argument that holds another."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def new_file(text: str) -> Path:
    """Where results will go: its folder is there, and it is none itself."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder")
    return path


def overrides_of(layout: str) -> list[str]:
    """AXIS=N[,AXIS=N] -> overrides for train.py."""
    return [f"parallel.{axis}" for axis in layout.split(",") if axis]


def check_layout(parser: argparse.ArgumentParser, axes: list[str], processes: int, overrides: list[str]) -> None:
    """End with the reason where train.py would refuse a layout."""
    try:
        resolve(compose([*overrides, *axes]), processes)
    except ConfigError as error:
        parser.error(f"--layouts, {' '.join(axes)}: {error}")


def parse_on_gpu(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line of a benchmark that a CPU cannot run."""
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "error: no CUDA device here\n")
    return options
