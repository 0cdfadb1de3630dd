"""A worker process, `python -m data.prepare.worker WORK_FOLDER`: it is told unit numbers on stdin and encodes them.

It answers every line with lines of JSON: bytes and tokens made so far, then `finished` or `error`. When its parent
dies, by whatever cause, its stdin closes and it ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import deque
from pathlib import Path

from data.errors import DataError, complaint, run_command
from data.manifest import TOKENIZER
from data.prepare.encode import encode_unit
from data.prepare.plan import Plan, read_plan
from data.tokenizer import Tokenizer


def _serve(work: Path) -> None:
    plan = read_plan(work)
    tokenizer = Tokenizer.load(work / TOKENIZER)
    if tokenizer.digest != plan.tokenizer_xxh3:
        raise DataError(f"{work / TOKENIZER}: has changed since the work began")
    numbers: deque[int] = deque()
    arrived = threading.Condition()

    def listen() -> None:
        """Take numbers from stdin; its end means that nobody waits for an answer any more."""
        for line in sys.stdin:
            with arrived:
                numbers.append(int(line))
                arrived.notify()
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        with arrived:
            arrived.wait_for(lambda: bool(numbers))
            number = numbers.popleft()
        _answer(plan, number, tokenizer, work)


def _answer(plan: Plan, number: int, tokenizer: Tokenizer, work: Path) -> None:
    def say(**answer: object) -> None:
        print(json.dumps(answer), flush=True)

    def encode() -> None:
        encode_unit(plan, number, tokenizer, work, lambda num_bytes, tokens: say(bytes=num_bytes, tokens=tokens))
        say(finished=number)

    try:
        encode()
    except (DataError, OSError) as error:
        say(error=complaint(error))


if __name__ == "__main__":
    sys.exit(run_command(lambda: _serve(Path(sys.argv[1]))))
