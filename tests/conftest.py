from __future__ import annotations

import os

import pytest
from hypothesis import settings

# the same examples on every CI run: a change is judged by what it changed; developers' runs keep searching
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def products_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of half precision stay in half precision, which CPUs otherwise avoid."""
    from moe.kernels import experts, halves

    monkeypatch.setattr(experts, "_is_prepared_anew", lambda x: False)
    monkeypatch.setattr(halves, "_multiplies_halves", lambda: True)
