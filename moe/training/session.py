"""One run from start to end: set-up, resume, the loop over steps, and what is left in the run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from data import BatchSizes, Text
from data.pipeline import Loader, open_loader, open_stream, open_text, stream_spec, whole_state
from moe.checkpoint import CheckpointError, CheckpointManager
from moe.config import Config, ConfigError, difference, recipe, run_id
from moe.kernels import attention, experts
from moe.model import Transformer, initialise
from moe.parallel import World, parallelize
from moe.telemetry import redact
from moe.training.evaluation import evaluate
from moe.training.rows import RowWriter
from moe.training.run_lock import only_writer
from moe.training.run_log import RunLog
from moe.training.samples import complete_prompts
from moe.training.signals import StopSignal
from moe.training.trainer import Trainer, forbid_sync


class Session:
    """Everything one process holds for a run. `execute` returns whether the run is complete."""

    def __init__(self, config: Config, world: World, stop: StopSignal, command: Sequence[str]) -> None:
        self.config, self.world, self.stop = config, world, stop
        self._data = dataclasses.asdict(config.data)
        self._compute_dtype: torch.dtype = getattr(torch, config.train.compute_dtype)
        torch.manual_seed(config.train.seed)
        self.text = self._open_text()
        self.batch_sizes = BatchSizes(
            config.train.global_batch_size, [(end, size) for end, size in config.train.batch_ramp]
        )
        spec = stream_spec(self._data, self.text, self.batch_sizes, config.train.seed)
        self.recipe = recipe(config, {"text": self.text.digest, **spec.to_json()}, world.layout.data)
        run = config.run or run_id(self.recipe)
        self.folder = Path(config.output_dir) / config.name / run
        self.stream = open_stream(self.text, spec)
        self.loader = self._build_loader()
        self.backends = self._choose_backends()
        self.model = self._build_model()
        self.log = RunLog(config, self.folder, world, self.backends, command)
        self.trainer = Trainer(self.model, config, world, len(self.text.languages), stop)
        self.rows = RowWriter(self.trainer, world, self.text.languages, self.batch_sizes)
        self.checkpoints = CheckpointManager(
            self.folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            process_group=world.group,
            device=world.device,
        )
        self.step = 0
        self.micro_batches_compiled = 0
        """Of a step: none yet, the first, or the second as well, like which all others are."""
        self.validated_step = -1
        self.saved = (-1, -1)
        """Step and validated step of the newest checkpoint."""

    def _open_text(self) -> Text:
        text, vocab_size = open_text(self._data), self.config.model.vocab_size
        if text.vocab_size > vocab_size:
            raise ConfigError(f"model.vocab_size must be at least the tokenizer's {text.vocab_size}, not {vocab_size}")
        return text

    def _build_loader(self) -> Loader:
        train, world = self.config.train, self.world
        return open_loader(
            self.stream,
            self.batch_sizes,
            train.micro_batch_size,
            dp_rank=world.data_rank,
            dp_size=world.layout.data,
            workers=self.config.data.workers,
            prefetch=self.config.data.prefetch,
            pin_memory=world.device.type == "cuda",
            report=lambda line: self.log.message(line),
        )

    def _choose_backends(self) -> dict[str, str]:
        """Who computes experts and attention, by the name of its key."""
        model, runtime = self.config.model.build(), self.config.runtime
        where = self.world.device, self._compute_dtype
        widths = (model.hidden_size, int(model.moe_intermediate_size))
        try:
            key = "expert_backend"
            expert_backend = experts.resolve_backend(runtime.expert_backend, *where, widths)
            key = "attention_backend"
            attention_backend = attention.resolve_backend(runtime.attention_backend, *where, model.head_dim)
        except ValueError as error:
            raise ConfigError(f"runtime.{key}: {error}") from None
        return {"expert_backend": expert_backend, "attention_backend": attention_backend}

    def _build_model(self) -> Transformer:
        config, runtime = self.config.model.build(), self.config.runtime
        with torch.device("meta"):  # only this rank's part of the weights ever comes into being
            model = Transformer(
                config,
                num_languages=len(self.text.languages),
                expert_backend=self.backends["expert_backend"],
                attention_backend=self.backends["attention_backend"],
                loss_chunk_size=runtime.chunk_size(self.world.device.type),
            )
        parallelize(model, self.world, self._compute_dtype, runtime, self.config.parallel)
        model.to_empty(device=self.world.device)
        initialise(model, config.initializer_range, self.config.train.seed)
        return model

    def execute(self) -> bool:
        """Resume what there is to resume, train, leave a checkpoint (`at_end`); False when a signal came first."""
        with only_writer(self.folder) if self.world.is_main else nullcontext():
            return self._execute()

    def _execute(self) -> bool:
        self._resume()
        if self.config.checkpoint.interval > 0 or self.config.checkpoint.at_end:
            self.checkpoints.prepare(self._state_tensors())
        self.log.open(self.step, self.validated_step, self.text, self.model.config)
        self._warn_of_device_groups()
        try:
            finished = self._train()
            if self.config.checkpoint.at_end or not finished:
                self._save()
            self.checkpoints.wait()
            self._require_saved()
            if finished and self.config.telemetry.report:
                self._report()
        finally:
            self.loader.close()
            self.log.close()
        return finished

    def _warn_of_device_groups(self) -> None:
        model, expert = self.model.config, self.world.layout.expert
        if model.device_aux_loss_alpha > 0 and expert > 1 and expert != model.n_device_groups:
            self.log.message(
                f"warning: model.device_aux_loss_alpha evens out the load of n_device_groups={model.n_device_groups} "
                f"groups of experts, not that of the parallel.expert={expert} ranks they lie on"
            )

    def _train(self) -> bool:
        """The loop; False when a signal ended it."""
        self.rows.stopwatch.start()
        if not self._evaluate_if_due():  # left over by an interrupted run
            return False
        while self.step < self.config.train.steps:
            if self.stop.agreed():
                return False
            self._advance()
            if not self._evaluate_if_due():
                return False
            self.checkpoints.poll()
            if self._checkpoint_due():
                self._save()
        return True

    def _advance(self) -> None:
        """One step and, where it is due, its log row."""
        train, batches = self.config.train, next(self.loader)
        compiles = min(len(batches), 2) > self.micro_batches_compiled  # and waits for the device
        with forbid_sync(self.world.device, self.config.runtime.detect_sync and not compiles):
            self.trainer.step(self.step, batches)
        self.micro_batches_compiled = max(self.micro_batches_compiled, min(len(batches), 2))
        self.step += 1
        if self.step % train.log_interval == 0 or self.step == train.steps:
            self.log.row(self.rows.build(self.step))

    def _evaluation_due(self) -> bool:
        if self.step == self.validated_step or self.step == 0:
            return False
        train = self.config.train
        if train.eval_at_end and self.step == train.steps:
            return True
        return train.eval_interval > 0 and self.step % train.eval_interval == 0

    def _evaluate_if_due(self) -> bool:
        """False when a signal came first; the evaluation is then still due when the run resumes."""
        if not self._evaluation_due():
            return True
        with self.rows.stopwatch.paused():
            self.model.eval()
            validation = evaluate(
                self.model, self.stream, self.config.train.micro_batch_size, self.world, self._stop_early
            )
            self.model.train()
        if validation is None:
            return False
        self.validated_step = self.step
        self.log.row({"step": self.step, "validation": validation})
        return True

    def _stop_early(self) -> bool:
        """Whether to leave an evaluation; on several ranks they would have to agree, so those finish it."""
        return self.world.size == 1 and self.stop.requested

    def _checkpoint_due(self) -> bool:
        interval = self.config.checkpoint.interval
        return interval > 0 and self.step % interval == 0 and self.step < self.config.train.steps

    def _state_tensors(self) -> dict[str, Any]:
        tensors = self.trainer.state_tensors() | {"rng": {"cpu": torch.get_rng_state()}}
        if self.world.device.type == "cuda":
            tensors["rng"]["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return tensors

    def _save(self) -> None:
        if self.saved == (self.step, self.validated_step):
            return
        state = {
            "recipe": self.recipe,
            "config": redact(dataclasses.asdict(self.config)),
            "data": whole_state(self.loader, self.world.gather_data),
            "validated_step": self.validated_step,
            "elapsed_seconds": self.rows.stopwatch.read(),
            "layout": self.log.environment(),
        }
        self.checkpoints.save(self.step, self._state_tensors(), state)
        self.saved = (self.step, self.validated_step)

    def _require_saved(self) -> None:
        """The last checkpoint that was begun must exist: without it the run did not do what it was asked to."""
        step, _ = self.saved
        if step >= 0 and self.checkpoints.newest_sound != step:
            raise CheckpointError(
                f"{self.folder / 'checkpoints'}: the checkpoint of step {step} could not be written; "
                "mend that and run the same command again to go on from the newest intact one, if there is one"
            )

    def _resume(self) -> None:
        tensors = self._state_tensors()
        state = self.checkpoints.load(tensors, check=self._require_same_recipe)
        if state is None:
            return
        torch.set_rng_state(tensors["rng"]["cpu"])
        if "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"], self.world.device)
        self.loader.load_state_dict(state["data"], self.config.data.accept_change)
        self.step = state["step"]
        self.validated_step = state["validated_step"]
        self.saved = (self.step, self.validated_step)
        self.rows.resume(self.step, state["elapsed_seconds"])
        if self.step == self.config.train.steps:
            self.log.message(f"all {self.step} steps are done in {self.folder}")
        else:
            self.log.message(f"resuming from step {self.step} in {self.folder}{self._inexact()}")

    def _require_same_recipe(self, state: dict[str, Any]) -> None:
        changes = difference(state["recipe"], self.recipe)
        accepted = [change for change in changes if self.config.data.accept_change and change.startswith("data.")]
        for change in accepted:
            self.log.message(f"resuming although {change}")
        if changes := [change for change in changes if change not in accepted]:
            raise ConfigError(
                f"run: {self.folder} holds another recipe ({'; '.join(changes[:3])}); choose another run name"
            )

    def _inexact(self) -> str:
        if self.world.device.type != "cuda" or self.config.runtime.deterministic:
            return ""
        return "; weights will differ in the last bits from an undisturbed run's (runtime.deterministic=true avoids it)"

    def _report(self) -> None:
        """Every rank takes part in writing the sample completions, which come token by token: too few for tensor
        parallelism, which cuts sequences up."""
        if self.world.layout.tensor == 1:
            samples = complete_prompts(self.model, self.text, self.config)
        else:
            samples = []
            self.log.message(f"no sample completions with parallel.tensor > 1; python -m moe.generate {self.folder}")
        tokens, seconds = self.rows.tokens(self.step), self.rows.stopwatch.read()
        self.log.report(samples, self.text, self.model.config, self.step, tokens, seconds)
