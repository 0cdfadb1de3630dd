"""The head and the loss as one module: hidden states and labels in, loss sums out, logits never kept.

The loss is the end of the forward pass, so its gradients are computed there and then, chunk by chunk, while a chunk's
logits exist: three products of the head's size, where keeping nothing and computing logits again would take four. They
are constants to autograd: second derivatives do not pass through here.

    (n, H) chunk --W--> logits --> losses, softmax - one-hot --W--> gradient of the chunk
                                                   --chunk--> part of the gradient of W
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels import has_triton
from moe.kernels.halves import in_float32, linear
from moe.model.experts import local

IGNORE_INDEX = -100

Score = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(n, H) x (V, H), (n,) labels -> (n,) losses, at least float32, and their gradients for the logits (n, V) in the dtype
of the hidden states; both 0 where not scored."""


class LossSums(NamedTuple):
    """Sums over the labels of a micro-batch, float32, in nats."""

    total: Tensor
    """Scalar; the one that carries gradients."""
    cross_entropy: Tensor
    """(languages,), by the label's language."""
    labels: Tensor
    """(languages,), how many labels were scored."""


class LMHead(nn.Module):
    """Untied projection to the vocabulary with the cross-entropy, float32, computed `chunk_size` tokens at a time."""

    def __init__(self, hidden_size: int, vocab_size: int, num_languages: int, chunk_size: int) -> None:
        super().__init__()
        self.num_languages, self.chunk_size = num_languages, chunk_size
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.score: Score = score

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V), at least float32; for generation."""
        return project(hidden, self.weight)

    def forward(self, hidden: Tensor, labels: Tensor, label_languages: Tensor) -> LossSums:
        """(B, T, H) hidden states, (B, T) labels (IGNORE_INDEX: not scored) and their languages -> LossSums."""
        hidden, labels, label_languages = hidden.flatten(0, 1), labels.flatten(), label_languages.flatten()
        weight = local(self.weight)
        if in_float32(hidden):
            hidden, weight = hidden.float(), weight.float()
        total, losses = _Loss.apply(hidden, weight, labels, self, torch.is_grad_enabled())
        by_language = F.one_hot(label_languages, self.num_languages).to(losses.dtype)
        return LossSums(total, losses @ by_language, (labels != IGNORE_INDEX).to(losses.dtype) @ by_language)


class _Loss(torch.autograd.Function):
    """Sum of the losses, and the losses (N,), which carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, head: LMHead, with_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        starts = range(0, len(hidden), head.chunk_size)
        chunks = [slice(start, start + head.chunk_size) for start in starts]
        if with_gradients:
            hidden_grad = torch.empty_like(hidden)
            weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        losses = []
        for chunk in chunks:
            # what is not scored may be anything, and 0 times NaN is not 0
            scored = torch.where((labels[chunk] != IGNORE_INDEX)[:, None], hidden[chunk], 0)
            chunk_losses, logits_grad = head.score(scored, weight, labels[chunk])
            losses.append(chunk_losses)
            if with_gradients:
                torch.mm(logits_grad, weight, out=hidden_grad[chunk])
                _add_product(weight_grad, logits_grad.T, scored)
        if with_gradients:
            ctx.save_for_backward(hidden_grad, weight_grad)
            ctx.dtype = weight.dtype
        every = torch.cat(losses)
        ctx.mark_non_differentiable(every)
        return every.sum(), every

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, (weight_grad * grad).to(ctx.dtype), None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, not rounded to the dtype of a and b on the way where the device can do that."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`Score` of a whole vocabulary."""
    if hidden.is_cuda and has_triton():
        from moe.kernels.cross_entropy import cross_entropy_  # needs Triton

        logits = linear(hidden, weight)
        return cross_entropy_(logits, labels, IGNORE_INDEX), logits
    logits, ignored = project(hidden, weight), labels == IGNORE_INDEX
    at_label = torch.where(ignored, 0, labels)[:, None]
    # One exponential a logit, and in the logits' memory: what a CPU's time goes to. The largest probability is one over
    # the sum of exponentials.
    above = logits.amax(dim=-1) - logits.gather(1, at_label)[:, 0]
    probabilities = torch.softmax(logits, dim=-1, out=logits)
    losses = torch.where(ignored, 0, above - probabilities.amax(dim=-1).log())
    grad = probabilities.to(hidden.dtype)
    grad.scatter_(1, at_label, torch.expm1(-losses)[:, None].to(grad.dtype))
    # Finite, as what is not scored comes as zeros. Filling by a mask would take ten times as long.
    grad *= ~ignored[:, None]
    return losses, grad


def project(hidden: Tensor, weight: Tensor) -> Tensor:
    """(..., H) x (V, H) -> (..., V) logits, at least float32."""
    logits = linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
