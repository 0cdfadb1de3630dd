"""From token counts per expert to the statistics of metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def expert_statistics(
    counts: np.ndarray, entropy: np.ndarray, layer_indices: Sequence[int], languages: Sequence[str]
) -> list[dict[str, Any]]:
    """Statistics of one logging interval, one dict a MoE layer.

    counts: (layers, languages, experts), tokens sent to each routed expert; entropy: (layers,), mean entropy of the
    router's distribution in nats. `load` is normalised so that 1.0 is the uniform share (of the language, for
    `load_by_language`; a language without tokens has zeros); `max_violation` is the largest load minus 1 (MaxVio,
    arXiv 2408.15664); `dead` counts experts without a token; `entropy` is divided by its maximum, log(experts).
    Loads are rounded to four decimals. Raises ValueError when the shapes disagree.
    """
    expected = (len(layer_indices), len(languages))
    if counts.ndim != 3 or counts.shape[:2] != expected or entropy.shape != expected[:1]:
        raise ValueError(
            f"expert counts {counts.shape} and entropy {entropy.shape} do not fit {expected[0]} layers "
            f"and {expected[1]} languages"
        )
    return [
        _layer_statistics(layer_counts, float(layer_entropy), layer, languages)
        for layer_counts, layer_entropy, layer in zip(counts, entropy, layer_indices, strict=True)
    ]


def _layer_statistics(counts: np.ndarray, entropy: float, layer: int, languages: Sequence[str]) -> dict[str, Any]:
    total = counts.sum(axis=0)  # (languages, experts) -> (experts,)
    load = _load(total)
    num_experts = load.size
    return {
        "layer": int(layer),
        "load": _rounded(load),
        "load_by_language": {name: _rounded(_load(row)) for name, row in zip(languages, counts, strict=True)},
        "max_violation": round(float(load.max()) - 1.0, 4) if total.any() else 0.0,
        "dead": int((total == 0).sum()),
        "entropy": round(entropy / math.log(num_experts), 4) if num_experts > 1 else 0.0,
    }


def _load(counts: np.ndarray) -> np.ndarray:
    """(experts,) tokens -> (experts,) multiples of the uniform share."""
    total = counts.sum()
    return counts * (counts.size / total) if total else np.zeros(counts.shape)


def _rounded(load: np.ndarray) -> list[float]:
    rounded: list[float] = np.round(load.astype(np.float64), 4).tolist()
    return rounded
