"""A trained model out of its run folder, for the commands that use one; without torch.distributed or training data."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from data import DataError, Tokenizer
from moe.checkpoint import CheckpointError, CheckpointManager
from moe.checkpoint.folders import CheckpointFolder
from moe.config import load_config
from moe.kernels.experts import resolve_backend
from moe.model import Transformer
from moe.model.router import TopKRouter


class TrainedModel(NamedTuple):
    model: Transformer
    """In evaluation mode."""
    tokenizer: Tokenizer
    dtype: torch.dtype
    """What the model computes in."""
    step: int


def newest_run(outputs: Path) -> Path:
    """The run under `outputs` with the newest checkpoint. Raises CheckpointError when there is none."""
    saved = [
        (step.stat().st_mtime, folder.parent)
        for folder in outputs.glob("*/*/checkpoints")
        for step in CheckpointFolder(folder).steps().values()
    ]
    if not saved:
        raise CheckpointError(f"{outputs}: no run with a checkpoint here; train one, or name its folder")
    return max(saved)[1]


def load_trained(run: Path, step: int | None, device: torch.device, dtype: torch.dtype) -> TrainedModel:
    """The model of a run folder at `step` (None: the newest intact checkpoint), without torch.distributed.

    Raises ConfigError, CheckpointError or DataError naming the file that is missing, damaged or does not fit.
    """
    config = load_config(run / "config.yaml").model.build()
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(f"{run / 'tokenizer.json'}: {tokenizer.vocab_size} ids, but the model has {config.vocab_size}")
    backend = resolve_backend("auto", device, dtype, (config.hidden_size, int(config.moe_intermediate_size)))
    with device:
        model = Transformer(config, expert_backend=backend)
    tensors = {"model": {name: value.detach() for name, value in model.state_dict().items()}}
    state = CheckpointManager(run / "checkpoints").load(tensors, step, partial=True)
    if state is None:
        raise CheckpointError(f"{run / 'checkpoints'}: no checkpoint here yet")
    _cast(model, dtype)
    return TrainedModel(model.eval(), tokenizer, dtype, state["step"])


def _cast(model: Transformer, dtype: torch.dtype) -> None:
    """Compute in `dtype`; routers stay float32, as in training."""
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
