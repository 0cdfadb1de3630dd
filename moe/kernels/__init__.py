"""How expert GEMMs and token permutation run. Stands on torch alone."""

from __future__ import annotations
