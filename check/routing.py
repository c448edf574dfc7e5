"""The expected choice of a mixture-of-experts router, computed token by token in plain Python."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class RoutingRule:
    """How a router turns scores into a choice of experts.

    Attributes:
        sigmoid: Scores are a sigmoid of the logits, not a softmax.
        bias: Added to each of the E scores for the choice only; not part of the weights. None: no bias.
        chosen: Number of experts per token (k).
        groups: Number of groups of experts.
        chosen_groups: Number of groups from which a token chooses.
        normalize: Divide the chosen experts' scores by their sum.
        factor: Factor on the weights.
    """

    sigmoid: bool
    bias: list[float] | None
    chosen: int
    groups: int
    chosen_groups: int
    normalize: bool
    factor: float


def routing_rule(router: nn.Module, config, chosen: int) -> RoutingRule | None:
    """Read the rule of a BuddyGPT, DeepSeek-V3, GLM-4-MoE or Qwen3-MoE router from the config's standard fields.

    Returns:
        None if the config describes another rule.
    """
    config = config.get_text_config()
    normalize = getattr(config, "norm_topk_prob", None)
    if normalize is None or getattr(config, "topk_method", "noaux_tc") != "noaux_tc":
        return None
    bias = getattr(router, "e_score_correction_bias", None)
    # Stock configs have no `scoring_func`: DeepSeek-V3 and GLM-4-MoE have a bias and use sigmoid, Qwen3-MoE softmax.
    default_function = "softmax" if bias is None else "sigmoid"
    return RoutingRule(
        sigmoid=getattr(config, "scoring_func", default_function) == "sigmoid",
        bias=None if bias is None else bias.tolist(),
        chosen=chosen,
        groups=getattr(config, "n_group", None) or 1,
        chosen_groups=getattr(config, "topk_group", None) or 1,
        normalize=normalize,
        factor=getattr(config, "routed_scaling_factor", None) or 1.0,
    )


def expected_weights(logits: torch.Tensor, rule: RoutingRule) -> list[torch.Tensor]:
    """Return the weight of every expert (E,) for each token of logits (N, E); 0 if an expert is not chosen."""
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    return [_expected_weights_of_token(token_scores, rule) for token_scores in scores.tolist()]


def _expected_weights_of_token(scores: list[float], rule: RoutingRule) -> torch.Tensor:
    biased = scores
    if rule.bias is not None:
        biased = [score + bias for score, bias in zip(scores, rule.bias, strict=True)]

    # Choose groups by the sum of their two best experts.
    group_size = len(scores) // rule.groups
    groups = [range(start, start + group_size) for start in range(0, len(scores), group_size)]

    def group_score(group: range) -> float:
        return sum(sorted(biased[expert] for expert in group)[-2:])

    groups.sort(key=group_score, reverse=True)
    candidates = [expert for group in groups[: rule.chosen_groups] for expert in group]

    # Choose experts of these groups.
    best = sorted(candidates, key=lambda expert: biased[expert], reverse=True)[: rule.chosen]

    # The weights are the scores without the bias.
    total = sum(scores[expert] for expert in best) if rule.normalize else 1.0
    weights = torch.zeros(len(scores))
    for expert in best:
        weights[expert] = scores[expert] / total * rule.factor
    return weights


def recorded_routing(model: nn.Module, ids: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor, ...]]:
    """Run the model and record what its routers return.

    A router is a module that returns logits (N, E), weights (N, k) and indices (N, k).

    Returns:
        A tuple (router, logits, weights, indices) for each call of a router.
    """
    records = []

    def record(module, inputs, output):
        if not (isinstance(output, tuple) and len(output) == 3):
            return
        if not all(isinstance(each, torch.Tensor) for each in output):
            return
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
