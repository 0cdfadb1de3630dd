"""What the model is fed: rows of tokens with labels, languages and document starts, stacked into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One sequence of L tokens of one language, as arrays of length L.

    `labels[t]` is the token that follows `input_ids[t]`, IGNORE_INDEX where there is none. `valid` is False on padding.
    `document_starts` marks inputs that open a document. `source_row` counts rows within the language's tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    document_starts: np.ndarray
    language: int
    source_row: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens, (B, L) each: ids, labels and languages int64, the others bool.

    `languages` is the language of the input token, `label_languages` that of the label, both as places in
    `TokenCorpus.languages`; on padding they mean nothing.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    languages: torch.Tensor
    label_languages: torch.Tensor
    document_starts: torch.Tensor

    @classmethod
    def stack(cls, rows: Sequence[Row]) -> Batch:
        """Stack B rows of equal length."""
        languages = torch.tensor([row.language for row in rows])[:, None].repeat(1, len(rows[0].input_ids))
        return cls(
            input_ids=_stack([row.input_ids for row in rows]),
            labels=_stack([row.labels for row in rows]),
            valid=_stack([row.valid for row in rows]),
            languages=languages,
            label_languages=languages.clone(),
            document_starts=_stack([row.document_starts for row in rows]),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors()))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with its work."""
        return Batch(*(tensor.pin_memory() for tensor in self._tensors()))

    def num_labels(self) -> torch.Tensor:
        """Number of labels to predict, a scalar int64 on the batch's device."""
        return (self.labels != IGNORE_INDEX).sum()

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays))  # B x (L,) -> (B, L)
