"""Where the tensors of a save are copied to, so that training goes on while they are written."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64


class StagingMemory:
    """CPU memory that all saves of a run copy to, page-locked for copies from a GPU.

    It is taken once: a GiB takes a second to page in and lock, and a fiftieth to copy. torch's own page-locked memory
    would be rounded up to a power of two for each tensor.

    Args:
        device: the GPU that copies to it; None: there is none.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()

    def reserve(self, size: int) -> None:
        """Have `size` bytes (see `bytes_for`); can run beside the training. Copies are lost if there were fewer."""
        with self._lock:
            if size <= len(self._memory):
                return
            self._release()
            self._memory = torch.empty(size, dtype=torch.uint8)
            if self._device is not None:
                self._memory.fill_(0)  # by all threads; locking would page it in with one
                _page_lock(self._memory, self._device)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Complete copies, in the same memory as those of the last call."""
        self.reserve(bytes_for(tensors))
        memory, start, copies = self._memory.numpy(), 0, []
        for tensor in tensors:
            # a storage of its own, without which torch.save would write the whole memory
            piece = torch.from_numpy(memory[start : start + tensor.nbytes])
            copies.append(piece.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True))
            start += _padded(tensor)
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return copies

    def _release(self) -> None:
        if self._device is not None and len(self._memory):
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())


def bytes_for(tensors: Sequence[Tensor]) -> int:
    """What copies of them take."""
    return sum(map(_padded, tensors))


def _padded(tensor: Tensor) -> int:
    """Bytes from the start of one copy to that of the next."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _page_lock(memory: Tensor, device: torch.device) -> None:
    """Where the system refuses, copies only take longer."""
    with torch.cuda.device(device):  # a thread begins with the first GPU
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
            return
        with suppress(RuntimeError):  # CUDA reports the refusal once more, to whoever launches next
            torch.zeros(1, device=device)
