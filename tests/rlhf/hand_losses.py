"""The losses of all recipes after pretraining, computed by hand from the batches that the trainers were fed.

Each sequence is computed alone, without padding and packing. Formulas: DPO arXiv:2305.18290 (7), KTO arXiv:2402.01306
(7, 8), ORPO arXiv:2403.07691 (6, 7), SimPO arXiv:2405.14734 (6), DAPO arXiv:2503.14476 (8).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel


def share_of_even_ids(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that the answers of random models differ in."""
    return [sum(token % 2 == 0 for token in ids) / 8 for ids in completion_ids]


class Sequence(NamedTuple):
    ids: torch.Tensor  # (T)
    counts: torch.Tensor  # (T), bool: carries loss


def read_batch(batch: dict[str, torch.Tensor]) -> dict[str, list[Sequence]]:
    """Return the sequences of a batch, without padding and unpacked, by kind."""
    if "chosen_input_ids" in batch:
        names = ("input_ids", "attention_mask", "labels")
        return {
            key: list(without_padding(*(batch[f"{key}_{name}"] for name in names))) for key in ("chosen", "rejected")
        }
    if "prompt_ids" in batch:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        counts = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)
        return {"answers": list(without_padding(ids, mask, counts.masked_fill(counts == 0, -100)))}
    ids = batch["input_ids"]
    if "position_ids" in batch:
        rows = zip(ids, batch["labels"], batch["position_ids"], strict=True)
        return {"rows": [sequence for row in rows for sequence in unpacked(*row)]}
    found = {}
    for prefix in ("", "KL_"):
        if f"{prefix}input_ids" in batch:
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            counts = batch.get(f"{prefix}completion_mask", torch.ones_like(ids))
            labels = batch["labels"] if "labels" in batch else counts.masked_fill(counts == 0, -100)
            found[prefix or "rows"] = list(without_padding(ids, mask, labels))
    return found


def unpacked(ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> Iterator[Sequence]:
    """Yield the documents of a packed row; a single token with position 0 is padding."""
    starts = (positions == 0).nonzero()[:, 0].tolist()
    for start, end in pairwise([*starts, len(ids)]):
        if end - start > 1:
            yield Sequence(ids[start:end], labels[start:end] != -100)


def without_padding(ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Iterator[Sequence]:
    for row, real, marked in zip(ids, mask.bool(), labels != -100, strict=True):
        yield Sequence(row[real], marked[real])


def log_probs(model: PreTrainedModel, sequence: Sequence) -> torch.Tensor:
    """Return the log-probabilities of all tokens at the positions that carry loss, (positions, vocabulary)."""
    return model(sequence.ids[None]).logits[0, :-1].log_softmax(-1)[sequence.counts[1:]]


def answer_log_probs(model: PreTrainedModel, sequence: Sequence) -> torch.Tensor:
    ids = sequence.ids[1:][sequence.counts[1:]]
    return log_probs(model, sequence).gather(-1, ids[:, None])[:, 0]


def sums(model: PreTrainedModel, rows: list[Sequence]) -> torch.Tensor:
    return torch.stack([answer_log_probs(model, row).sum() for row in rows])


def means(model: PreTrainedModel, rows: list[Sequence]) -> torch.Tensor:
    return torch.stack([answer_log_probs(model, row).mean() for row in rows])


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def sft_loss(model, start, teacher, batches) -> torch.Tensor:
    rows = [row for batch in batches for row in read_batch(batch)["rows"]]
    return -torch.cat([answer_log_probs(model, row) for row in rows]).mean()


def distill_loss(model, start, teacher, batches) -> torch.Tensor:
    rows = [row for batch in batches for row in read_batch(batch)["rows"]]
    return torch.cat([divergence(log_probs(teacher, row), log_probs(model, row)) for row in rows]).mean()


def on_policy_loss(model, start, teacher, batches) -> torch.Tensor:
    rows = [row for batch in batches for row in read_batch(batch)["answers"]]
    return torch.cat([divergence(log_probs(model, row), log_probs(teacher, row)) for row in rows]).mean()


def both_answers(batches) -> tuple[list[Sequence], list[Sequence]]:
    chosen, rejected = [], []
    for batch in batches:
        found = read_batch(batch)
        if "chosen" in found:
            chosen, rejected = chosen + found["chosen"], rejected + found["rejected"]
        else:
            half = len(found["rows"]) // 2
            chosen, rejected = chosen + found["rows"][:half], rejected + found["rows"][half:]
    return chosen, rejected


def dpo_loss(model, start, teacher, batches) -> torch.Tensor:
    chosen, rejected = both_answers(batches)
    gain = (sums(model, chosen) - sums(start, chosen)) - (sums(model, rejected) - sums(start, rejected))
    return -logsigmoid(0.1 * gain).mean()


def kto_loss(model, start, teacher, batches) -> torch.Tensor:
    found = [read_batch(batch) for batch in batches]
    strange = [sums(model, each["KL_"]) - sums(start, each["KL_"]) for each in found]
    kl = torch.stack([each.mean() for each in strange]).mean().detach().clamp(min=0)
    rows = [row for each in found for row in each["rows"]]
    good = torch.cat([batch["label"] for batch in batches]).bool()
    sign = torch.where(good, 1.0, -1.0)
    return (1 - (0.1 * sign * (sums(model, rows) - sums(start, rows) - kl)).sigmoid()).mean()


def orpo_loss(model, start, teacher, batches) -> torch.Tensor:
    chosen, rejected = (means(model, rows) for rows in both_answers(batches))
    log_odds = [each - (1 - each.exp()).log() for each in (chosen, rejected)]
    return -chosen.mean() - 0.1 * logsigmoid(log_odds[0] - log_odds[1]).mean()


def simpo_loss(model, start, teacher, batches) -> torch.Tensor:
    chosen, rejected = (means(model, rows) for rows in both_answers(batches))
    return -logsigmoid(2.0 * (chosen - rejected) - 1.0).mean()


def reward_loss(model, start, teacher, batches) -> torch.Tensor:
    chosen, rejected = (
        torch.stack([model(row.ids[None]).logits[0, 0] for row in rows]) for rows in both_answers(batches)
    )
    return -logsigmoid(chosen - rejected).mean()


def grpo_loss(model, start, teacher, batches) -> torch.Tensor:
    rows = [row for batch in batches for row in read_batch(batch)["answers"]]
    rewards = share_of_even_ids([row.ids[row.counts].tolist() for row in rows])
    groups: dict[tuple[int, ...], list[float]] = {}  # of the answers to one question
    for row, reward in zip(rows, rewards, strict=True):
        groups.setdefault(tuple(row.ids[~row.counts].tolist()), []).append(reward)
    assert all(len(group) == 4 for group in groups.values()) and len({*rewards}) > 1
    losses = []
    for row, reward in zip(rows, rewards, strict=True):
        group = torch.tensor(groups[tuple(row.ids[~row.counts].tolist())])
        advantage = (reward - group.mean()) / (group.std() + 1e-4)
        new, old = answer_log_probs(model, row), answer_log_probs(start, row)
        ratio = (new - new.detach()).exp()  # 1; TRL weighs the KL divergence by it, too (use_bias_correction_kl)
        losses.append(-advantage * ratio + 0.04 * ratio * ((old - new).exp() - (old - new) - 1))
    return torch.cat(losses).mean()


LOSSES = {
    "sft": sft_loss,
    "sft-packed": sft_loss,
    "distill": distill_loss,
    "on-policy": on_policy_loss,
    "dpo": dpo_loss,
    "kto": kto_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
    "reward": reward_loss,
    "grpo": grpo_loss,
}
