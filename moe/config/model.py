"""What a DeepSeekMoE model is: the rung's rules as written in `conf/model/*.yaml`, and the shape they build.

`ArchitectureConfig` states a rung the way the paper does (section 3): a standard FFN, a budget of N such FFNs of which
K are active, segmented m-fold, with K_s experts isolated as shared. `ArchitectureConfig.build()` derives `ModelConfig`,
whose names are those of the released model's config.json; the network reads nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from moe.config.errors import ConfigError, choice, require

T = TypeVar("T", int, float)


@dataclass
class _Recipe:
    """Fields that a rung states and the built model keeps unchanged."""

    vocab_size: int = 8192
    hidden_size: int = 1280
    num_hidden_layers: int = 9
    num_attention_heads: int = 10
    num_key_value_heads: int | None = None
    """Key/value heads of grouped-query attention; null: as many as attention heads (MHA, the paper's choice)."""
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    """Standard deviation of the normal initialisation of every weight (paper, appendix A)."""

    first_k_dense_replace: int = 0
    """The first k layers keep a dense FFN of the activated width."""
    moe_layer_freq: int = 1
    """Of the layers past `first_k_dense_replace`, those whose index is a multiple of this are MoE layers."""

    routing: str = "learned"
    """`learned`: top-k of the scores; `hash`: a fixed random table from token id to experts (Hash Layer)."""
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    aux_loss_alpha: float = 0.01
    """Expert-level balance factor, alpha_1 of equation 12."""
    seq_aux: bool = True
    """Expert-level and device-level balance per sequence (the paper's T) instead of per micro-batch."""
    device_aux_loss_alpha: float = 0.0
    """Device-level balance factor, alpha_2 of equation 15."""
    n_device_groups: int = 1
    """D of equation 15: a key of the recipe, whatever expert-parallel degree runs it."""
    router_z_loss_alpha: float = 0.0
    """Factor of the mean squared log-sum-exp of the router's logits (ST-MoE, equation 5)."""
    bias_update_speed: float = 0.0
    """Step of the auxiliary-loss-free selection bias (arXiv 2408.15664); 0 switches it off."""


@dataclass
class ModelConfig(_Recipe):
    """One concrete network, named as in the released config.json. Widths are fractional only for counting."""

    num_key_value_heads: int = 10
    intermediate_size: float = 6784
    """Width of a dense layer's FFN."""
    moe_intermediate_size: float = 848
    """Width of one expert."""
    n_shared_experts: int = 1
    n_routed_experts: int = 63
    """Routed experts a layer; 0 makes every layer dense."""
    num_experts_per_tok: int = 7

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer's FFN is a mixture (the released model's rule)."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    def num_params(self) -> int:
        """All parameters, embedding and head included (16B: 16,375,728,128)."""
        return self._count_params(self.n_routed_experts)

    def num_active_params(self) -> int:
        """Parameters that one token meets, both vocabulary matrices included (16B: 2,828,650,496)."""
        return self._count_params(self.num_experts_per_tok)

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs per token under the paper's convention: 6 N + 12 L T d.

        N counts attention, the activated FFNs and the head; not the input embedding, the router and the norms.
        Attention is not halved for causality. Times T this gives the paper's figures per sequence: 4.3T (2B), 74.4T
        (16B at nominal widths).
        """
        weights: float = self.num_hidden_layers * self._attention_params() + self.vocab_size * self.hidden_size
        for layer in range(self.num_hidden_layers):
            weights += self._ffn_params(layer, self.num_experts_per_tok)
        attention = self.num_hidden_layers * seq_len * self.num_attention_heads * self.head_dim
        return 6 * weights + 12 * attention

    def expert_params(self) -> float:
        """Parameters of all experts, shared and routed, of all layers: the paper's "expert parameters" (table 2)."""
        return sum(self._ffn_params(layer, self.n_routed_experts) for layer in range(self.num_hidden_layers))

    def active_expert_params(self) -> float:
        """Of `expert_params`, those one token meets."""
        return sum(self._ffn_params(layer, self.num_experts_per_tok) for layer in range(self.num_hidden_layers))

    def _attention_params(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def _ffn_params(self, layer: int, routed: int) -> float:
        if not self.is_moe_layer(layer):
            return 3 * self.hidden_size * self.intermediate_size
        return 3 * self.hidden_size * self.moe_intermediate_size * (self.n_shared_experts + routed)

    def _count_params(self, routed: int) -> int:
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        learned = len(self.moe_layers) if self.routing == "learned" else 0
        count = 2 * self.vocab_size * self.hidden_size + norms + learned * self.n_routed_experts * self.hidden_size
        for layer in range(self.num_hidden_layers):
            count += self._attention_params() + round(self._ffn_params(layer, routed))
        return count


@dataclass
class ArchitectureConfig(_Recipe):
    """A rung and the rules that derive its variants; the schema of `conf/model`.

    The paper's baselines and ablations are overrides of one rung: `granularity=1 n_shared_experts=0` is GShard,
    `granularity=1 n_shared_experts=0 active_budget=1` is Switch, the same with `routing=hash` is the Hash Layer,
    `expert_size_factor=1.5` on GShard is GShard x1.5, `dense_multiple=4` is Dense x4.
    """

    standard_ffn_size: int | None = None
    """Width of the standard FFN that the budgets count in; null: 8/3 hidden_size, unrounded."""
    width_multiple: int = 8
    """Derived widths are rounded up to a multiple of this (the released model: 64)."""
    expert_budget: float = 16.0
    """N: shared and routed experts of a layer together, in standard FFNs (mN is rounded down to whole experts)."""
    active_budget: float = 2.0
    """K: shared and routed experts that a token meets, in standard FFNs."""
    granularity: int = 4
    """m: an expert is 1/m of a standard FFN, and there are m times as many of them."""
    n_shared_experts: int = 1
    """K_s: experts that every token meets, taken out of both budgets."""
    expert_size_factor: float = 1.0
    """Makes every expert larger at equal counts (the paper's GShard x1.2 and x1.5)."""
    dense_multiple: int | None = None
    """Replaces every mixture by a dense FFN of so many standard widths (the paper's Dense, Dense x4, Dense x16)."""
    budget_tolerance: float = 0.0
    """Largest relative deviation of the built expert parameters from the budgets, as rounding widths brings about."""

    moe_intermediate_size: int | None = None
    """Overrides the derived expert width."""
    intermediate_size: int | None = None
    """Overrides the derived width of dense layers."""
    n_routed_experts: int | None = None
    """Overrides the derived number of routed experts, mN - K_s."""
    num_experts_per_tok: int | None = None
    """Overrides the derived number of routed experts a token meets, mK - K_s."""

    def build(self) -> ModelConfig:
        """Derive the network. Raises ConfigError naming the key when the rules cannot be met."""
        self._check_rules()
        config = self._derive(self._rounded_width)
        _check_model(config)
        self._check_budget(config)
        return config

    def nominal(self) -> ModelConfig:
        """The network at unrounded widths: only for counting, as the paper's printed FLOPs do."""
        return self._derive(float)

    def _derive(self, size: Callable[[Fraction], float]) -> ModelConfig:
        standard = self._standard_width()
        expert = standard * _exact(self.expert_size_factor) / self.granularity
        dense = standard * (self.dense_multiple or _exact(self.active_budget))
        routed = math.floor(_exact(self.expert_budget) * self.granularity) - self.n_shared_experts
        active = math.floor(_exact(self.active_budget) * self.granularity) - self.n_shared_experts
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(_Recipe)}
        values["num_key_value_heads"] = _either(self.num_key_value_heads, self.num_attention_heads)
        counts: dict[str, Any] = {
            "n_shared_experts": self.n_shared_experts,
            "n_routed_experts": _either(self.n_routed_experts, routed),
            "num_experts_per_tok": _either(self.num_experts_per_tok, active),
        }
        if self.dense_multiple is not None:
            counts = dict.fromkeys(counts, 0)
        return ModelConfig(
            **values,
            **counts,
            moe_intermediate_size=_either(self.moe_intermediate_size, size(expert)),
            intermediate_size=_either(self.intermediate_size, size(dense)),
        )

    def _standard_width(self) -> Fraction:
        return Fraction(8 * self.hidden_size, 3) if self.standard_ffn_size is None else Fraction(self.standard_ffn_size)

    def _rounded_width(self, width: Fraction) -> int:
        return math.ceil(width / self.width_multiple) * self.width_multiple

    def _check_rules(self) -> None:
        for key in ("granularity", "width_multiple"):
            require(getattr(self, key) >= 1, f"model.{key}", "at least 1", getattr(self, key))
        for key in ("expert_budget", "active_budget", "expert_size_factor"):
            require(getattr(self, key) > 0, f"model.{key}", "above 0", getattr(self, key))
            require(getattr(self, key) <= 10**6, f"model.{key}", "at most 10^6", getattr(self, key))
        for key in ("n_shared_experts", "budget_tolerance"):
            require(getattr(self, key) >= 0, f"model.{key}", "at least 0", getattr(self, key))
        width = self.standard_ffn_size
        require(width is None or width >= 1, "model.standard_ffn_size", "null or at least 1", width)
        multiple = self.dense_multiple
        require(multiple is None or multiple >= 1, "model.dense_multiple", "null or at least 1", multiple)

    def _check_budget(self, config: ModelConfig) -> None:
        """Variants of one rung must keep its expert parameters and its activated ones, up to the tolerance."""
        if config.n_routed_experts == 0 or self._overrides_rule():
            return
        width = config.moe_intermediate_size / (self._standard_width() * _exact(self.expert_size_factor))
        for key, routed in (("expert_budget", config.n_routed_experts), ("active_budget", config.num_experts_per_tok)):
            deviation = abs(float(width * (config.n_shared_experts + routed)) / getattr(self, key) - 1)
            if deviation > self.budget_tolerance:
                raise ConfigError(
                    f"model.granularity={self.granularity} misses model.{key}={getattr(self, key):g} "
                    f"by {deviation:.2%} (experts of width {config.moe_intermediate_size}); "
                    f"model.budget_tolerance allows {self.budget_tolerance:.2%}"
                )

    def _overrides_rule(self) -> bool:
        overrides = (
            self.moe_intermediate_size,
            self.intermediate_size,
            self.n_routed_experts,
            self.num_experts_per_tok,
        )
        return any(value is not None for value in overrides)


