"""Attention within documents: nothing crosses from one to another, and each is as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from document_helpers import Rows, documents_of, run_packed_kernel_on_cpu, slices_of
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import random_ids, small_config, unit_variance_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moe.config import ModelConfig
from moe.kernels.attention import SDPA_ORDER, takes_spans
from moe.model import KVCache, Transformer
from moe.model import attention as attention_module
from moe.model.attention import Attention, Documents, Mask, Packed, rotary_angles
from moe.model.reference import reference_logits

LAYOUTS: dict[str, Rows] = {
    "no_start_inside": [[12], [12]],
    "one_token_each": [[1] * 12, [1] * 12],
    "one_token_at_the_edges": [[1, 10, 1], [11, 1], [1, 11]],
    "all_rows_different": [[5, 7], [1, 2, 3, 6], [12], [4, 1, 7]],
}
HEADS = {"mha": {}, "gqa": {"num_key_value_heads": 2}}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def _packed_kernel_on_cpu() -> None:
    run_packed_kernel_on_cpu()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def logits_of(model: Transformer, ids: Tensor, **options: Any) -> Tensor:
    assert model.lm_head is not None
    return model.lm_head.logits(model(ids, **options).hidden)


def starts_of(rows: Rows) -> Tensor:
    return documents_of(rows).position_ids == 0


def packed(documents: Documents) -> Packed:
    return Packed(documents.cu_seqlens, documents.max_length)


def always_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward pass takes the way of the GPU."""
    monkeypatch.setattr(attention_module, "takes_spans", lambda *_: True)


