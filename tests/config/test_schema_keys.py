"""No key without code behind it."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
from config_helpers import REPOSITORY

from data.sources.spec import SourceSpec
from moe.config.load import all_keys
from moe.config.schema import SourceConfig

SOURCES = [REPOSITORY / "train.py", *(REPOSITORY / "moe").rglob("*.py"), *(REPOSITORY / "data").rglob("*.py")]
# declaring a key and checking that its value is possible are no use of it
NO_USE = {REPOSITORY / "moe" / "config" / name for name in ("schema.py", "validate.py")}


def names_read(path: Path) -> set[str]:
    """Every attribute that a file reads, and every key it takes from a mapping."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(node, "ctx")]
    loads = [node for node in nodes if isinstance(node.ctx, ast.Load)]
    keys = {
        node.slice.value for node in loads if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    return keys | {node.attr for node in loads if isinstance(node, ast.Attribute)}


@pytest.fixture(scope="module")
def all_names_read() -> set[str]:
    return set().union(*(names_read(path) for path in SOURCES if path not in NO_USE))


def leaves() -> list[str]:
    keys = all_keys()
    return [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]


@pytest.mark.parametrize("key", leaves())
def test_every_key_is_read_by_code(key: str, all_names_read: set[str]) -> None:
    assert key.rsplit(".", 1)[-1] in all_names_read


def test_a_source_is_declared_alike_for_configurations_and_commands() -> None:
    declared, known = ({field.name: field.default for field in fields(kind)} for kind in (SourceConfig, SourceSpec))
    required = {"name", "path", "storage_options"}
    assert set(known) == {"name", *declared}
    assert {name: known[name] for name in declared if name not in required} == {
        name: value for name, value in declared.items() if name not in required
    }


def test_the_search_sees_what_is_missing(all_names_read: set[str]) -> None:
    assert "hidden_size" in all_names_read
    assert "momentum" not in all_names_read
