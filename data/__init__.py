"""From text to batches.

    en.jsonl, zh.jsonl ...                 documents.py   rows of text, language, source; bad rows are named
          |
          |   split.py                     whole documents held out by a hash of their text
          |   tokenizer/                   byte-level BPE, trained on the training split alone
          v
    prepare.py  ->  corpus folder          manifest.py    tokens, document ends, tokenizer, digests, xz baselines
          |
          |   shards.py                    TokenCorpus: checked, memory-mapped
          v
    stream[g]                              stream.py      the g-th training sequence, a pure function of (spec, seed, g)
          |                                order.py       which language, which row: exact mixture, permutation
          v
    TrainLoader                            loader.py      this rank's slice of every global batch, one integer of state
          |
          v
    Batch                                  batch.py       ids, labels, languages, document starts as tensors

Nothing here knows of the model. `data.prepare.prepare_cached` makes or finds the corpus of a run. The commands
are `python -m data.tokenizer`, `python -m data.prepare` and `python -m data.inspect`.
"""

from data.batch import IGNORE_INDEX, Batch, Row
from data.documents import Document, read_jsonl
from data.errors import EXIT_DATA_ERROR, DataError
from data.loader import TrainLoader, validation_batches
from data.order import Mixture
from data.shards import TokenCorpus
from data.stream import StreamSpec, TokenStream
from data.tokenizer import Tokenizer

__all__ = [
    "EXIT_DATA_ERROR",
    "IGNORE_INDEX",
    "Batch",
    "DataError",
    "Document",
    "Mixture",
    "Row",
    "StreamSpec",
    "TokenCorpus",
    "TokenStream",
    "Tokenizer",
    "TrainLoader",
    "read_jsonl",
    "validation_batches",
]
