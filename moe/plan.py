"""What a run costs, before it runs and without a GPU: memory, traffic and time of a rank, and which layout is fastest.

Takes the overrides of train.py, and how many GPUs of what kind:

    python -m moe.plan +experiment=moe_145b gpus=512
    python -m moe.plan +experiment=moe_2b gpus=8 gpu=h200 parallel.expert=8 train.micro_batch_size=8
    python -m moe.plan +experiment=moe_16b gpus=64 gpus_per_node=8 --json --picture plan.svg

What the command line leaves open (degrees, micro-batch, recomputation, resharding) is chosen: the fastest that fits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe.config import ConfigError, compose
from moe.config.errors import choice, require
from moe.hardware import GPUS
from moe.planning.fake import weight_bytes
from moe.planning.picture import draw
from moe.planning.search import Candidate, ranked
from moe.planning.speed import Cluster
from moe.planning.table import lines
from moe.planning.traffic import step_traffic

EXIT_NOTHING_FITS = 1
EXIT_CONFIG_ERROR = 78
MOST_GPUS = 8192
SECONDS_A_DAY = 86_400
OWN_KEYS = {"gpus": "1", "gpu": "h100", "gpus_per_node": "8"}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        facts = plan(options.overrides)
        if options.picture:
            _write(options.picture, draw(facts))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG_ERROR
    print(json.dumps(facts, indent=1) if options.json else "\n".join(lines(facts)))
    return 0 if facts["best"]["fits"] else EXIT_NOTHING_FITS


def plan(overrides: Sequence[str]) -> dict[str, Any]:
    """Everything about the fastest layout that fits, or else the leanest, and in short about the others.

    Raises:
        ConfigError: a key or value that is not allowed, or that no layout can meet.
    """
    own, overrides = _split(overrides)
    config = compose(overrides)
    fixed = {text.partition("=")[0].lstrip("+") for text in overrides}
    gpus = _count("gpus", own["gpus"], MOST_GPUS)
    choice("gpu", own["gpu"], GPUS)
    cluster = Cluster(GPUS[own["gpu"]], _count("gpus_per_node", own["gpus_per_node"], MOST_GPUS))
    candidates = ranked(config, fixed, gpus, cluster)
    best = candidates[0]
    chosen = {text.partition("=")[0] for text in best.overrides()}
    model, train = config.model.build(), config.train
    flops = model.flops_per_token(config.data.seq_len)
    real = weight_bytes(model, best.layout, best.config.runtime)
    if real != best.memory.state["master weights"]:
        raise RuntimeError("the formula of moe.planning.shards is not what is built")
    return {
        "name": config.name,
        "asked": [text for text in overrides if text.partition("=")[0] not in chosen],
        "gpus": gpus,
        "gpu": cluster.gpu._asdict(),
        "gpus_per_node": cluster.gpus_per_node,
        "compute_dtype": train.compute_dtype,
        "seq_len": config.data.seq_len,
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "flops_per_token": flops,
        "flops_per_sequence": flops * config.data.seq_len,
        "tokens": train.steps * train.global_batch_size * config.data.seq_len,
        "days": train.steps * best.step_seconds / SECONDS_A_DAY,
        "steps": train.steps,
        "best": _details(best, cluster, flops),
        "ranking": [_summary(candidate, cluster, flops) for candidate in candidates],
    }


def _summary(candidate: Candidate, cluster: Cluster, flops_per_token: float) -> dict[str, Any]:
    tokens = candidate.config.train.global_batch_size * candidate.step.seq_len
    rate = tokens / candidate.step_seconds / candidate.layout.world_size
    return {
        "layout": str(candidate.layout),
        "overrides": candidate.overrides(),
        "fits": candidate.fits(cluster),
        "peak_bytes": candidate.memory.peak,
        "step_seconds": candidate.step_seconds,
        "tokens_per_second_per_gpu": rate,
        "mfu": rate * flops_per_token / (cluster.gpu.peak_tflops * 1e12),
    }


def _details(candidate: Candidate, cluster: Cluster, flops_per_token: float) -> dict[str, Any]:
    memory, step = candidate.memory, candidate.step
    model = candidate.config.model.build()
    traffic = step_traffic(model, candidate.layout, step)
    return _summary(candidate, cluster, flops_per_token) | {
        "step": step._asdict(),
        "memory_bytes": {
            "state": memory.state,
            "pass": memory.pass_,
            "workspace": memory.workspace,
            "gradients": memory.gradients,
        },
        "seconds": candidate.seconds,
        "traffic": [term._asdict() | {"wire_bytes": term.wire_bytes} for term in traffic],
    }


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This command's own keys, and train.py's."""
    own, overrides = dict(OWN_KEYS), []
    for text in arguments:
        key, _, value = text.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(text)
    return own, overrides


def _count(key: str, text: str, most: int) -> int:
    require(text.isdecimal() and 1 <= int(text) <= most, key, f"a number between 1 and {most}", text)
    return int(text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--picture {path}: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", help=f"as for train.py; also gpus=N, gpus_per_node=N, gpu={'|'.join(GPUS)}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes, seconds")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw memory and time of the best layout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
