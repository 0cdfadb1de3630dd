"""One gloo world of a single process for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe.parallel import World, join_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    with join_world("cpu") as world:
        yield world
