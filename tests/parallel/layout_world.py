"""Every layout against one process from the same weights; each function runs on every rank of a gloo world of four."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from parallel_helpers import (
    LENGTH,
    SEQUENCES,
    build_model,
    build_trainer,
    clipped_step,
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import Batch
from moe.checkpoint import CheckpointManager
from moe.config import Config, compose
from moe.model import Transformer, initialise
from moe.model.init import _begins
from moe.parallel import Layout, World, build_world, local, mark_last_micro_batch, sum_token_gradients
from moe.training.evaluation import evaluate
from moe.training.optimizer import gradient_norm
from moe.training.session import Session
from moe.training.signals import StopSignal
from moe.training.trainer import Trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
STEPS, SWITCH_AT = 24, 4
FEW: dict[str, Any] = {"n_routed_experts": 5, "num_experts_per_tok": 3, "n_device_groups": 3}
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
HASHED = {
    "routing": "hash",
    "aux_loss_alpha": 0.0,
    "device_aux_loss_alpha": 0.0,
    "router_z_loss_alpha": 0.0,
    "bias_update_speed": 0.0,
}
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
    num_labels, num_tokens = batch.num_labels(), batch.num_tokens()
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


class FirstStep(NamedTuple):
    """What one process makes of `ragged_batch()`."""

    terms: tuple[Tensor, Tensor]
    norm: Tensor
    gradients: dict[str, Tensor]
    clipped: dict[str, Tensor]


def expected_first_step(options: dict[str, Any]) -> FirstStep:
    return _first_step(json.dumps(options, sort_keys=True))


@cache
def _first_step(options: str) -> FirstStep:
    config = config_of(**json.loads(options))
    model = build_model(config, alone())
    terms = one_step(alone(), model, config, ragged_batch(), 1)
    norm, before = gradient_norm(model, alone()), copied(gradients(model))
    return FirstStep(terms, norm, before, clipped_step(model, config, norm, 0.1))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def check_first_step(
    layout: Layout,
    parts: int = 1,
    runtime: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **model: Any,
) -> None:
    config = config_of(runtime=runtime, parallel=parallel, **model)
    world, batch, expected = world_of(layout), ragged_batch(), expected_first_step(model)
    if world is None:
        return
    shared = build_model(config, world)
    found = one_step(world, shared, config, batch, parts)
    for name, value, reference in zip(("cross-entropy", "balance"), found, expected.terms, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    assert_gradients_close(gradients(shared), expected.gradients, 1e-5)
    norm = gradient_norm(shared, world)
    torch.testing.assert_close(norm, expected.norm, rtol=1e-5, atol=0)
    assert_gradients_close(clipped_step(shared, config, norm, 0.1), expected.clipped, 1e-5)


def check_compiled(layout: Layout) -> None:
    """Compiled regions around the exchanges change nothing, and other numbers of arrivals compile nothing again."""
    world, batches = world_of(layout), [ragged_batch(), ragged_batch(seed=1)]
    if world is None:
        return
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=record))
        models = [build_model(config_of(runtime={"compile": on}), world) for on in (False, True)]
        compiled_once = 0
        for batch in batches:
            expected, found = ([*one_step(world, model, config_of(), batch, 1)] for model in models)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
            assert_gradients_close(gradients(models[1]), gradients(models[0]), 1e-5)
            assert compiled_once in (0, len(graphs))
            compiled_once = len(graphs)
    assert any("scatter_" in str(graph.graph) for graph in graphs)  # arrivals among them


class Steps(NamedTuple):
    """What one process makes of a row of steps."""

    sums: list[list[Tensor]]
    """Of each step."""
    chosen: list[list[Tensor]]
    """The experts that each layer's router chose in each step."""
    counts: Tensor
    buffers: dict[str, Tensor]


def expected_steps(steps: int, options: dict[str, Any]) -> Steps:
    return _steps(steps, json.dumps(options, sort_keys=True))


@cache
def _steps(steps: int, options: str) -> Steps:
    trainer = build_trainer(config_of(**json.loads(options)), alone())
    sums: list[list[Tensor]] = []
    chosen: list[list[Tensor]] = []
    for mixture in trainer.mixtures:
        mixture.gate.choose = partial(_recording, mixture.gate.choose, chosen)  # type: ignore[union-attr]
    for step in range(steps):
        chosen.append([])
        trainer.step(step, [ragged_batch(step)])
        sums.append([tensor.clone() for tensor in sums_of(trainer)])
    return Steps(sums, chosen, trainer.sums.counts.clone(), copied(dict(trainer.model.named_buffers())))


