"""`python -m moe.plan`: the memory model against real tensors and what autograd really keeps."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.mem_tracker import MemTracker

from moe import plan
from moe.config import ConfigError, ModelConfig, compose
from moe.config.schema import OptimConfig, RuntimeConfig
from moe.memory import MicroBatch, activation_bytes, block_bytes, router_buffer_bytes, state_bytes, workspace_bytes
from moe.model import Block, Transformer, initialise
from moe.model.router import TopKRouter
from moe.parallel import join_world, mark_last_micro_batch, parallelize
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
    "grouped-query": dataclasses.replace(BASE, num_key_value_heads=1),
    "sigmoid": dataclasses.replace(BASE, scoring_func="sigmoid", norm_topk_prob=True, bias_update_speed=0.1),
    "none shared": dataclasses.replace(BASE, n_shared_experts=0, first_k_dense_replace=0),
    "dense": dataclasses.replace(BASE, n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0),
    "hash": dataclasses.replace(BASE, routing="hash", num_experts_per_tok=1),
}
SEQUENCES, SEQ_LEN, LANGUAGES = 2, 32, 2


def micro_batch(
    dtype: torch.dtype, *, recompute: bool = False, chunk: int = 8192, seq_len: int = SEQ_LEN
) -> MicroBatch:
    return MicroBatch(SEQUENCES, seq_len, dtype.itemsize, LANGUAGES, chunk, fused_norms=False, recompute=recompute)


def build(config: ModelConfig, chunk: int = 8192) -> Transformer:
    model = Transformer(config, num_languages=LANGUAGES, expert_backend="grouped_mm", loss_chunk_size=chunk)
    initialise(model, 0.02, seed=0)
    return model


def loss_of(model: Transformer, seq_len: int = SEQ_LEN) -> torch.Tensor:
    ids = torch.randint(0, model.config.vocab_size, (SEQUENCES, seq_len))
    languages = ids % LANGUAGES
    output = model(ids, labels=ids.clone(), label_languages=languages, languages=languages, valid=ids >= 0)
    loss = output.loss.cross_entropy.sum()
    return loss + balance_sum(output.routing) if output.routing else loss


def saved_bytes(model: Transformer) -> int:
    """Bytes of all distinct storages that autograd keeps for the backward pass, parameters excepted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("chunk", [8192, 24])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_what_autograd_keeps(name: str, dtype: torch.dtype, recompute: bool, chunk: int) -> None:
    config = MODELS[name]
    model = build(config, chunk)
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.recompute = recompute
    parts = activation_bytes(config, micro_batch(dtype, recompute=recompute, chunk=chunk))
    parts.pop("routing choices", None)  # kept by the checkpoint itself, out of the hooks' sight
    single_chunk = chunk >= SEQUENCES * SEQ_LEN
    log_probabilities = 4 * SEQUENCES * SEQ_LEN * config.vocab_size if single_chunk else 0
    assert sum(parts.values()) + log_probabilities == pytest.approx(saved_bytes(model), rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_state_is_that_of_the_real_tensors(name: str) -> None:
    model = build(MODELS[name])
    optimizer = build_optimizer(model, OptimConfig())
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
    loss_of(model).backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    state = state_bytes(MODELS[name], compute_bytes=4)
    assert (state["master weights"], state["AdamW moments"], state["gradients"]) == (weights, moments, gradients)
    assert state["router buffers"] == router_buffer_bytes(MODELS[name]) == sum(b.nbytes for b in model.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_total_is_the_peak_of_a_sharded_step(dtype: torch.dtype) -> None:
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
    batch = micro_batch(dtype, seq_len=seq_len)
    expected = [state_bytes(config, dtype.itemsize), activation_bytes(config, batch)]
    total = sum(sum(parts.values()) for parts in expected) + max(workspace_bytes(config, batch).values())
    assert total == pytest.approx(peak, rel=0.03)


def test_fused_norms_and_recomputation_keep_less() -> None:
    batch = micro_batch(torch.bfloat16)
    unfused = activation_bytes(BASE, batch)
    fused = activation_bytes(BASE, batch._replace(fused_norms=True))
    tokens, norms = SEQUENCES * SEQ_LEN, 2 * BASE.num_hidden_layers + 1
    assert unfused["norms"] - fused["norms"] == norms * tokens * BASE.hidden_size * (8 - 2)
    assert {key: unfused[key] for key in unfused if key != "norms"} == {
        key: fused[key] for key in fused if key != "norms"
    }
    recomputed = batch._replace(recompute=True)
    backward = [workspace_bytes(BASE, b)["block backward"] for b in (batch, recomputed)]
    assert backward[1] - backward[0] == sum(block_bytes(BASE, 1, batch).values())


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert plan.main([*arguments, "--json"]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_plans_the_16b_run(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan_json(capsys, "+experiment=moe_16b", "train.micro_batch_size=4", "--tflops", "400")
    assert (facts["num_params"], facts["num_active_params"]) == (16_375_728_128, 2_828_650_496)
    assert facts["flops_per_sequence"] == pytest.approx(75.8e12, rel=1e-3)
    assert facts["tokens"] == 106_449 * 4608 * 4096
    assert facts["flops"] == facts["flops_per_token"] * facts["tokens"]
    assert facts["device_days"] == pytest.approx(facts["flops"] / 400e12 / 86_400)
    memory = facts["memory_bytes"]
    assert memory["state"]["master weights"] == 4 * 16_375_728_128
    for column in ("kept", "recomputed"):
        parts = [*memory["state"].values(), *memory["activations"][column].values()]
        assert memory["total"][column] == sum(parts) + max(memory["workspace"][column].values())
    assert memory["total"]["recomputed"] < memory["total"]["kept"]


def test_overrides_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    gpu, cpu = plan_json(capsys), plan_json(capsys, "runtime.device=cpu")
    assert gpu["device_days"] is None
    assert cpu["memory_bytes"]["activations"]["kept"]["norms"] > gpu["memory_bytes"]["activations"]["kept"]["norms"]
    smaller = plan_json(capsys, "train.micro_batch_size=2")["memory_bytes"]
    assert smaller["state"] == gpu["memory_bytes"]["state"]
    assert smaller["activations"]["kept"]["attention"] * 2 == gpu["memory_bytes"]["activations"]["kept"]["attention"]


def test_prints_a_table_that_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["runtime.activation_checkpointing=full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("memory"))
    assert lines[start].endswith("recomputed (as configured)")
    rows = [[float(figure) for figure in line.split()[-2:]] for line in lines[start + 1 :]]
    for column in range(2):
        assert sum(row[column] for row in rows[:-1]) == pytest.approx(rows[-1][column], abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["model.hiden_size=3"], "unknown key model.hiden_size: did you mean model.hidden_size?"),
        (["+experiment=nope"], "experiment/nope"),
        (["train.micro_batch_size=5"], "train.micro_batch_size must be a divisor"),
        (["--tflops", "0"], "--tflops must be above 0"),
    ],
)
def test_errors_are_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 78
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert complaint in output.err
    assert output.err.count("\n") == 1


def test_compose_is_checked() -> None:
    assert compose(["train.steps=7", "optim.schedule.warmup_steps=2"]).train.steps == 7
    with pytest.raises(ConfigError, match=r"data\.seq_len must be at least 2"):
        compose(["data.seq_len=1"])
