"""A layout that cannot run is refused before any rank is contacted, and the message lists some that can."""

from __future__ import annotations

import pytest

from moe.config import ConfigError, compose
from moe.parallel import Layout, resolve

REFUSED = [
    (["parallel.tensor=2", "parallel.shard=3"], 4, "do not multiply to 4 ranks"),
    (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.num_attention_heads"),
    (["parallel.tensor=2", "data.seq_len=129"], 2, "parallel.tensor=2 does not divide data.seq_len=129"),
    (["parallel.expert=3"], 4, "parallel.expert=3 does not divide shard x tensor = 4"),
    (["parallel.expert=128"], 128, "parallel.expert=128 is more ranks than the"),
    (["+variant=dense", "parallel.expert=2"], 2, "the model has no routed experts"),
    (["train.global_batch_size=4", "train.micro_batch_size=2"], 4, "train.global_batch_size must be a multiple of"),
    (["train.micro_batch_size=1", "train.batch_ramp=[[5,2]]"], 4, "train.batch_ramp must be a multiple of"),
]


@pytest.mark.parametrize(("overrides", "ranks", "expected"), REFUSED, ids=[expected for *_, expected in REFUSED])
def test_what_cannot_run_is_refused_with_what_can(overrides: list[str], ranks: int, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(compose(overrides), ranks)
    assert expected in str(error.value)
    assert f"on {ranks} ranks these can run: " in str(error.value)
    assert "\n" not in str(error.value)


def test_on_one_rank_it_says_how_several_start() -> None:
    with pytest.raises(ConfigError, match=r"on 1 rank these can run: one rank; several start as torchrun "):
        resolve(compose(["parallel.shard=2"]), 1)


def test_the_layouts_that_are_offered_can_run() -> None:
    overrides = ["train.global_batch_size=4", "train.micro_batch_size=2"]
    with pytest.raises(ConfigError, match=r"not 4 \(.*\); on 4 ranks these can run: ") as error:
        resolve(compose(overrides), 4)
    offered = str(error.value).rpartition("can run: ")[2].split("; ")
    for text in offered:
        words = text.split(" x ")
        degrees = {axis: int(degree) for axis, degree in (word.split() for word in words)}
        chosen = [f"parallel.{axis}={degree}" for axis, degree in ({"shard": 1} | degrees).items()]
        assert str(resolve(compose([*overrides, *chosen]), 4)) == text


def test_the_open_axis_takes_what_the_others_leave() -> None:
    overrides = ["parallel.tensor=2", "train.global_batch_size=16"]
    assert resolve(compose(overrides), 8) == Layout(shard=4, tensor=2)
