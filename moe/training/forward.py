"""One batch through the model, for training and validation alike."""

from __future__ import annotations

from data import Batch
from moe.model import Documents, ModelOutput, Transformer


def forward(model: Transformer, batch: Batch) -> ModelOutput:
    """Loss and routing of a batch that is on the model's device."""
    documents = None
    if batch.position_ids is not None and batch.cu_seqlens is not None:
        documents = Documents(batch.position_ids, batch.cu_seqlens, max_length=batch.input_ids.shape[1])
    output: ModelOutput = model(
        batch.input_ids,
        labels=batch.labels,
        label_languages=batch.label_languages,
        languages=batch.languages,
        valid=batch.valid,
        documents=documents,
    )
    return output
