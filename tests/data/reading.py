"""A process that reads training data as a run does: `python -m tests.data.reading MODE FOLDER STEPS`.

It goes on from `FOLDER/state.json`, prints a line for every step, saves its state behind it, and waits for the end of
its stdin when it is through. Tests watch it, and kill it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data import Batch, StreamSpec, TokenCorpus, TokenStream, TrainLoader
from data.sources import SourceSpec
from data.text.corpus import TextCorpus
from data.text.loader import TextLoader
from data.text.stream import TextStream
from tests.data.conftest import SOURCES, TOKENIZER

MODES = ("tokens", "text")
SIZE = 16
SEQ_LEN = 64
WEIGHTS = {"en": "0.6", "zh": "0.4"}
STATE, CORPUS, CACHE = "state.json", "corpus", "cache"


def open_loader(mode: str, folder: Path, workers: int) -> TrainLoader | TextLoader:
    """A loader of the corpus prepared in `folder`, or of the bundled sources, with two micro-batches a step."""
    spec = StreamSpec.single_stage(SEQ_LEN, WEIGHTS, seed=7)
    if mode == "tokens":
        return TrainLoader(TokenStream(TokenCorpus.open(folder / CORPUS), spec), SIZE, SIZE // 2, workers=workers)
    sources = [SourceSpec(path.stem, str(path), language=path.stem) for path in SOURCES]
    corpus = TextCorpus.open(sources, TOKENIZER, streams=SIZE, cache_dir=folder / CACHE)
    return TextLoader(TextStream(corpus, spec), SIZE, SIZE // 2, workers=workers)


def digest(batches: Sequence[Batch]) -> str:
    """Of all that a step feeds the model."""
    found = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.labels, batch.document_starts, batch.row_sources):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    mode, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    state, scratch = folder / STATE, folder / "state.tmp"
    loader = open_loader(mode, folder, workers=2)
    if state.exists():
        loader.load_state_dict(json.loads(state.read_bytes()))
    for step in range(loader.state_dict()["consumed"] // SIZE, steps):  # type: ignore[operator]
        print(step, digest(next(loader)), flush=True)
        scratch.write_text(json.dumps(loader.state_dict()))
        os.replace(scratch, state)
    sys.stdin.read()
    loader.close()


if __name__ == "__main__":
    main()
