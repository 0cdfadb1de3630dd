from __future__ import annotations

import os

from hypothesis import settings

# the same examples on every CI run: a change is judged by what it changed; developers' runs keep searching
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
