"""The planner's formulas for weights and traffic, in real worlds of four and two processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from layout_world import HASHED, LAYOUTS
from parallel_helpers import SEQUENCES
from planning_world import check_state, check_traffic
from worlds import Outcomes, Scenario, play

from moe.parallel import Layout

FEW = {"n_routed_experts": 5, "num_experts_per_tok": 3, "n_device_groups": 3}
VARIED = [
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(shard=2, tensor=2),
    Layout(shard=4, expert=2),
    Layout(shard=2, tensor=2, expert=4),
    Layout(replicate=2, tensor=2, expert=2),
]


def play_case(check: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any], *_: object) -> None:
    check(*arguments, **options)


def cases() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}

    def add(check: Callable[..., None], layout: Layout, what: str, **options: Any) -> None:
        found[f"{layout}, {what}"] = partial(play_case, check, (layout,), options)

    for layout in LAYOUTS:
        add(check_state, layout, "state")
        add(check_state, layout, "state of 5 experts", **FEW)
        add(check_traffic, layout, "traffic", parts=min(2, SEQUENCES // layout.data))
    for layout in VARIED:
        add(check_traffic, layout, "recomputed", runtime={"activation_checkpointing": "full"})
        add(check_traffic, layout, "partly recomputed", runtime={"activation_checkpointing": "selective"})
        resharded = {"reshard": True}
        add(check_traffic, layout, "resharded", parts=2, parallel=resharded)
        recomputed = {"activation_checkpointing": "full"}
        add(check_traffic, layout, "resharded, recomputed", parallel=resharded, runtime=recomputed)
        add(check_traffic, layout, "logits in chunks", runtime={"loss_chunk_size": 7})
        add(check_traffic, layout, "pooled balance", seq_aux=False)
        add(check_traffic, layout, "5 experts, none shared", n_shared_experts=0, **FEW)
    add(check_traffic, Layout(shard=4, expert=2), "hashed", **HASHED)
    add(
        check_traffic,
        Layout(shard=4, expert=4),
        "hashed, recomputed",
        runtime={"activation_checkpointing": "full"},
        **HASHED,
    )
    return found


CASES = cases()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return play(CASES, tmp_path_factory.mktemp("world"), 4, patience=1800)


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_happens(outcomes: Outcomes, case: str) -> None:
    assert outcomes[case] == [""] * 4
