"""The configuration of a BuddyGPT model: every field, and which values are refused.

This file is copied into every checkpoint, so it may import only transformers and huggingface_hub.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


@strict
class BuddyGPTConfig(PreTrainedConfig):
    """Configuration of [`BuddyGPTModel`]. Field names follow Llama, Qwen3, GLM-4-MoE and DeepSeek-V3.

    Without `kv_lora_rank`, `n_routed_experts` and `n_soft_experts` the model is dense with grouped-query attention.
    `kv_lora_rank` selects multi-head latent attention (MLA), `n_routed_experts` a mixture of experts (MoE) and
    `n_soft_experts` a soft mixture.

    Args:
        vocab_size: Rows of the embedding. Recipes set it to the size of the tokenizer.
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width of a dense SwiGLU feed-forward layer.
        num_hidden_layers: Number of decoder layers.
        num_attention_heads: Number of query heads.
        num_key_value_heads: Number of key/value heads, each shared by a group of query heads (GQA, arXiv:2305.13245).
            None: as many as query heads (multi-head attention).
        head_dim: Width of one head. None: `hidden_size // num_attention_heads`.
        hidden_act: Activation function of the feed-forward layers' gate.
        max_position_embeddings: Longest supported sequence, in tokens.
        initializer_range: Standard deviation of every matrix at initialization (normal distribution). Biases start at
            0, norms at 1.
        rms_norm_eps: Epsilon of every RMSNorm, except those of MLA's latents.
        use_cache: Return keys and values for decoding.
        tie_word_embeddings: Use the embedding as output head.
        rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0}`, or one of transformers' scaled types
            ("linear", "dynamic", "yarn", "llama3", ...) with its own keys.
        attention_bias: Add a bias to `q_proj`, `k_proj` and `v_proj`, as in Qwen2 (`o_proj` never has one). With MLA:
            to `q_a_proj` and `kv_a_proj_with_mqa`, as in DeepSeek-V3.
        use_qk_norm: Apply RMSNorm to each head's queries and keys before RoPE, as in Qwen3.
        attention_dropout: Dropout of the attention weights during training.
        kv_lora_rank: MLA (arXiv:2405.04434 section 2.1): rank of the latent from which keys and values are computed,
            and which the cache holds. None: grouped-query attention.
        q_lora_rank: MLA: rank of the queries' latent. None: queries are computed from the hidden states.
        qk_rope_head_dim: MLA: rotated part of a head. All heads share its key. `head_dim` is set to it.
        qk_nope_head_dim: MLA: part of a query or key head without position.
        v_head_dim: MLA: width of a value head.
        n_routed_experts: MoE: number of experts in a layer. None: dense layers.
        num_experts_per_tok: MoE: number of experts that process each token.
        moe_intermediate_size: MoE and soft mixture: inner width of one expert.
        n_shared_experts: MoE: additional experts that process every token, stored as one SwiGLU layer of their total
            width.
        first_k_dense_replace: MoE: number of lowest layers that stay dense (`intermediate_size` wide).
        scoring_func: MoE: "softmax" or "sigmoid" turns the router's logits into scores.
        n_group: MoE: number of groups the experts are divided into. A group's score is the sum of its two best
            experts' scores.
        topk_group: MoE: number of groups from which a token may choose its experts.
        norm_topk_prob: MoE: divide the chosen experts' scores by their sum.
        routed_scaling_factor: MoE: factor on the routed experts' output.
        aux_loss_alpha: MoE: weight of the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437 eq. 17-20). It
            adds to the gradient, not to the reported loss. 0: none.
        bias_update_speed: MoE: how far pretraining moves each expert's selection bias per step to balance the load
            (arXiv:2408.15664), an alternative to `aux_loss_alpha`. 0: never.
        n_soft_experts: Soft mixture: number of experts in a layer. All process every token, weighted by a softmax.
        z_loss_coef: Weight of the z-loss, logsumexp(logits)^2 per token, which keeps logits small (PaLM,
            arXiv:2204.02311 section 5: 1e-4). It adds to the gradient, not to the reported loss. 0: none.

    Raises:
        StrictDataclassError: Two values do not fit together; the message names both.
    """

    model_type = "buddygpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    use_qk_norm: bool = False
    attention_dropout: float | int = 0.0
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    scoring_func: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    aux_loss_alpha: float | int = 0.0
    bias_update_speed: float | int = 0.0
    n_soft_experts: int | None = None
    z_loss_coef: float | int = 0.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.kv_lora_rank is not None:
            self.head_dim = self.qk_rope_head_dim  # what RoPE rotates
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # `save_pretrained` adds only the entry of the saved class; a checkpoint must load through all Auto classes.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_buddygpt.BuddyGPTConfig",
                "AutoModel": "modeling_buddygpt.BuddyGPTModel",
                "AutoModelForCausalLM": "modeling_buddygpt.BuddyGPTForCausalLM",
            },
        )
        super().__post_init__(**kwargs)

    # `@strict` calls every `validate_*` method after construction.

    def validate_architecture(self):
        """Raise ValueError if general sizes or the heads do not fit together."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            self._require_at_least(name, 1)
        self._require_at_least("z_loss_coef", 0)
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.kv_lora_rank is None and (self.head_dim < 2 or self.head_dim % 2):
            raise ValueError(f"head_dim ({self.head_dim}) must be even and at least 2: RoPE rotates pairs")

    def validate_rope_type(self):
        """Raise ValueError if the type of RoPE is unknown; transformers would only log it."""
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type ({rope_type!r}) must be one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")

    def validate_latent_attention(self):
        """Raise ValueError if MLA lacks a size or is mixed with grouped-query attention."""
        sizes = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        if self.kv_lora_rank is None:
            for name in ("q_lora_rank", *sizes):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} ({getattr(self, name)}) needs kv_lora_rank, which is None")
            return
        for name in ("kv_lora_rank", *sizes):
            self._require_at_least(name, 1)
        if self.q_lora_rank is not None:
            self._require_at_least("q_lora_rank", 1)
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE rotates pairs")
        if self.head_dim != self.qk_rope_head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be qk_rope_head_dim ({self.qk_rope_head_dim}) in latent attention"
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must be num_attention_heads "
                f"({self.num_attention_heads}) in latent attention, which has no key/value groups"
            )
        if self.use_qk_norm:
            raise ValueError("use_qk_norm (True) must be False in latent attention: its latents are normalized")

    def validate_experts(self):
        """Raise ValueError if the experts cannot be chosen, grouped or trained."""
        # Soft mixture
        if self.n_soft_experts is not None:
            self._require_at_least("n_soft_experts", 1)
            self._require_at_least("moe_intermediate_size", 1)
            if self.n_routed_experts is not None:
                raise ValueError(
                    f"n_soft_experts ({self.n_soft_experts}) and n_routed_experts ({self.n_routed_experts}): give one"
                )

        # Without routed experts, no field of theirs may be set.
        if self.n_routed_experts is None:
            for name in (
                "num_experts_per_tok",
                "n_shared_experts",
                "first_k_dense_replace",
                "aux_loss_alpha",
                "bias_update_speed",
            ):
                if getattr(self, name):
                    raise ValueError(f"{name} ({getattr(self, name)}) needs n_routed_experts, which is None")
            if self.moe_intermediate_size is not None and self.n_soft_experts is None:
                raise ValueError(
                    f"moe_intermediate_size ({self.moe_intermediate_size}) needs n_routed_experts or n_soft_experts"
                )
            return

        # Routed experts: sizes, groups, experts per token
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            self._require_at_least(name, 1)
        for name in ("n_shared_experts", "first_k_dense_replace"):
            self._require_at_least(name, 0)
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func ({self.scoring_func!r}) must be 'softmax' or 'sigmoid'")
        group_size = self.n_routed_experts // self.n_group
        if self.n_routed_experts % self.n_group or group_size < 2:  # a group's score takes two experts
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) must be n_group ({self.n_group}) groups of at least 2"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) must not exceed n_group ({self.n_group})")
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed the "
                f"{self.topk_group * group_size} experts of topk_group ({self.topk_group}) groups"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok (1) with norm_topk_prob (True): the one weight would always be 1, and the router "
                "would get no gradient; set norm_topk_prob to false"
            )

    def _require_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None or value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
