from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.order import Mixture, Stage, permute, permute_in_windows, skip, unpermute

keys = st.integers(0, 2**64 - 1)


def single(weights: dict[str, object]) -> Mixture:
    return Mixture([Stage.of(0, weights)])  # type: ignore[arg-type]


@settings(max_examples=60)
@given(n=st.integers(1, 700), key=keys)
def test_permute_is_a_bijection_with_an_inverse(n: int, key: int) -> None:
    places = permute(np.arange(n), n, key)
    assert sorted(places.tolist()) == list(range(n))
    assert unpermute(places, n, key).tolist() == list(range(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9000), key=keys)
def test_windows_cover_every_row_once(n: int, key: int) -> None:
    assert sorted(permute_in_windows(np.arange(n), n, key).tolist()) == list(range(n))


def test_a_window_reads_whole_blocks() -> None:
    n, window = 100_003, 64 * 32
    rows = permute_in_windows(np.arange(window), n, 7)
    blocks = np.unique(rows // 64)
    assert len(blocks) <= 33
    assert np.ptp(blocks) > 32  # from all over the source
    assert sum(abs(a - b) == 1 for a, b in zip(rows, rows[1:], strict=False)) < 30


def test_permute_shuffles_well() -> None:
    n = 1000
    orders = [permute(np.arange(n), n, key) for key in range(20)]
    assert len({tuple(order.tolist()) for order in orders}) == 20
    for order in orders:
        assert (order == np.arange(n)).sum() < 10
        assert (np.abs(np.diff(order)) == 1).sum() < 15
        assert 0.28 * n < np.abs(order - np.arange(n)).mean() < 0.39 * n


def test_permute_on_huge_and_impossible_domains() -> None:
    n = 1_400_000_000_000
    for shuffle in (permute, permute_in_windows):
        places = shuffle(np.arange(n - 500, n), n, 5)
        assert len(np.unique(places)) == 500
        assert np.all((places >= 0) & (places < n))
        for index in (-1, 3):
            with pytest.raises(IndexError):
                shuffle(np.array([index]), 3, 0)
    with pytest.raises(IndexError, match="more than"):
        permute(np.arange(2), 1 << 54, 0)


def test_the_order_is_frozen() -> None:
    """A change of this order would silently change the data of every checkpoint: bump STREAM_VERSION with it."""
    assert permute(np.arange(10), 10, 42).tolist() == [3, 7, 4, 2, 8, 5, 6, 0, 9, 1]
    windows = permute_in_windows(np.arange(4000, 4010), 5000, 42)
    assert windows.tolist() == [2302, 1987, 1416, 2045, 2742, 1248, 1268, 666, 1931, 1043]
    assert single({"en": "0.7", "zh": "0.3"}).locate(np.arange(10))[0].tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]


def assert_exact(stages: list[Stage], length: int) -> None:
    """Every source stays within one sequence of the sum of its weights so far, and k counts its sequences."""
    mixture = Mixture(stages)
    sources, drawn = mixture.locate(np.arange(length))
    ideal = dict.fromkeys(mixture.sources, Fraction(0))
    count = dict.fromkeys(mixture.sources, 0)
    for index in range(length):
        weights = max((stage for stage in stages if stage.start <= index), key=lambda stage: stage.start).weights
        name = mixture.sources[sources[index]]
        assert drawn[index] == count[name]
        count[name] += 1
        for source in mixture.sources:
            ideal[source] += weights.get(source, Fraction(0))
            assert abs(ideal[source] - count[source]) < 1


weight_lists = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


@settings(max_examples=40, deadline=None)
@given(weight_lists)
def test_every_prefix_is_within_one_sequence(weights: list[int]) -> None:
    stage = Stage.of(0, {f"s{number}": Fraction(weight) for number, weight in enumerate(weights)})
    assert_exact([stage], 2 * sum(weights))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any), st.integers(1, 90)), max_size=4
    )
)
def test_stage_edges_lose_nothing(plan: list[tuple[list[int], int]]) -> None:
    stages, start = [], 0
    for weights, length in [*plan, ([1, 1, 1], 60)]:
        stages.append(Stage.of(start, {f"s{number}": weight for number, weight in enumerate(weights)}))
        start += length
    assert_exact(stages, start)


@pytest.mark.slow
def test_two_hundred_random_rational_weight_vectors() -> None:
    chance = random.Random(0)
    for _ in range(200):
        stages, start = [], 0
        for _ in range(chance.randint(1, 4)):
            weights = {f"s{number}": Fraction(chance.randint(1, 97), 97) for number in range(chance.randint(1, 8))}
            stages.append(Stage.of(start, weights))
            start += chance.randint(1, 400)
        assert_exact(stages, start + 400)


def test_weights_mean_what_is_written() -> None:
    for weights in ({"en": 0.7, "zh": 0.3}, {"en": "0.7", "zh": "3/10"}, {"en": 7, "zh": Fraction(3)}):
        assert Stage.of(0, weights).weights == {"en": Fraction(7, 10), "zh": Fraction(3, 10)}
    mixture = single({"a": 1, "b": 0, "c": 1})
    assert mixture.sources == ["a", "c"]


def test_far_positions_are_located_at_once() -> None:
    source, drawn = single({"en": "0.7", "zh": "0.3"}).locate(np.array([10**17]))
    assert (source.tolist(), drawn.tolist()) == ([0], [7 * 10**16])


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"en": "a"}, "weights.en: 'a' is not a number"),
        ({"en": float("nan")}, "is not a number"),
        ({"en": float("inf")}, "is not a number"),
        ({"en": "1/0"}, "is not a number"),
        ({"en": -1, "zh": 2}, "weights.en: -1 is negative"),
        ({"en": 0, "zh": 0.0}, "at least one must be above 0"),
        ({}, "at least one must be above 0"),
        ({"en": 1, "zh": 0.33333}, "repeat only after"),
    ],
)
def test_bad_weights(weights: dict[str, object], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        single(weights)


def test_stages_start_at_zero_and_rise() -> None:
    weights = {"en": Fraction(1)}
    for starts in ([], [5], [0, 7, 7], [0, 9, 3]):
        with pytest.raises(DataError, match="stage"):
            Mixture([Stage(start, weights) for start in starts])


@settings(max_examples=60)
@given(st.lists(st.integers(0, 200), max_size=8, unique=True))
def test_skipping_leaves_out_exactly_the_ranges(bounds: list[int]) -> None:
    bounds = sorted(bounds)[: len(bounds) // 2 * 2]
    ranges = list(zip(bounds[::2], bounds[1::2], strict=True))
    kept = [index for index in range(400) if not any(first <= index < end for first, end in ranges)]
    assert skip(np.arange(150), ranges).tolist() == kept[:150]
