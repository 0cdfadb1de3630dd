"""Loss and bits per byte on the held-out text, by language."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from data import IGNORE_INDEX, Stream, Tokenizer, validation_batches
from moe.model import Transformer
from moe.parallel import World
from moe.training.forward import forward


@torch.no_grad()
def evaluate(
    model: Transformer, stream: Stream, batch_size: int, world: World, should_stop: Callable[[], bool]
) -> dict[str, Any] | None:
    """The `validation` object of a metrics row; None when `should_stop` interrupted it.

    Bits per byte: cross-entropy of all held-out tokens in bits over the UTF-8 bytes they stand for, so that tokenizers
    compare. Balance statistics of held-out text are thrown away: they take part in no update.
    """
    byte_lengths = torch.from_numpy(Tokenizer.load(stream.text.tokenizer_path).byte_lengths()).to(world.device)
    languages = stream.text.languages
    sums = torch.zeros(len(languages), 3, dtype=torch.float64, device=world.device)  # nats, labels, bytes
    for source in stream.text.sources:
        index = languages.index(stream.text.language_of[source])
        for batch in validation_batches(stream, source, batch_size, world.data_rank, world.layout.data):
            if should_stop():
                return None
            batch = batch.to(world.device, non_blocking=True)
            output = forward(model, batch)
            assert output.loss is not None
            scored = batch.labels != IGNORE_INDEX
            num_bytes = (byte_lengths[batch.labels.clamp(min=0)] * scored).sum()
            sums[index] += torch.stack([output.loss.total, output.loss.labels.sum(), num_bytes]).double()
    sums = world.sum(world.once(sums, torch.zeros_like(sums)))
    return summarise(sums.cpu().numpy(), languages)


def summarise(sums: np.ndarray, languages: tuple[str, ...]) -> dict[str, Any]:
    """(languages, 3) sums of nats, labels, bytes -> nats a token and bits per byte, overall and by language."""
    by_language = {}
    for language, (nats, labels, num_bytes) in zip(languages, sums, strict=True):
        by_language[language] = {**_rates(nats, labels, num_bytes), "tokens": int(labels), "bytes": int(num_bytes)}
    return {**_rates(*sums.sum(axis=0)), "by_language": by_language}


def _rates(nats: float, labels: float, num_bytes: float) -> dict[str, float]:
    return {"loss": nats / max(labels, 1), "bits_per_byte": nats / math.log(2) / max(num_bytes, 1)}
