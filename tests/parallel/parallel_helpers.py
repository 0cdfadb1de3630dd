"""A small mixture, a step's batch of it, and a trainer as a run builds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data import Batch
from moe.config import ArchitectureConfig, Config
from moe.config.schema import GuardConfig, ParallelConfig, RuntimeConfig, TrainConfig
from moe.model import IGNORE_INDEX, Transformer, initialise
from moe.parallel import World, mark_last_micro_batch, parallelize
from moe.training.optimizer import build_optimizer, clipping_scale, optimizer_tensors
from moe.training.signals import StopSignal
from moe.training.trainer import Trainer, balance_sum

LANGUAGES, SEQUENCES, LENGTH = 2, 8, 12
ARCHITECTURE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "standard_ffn_size": 64,
    "expert_budget": 16.0,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "initializer_range": 0.15,
    "max_position_embeddings": 32,
    "aux_loss_alpha": 0.5,
    "device_aux_loss_alpha": 0.5,
    "n_device_groups": 4,
    "router_z_loss_alpha": 0.1,
    "bias_update_speed": 0.01,
}


def config_of(
    dtype: str = "float32",
    runtime: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **architecture: Any,
) -> Config:
    """63 routed experts and a dense first layer unless `architecture` says otherwise; every balance term is on."""
    options = {"device": "cpu", "expert_backend": "grouped_mm"} | (runtime or {})
    train = TrainConfig(steps=100, global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES, compute_dtype=dtype)
    train.guard = GuardConfig(spike_threshold=0.0)
    config = Config(
        name="test",
        model=ArchitectureConfig(**(ARCHITECTURE | architecture)),
        train=train,
        runtime=RuntimeConfig(**options),
        parallel=ParallelConfig(**(parallel or {})),
    )
    config.optim.schedule.warmup_steps = 0
    config.optim.eps = 1e-3  # else Adam turns a gradient's rounding into its sign
    return config


def build_model(config: Config, world: World) -> Transformer:
    runtime, dtype = config.runtime, getattr(torch, config.train.compute_dtype)
    model = Transformer(
        config.model.build(),
        num_languages=LANGUAGES,
        expert_backend=runtime.expert_backend,
        loss_chunk_size=runtime.chunk_size("cpu"),
    )
    initialise(model, config.model.initializer_range, seed=0)
    parallelize(model, world, dtype, runtime, config.parallel)
    return model


def build_trainer(config: Config, world: World) -> Trainer:
    return Trainer(build_model(config, world), config, world, LANGUAGES, StopSignal(world.device, world.size))


def ragged_batch(seed: int = 0, sequences: int = SEQUENCES) -> Batch:
    """Sequences of unequal length, with labels missing here and there, of two languages."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sequences, LENGTH)
    lengths = torch.randint(3, LENGTH + 1, (sequences, 1), generator=generator)
    lengths[0] = LENGTH
    valid = torch.arange(LENGTH) < lengths
    labels = torch.randint(48, shape, generator=generator)
    labels[~valid | (torch.rand(shape, generator=generator) < 0.2)] = IGNORE_INDEX
    languages = torch.randint(LANGUAGES, (sequences,), generator=generator)
    return Batch(
        input_ids=torch.randint(48, shape, generator=generator),
        labels=labels,
        valid=valid,
        document_starts=torch.zeros(shape, dtype=torch.bool),
        row_languages=languages,
        row_sources=languages.clone(),
    )


def split(batch: Batch, parts: int) -> list[Batch]:
    """`parts` micro-batches of consecutive sequences."""
    tensors = {name: tensor.chunk(parts) for name, tensor in vars(batch).items() if tensor is not None}
    return [Batch(**{name: chunks[part] for name, chunks in tensors.items()}) for part in range(parts)]


def step_terms(
    model: Transformer, batch: Batch, num_labels: Tensor | int, num_tokens: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and balance terms of one micro-batch, as parts of the whole step's."""
    output = model(
        batch.input_ids,
        labels=batch.labels,
        label_languages=batch.label_languages,
        languages=batch.languages,
        valid=batch.valid,
    )
    assert output.loss is not None
    balance = balance_sum(output.routing) if output.routing else torch.zeros(())
    return output.loss.total / num_labels, balance / num_tokens


def step_loss(model: Transformer, batch: Batch, num_labels: Tensor | int, num_tokens: Tensor | int) -> Tensor:
    """What the trainer differentiates for one micro-batch."""
    return sum(step_terms(model, batch, num_labels, num_tokens), torch.zeros(()))


def accumulate(model: Transformer, batches: list[Batch]) -> Tensor:
    """One step's forward and backward passes; returns the loss."""
    num_labels, num_tokens = sum(b.num_labels() for b in batches), sum(b.num_tokens() for b in batches)
    total = torch.zeros(())
    for index, batch in enumerate(batches):
        mark_last_micro_batch(model, is_last=index == len(batches) - 1)
        loss = step_loss(model, batch, num_labels, num_tokens)
        loss.backward()
        total = total + loss.detach()
    return total


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Whole ones, on every rank; a rank left without experts has none of theirs."""
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.grad is None and isinstance(p, DTensor) and not p.to_local().numel():
            found[name] = torch.zeros_like(p)
    return {name: full(gradient).clone() for name, gradient in found.items() if gradient is not None}


def clipped_step(model: Transformer, config: Config, norm: Tensor, max_norm: float) -> dict[str, Tensor]:
    """Take AdamW's first step -> the gradients that it took, clipped, as its first moments show them."""
    optimizer: Any = build_optimizer(model, config.optim)
    optimizer.grad_scale, optimizer.found_inf = clipping_scale(norm, max_norm), torch.zeros(())
    optimizer.step()
    rate = 1 - config.optim.beta1
    return {name: full(slots["exp_avg"]) / rate for name, slots in optimizer_tensors(model, optimizer).items()}


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of everything a step may change: parameters, buffers, moments and step counts, by name."""
    tensors = trainer.state_tensors()
    copies = {name: full(tensor).clone() for name, tensor in tensors["model"].items()}
    for name, slots in tensors["optimizer"].items():
        copies |= {f"{name}/{slot}": full(tensor).clone() for slot, tensor in slots.items()}
    return copies


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> Iterator[str]:
    """Names whose tensors are not bitwise equal."""
    assert first.keys() == second.keys()
    return (name for name in first if not torch.equal(first[name], second[name]))


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within `tolerance` of its own largest entry."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp(min=1e-6)
        error = ((found[name] - tensor).abs().max() / scale).item()
        assert error < tolerance, f"{name}: off by {error:.1e} of its largest entry"
