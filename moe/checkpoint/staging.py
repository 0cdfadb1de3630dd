"""Where the tensors of a save are copied to, so that training goes on while they are written."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


class StagingMemory:
    """CPU memory that all saves of a run copy to, page-locked for copies from a GPU.

    It is taken once: a GiB takes a third of a second to page in and lock, and a fiftieth to copy. torch's own
    page-locked memory takes a second, and is rounded up to a power of two for each tensor.

    Args:
        device: the GPU that copies to it; None: there is none.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._memory = np.empty(0, np.uint8)
        self._lock = threading.Lock()

    def reserve(self, size: int) -> None:
        """Have at least `size` bytes (see `bytes_for`); can run beside the training."""
        with self._lock:
            if size <= len(self._memory):
                return
            self._memory = np.empty(size, np.uint8)
            if self._device is not None:
                torch.from_numpy(self._memory).fill_(0)  # by all threads; locking would page it in with one
                _page_lock(self._memory, self._device)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Complete copies, in the same memory as those of the last call."""
        self.reserve(bytes_for(tensors))
        start, copies = 0, []
        for tensor in tensors:
            # a storage of its own, without which torch.save would write the whole memory
            piece = torch.from_numpy(self._memory[start : start + tensor.nbytes])
            copies.append(piece.view(tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True))
            start += _padded(tensor)
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return copies


def bytes_for(tensors: Sequence[Tensor]) -> int:
    """What copies of them take."""
    return sum(map(_padded, tensors))


def _padded(tensor: Tensor) -> int:
    """Bytes from the start of one copy to that of the next."""
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _page_lock(memory: np.ndarray, device: torch.device) -> None:
    """Until the memory is freed, copies in it included. Where the system refuses, copies only take longer."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):  # a thread begins with the first GPU
        if int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data).atexit = False
            return
        with suppress(RuntimeError):  # CUDA reports the refusal once more, to whoever launches next
            torch.zeros(1, device=device)
