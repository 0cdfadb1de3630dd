"""Composing the repository's own `conf/` in-process, as `train.py` does."""

from __future__ import annotations

import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from moe.config import Config, ConfigError, explain, from_hydra, register_schema

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
RUNGS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
VARIANTS = sorted(path.stem for path in (CONF / "variant").glob("*.yaml"))
SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


@functools.cache
def composed(*overrides: str) -> Config:
    """The checked configuration of these command-line overrides, not to be changed. Raises ConfigError."""
    register_schema()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return from_hydra(compose("config", list(overrides)))
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(explain(error)) from error
