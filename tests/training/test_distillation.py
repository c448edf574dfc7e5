"""Targets stand for the teacher's distribution: exact or unbiased, in the order of the rows, and checked when read."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_tokenizer import train_tiny_tokenizer
from torch import nn
from transformers import AutoTokenizer

from buddygpt.cli.errors import UserError
from buddygpt.training import teacher_targets
from buddygpt.training.distillation import require_same_vocabulary, sparse_divergence
from buddygpt.training.teacher_targets import (
    StoredTargets,
    Targets,
    describe_rows,
    number_targets,
    sample_targets,
    write_targets,
)

VOCABULARY = 40


@pytest.fixture
def models() -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    """The teacher's log-probabilities of 6 tokens, and the student's hidden states and head."""
    torch.manual_seed(0)
    log_probs = (2 * torch.randn(6, VOCABULARY)).log_softmax(-1)
    return log_probs, torch.randn(6, 8, requires_grad=True), nn.Linear(8, VOCABULARY, bias=False)


def dense_divergence(log_probs: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return (log_probs.exp() * (log_probs - student.log_softmax(-1))).sum(-1)


def test_the_loss_is_the_divergence_if_the_targets_have_the_whole_vocabulary(models, monkeypatch):
    monkeypatch.setattr("buddygpt.training.distillation.CHUNK", 4)
    log_probs, hidden_states, head = models
    targets = sample_targets(log_probs, top_k=VOCABULARY, samples=16)
    assert targets.token_ids.shape == (6, VOCABULARY)
    loss, expected = sparse_divergence(hidden_states, head, targets), dense_divergence(log_probs, head(hidden_states))
    torch.testing.assert_close(loss, expected, atol=2e-3, rtol=1e-3)  # weights are float16
    weights = (head.weight, hidden_states)
    gradients = zip(
        torch.autograd.grad(loss.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    )
    for gradient, other in gradients:
        torch.testing.assert_close(gradient, other, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("top_k", [1, 5])
def test_loss_and_gradient_are_unbiased(models, top_k):
    """The mean over 4,000 draws agrees with the whole distribution; the likely tokens alone do not."""
    log_probs, hidden_states, head = models
    generator = torch.Generator().manual_seed(1)
    repeated = log_probs.repeat(4000, 1)
    targets = sample_targets(repeated, top_k, 8, generator)
    assert torch.allclose(targets.weights.float().sum(-1), torch.ones(24000), atol=2e-3)

    logits = head(hidden_states).detach().requires_grad_()
    student = nn.Identity()
    losses = sparse_divergence(logits.repeat(4000, 1), student, targets).view(4000, 6)
    expected = dense_divergence(log_probs, logits)
    error = losses.std(0) / 4000**0.5
    assert ((losses.mean(0) - expected).abs() < 4 * error + 2e-3).all()
    gradient = torch.autograd.grad(losses.mean(0).sum(), logits)[0]
    wanted = torch.autograd.grad(expected.sum(), logits)[0]
    assert (gradient - wanted).abs().max() < 0.02

    likely = Targets(targets.token_ids[:6, :top_k], targets.weights[:6, :top_k], targets.entropy[:6])
    biased = torch.autograd.grad(sparse_divergence(logits, student, likely).sum(), logits)[0]
    assert (biased - wanted).abs().max() > 0.03


def test_a_certain_teacher_has_weight_for_one_token_only():
    log_probs = torch.full((1, VOCABULARY), -torch.inf)
    log_probs[0, 3] = 0.0
    targets = sample_targets(log_probs, 2, 4)
    assert targets.token_ids[0, 0] == 3 and targets.weights.sum() == 1 and targets.entropy == 0


def test_labels_become_the_numbers_of_targets():
    rows = Dataset.from_dict({
        "input_ids": [[5, 6, 7, 8], [5, 6, 7, 8, 9]],
        "labels": [[5, -100, 7, 8], [-100, 6, -100, 8, 9]],  # nothing predicts the first token of a row
    })  # fmt: skip
    assert number_targets(rows, None)["labels"][:] == [[-100, -100, 0, 1], [-100, 2, -100, 3, 4]]
    assert number_targets(rows, 3)["labels"][:] == [[-100, -100, 0, -100], [-100, 1, -100, -100, -100]]


def write_some(folder, description=None) -> Targets:
    torch.manual_seed(0)
    targets = sample_targets(torch.randn(10, VOCABULARY).log_softmax(-1), 3, 2)
    parts = [Targets(*(tensor[part] for tensor in targets)) for part in (slice(0, 1), slice(1, 8), slice(8, 10))]
    assert write_targets(folder, parts, description or {}) == 10
    return targets


def test_targets_are_found_again_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_targets, "TARGETS_PER_FILE", 4)
    targets = write_some(tmp_path / "made")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) == 3
    numbers = torch.tensor([9, 0, 4, 3, 9])
    found = StoredTargets(tmp_path / "made").read(numbers)
    for stored, original in zip(found, targets, strict=True):
        assert stored.dtype == original.dtype and torch.equal(stored, original[numbers])


def test_damaged_targets_are_refused(tmp_path):
    with pytest.raises(UserError, match="no manifest.json: no targets, or unfinished"):
        StoredTargets(tmp_path)
    write_some(tmp_path / "made")
    manifest, file = tmp_path / "made" / "manifest.json", tmp_path / "made" / "targets-00000.safetensors"
    text = manifest.read_text()
    for broken, problem in (("[]", "format 1"), (text.replace(": 10,", ": 11,"), "does not have the 11 targets")):
        manifest.write_text(broken)
        with pytest.raises(UserError, match=problem):
            StoredTargets(tmp_path / "made")
    manifest.write_text(text)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"targets-00000\.safetensors: .* Write the targets again"):
        StoredTargets(tmp_path / "made")


@pytest.mark.slow
def test_what_differs_is_named(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(train_tiny_tokenizer(tmp_path))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"messages": []}) + "\n")
    rows = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]]})
    description = describe_rows([str(data)], rows, tokenizer, 8)
    write_some(tmp_path / "targets", description)
    targets = StoredTargets(tmp_path / "targets")
    targets.require_rows(describe_rows([str(data)], rows, tokenizer, 8))
    for changed, problem in (
        (describe_rows([str(data)], rows, tokenizer, 9), r"max_length differs \(8, now 9\)"),
        (
            describe_rows([str(data)], rows.select([0, 0]), tokenizer, 8),
            "exams, train_on_unfit_data or assistant_only",
        ),
    ):
        with pytest.raises(UserError, match=problem):
            targets.require_rows(changed)
    template, tokenizer.chat_template = tokenizer.chat_template, "{{ messages }}"
    with pytest.raises(UserError, match="the tokenizer or its chat template differs"):
        targets.require_rows(describe_rows([str(data)], rows, tokenizer, 8))
    tokenizer.chat_template = template
    data.write_text("\n")
    with pytest.raises(UserError, match="the contents of train_files differs"):
        targets.require_rows(describe_rows([str(data)], rows, tokenizer, 8))

    other = AutoTokenizer.from_pretrained(tmp_path / "made")
    require_same_vocabulary(other, tokenizer)
    other.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match=r"401 and 400 tokens, 1 differ, first '<\|new\|>' \(id 400 and missing\)"):
        require_same_vocabulary(other, tokenizer)
