"""A gloo world of a single process for the tests of a file; left again, since other tests start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe.parallel import World, join_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with join_world("cpu") as world:
        yield world
