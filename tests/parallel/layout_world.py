"""Every layout against one process from the same weights; each function runs on every rank of a gloo world of four."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import (
    LENGTH,
    SEQUENCES,
    build_model,
    build_trainer,
    config_of,
    differing,
    full,
    gradients,
    ragged_batch,
    split,
    state,
    step_terms,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data import Batch
from moe.checkpoint import CheckpointManager
from moe.config import Config, compose
from moe.model import Transformer, initialise
from moe.model.init import _begins
from moe.parallel import Layout, World, build_world, local, mark_last_micro_batch, sum_token_gradients
from moe.training.optimizer import clip_gradients, gradient_norm
from moe.training.session import Session
from moe.training.signals import StopSignal
from moe.training.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
STEPS, SWITCH_AT = 24, 4
FEW = {"n_routed_experts": 5, "num_experts_per_tok": 3, "n_device_groups": 3}
SMALL = [
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.standard_ffn_size=64",
    "data.seq_len=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    f"train.steps={STEPS}",
    "train.log_interval=1",
    "train.eval_interval=12",
    "optim.schedule.warmup_steps=2",
    "optim.eps=1e-3",
    "telemetry.report=false",
    "run=r",
    "name=t",
]
LAYOUTS = [
    Layout(shard=2),
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(shard=2, expert=2),
    Layout(shard=4, expert=4),
    Layout(shard=4, expert=2),
    Layout(tensor=2, expert=2),
    Layout(shard=2, tensor=2),
    Layout(shard=2, tensor=2, expert=2),
    Layout(shard=2, tensor=2, expert=4),
    Layout(replicate=2, shard=2, expert=2),
    Layout(replicate=2, tensor=2, expert=2),
]


@cache
def alone() -> World:
    """A world of its own on every rank."""
    worlds = [build_world(Layout(), CPU, first) for first in range(dist.get_world_size())]
    (own,) = [world for world in worlds if world is not None]
    return own


@cache
def world_of(layout: Layout) -> World | None:
    """The first ranks, laid out; None on the others."""
    return build_world(layout, CPU)


def share(batch: Batch, world: World) -> Batch:
    """This rank's part of the global batch."""
    return split(batch, world.layout.data)[world.data_rank]


