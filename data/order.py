"""The order of training data as arithmetic: which source and which of its rows a global sequence index means.

Nothing here has state, and every function takes arrays of indices. `Mixture` deals sequences to sources by periodic
templates that keep to the weights at every prefix; `permute` and `permute_in_windows` shuffle the rows of a source
without a table; `skip` leaves ranges of sequences out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data.errors import DataError

MAX_PERIOD = 10_000
MAX_ROWS = 1 << 53
ROUNDS = 6

# 2,048 rows at a time: enough to mix documents that lie together, few enough to stay in the page cache.
BLOCK_ROWS = 64
WINDOW_BLOCKS = 32
WINDOW_ROWS = BLOCK_ROWS * WINDOW_BLOCKS


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where the permutation of `0 .. n - 1` chosen by the 64-bit `key` sends each `index`, int64.

    A Feistel network over the next power of two, walked along its cycle until it lands below `n` (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002): a bijection for every key, under 2 steps on average.

    Raises:
        IndexError: an index is not in `0 .. n - 1`.
    """
    return _walk(index, n, _round_keys(key), _feistel)


def unpermute(place: np.ndarray, n: int, key: int) -> np.ndarray:
    """The index that `permute` sends to each `place`."""
    return _walk(place, n, _round_keys(key)[::-1], _feistel_inverse)


def permute_in_windows(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A permutation of `0 .. n - 1` that reads a source in stretches: blocks of rows are permuted over all of it, then
    rows inside a window of blocks.

    The last block may be short by some rows; windows that begin behind it begin that much earlier.
    """
    num_blocks = -(-n // BLOCK_ROWS)
    missing = num_blocks * BLOCK_ROWS - n
    short_place = int(unpermute(np.array([num_blocks - 1]), num_blocks, key)[0])

    def first_row(window: np.ndarray) -> np.ndarray:
        return window * WINDOW_ROWS - missing * (window * WINDOW_BLOCKS > short_place)

    window = index // WINDOW_ROWS
    window = window + (index >= first_row(window + 1))
    row = np.empty_like(index)
    for number in np.unique(window).tolist():
        here = window == number
        begin, end = int(first_row(number)), min(int(first_row(number + 1)), n)
        inside = permute(index[here] - begin, end - begin, key ^ number + 1)
        if number * WINDOW_BLOCKS <= short_place < (number + 1) * WINDOW_BLOCKS:
            inside += missing * (begin + inside >= (short_place + 1) * BLOCK_ROWS - missing)
        blocks = np.arange(number * WINDOW_BLOCKS, min((number + 1) * WINDOW_BLOCKS, num_blocks))
        row[here] = permute(blocks, num_blocks, key)[inside // BLOCK_ROWS] * BLOCK_ROWS + inside % BLOCK_ROWS
    return row


def _walk(start: np.ndarray, n: int, round_keys: np.ndarray, network: Callable[..., np.ndarray]) -> np.ndarray:
    if n > MAX_ROWS:
        raise IndexError(f"a permutation of more than {MAX_ROWS} rows")
    if np.any((start < 0) | (start >= n)):
        raise IndexError(f"an index is outside 0 .. {n - 1}")
    bits = max(2, int(n - 1).bit_length())
    place = network(start, bits, round_keys)
    while (outside := np.flatnonzero(place >= n)).size:
        place[outside] = network(place[outside], bits, round_keys)
    return place


def _feistel(value: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    low = bits // 2
    left, right = _rounds(value >> low, value & (1 << low) - 1, bits - low, low, round_keys)
    return left << low | right


def _feistel_inverse(value: np.ndarray, bits: int, round_keys: np.ndarray) -> np.ndarray:
    """`_feistel` undone, given its keys in reverse: the same rounds, whose halves enter and leave swapped."""
    low = bits // 2
    right, left = _rounds(value & (1 << low) - 1, value >> low, low, bits - low, round_keys)
    return left << low | right


def _rounds(
    left: np.ndarray, right: np.ndarray, left_bits: int, right_bits: int, round_keys: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An even number of rounds, so that the halves come out as wide as they went in."""
    left, right = left.astype(np.uint32), right.astype(np.uint32)
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) >> np.uint32(32 - left_bits))
        left_bits, right_bits = right_bits, left_bits
    return left.astype(np.int64), right.astype(np.int64)


def _round_keys(key: int) -> np.ndarray:
    keys = scramble(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(key) + np.uint64(0x9E3779B97F4A7C15))
    return (keys >> np.uint64(32)).astype(np.uint32)


def _mix(value: np.ndarray) -> np.ndarray:
    """32 bits mixed in place (Wellons' lowbias32): halves have fewer, and numpy is four times as fast as on 64."""
    value ^= value >> np.uint32(16)
    value *= np.uint32(0x7FEB352D)
    value ^= value >> np.uint32(15)
    value *= np.uint32(0x846CA68B)
    value ^= value >> np.uint32(16)
    return value


def scramble(value: np.ndarray) -> np.ndarray:
    """A permutation of uint64: how the SplitMix64 generator (Steele, Lea and Flood, 2014) mixes its state."""
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)


def skip(index: np.ndarray, ranges: Sequence[tuple[int, int]]) -> np.ndarray:
    """The `index`-th sequence that lies in none of the `ranges` [first, end), which are disjoint and rising."""
    lengths = np.cumsum([0, *(end - first for first, end in ranges)])
    kept_before = np.array([first for first, _ in ranges], dtype=np.int64) - lengths[:-1]
    return index + lengths[np.searchsorted(kept_before, index, side="right")]


