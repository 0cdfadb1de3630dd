from __future__ import annotations

import os

import pytest
from hypothesis import settings

# one thread for each process of the tests and those that they start: `make test` runs files beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORLDS = {"parallel", "checkpoint"}
"""Folders whose tests start several processes, which need the cores for themselves."""

# the same examples on every CI run: a change is judged by what it changed; developers' runs keep searching
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run beside each other, one of the workers has all worlds, so that two of them never do."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("worlds" if folder in WORLDS else item.path.stem))


@pytest.fixture
def products_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of half precision stay in half precision, which CPUs otherwise avoid."""
    from moe.kernels import experts, halves

    monkeypatch.setattr(experts, "_is_prepared_anew", lambda x: False)
    monkeypatch.setattr(halves, "_multiplies_halves", lambda: True)
