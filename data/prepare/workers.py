"""Encode units in this process or in several others (worker.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

from data.errors import DataError
from data.prepare.encode import encode_unit
from data.prepare.plan import Plan
from data.prepare.progress import Progress, UnitProgress
from data.processes import start_worker
from data.tokenizer import Tokenizer


def encode_here(plan: Plan, numbers: Iterable[int], work: Path, tokenizer: Tokenizer, progress: Progress) -> None:
    """Encode units in this process, on all cores.

    Raises:
        DataError: as `encode_unit`.
    """
    for number in numbers:
        unit = UnitProgress(progress, plan.units[number].num_bytes)
        encode_unit(plan, number, tokenizer, work, unit.report)
        unit.finish()


def encode_in_workers(plan: Plan, numbers: Iterable[int], work: Path, workers: int, progress: Progress) -> None:
    """Encode units in `workers` processes that find plan and tokenizer in `work`. On an error all of them end.

    Raises:
        DataError: what the first failing worker said, or that it died.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in numbers:
        waiting.put(number)
    pool = [_Worker(work) for _ in range(workers)]

    def serve(worker: _Worker) -> None:
        while (number := _next(waiting)) is not None:
            worker.encode(plan, number, progress)

    with ThreadPoolExecutor(workers) as threads:
        results = [threads.submit(serve, worker) for worker in pool]
        try:
            for result in as_completed(results):
                result.result()
        except BaseException:
            while _next(waiting) is not None:
                pass
            for worker in pool:
                worker.kill()
            raise
        finally:
            wait(results)
            for worker in pool:
                worker.close()


def _next(waiting: SimpleQueue[int]) -> int | None:
    try:
        return waiting.get_nowait()
    except Empty:
        return None


class _Worker:
    def __init__(self, work: Path) -> None:
        self._process = start_worker("-m", "data.prepare.worker", str(work), text=True, encoding="utf-8")

    def encode(self, plan: Plan, number: int, progress: Progress) -> None:
        """Have unit `number` encoded. DataError: the worker says why not, or ends."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        unit = UnitProgress(progress, plan.units[number].num_bytes)
        with suppress(OSError):  # it has died: its output ends, and the error is raised below
            stdin.write(f"{number}\n")
            stdin.flush()
        for line in stdout:
            answer = json.loads(line)
            if "error" in answer:
                raise DataError(answer["error"])
            if "finished" in answer:
                unit.finish()
                return
            unit.report(answer["bytes"], answer["tokens"])
        code = self._process.wait()
        cause = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        url = plan.units[number].unit.file.url
        raise DataError(f"{url}: the worker that read it {cause}; fewer --workers need less memory")

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        self._process.wait()
