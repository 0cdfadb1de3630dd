from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moe.telemetry import expert_statistics


def test_statistics_of_a_small_case() -> None:
    counts = np.array([[[6, 2, 0, 0], [0, 0, 4, 0]]])
    (layer,) = expert_statistics(counts, np.array([math.log(4) / 2]), [3], ["en", "zh"])
    assert layer == {
        "layer": 3,
        "load": [2.0, 0.6667, 1.3333, 0.0],
        "load_by_language": {"en": [3.0, 1.0, 0.0, 0.0], "zh": [0.0, 0.0, 4.0, 0.0]},
        "max_violation": 1.0,
        "dead": 1,
        "entropy": 0.5,
    }
    assert list(layer) == ["layer", "load", "load_by_language", "max_violation", "dead", "entropy"]


def test_uniform_routing_has_no_violation_and_full_entropy() -> None:
    (layer,) = expert_statistics(np.full((1, 1, 8), 5), np.array([math.log(8)]), [0], ["en"])
    assert layer["load"] == [1.0] * 8
    assert (layer["max_violation"], layer["dead"], layer["entropy"]) == (0.0, 0, 1.0)


def test_a_language_without_tokens_has_zeros() -> None:
    counts = np.array([[[1, 3], [0, 0]]])
    (layer,) = expert_statistics(counts, np.array([0.0]), [0], ["en", "zh"])
    assert layer["load_by_language"]["zh"] == [0.0, 0.0]


def test_a_layer_without_tokens() -> None:
    (layer,) = expert_statistics(np.zeros((1, 1, 4)), np.array([0.0]), [0], ["en"])
    assert (layer["max_violation"], layer["dead"], layer["load"]) == (0.0, 4, [0.0] * 4)


@given(arrays(np.int64, (2, 2, 6), elements=st.integers(0, 10**12)))
def test_loads_sum_to_the_number_of_experts(counts: np.ndarray) -> None:
    for layer, layer_counts in zip(expert_statistics(counts, np.zeros(2), [1, 2], ["en", "zh"]), counts, strict=True):
        assert sum(layer["load"]) == pytest.approx(6 if layer_counts.any() else 0, abs=1e-3)
        assert layer["dead"] == sum(not layer_counts[:, expert].any() for expert in range(6))


@pytest.mark.parametrize(("layers", "languages"), [([1], ["en", "zh"]), ([1, 2], ["en"])])
def test_wrong_shapes_are_refused(layers: list[int], languages: list[str]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        expert_statistics(np.ones((2, 2, 4)), np.ones(2), layers, languages)
