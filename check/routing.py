"""What a router of a mixture of experts should choose, written plainly, token by token."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RoutingRule:
    """How scores become a choice. `bias` (E) takes part in the choice alone."""

    sigmoid: bool
    bias: list[float] | None
    chosen: int
    groups: int
    chosen_groups: int
    normalise: bool
    factor: float


def routing_rule(router: nn.Module, config, chosen: int) -> RoutingRule | None:
    """The rule of BuddyGPT, DeepSeek-V3, GLM-4-MoE and Qwen3-MoE routers, read from the config's standard fields. None
    where the config names another."""
    config = config.get_text_config()
    normalise = getattr(config, "norm_topk_prob", None)
    if normalise is None or getattr(config, "topk_method", "noaux_tc") != "noaux_tc":
        return None
    bias = getattr(router, "e_score_correction_bias", None)
    return RoutingRule(
        sigmoid=getattr(config, "scoring_func", "softmax" if bias is None else "sigmoid") == "sigmoid",
        bias=None if bias is None else bias.tolist(),
        chosen=chosen,
        groups=getattr(config, "n_group", None) or 1,
        chosen_groups=getattr(config, "topk_group", None) or 1,
        normalise=normalise,
        factor=getattr(config, "routed_scaling_factor", None) or 1.0,
    )


def expected_weights(logits: torch.Tensor, rule: RoutingRule) -> list[torch.Tensor]:
    """Logits (N, E) -> for each token the weight of every expert (E), 0 where it is not chosen."""
    all_scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    return [_expected_weights(scores, rule) for scores in all_scores.tolist()]


def _expected_weights(scores: list[float], rule: RoutingRule) -> torch.Tensor:
    biased = [score + bias for score, bias in zip(scores, rule.bias or [0.0] * len(scores), strict=True)]
    size = len(scores) // rule.groups
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    groups.sort(key=lambda group: sum(sorted(biased[expert] for expert in group)[-2:]), reverse=True)
    candidates = [expert for group in groups[: rule.chosen_groups] for expert in group]
    best = sorted(candidates, key=lambda expert: biased[expert], reverse=True)[: rule.chosen]
    total = sum(scores[expert] for expert in best) if rule.normalise else 1.0
    weights = torch.zeros(len(scores))
    for expert in best:
        weights[expert] = scores[expert] / total * rule.factor
    return weights


def recorded_routing(model: nn.Module, ids: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor, ...]]:
    """Run the model. Returns (router, logits (N, E), weights (N, k), indices (N, k)) for every module that returns
    such a triple."""
    records = []

    def record(module, inputs, output):
        if isinstance(output, tuple) and len(output) == 3 and all(isinstance(each, torch.Tensor) for each in output):
            logits, weights, indices = output
            if indices.dtype == torch.long and indices.ndim == 2 and weights.shape == indices.shape:
                records.append((module, logits.float(), weights, indices))

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    try:
        with torch.no_grad():
            model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return records
