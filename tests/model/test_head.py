from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe.model import IGNORE_INDEX
from moe.model.head import LMHead

HIDDEN, VOCAB, LANGUAGES, BATCH, LENGTH = 8, 20, 3, 2, 7


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, requires_grad=True)
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    labels[0, 2:4], labels[1, 6] = IGNORE_INDEX, IGNORE_INDEX
    return hidden, labels, torch.randint(LANGUAGES, (BATCH, LENGTH), generator=generator)


def head(chunk_size: int) -> LMHead:
    head = LMHead(HIDDEN, VOCAB, LANGUAGES, chunk_size)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return head


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 14, 100])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk_size: int) -> None:
    hidden, labels, languages = inputs()
    weight = head(1).weight
    logits = hidden.flatten(0, 1) @ weight.T
    losses = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    by_language = losses @ F.one_hot(languages.flatten(), LANGUAGES).float()
    counts = ((labels != IGNORE_INDEX)[..., None] * F.one_hot(languages, LANGUAGES)).sum((0, 1)).float()
    plain = [losses.sum(), by_language, counts, *torch.autograd.grad(3 * losses.sum(), [hidden, weight])]
    module = head(chunk_size)
    loss = module(hidden, labels, languages)
    found = [*loss, *torch.autograd.grad(3 * loss.total, [hidden, module.weight])]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_sums_are_by_the_labels_language_and_skip_what_is_ignored(chunk_size: int) -> None:
    hidden, labels, languages = inputs()
    module = head(chunk_size)
    found = module(hidden, labels, languages)
    expected, counts = [0.0] * LANGUAGES, [0] * LANGUAGES
    for h, label, language in zip(hidden.flatten(0, 1), labels.flatten(), languages.flatten(), strict=True):
        if label != IGNORE_INDEX:
            expected[language] -= F.log_softmax(module.weight @ h, dim=0)[label].item()
            counts[language] += 1
    assert found.labels.tolist() == counts
    torch.testing.assert_close(found.cross_entropy, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_ignored_positions_send_no_gradient() -> None:
    hidden, labels, languages = inputs()
    head(4)(hidden, labels, languages).total.backward()
    assert hidden.grad is not None
    ignored = labels == IGNORE_INDEX
    assert hidden.grad[ignored].abs().max() == 0
    assert (hidden.grad[~ignored].abs().amax(dim=-1) > 0).all()


def test_no_label_at_all_is_zero_not_nan() -> None:
    hidden, labels, languages = inputs()
    loss = head(4)(hidden, torch.full_like(labels, IGNORE_INDEX), languages)
    assert loss.cross_entropy.tolist() == [0.0] * LANGUAGES
    assert loss.labels.tolist() == [0.0] * LANGUAGES


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_no_logits_are_kept(chunk_size: int) -> None:
    """What the graph saves for the backward pass holds no (N, V) tensor."""
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head(chunk_size)(*inputs())
    assert sorted(sizes) == [(BATCH * LENGTH, HIDDEN), (VOCAB, HIDDEN)]


def test_a_label_that_is_all_but_certain_keeps_its_gradient() -> None:
    """Its probability less one, which bfloat16 would round to nothing."""
    module = LMHead(HIDDEN, 2, 1, 100).bfloat16()
    hidden = torch.zeros(1, 1, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        hidden[..., 0] = 1
        module.weight.zero_()
        module.weight[0, 0] = 9
    loss = module(hidden, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    loss.total.backward()
    assert module.weight.grad is not None
    expected = torch.tensor([-1.0, 1.0]) * torch.sigmoid(torch.tensor(-9.0))
    torch.testing.assert_close(module.weight.grad[:, 0].float(), expected, rtol=0.01, atol=0)


@pytest.mark.usefixtures("products_as_on_gpus")
def test_bfloat16_hidden_states_are_scored_in_float32() -> None:
    hidden, labels, languages = inputs()
    module = head(100).bfloat16()
    found = module(hidden.bfloat16(), labels, languages).cross_entropy
    logits = (hidden.bfloat16() @ module.weight.T).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(), losses.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("label", [VOCAB, -1])
def test_labels_outside_the_vocabulary_are_refused(label: int) -> None:
    hidden, labels, languages = inputs()
    with pytest.raises(RuntimeError, match="out of bounds"):
        head(4)(hidden, torch.full_like(labels, label), languages)
