"""Models with one fault each, most of them found in published code, which the checks must detect."""

from functools import wraps

import torch
from torch import nn
from transformers import DynamicCache

from buddygpt.model import BuddyGPTForCausalLM
from buddygpt.model import modeling_buddygpt as modeling


class Broken(BuddyGPTForCausalLM):
    """A BuddyGPT model whose modules of class `original` become modules of class `broken`."""

    original: type[nn.Module] | None = None
    broken: type[nn.Module] | None = None
    __module__ = BuddyGPTForCausalLM.__module__  # where transformers looks for the attention interface

    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            if self.original is not None and type(module) is self.original:
                module.__class__ = self.broken


def with_broken(original: type[nn.Module], broken: type[nn.Module]) -> type[Broken]:
    """Return a class of models that use `broken` instead of `original`."""
    return type("Broken", (Broken,), {"original": original, "broken": broken, "__module__": Broken.__module__})


class HeadsAsTime(modeling.BuddyGPTLatentAttention):
    """The output (B, H, T, D) is reshaped to (B, T, H x D) without the transpose: a token reads later ones."""

    def call_backend(self, *args, **kwargs):
        output, weights = super().call_backend(*args, **kwargs)
        batch, length, heads, width = output.shape
        return output.transpose(1, 2).reshape(batch, length, heads, width), weights


class IndexSummingRouter(modeling.BuddyGPTTopkRouter):
    """A group's score is the sum of its best experts' indices, `topk(2)[1]`, not of their scores."""

    def forward(self, hidden_states):
        config = self.config
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        scores = modeling.expert_scores(logits, config.scoring_func)
        choice = (scores + self.e_score_correction_bias).unflatten(-1, (config.n_group, -1))
        group_scores = choice.topk(2, dim=-1)[1].sum(-1)
        groups = group_scores.topk(config.topk_group, dim=-1).indices
        allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, groups, True)
        choice = choice.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        indices = choice.topk(config.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(1, indices)
        return logits, config.routed_scaling_factor * weights / weights.sum(-1, keepdim=True), indices


class SequenceSoftMoE(modeling.BuddyGPTSoftMoE):
    """Soft MoE as published (arXiv:2308.00951, used by Steel-LLM): experts see mixtures of all positions."""

    def forward(self, hidden_states):
        logits = self.gate(hidden_states)  # (B, T, E)
        slots = torch.einsum("bte,btc->bec", logits.softmax(1), hidden_states).transpose(0, 1)
        gate, up = (slots @ self.gate_up_proj.mT).chunk(2, dim=-1)
        gate, down = ((self.act_fn(gate) * up) @ self.gate_down_proj.mT).chunk(2, dim=-1)
        return torch.einsum("bte,ebc->btc", logits.softmax(-1), self.act_fn(gate) * down)


class CountingRotaryEmbedding(modeling.BuddyGPTRotaryEmbedding):
    """Positions count from 0; the values of position_ids are ignored."""

    def forward(self, hidden_states, position_ids):
        return super().forward(hidden_states, torch.arange(position_ids.shape[1]).expand_as(position_ids))


class SharpOnlyInSdpa(modeling.BuddyGPTAttention):
    """The scale of the scores is wrong in one backend."""

    def forward(self, *args, **kwargs):
        self.scaling = self.head_dim**-0.5 * (1.1 if self.config._attn_implementation == "sdpa" else 1.0)
        return super().forward(*args, **kwargs)


class LoudEagerExperts(modeling.BuddyGPTExperts):
    """The output is doubled if the experts run one by one."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (2 if self.config._experts_implementation == "eager" else 1)


class CallDependentMLP(modeling.BuddyGPTMLP):
    """Running it again, as checkpointing does, gives another result, because it counts its calls."""

    calls = 0

    def forward(self, hidden_states):
        self.calls += 1
        return super().forward(hidden_states) * (1 + 0.01 * (self.calls % 2 if self.training else 0))


class Bfloat16RotaryEmbedding(modeling.BuddyGPTRotaryEmbedding):
    """Angles in the model's dtype: in bfloat16, 4095 and 4080 are one position."""

    def forward(self, hidden_states, position_ids):
        angles = position_ids[..., None].to(hidden_states.dtype) * self.inv_freq.to(hidden_states.dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


class NoisyMLP(modeling.BuddyGPTMLP):
    """Random noise that ignores the seed."""

    generator = torch.Generator()

    def forward(self, hidden_states):
        output = super().forward(hidden_states)
        return output + 1e-7 * torch.randn(output.shape, generator=self.generator, dtype=output.dtype)


class MeanOfEachStep(Broken):
    """num_items_in_batch is ignored: the loss is the mean of each step, so short rows weigh as much as long ones."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, num_items_in_batch=None, **kwargs):
        return super().forward(*args, **kwargs)


class UnshiftedLoss(Broken):
    """The loss is that of the current token instead of the next one."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, labels=None, **kwargs):
        if labels is not None:
            kwargs["shift_labels"] = labels
        return super().forward(*args, labels=labels, **kwargs)


class IgnoredPositions(Broken):
    """position_ids are accepted and ignored, so packed documents see each other."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, position_ids=None, **kwargs):
        return super().forward(*args, **kwargs)


class IgnoredMask(Broken):
    """attention_mask is accepted and ignored, so padding is read."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, attention_mask=None, **kwargs):
        return super().forward(*args, **kwargs)


class IgnoredCache(Broken):
    """Every call starts from an empty cache."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, past_key_values=None, **kwargs):
        return super().forward(*args, **kwargs)


class ForgetfulCache(Broken):
    """The cache loses its newest token before each step."""

    @wraps(BuddyGPTForCausalLM.forward)
    def forward(self, *args, past_key_values: DynamicCache | None = None, **kwargs):
        if past_key_values is not None:
            past_key_values.crop(-1)
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


class UnsetWhenLoaded(Broken):
    """A table that neither the file nor `_init_weights` sets: after loading it is what the memory was (MiniMind)."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("table", torch.linspace(0.5, 1.5, config.hidden_size), persistent=False)
        self.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * self.table)


class UntiedWhenLoaded(Broken):
    """After loading, the head is a copy of the embedding."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        model = super().from_pretrained(*args, **kwargs)
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        return model


class WildStart(Broken):
    """The embedding is initialized with a standard deviation of 1, torch's default."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.normal_(self.model.embed_tokens.weight)


class UnusedModule(Broken):
    """A layer that no output passes through."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Linear(8, 8)
