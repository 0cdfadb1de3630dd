"""Parity over ranks: four processes share one gloo world in which every scenario is played."""

from __future__ import annotations

import pytest
from parallel_world import SCENARIOS, WORLD_SIZE
from worlds import Outcomes, play


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    return play(scenarios, tmp_path_factory.mktemp("world"), WORLD_SIZE, patience=600)


@pytest.mark.parametrize("name", [scenario.__name__ for scenario in SCENARIOS])
def test_ranks_agree_with_one_process(outcomes: Outcomes, name: str) -> None:
    assert outcomes[name] == [""] * WORLD_SIZE
