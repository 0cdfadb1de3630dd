"""The planner's memory against real tensors and what autograd really keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker

from moe.config import ModelConfig
from moe.config.schema import OptimConfig, RuntimeConfig
from moe.model import Block, MoE, Transformer, initialise, recompute
from moe.model.router import TopKRouter
from moe.parallel import Layout, join_world, mark_last_micro_batch, parallelize
from moe.planning.fake import weight_bytes
from moe.planning.memory import activation_bytes, block_bytes, kept_bytes, memory, workspace_bytes
from moe.planning.shards import weight_groups
from moe.planning.step import Step
from moe.training.optimizer import build_optimizer
from moe.training.trainer import balance_sum

BASE = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=192,
    moe_intermediate_size=48,
    n_shared_experts=2,
    n_routed_experts=14,
    num_experts_per_tok=3,
    first_k_dense_replace=1,
)
MODELS = {
    "deepseekmoe": BASE,
    "grouped-query": dataclasses.replace(BASE, num_key_value_heads=2),
    "sigmoid": dataclasses.replace(BASE, scoring_func="sigmoid", norm_topk_prob=True, bias_update_speed=0.1),
    "none shared": dataclasses.replace(BASE, n_shared_experts=0, first_k_dense_replace=0),
    "dense": dataclasses.replace(BASE, n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0),
    "hash": dataclasses.replace(BASE, routing="hash", num_experts_per_tok=1),
}
SEQUENCES, SEQ_LEN, LANGUAGES = 2, 32, 2
pytestmark = pytest.mark.usefixtures("products_as_on_gpus")
ONE = Layout()


def step_of(dtype: torch.dtype, **changes: Any) -> Step:
    step = Step(
        micro_batches=1,
        sequences=SEQUENCES,
        seq_len=SEQ_LEN,
        compute_bytes=dtype.itemsize,
        num_languages=LANGUAGES,
        loss_chunk_size=8192,
        recompute="none",
        reshard=False,
        kernels="cpu",
    )
    return step._replace(**changes)


def build(config: ModelConfig, chunk: int = 8192) -> Transformer:
    model = Transformer(config, num_languages=LANGUAGES, expert_backend="grouped_mm", loss_chunk_size=chunk)
    initialise(model, 0.02, seed=0)
    return model


def cast(model: Transformer, dtype: torch.dtype) -> Transformer:
    """As FSDP's policy hands weights to the blocks."""
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return model


def loss_of(model: Transformer, seq_len: int = SEQ_LEN) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, seq_len))
    languages = ids % LANGUAGES
    output = model(ids, labels=ids.clone(), label_languages=languages, languages=languages, valid=ids >= 0)
    loss = output.loss.total
    return loss + balance_sum(output.routing) if output.routing else loss


def kept_of(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all distinct storages that autograd, or selective recomputation, keeps for the backward pass,
    parameters excepted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    contexts, results = recompute._contexts, []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    def recorded() -> Any:
        found = contexts()
        results.append(found[0].results)
        return found

    monkeypatch.setattr(recompute, "_contexts", recorded)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    for deques in results:
        for result in tensors_in([list(deque) for deque in deques.values()]):
            pack(result)
    return sum(storage.nbytes() for storage in kept.values())


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


@pytest.mark.parametrize("chunk", [8192, 24])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(
    name: str, dtype: torch.dtype, mode: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MODELS[name]
    model = cast(build(config, chunk), dtype)
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.recompute = mode
    parts = activation_bytes(config, ONE, step_of(dtype, recompute=mode, loss_chunk_size=chunk))
    parts.pop("routing choices", None)  # kept by the checkpoint itself, out of the hooks' sight
    assert sum(parts.values()) == pytest.approx(kept_of(model, monkeypatch), rel=0.01)


def test_compiled_blocks_keep_what_the_partitioner_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that are compiled for CUDA are cut into forward and backward before any kernel is chosen."""
    compiler = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compiler)
    model = cast(build(BASE), torch.bfloat16)
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attend = compiler(block.attend)  # type: ignore[method-assign]
        if isinstance(block.mlp, MoE):
            block.mlp.mix = compiler(block.mlp.mix)  # type: ignore[method-assign]
        else:
            block.mlp = compiler(block.mlp)
    step = step_of(torch.bfloat16, kernels="compiled")
    parts = activation_bytes(BASE, ONE, step)
    assert sum(parts.values()) == pytest.approx(kept_of(model, monkeypatch), rel=0.035)


LAYOUTS = [
    Layout(shard=8),
    Layout(replicate=2, shard=4),
    Layout(shard=2, tensor=4),
    Layout(shard=8, expert=4),
    Layout(shard=4, tensor=2, expert=8),
    Layout(replicate=2, shard=2, tensor=2, expert=2),
]


@pytest.mark.parametrize("name", ["grouped-query", "sigmoid", "none shared", "hash"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shards_are_those_of_the_real_parallelization(name: str, layout: Layout) -> None:
    """Of the first rank and of the last, which has the least, on fake ranks."""
    for rank in (0, layout.world_size - 1):
        own = sum(group.number * group.own for group in weight_groups(MODELS[name], layout, rank))
        assert weight_bytes(MODELS[name], layout, rank=rank) == 4 * own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_that_of_a_sharded_step(dtype: torch.dtype) -> None:
    """Every tensor of two accumulated micro-batches and the optimizer's step, counted as it comes and goes."""
    config = dataclasses.replace(BASE, vocab_size=2048)
    seq_len = 256
    with join_world("cpu") as world:
        model = build(config)
        parallelize(model, world, dtype, RuntimeConfig())
        optimizer = build_optimizer(model, OptimConfig())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for step in range(4):
                tracker.reset_mod_stats()
                mark_last_micro_batch(model, is_last=step % 2 == 1)
                loss_of(model, seq_len).backward()
                if step % 2 == 1:
                    optimizer.step()
                    optimizer.zero_grad()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    expected = memory(config, ONE, step_of(dtype, micro_batches=2, seq_len=seq_len)).peak
    assert expected == pytest.approx(peak, rel=0.03)


def test_fused_norms_and_recomputation_keep_less() -> None:
    step = step_of(torch.bfloat16)
    unfused, fused = (activation_bytes(BASE, ONE, step._replace(kernels=kernels)) for kernels in ("cpu", "eager"))
    tokens, norms = SEQUENCES * SEQ_LEN, 2 * BASE.num_hidden_layers + 1
    assert unfused.pop("norms") - fused.pop("norms") == norms * tokens * BASE.hidden_size * (8 - 2)
    assert unfused == fused
    backward = {
        mode: workspace_bytes(BASE, ONE, step._replace(recompute=mode))["block backward"]
        for mode in ("none", "selective", "full")
    }
    block, kept = (sum(parts(BASE, 1, ONE, step).values()) for parts in (block_bytes, kept_bytes))
    assert backward["full"] - backward["none"] == block
    assert backward["selective"] - backward["none"] == block - kept


def test_gradients_accumulate_whole_until_the_last_micro_batch_reduces_them() -> None:
    layout = Layout(shard=4)
    groups = weight_groups(BASE, layout)
    whole, own = (4 * sum(g.number * size(g) for g in groups) for size in (lambda g: g.gathered, lambda g: g.own))
    step = step_of(torch.bfloat16)
    found = [
        memory(BASE, layout, step._replace(micro_batches=count, reshard=reshard)).pass_["gradients"]
        for count, reshard in ((1, False), (2, False), (2, True))
    ]
    assert found == [0, whole, own]
    assert whole > 3 * own
