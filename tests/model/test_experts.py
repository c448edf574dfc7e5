"""Experts are chosen as the papers say, balanced, causal, and run without waiting for the host."""

import pytest
import torch
from tiny_models import MLA, SIZES, VARIANTS, make_model, random_ids
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.integrations import moe as transformers_moe

from buddygpt.model import BuddyGPTConfig
from buddygpt.model.modeling_buddygpt import BuddyGPTExperts, BuddyGPTTopkRouter

ROUTED = [name for name in VARIANTS if "n_routed_experts" in VARIANTS[name]]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def route_by_hand(scores: list[float], bias: list[float], config: BuddyGPTConfig) -> dict[int, float]:
    """Return {expert: weight} for one token, in plain Python (DeepSeek-V3, section 2.1.2)."""
    choice = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = len(scores) // config.n_group
    groups = [range(start, start + size) for start in range(0, len(scores), size)]
    groups.sort(key=lambda group: -sum(sorted((choice[i] for i in group), reverse=True)[:2]))
    allowed = [i for group in groups[: config.topk_group] for i in group]
    chosen = sorted(allowed, key=lambda i: -choice[i])[: config.num_experts_per_tok]
    total = sum(scores[i] for i in chosen) if config.norm_topk_prob else 1.0
    return {i: scores[i] / total * config.routed_scaling_factor for i in chosen}


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_the_router_chooses_as_by_hand(scoring_func, groups, norm):
    fields = dict(scoring_func=scoring_func, n_group=groups[0], topk_group=groups[1], norm_topk_prob=norm)
    config = BuddyGPTConfig(**SIZES | VARIANTS["gqa-moe"] | fields, routed_scaling_factor=2.5)
    router = BuddyGPTTopkRouter(config)
    torch.manual_seed(0)
    nn.init.normal_(router.weight)
    nn.init.normal_(router.e_score_correction_bias, std=0.2)
    logits, weights, indices = router(torch.randn(50, config.hidden_size))
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    for row in range(50):
        expected = route_by_hand(scores[row].tolist(), router.e_score_correction_bias.tolist(), config)
        found = dict(zip(indices[row].tolist(), weights[row].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ROUTED)
def test_implementations_agree_forward_and_backward(variant):
    ids, results = random_ids(2, 32), {}
    for implementation in IMPLEMENTATIONS:
        model = make_model(**VARIANTS[variant], experts_implementation=implementation)
        output = model(ids, labels=ids)
        output.loss.backward()
        results[implementation] = [output.logits, *(parameter.grad for parameter in model.parameters())]
    for implementation in IMPLEMENTATIONS[1:]:
        for found, expected in zip(results[implementation], results["eager"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=implementation)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*ROUTED, "mla", "soft-moe"])
def test_a_training_step_never_waits_for_the_host(variant):
    """Fake tensors have no values, so everything that reads one (`.item()`, `.cpu()`, `nonzero`) raises."""
    sizes = SIZES | VARIANTS[variant] | (dict(aux_loss_alpha=0.01) if variant in ROUTED else {})
    ids = torch.zeros(2, 16, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(BuddyGPTConfig(**sizes), dtype=torch.bfloat16)
        model(ids, labels=ids, use_cache=False).loss.backward()
        if variant in ROUTED:  # the loop over experts does wait
            model.set_experts_implementation("eager")
            with pytest.raises(DynamicOutputShapeException):
                model(ids, labels=ids, use_cache=False)


def test_autocast_reaches_the_experts_and_spares_the_router(monkeypatch):
    dtypes = []

    def grouped_mm(tokens, weight, *args, original=transformers_moe._grouped_mm, **kwargs):
        dtypes.append((tokens.dtype, weight.dtype))
        return original(tokens, weight, *args, **kwargs)

    monkeypatch.setattr(transformers_moe, "_grouped_mm", grouped_mm)
    model, ids = make_model(**VARIANTS["mla-moe"]), random_ids(2, 16)
    expected = model(ids, output_router_logits=True)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids, output_router_logits=True)
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)}
    assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    assert (output.logits - expected.logits).norm() < 0.1 * expected.logits.norm()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


