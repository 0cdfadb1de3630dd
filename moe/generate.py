"""Continue prompts with a trained model, printing text as it comes.

The newest run, or a run folder; prompts as options, or one a line:

    python -m moe.generate --prompt "The old man" --prompt "他说" --temperature 0.7
    python -m moe.generate outputs/moe_tiny/1f0c5a2b3d --step 600 --greedy < prompts.txt
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data import Tokenizer
from data.errors import DataError, complaint
from moe.checkpoint import CheckpointError
from moe.config import ConfigError
from moe.config.errors import require
from moe.model.sampling import continuation
from moe.parallel import choose_device
from moe.trained import TrainedModel, load_trained, newest_run

EXIT_DATA_ERROR, EXIT_CONFIG_ERROR, EXIT_INTERRUPTED = 77, 78, 130
OUTPUTS = Path("outputs")
REPLACEMENT = "\ufffd"


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except ConfigError as error:
        return _fail(str(error), EXIT_CONFIG_ERROR)
    except (DataError, CheckpointError, OSError) as error:
        return _fail(complaint(error), EXIT_DATA_ERROR)
    return 0


def _run(options: argparse.Namespace) -> None:
    _check(options)
    for stream in (sys.stdout, sys.stdin):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "strict")
    run = options.run_folder or newest_run(OUTPUTS)
    trained = load_trained(run, options.step, choose_device(options.device), getattr(torch, options.dtype))
    print(f"{run}, step {trained.step}", file=sys.stderr)
    prompts = options.prompt or read_prompts()
    if options.json:
        completions = [_completion(trained, prompt, options) for prompt in prompts]
        print(json.dumps({"run": str(run), "step": trained.step, "completions": completions}, ensure_ascii=False))
        return
    for number, prompt in enumerate(prompts, start=1):
        if len(options.prompt) > 1:
            print(f"--- prompt {number} of {len(options.prompt)}")
        _print_completion(trained, prompt, options)


def read_prompts() -> Iterator[str]:
    """The lines of standard input, asked for one by one on a terminal."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def new_tokens(trained: TrainedModel, prompt: str, options: argparse.Namespace) -> Iterator[int]:
    """Ids that follow `prompt`, until the model ends the document or has no position left.

    Raises DataError when the prompt alone takes them all.
    """
    model, tokenizer = trained.model, trained.tokenizer
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # what Python makes of undecodable input
        raise DataError("prompt: is not valid UTF-8")
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    positions = model.config.max_position_embeddings
    if len(ids) >= positions:
        raise DataError(f"prompt of {len(ids)} tokens: it must leave one of the model's {positions} positions free")
    return continuation(
        model,
        ids,
        min(options.max_new_tokens, positions - len(ids)),
        temperature=0.0 if options.greedy else options.temperature,
        top_p=options.top_p,
        stop_id=tokenizer.eos_id,
        num_ids=tokenizer.vocab_size,
        seed=options.seed,
        compute_dtype=trained.dtype,
    )


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it becomes known. A character that spans tokens is held back until it is whole."""
    pending: list[int] = []
    shown = 0
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        whole = text.removesuffix(REPLACEMENT)  # one stands for an unfinished character, which is at the end
        yield whole[shown:]
        shown = len(whole)
        if len(whole) == len(text):
            pending, shown = [], 0
    yield tokenizer.decode(pending)[shown:]


def _print_completion(trained: TrainedModel, prompt: str, options: argparse.Namespace) -> None:
    ids = new_tokens(trained, prompt, options)
    print(prompt, end="", flush=True)
    for piece in stream_text(trained.tokenizer, ids):
        print(piece, end="", flush=True)
    print(flush=True)


def _completion(trained: TrainedModel, prompt: str, options: argparse.Namespace) -> dict[str, Any]:
    ids = list(new_tokens(trained, prompt, options))
    return {"prompt": prompt, "completion": trained.tokenizer.decode(ids), "tokens": len(ids)}


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _check(options: argparse.Namespace) -> None:
    require(options.step is None or options.step >= 0, "--step", "at least 0", options.step)
    require(options.max_new_tokens >= 1, "--max-new-tokens", "at least 1", options.max_new_tokens)
    require(0 <= options.temperature < math.inf, "--temperature", "at least 0 and finite", options.temperature)
    require(0 < options.top_p <= 1, "--top-p", "above 0 and at most 1", options.top_p)
    require(0 <= options.seed < 2**63, "--seed", "between 0 and 2^63 - 1", options.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_folder", type=Path, nargs="?", help="outputs/<experiment>/<run> (default: the newest)")
    parser.add_argument("--prompt", action="append", default=[], help="repeatable (default: lines of standard input)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest intact one)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default 100")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what it computes in")
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
