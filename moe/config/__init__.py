"""Configuration: the typed schema of `conf/`, its checks, and the model's own arithmetic (parameters, FLOPs)."""

from moe.config.errors import ConfigError
from moe.config.load import compose, difference, explain, from_hydra, load_config, recipe, register_schema, run_id
from moe.config.model import ArchitectureConfig, ModelConfig
from moe.config.schema import Config

__all__ = [
    "ArchitectureConfig",
    "Config",
    "ConfigError",
    "ModelConfig",
    "compose",
    "difference",
    "explain",
    "from_hydra",
    "load_config",
    "recipe",
    "register_schema",
    "run_id",
]
