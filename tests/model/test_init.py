from __future__ import annotations

import pytest
import torch
from model_helpers import small_config
from torch import Tensor

from moe.config import ModelConfig
from moe.model import Transformer, initialise


def initialised(config: ModelConfig, seed: int = 0, layers: list[int] | None = None) -> dict[str, Tensor]:
    model = Transformer(config, layers=layers)
    initialise(model, config.initializer_range, seed)
    return model.state_dict()


def test_matrices_have_the_papers_deviation_and_norms_are_one() -> None:
    config = small_config(vocab_size=512, hidden_size=128, moe_intermediate_size=64, first_k_dense_replace=1)
    assert config.initializer_range == 0.006
    for name, tensor in initialised(config).items():
        if tensor.dim() == 1:
            assert tensor.tolist() == [1.0] * len(tensor), name
        else:
            deviations = 6 / tensor.numel() ** 0.5
            assert tensor.std().item() == pytest.approx(0.006, rel=deviations), name
            assert abs(tensor.mean().item()) < 0.006 * deviations, name


def test_the_seed_decides_and_the_global_generator_does_not() -> None:
    config = small_config()
    torch.manual_seed(0)
    first = initialised(config)
    torch.manual_seed(1)
    second, other = initialised(config), initialised(config, seed=1)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name


def test_a_stages_values_are_those_of_the_whole() -> None:
    config = small_config()
    whole = initialised(config)
    for layers in ([0], [1, 2], [2]):
        for name, tensor in initialised(config, layers=layers).items():
            assert torch.equal(tensor, whole[name]), name


def test_an_experts_values_do_not_depend_on_how_many_there_are() -> None:
    few, many = (initialised(small_config(n_routed_experts=count)) for count in (5, 11))
    for name in ("layers.0.mlp.experts.gate_up_proj", "layers.2.mlp.experts.down_proj"):
        assert torch.equal(few[name], many[name][:5])
    assert torch.equal(few["lm_head.weight"], many["lm_head.weight"])


def test_no_two_matrices_are_alike() -> None:
    state = initialised(small_config())
    firsts = [tensor.flatten()[0].item() for tensor in state.values() if tensor.dim() > 1]
    firsts += state["layers.1.mlp.experts.down_proj"][:, 0, 0].tolist()[1:]
    assert len(set(firsts)) == len(firsts)