def _recording(choose: Callable[[Tensor], Tensor], chosen: list[list[Tensor]], log_scores: Tensor) -> Tensor:
    chosen[-1].append(choose(log_scores))
    return chosen[-1][-1]


def check_traced(layout: Layout) -> None:
    """A compiled model as autograd's tracing leaves it; that takes seconds where code for it takes half a minute."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        check_first_step(layout, runtime={"compile": True})


def check_steps(layout: Layout, steps: int, parts: int = 1, replay: bool = False, **model: Any) -> None:
    """Losses of every step, and after the last one the routers' biases, are those of one process.

    With `replay` the layout is told which experts one process chose: a tie that rounding decides otherwise then changes
    nothing.
    """
    expected, world = expected_steps(steps, model), world_of(layout)
    if world is None:
        return
    trainer = build_trainer(config_of(**model), world)
    replayed = Replay(expected, trainer, world, parts) if replay else None
    for step in range(steps):
        if replayed:
            replayed.begin(step)
        trainer.step(step, split(share(ragged_batch(step), world), parts))
        for ours, theirs in zip(sums_of(trainer), expected.sums[step], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)
    assert torch.equal(trainer.sums.counts, expected.counts)
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, expected.buffers[name]), name


def sums_of(trainer: Trainer) -> list[Tensor]:
    """Of the last step: mean cross-entropy, labels, balance terms."""
    cross_entropy, labels, balance, _, _ = trainer.sums.unpack(trainer.sums.packed)
    return [cross_entropy.sum() / labels.sum(), labels, balance]


class Replay:
    """Has the routers of a trainer repeat the choices of one process, for the rows and tokens that each rank has."""

    def __init__(self, source: Steps, target: Trainer, world: World, parts: int) -> None:
        self.source, self.world, self.parts = source, world, parts
        for layer, mixture in enumerate(target.mixtures):
            mixture.gate.choose = partial(self._repeat, layer)  # type: ignore[union-attr]

    def begin(self, step: int) -> None:
        self.chosen, self.calls = self.source.chosen[step], [0] * len(self.source.chosen[step])

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


def check_states(folder: Path, saved: Layout, loaded: list[Layout], experts: int = 5) -> None:
    """What a layout saves is found again, to the bit, by those in `loaded`: weights, moments, biases; experts tell
    their numbers."""
    if world_of(saved) is not None:
        trainer, manager = stateful(saved, folder, experts)
        mark(trainer)
        manager.save(1, trainer.state_tensors(), {})
        manager.wait()
    dist.barrier()
    for layout in loaded:
        if world_of(layout) is not None:
            trainer, manager = stateful(layout, folder, experts)
            wipe(trainer)
            assert manager.load(trainer.state_tensors())
            assert list(differing(state(trainer), marked_state(experts))) == [], str(layout)
            check_experts(trainer.model)
        dist.barrier()


def stateful(layout: Layout, folder: Path, experts: int) -> tuple[Trainer, CheckpointManager]:
    world = world_of(layout)
    assert world is not None
    return trainer_of(layout, experts), CheckpointManager(folder, process_group=world.group)


@cache
def trainer_of(layout: Layout, experts: int) -> Trainer:
    world = world_of(layout)
    assert world is not None
    return build_trainer(config_of(**FEW | {"n_routed_experts": experts}), world)


@cache
def marked_state(experts: int) -> dict[str, Tensor]:
    """As one process has it."""
    trainer = build_trainer(config_of(**FEW | {"n_routed_experts": experts}), alone())
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
            assert torch.allclose(means, 10.0 * torch.arange(len(means)), atol=1.0), means


def check_session(folder: Path, cache: Path, before: Layout, after: Layout) -> None:
    """A run that changes its layout in the middle goes on with the same data, and with gradients and losses as if it
    had not."""
    expected: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        run_session(alone(), folder / "undisturbed", cache, None, expected)
    for world, stop_at, switched in ((world_of(before), SWITCH_AT, {}), (world_of(after), None, found)):
        if world is not None:
            run_session(world, folder / "switched", cache, stop_at, switched)
        dist.barrier()
    if dist.get_rank() == 0:
        assert_gradients_close(found, expected, 1e-5)
        compare_rows(rows_of(folder / "undisturbed"), rows_of(folder / "switched"))


def check_validation(folder: Path, cache: Path, layout: Layout) -> None:
    """The loss of held-out text, and its bits per byte in each language, are those of one process."""
    world, expected = world_of(layout), expected_validation(folder / "alone", cache)
    if world is not None:
        assert validation(world, folder / str(layout), cache) == pytest.approx(expected, rel=1e-5)


@cache
def expected_validation(folder: Path, cache: Path) -> dict[str, float]:
    return validation(alone(), folder, cache)


def validation(world: World, folder: Path, cache: Path) -> dict[str, float]:
    session = session_of(world, folder, cache)
    session.loader.close()
    session.model.eval()
    return _numbers(evaluate(session.model, session.stream, 1, world, lambda: False))


def _numbers(nested: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(nested, dict):
        return {prefix: nested}
    return {name: n for key, part in nested.items() for name, n in _numbers(part, f"{prefix}/{key}").items()}


def check_device_groups(folder: Path, cache: Path, layout: Layout) -> None:
    """Only groups that are not the ranks' are warned of, and only where they are balanced."""
    world, told = world_of(layout), []
    assert world is not None
    for groups, alpha in ((3, 0.1), (layout.expert, 0.1), (3, 0.0)):
        overrides = [f"model.n_device_groups={groups}", f"model.device_aux_loss_alpha={alpha}"]
        session = session_of(world, folder, cache, *overrides)
        session.log.message = told.append  # type: ignore[method-assign]
        session._warn_of_device_groups()
        session.loader.close()
    (warning,) = told
    assert "n_device_groups=3 groups of experts, not that of the parallel.expert=" in warning


