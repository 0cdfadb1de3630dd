"""Triton decides at import whether it interprets, so the kernels' tests have a process of their own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.metadata.version("triton").startswith("3.6."),
    reason="needs a Triton whose interpreter runs on today's numpy (3.7)",
)


def test_triton_kernels_in_the_interpreter() -> None:
    tests = Path(__file__).parents[1]
    files = ["kernels/interpreted_kernels.py", "parallel/interpreted_sums.py", "parallel/interpreted_optimizer.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(tests / file) for file in files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert "passed" in finished.stdout
