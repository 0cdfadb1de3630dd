"""Names and moves inside the folder of one run's checkpoints; a step appears and disappears by one rename."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Iterable
from pathlib import Path

_STEP = re.compile(r"(?P<replaced>\.replaced-)?step-(?P<step>\d{8,})(?(replaced)-[0-9a-f]{32})")
_TEMPORARY, _TRASH, _REPLACED = ".tmp-", ".trash-", ".replaced-"


class CheckpointFolder:
    """A folder of `step-00000100` folders.

    Beside them live `.tmp-step-*` (being written), `.trash-step-*` (being deleted) and `.replaced-step-*`: the former
    content of a step that is written anew, which counts as that step until the new one has taken its name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claimed = False

    def steps(self) -> dict[int, Path]:
        """The committed steps in ascending order, each with the folder that holds it."""
        found: dict[int, Path] = {}
        names = os.listdir(self.path) if self.path.is_dir() else []
        # ".replaced-step-*" sorts before "step-*" and is overridden by it.
        for match in filter(None, map(_STEP.fullmatch, sorted(names))):
            found[int(match["step"])] = self.path / match[0]
        return dict(sorted(found.items()))

    def new_temporary(self, step: int) -> Path:
        """A name, not yet taken, to write `step` under."""
        return self._unique(_TEMPORARY, step)

    def commit(self, temporary: Path, step: int) -> None:
        """Give a complete `temporary` its final name, durably; whatever had that name before is removed afterwards.

        Raises:
            OSError: the storage refused; the former content is then in its place again.
        """
        final = self.path / _step_name(step)
        replaced = self._unique(_REPLACED, step) if final.exists() else None
        sync_folder(temporary)
        if replaced:
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced:
                replaced.rename(final)
            raise
        sync_folder(self.path)
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)

    def move_to_trash(self, steps: Iterable[int]) -> list[Path]:
        """Rename these steps out of sight at once; deleting the returned folders may take its time."""
        held = self.steps()
        trash = [(held[step], self._unique(_TRASH, step)) for step in steps]
        for folder, target in trash:
            folder.rename(target)
        return [target for _, target in trash]

    def free_space(self) -> str:
        """For messages: a full disk can show as an error that does not say so."""
        with contextlib.suppress(OSError):
            return f"{shutil.disk_usage(self.path).free / 1e6:,.0f} MB free in {self.path}"
        return f"{self.path} cannot be examined"

    def claim(self) -> None:
        """Create the folder, and clear what a killed run left, unless another live process writes here.

        Raises:
            OSError: the folder cannot be created or written to.
        """
        if self._claimed:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path.parent)
        self._claimed = True
        if self._lock():
            self._clear_leftovers()

    def _lock(self) -> bool:
        """Whether no other live process has claimed the folder; where files cannot be locked, none has."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _clear_leftovers(self) -> None:
        for step, folder in self.steps().items():
            if folder.name.startswith(_REPLACED):
                folder.rename(self.path / _step_name(step))
        for name in os.listdir(self.path):
            if name.startswith((_TEMPORARY, _TRASH, _REPLACED)):
                shutil.rmtree(self.path / name, ignore_errors=True)

    def _unique(self, prefix: str, step: int) -> Path:
        return self.path / f"{prefix}{_step_name(step)}-{uuid.uuid4().hex}"


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def sync_folder(path: Path) -> None:
    """Make the names inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
