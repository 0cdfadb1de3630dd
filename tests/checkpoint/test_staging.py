"""The memory that saves copy to."""

from __future__ import annotations

import io
from contextlib import nullcontext

import pytest
import torch

from moe.checkpoint.staging import StagingMemory, bytes_for

TENSORS = [
    torch.randn(3, 5),
    torch.tensor(7.0, dtype=torch.float64),
    torch.empty(0, 4),
    torch.randn(65).to(torch.bfloat16),
    torch.randn(4, 6).t(),
    torch.tensor([True, False, True]),
]


def test_copies_are_equal_and_stay_when_the_originals_change() -> None:
    originals = [tensor.clone() for tensor in TENSORS]
    copies = StagingMemory(None).copies(originals)
    for original in originals:
        original.zero_()
    for copy, tensor in zip(copies, TENSORS, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_memory_is_taken_once() -> None:
    memory = StagingMemory(None)
    memory.reserve(bytes_for(TENSORS))
    before = memory.copies(TENSORS)[0].data_ptr()
    assert memory.copies(TENSORS[:3])[0].data_ptr() == before
    assert memory.copies(TENSORS)[0].data_ptr() == before


def test_more_than_was_reserved_is_copied_as_well() -> None:
    memory = StagingMemory(None)
    memory.reserve(1)
    for copy, tensor in zip(memory.copies(TENSORS), TENSORS, strict=True):
        assert torch.equal(copy, tensor)


def test_a_copy_alone_is_what_is_written() -> None:
    large = torch.randn(100_000)
    _, copy = StagingMemory(None).copies([large, torch.randn(10)])
    file = io.BytesIO()
    torch.save(copy, file)
    assert len(file.getvalue()) < 4096


def test_page_locked_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Runtime:
        @staticmethod
        def cudaHostRegister(pointer: int, size: int, flags: int) -> int:
            calls.append("locked")
            return 0

        @staticmethod
        def cudaHostUnregister(pointer: int) -> int:
            calls.append("unlocked")
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    memory = StagingMemory(torch.device("cuda", 1))
    memory.reserve(64)
    memory.reserve(64)
    copies = memory.copies(TENSORS)
    assert calls == ["locked", "unlocked", "locked"]
    del memory
    assert calls.count("unlocked") == 1, "copies are still there"
    del copies
    assert calls.count("unlocked") == 2
