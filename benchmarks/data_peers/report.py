"""Rows of the comparison, and their table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

RAW = "raw"


@dataclass
class Row:
    """One way to read, measured several times.

    Attributes:
        system, case, workers, seq_len: what was measured; `action` is that of the case.
        rates: tokens a second, of every round; None where it failed.
        startups, resumes: seconds to the first batch, from nothing and from a state.
        state_bytes: of a state.
        is_exact: whether the batch after resuming was always the one that would have followed.
        problem: why it could not be measured.
    """

    system: str
    case: str
    workers: int
    seq_len: int
    action: str
    rates: list[float | None] = field(default_factory=list)
    startups: list[float] = field(default_factory=list)
    resumes: list[float] = field(default_factory=list)
    state_bytes: int | None = None
    is_exact: bool | None = None
    problem: str = ""


HEADER = (
    "system",
    "case",
    "workers",
    "length",
    "Mtoken/s",
    "spread",
    "of raw",
    "start s",
    "resume s",
    "exact",
    "state B",
)


def table(rows: Sequence[Row]) -> list[str]:
    """Lines: a header, then medians, with least and most of the rates."""
    cells = [HEADER, *(_cells(row, _of_raw(row, rows)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return [lines[0], *(line + _problem(row) for line, row in zip(lines[1:], rows, strict=True))]


def _cells(row: Row, of_raw: float | None) -> tuple[str, ...]:
    rates = _known(row.rates)
    return (
        row.system,
        row.case,
        str(row.workers),
        str(row.seq_len),
        f"{median(rates) / 1e6:.2f}" if rates else "-",
        f"{min(rates) / 1e6:.2f}-{max(rates) / 1e6:.2f}" if rates else "-",
        f"{of_raw:.2f}" if of_raw is not None else "",
        f"{median(row.startups):.3f}" if row.startups else "",
        f"{median(row.resumes):.3f}" if row.resumes else "",
        {None: "", True: "yes", False: "no"}[row.is_exact],
        str(row.state_bytes) if row.state_bytes is not None else "",
    )


def _problem(row: Row) -> str:
    return f"  failed: {row.problem}" if row.problem else ""


def _of_raw(row: Row, rows: Iterable[Row]) -> float | None:
    """Median over the rounds of the rate beside the fastest of the library alone in the same round."""
    raw = [other.rates for other in rows if other.action == RAW]
    if row.system != "text" or not raw:
        return None
    best = [max(_known(rates), default=None) for rates in zip(*raw, strict=True)]
    ratios = [rate / most for rate, most in zip(row.rates, best, strict=True) if rate is not None and most is not None]
    return median(ratios) if ratios else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