def check_host_copies(layout: Layout) -> None:
    """A step waits for the device once a dispatch, for the sizes of its exchange, and for nothing else."""
    world = world_of(layout)
    if world is None:
        return
    model, batch, copies = build_model(config_of(), world), ragged_batch(), []
    one_step(world, model, config_of(), batch, 1)  # what happens once is behind us
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(Tensor, name, _counted(getattr(Tensor, name), name, copies))
        mark_last_micro_batch(model, True)
        loss = sum(step_terms(model, share(batch, world), 64, 64), torch.zeros(()))
        loss.backward()
    assert copies == ["tolist"] * len(model.moe_blocks())


class ProductsMeanwhile(TorchDispatchMode):
    """Counts the matrix products that are called while rows are under way, exchange by exchange."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.products = width, 0
        self.under_way: dict[int, int] = {}
        self.meanwhile: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "bmm", "_grouped_mm")
        if name == "all_to_all_single" and result.shape[1:] == (self.width,):
            self.under_way[result.data_ptr()] = self.products
        elif name == "wait_tensor" and args[0].data_ptr() in self.under_way:
            self.meanwhile.append(self.products - self.under_way.pop(args[0].data_ptr()))
        return result


def check_meanwhile(layout: Layout) -> None:
    """Something is computed during every exchange of rows, there and back, forward and backward."""
    world = world_of(layout)
    if world is None:
        return
    model = build_model(config_of(), world)
    with ProductsMeanwhile(model.config.hidden_size) as counter:
        one_step(world, model, config_of(), ragged_batch(), 1)
    assert len(counter.meanwhile) == 4 * len(model.moe_blocks())
    assert min(counter.meanwhile) > 0
    assert not counter.under_way


def _counted(method: Any, name: str, calls: list[str]) -> Any:
    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return method(*arguments, **options)

    return counting


def write_corpus(folder: Path) -> None:
    """A few kilobytes of the bundled corpus, prepared by the first run that wants it."""
    for language in ("en", "zh"):
        lines = (ROOT / "data" / "sample" / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()[:60]
        rows = [{**json.loads(line), "source": "all"} for line in lines]
        text = "".join(json.dumps({**row, "text": row["text"][:600]}, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{language}.jsonl").write_text(text, encoding="utf-8")


def session_of(world: World, folder: Path, cache: Path, *overrides: str) -> Session:
    """A run of a small model."""
    sources = [f"data.sources.{language}.path={cache}/{language}.jsonl" for language in ("en", "zh")]
    config = compose([*SMALL, *sources, f"output_dir={folder}", f"data.cache_dir={cache}", *overrides])
    return Session(config, world, StopSignal(CPU, world.size), ["test"])


def run_session(world: World, folder: Path, cache: Path, stop_at: int | None, switched: dict[str, Tensor]) -> None:
    """Train, stopping as a signal would after `stop_at` steps; `switched` takes the clipped gradients of the step after
    SWITCH_AT."""
    session = session_of(world, folder, cache)

    def record(*_: object) -> None:
        if session.step == SWITCH_AT:
            switched.update(gradients(session.model))

    session.trainer.optimizer.register_step_pre_hook(record)
    session.stop.agreed = lambda: session.step == stop_at  # type: ignore[method-assign]
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
