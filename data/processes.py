"""Worker processes: Python of this project, without threads of its own, that ends with its parent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def start_worker(*arguments: str, **settings: Any) -> subprocess.Popen[Any]:
    """Start `python ARGUMENTS` with pipes for stdin and stdout. It has to end when its stdin does.

    Ctrl-C does not reach it: that is for the parent, whose end it notices.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command, pipe = [sys.executable, *arguments], subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, process_group=0, **settings)
