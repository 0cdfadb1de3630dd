"""Compilation changes no name, no result, and stays clear of what has data-dependent shapes."""

from __future__ import annotations

import functools

import pytest
import torch
from parallel_helpers import accumulate, assert_all_close, build_model, config_of, gradients, ragged_batch

from moe.parallel import World


class Recorder:
    """A compiler backend that runs graphs as they are and remembers their operators."""

    def __init__(self) -> None:
        self.graphs: list[set[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        self.graphs.append({getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes})
        return graph


def test_names_are_free_of_wrappers(world: World) -> None:
    runtime = {"compile": True, "activation_checkpointing": "full"}
    plain, wrapped = (build_model(config_of(runtime=options), world) for options in ({}, runtime))
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    names = [name for name, _ in wrapped.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    assert "layers.1.mlp.experts.gate_up_proj" in names


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_only_static_shapes_are_compiled_and_results_stay(
    world: World, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    recorder = Recorder()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recorder))
    runtime = {"activation_checkpointing": recompute}
    plain, compiled = (build_model(config_of(runtime=runtime | {"compile": on}), world) for on in (False, True))
    loss = accumulate(plain, [ragged_batch()])
    torch.testing.assert_close(accumulate(compiled, [ragged_batch()]), loss, rtol=1e-6, atol=0)
    assert_all_close(gradients(compiled), gradients(plain), 1e-5)
    operators = set().union(*recorder.graphs)
    assert {"scaled_dot_product_attention", "log_softmax", "expm1", "silu"} <= operators
    last_norm = [graph for graph in recorder.graphs if "rms_norm" in graph and len(graph) < 6]
    assert len(last_norm) == 1
    assert operators.isdisjoint({"topk", "grouped_mm", "_grouped_mm", "sort", "searchsorted", "index_select"})
    compiled_once = len(recorder.graphs)
    accumulate(compiled, [ragged_batch(seed=1)])
    assert len(recorder.graphs) == compiled_once


@pytest.mark.usefixtures("products_as_on_gpus")
def test_local_dispatch_is_one_static_region_in_bfloat16(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=recorder))
    plain, compiled = (build_model(config_of("bfloat16", runtime={"compile": on}), world) for on in (False, True))
    loss = accumulate(plain, [ragged_batch()])
    torch.testing.assert_close(accumulate(compiled, [ragged_batch()]), loss, rtol=1e-4, atol=0)
    assert_all_close(gradients(compiled), gradients(plain), 2e-2)
    region = next(graph for graph in recorder.graphs if "grouped_mm" in graph or "_grouped_mm" in graph)
    assert {"sort", "searchsorted"} <= region
    compiled_once = len(recorder.graphs)
    accumulate(compiled, [ragged_batch(seed=1)])  # other loads, the same shapes: nothing compiles again
    assert len(recorder.graphs) == compiled_once


@pytest.mark.slow
def test_inductors_code_gives_the_eager_gradients(world: World) -> None:
    torch._dynamo.reset()
    plain, compiled = (build_model(config_of(runtime={"compile": on}), world) for on in (False, True))
    loss = accumulate(plain, [ragged_batch()])
    torch.testing.assert_close(accumulate(compiled, [ragged_batch()]), loss, rtol=1e-5, atol=0)
    assert_all_close(gradients(compiled), gradients(plain), 1e-4)
