"""Every layout trains the model that one process trains: four processes share one gloo world for all cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from layout_world import (
    FEW,
    HASHED,
    LAYOUTS,
    check_compiled,
    check_device_groups,
    check_first_step,
    check_host_copies,
    check_loads,
    check_meanwhile,
    check_session,
    check_states,
    check_steps,
    check_traced,
    check_validation,
    write_corpus,
)
from parallel_helpers import SEQUENCES
from worlds import Outcomes, Scenario, play

from moe.parallel import Layout

WORLD_SIZE = 4
EXPERT_LAYOUTS = [
    Layout(shard=2, expert=2),
    Layout(shard=4, expert=4),
    Layout(shard=4, expert=2),
    Layout(shard=2, tensor=2, expert=4),
]
VALIDATED = [Layout(replicate=2, shard=2), Layout(shard=4, expert=2), Layout(shard=2, tensor=2, expert=4)]
SAVED = [
    Layout(),
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(tensor=4),
    Layout(shard=2, tensor=2),
    Layout(shard=4, expert=4),
    Layout(shard=4, expert=2),
    Layout(shard=2, tensor=2, expert=4),
]


def play_case(check: Callable[..., None], arguments: tuple[Any, ...], options: dict[str, Any], *_: object) -> None:
    check(*arguments, **options)


def cases() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {}

    def add(check: Callable[..., None], layout: Layout, what: str, **options: Any) -> None:
        found[f"{layout}, {what}"] = partial(play_case, check, (layout,), options)

    for layout in LAYOUTS:
        add(check_first_step, layout, "first step")
        add(check_steps, layout, "8 steps", steps=8, parts=accumulated(layout))
    for layout in EXPERT_LAYOUTS:
        parts = accumulated(layout)
        add(check_first_step, layout, "5 experts, accumulated", parts=parts, **FEW)
        add(check_first_step, layout, "recomputed", parts=parts, runtime={"activation_checkpointing": "full"})
        add(check_first_step, layout, "partly recomputed", runtime={"activation_checkpointing": "selective"})
        add(check_first_step, layout, "resharded", parts=parts, parallel={"reshard": True})
        for load in ("one rank", "all but one"):
            add(check_loads, layout, f"tokens to {load}", load=load)
        add(check_host_copies, layout, "one copy to the host a dispatch")
        add(check_meanwhile, layout, "products while rows travel")
    for layout in (Layout(shard=4, expert=2), Layout(shard=2, tensor=2, expert=2)):
        add(check_first_step, layout, "hashed", **HASHED)
        add(check_first_step, layout, "pooled balance", seq_aux=False)
        add(check_first_step, layout, "none shared", n_shared_experts=0, scoring_func="sigmoid", norm_topk_prob=True)
        add(check_first_step, layout, "loop", runtime={"expert_backend": "loop"})
        add(check_compiled, layout, "compiled around exchanges")
    add(check_traced, Layout(tensor=2), "compiled, without inductor")
    split = Layout(shard=2, tensor=2)
    add(check_first_step, split, "recomputed", parts=2, runtime={"activation_checkpointing": "full"})
    add(check_first_step, split, "partly recomputed", runtime={"activation_checkpointing": "selective"})
    add(check_first_step, split, "grouped queries", num_key_value_heads=2)
    add(check_first_step, split, "logits in chunks", runtime={"loss_chunk_size": 7})
    add(check_first_step, Layout(shard=4), "5 experts", **FEW)
    add(check_first_step, Layout(replicate=2, shard=2), "resharded", parts=2, parallel={"reshard": True})
    return found


def accumulated(layout: Layout) -> int:
    """Micro-batches of a step: two where each rank has sequences enough."""
    return min(2, SEQUENCES // layout.data)


def play_states(saved: Layout, loaded: list[Layout], rank: int, folder: Path) -> None:
    check_states(folder / f"{saved} for {len(loaded)}", saved, loaded)


def play_states_of_eight(saved: Layout, loaded: Layout, rank: int, folder: Path) -> None:
    check_states(folder / f"{saved} to {loaded}", saved, [loaded], experts=63)


def play_validation(layout: Layout, rank: int, folder: Path) -> None:
    check_validation(folder / f"validation {rank}", folder, layout)


def play_device_groups(layout: Layout, rank: int, folder: Path) -> None:
    check_device_groups(folder / "groups", folder, layout)


def play_session(before: Layout, after: Layout, rank: int, folder: Path) -> None:
    check_session(folder / f"{before} to {after}", folder, before, after)


def longer_runs() -> dict[str, Scenario]:
    lengths: dict[str, dict[str, Any]] = {"20 steps": {"steps": 20}, "50 steps replayed": {"steps": 50, "replay": True}}
    return {
        f"{layout}, {what}": partial(play_case, check_steps, (layout,), options | {"parts": accumulated(layout)})
        for layout in LAYOUTS
        for what, options in lengths.items()
    }


def sessions(changes: list[tuple[Layout, Layout]]) -> dict[str, Scenario]:
    return {f"{before} to {after}": partial(play_session, before, after) for before, after in changes}


CASES = cases()
LONGER_RUNS = longer_runs()
INDUCTOR = {
    "tensor 2, compiled": partial(play_case, check_first_step, (Layout(tensor=2),), {"runtime": {"compile": True}})
}
VALIDATIONS, MORE_VALIDATIONS = (
    {f"{layout}, validation": partial(play_validation, layout) for layout in LAYOUTS if (layout in VALIDATED) == short}
    for short in (True, False)
)
GROUPS = {"device groups": partial(play_device_groups, Layout(shard=4, expert=4))}
STATES = {
    f"saved as {saved}": partial(play_states, saved, [SAVED[(number + ahead) % len(SAVED)] for ahead in (1, 2, 4)])
    for number, saved in enumerate(SAVED)
}
MORE_STATES = {f"saved as {saved}, for all": partial(play_states, saved, SAVED) for saved in SAVED}
SESSIONS = sessions([(Layout(shard=4), Layout(shard=2, tensor=2, expert=4))])
MORE_SESSIONS = sessions(
    [
        (Layout(shard=2, tensor=2, expert=4), Layout(shard=2)),
        (Layout(tensor=2), Layout(replicate=2, shard=2, expert=2)),
        (Layout(), Layout(shard=4, expert=2)),
    ]
)
EIGHT = [Layout(shard=8, expert=8), Layout(replicate=2, shard=2, tensor=2, expert=4)]
STATES_OF_EIGHT = {
    f"{saved} to {loaded}": partial(play_states_of_eight, saved, loaded)
    for layout in EIGHT
    for saved, loaded in ((Layout(), layout), (layout, Layout()))
}


SHORT = CASES | VALIDATIONS | GROUPS | STATES | SESSIONS
LONG = LONGER_RUNS | MORE_VALIDATIONS | MORE_STATES | MORE_SESSIONS | INDUCTOR


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return played(SHORT, tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def long_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return played(LONG, tmp_path_factory.mktemp("world"))


def played(scenarios: dict[str, Scenario], folder: Path) -> Outcomes:
    write_corpus(folder)
    return play(scenarios, folder, WORLD_SIZE, patience=1800)


@pytest.mark.parametrize("case", SHORT)
def test_a_layout_does_what_one_process_does(outcomes: Outcomes, case: str) -> None:
    assert outcomes[case] == [""] * WORLD_SIZE


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_a_layout_does_what_one_process_does_for_long(long_outcomes: Outcomes, case: str) -> None:
    assert long_outcomes[case] == [""] * WORLD_SIZE


@pytest.mark.slow
def test_one_process_and_eight_read_what_the_others_saved(tmp_path: Path) -> None:
    assert play(STATES_OF_EIGHT, tmp_path, 8, patience=1800) == {case: [""] * 8 for case in STATES_OF_EIGHT}
