"""The head of a split vocabulary, its group a single rank (several: `test_layouts`)."""

from __future__ import annotations

import pytest
import torch

from moe.model import IGNORE_INDEX
from moe.parallel import World
from moe.parallel.tensor import _score_part

VOCAB = 7


@pytest.mark.parametrize("label", [VOCAB, -1])
def test_the_loss_of_a_label_in_no_part_is_nan(world: World, label: int) -> None:
    labels = torch.tensor([label, 3, IGNORE_INDEX])
    losses, _ = _score_part(torch.randn(3, 4), torch.randn(VOCAB, 4), labels, world.group)
    assert losses.isnan().tolist() == [True, False, False]
    assert losses[2] == 0
