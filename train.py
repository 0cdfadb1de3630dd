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
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from moe.config import ConfigError, explain, from_hydra, register_schema

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own page-long complaint


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(composed: DictConfig) -> None:
    try:
        config = from_hydra(composed)
    except ConfigError as error:
        fail(str(error))
    from moe.training import run  # torch only loads for a configuration that can run

    run(config, command=["train.py", *sys.argv[1:]])


def main() -> None:
    register_schema()
    try:
        compose()
    except (HydraException, OmegaConfBaseException) as error:
        fail(explain(error))


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(78)


if __name__ == "__main__":
    main()
