"""The one function that turns the single-device model into what a run executes, always in this order:
tensor and expert parallelism -> activation checkpointing -> compile -> FSDP2.

Precision has one mechanism on every world size, one included: parameters are float32 masters held by FSDP2; its
mixed-precision policy hands blocks a copy in the compute dtype, kept across the micro-batches of a step so that the
cast is paid once; gradients accumulate and reduce in float32. Routers are groups of their own whose policy is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moe.config.schema import ParallelConfig, RuntimeConfig
from moe.kernels.experts import FUSED
from moe.model import Block, MoE, Transformer
from moe.model.experts import GroupedExperts, local
from moe.model.router import TopKRouter
from moe.parallel.exchange import ExchangeDispatcher
from moe.parallel.tensor import split_statistics, split_tensors
from moe.parallel.world import World


def parallelize(
    model: Transformer,
    world: World,
    compute_dtype: torch.dtype,
    runtime: RuntimeConfig,
    parallel: ParallelConfig | None = None,
) -> None:
    """Prepare `model`, whose float32 parameters are on `world.device` or on meta, in place; names stay as they are.

    Of a model on meta only the parts that belong to this rank need ever exist: `to_empty`, then `initialise`.
    """
    parallel = parallel or ParallelConfig()
    if world.layout.tensor > 1:
        split_tensors(model, world)
    split_statistics(model, world)
    if world.layout.expert > 1:
        _split_experts(model, world)
    for block in model.layers.values():
        assert isinstance(block, Block)
        # a compiled region chooses by itself what is cheap enough to be computed again
        is_left_to_compiler = runtime.compile and runtime.activation_checkpointing == "selective"
        block.recompute = "none" if is_left_to_compiler else runtime.activation_checkpointing
    if runtime.compile:
        _compile(model, world, compute_dtype)
    _shard(model, world, compute_dtype, runtime, parallel)


def _split_experts(model: Transformer, world: World) -> None:
    """Leave this rank its share of every layer's experts."""
    mesh = world.sparse["expert"]
    for mixture in model.moe_blocks():
        mixture.dispatcher = ExchangeDispatcher(mixture.config.n_routed_experts, mesh.get_group())
        experts = mixture.experts
        for name, parameter in list(experts.named_parameters()):
            share = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            experts.register_parameter(name, nn.Parameter(share))


def _compile(model: Transformer, world: World, compute_dtype: torch.dtype) -> None:
    """Compile what has static shapes, each part on its own.

    A local dispatch has them too: N K rows however they are routed. One that exchanges rows between ranks has not; it
    stays between compiled regions, and the experts are compiled for any number of rows.
    """
    for block in model.layers.values():
        assert isinstance(block, Block)
        block.attend = torch.compile(block.attend)  # type: ignore[method-assign]
        if isinstance(block.mlp, MoE):
            _compile_mixture(block.mlp, world, compute_dtype)
        else:
            block.mlp.compile()
    if model.norm is not None and model.lm_head is not None and world.layout.tensor == 1:
        # its own compile() does nothing: frames of torch.nn are left alone, but not a function given by name
        model.norm.forward = torch.compile(model.norm.forward)  # type: ignore[method-assign]
        if world.device.type == "cpu":  # one kernel of ours elsewhere
            model.lm_head.score = torch.compile(model.lm_head.score)


def _compile_mixture(mixture: MoE, world: World, compute_dtype: torch.dtype) -> None:
    if isinstance(mixture.gate, TopKRouter):
        mixture.gate.score = torch.compile(mixture.gate.score)  # type: ignore[method-assign]
        mixture.gate.weigh = torch.compile(mixture.gate.weigh)  # type: ignore[method-assign]
    if mixture.config.seq_aux and world.layout.tensor == 1:  # elsewhere they may all-reduce
        mixture.statistics = torch.compile(mixture.statistics)  # type: ignore[method-assign]
    # torch traces its grouped product in no other dtype
    is_traceable = mixture.experts.backend in ("grouped_mm", *FUSED) and compute_dtype == torch.bfloat16
    if is_traceable and not _are_experts_apart(world):
        mixture.mix = torch.compile(mixture.mix)  # type: ignore[method-assign]
        return
    mixture.join = torch.compile(mixture.join)  # type: ignore[method-assign]
    if isinstance(mixture.dispatcher, ExchangeDispatcher):
        mixture.dispatcher.compile()
    if is_traceable and mixture.experts.backend == "grouped_mm":
        mixture.experts.forward = torch.compile(mixture.experts.forward, dynamic=True)  # type: ignore[method-assign]
    if mixture.shared_experts is not None:
        mixture.shared_experts.gate_up = torch.compile(mixture.shared_experts.gate_up)  # type: ignore[method-assign]
        mixture.shared_experts.down = torch.compile(mixture.shared_experts.down)  # type: ignore[method-assign]