# ---- what a model computes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("way", ["bias", "packed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)], ids=str)
def test_logits_equal_the_reference(
    layout: str, heads: str, way: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "packed":
        always_packed(monkeypatch)
    config = small_config(**HEADS[heads])
    rows = LAYOUTS[layout]
    model = unit_variance_model(config, dtype)
    ids = random_ids(config, len(rows), 12)
    exact = {name: tensor.double() for name, tensor in model.state_dict().items()}
    expected = reference_logits(exact, config, ids, starts_of(rows))
    found = logits_of(model, ids, documents=documents_of(rows)).double()
    assert (found - expected).abs().max() / expected.std() < tolerance


@pytest.mark.parametrize("heads", HEADS)
def test_the_reference_of_a_batch_is_that_of_each_document_alone(heads: str) -> None:
    config = small_config(**HEADS[heads])
    state = unit_variance_model(config, torch.float64).state_dict()
    rows = LAYOUTS["all_rows_different"]
    ids = random_ids(config, len(rows), 12)
    together = reference_logits(state, config, ids, starts_of(rows))
    for row, columns in slices_of(rows):
        alone = reference_logits(state, config, ids[row : row + 1, columns])
        torch.testing.assert_close(together[row, columns], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("way", ["bias", "packed"])
def test_loss_and_gradients_are_the_sums_over_documents_alone(
    layout: str, heads: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(**HEADS[heads])
    rows = LAYOUTS[layout]
    ids, labels = random_ids(config, len(rows), 12), random_ids(config, len(rows), 12, seed=1)
    together, alone = unit_variance_model(config, torch.float64), unit_variance_model(config, torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for row, columns in slices_of(rows):
        part = (slice(row, row + 1), columns)
        loss = alone(ids[part], labels=labels[part]).loss.total
        loss.backward()
        expected += loss.detach()
    if way == "packed":
        always_packed(monkeypatch)
    loss = together(ids, labels=labels, documents=documents_of(rows)).loss.total
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    for (name, found), wanted in zip(together.named_parameters(), alone.parameters(), strict=True):
        error = (found.grad - wanted.grad).abs().max()
        assert error < 1e-11 * max(1.0, wanted.grad.abs().max()), name


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_of_other_documents_stay(heads: str, backend: str) -> None:
    """To rounding only: the changed tokens choose other experts, whose groups of rows change size."""
    config = small_config(**HEADS[heads])
    rows = LAYOUTS["all_rows_different"]
    model = unit_variance_model(config, expert_backend=backend)
    ids = random_ids(config, len(rows), 12)
    before = logits_of(model, ids, documents=documents_of(rows))
    for row, columns in slices_of(rows):
        other, same = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
        other[row, columns] = (ids[row, columns] + 7) % config.vocab_size
        same[row, columns] = False
        difference = (logits_of(model, other, documents=documents_of(rows)) - before).abs()
        assert difference[same].max() <= 1e-5
        assert (difference[~same].amax(dim=-1) > 1e-3).all()


def test_one_document_a_row_is_no_mask_at_all() -> None:
    config = small_config()
    model = unit_variance_model(config, torch.float64)
    ids = random_ids(config, 2, 12)
    found = logits_of(model, ids, documents=documents_of([[12], [12]]))
    torch.testing.assert_close(found, logits_of(model, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["bias", "packed"])
def test_recomputation_knows_the_documents(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "packed":
        always_packed(monkeypatch)
    config = small_config()
    rows = LAYOUTS["all_rows_different"]
    ids, labels = random_ids(config, len(rows), 12), random_ids(config, len(rows), 12, seed=1)
    results = []
    for recompute in (False, True):
        model = unit_variance_model(config)
        for block in model.layers.values():
            block.recompute = recompute
        loss = model(ids, labels=labels, documents=documents_of(rows)).loss.total
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    assert all(torch.equal(kept, again) for kept, again in zip(*results, strict=True))


def test_every_pipeline_stage_masks() -> None:
    config = small_config()
    whole = unit_variance_model(config, torch.float64)
    state = whole.state_dict()
    stages = [Transformer(config, layers=layers).double() for layers in ([0], [1, 2])]
    for stage in stages:
        stage.load_state_dict({name: state[name] for name in stage.state_dict()})
    rows = LAYOUTS["all_rows_different"]
    ids, documents = random_ids(config, len(rows), 12), documents_of(rows)
    handed_over = stages[0](ids, documents=documents).hidden
    found = stages[1](ids, hidden=handed_over, documents=documents).hidden
    assert torch.equal(found, whole(ids, documents=documents).hidden)


def test_positions_restart_in_each_document() -> None:
    """Products depend on distances alone, so that logits would hardly show it: the angles must."""
    config = small_config()
    model = unit_variance_model(config)
    given_angles = []
    model.layers["2"].register_forward_pre_hook(lambda block, args: given_angles.extend(args[1:3]))
    model(random_ids(config, 2, 12), documents=documents_of([[5, 7], [12]]))
    longest = rotary_angles(torch.arange(12), config.head_dim, config.rope_theta, torch.float32)
    for found, angles in zip(given_angles, longest, strict=True):
        assert torch.equal(found, torch.stack([torch.cat([angles[:5], angles[:7]]), angles]))


def test_one_bias_serves_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = Documents.bias
    monkeypatch.setattr(Documents, "bias", lambda documents, dtype: built.append(dtype) or build(documents, dtype))
    config = small_config()
    model = unit_variance_model(config)
    model(random_ids(config, 2, 12), documents=documents_of([[5, 7], [12]]))
    assert built == [torch.float32]


def test_caches_and_documents_exclude_each_other() -> None:
    config = small_config()
    model = unit_variance_model(config)
    caches = [KVCache(config, 1, 12, torch.device("cpu"), torch.float32) for _ in model.layers]
    with pytest.raises(ValueError, match="give caches or documents"):
        model(random_ids(config, 1, 12), caches=caches, documents=documents_of([[12]]))


# ---- the bias


@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4))
def test_the_bias_is_causal_and_block_diagonal(opens: list[list[bool]]) -> None:
    rows = []
    for row in opens:
        starts = [0, *(t for t in range(1, 9) if row[t]), 9]
        rows.append([b - a for a, b in zip(starts, starts[1:], strict=False)])
    documents = documents_of(rows)
    allowed = torch.zeros(len(rows), 1, 9, 9, dtype=torch.bool)
    for row, columns in slices_of(rows):
        allowed[row, 0, columns, columns] = torch.ones(9, 9).tril().bool()[columns, columns]
    expected = torch.where(allowed, 0.0, -torch.inf)
    assert torch.equal(documents.bias(torch.float32), expected)
    int32 = replace(documents, position_ids=documents.position_ids.int())
    assert torch.equal(int32.bias(torch.bfloat16), expected.bfloat16())


# ---- attention alone: not a bit crosses

LONG: Rows = [[300, 1, 299], [512, 87, 1]]
"""Longer than the blocks of 32 to 512 that torch's CPU kernel works in, with bounds inside and on them: the last
documents' first block of keys is masked as a whole."""


def attention_of(heads: str, dtype: torch.dtype) -> tuple[ModelConfig, Attention]:
    config = small_config(**HEADS[heads])
    block = unit_variance_model(config, dtype).layers["0"]
    return config, block.self_attn


def outputs_and_gradients(
    attend: Callable[..., Tensor], x: Tensor, angles: tuple[Tensor, Tensor], mask: Mask, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = attend(x, *angles, None, mask)
    return out.detach(), torch.autograd.grad(out, x, upstream)[0]


def assert_nothing_crosses(
    attend: Callable[..., Tensor], rows: Rows, mask: Mask, config: ModelConfig, dtype: torch.dtype
) -> None:
    """Changing one document, inputs and upstream gradients, leaves the others' outputs and gradients to the bit."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, len(rows), sum(rows[0]), config.hidden_size)
    x, upstream = torch.randn(shape, generator=generator).to(dtype)
    documents = documents_of(rows)
    angles = rotary_angles(documents.position_ids, config.head_dim, config.rope_theta, torch.float32)
    before = outputs_and_gradients(attend, x, angles, mask, upstream)
    for row, columns in slices_of(rows):
        other, same = torch.stack([x, upstream]), torch.ones(x.shape[:2], dtype=torch.bool)
        other[:, row, columns] = 30 * torch.randn(other[:, row, columns].shape, generator=generator).to(dtype)
        same[row, columns] = False
        after = outputs_and_gradients(attend, other[0], angles, mask, other[1])
        for found, wanted in zip(after, before, strict=True):
            assert (found - wanted)[same].abs().amax() == 0.0
            assert not torch.equal(found[row, columns], wanted[row, columns])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backends", [[SDPBackend.MATH], SDPA_ORDER], ids=["math", "default"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_nothing_crosses_a_biased_kernel(
    heads: str, dtype: torch.dtype, backends: list[SDPBackend], backend: str | None
) -> None:
    config, attention = attention_of(heads, dtype)
    attend = attention if backend is None else torch.compile(attention, backend=backend, fullgraph=True)
    with sdpa_kernel(backends, set_priority=True):
        assert_nothing_crosses(attend, LONG, documents_of(LONG).bias(dtype), config, dtype)


@pytest.mark.parametrize(("heads", "dtype"), [("mha", torch.float32), ("gqa", torch.bfloat16)], ids=str)
def test_nothing_crosses_what_inductor_makes(heads: str, dtype: torch.dtype) -> None:
    config, attention = attention_of(heads, dtype)
    attend = torch.compile(attention, fullgraph=True)
    with sdpa_kernel(SDPA_ORDER, set_priority=True):
        assert_nothing_crosses(attend, LONG, documents_of(LONG).bias(dtype), config, dtype)


@pytest.mark.parametrize("heads", HEADS)
def test_nothing_crosses_a_packed_kernel(heads: str) -> None:
    config, attention = attention_of(heads, torch.float32)
    rows = LAYOUTS["all_rows_different"]
    assert_nothing_crosses(attention, rows, packed(documents_of(rows)), config, torch.float32)


# ---- compiled code and the choice of kernel


@pytest.mark.parametrize("way", ["bias", "packed"])
def test_compiled_code_serves_any_number_of_documents(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled again for another number, and results and gradients are those without compilation."""
    if way == "packed":
        always_packed(monkeypatch)
    config = small_config(num_key_value_heads=2, max_position_embeddings=128)
    plain, compiled = unit_variance_model(config), unit_variance_model(config)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    for block in compiled.layers.values():
        block.attend = torch.compile(block.attend, backend=count, fullgraph=True)
    ids = random_ids(config, 2, 128)
    compiled_first = 0
    for rows in ([[128], [128]], [[64, 64], [1] * 128], [[1] * 128] * 2, [[1, 127], [126, 2]]):
        losses = [m(ids, labels=ids, documents=documents_of(rows)).loss.total for m in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
        grads = [
            torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, (plain, compiled), strict=True)
        ]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)
        compiled_first = compiled_first or len(graphs)
        assert len(graphs) == compiled_first > 0


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("backend", "device", "head_dim", "dtype", "in_torch", "takes"),
    [
        ("sdpa", CUDA, 128, torch.bfloat16, True, True),
        ("sdpa", CUDA, 64, torch.float16, True, True),
        ("sdpa", CUDA, 128, torch.bfloat16, False, False),
        ("flash_attn", CUDA, 128, torch.bfloat16, False, True),
        ("sdpa", CUDA, 128, torch.float32, True, False),
        ("sdpa", CUDA, 20, torch.bfloat16, True, False),
        ("sdpa", CUDA, 264, torch.bfloat16, True, False),
        ("sdpa", CPU, 128, torch.bfloat16, True, False),
    ],
)
def test_spans_go_to_kernels_that_take_them(
    backend: str,
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    in_torch: bool,
    takes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: in_torch)
    assert takes_spans(backend, device, dtype, head_dim) is takes
