"""One run from start to end: set-up, resume, the loop over steps, and what is left in the run folder."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from data import TokenCorpus, TokenStream, TrainLoader
from data.prepare import prepare_cached
from moe.checkpoint import CheckpointError, CheckpointManager
from moe.config import Config, ConfigError, difference, recipe, run_id
from moe.kernels.experts import resolve_backend
from moe.model import Transformer, initialise
from moe.parallel import World, parallelize
from moe.telemetry import ConsoleLogger, MetricsFile, WandbLogger, redact
from moe.telemetry.hardware import device_name, peak_memory_gib
from moe.training.evaluation import evaluate
from moe.training.rows import RowWriter
from moe.training.run_lock import only_writer
from moe.training.samples import complete_prompts
from moe.training.signals import StopSignal
from moe.training.trainer import Trainer, forbid_sync

class Session:
    """Everything one process holds for a run. `execute` returns whether the run is complete."""

    def __init__(self, config: Config, world: World, stop: StopSignal, command: Sequence[str]) -> None:
        self.config, self.world, self.stop, self.command = config, world, stop, list(command)
        self.console = ConsoleLogger(config.train.steps, world.is_main and sys.stdout.isatty(), None if world.is_main else _Silent())
        torch.manual_seed(config.train.seed)
        self.corpus = self._open_corpus()
        self.recipe = recipe(config, self.corpus.digest)
        self.run = config.run or run_id(config, self.corpus.digest)
        self.folder = Path(config.output_dir) / config.name / self.run
        self.stream = TokenStream(self.corpus, config.data.seq_len, self._weights(), config.train.seed)
        self.loader = self._build_loader()
        self.model, self.backend = self._build_model()
        self.trainer = Trainer(self.model, config, world, len(self.corpus.languages), stop)
        self.rows = RowWriter(self.trainer, world, self.corpus.languages)
        self.checkpoints = CheckpointManager(
            self.folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
        )
        self.step = self.first_step = 0
        self.validated_step = -1
        self.saved_step = -1

    # --- set-up ---------------------------------------------------------------------------------------------------------------------

    def _open_corpus(self) -> TokenCorpus:
        data = self.config.data
        if data.prepared is not None:
            folder = Path(data.prepared)
        else:
            assert data.tokenizer is not None
            folder = prepare_cached(data.sources, data.tokenizer, data.cache_dir)
        corpus = TokenCorpus.open(folder)
        vocab_size = self.config.model.vocab_size
        if corpus.vocab_size > vocab_size:
            raise ConfigError(f"model.vocab_size must be at least the tokenizer's {corpus.vocab_size}, not {vocab_size}")
        return corpus

    def _weights(self) -> dict[str, float]:
        return dict(self.config.data.weights) or dict.fromkeys(self.corpus.languages, 1.0)

    def _build_loader(self) -> TrainLoader:
        train, world = self.config.train, self.world
        if train.global_batch_size % (train.micro_batch_size * world.size):
            raise ConfigError(
                f"train.global_batch_size must be a multiple of train.micro_batch_size={train.micro_batch_size} times the "
                f"{world.size} data-parallel ranks, not {train.global_batch_size}"
            )
        return TrainLoader(
            self.stream, train.global_batch_size, train.micro_batch_size, world.rank, world.size, self.config.data.prefetch
        )

    def _build_model(self) -> tuple[Transformer, str]:
        config, runtime, device = self.config.model.build(), self.config.runtime, self.world.device
        dtype = getattr(torch, self.config.train.compute_dtype)
        try:
            widths = (config.hidden_size, int(config.moe_intermediate_size))
            backend = resolve_backend(runtime.expert_backend, device, dtype, widths)
        except ValueError as error:
            raise ConfigError(f"runtime.expert_backend: {error}") from None
        with device:
            model = Transformer(
                config,
                num_languages=len(self.corpus.languages),
                expert_backend=backend,
                loss_chunk_size=runtime.loss_chunk_size,
            )
        initialise(model, config.initializer_range, self.config.train.seed)
        parallelize(model, self.world, dtype, runtime)
        return model, backend

    # --- the run --------------------------------------------------------------------------------------------------------------------

    def execute(self) -> bool:
        """Resume if there is something to resume, train, leave a checkpoint; False when a signal ended it early."""
        with only_writer(self.folder) if self.world.is_main else nullcontext():
            return self._execute()

    def _execute(self) -> bool:
        self._resume()
        self._open_loggers()
        try:
            finished = self._train()
            self._save()
            self.checkpoints.wait()
            self._require_saved()
            if finished:
                self._finish()
        finally:
            self.loader.close()
            self._close_loggers()
        return finished

    def _train(self) -> bool:
        """The loop; every phase of a step is one line."""
        train = self.config.train
        self.rows.stopwatch.start()
        while self.step < train.steps or self._evaluation_due():
            if self.stop.agreed() or not self._evaluate_if_due():
                return False
            if self.step == train.steps:
                break
            batches = next(self.loader)
            # the first step compiles, which waits for the device
            with forbid_sync(self.world.device, self.config.runtime.detect_sync and self.step > self.first_step):
                self.trainer.step(self.step, batches)
            self.step += 1
            if self.step % train.log_interval == 0 or self.step == train.steps:
                self._log(self.rows.build(self.step))
            self.checkpoints.poll()
            if self._checkpoint_due():
                self._save()
        return True

    def _evaluation_due(self) -> bool:
        if self.step == self.validated_step or self.step == 0:
            return False
        interval = self.config.train.eval_interval
        return self.step == self.config.train.steps or (interval > 0 and self.step % interval == 0)

    def _evaluate_if_due(self) -> bool:
        """False when a signal came first; the evaluation is then still due when the run resumes."""
        if not self._evaluation_due():
            return True
        with self.rows.stopwatch.paused():
            self.model.eval()
            validation = evaluate(self.model, self.stream, self.config.train.micro_batch_size, self.world, self._stop_early)
            self.model.train()
        if validation is None:
            return False
        self.validated_step = self.step
        self._log({"step": self.step, "validation": validation})
        return True

    def _stop_early(self) -> bool:
        """Whether to leave an evaluation; on several ranks they would have to agree, so those finish it."""
        return self.world.size == 1 and self.stop.requested

    def _checkpoint_due(self) -> bool:
        interval = self.config.checkpoint.interval
        return interval > 0 and self.step % interval == 0 and self.step < self.config.train.steps

    # --- checkpoints ----------------------------------------------------------------------------------------------------------------

    def _state_tensors(self) -> dict[str, Any]:
        tensors = self.trainer.state_tensors() | {"rng": {"cpu": torch.get_rng_state()}}
        if self.world.device.type == "cuda":
            tensors["rng"]["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        state = {
            "recipe": self.recipe,
            "config": redact(dataclasses.asdict(self.config)),
            "data": self.loader.state_dict(),
            "validated_step": self.validated_step,
            "elapsed_seconds": self.rows.stopwatch.read(),
            "layout": self._environment(),
        }
        self.checkpoints.save(self.step, self._state_tensors(), state)
        self.saved_step = self.step

    def _require_saved(self) -> None:
        """The last checkpoint must exist: without it the run did not do what it was asked to."""
        if self.checkpoints.steps()[-1:] != [self.step]:
            raise CheckpointError(
                f"{self.folder / 'checkpoints'}: the checkpoint of step {self.step} could not be written; free space and run "
                "the same command again to go on from the newest one"
            )

    def _resume(self) -> None:
        tensors = self._state_tensors()
        state = self.checkpoints.load(tensors)
        if state is None:
            return
        changes = difference(state["recipe"], self.recipe)
        if changes:
            raise ConfigError(f"run: {self.folder} holds another recipe ({'; '.join(changes[:3])}); choose another run name")
        torch.set_rng_state(tensors["rng"]["cpu"])
        if "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"], self.world.device)
        self.loader.load_state_dict(state["data"])
        self.step = self.first_step = self.saved_step = state["step"]
        self.validated_step = state["validated_step"]
        self.rows.resume(self.step, state["elapsed_seconds"])
        self.console.message(f"resuming from step {self.step} in {self.folder}")

    # --- what is written ------------------------------------------------------------------------------------------------------------

    def _open_loggers(self) -> None:
        if not self.world.is_main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        config = redact(dataclasses.asdict(dataclasses.replace(self.config, run=self.run)))
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        shutil.copyfile(self.corpus.tokenizer_path, self.folder / "tokenizer.json")  # what `moe.generate` reads
        self.metrics_file = MetricsFile(self.folder / "metrics.jsonl")
        self.metrics_file.truncate_after(self.step)
        telemetry = self.config.telemetry
        self.wandb = WandbLogger(
            telemetry.wandb,  # type: ignore[arg-type]
            self.folder,
            telemetry.wandb_project,
            f"{self.config.name}-{self.run}",
            f"{self.config.name}/{self.run}",
            config,
            self.console.message,
        )
        model = self.model.config
        self.console.message(
            f"{self.config.name}: {model.num_params():,} parameters, {model.num_active_params():,} active; "
            f"{self.world.size} x {device_name(self.world.device)}, experts by {self.backend}; run folder {self.folder}"
        )

    def _log(self, row: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        self.metrics_file.append(row)
        self.console.log(row)
        self.wandb.log(row)

    def _close_loggers(self) -> None:
        self.console.close()
        if self.world.is_main:
            self.metrics_file.close()
            self.wandb.close()

    def _environment(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device_name(self.world.device),
            "world_size": self.world.size,
            "threads": torch.get_num_threads(),
            "backend": self.backend,
            "compile": self.config.runtime.compile,
        }

    def _finish(self) -> None:
        """Summary, sample completions and the report. Every rank takes part in generation, the first one writes."""
        if not self.config.telemetry.report:
            return
        samples = complete_prompts(self.model, self.corpus, self.config)
        if not self.world.is_main:
            return
        _write_json(self.folder / "samples.json", samples)
        _write_json(self.folder / "summary.json", self._summary())
        from moe.telemetry.report import write_report  # plotly loads slowly

        self.console.message(f"report: {write_report(self.folder)}")

    def _summary(self) -> dict[str, Any]:
        config, seq_len = self.model.config, self.config.data.seq_len
        corpus = self.corpus
        baselines = {
            language: {**vars(baseline), "validation_bytes": corpus.split("validation").source(language).text_bytes}
            for language, baseline in corpus.manifest.validation.items()
        }
        return {
            "name": self.config.name,
            "run": self.run,
            "command": redact(" ".join(self.command)),
            "device": device_name(self.world.device),
            "num_params": config.num_params(),
            "num_active_params": config.num_active_params(),
            "flops_per_token": config.flops_per_token(seq_len),
            "training_seconds": self.rows.stopwatch.read(),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "steps": self.step,
            "tokens": self.step * self.rows.tokens_per_step,
            "languages": list(corpus.languages),
            "baselines": baselines,
            "environment": self._environment(),
        }


class _Silent:
    """A stream for the ranks that say nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
