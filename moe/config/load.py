"""From Hydra's composition to a checked `Config`, and from a failed composition to one line."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config.errors import ConfigError, hide_environment
from moe.config.schema import Config, SourceConfig
from moe.config.validate import validate

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
_FREE_KEYS = ("data.sources.", "data.weights.", "telemetry.prompts.")
_ADDED_GROUPS = ("experiment", "variant", "sweep")
_LAYOUT_KEYS = ("micro_batch_size", "log_interval", "eval_interval")


def register_schema() -> None:
    """Make the typed schema the base of `conf/config.yaml`, so that Hydra refuses unknown keys and wrong types."""
    ConfigStore.instance().store(name="schema", node=Config)


def compose(overrides: Sequence[str]) -> Config:
    """The checked configuration that `train.py` would run with these overrides. Raises ConfigError with one line."""
    register_schema()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = hydra.compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error)) from error
    return from_hydra(composed)


def from_hydra(composed: DictConfig) -> Config:
    """The checked configuration. Raises ConfigError with one line."""
    try:
        _refuse_unknown_keys(composed)
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    assert isinstance(config, Config)
    config.data.sources = {name: _source(name, entry) for name, entry in config.data.sources.items()}
    validate(config)
    return config


def _source(name: str, entry: object) -> SourceConfig:
    """A source's entry with its types; OmegaConf refuses typed values in a mapping that the command line may add to."""
    try:
        typed = OmegaConf.merge(SourceConfig, {"path": entry} if isinstance(entry, str) else entry)
    except OmegaConfBaseException as error:
        raise ConfigError(f"data.sources.{name}: {explain(error)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.sources.{name} must be a path or a mapping, not {entry!r:.40}") from error
    if OmegaConf.is_missing(typed, "path"):
        raise ConfigError(f"data.sources.{name}.path is missing")
    source = OmegaConf.to_object(typed)
    assert isinstance(source, SourceConfig)
    return source


def _refuse_unknown_keys(composed: DictConfig) -> None:
    """A `+key=value` override slips past the schema; nothing would ever read it."""
    container = OmegaConf.to_container(composed)
    assert isinstance(container, dict)
    known = all_keys()
    for key in _dotted("", container):
        if key not in known and not key.startswith(_FREE_KEYS):
            raise ConfigError(_unknown_key(key))


def load_config(path: Path) -> Config:
    """The configuration that a run folder or a checkpoint keeps. Raises ConfigError naming the file."""
    try:
        composed = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; is this a run folder?") from None
    except Exception as error:
        raise ConfigError(f"{path}: {explain(error)}") from error
    assert isinstance(composed, DictConfig)
    return from_hydra(composed)


def recipe(config: Config, data: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """What defines a run's result: the network, the data and the recipe; not layout, backend or telemetry.

    `data` is what defines the order of the text: the digest of the text and the fields of its `StreamSpec`.
    One layout does: balance losses that pool a micro-batch over the ranks depend on how many sequences that is.
    """
    model = config.model.build()
    train: dict[str, Any] = {
        key: value for key, value in dataclasses.asdict(config.train).items() if key not in _LAYOUT_KEYS
    }
    if model.n_routed_experts and not model.seq_aux:
        train["pooled_sequences"] = config.train.micro_batch_size * world_size
    return {
        "model": dataclasses.asdict(model),
        "data": data,
        "optim": dataclasses.asdict(config.optim),
        "train": train,
    }


def run_id(recipe: dict[str, Any]) -> str:
    """Ten hex digits that name a `recipe`, the default name of a run's folder."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two nested dicts differ, as "optim.lr: 0.001 -> 0.002"."""
    changes = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key}: {before} -> {after}")
    return changes


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf complained of, as one line that names the key and, where it can, the nearest existing
    one."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in|Could not find '([^']+)'", text)
    if "Could not override" in text and unknown:
        return _unknown_key(unknown[1])
    if "Config group override must be" in text:
        return "a config group (model, data, optim, experiment, variant, sweep) takes the name of an option, not null"
    full_key = re.search(r"full_key: (\S+)", text)
    key = full_key[1] if full_key else None
    if key and "not in '" in text:
        return _unknown_key(key)
    text = re.sub(r"^Error merging override (\S+) ", r"\1: ", text)
    reason = re.split(r" full_key:| To append to your config| Set the environment| Available options", text)[0]
    options = re.search(r"Available options in '[^']+': (.*?)(?: Config search path|$)", text)
    if options:
        reason += f" Available: {', '.join(options[1].split())}"
    return hide_environment(f"{key}: {reason}" if key and key not in reason else reason)


def _unknown_key(key: str) -> str:
    if f"{key}." in _FREE_KEYS or key.startswith(_FREE_KEYS):
        return f"{key}: write a new entry as +{key.split('.')[0]}.{key.split('.')[1]}.NAME=VALUE"
    if key in _ADDED_GROUPS:
        return f"{key}: write it with a plus, as +{key}=NAME"
    near = _same_leaf(key) or difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.75)
    if near:
        return f"unknown key {key}: did you mean {near[0]}?"
    section = key.rpartition(".")[0]
    siblings = [known.split(".")[-1] for known in all_keys() if known.rpartition(".")[0] == section]
    is_short = section and 0 < len(siblings) <= 20
    hint = f"{section} has {', '.join(siblings)}; " if is_short else ""
    return f"unknown key {key}: {hint}`python train.py --cfg job` prints all keys"


def _same_leaf(key: str) -> list[str]:
    leaf = key.rsplit(".", 1)[-1]
    return [known for known in all_keys() if known.rsplit(".", 1)[-1] == leaf]


def all_keys() -> list[str]:
    """Every key of the schema, dotted."""
    container = OmegaConf.to_container(OmegaConf.structured(Config))
    assert isinstance(container, dict)
    return _dotted("", container)


def _dotted(prefix: str, node: dict[Any, Any]) -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(f"{prefix}{key}.", value)
    return keys
