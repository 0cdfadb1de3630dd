from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import BestFit, Chunks

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120)


def plan_of(document_lengths: list[int], seq_len: int) -> BestFit:
    return BestFit.plan(np.cumsum(document_lengths), seq_len)


def rooms(plan: BestFit) -> list[int]:
    firsts = plan.first_piece.astype(int)
    pairs = zip(firsts, firsts[1:], strict=False)
    return sorted(plan.seq_len - int(plan.lengths[first:end].sum()) for first, end in pairs)


def best_fit_one_by_one(pieces: list[int], seq_len: int) -> list[int]:
    free: list[int] = []
    for piece in sorted(pieces, reverse=True):
        row = min((row for row, room in enumerate(free) if room >= piece), key=lambda row: free[row], default=None)
        if row is None:
            row = len(free)
            free.append(seq_len)
        free[row] -= piece
    return sorted(free)


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(1, 40))
def test_the_plan_is_best_fit_decreasing(document_lengths: list[int], seq_len: int) -> None:
    plan = plan_of(document_lengths, seq_len)
    pieces = [min(seq_len, n - done) for n in document_lengths for done in range(0, n, seq_len)]
    assert rooms(plan) == best_fit_one_by_one(pieces, seq_len)
    assert plan.padding == sum(rooms(plan))


@settings(max_examples=100, deadline=None)
@given(lengths, st.integers(1, 40))
def test_every_token_lies_in_one_piece_and_only_long_documents_are_cut(
    document_lengths: list[int], seq_len: int
) -> None:
    plan = plan_of(document_lengths, seq_len)
    spans = sorted((int(begin), int(begin) + int(n)) for begin, n in zip(plan.begins, plan.lengths, strict=True))
    assert spans[0][0] == 0
    assert spans[-1][1] == sum(document_lengths)
    assert all(before[1] == after[0] for before, after in zip(spans, spans[1:], strict=False))
    edges = {0, *np.cumsum(document_lengths).tolist()}
    for begin, end in spans:
        assert (begin in edges and end in edges) or any(
            first <= begin and end <= first + n and n > seq_len
            for first, n in zip([0, *np.cumsum(document_lengths)], document_lengths, strict=False)
        )


def test_a_kept_plan_is_read_back_and_a_damaged_one_made_again(tmp_path: Path) -> None:
    ends = np.cumsum([5, 3, 9, 30, 2, 2, 7])
    path = tmp_path / "packing" / "en-8"
    made = BestFit.cached(path, ends, 8)
    kept = path.read_bytes()
    for damage in (kept, kept[:-8], b"", b"\0" * 24):
        path.write_bytes(damage)
        read = BestFit.cached(path, ends, 8)
        for name in ("begins", "lengths", "first_piece"):
            assert np.array_equal(getattr(read, name), getattr(made, name))
        assert path.read_bytes() == kept


def test_a_plan_is_made_in_memory_where_it_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "packing").write_text("a file where the folder should be")
    assert BestFit.cached(tmp_path / "packing" / "en-8", np.array([5]), 8).num_rows == 1


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2)])
def test_chunks_share_one_token(tokens: int, rows: int) -> None:
    chunks = Chunks(tokens, 8)
    assert chunks.num_rows == rows
    assert chunks.begins(np.arange(3)).tolist() == [0, 8, 16]
