"""The typed schema of everything under `conf/`. A key that is not here does not exist; Hydra refuses it before any
work."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from moe.config.model import ArchitectureConfig


@dataclass
class DataConfig:
    """Where the training text comes from; see `data/`."""

    sources: list[str] = field(default_factory=list)
    """JSONL files of {"text", "lang", "source"}, prepared on first use."""
    tokenizer: str | None = None
    """A tokenizer.json for `sources`; a prepared folder brings its own."""
    prepared: str | None = None
    """A folder that `python -m data.prepare` wrote; used as it is in place of `sources` and `tokenizer`."""
    cache_dir: str = "outputs/cache"
    """Where prepared sources are kept between runs."""
    seq_len: int = 2048
    """Tokens a sequence; T of the paper."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens per language of the corpus; empty: equal shares."""
    prefetch: int = 2
    """Steps of batches held ready by the loader's thread."""


@dataclass
class ScheduleConfig:
    """Learning rate over the steps; every shape warms up linearly from 0."""

    shape: str = "multistep"
    """multistep (the paper's), cosine, constant or wsd (warmup, stable, decay)."""
    warmup_steps: int = 2000
    milestones: list[float] = field(default_factory=lambda: [0.8, 0.9])
    """multistep: fractions of all steps at which the rate is multiplied by `factor`."""
    factor: float = 0.316
    final_ratio: float = 0.1
    """cosine and wsd: the last rate as a fraction of the peak."""
    decay_fraction: float = 0.2
    """wsd: the fraction of all steps over which the rate falls linearly."""


@dataclass
class OptimConfig:
    """AdamW as in the paper's appendix A."""

    lr: float = 1.08e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices and embeddings, not to the norms' gains."""
    max_grad_norm: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class GuardConfig:
    """When a step is thrown away. A skipped step leaves parameters, moments and router biases bitwise untouched."""

    spike_threshold: float = 8.0
    """Skip when the loss or the gradient norm lies so many robust deviations above the median of the window; 0: only
    non-finite ones."""
    window: int = 64
    """Accepted steps that the median looks back on; spikes count from a full window on."""
    max_consecutive_skips: int = 8
    """End the run (exit code 76) after so many skips in a row."""


@dataclass
class TrainConfig:
    steps: int = MISSING
    global_batch_size: int = MISSING
    """Sequences an optimizer step, over all ranks and micro-batches."""
    micro_batch_size: int = MISSING
    """Sequences a forward pass on one rank; changes memory and speed, never the result's definition."""
    seed: int = 0
    compute_dtype: str = "bfloat16"
    """float32 or bfloat16: what blocks compute in. Masters, reductions and routers are always float32."""
    log_interval: int = 10
    """Steps between log rows; the only steps at which the host waits for the device."""
    eval_interval: int = 500
    """Steps between validations; 0: only after the last step."""
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class RuntimeConfig:
    """How the run is carried out; no key here defines its result."""

    device: str = "auto"
    """auto, cpu or cuda."""
    num_threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    expert_backend: str = "auto"
    """auto, loop, grouped_mm or megablocks: who computes the experts."""
    compile: bool = False
    """torch.compile of the parts whose shapes are static; token dispatch stays outside."""
    activation_checkpointing: bool = False
    """Recompute blocks in the backward pass; routing choices are saved, never recomputed."""
    loss_chunk_size: int = 8192
    """Tokens whose logits exist at the same time."""
    deterministic: bool = False
    """CUDA: only kernels that return the same bits each time, so that a resumed run equals an undisturbed one (a CPU
    run always does)."""
    detect_sync: bool = False
    """Fail when a step outside logging makes the host wait for the device (CUDA)."""


@dataclass
class CheckpointConfig:
    interval: int = 500
    """Steps between checkpoints; the last step and a stop signal save as well. 0: only those."""
    keep_last: int = 2
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this for good; 0: none."""
    asynchronous: bool = True


@dataclass
class TelemetryConfig:
    wandb: str = "disabled"
    """online, offline or disabled."""
    wandb_project: str = "moesaic"
    report: bool = True
    """Write report.html and sample completions when training ends."""
    peak_tflops: float | None = None
    """Dense peak of one device in the compute dtype, for MFU; null: looked up by device name, no MFU where unknown."""
    prompts: dict[str, list[str]] = field(default_factory=dict)
    """Prompts per language that the trained model completes for the report."""


@dataclass
class Config:
    name: str = MISSING
    """The experiment; the run folder is <output_dir>/<name>/<run>."""
    run: str | None = None
    """Name of the run; null: a hash of what defines the model, the data and the recipe."""
    output_dir: str = "outputs"
    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