def test_the_balance_loss_describes_the_routing_that_took_place():
    fields = VARIANTS["mla-moe"] | dict(first_k_dense_replace=2, aux_loss_alpha=0.5)
    model, ids = make_model(**fields), random_ids(2, 40)
    output = model(ids, labels=ids, output_router_logits=True)
    config, (logits,) = model.config, output.router_logits
    bias = model.model.layers[2].mlp.gate.e_score_correction_bias.tolist()
    expected = 0.0
    for row in logits.sigmoid().view(2, 40, -1).tolist():  # one layer of experts: eq. 17-20 by hand
        counts, means = [0.0] * 8, [0.0] * 8
        for scores in row:
            for expert in route_by_hand(scores, bias, config):
                counts[expert] += 1
            means = [mean + score / sum(scores) / 40 for mean, score in zip(means, scores, strict=True)]
        expected += sum(8 / 3 * count / 40 * mean for count, mean in zip(counts, means, strict=True)) / 2
    assert output.aux_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_changes_the_gradient_and_not_the_loss():
    ids, gradients, losses = random_ids(2, 40), [], []
    for alpha in (0.0, 0.5):
        model = make_model(**VARIANTS["gqa-moe"], aux_loss_alpha=alpha)
        output = model(ids, labels=ids)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(model.model.layers[1].mlp.gate.weight.grad)
    model = make_model(**VARIANTS["gqa-moe"], aux_loss_alpha=0.5)
    model(ids, labels=ids).aux_loss.mul(0.5).backward()
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1] - gradients[0], model.model.layers[1].mlp.gate.weight.grad)
    assert (gradients[1] - gradients[0]).norm() > 0.1 * gradients[0].norm()


def test_the_balance_loss_is_the_same_accumulated_and_blind_to_padding():
    model, ids = make_model(**VARIANTS["mla-moe"], aux_loss_alpha=0.5), random_ids(4, 20)
    labels = ids.clone()
    labels[0, :15] = -100
    items = int((labels[:, 1:] != -100).sum())
    whole = model(ids, labels=labels, num_items_in_batch=items).aux_loss
    rows = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=items).aux_loss for i in range(4)]
    torch.testing.assert_close(sum(rows), whole)
    padded = torch.cat((ids, torch.zeros(4, 7, dtype=torch.long)), dim=1)
    padded_labels = torch.cat((labels, torch.full((4, 7), -100)), dim=1)
    mask = (torch.arange(27) < 20).long().expand(4, -1)
    output = model(padded, labels=padded_labels, attention_mask=mask, num_items_in_batch=items)
    torch.testing.assert_close(output.aux_loss, whole)


@pytest.mark.slow
def test_descending_the_balance_loss_balances():
    ids = random_ids(8, 64)
    fields = VARIANTS["gqa-moe"] | dict(first_k_dense_replace=2, aux_loss_alpha=1.0)
    model = make_model(**fields)
    before = model(ids, labels=ids).aux_loss.item()
    optimizer = torch.optim.SGD([model.model.layers[2].mlp.gate.weight], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        output = model(ids, labels=ids)
        output.aux_loss.backward()
        optimizer.step()
    assert before > 1.1 > output.aux_loss.item() > 0.9  # 1 where all experts are used alike


class PublishedSoftMoE(nn.Module):
    """The order of operations of Steel-LLM's published layer: one slot per expert, filled by a softmax over tokens."""

    def __init__(self, config: BuddyGPTConfig):
        super().__init__()
        self.slots = nn.Linear(config.hidden_size, config.n_soft_experts, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.slots(hidden_states)  # (B, T, E)
        filled = logits.softmax(dim=1).mT @ hidden_states  # over the sequence: each slot is a mean of all tokens
        return logits.softmax(dim=2) @ torch.tanh(filled)


@pytest.mark.parametrize("published", [True, False])
def test_the_published_soft_mixture_leaks_and_ours_does_not(published):
    model, ids = make_model(**VARIANTS["soft-moe"]), random_ids(1, 16)
    if published:
        for layer in model.model.layers:
            layer.mlp = PublishedSoftMoE(model.config)
            nn.init.normal_(layer.mlp.slots.weight, std=0.2)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % SIZES["vocab_size"]
    moved = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert moved[-1] > 0.01
    assert (moved[:-1] > 1e-4).all() if published else (moved[:-1] == 0).all()
    whole, alone = model(ids).logits[:, :8], model(ids[:, :8]).logits  # so it cannot decode with a cache either
    assert ((whole - alone).abs().max() > 1e-3) == published


def test_the_soft_mixture_is_what_it_says():
    model = make_model(**VARIANTS["soft-moe"])
    layer, tokens = model.model.layers[0].mlp, torch.randn(1, 5, 48)
    expected = torch.zeros(5, 48)
    for t, token in enumerate(tokens[0]):
        weights = layer.gate(token).softmax(-1)
        for e in range(3):
            gate, up = (layer.gate_up_proj[e] @ token).chunk(2)
            gate, down = (layer.gate_down_proj[e] @ (nn.functional.silu(gate) * up)).chunk(2)
            expected[t] += weights[e] * nn.functional.silu(gate) * down
    torch.testing.assert_close(layer(tokens)[0], expected, rtol=1e-4, atol=1e-5)


def test_experts_can_be_switched_by_name_and_a_wrong_name_is_refused():
    model = make_model(**MLA, **{k: v for k, v in VARIANTS["mla-moe"].items() if k not in MLA})
    assert any(isinstance(module, BuddyGPTExperts) for module in model.modules())
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="grouped_mm"):
        model.set_experts_implementation("fast")
