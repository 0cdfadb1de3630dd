from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import IGNORE_INDEX
from data.batch import CU_SEQLENS_MULTIPLE, Batch, Sequences, assemble

L = 6


def sequences(starts_at: list[list[int]], lengths: list[int]) -> Sequences:
    rows = len(lengths)
    tokens = np.arange(100, 100 + rows * (L + 1), dtype=np.int64).reshape(rows, L + 1)
    starts = np.zeros(tokens.shape, dtype=np.bool_)
    for row, places in enumerate(starts_at):
        starts[row, places] = True
    return Sequences(tokens, starts, np.array(lengths), np.arange(rows) % 2, np.arange(rows))


def test_labels_are_the_next_tokens_and_padding_has_none() -> None:
    (batch,) = assemble(sequences([[0, 3], [2]], [L, 4]), 2, mask_documents=False, padding_id=7)
    assert batch.input_ids.tolist() == [[100, 101, 102, 103, 104, 105], [107, 108, 109, 110, 7, 7]]
    ignored = IGNORE_INDEX
    assert batch.labels.tolist() == [[101, 102, 103, 104, 105, 106], [108, 109, 110, 111, ignored, ignored]]
    assert batch.valid.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert batch.document_starts.nonzero().tolist() == [[0, 0], [0, 3], [1, 2]]
    assert batch.position_ids is None
    assert batch.cu_seqlens is None
    assert (batch.num_labels(), batch.num_tokens()) == (10, 10)


def test_every_token_knows_its_language_and_source() -> None:
    (batch,) = assemble(sequences([[], [], []], [L, L, L]), 3, mask_documents=False, padding_id=0)
    assert batch.languages.tolist() == [[0] * L, [1] * L, [0] * L]
    assert torch.equal(batch.label_languages, batch.languages)
    assert batch.sources.tolist() == [[0] * L, [1] * L, [2] * L]


def test_masked_documents_restart_positions_and_lose_the_label_that_crosses() -> None:
    (batch,) = assemble(sequences([[3], [0, 6]], [L, L]), 2, mask_documents=True, padding_id=0)
    assert batch.labels[0].tolist() == [101, 102, IGNORE_INDEX, 104, 105, 106]
    assert batch.labels[1].tolist() == [108, 109, 110, 111, 112, IGNORE_INDEX]
    assert (batch.num_labels(), batch.num_tokens()) == (10, 12)
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens[:5].tolist() == [0, 3, 6, 12, 12]


@given(st.lists(st.tuples(st.sets(st.integers(0, L)), st.integers(0, L)), min_size=1, max_size=30))
def test_spans_partition_the_tokens(rows: list[tuple[set[int], int]]) -> None:
    raw = sequences([sorted(starts) for starts, _ in rows], [length for _, length in rows])
    (batch,) = assemble(raw, len(rows), mask_documents=True, padding_id=0)
    assert batch.cu_seqlens is not None
    assert batch.position_ids is not None
    bounds = batch.cu_seqlens.tolist()
    assert len(bounds) % CU_SEQLENS_MULTIPLE == 0
    assert bounds[0] == 0
    assert bounds[-1] == len(rows) * L
    assert bounds == sorted(bounds)
    positions = batch.position_ids.flatten().tolist()
    assert [i for i, position in enumerate(positions) if position == 0] == sorted(set(bounds[:-1]) - {len(rows) * L})
    for row, (starts, length) in enumerate(rows):
        for place in range(L):
            opens = place == 0 or place == length or (place in starts and place < length)
            assert opens == (positions[row * L + place] == 0)
    crossing = torch.from_numpy(raw.starts[:, 1:]) & batch.valid
    assert torch.all(batch.labels[crossing] == IGNORE_INDEX)


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("lengths", [[L, L, L, L, L], [L, 4, L, 0, 2]])
def test_batches_made_at_once_equal_batches_made_alone(mask_documents: bool, lengths: list[int]) -> None:
    raw = sequences([[0, 3], [2, 5], [], [1], [6]], lengths)
    raw = replace(raw, ends=np.arange(5 * L).reshape(5, L) % 7 == 3)
    made = assemble(raw, 2, mask_documents=mask_documents, padding_id=7)
    for batch, first in zip(made, (0, 2, 4), strict=True):
        cut = slice(first, first + 2)
        alone = Sequences(**{field.name: getattr(raw, field.name)[cut] for field in fields(raw)})
        (expected,) = assemble(alone, 2, mask_documents=mask_documents, padding_id=7)
        for field in fields(Batch):
            got, wanted = getattr(batch, field.name), getattr(expected, field.name)
            assert (got is None and wanted is None) or torch.equal(got, wanted), field.name


def test_moving_keeps_what_is_absent_absent() -> None:
    (batch,) = assemble(sequences([[1]], [L]), 1, mask_documents=False, padding_id=0)
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert moved.cu_seqlens is None
    assert torch.equal(moved.input_ids, batch.input_ids)
