"""The shape of a BuddyGPT model. Copied into every checkpoint, so it imports transformers and huggingface_hub only."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class BuddyGPTConfig(PreTrainedConfig):
    """Configuration of [`BuddyGPTModel`]. Field names follow Llama, Qwen3, GLM-4-MoE and DeepSeek-V3; sizes are
    numbers of elements.

    `kv_lora_rank` chooses multi-head latent attention, `n_routed_experts` a mixture of experts, `n_soft_experts` a
    soft mixture; without them the model is dense with grouped-query attention.

    Args:
        vocab_size: Rows of the embedding. Recipes set it to the tokenizer's size.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward layer.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads shared by groups of query heads (GQA, arXiv:2305.13245).
            None: as many as query heads (multi-head attention).
        head_dim: Width of one head. None: `hidden_size // num_attention_heads`.
        hidden_act: Activation of the gate.
        max_position_embeddings: Longest sequence the model is meant for, in tokens.
        initializer_range: Standard deviation of every matrix at the start (normal); biases start at 0, norms at 1.
        rms_norm_eps: Epsilon of every RMSNorm.
        use_cache: Whether a forward pass returns keys and values for decoding.
        tie_word_embeddings: Whether the output head is the embedding.
        rope_parameters: `{"rope_type": "default", "rope_theta": 10000.0}`, or a scaled type of transformers
            ("linear", "dynamic", "yarn", "llama3", ...) with its own keys.
        attention_bias: Whether `q_proj`, `k_proj` and `v_proj` have a bias (as in Qwen2; `o_proj` never has). With
            latent attention: `q_a_proj` and `kv_a_proj_with_mqa`, as in DeepSeek-V3.
        use_qk_norm: Whether queries and keys pass an RMSNorm over `head_dim` before RoPE (as in Qwen3).
        attention_dropout: Dropout of the attention weights in training.
        kv_lora_rank: Multi-head latent attention (MLA, arXiv:2405.04434 section 2.1): rank of the latent that keys and
            values are made of, and which the cache holds. None: grouped-query attention.
        q_lora_rank: MLA: rank of the queries' latent. None: queries come straight from the hidden states.
        qk_rope_head_dim: MLA: part of a head that is rotated; its key is shared by all heads. `head_dim` is set to it.
        qk_nope_head_dim: MLA: part of a query or key head that knows no position.
        v_head_dim: MLA: width of a value head.
        n_routed_experts: Mixture of experts (MoE): experts of a layer to choose from. None: dense layers.
        num_experts_per_tok: MoE: experts that each token goes through.
        moe_intermediate_size: Width of one expert.
        n_shared_experts: MoE: experts every token goes through besides, kept as one SwiGLU layer of their total width.
        first_k_dense_replace: MoE: layers at the bottom that stay dense (`intermediate_size` wide).
        scoring_func: MoE: "softmax" or "sigmoid" makes scores of the router's logits.
        n_group: MoE: groups the experts are divided into; a group's score is the sum of its two best experts'.
        topk_group: MoE: groups a token may choose its experts from.
        norm_topk_prob: MoE: whether the chosen experts' scores are divided by their sum.
        routed_scaling_factor: MoE: factor on the routed experts' output.
        aux_loss_alpha: MoE: weight of the sequence-wise balance loss (DeepSeek-V3, arXiv:2412.19437 eq. 17-20). It
            reaches the gradient, not the loss that is shown. 0: none.
        bias_update_speed: MoE: how far pretraining moves each expert's selection bias per step towards balance, which
            needs no auxiliary loss (arXiv:2408.15664). 0: not at all.
        n_soft_experts: Soft mixture: experts of a layer, all of which every token goes through, weighted by a softmax.
        z_loss_coef: Weight of the z-loss, logsumexp(logits)^2 of each token, which keeps logits small (PaLM,
            arXiv:2204.02311 section 5: 1e-4). It reaches the gradient, not the loss that is shown. 0: none.

    Raises:
        StrictDataclassError: The numbers do not fit together. Both are in the message.
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
        # Saving a model adds only the entry of its own class; a checkpoint shall load through all three.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_buddygpt.BuddyGPTConfig",
                "AutoModel": "modeling_buddygpt.BuddyGPTModel",
                "AutoModelForCausalLM": "modeling_buddygpt.BuddyGPTForCausalLM",
            },
        )
        super().__post_init__(**kwargs)

    # `@strict` calls every `validate_*` after each construction.

    def validate_architecture(self):
        """Refuse sizes that do not fit together."""
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

    def validate_latent_attention(self):
        """Refuse multi-head latent attention that lacks a size or is mixed with grouped-query attention."""
        sizes = ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        if self.kv_lora_rank is None:
            given = [name for name in ("q_lora_rank", *sizes) if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} ({getattr(self, given[0])}) needs kv_lora_rank, which is None")
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
            raise ValueError("use_qk_norm (True) must be False in latent attention: its latents are normalised")

    def validate_experts(self):
        """Refuse experts that cannot be chosen, grouped or trained."""
        if self.n_soft_experts is not None:
            self._require_at_least("n_soft_experts", 1)
            self._require_at_least("moe_intermediate_size", 1)
            if self.n_routed_experts is not None:
                raise ValueError(
                    f"n_soft_experts ({self.n_soft_experts}) and n_routed_experts ({self.n_routed_experts}): give one"
                )
        if self.n_routed_experts is None:
            for name in ("num_experts_per_tok", "n_shared_experts", "first_k_dense_replace", "aux_loss_alpha",
                         "bias_update_speed"):  # fmt: skip
                if getattr(self, name):
                    raise ValueError(f"{name} ({getattr(self, name)}) needs n_routed_experts, which is None")
            if self.moe_intermediate_size is not None and self.n_soft_experts is None:
                raise ValueError(
                    f"moe_intermediate_size ({self.moe_intermediate_size}) needs n_routed_experts or n_soft_experts"
                )
            return
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            self._require_at_least(name, 1)
        for name in ("n_shared_experts", "first_k_dense_replace"):
            self._require_at_least(name, 0)
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func ({self.scoring_func!r}) must be 'softmax' or 'sigmoid'")
        group_size, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or group_size < 2:
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
                "num_experts_per_tok (1) with norm_topk_prob (True): the one weight would always be 1 and the router "
                "would get no gradient; set norm_topk_prob to false"
            )

    def _require_at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None or value < least:
            raise ValueError(f"{name} ({value}) must be at least {least}")
