"""What command lines of several benchmarks share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A number of at least 1; argparse names the argument that holds another."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