def _are_experts_apart(world: World) -> bool:
    """Whether routed experts lie on other ranks, or are sharded over others, than the dense weights around them."""
    return world.layout.expert > 1 or world.layout.tensor > 1


def _shard(
    model: Transformer, world: World, compute_dtype: torch.dtype, runtime: RuntimeConfig, parallel: ParallelConfig
) -> None:
    # inputs are cast by the model itself: FSDP would round the rotary angles and the gate weights to the compute dtype
    compute = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    dense, sparse = _fsdp_mesh(world.dense, "shard"), _fsdp_mesh(world.sparse, "expert_shard")
    reshard, across = parallel.reshard, _across_the_split
    for block in model.layers.values():
        if isinstance(block.mlp, MoE):
            if isinstance(block.mlp.gate, TopKRouter):
                fully_shard(block.mlp.gate, mesh=dense, mp_policy=exact, reshard_after_forward=reshard)
            if _are_experts_apart(world):
                fully_shard(
                    block.mlp.experts,
                    mesh=sparse,
                    mp_policy=compute,
                    reshard_after_forward=reshard,
                    shard_placement_fn=_along_hidden_size if world.layout.expert > 1 else None,
                )
                register_fsdp_forward_method(block.mlp.experts, "route")
                if world.layout.expert > 1:
                    _mend_empty_share(block.mlp.experts)
        fully_shard(block, mesh=dense, mp_policy=compute, reshard_after_forward=reshard, shard_placement_fn=across)
    fully_shard(model, mesh=dense, mp_policy=compute, reshard_after_forward=False, shard_placement_fn=across)
    for module in _fsdp_modules(model):
        # gradients are divided once, by the step's global token count, inside the loss
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    if runtime.compile and world.device.type == "cuda":
        _compile_gradient_sums(model)
    if world.layout.replicate == 1:
        _keep_gradients_of_one_rank(model)
    _sum_gradients_in_products(model)
    _prefetch(model)


def _fsdp_groups(model: Transformer) -> list[Any]:
    """FSDP2's own parts, each the parameters that it gathers and whose gradients it reduces together."""
    groups = [module._get_fsdp_state()._fsdp_param_group for module in _fsdp_modules(model)]
    return [group for group in groups if group]


def _compile_gradient_sums(model: Transformer) -> None:
    """FSDP2 makes float32 of a micro-batch's bfloat16 gradients, or adds them to the float32 sums, by kernels that
    convert one number at a time, at 60 % of the memory's bandwidth; compiled ones keep up with the memory."""
    convert, add = torch.compile(_convert, dynamic=True), torch.compile(_add, dynamic=True)
    for group in _fsdp_groups(model):
        for parameter in group.fsdp_params:
            parameter.to_accumulated_grad_if_needed = partial(_begin_sum, parameter, convert)
            parameter.accumulate_unsharded_grad_if_needed = partial(_accumulate, parameter, add)


def _begin_sum(parameter: Any, convert: Callable[[Tensor], Tensor]) -> None:
    gradient = parameter._unsharded_param.grad
    if gradient is None or gradient.dtype == parameter.reduce_dtype:
        return
    parameter._unsharded_param.grad = None
    parameter.unsharded_accumulated_grad = gradient.float() if isinstance(gradient, DTensor) else convert(gradient)


def _convert(gradient: Tensor) -> Tensor:
    return gradient.float()


def _accumulate(parameter: Any, add: Callable[[Tensor, Tensor], None]) -> None:
    total, unsharded = parameter.unsharded_accumulated_grad, parameter.unsharded_param
    if total is not None and unsharded.grad is not None:
        add(local(total), local(unsharded.grad))
        unsharded.grad = None


def _add(total: Tensor, part: Tensor) -> None:
    total.add_(part)


def _keep_gradients_of_one_rank(model: Transformer) -> None:
    """Where one rank holds all of a group, FSDP2 reduces nothing, but copies the gradients into a buffer, divides that
    by one into another and copies it into a third: here they are what they are, in float32."""
    for group in _fsdp_groups(model):
        if group.mesh_info.shard_mesh_size == 1:
            group.post_backward = partial(_keep_gradients, group, group.post_backward)


def _keep_gradients(group: Any, accumulate_or_reduce: Callable[..., None], *unused: Any) -> None:
    if not group.reduce_grads:
        accumulate_or_reduce()
        return
    group.reduce_grads = False
    accumulate_or_reduce()
    group.reduce_grads = True
    for parameter in group.fsdp_params:
        _hand_over_gradient(parameter)


