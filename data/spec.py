"""What decides the order of training data, and its fingerprint, from which a resumed run can tell what has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import xxhash

from data.errors import DataError
from data.order import Stage
from data.packing import PACKINGS

STREAM_VERSION = 3
SHUFFLES = ("windowed", "full")
PARTS = ("text", "seq_len", "seed", "weights", "shuffle", "packing", "mask_documents", "skip_ranges")
_DIGITS = 6


@dataclass(frozen=True)
class StreamSpec:
    """All that decides which sequence comes when, but for the text itself.

    Attributes:
        seq_len: inputs in a sequence, L.
        seed: order of the rows.
        stages: weights of the sources, in sequences; see `Mixture`.
        shuffle: `windowed` (nearly sequential reads) or `full` (rows permuted over the whole source).
        packing: `chunk` or `best_fit`, see `data.packing`.
        mask_documents: whether tokens attend to their own document only.
        skip_ranges: ranges [first, end) of sequences to leave out.

    Raises:
        DataError: a field out of range; the line names it.
    """

    seq_len: int
    stages: tuple[Stage, ...]
    seed: int = 0
    shuffle: str = "windowed"
    packing: str = "chunk"
    mask_documents: bool = False
    skip_ranges: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise DataError(f"seq_len: {self.seq_len} is too small, 1 is the least")
        for key, allowed in (("shuffle", SHUFFLES), ("packing", PACKINGS)):
            if getattr(self, key) not in allowed:
                raise DataError(f"{key}: {getattr(self, key)!r} is unknown, allowed: {', '.join(allowed)}")
        bounds = [bound for pair in self.skip_ranges for bound in pair]
        rising = all(a < b for a, b in self.skip_ranges) and all(
            a[1] <= b[0] for a, b in zip(self.skip_ranges, self.skip_ranges[1:], strict=False)
        )
        if not rising or (bounds and bounds[0] < 0):
            raise DataError("skip_ranges: must be rising pairs [first, end) of sequence indices that do not overlap")

    @classmethod
    def single_stage(
        cls, seq_len: int, weights: Mapping[str, Fraction | float | str], seed: int = 0, **settings: object
    ) -> StreamSpec:
        """A spec whose weights never change."""
        return cls(seq_len, (Stage.of(0, weights),), seed, **settings)  # type: ignore[arg-type]

    def names(self) -> set[str]:
        """Sources that a stage names."""
        return {name for stage in self.stages for name in stage.weights}

    def to_json(self) -> dict[str, object]:
        """The spec as JSON, to be kept with a run and compared."""
        stages = [[stage.start, {name: str(share) for name, share in stage.weights.items()}] for stage in self.stages]
        return {
            "seq_len": self.seq_len,
            "seed": self.seed,
            "weights": stages,
            "shuffle": self.shuffle,
            "packing": self.packing,
            "mask_documents": self.mask_documents,
            "skip_ranges": [list(pair) for pair in self.skip_ranges],
        }

    def fingerprint(self, text: str) -> str:
        """48 hex digits, six for each of PARTS; `text` is the digest of the corpus or of the text sources."""
        values = [[STREAM_VERSION, text], *self.to_json().values()]
        encoded = (json.dumps(value, sort_keys=True).encode() for value in values)
        return "".join(xxhash.xxh3_64_hexdigest(value)[:_DIGITS] for value in encoded)


def changed_parts(saved: object, own: str) -> Sequence[str]:
    """Which of PARTS differ between two fingerprints; all of them when `saved` is no fingerprint."""
    if not isinstance(saved, str) or len(saved) != len(own):
        return PARTS
    pieces = range(0, len(own), _DIGITS)
    return [part for part, at in zip(PARTS, pieces, strict=True) if saved[at : at + _DIGITS] != own[at : at + _DIGITS]]
