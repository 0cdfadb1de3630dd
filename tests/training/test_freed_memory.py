"""On a CPU a run keeps the memory that a step frees."""

from __future__ import annotations

import subprocess
import sys

import pytest

KEPT = """
import resource
import torch
from moe.training import keep_freed_memory

def resident() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

{setting}
pieces = [torch.ones(2**21) for _ in range(16)]  # 8 MiB each
before = resident()
del pieces
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize(("setting", "is_kept"), [("keep_freed_memory()", True), ("", False)])
def test_freed_memory_stays_with_the_process(setting: str, is_kept: bool) -> None:
    script = [sys.executable, "-c", KEPT.format(setting=setting)]
    freed = float(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    assert (freed < 16) == is_kept
    assert freed > 100 or is_kept