def _hand_over_gradient(parameter: Any) -> None:
    """From the copy that was computed with to the parameter itself, the shard that is the whole."""
    if not hasattr(parameter, "_unsharded_param"):
        return
    gradient = parameter.unsharded_accumulated_grad
    if gradient is None:
        gradient = parameter._unsharded_param.grad
    parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None
    if gradient is None:
        return
    own = parameter._get_grad_inner_tensor(gradient)  # under tensor parallelism, of this rank's part
    if parameter.sharded_param.grad is not None:
        local(parameter.sharded_param.grad).add_(own)
    else:
        parameter.sharded_param.grad = parameter.to_sharded_dtensor(own)


def _sum_gradients_in_products(model: Transformer) -> None:
    """From a step's second micro-batch on fused experts add their weights' gradients to FSDP2's sums themselves. QuACK
    does so inside its products, which saves a pass over memory and a rounding to the compute dtype."""
    for group in _fsdp_groups(model):
        for experts in {parameter._module_info.module for parameter in group.fsdp_params}:
            if isinstance(experts, GroupedExperts) and experts.backend in FUSED:
                group.post_backward = partial(_lend_sums, group, experts, group.post_backward)


def _lend_sums(group: Any, experts: GroupedExperts, accumulate_or_reduce: Callable[..., None], *unused: Any) -> None:
    """After a micro-batch: to the next one, where there are any. What was lent to this one is taken back."""
    experts.gradient_sums = None  # a reduction gives their memory back as soon as it can
    accumulate_or_reduce()
    sums = {
        parameter._module_info.param_name: parameter.unsharded_accumulated_grad
        for parameter in group.fsdp_params
        if parameter._module_info.module is experts
    }
    gate_up, down = sums["gate_up_proj"], sums["down_proj"]
    if gate_up is not None and down is not None:
        experts.gradient_sums = local(gate_up), local(down)


def _mend_empty_share(experts: nn.Module) -> None:
    """Of a rank left without experts (5 on 4 ranks): FSDP narrows the sharded dimension of an empty parameter to
    nothing as well, which is not what the other ranks take its shape to be."""
    assert isinstance(experts, FSDPModule)
    group: Any = experts._get_fsdp_state()._fsdp_param_group
    for parameter in group.fsdp_params:
        own = local(parameter.sharded_param)
        if not own.numel():
            parameter.sharded_param._local_tensor = own.new_empty(parameter.padded_sharded_param_size)


def _fsdp_mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    return mesh["replicate", axis] if mesh["replicate"].size() > 1 else mesh[axis]


def _across_the_split(parameter: nn.Parameter) -> Shard | None:
    """Shard what tensor parallelism has split by rows along its columns: on one dimension the shards of a rank would
    interleave with the others'."""
    return Shard(1) if isinstance(parameter, DTensor) and parameter.placements[0] == Shard(0) else None


def _along_hidden_size(parameter: nn.Parameter) -> Shard:
    """gate_up_proj (E, 2, I, H), down_proj (E, H, I): H divides evenly by the ranks, unlike E and often I."""
    return Shard(3) if parameter.dim() == 4 else Shard(1)


def _prefetch(model: Transformer) -> None:
    """Gather the next block's weights while this one computes, in an order that does not wait for the host: a dispatch
    between ranks holds it up."""
    parts = [_fsdp_modules(block) for block in model.layers.values()]
    for own, following in pairwise(parts):
        own[0].set_modules_to_forward_prefetch(following)
    for own, following in pairwise(reversed(parts)):
        own[0].set_modules_to_backward_prefetch(following)


def _fsdp_modules(module: nn.Module) -> list[FSDPModule]:
    """Outermost first."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def mark_last_micro_batch(model: Transformer, is_last: bool, reshard: bool = False) -> None:
    """Only the last backward pass of a step reduces gradients and frees the compute copies, unless they are resharded
    after every use: then each pass reduces over the shards, and only the last over the copies of the model."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(is_last or reshard)
    if reshard:
        model.set_requires_all_reduce(is_last)
    model.set_reshard_after_backward(is_last or reshard)
    model.set_is_last_backward(is_last)


@torch.no_grad()
def sum_token_gradients(model: Transformer, world: World) -> None:
    """Complete the gradients of norms and routers, of which every rank along `tensor` holds the whole but has fed it
    only its own tokens; one all-reduce for all of them."""
    if world.layout.tensor == 1:
        return
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None and _axes(p) <= {"replicate", "shard"}]
    total = world.tensor_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def copies(parameter: nn.Parameter, world: World) -> int:
    """How many ranks hold each element of a parallelized parameter."""
    assert isinstance(parameter, DTensor)
    placed = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    shards = 1
    for size, placement in placed:
        shards *= size if placement.is_shard() else 1
    return world.size // shards


def _axes(parameter: Tensor) -> set[str]:
    assert isinstance(parameter, DTensor)
    return set(parameter.device_mesh.mesh_dim_names or ())
