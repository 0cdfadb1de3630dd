"""What the model is fed: sequences of tokens with labels, languages and document starts, as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
CU_SEQLENS_MULTIPLE = 64


@dataclass(frozen=True)
class Sequences:
    """B sequences of one source each, as read: L inputs and the token behind the last one.

    Attributes:
        tokens: (B, L + 1), integers of any width; what lies behind `lengths + 1` tokens is padding.
        starts: (B, L + 1) bool, tokens that open a document.
        lengths: (B,) inputs in a sequence, L or fewer.
        ends: (B, L) bool, inputs without a label, or None: each input is labelled by the token behind it.
        languages, sources: (B,) places in the corpus's `languages` and `sources`.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    languages: np.ndarray
    sources: np.ndarray
    ends: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """B sequences of L tokens.

    Attributes:
        input_ids, labels: (B, L) int64; `labels[b, t]` is the token to predict from position t, or IGNORE_INDEX.
        valid: (B, L) bool, False on padding.
        document_starts: (B, L) bool, inputs that open a document.
        row_languages, row_sources: (B,) int64, of all tokens of a sequence.
        position_ids: (B, L) int32, counted from the start of the document, or None: documents do not mask each other.
        cu_seqlens: (n,) int32, rising bounds of the spans of the flattened B L tokens that may attend to each other,
            from 0 to B L, which is repeated until n is a multiple of 64; None as above.
    """

    input_ids: Tensor
    labels: Tensor
    valid: Tensor
    document_starts: Tensor
    row_languages: Tensor
    row_sources: Tensor
    position_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def languages(self) -> Tensor:
        """(B, L) int64: language of every input, a place in `TokenCorpus.languages`; on padding it means nothing."""
        return self.row_languages[:, None].expand_as(self.input_ids)

    @property
    def label_languages(self) -> Tensor:
        """(B, L) int64: language of every label; sequences are of one language."""
        return self.languages

    @property
    def sources(self) -> Tensor:
        """(B, L) int64: source of every input, a place in `TokenCorpus.sources`."""
        return self.row_sources[:, None].expand_as(self.input_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with its work: those of views,
        as inputs and labels are, could not."""
        return self._map(lambda tensor: tensor.contiguous().pin_memory())

    def num_labels(self) -> int:
        """Labels to predict, of a batch on the host."""
        # not by torch, whose threads take milliseconds to wake up beside others, while GPUs wait for the step to start
        return int(np.count_nonzero(self.labels.numpy() != IGNORE_INDEX))

    def num_tokens(self) -> int:
        """Tokens that are not padding, likewise."""
        return int(np.count_nonzero(self.valid.numpy()))

    def _map(self, move: Callable[[Tensor], Tensor]) -> Batch:
        tensors = (getattr(self, field.name) for field in fields(self))
        return Batch(*(None if tensor is None else move(tensor) for tensor in tensors))  # type: ignore[arg-type]


def assemble(sequences: Sequences, size: int, *, mask_documents: bool, padding_id: int) -> list[Batch]:
    """Tensors of B sequences in batches of `size`, which share memory: making many at once costs less for each.

    With `mask_documents` no label crosses a document's start and positions restart.
    """
    seq_len = sequences.tokens.shape[1] - 1
    tokens, starts = sequences.tokens.astype(np.int64), sequences.starts[:, :-1]
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]  # views of the same memory
    is_padded = bool((sequences.lengths < seq_len).any())
    if mask_documents or sequences.ends is not None or is_padded:
        labels = labels.copy()
    valid = np.ones(input_ids.shape, dtype=np.bool_)
    if is_padded:
        valid = np.arange(seq_len) < sequences.lengths[:, None]
        input_ids[~valid] = padding_id
        labels[~valid] = IGNORE_INDEX
        starts = starts & valid
    if sequences.ends is not None:
        labels[sequences.ends] = IGNORE_INDEX
    if mask_documents:
        labels[sequences.starts[:, 1:]] = IGNORE_INDEX
    where = sequences.languages.astype(np.int64), sequences.sources.astype(np.int64)
    arrays = (input_ids, labels, valid, starts, *where)
    parts = zip(*(torch.from_numpy(array).split(size) for array in arrays), strict=True)
    if not mask_documents:
        return [Batch(*part) for part in parts]
    cuts = [slice(first, first + size) for first in range(0, len(tokens), size)]
    spans = (document_spans(starts[cut], sequences.lengths[cut]) for cut in cuts)
    return [Batch(*part, *map(torch.from_numpy, span)) for part, span in zip(parts, spans, strict=True)]


def document_spans(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions (B, L) and span bounds (n,), both int32, of starts (B, L).

    A sequence's first token and the first of its padding open a span as well.
    """
    opens = starts.copy()
    opens[:, 0] = True
    padded = np.flatnonzero(lengths < starts.shape[1])
    opens[padded, lengths[padded]] = True
    bounds = np.flatnonzero(opens)
    spans = np.diff(bounds, append=opens.size)
    position_ids = np.arange(opens.size) - np.repeat(bounds, spans)
    entries = -(-(len(bounds) + 1) // CU_SEQLENS_MULTIPLE) * CU_SEQLENS_MULTIPLE
    cu_seqlens = np.full(entries, opens.size, dtype=np.int32)
    cu_seqlens[: len(bounds)] = bounds
    return position_ids.reshape(opens.shape).astype(np.int32), cu_seqlens
