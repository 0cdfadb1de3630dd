"""How expert GEMMs and token permutation run. Stands on torch alone."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch

QUACK_VERSION = "0.4."
"""The interface of QuACK that is used is not a promised one: other versions are left alone."""


@torch.compiler.assume_constant_result  # compiled code need not look again
def has_triton() -> bool:
    """Whether the modules written in Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache  # the version is read from disk, and every layer asks
def has_quack() -> bool:
    """Whether a version of QuACK that can be used is installed."""
    try:
        return importlib.metadata.version("quack-kernels").startswith(QUACK_VERSION)
    except importlib.metadata.PackageNotFoundError:
        return False
