"""Command line: `python -m data.tokenizer train ...` and `python -m data.tokenizer inspect ...`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from data.documents import read_jsonl
from data.errors import run_command
from data.tokenizer import Tokenizer
from data.tokenizer.train import train_tokenizer


def main() -> int:
    arguments = _parser().parse_args()
    return run_command(lambda: _train(arguments) if arguments.command == "train" else _inspect(arguments))


def describe(tokenizer: Tokenizer, sources: list[Path]) -> dict[str, object]:
    """Facts about a tokenizer, and the bytes of text one of its tokens stands for in every language of `sources`."""
    text_bytes: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for document in (document for source in sources for document in read_jsonl(source)):
        text_bytes[document.language] += document.num_bytes
        tokens[document.language] += len(tokenizer.encode(document.text))
    return {
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "digest": tokenizer.digest,
        "longest_token_bytes": int(tokenizer.byte_lengths().max()),
        "bytes_per_token": {language: round(text_bytes[language] / tokens[language], 3) for language in sorted(tokens)},
    }


def _train(arguments: argparse.Namespace) -> None:
    out = train_tokenizer(arguments.source, arguments.vocab_size, arguments.out)
    print(f"{out}: {Tokenizer.load(out).vocab_size} entries")


def _inspect(arguments: argparse.Namespace) -> None:
    facts = describe(Tokenizer.load(arguments.file), arguments.source)
    if arguments.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:<20} {value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data.tokenizer", description="Train or describe a tokenizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a byte-level BPE on the training split of JSON Lines files")
    train.add_argument("--source", type=Path, action="append", required=True, help="JSON Lines file; may be repeated")
    train.add_argument("--vocab-size", type=int, required=True, help="entries, BOS and EOS included")
    train.add_argument("--out", type=Path, required=True, help="tokenizer.json to write")
    inspect = commands.add_parser("inspect", help="print facts about a tokenizer.json")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--source", type=Path, action="append", default=[], help="text to measure bytes per token on")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
