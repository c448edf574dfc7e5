"""The model under test: its config, weights and inputs, and its reduced form."""

import copy
import inspect
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from buddygpt.cli.errors import UserError
from buddygpt.cli.weights import require_all_weights
from buddygpt.model.presets import PRESETS, load_config


class Subject:
    """A model under test, in float32 on the CPU.

    Without `weights` the weights are random, and larger than at the start of training, because small and symmetric
    weights hide faults: matrices have a standard deviation of `hidden_size ** -0.5`, and norms, biases and selection
    biases get noise added to their ones and zeros.

    Args:
        config: Config of the model.
        build: Makes a newly initialized model of a config. None: `AutoModelForCausalLM.from_config`.
        weights: Checkpoint folder or Hub name. None: random weights.
        seed: Seed of random weights and inputs.
        trust_remote_code: Run code that comes with the config or weights.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        build: Callable[[PreTrainedConfig], PreTrainedModel] | None = None,
        weights: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        self.config = config
        self.build = build or self._build_by_config
        self.weights = weights
        self.seed = seed
        self.trust_remote_code = trust_remote_code

    def _build_by_config(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=self.trust_remote_code)

    def fresh_model(self) -> PreTrainedModel:
        """Return a newly initialized model, as at the start of training."""
        torch.manual_seed(self.seed)
        return self.build(copy.deepcopy(self.config)).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that all checks share. They restore its weights, mode and settings."""
        if self.weights is not None:
            return AutoModelForCausalLM.from_pretrained(
                self.weights, config=self.config, dtype=torch.float32, trust_remote_code=self.trust_remote_code
            ).eval()

        config = copy.deepcopy(self.config)
        text_config = config.get_text_config()
        text_config.initializer_range = text_config.hidden_size**-0.5
        torch.manual_seed(self.seed)
        model = self.build(config).eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                is_norm_or_bias = isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 1
                if is_norm_or_bias or name.endswith("correction_bias"):
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
        return model

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="buddygpt-check-")

    @cached_property
    def saved(self) -> Path:
        """A temporary folder that holds the saved `model`."""
        folder = Path(self._folder.name) / "saved_model"
        self.model.save_pretrained(folder)
        return folder

    def reload(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Load the saved model. What loading leaves uninitialized is NaN, instead of whatever the memory held."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # also fills new memory, see torch.utils.deterministic
        try:
            return type(self.model).from_pretrained(self.saved, dtype=dtype).eval()
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def takes(self, argument: str) -> bool:
        """Return True if the model's `forward` names this argument."""
        return argument in inspect.signature(self.model.forward).parameters

    def ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Return random token ids (rows, length)."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.randint(self.config.get_text_config().vocab_size, (rows, length), generator=generator)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Return float32 logits (B, T, V), computed without a cache."""
        return self.model(ids, use_cache=False, **kwargs).logits.float()

    def gradients(self, *batches: tuple[torch.Tensor, torch.Tensor], **kwargs) -> tuple[float, dict]:
        """Return the model's own loss and each parameter's gradient, summed over batches of (ids, labels)."""
        losses = []
        for ids, labels in batches:
            loss = self.model(ids, labels=labels, use_cache=False, **kwargs).loss
            loss.backward()
            losses.append(loss.item())
        return sum(losses), self.take_gradients()

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """Return the parameters' gradients by name, and remove them from the parameters."""
        gradients = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                gradients[name] = parameter.grad
        self.model.zero_grad(set_to_none=True)
        return gradients


def open_subject(
    name: str, reduced: bool = False, vocab_size: int | None = None, seed: int = 0, trust_remote_code: bool = False
) -> Subject:
    """Open the model that a user names.

    Args:
        name: A preset or a config JSON (random weights), or a checkpoint folder or Hub repository (its own weights).
        reduced: Check a small model of the same structure, with random weights.
        vocab_size: Replace the vocabulary size of a model with random weights.
        seed, trust_remote_code: See [`Subject`].

    Raises:
        UserError: There is no such model, it is not a causal language model, or it needs `trust_remote_code`.
    """
    has_random_weights = reduced or name in PRESETS or name.endswith(".json")
    if vocab_size is not None and not has_random_weights:
        raise UserError(
            f"vocab_size {vocab_size} does not fit the weights of {name}: leave it out, or check a reduced model"
        )
    overrides = {} if vocab_size is None else {"vocab_size": vocab_size}
    try:
        config = load_config(name, trust_remote_code=trust_remote_code, **overrides)
        if reduced:
            config = reduce_config(config)
        if has_random_weights:
            require_memory(config, trust_remote_code)
        else:
            require_all_weights(name, trust_remote_code)
        subject = Subject(
            config,
            weights=None if has_random_weights else name,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        subject.model  # noqa: B018 - build it here, so that a model that cannot be built is a user error
        return subject
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot open the model {name}: {error}") from error


def require_memory(config: PreTrainedConfig, trust_remote_code: bool) -> None:
    """Raise UserError if the weights of a model do not fit into memory; the system would kill the process."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    needed, available = 4 * model.num_parameters(), psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"the weights take {needed / 2**30:,.1f} GiB, but {available / 2**30:,.1f} GiB of memory are free; "
            "check a reduced model (--reduced)"
        )


def reduce_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config of a few thousand parameters with the same structure.

    It keeps the kinds of layers, the groups of heads and of experts, the experts per token, and which ranks are used.
    Fields are recognized by their standard names. Of a model that also reads images, it is the text model.

    Raises:
        UserError: The model has no such sizes, for example no attention.
    """
    config = config.get_text_config()
    old = config.to_dict()
    for name, own_name in config.attribute_map.items():  # GPT-2 calls `num_hidden_layers` `n_layer`
        if own_name in old:
            old[name] = old.pop(own_name)
    for name in ("num_hidden_layers", "num_attention_heads", "vocab_size"):
        if name not in old:
            raise UserError(f"a `{config.model_type}` model cannot be reduced: its config has no {name}")
    vocab_size = min(old["vocab_size"], 512)
    new = {
        **_reduced_depth(old),
        **_reduced_attention(old),
        **_reduced_experts(old),
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "vocab_size": vocab_size,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(old.get(name), int) and old[name] >= vocab_size:
            new[name] = vocab_size - 1

    reduced = dict(old)
    for name, value in new.items():
        if old.get(name) is not None:  # the architecture has this field and uses it
            reduced[name] = value
    return type(config).from_dict(reduced)


def _reduced_depth(old: dict) -> dict:
    """Return two layers, or as many as needed to include every kind of layer. Cut lists with one entry per layer."""
    layers = old["num_hidden_layers"]
    dense_layers = old.get("first_k_dense_replace") or 0
    if dense_layers >= layers:  # no layer has experts
        depth = dense_layers = 2
    else:
        depth = max(2, dense_layers + 1)
    for kind in set(old.get("layer_types") or []):
        depth = max(depth, old["layer_types"].index(kind) + 1)
    depth = min(layers, depth)

    new = {"num_hidden_layers": depth, "first_k_dense_replace": dense_layers, "max_window_layers": depth}
    for name, value in old.items():
        if isinstance(value, list) and len(value) == layers:
            new[name] = value[:depth]
    return new


def _reduced_attention(old: dict) -> dict:
    """Keep the ratio of query heads to key/value heads. Heads are 16 wide (16 + 8 in latent attention)."""
    heads = old["num_attention_heads"]
    kv_heads = old.get("num_key_value_heads") or heads
    new_kv_heads = 4 if kv_heads == heads else min(kv_heads, 2)
    new_heads = new_kv_heads * heads // kv_heads
    new = {"num_attention_heads": new_heads, "num_key_value_heads": new_kv_heads, "hidden_size": 16 * new_heads}
    if old.get("dim_model_base") is not None:  # MiniCPM divides its logits by hidden_size / dim_model_base
        new["dim_model_base"] = max(1, round(old["dim_model_base"] * new["hidden_size"] / old["hidden_size"]))
    if old.get("kv_lora_rank") is None:
        new["head_dim"] = 16
    else:
        new |= {"kv_lora_rank": 24, "q_lora_rank": 40, "v_head_dim": 12}
        new |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "head_dim": 8, "qk_head_dim": 24}
    return new


def _reduced_experts(old: dict) -> dict:
    """Keep the number of groups and of experts per token. Twice as many experts as a token needs, at least 4."""
    groups = old.get("n_group") or 1
    chosen_groups = old.get("topk_group") or 1
    chosen = old.get("num_experts_per_tok") or 1
    experts_per_group = max(2, -(-2 * chosen // chosen_groups))  # rounded up
    experts = max(groups * experts_per_group, 4)
    new = {}
    for name in ("n_routed_experts", "num_experts", "num_local_experts", "n_soft_experts"):
        if old.get(name) is not None:
            new[name] = min(old[name], experts)
    return new
