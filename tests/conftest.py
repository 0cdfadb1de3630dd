from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# one thread for each process of the tests and those that they start: `make test` runs files beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORLDS = {"parallel", "checkpoint"}
"""Folders whose tests start several processes, which need the cores for themselves."""

# the same examples on every CI run: a change is judged by what it changed; developers' runs keep searching
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


class FilesAndWorlds(LoadScopeScheduling):
    """Whichever worker is free takes the next file, but one of them has all worlds, so that two never run at once."""

    def _split_scope(self, nodeid: str) -> str:
        file = PurePath(nodeid.partition("::")[0])
        return "worlds" if file.parent.name in WORLDS else str(file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesAndWorlds:
    return FilesAndWorlds(config, log)


@pytest.fixture
def products_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of half precision stay in half precision, which CPUs otherwise avoid."""
    from moe.kernels import experts, halves

    monkeypatch.setattr(experts, "_is_prepared_anew", lambda x: False)
    monkeypatch.setattr(halves, "_multiplies_halves", lambda: True)