@dataclass(frozen=True)
class Stage:
    """From global sequence `start` on, sources are mixed by `weights`."""

    start: int
    weights: Mapping[str, Fraction]

    @classmethod
    def of(cls, start: int, weights: Mapping[str, Fraction | float | str], where: str = "weights") -> Stage:
        """Weights on any positive scale (0.7 and 0.3, or 7 and 3), taken as the decimals or fractions they are written
        as. DataError names a weight that is none, or that they are all 0."""
        exact = {name: _exact(weight, f"{where}.{name}") for name, weight in weights.items()}
        total = sum(exact.values())
        if total == 0:
            raise DataError(f"{where}: at least one must be above 0")
        return cls(start, {name: weight / total for name, weight in sorted(exact.items())})


class Mixture:
    """Sources in fixed proportions, stage by stage: after any number of sequences every source is within one of its
    exact share. All sequences have equal length, so these are weights of tokens.

    Attributes:
        sources: names of the sources that some stage draws from, sorted.
        stages: as given, the first from sequence 0.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages or stages[0].start != 0:
            raise DataError("weights: the first stage must start at 0")
        if any(after.start <= before.start for before, after in zip(stages, stages[1:], strict=False)):
            raise DataError("stages: must start at rising steps")
        self.stages = tuple(stages)
        self.sources = sorted({name for stage in stages for name, weight in stage.weights.items() if weight})
        self._starts = np.array([stage.start for stage in stages], dtype=np.int64)
        self._templates: list[_Template] = []
        ends = [*self._starts[1:], None]
        drawn, owed = np.zeros(len(self.sources), np.int64), [Fraction(0)] * len(self.sources)
        for stage, end in zip(stages, ends, strict=True):
            shares = [stage.weights.get(name, Fraction(0)) for name in self.sources]
            template = _Template(shares, drawn, owed)
            self._templates.append(template)
            if end is not None:
                length = int(end) - stage.start
                drawn = template.drawn_after(length)
                gained = drawn - template.drawn_before
                owed = [o + s * length - int(g) for o, s, g in zip(owed, shares, gained, strict=True)]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place in `sources`, k): a global sequence is the k-th drawn from its source; k counts from 0. int64."""
        stage = np.searchsorted(self._starts, index, side="right") - 1
        sources, drawn = np.empty_like(index), np.empty_like(index)
        for number in np.unique(stage):
            here = stage == number
            sources[here], drawn[here] = self._templates[number].locate(index[here] - self._starts[number])
        return sources, drawn


class _Template:
    """The draws of one stage: some periods at its start, then one or more that repeat for ever.

    `owed` is what earlier stages left each source short of its share; after a period the debts can only have changed by
    whole sequences, so that they soon repeat.
    """

    def __init__(self, shares: Sequence[Fraction], drawn_before: np.ndarray, owed: Sequence[Fraction]) -> None:
        period = math.lcm(*(share.denominator for share in shares))
        if period > MAX_PERIOD:
            raise DataError(f"weights: repeat only after {period} sequences, round them ({MAX_PERIOD} is allowed)")
        self.drawn_before = drawn_before
        seen: dict[tuple[Fraction, ...], int] = {}
        order: list[int] = []
        debts = tuple(owed)
        while debts not in seen:
            seen[debts] = len(order)
            draws, debts = _deal(shares, period, debts)
            order += draws
        self._repeats_from = seen[debts]
        self._order = np.array(order, dtype=np.int64)
        one_hot = self._order[:, None] == np.arange(len(shares))
        self._drawn = np.concatenate([np.zeros((1, len(shares)), np.int64), np.cumsum(one_hot, axis=0)])

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cycles, place = self._place(index)
        source = self._order[place]
        return source, self.drawn_before[source] + cycles * self._per_cycle()[source] + self._drawn[place, source]

    def drawn_after(self, length: int) -> np.ndarray:
        cycles, place = self._place(np.array([length]))
        return self.drawn_before + cycles * self._per_cycle() + self._drawn[place[0]]

    def _place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cycle = len(self._order) - self._repeats_from
        cycles = np.maximum(index - self._repeats_from, 0) // cycle
        return cycles, index - cycles * cycle

    def _per_cycle(self) -> np.ndarray:
        return self._drawn[-1] - self._drawn[self._repeats_from]


def _exact(weight: Fraction | float | str, where: str) -> Fraction:
    try:
        exact = weight if isinstance(weight, Fraction) else Fraction(str(weight))
    except (ValueError, ZeroDivisionError) as error:
        raise DataError(f"{where}: {weight!r} is not a number") from error
    if exact < 0:
        raise DataError(f"{where}: {weight} is negative")
    return exact


def _deal(shares: Sequence[Fraction], period: int, owed: Sequence[Fraction]) -> tuple[list[int], tuple[Fraction, ...]]:
    """One period of draws, and what is owed to the sources after it.

    Tijdeman, "The chairman assignment problem" (1980): among the sources far enough behind, take the one whose deadline
    comes first. With n sources no prefix strays from the shares by more than 1 - 1 / (2n - 2).
    """
    unit = math.lcm(period, *(debt.denominator for debt in owed))  # debts and shares as whole numbers of 1 / unit
    gains = [int(share * unit) for share in shares]
    debts = [int(debt * unit) for debt in owed]
    slack = max(2 * sum(gain > 0 or debt != 0 for gain, debt in zip(gains, debts, strict=True)) - 2, 1)

    def deadline(place: int) -> Fraction | float:
        if not gains[place]:
            return math.inf  # owed by an earlier stage, and never more than it was
        return Fraction((slack - 1) * unit - slack * debts[place], gains[place])

    draws = []
    for _ in range(period):
        debts = [debt + gain for debt, gain in zip(debts, gains, strict=True)]
        source = min((place for place, debt in enumerate(debts) if slack * debt >= unit), key=deadline)
        draws.append(source)
        debts[source] -= unit
    return draws, tuple(Fraction(debt, unit) for debt in debts)
