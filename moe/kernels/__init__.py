"""How expert GEMMs and token permutation run. Stands on torch alone."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether the modules written in Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