def _exact(value: float) -> Fraction:
    return Fraction(str(value))


def _either(override: int | None, derived: T) -> int | T:
    return derived if override is None else override


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "intermediate_size",
    "moe_intermediate_size",
)


def _check_model(config: ModelConfig) -> None:
    """Refuse shapes that no network can have, one line each."""
    for key in _POSITIVE:
        require(getattr(config, key) >= 1, f"model.{key}", "at least 1", getattr(config, key))
        require(getattr(config, key) < 2**31, f"model.{key}", "below 2^31", getattr(config, key))
    require(config.num_hidden_layers <= 10_000, "model.num_hidden_layers", "at most 10,000", config.num_hidden_layers)
    for key in ("rope_theta", "rms_norm_eps", "initializer_range"):
        require(0 < getattr(config, key) < math.inf, f"model.{key}", "above 0 and finite", getattr(config, key))
    for key in ("aux_loss_alpha", "device_aux_loss_alpha", "router_z_loss_alpha", "bias_update_speed"):
        require(0 <= getattr(config, key) < math.inf, f"model.{key}", "at least 0 and finite", getattr(config, key))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    require(config.hidden_size % heads == 0, "model.num_attention_heads", f"a divisor of {config.hidden_size}", heads)
    require(config.head_dim % 2 == 0, "model.num_attention_heads", "such that a head's width is even (RoPE)", heads)
    require(kv_heads >= 1 and heads % kv_heads == 0, "model.num_key_value_heads", f"a divisor of {heads}", kv_heads)
    require(config.moe_layer_freq >= 1, "model.moe_layer_freq", "at least 1", config.moe_layer_freq)
    require(
        config.first_k_dense_replace >= 0, "model.first_k_dense_replace", "at least 0", config.first_k_dense_replace
    )
    choice("model.routing", config.routing, ("learned", "hash"))
    choice("model.scoring_func", config.scoring_func, ("softmax", "sigmoid"))
    if config.n_routed_experts:
        _check_mixture(config)


def _check_mixture(config: ModelConfig) -> None:
    routed, active = config.n_routed_experts, config.num_experts_per_tok
    require(routed > 0, "model.expert_budget", "such that routed experts remain beside the shared ones", routed)
    require(1 <= active <= routed, "model.num_experts_per_tok", f"between 1 and the {routed} routed experts", active)
    require(
        bool(config.moe_layers),
        "model.first_k_dense_replace",
        "such that a mixture layer remains",
        config.first_k_dense_replace,
    )
    groups = config.n_device_groups
    require(1 <= groups <= routed, "model.n_device_groups", f"between 1 and the {routed} routed experts", groups)
    if config.routing == "hash":
        for key in ("aux_loss_alpha", "device_aux_loss_alpha", "router_z_loss_alpha", "bias_update_speed"):
            require(
                getattr(config, key) == 0,
                f"model.{key}",
                "0 with model.routing=hash, which learns no router",
                getattr(config, key),
            )
