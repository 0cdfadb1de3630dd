"""Continue a prompt, one token at a time, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.model.attention import KVCache
from moe.model.transformer import Transformer

_GREEDY_BELOW = 1e-6  # so cold that float32 cannot tell it from taking the likeliest


@torch.no_grad()
def continuation(
    model: Transformer,
    prompt: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    stop_id: int | None = None,
    num_ids: int | None = None,
    seed: int = 0,
    compute_dtype: torch.dtype = torch.float32,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that follow `prompt`, ending before `stop_id`.

    `temperature` 0 is greedy; `top_p` keeps the smallest set of ids whose probability reaches it; `num_ids` bars the
    padding rows of a vocabulary larger than its tokenizer; `compute_dtype` is what blocks compute in (FSDP's parameters
    do not tell). Raises ValueError when prompt and continuation exceed the model's positions.
    """
    config, head = model.config, model.lm_head
    assert head is not None
    length = len(prompt) + max_new_tokens
    if not prompt or length > config.max_position_embeddings:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones do not fit the model's "
            f"{config.max_position_embeddings} positions"
        )
    device = next(model.parameters()).device
    caches = [KVCache(config, 1, length, device, compute_dtype) for _ in model.layers]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        hidden = model(ids, caches=caches).hidden
        logits = head.logits(hidden[0, -1])[:num_ids]
        # on the host, where the token goes anyway: CUDA has no repeatable cumulative sum
        token = choose(logits.cpu(), temperature, top_p, generator)
        if token == stop_id:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """(V,) logits -> one id."""
    if temperature < _GREEDY_BELOW:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / temperature  # at most 0: no temperature can make it overflow
    probabilities, ids = scaled.softmax(dim=-1).sort(descending=True)
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
