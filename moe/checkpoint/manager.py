"""Saves and loads the checkpoints of one run: complete and verified, or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from moe.checkpoint.coordinator import Coordinator, describe, nothing
from moe.checkpoint.folders import CheckpointFolder
from moe.checkpoint.manifest import MANIFEST_NAME, CheckpointError, FileRecord, Manifest, verify_listing
from moe.checkpoint.reading import TRAIN_STATE_NAME, load_tensors, read_train_state, verify_folder
from moe.checkpoint.staging import StagingMemory, bytes_for
from moe.checkpoint.writing import ShardWriter, StagingPlanner

logger = logging.getLogger(__name__)

Written = tuple[list[WriteResult], dict[str, FileRecord]]


@dataclass
class _Flight:
    """A save between its planning and its commit."""

    step: int
    train_state: bytes = b""
    planner: StagingPlanner = field(default_factory=StagingPlanner)
    writer: ShardWriter = field(init=False)
    written: Future[Written] = field(default_factory=Future)


class CheckpointManager:
    """The checkpoints of one run in `folder`, as `step-00000100/`.

    A save plans and stages on the calling thread, writes to a temporary folder (in the background if `asynchronous`)
    and is committed by one rename in `poll`, `wait` or the next `save`. All methods are collective: every rank of
    `process_group` calls them in the same order on its main thread.

    Args:
        folder: shared by all ranks; created by the first save, which also clears what a killed run left in it.
        keep_last: how many of the newest steps are kept.
        keep_every: steps that are multiples of it are kept for ever (0: none).
        asynchronous: write in the background; otherwise `save` returns when the checkpoint is committed.
        process_group: the ranks that save together (default: all); one that moves only CUDA tensors is replaced by a
            gloo group of the same ranks.
        device: the GPU that the tensors are on, if they are on one.

    Raises:
        ValueError: `keep_last` below 1 or `keep_every` below 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
        asynchronous: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        if keep_last < 1 or keep_every < 0:
            raise ValueError(f"keep_last={keep_last}, keep_every={keep_every}: at least 1 and 0 are needed")
        self.failed_saves = 0
        self.newest_sound: int | None = None
        """The step last committed or loaded by this manager: known to be good, whatever else lies in the folder."""
        self._folder = CheckpointFolder(Path(folder))
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._coordinator = Coordinator(process_group)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._staging = StagingMemory(device if device is not None and device.type == "cuda" else None)
        self._flight: _Flight | None = None
        self._sweep: Future[None] | None = None
        self._broken: set[int] = set()

    def prepare(self, tensors: dict[str, Any]) -> None:
        """Take the memory that saves of `tensors` will copy to, in the background; without it the first save does."""
        planner = StagingPlanner()
        plan = self._coordinator.exchange(
            lambda: planner.local_plan(tensors, self._is_first), lambda plans: planner.create_global_plan(plans)[0]
        )
        self._worker.submit(self._staging.reserve, bytes_for(planner.originals(plan)))

    def save(self, step: int, tensors: dict[str, Any], train_state: dict[str, Any]) -> None:
        """Save a nested dict of tensors and DTensors, and a JSON object, as `step`.

        The tensors may be changed as soon as it returns. A save that the storage refuses is reported by a warning and
        counted in `failed_saves`; it leaves older checkpoints alone.

        Raises:
            CheckpointError: on all ranks, if a value is not a tensor or `train_state` is not JSON.
        """
        self.wait()
        flight, plan = self._plan(step, tensors, train_state)
        try:
            flight.planner.stage(plan, self._staging)
            flight.written = self._worker.submit(flight.writer.write_shard, plan, flight.planner)
        except Exception as error:  # The other ranks are on their way to the commit: it has to fail there, on all.
            flight.written.set_exception(error)
        self._flight = flight
        if not self._asynchronous:
            self.wait()

    def poll(self) -> None:
        """Commit the save in flight if all ranks have written it; call it once a step."""
        if self._flight and self._coordinator.all(self._flight.written.done()):
            self._land(self._flight)

    def wait(self) -> None:
        """Block until the save in flight, if any, is committed or has failed, and deleting has ended."""
        if self._flight:
            self._land(self._flight)
        if self._sweep:
            self._sweep.result()
            self._sweep = None

    def steps(self) -> list[int]:
        """The committed steps in ascending order, intact or not."""
        return list(self._steps())

    def verify(self, step: int) -> None:
        """Read the whole checkpoint of `step`, each rank its share.

        Raises:
            CheckpointError: on all ranks, if it does not exist or is not intact; it names the file and the reason.
        """
        folder = self._steps().get(step)
        if folder is None:
            held = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"step {step}: no such checkpoint in {self._folder.path}; there are: {held}")
        share = self._coordinator.rank, self._coordinator.world_size
        try:
            self._coordinator.exchange(lambda: verify_folder(folder, step, *share), nothing)
        except CheckpointError as error:
            raise CheckpointError(f"{folder.name}: {error}") from None

    def latest_intact(self) -> int | None:
        """The newest step that passes `verify`; None if there is none."""
        return self._newest_intact(self.steps())[0]

    def load(
        self,
        tensors: dict[str, Any],
        step: int | None = None,
        *,
        partial: bool = False,
        check: Callable[[dict[str, Any]], None] = lambda train_state: None,
    ) -> dict[str, Any] | None:
        """Fill `tensors` in place from the newest intact checkpoint, or from `step`; any number of ranks may load.

        `partial` reads only the top-level parts that `tensors` has, each of them whole: {"model": ...} to use a model.
        `check` gets the `train_state` first and may raise, the same on every rank; nothing is filled then.

        Returns:
            The `train_state` saved with it and its "step"; None if there is no checkpoint at all.

        Raises:
            CheckpointError: on all ranks, if checkpoints exist but none is intact, if `step` is not intact, or if keys,
                shapes or dtypes differ from the saved ones (`tensors` may then be partly filled).
        """
        self.wait()
        candidates = self.steps() if step is None else [step]
        chosen, reason = self._newest_intact(candidates)
        if chosen is not None:
            return self._read(chosen, tensors, partial, check)
        if reason:
            others = "" if len(candidates) == 1 else f" (none of {len(candidates)} checkpoints is intact)"
            raise CheckpointError(reason + others)
        return None

    def _plan(self, step: int, tensors: dict[str, Any], train_state: dict[str, Any]) -> tuple[_Flight, SavePlan]:
        flight = _Flight(step)
        planner = flight.planner

        def local_plan() -> SavePlan:
            flight.train_state = _to_json(train_state)
            return planner.local_plan(tensors, self._is_first)

        def decide(local: list[SavePlan]) -> list[tuple[SavePlan, Path]]:
            with contextlib.suppress(OSError):  # Whatever is wrong with the folder, writing to it will say so.
                self._folder.claim()
            temporary = self._folder.new_temporary(step)
            plans, _ = planner.create_global_plan(local)
            return [(plan, temporary) for plan in ShardWriter(temporary).prepare_global_plan(plans)]

        plan, temporary = self._coordinator.exchange(local_plan, decide)
        flight.writer = ShardWriter(temporary)
        return flight, plan

    def _land(self, flight: _Flight) -> None:
        self._flight = None
        try:
            self._coordinator.exchange(flight.written.result, lambda written: self._publish(flight, written))
        except CheckpointError as error:
            self.failed_saves += 1
            self._warn(
                "the checkpoint of step %d was not saved: %s (%s)", flight.step, error, self._folder.free_space()
            )
            if self._is_first:
                shutil.rmtree(flight.writer.folder, ignore_errors=True)
            return
        self._broken.discard(flight.step)
        self.newest_sound = flight.step
        if self._is_first:
            self._prune(flight.step)

    def _publish(self, flight: _Flight, written: list[Written]) -> list[None]:
        """On the first rank: complete the temporary folder with metadata and manifest, and rename it."""
        writer = flight.writer
        writer.finish(flight.planner.metadata, [results for results, _ in written])
        writer.write_bytes(TRAIN_STATE_NAME, flight.train_state)
        files = writer.records | {name: record for _, records in written for name, record in records.items()}
        manifest = Manifest(flight.step, self._coordinator.world_size, torch.__version__, files)
        writer.write_bytes(MANIFEST_NAME, manifest.render())
        verify_listing(writer.folder, manifest)  # On a folder that is not shared, other ranks' files are not here.
        self._folder.commit(writer.folder, flight.step)
        return nothing(written)

    def _prune(self, committed: int) -> None:
        # A step found broken counts for nothing here: neither does it take a place nor is it deleted.
        sound = [step for step in self._folder.steps() if step not in self._broken]
        kept = {committed, *sound[-self._keep_last :]}
        kept |= {step for step in sound if self._keep_every and step % self._keep_every == 0}
        try:
            trash = self._folder.move_to_trash(step for step in sound if step not in kept)
        except OSError as error:
            self._warn("old checkpoints could not be removed: %s", describe(error))
            return
        self._sweep = self._worker.submit(_delete, trash)

    def _newest_intact(self, candidates: list[int]) -> tuple[int | None, str]:
        """The newest intact step, and why the newest one was passed over."""
        reasons = []
        for step in sorted(candidates, reverse=True):
            try:
                self.verify(step)
            except CheckpointError as error:
                self._broken.add(step)
                reasons.append(str(error))
                self._warn("checkpoint passed over: %s", error)
            else:
                return step, "".join(reasons[:1])
        return None, "".join(reasons[:1])

    def _read(
        self, step: int, tensors: dict[str, Any], partial: bool, check: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        folder = self._steps()[step]
        world_size = self._coordinator.world_size
        try:
            train_state = self._coordinator.exchange(
                lambda: read_train_state(folder), lambda states: [states[0]] * world_size
            )
            check(train_state)
            load_tensors(folder, step, tensors, self._coordinator.group, partial=partial)
        except CheckpointError as error:
            raise CheckpointError(f"{folder.name}: {error}") from None
        self.newest_sound = step
        return {**train_state, "step": step}

    def _steps(self) -> dict[int, Path]:
        return self._coordinator.exchange(lambda: None, lambda ranks: [self._folder.steps()] * len(ranks))

    @property
    def _is_first(self) -> bool:
        return self._coordinator.rank == 0

    def _warn(self, message: str, *values: object) -> None:
        logger.log(logging.WARNING if self._is_first else logging.DEBUG, message, *values)


def _to_json(train_state: dict[str, Any]) -> bytes:
    try:
        return json.dumps(train_state, indent=1).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"train_state: not JSON ({error})") from None


def _delete(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
