from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Mixture
from data.order import permute


@settings(max_examples=60)
@given(n=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(index, n, key) for index in range(n)) == list(range(n))


def test_permute_shuffles_well() -> None:
    n = 1000
    orders = [[permute(index, n, key) for index in range(n)] for key in range(20)]
    assert len({tuple(order) for order in orders}) == 20
    for order in orders:
        assert sum(index == place for index, place in enumerate(order)) < 10
        assert sum(abs(a - b) == 1 for a, b in zip(order, order[1:], strict=False)) < 15
        mean_shift = sum(abs(index - place) for index, place in enumerate(order)) / n
        assert 0.28 * n < mean_shift < 0.39 * n


def test_permute_on_huge_and_impossible_domains() -> None:
    n = 1_400_000_000_000
    places = {permute(index, n, 5) for index in range(n - 500, n)}
    assert len(places) == 500
    assert all(0 <= place < n for place in places)
    for index in (-1, 3):
        with pytest.raises(IndexError):
            permute(index, 3, 0)


def test_the_order_is_frozen() -> None:
    """A change of this order would silently change the data of every checkpoint: bump STREAM_VERSION with it."""
    assert [permute(index, 10, 42) for index in range(10)] == [3, 7, 6, 0, 8, 4, 5, 1, 9, 2]
    dealt = [Mixture({"en": "0.7", "zh": "0.3"}).locate(index)[0] for index in range(10)]
    assert "".join(name[0] for name in dealt) == "ezeeezeeze"


weight_lists = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)


@settings(max_examples=80)
@given(weight_lists)
def test_every_prefix_is_within_one_sequence(weights: list[int]) -> None:
    mixture = Mixture({f"s{number}": Fraction(weight) for number, weight in enumerate(weights)})
    total = sum(weights)
    drawn: Counter[str] = Counter()
    for index in range(2 * mixture.period):
        source, k = mixture.locate(index)
        assert k == drawn[source]
        drawn[source] += 1
        for number, weight in enumerate(weights):
            assert abs(drawn[f"s{number}"] - Fraction(weight, total) * (index + 1)) < 1


def test_weights_mean_what_is_written() -> None:
    for weights in ({"en": 0.7, "zh": 0.3}, {"en": "0.7", "zh": "3/10"}, {"en": 7, "zh": Fraction(3)}):
        mixture = Mixture(weights)
        assert mixture.weights == {"en": Fraction(7, 10), "zh": Fraction(3, 10)}
        assert mixture.period == 10
    assert [Mixture({"a": 1, "b": 0, "c": 1}).locate(index)[0] for index in range(4)].count("b") == 0


def test_far_positions_are_located_at_once() -> None:
    mixture = Mixture({"en": "0.7", "zh": "0.3"})
    assert mixture.locate(10**30) == ("en", 7 * 10**29)


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
def test_bad_weights(weights: dict[str, float | str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Mixture(weights)
