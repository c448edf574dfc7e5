"""The shape of a BuddyGPT model. Copied into every checkpoint, so it imports transformers and huggingface_hub only."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters


@strict
class BuddyGPTConfig(PreTrainedConfig):
    """Configuration of [`BuddyGPTModel`]. Field names follow Llama, Qwen and GLM-4-MoE; sizes are numbers of elements.

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
        attention_bias: Whether `q_proj`, `k_proj` and `v_proj` have a bias (as in Qwen2; `o_proj` never has).
        use_qk_norm: Whether queries and keys pass an RMSNorm over `head_dim` before RoPE (as in Qwen3).
        attention_dropout: Dropout of the attention weights in training.

    Raises:
        ValueError: The numbers do not fit together. Both are in the message.
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
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
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

    def validate_architecture(self):
        """Refuse numbers that do not fit together. Called by `@strict` after every construction."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even and at least 2: RoPE rotates pairs")
