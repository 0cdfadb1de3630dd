"""The typed schema of everything under `conf/`. A key that is not here does not exist; Hydra refuses it before any
work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moe.config.model import ArchitectureConfig


@dataclass
class SourceConfig:
    """One collection of documents; `data/sources/spec.py` says what each field means."""

    path: str = MISSING
    """File, folder, glob, http(s):// or s3:// address, or the name of a hub data set (format: hub)."""
    language: str | None = None
    """Tag such as en or zh; null: the rows say it in `language_field`."""
    weight: float = 1.0
    """Share of the training tokens, on any scale, unless `data.weights` says otherwise."""
    format: str = "auto"
    """auto, parquet, jsonl, text, arrow, hub, megatron or olmo."""
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    """Of a hub data set: config, split and the commit to read, which must be given."""
    text_field: str = "text"
    language_field: str = "lang"
    sample_by: str = "line"
    """Text files: line, paragraph or document."""
    dtype: str = "uint16"
    """Type of the ids in olmo files."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """For fsspec, such as an endpoint; credentials come from the environment."""


@dataclass
class StageConfig:
    start_step: int = MISSING
    """First step that these weights hold for."""
    weights: dict[str, float] = field(default_factory=dict)


@dataclass
class DataConfig:
    """Where the training text comes from and in which order; see `data/`."""

    mode: str = "tokens"
    """tokens: prepared shards, random access. text: tokenised while training, in virtual streams."""
    sources: dict[str, Any] = field(default_factory=dict)
    """Text by name, each a SourceConfig or a path alone; with mode=tokens it is prepared on first use."""
    tokenizer: str | None = None
    """A tokenizer.json for `sources`; a prepared folder brings its own."""
    prepared: str | None = None
    """A folder that `python -m data.prepare` wrote; used as it is in place of `sources` and `tokenizer`."""
    cache_dir: str = "outputs/cache"
    """Where prepared sources, and the plans of streamed ones, are kept between runs."""
    seq_len: int = 2048
    """Tokens a sequence; T of the paper."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by source; empty: the sources' own weights."""
    stages: list[StageConfig] = field(default_factory=list)
    """Other weights from a later step on."""
    shuffle: str = "windowed"
    """windowed: nearly sequential reads; full: rows permuted over the whole source. Mode tokens."""
    packing: str = "chunk"
    """chunk: documents end to end; best_fit: whole documents fitted into sequences, the rest padding (mode tokens)."""
    intra_document_masking: bool = False
    """Tokens attend to their own document only, positions restart, no label crosses. The paper's recipes do without."""
    skip_ranges: list[list[int]] = field(default_factory=list)
    """Ranges [first, end) of global sequence indices to leave out."""
    accept_change: bool = False
    """Resume although the data's specification has changed since the checkpoint."""
    streams: int = 64
    """Mode text: virtual streams; divides every global batch, and the data-parallel size divides it."""
    validation_tokens: int = 1_048_576
    """Mode text: held-out tokens of every source to validate on."""
    workers: int = 1
    """Threads (mode tokens) or processes (mode text) that prepare batches; 0: prepared when asked for."""
    prefetch: int = 2
    """Steps of batches held ready."""


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
    batch_ramp: list[list[int]] = field(default_factory=list)
    """Smaller global batches at the start: [[end, size], ...], `size` sequences for the steps before `end`."""
    micro_batch_size: int = MISSING
    """Sequences a forward pass on one rank: memory and speed, and with `seq_aux=false` what balance losses pool."""
    seed: int = 0
    compute_dtype: str = "bfloat16"
    """float32 or bfloat16: what blocks compute in. Masters, reductions and routers are always float32."""
    log_interval: int = 10
    """Steps between log rows; the only steps at which the host waits for the device."""
    eval_interval: int = 500
    """Steps between validations; the last step (`eval_at_end`) is followed by one as well. 0: only that."""
    eval_at_end: bool = True
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class ParallelConfig:
    """How the ranks share the work; see `moe/parallel/layout.py`. No key here defines the result.

    replicate x shard x tensor is the number of ranks; one of the three may be null and takes what the others leave.
    """

    replicate: int | None = 1
    """Copies of the sharded model (HSDP): gradients are summed over them."""
    shard: int | None = None
    """Ranks over which FSDP2 shards parameters, gradients and optimizer state."""
    tensor: int | None = 1
    """Ranks that split every dense matrix and the sequence between them (tensor and sequence parallel)."""
    expert: int = 1
    """Ranks that share out the routed experts; divides shard x tensor."""
    reshard: bool = False
    """Free gathered weights after each use and reduce gradients after each micro-batch: less memory, more traffic."""
    timeout: int = 600
    """Seconds after which a rank that waits for another gives up and ends the run."""


@dataclass
class RuntimeConfig:
    """How the run is carried out; no key here defines its result."""

    device: str = "auto"
    """auto, cpu or cuda."""
    num_threads: int = 0
    """CPU threads of torch; 0: torch's own choice."""
    expert_backend: str = "auto"
    """auto, loop, grouped_mm, triton, quack or megablocks: who computes the experts."""
    attention_backend: str = "auto"
    """auto, sdpa (torch's kernels), flash_attn, flash_attn_3 or flash_attn_4: who computes attention."""
    compile: bool = False
    """torch.compile of the parts whose shapes are static; exchanges of tokens between ranks stay outside."""
    activation_checkpointing: str = "none"
    """none; full: recompute blocks in the backward pass; selective: all but matrix products, attention and exchanges
    between ranks. Routing choices are saved, never recomputed."""
    loss_chunk_size: int | None = None
    """Tokens whose logits exist at the same time; null: `chunk_size`."""
    deterministic: bool = False
    """CUDA: only kernels that return the same bits each time, so that a resumed run equals an undisturbed one (a CPU
    run always does)."""
    detect_sync: bool = False
    """Fail when a step outside logging makes the host wait for the device (CUDA)."""

    def chunk_size(self, device: str) -> int:
        """`loss_chunk_size`; where it is null 8,192, on a CPU 256, whose logits its cache holds."""
        return self.loss_chunk_size or (256 if device == "cpu" else 8192)


@dataclass
class CheckpointConfig:
    interval: int = 500
    """Steps between checkpoints; the last step (`at_end`) and a stop signal save as well. 0: only those."""
    at_end: bool = True
    """Save the last step; false: a run that only measures something leaves none, a stop signal still does."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
