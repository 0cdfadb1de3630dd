"""The order of training data as arithmetic: which source and which of its rows a global sequence index means.

Nothing here has state. `Mixture` deals sequences to sources by a periodic template that keeps to the weights at every
prefix; `permute` shuffles the rows of a source without a table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from data.errors import DataError

MAX_PERIOD = 10_000
ROUNDS = 6
MASK_64 = (1 << 64) - 1


def permute(index: int, n: int, key: int) -> int:
    """Where the permutation of `0 .. n - 1` chosen by the 64-bit `key` sends `index`.

    A balanced Feistel network over the next even power of two, walked along its cycle until it lands below `n` (Black
    and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): a bijection for every key, under 4 steps on average.

    Raises:
        IndexError: `index` is not in `0 .. n - 1`.
    """
    if not 0 <= index < n:
        raise IndexError(f"index {index} is outside 0 .. {n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    place = _feistel(index, half, key)
    while place >= n:
        place = _feistel(place, half, key)
    return place


def _feistel(value: int, half: int, key: int) -> int:
    left, right = value >> half, value & ((1 << half) - 1)
    for number in range(ROUNDS):
        left, right = right, left ^ (_scramble(right ^ _scramble(key + number)) >> (64 - half))
    return left << half | right


def _scramble(value: int) -> int:
    """One output of the SplitMix64 generator (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK_64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK_64
    return value ^ value >> 31


class Mixture:
    """Sources in fixed proportions: after any number of sequences every source is within one of its exact share.

    Weights may be any positive scale (0.7 and 0.3, or 7 and 3) and are taken as the decimals or fractions they are
    written as. A source of weight 0 is never drawn. All sequences have equal length, so these are weights of tokens.

    Attributes:
        weights: shares that add up to 1, sources of weight 0 left out.
        period: the template repeats after this many sequences.
    """

    def __init__(self, weights: Mapping[str, Fraction | float | str]) -> None:
        exact = {name: _exact(name, weight) for name, weight in weights.items()}
        total = sum(exact.values())
        if total == 0:
            raise DataError("weights: at least one must be above 0")
        self.weights = {name: weight / total for name, weight in sorted(exact.items()) if weight}
        self.period = math.lcm(*(weight.denominator for weight in self.weights.values()))
        if self.period > MAX_PERIOD:
            raise DataError(f"weights: repeat only after {self.period} sequences, round them ({MAX_PERIOD} is allowed)")
        self._shares = {name: int(weight * self.period) for name, weight in self.weights.items()}
        self._template = _deal(self._shares, self.period)

    def locate(self, index: int) -> tuple[str, int]:
        """(source, k): global sequence `index` is the k-th sequence drawn from `source`; k counts from 0."""
        cycle, place = divmod(index, self.period)
        source, drawn = self._template[place]
        return source, cycle * self._shares[source] + drawn


def _exact(name: str, weight: Fraction | float | str) -> Fraction:
    try:
        exact = weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"weights.{name}: {weight!r} is not a number") from error
    if exact < 0:
        raise DataError(f"weights.{name}: {weight} is negative")
    return exact


def _deal(shares: Mapping[str, int], period: int) -> list[tuple[str, int]]:
    """One period of (source, how often it was drawn before).

    Tijdeman, "The chairman assignment problem" (1980): among the sources far enough behind, take the one whose deadline
    comes first. With n sources no prefix strays from the shares by more than 1 - 1 / (2n - 2).
    """
    slack = max(2 * len(shares) - 2, 1)
    drawn = dict.fromkeys(shares, 0)
    template = []
    for place in range(1, period + 1):
        behind = {name: slack * (share * place - period * drawn[name]) for name, share in shares.items()}
        due = [name for name in shares if behind[name] >= period]
        source = min(due, key=lambda name: Fraction((slack - 1) * period - behind[name], shares[name]))
        template.append((source, drawn[source]))
        drawn[source] += 1
    return template
