"""The head and the loss as one module: hidden states and labels in, loss sums by language out, logits never kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


class LossSums(NamedTuple):
    """Sums over the labels of a micro-batch, by the label's language; (languages,) float32."""

    cross_entropy: Tensor
    """Nats."""
    labels: Tensor
    """How many labels were scored."""


class LMHead(nn.Module):
    """Untied projection to the vocabulary with the cross-entropy, float32, computed `chunk_size` tokens at a time."""

    def __init__(self, hidden_size: int, vocab_size: int, num_languages: int, chunk_size: int) -> None:
        super().__init__()
        self.num_languages, self.chunk_size = num_languages, chunk_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), at least float32; for generation."""
        return _project(hidden, self.weight)

    def forward(self, hidden: Tensor, labels: Tensor, label_languages: Tensor) -> LossSums:
        """(B, T, H) hidden states, (B, T) labels (IGNORE_INDEX: not scored) and their languages -> LossSums."""
        hidden, labels, label_languages = hidden.flatten(0, 1), labels.flatten(), label_languages.flatten()
        starts = range(0, hidden.shape[0], self.chunk_size)
        sums = hidden.new_zeros(self.num_languages, dtype=torch.float32)
        for start in starts:
            chunk = slice(start, start + self.chunk_size)
            arguments = (hidden[chunk], self.weight, labels[chunk], label_languages[chunk])
            if len(starts) > 1 and torch.is_grad_enabled():
                # logits of one chunk at a time: recomputing them costs one head GEMM, keeping them V floats a token
                sums = sums + checkpoint(self.chunk_loss, *arguments, use_reentrant=False)
            else:
                sums = sums + self.chunk_loss(*arguments)
        scored = F.one_hot(label_languages, self.num_languages) * (labels != IGNORE_INDEX)[:, None]
        return LossSums(sums, scored.sum(dim=0).float())

    def chunk_loss(self, hidden: Tensor, weight: Tensor, labels: Tensor, label_languages: Tensor) -> Tensor:
        """(N, H) x (V, H) -> (languages,) sums of cross-entropy."""
        losses = F.cross_entropy(_project(hidden, weight), labels, ignore_index=IGNORE_INDEX, reduction="none")
        return losses @ F.one_hot(label_languages, self.num_languages).to(losses.dtype)


def _project(hidden: Tensor, weight: Tensor) -> Tensor:
    """(..., H) x (V, H) -> (..., V) logits, at least float32."""
    logits = F.linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
