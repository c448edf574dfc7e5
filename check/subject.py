"""The model under test: where its config and weights come from, its reduced shape, and its inputs."""

import copy
import inspect
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from buddygpt.cli.errors import UserError
from buddygpt.model.presets import PRESETS, load_config


class Subject:
    """A model under test, in float32 on the CPU.

    Without `weights` they are random, and wilder than training starts from, because small, symmetric weights hide
    faults: matrices have a standard deviation of `hidden_size ** -0.5`, and norms, biases and the routers' selection
    biases are moved from their ones and zeros.

    Args:
        config: The model's config.
        build: Makes a new model of a config, as training would start from. None: what `AutoModelForCausalLM` makes.
        weights: Checkpoint folder or Hub name. None: random weights.
        seed: Of random weights and inputs.
        trust_remote_code: Whether code beside the config or weights may run.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        build: Callable[[PreTrainedConfig], PreTrainedModel] | None = None,
        weights: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ):
        self.config, self.weights, self.seed = config, weights, seed
        self.trust_remote_code = trust_remote_code
        self.build = build or self._build_by_config

    def _build_by_config(self, config: PreTrainedConfig) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=self.trust_remote_code)

    def fresh_model(self) -> PreTrainedModel:
        """A new model as training would start from."""
        torch.manual_seed(self.seed)
        return self.build(copy.deepcopy(self.config)).eval()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model all checks share. They leave its weights, mode and settings as they found them."""
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
                if (isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 1) or name.endswith("correction_bias"):
                    tensor.add_(torch.randn_like(tensor), alpha=0.1)
        return model

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="buddygpt-check-")

    @cached_property
    def saved(self) -> Path:
        """A temporary folder that `model` has been saved to."""
        folder = Path(self._folder.name) / "saved_model"
        self.model.save_pretrained(folder)
        return folder

    def reload(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The saved model, loaded again."""
        return type(self.model).from_pretrained(self.saved, dtype=dtype).eval()

    def takes(self, argument: str) -> bool:
        """Whether the model's `forward` names this argument."""
        return argument in inspect.signature(self.model.forward).parameters

    def ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random token ids (rows, length), each row different."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.randint(self.config.get_text_config().vocab_size, (rows, length), generator=generator)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Logits (B, T, V) in float32, without a cache unless asked for."""
        return self.model(ids, **{"use_cache": False} | kwargs).logits.float()

    def gradients(self, *batches: tuple[torch.Tensor, torch.Tensor], **kwargs) -> tuple[float, dict]:
        """Add up the model's own loss over batches of (ids, labels). Returns it and each parameter's gradient."""
        losses = []
        for ids, labels in batches:
            loss = self.model(ids, labels=labels, use_cache=False, **kwargs).loss
            loss.backward()
            losses.append(loss.item())
        return sum(losses), self.take_gradients()

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients that the parameters hold, by name. They hold none then."""
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.zero_grad(set_to_none=True)
        return gradients


def open_subject(
    name: str, reduced: bool = False, vocab_size: int | None = None, seed: int = 0, trust_remote_code: bool = False
) -> Subject:
    """Find the model that a user names.

    Args:
        name: A preset or a config JSON (random weights), a checkpoint folder or a Hub repository (its weights).
        reduced: Check a small model of the same structure, with random weights.
        vocab_size: Another vocabulary, for random weights.
        seed, trust_remote_code: See [`Subject`].

    Raises:
        UserError: There is no such model, it is not a causal language model, or it needs `trust_remote_code`.
    """
    random = reduced or name in PRESETS or name.endswith(".json")
    if vocab_size is not None and not random:
        raise UserError(f"--vocab_size {vocab_size} does not go with the weights of {name}; add --reduced or drop it")
    try:
        overrides = {} if vocab_size is None else {"vocab_size": vocab_size}
        config = load_config(name, trust_remote_code=trust_remote_code, **overrides)
        config = reduce_config(config) if reduced else config
        subject = Subject(config, None, None if random else name, seed, trust_remote_code)
        subject.model  # noqa: B018 - built here, so that what cannot be built is the user's mistake
        return subject
    except Exception as error:
        raise UserError(f"MODEL {name} cannot be opened: {error}") from error


def reduce_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Shrink a config to a few thousand parameters and keep its structure: dense and expert layers, groups of heads
    and of experts, experts per token, ranks where there are ranks. Fields go by their standard names."""
    old = config.to_dict()
    new = _reduced_depth(old) | _reduced_attention(old) | _reduced_experts(old)
    new |= {"intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    new["vocab_size"] = vocab_size = min(old["vocab_size"], 512)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(old.get(name), int) and old[name] >= vocab_size:
            new[name] = vocab_size - 1
    known = {name: value for name, value in new.items() if old.get(name) is not None}
    return type(config).from_dict(old | known)


def _reduced_depth(old: dict) -> dict:
    """Two layers, or as many as it takes to see every kind. Lists with an entry per layer are cut."""
    layers, dense = old["num_hidden_layers"], old.get("first_k_dense_replace") or 0
    if dense >= layers:
        depth, dense = 2, 2
    else:
        depth = max(2, dense + 1)
    kinds = old.get("layer_types") or [None]
    depth = min(layers, max(depth, *(kinds.index(kind) + 1 for kind in set(kinds))))
    lists = {name: value[:depth] for name, value in old.items() if isinstance(value, list) and len(value) == layers}
    return lists | {"num_hidden_layers": depth, "first_k_dense_replace": dense, "max_window_layers": depth}


def _reduced_attention(old: dict) -> dict:
    """As many query heads per key/value head as before, of 16 (16 + 8 in latent attention)."""
    heads = old["num_attention_heads"]
    kv_heads = old.get("num_key_value_heads") or heads
    new_kv_heads = 4 if kv_heads == heads else min(kv_heads, 2)
    new_heads = new_kv_heads * heads // kv_heads
    sizes = {"num_attention_heads": new_heads, "num_key_value_heads": new_kv_heads, "hidden_size": 16 * new_heads}
    if old.get("kv_lora_rank") is None:
        return sizes | {"head_dim": 16}
    ranks = {"kv_lora_rank": 24, "q_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
    return sizes | ranks | {"head_dim": 8, "qk_head_dim": 24}


def _reduced_experts(old: dict) -> dict:
    """As many groups and experts per token as before, and twice the experts that a token needs."""
    groups, chosen_groups = old.get("n_group") or 1, old.get("topk_group") or 1
    chosen = old.get("num_experts_per_tok") or 1
    experts = groups * max(2, -(-2 * chosen // chosen_groups))
    names = ("n_routed_experts", "num_experts", "num_local_experts", "n_soft_experts")
    return {name: min(old[name], max(experts, 4)) for name in names if old.get(name) is not None}