def one_step(world: World, model: Transformer, config: Config, batch: Batch, parts: int) -> tuple[Tensor, Tensor]:
    """Forward and backward passes of a step in `parts` micro-batches: cross-entropy and balance terms of all ranks."""
    totals = torch.zeros(2)
    num_labels, num_tokens = batch.num_labels(), batch.valid.sum()
    for index, part in enumerate(split(share(batch, world), parts)):
        mark_last_micro_batch(model, index == parts - 1, config.parallel.reshard)
        cross_entropy, balance = step_terms(model, part, num_labels, num_tokens)
        (cross_entropy + balance).backward()
        totals += torch.stack([world.once(cross_entropy.detach(), torch.zeros(())), balance.detach()])
    sum_token_gradients(model, world)
    cross_entropy, balance = world.sum(totals)
    return cross_entropy, balance


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each within `tolerance` of its own norm; an expert that got no token may have none at all."""
    for name, tensor in expected.items():
        error = ((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-8)).item()
        assert error < tolerance, f"{name}: off by {error:.1e} of its norm"


def check_first_step(
    layout: Layout, parts: int = 1, runtime: dict[str, Any] | None = None, reshard: bool = False, **model: Any
) -> None:
    config = config_of(runtime=runtime, **model)
    config.parallel.reshard = reshard
    lone, world, batch = alone(), world_of(layout), ragged_batch()
    if world is None:
        return
    expected_model = build_model(config_of(**model), lone)
    expected = one_step(lone, expected_model, config_of(), batch, 1)
    shared = build_model(config, world)
    found = one_step(world, shared, config, batch, parts)
    for name, value, reference in zip(("cross-entropy", "balance"), found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    all_gradients = gradients(expected_model)
    assert_gradients_close(gradients(shared), all_gradients, 1e-5)
    norm, reference = gradient_norm(shared, world), gradient_norm(expected_model, lone)
    torch.testing.assert_close(norm, reference, rtol=1e-5, atol=0)
    for each, each_norm in ((shared, norm), (expected_model, reference)):
        clip_gradients(each, each_norm, 0.1)
    assert_gradients_close(gradients(shared), gradients(expected_model), 1e-5)


def check_steps(layout: Layout, steps: int = 20, parts: int = 1, replay: bool = False, **model: Any) -> None:
    """Losses of every step, and after the last one the routers' biases, are those of one process.

    With `replay` the layout is told which experts one process chose: a tie that rounding decides otherwise then changes
    nothing.
    """
    config = config_of(**model)
    lone, world = alone(), world_of(layout)
    if world is None:
        return
    expected, shared = build_trainer(config, lone), build_trainer(config, world)
    replayed = Replay(expected, shared, world, parts) if replay else None
    for step in range(steps):
        batch = ragged_batch(step)
        expected.step(step, [batch])
        if replayed:
            replayed.rewind()
        shared.step(step, split(share(batch, world), parts))
        for ours, theirs in zip(sums_of(shared), sums_of(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert torch.equal(shared.sums.counts, expected.sums.counts)
    for (name, ours), (_, theirs) in zip(shared.model.named_buffers(), expected.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def sums_of(trainer: Trainer) -> list[Tensor]:
    """Of the last step: mean cross-entropy, labels, balance terms."""
    cross_entropy, labels, balance, _, _ = trainer.sums.unpack(trainer.sums.packed)
    return [cross_entropy.sum() / labels.sum(), labels, balance]


class Replay:
    """Has the routers of one trainer repeat the choices of another, for the rows and tokens that each rank has."""

    def __init__(self, source: Trainer, target: Trainer, world: World, parts: int) -> None:
        self.world, self.parts = world, parts
        self.chosen: list[Tensor] = []
        self.calls = [0] * len(source.mixtures)
        for layer, (record, repeat) in enumerate(zip(source.mixtures, target.mixtures, strict=True)):
            self._record(record.gate, layer)
            repeat.gate.choose = partial(self._repeat, layer)  # type: ignore[union-attr]
            self.chosen.append(torch.empty(0))

    def rewind(self) -> None:
        """Before a step."""
        self.calls = [0] * len(self.calls)

    def _record(self, gate: Any, layer: int) -> None:
        choose = gate.choose

        def recording(log_scores: Tensor) -> Tensor:
            self.chosen[layer] = choose(log_scores)
            return self.chosen[layer]

        gate.choose = recording

    def _repeat(self, layer: int, log_scores: Tensor) -> Tensor:
        own = self.chosen[layer].view(SEQUENCES, LENGTH, -1).chunk(self.world.layout.data)[self.world.data_rank]
        own = own.chunk(self.parts)[self.calls[layer]]
        self.calls[layer] += 1
        return own.chunk(self.world.layout.tensor, dim=1)[self.world.tensor_rank].reshape(len(log_scores), -1)


def check_loads(layout: Layout, load: str) -> None:
    """All tokens to the experts of one rank, or to all experts but those of one rank; gradients stay those of one
    process."""
    config = config_of(n_routed_experts=8, num_experts_per_tok=2, n_device_groups=2)
    lone, world, batch = alone(), world_of(layout), ragged_batch()
    if world is None:
        return
    models = [build_model(config, each) for each in (lone, world)]
    for model in models:
        for mixture in model.moe_blocks():
            bias = mixture.gate.expert_bias
            assert bias is not None
            bias[:2] = 10.0 if load == "one rank" else -10.0
    expected = one_step(lone, models[0], config, batch, 1)
    found = one_step(world, models[1], config, batch, 1)
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7)
    assert_gradients_close(gradients(models[1]), gradients(models[0]), 1e-5)


def check_states(folder: Path, saved: Layout, loaded: list[Layout]) -> None:
    """What a layout saves is found again, to the bit, by every other: weights, moments, biases; experts tell their
    numbers."""
    if world_of(saved) is not None:
        trainer, manager = stateful(saved, folder)
        mark(trainer)
        manager.save(1, trainer.state_tensors(), {})
        manager.wait()
    dist.barrier()
    for layout in loaded:
        if world_of(layout) is not None:
            trainer, manager = stateful(layout, folder)
            wipe(trainer)
            assert manager.load(trainer.state_tensors())
            assert list(differing(state(trainer), marked_state())) == [], str(layout)
            check_experts(trainer.model)
        dist.barrier()


def stateful(layout: Layout, folder: Path) -> tuple[Trainer, CheckpointManager]:
    world = world_of(layout)
    assert world is not None
    return trainer_of(layout), CheckpointManager(folder, process_group=world.group)


@cache
def trainer_of(layout: Layout) -> Trainer:
    world = world_of(layout)
    assert world is not None
    return build_trainer(config_of(**FEW), world)


@cache
def marked_state() -> dict[str, Tensor]:
    """As one process has it."""
    trainer = build_trainer(config_of(**FEW), alone())
    mark(trainer)
    return state(trainer)


def mark(trainer: Trainer) -> None:
    """Give every parameter and moment values that no other has, and every expert its number in front."""
    model = trainer.model
    initialise(model, 1.0, seed=1)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            own = local(parameter)
            if ".experts." in name:
                begin = _begins(parameter)[0]
                own += 10.0 * torch.arange(begin, begin + len(own)).view(-1, *[1] * (own.dim() - 1))
            slots = trainer.optimizer.state[parameter]
            slots["step"].fill_(index)
            for factor, slot in enumerate(("exp_avg", "exp_avg_sq"), start=2):
                local(slots[slot]).copy_(own * factor + index)
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.arange(buffer.numel()) + float(name.split(".")[1]))


def wipe(trainer: Trainer) -> None:
    """Leave nothing that a load could seem to have read."""
    for tensor in tree_leaves(trainer.state_tensors()):
        local(tensor).fill_(-1)


def check_experts(model: Transformer) -> None:
    for mixture in model.moe_blocks():
        for parameter in mixture.experts.parameters():
            means = full(parameter).flatten(1).mean(dim=1)
            assert torch.allclose(means, 10.0 * torch.arange(5), atol=1.0), means


def check_session(folder: Path, cache: Path, before: Layout, after: Layout) -> None:
    """A run that changes its layout in the middle goes on with the same data, and with gradients and losses as if it
    had not."""
    lone = alone()
    if dist.get_rank() == 0:
        run_session(lone, folder / "undisturbed", cache, stop_at=None)
    for world, stop_at in ((world_of(before), SWITCH_AT), (world_of(after), None)):
        if world is not None:
            run_session(world, folder / "switched", cache, stop_at)
        dist.barrier()
    if dist.get_rank() == 0:
        compare_rows(rows_of(folder / "undisturbed"), rows_of(folder / "switched"))


def write_corpus(folder: Path) -> None:
    """A few kilobytes of the bundled corpus, prepared by the first run that wants it."""
    for language in ("en", "zh"):
        lines = (ROOT / "data" / "sample" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        rows = [{**json.loads(line), "source": "all"} for line in lines]
        text = "".join(json.dumps({**row, "text": row["text"][:600]}, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{language}.jsonl").write_text(text, encoding="utf-8")


def run_session(world: World, folder: Path, cache: Path, stop_at: int | None) -> None:
    """Train a small model, stopping as a signal would after `stop_at` steps."""
    sources = [f"data.sources.{language}.path={cache}/{language}.jsonl" for language in ("en", "zh")]
    config = compose([*SMALL, *sources, f"output_dir={folder}", f"data.cache_dir={cache}"])
    stop = StopSignal(CPU, world.size)
    session = Session(config, world, stop, ["test"])
    stop.agreed = lambda: session.step == stop_at  # type: ignore[method-assign]
    assert session.execute() == (stop_at is None)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "t" / "r" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def compare_rows(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) == STEPS + 2  # and two validations
    for ours, theirs in zip(found, expected, strict=True):
        if "validation" in theirs:
            ours, theirs = ours["validation"], theirs["validation"]
        for key in ("loss", "grad_norm", "expert_balance_loss", "bits_per_byte"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (key, ours, theirs)
        assert ours.get("tokens") == theirs.get("tokens")
