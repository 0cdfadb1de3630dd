"""Weights & Biases. It may be missing, unreachable or broken; training neither waits for it nor fails by it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe.telemetry.redact import redact, redact_text

WandbMode = Literal["online", "offline", "disabled"]
INIT_TIMEOUT_SECONDS = 20
FINISH_TIMEOUT_SECONDS = 60
# Histograms and heat maps are drawn once in so many rows, and with each validation.
ROWS_BETWEEN_PICTURES = 20


class WandbLogger:
    """Sends rows of metrics.jsonl to Weights & Biases, from one rank only.

    `run_id` is the caller's, the same for every resume of a run. `online` without an account or a network becomes
    `offline`, said once through `message` together with how to upload later. Everything is written below `run_folder`.
    """

    def __init__(
        self,
        mode: WandbMode,
        run_folder: Path,
        project: str,
        run_id: str,
        name: str,
        config: Mapping[str, Any],
        message: Callable[[str], None],
    ) -> None:
        self._message = message
        self._run: Any = None
        self._rows = 0
        if mode == "disabled":
            return
        wandb = _import_wandb(message)
        if wandb is None:
            return
        _keep_files_inside(run_folder)
        arguments = {
            "project": project,
            "id": run_id,
            "name": name,
            "dir": str(run_folder),
            "resume": "allow",
            "config": redact(config),
        }
        self._run = _start(wandb, mode, arguments, message)

    def log(self, row: Mapping[str, Any]) -> None:
        """Send one row; on the first failure say so once and stop sending."""
        if self._run is None:
            return
        with_pictures = "validation" in row or self._rows % ROWS_BETWEEN_PICTURES == 0
        self._rows += 1
        try:
            self._run.log(flatten_row(row) | (_pictures(row) if with_pictures else {}))
        except Exception as error:
            self._message(
                f"warning: wandb stopped ({_one_line(error)}); training goes on, metrics.jsonl has everything"
            )
            self._run = None

    def close(self) -> None:
        """Finish the run; an upload that the network holds up is given up after a minute."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish()
        except Exception as error:
            self._message(f"warning: wandb could not finish ({_one_line(error)})")


def flatten_row(row: Mapping[str, Any]) -> dict[str, float | int]:
    """The row's numbers under slash-separated names; experts as scalars per layer, without load vectors."""
    flat: dict[str, float | int] = {}
    for key, value in row.items():
        if key == "experts":
            for layer in value:
                scalars = {name: layer[name] for name in ("max_violation", "dead", "entropy")}
                _flatten(scalars, f"experts/layer_{layer['layer']:02d}", flat)
        else:
            _flatten(value, key, flat)
    return flat


def _flatten(value: Any, name: str, into: dict[str, float | int]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(item, f"{name}/{key}", into)
    elif value is not None:
        into[name] = value


def _pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    """A histogram of loads per layer, and one heat map (layers x experts)."""
    experts = row.get("experts")
    if not experts:
        return {}
    import plotly.graph_objects as go
    import wandb

    pictures: dict[str, Any] = {
        f"experts/load/layer_{layer['layer']:02d}": wandb.Histogram(np_histogram=np.histogram(layer["load"], bins=32))
        for layer in experts
    }
    heat_map = go.Heatmap(z=[layer["load"] for layer in experts], y=[layer["layer"] for layer in experts], zmin=0)
    axes = {"xaxis_title": "expert", "yaxis_title": "layer", "title": "Load of each expert (1 = uniform share)"}
    pictures["experts/load_map"] = wandb.Plotly(go.Figure(heat_map, layout=axes))
    return pictures


def _import_wandb(message: Callable[[str], None]) -> Any:
    try:
        import wandb
    except ImportError as error:
        message(f"warning: wandb cannot be imported ({_one_line(error)}); logging to metrics.jsonl only")
        return None
    return wandb


def _keep_files_inside(run_folder: Path) -> None:
    """wandb keeps its service logs and staging files in the home directory unless told otherwise."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(variable, str((run_folder / "wandb").absolute()))
    (run_folder / "wandb").mkdir(parents=True, exist_ok=True)


def _settings(wandb: Any) -> Any:
    """Bounded waiting; nothing of the command line, the environment, the code or the packages is recorded."""
    return wandb.Settings(
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
        console="off",
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )


def _start(wandb: Any, mode: WandbMode, arguments: dict[str, Any], message: Callable[[str], None]) -> Any:
    try:
        arguments["settings"] = _settings(wandb)
        if mode == "online":
            run = _start_online(wandb, arguments, message)
            if run is not None:
                return run
        run = wandb.init(mode="offline", **arguments)
        _use_step_axis(run)
    except Exception as error:
        message(f"warning: wandb could not start ({_one_line(error)}); logging to metrics.jsonl only")
        return None
    message(f"wandb: offline; upload later with: wandb sync {run.settings.sync_dir}")
    return run


def _start_online(wandb: Any, arguments: dict[str, Any], message: Callable[[str], None]) -> Any:
    """The running run, or None after saying why there is none."""
    try:
        if not wandb.login(prompt=False):
            message("warning: no wandb account is configured (`wandb login` sets one up); logging offline")
            return None
        run = wandb.init(mode="online", **arguments)
    except Exception as error:
        message(f"warning: wandb is not reachable ({_one_line(error)}); logging offline")
        return None
    _use_step_axis(run)
    message(f"wandb: {run.url}")
    return run


def _use_step_axis(run: Any) -> None:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")


def _one_line(error: Exception) -> str:
    return redact_text(" ".join(str(error).split())) or type(error).__name__
