"""A worker process: deals some streams of a corpus, turn after turn, to its stdout.

Its first line of stdin is the job. Stdin stays open as long as the parent lives; when it closes, the worker ends, so
none outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from typing import Any, BinaryIO

from data.errors import DataError, complaint
from data.order import Stage
from data.spec import StreamSpec
from data.text.corpus import TextCorpus
from data.text.cursor import unpack_cursors
from data.text.deal import Dealer
from data.text.messages import BAD_ROW, ERROR, FILE, TURN, pack_turn, send
from data.text.reader import Reader


def _dealer(job: Mapping[str, Any], out: BinaryIO) -> Dealer:
    corpus = TextCorpus.from_json(job["corpus"])
    stages = tuple(
        Stage(start, {name: Fraction(share) for name, share in weights.items()}) for start, weights in job["stages"]
    )
    ranges = tuple((first, end) for first, end in job["spec"].pop("skip_ranges"))
    spec = StreamSpec(stages=stages, skip_ranges=ranges, **job["spec"])
    reader = Reader(
        corpus,
        on_file=lambda url: send(out, FILE, url.encode()),
        on_bad_row=lambda row: send(out, BAD_ROW, json.dumps(asdict(row)).encode()),
    )
    cursors = unpack_cursors(job["cursors"], len(job["streams"]), len(corpus.sources))
    return Dealer(corpus, spec, job["streams"], cursors, job["turn"], reader)


def _end_with_parent() -> None:
    while sys.stdin.buffer.read(1 << 16):
        pass
    os._exit(0)


def main() -> None:
    """Serve turns until the parent has gone."""
    job = json.loads(sys.stdin.buffer.readline() or b"null")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out = sys.stdout.buffer
    try:
        dealer = _dealer(job, out)
        while True:
            send(out, TURN, pack_turn(dealer.next_turn()))
    except BrokenPipeError:
        os._exit(0)
    except (DataError, OSError) as error:
        send(out, ERROR, complaint(error).encode())
