"""Train a DeepSeekMoE: compose the configuration, run it.

    python train.py                                                    moe_tiny on the bundled corpus
    python train.py +experiment=moe_100m train.seed=1                  another rung, any key overridden
    python train.py -m +sweep=granularity                              one run after another
    torchrun --nproc_per_node=8 train.py +experiment=moe_2b            the same program on eight GPUs

Exit codes: 0 done, 75 stopped by a signal after saving (run it again to go on), 76 numerical abort, 77 bad data or
checkpoint, 78 bad configuration.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moe.config import ConfigError, explain, from_hydra, register_schema

EXIT_PREEMPTED = 75
os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own page-long complaint


class RunFailed(Exception):
    """One run of a sweep failed; Hydra goes on with the others and raises this at the end."""


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(composed: DictConfig) -> None:
    sweep = HydraConfig.get() if HydraConfig.get().mode == RunMode.MULTIRUN else None
    if sweep:
        Path(sweep.sweep.dir, "multirun.yaml").unlink(missing_ok=True)  # Hydra's copy of the overrides, secrets and all
    try:
        train(composed)
    except SystemExit as end:
        if sweep and end.code != EXIT_PREEMPTED:
            raise RunFailed(end.code) from None
        raise


def train(composed: DictConfig) -> None:
    try:
        config = from_hydra(composed)
    except ConfigError as error:
        fail(str(error))
    from moe.training import run  # torch only loads for a configuration that can run

    run(config, command=["train.py", *HydraConfig.get().overrides.task])


def main() -> None:
    register_schema()
    try:
        compose()
    except RunFailed as failure:
        sys.exit(failure.args[0])
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a group set to a scalar
        fail(explain(error))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(78)


if __name__ == "__main__":
    main()
