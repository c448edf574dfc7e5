"""Rewards, KL, entropy and lengths are shown, drawn and watched; batches of prompts and of pairs are counted."""

from types import SimpleNamespace

import pytest
import torch

from buddygpt.training.callbacks.alarms import AlarmCallback
from buddygpt.training.callbacks.curve import _find_panels
from buddygpt.training.callbacks.progress import describe_log
from buddygpt.training.callbacks.throughput import ThroughputCallback
from buddygpt.training.evaluation import EvenBatches

LOG = {
    "loss": 0.01,
    "reward": 0.75,
    "rewards/exact_match/mean": 0.7,
    "rewards/exact_match/std": 0.4,
    "rewards/length/mean": None,  # no answer was judged
    "rewards/length/std": None,
    "kl": 0.0123,
    "entropy": 1.5,
    "completions/mean_length": 12.3,
    "completions/clipped_ratio": 0.1,
    "frac_reward_zero_std": 0.25,
    "learning_rate": 1e-4,
}


def test_the_progress_line_shows_rewards():
    line = "reward 0.750  exact_match 0.700  entropy 1.500"
    rest = "KL 0.0123  length 12.3"
    assert describe_log(LOG, 5, 80) == f"step 5/80  loss 0.0100  {line}  equal groups 25%  {rest}  lr 1.00e-04"
    held_out = {f"eval_{key}": value for key, value in LOG.items()}
    assert describe_log(held_out, 5, 80).startswith(f"step 5/80  eval  loss 0.0100  {line}  {rest}")
    assert "entropy" not in describe_log({"loss": 1.0, "entropy": 1.5}, 5, 80)  # of SFT


def test_the_curve_shows_rewards():
    panels = _find_panels([LOG | {"eval_reward": 0.7}])
    assert panels["reward"] == {"reward": "training", "eval_reward": "held-out"}
    assert list(panels["rewards"]) == ["rewards/exact_match/mean", "rewards/length/mean"]
    assert {"KL divergence from the start", "entropy of the answers", "answer length (tokens)"} < panels.keys()
    assert "groups of equal rewards" in panels
    assert list(_find_panels([{"loss": 1.0, "entropy": 1.5}])) == ["loss"]


@pytest.fixture
def alarms(monkeypatch):
    """An alarm callback whose warnings are in `texts`."""
    trainer = SimpleNamespace(training_step=None, _get_grad_norm=None)
    alarms = AlarmCallback(trainer, {})
    alarms.texts = []
    monkeypatch.setattr(alarms, "_warn", lambda step, text: alarms.texts.append((step, text)))
    return alarms


def test_a_reward_that_no_answer_gets_is_told_once(alarms):
    never = LOG | {"rewards/exact_match/mean": 0.0, "rewards/exact_match/std": 0.0}
    for step, log in enumerate([never, never, LOG, never, never, never, never]):
        alarms._check_rewards(step, log)
    assert [(step, text[:40]) for step, text in alarms.texts] == [(5, "the reward exact_match was 0 for every a")]


def test_groups_of_equal_rewards_are_told(alarms):
    for step, share in enumerate([1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 1.0]):
        alarms._check_rewards(step, LOG | {"frac_reward_zero_std": share})
    assert [step for step, _ in alarms.texts] == [5]
    assert "all answers to a question got the same reward" in alarms.texts[0][1]


def test_collapsing_exploding_and_cut_answers_are_told(alarms):
    for step, (length, cut) in enumerate([(20, 0), (12, 0), (4, 0), (79, 0), (81, 0.4), (81, 0.6)]):
        alarms._check_lengths(step, length, cut)
    assert [step for step, _ in alarms.texts] == [2, 4, 5]
    assert "answers have 4.0 tokens, at the start 20.0" in alarms.texts[0][1]
    assert "60% of the answers do not end" in alarms.texts[2][1]


def test_answers_that_become_alike_are_told(alarms):
    """As with a reward model alone, and not with answers that vary, or that were as alike at the start."""
    collapse = [(0.99, 0.15), (1.57, 0.05), (0.42, 0.3), (0.09, 0.1), (0.088, 0.6), (0.046, 0.5)]
    for step, (entropy, equal) in enumerate(collapse):
        alarms._check_variety(step, entropy, equal)
    ((step, text),) = alarms.texts
    assert step == 4 and text.startswith(
        "the entropy of the answers is 0.088, at the start 0.990; the share of groups"
    )

    alarms.texts.clear()
    alarms.first_variety = None
    for step, (entropy, equal) in enumerate([(0.107, 0.45), (0.088, 0.75), (0.137, 0.4), (0.094, 0.7)]):
        alarms._check_variety(step, entropy, equal)
    assert not alarms.texts


def test_the_loss_of_reinforcement_learning_has_no_spikes(alarms):
    """It is near 0 on average, whatever the model learns."""
    alarms.trainer.accelerator = SimpleNamespace(reduce=lambda tensor, _: tensor)
    alarms.trainer._tr_loss = torch.zeros(())
    state = SimpleNamespace(is_world_process_zero=True, global_step=33)
    for extra, spikes in (({"reward": 0.5}, 0), ({}, 1)):
        alarms.recent_losses.extend([0.01] * 32)
        alarms.steps = [torch.tensor([0.9, 1.0])]
        alarms.on_log(None, state, None, {"loss": 0.9} | (LOG | extra if extra else extra))
        assert sum("loss spike" in text for _, text in alarms.texts) == spikes


def test_tokens_of_prompts_and_of_pairs_are_counted():
    trainer = SimpleNamespace(
        model=None,
        ref_model=None,
        get_batch_samples=None,
        state=SimpleNamespace(num_input_tokens_seen=100),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(reduce=lambda tokens, _: tokens),
    )
    throughput = ThroughputCallback(trainer, {})
    throughput._start_window()
    ids, mask = torch.ones(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    pairs = {"chosen_input_ids": ids, "chosen_attention_mask": mask, "rejected_input_ids": ids[:, :3]}
    throughput._count(pairs | {"prompt_input_ids": ids})  # ORPO and CPO: the prompt is also part of both answers
    assert throughput._tokens_of_all_processes() == 6 + 6 and throughput.row_tokens == 8 + 6

    throughput._start_window()
    throughput._count([{"prompt": "q"}, {"prompt": "q"}])
    trainer.state.num_input_tokens_seen += 50  # TRL counts what it generates
    assert throughput._tokens_of_all_processes() == 50


def test_two_processes_evaluate_whole_groups_of_answers():
    batches = []
    for process in range(2):
        accelerator = SimpleNamespace(num_processes=2, process_index=process)
        batches.append(list(EvenBatches(5, 4, accelerator, repeats=2)))
    assert batches[0] == [[0, 0, 1, 1], [4, 4]] and batches[1] == [[2, 2, 3, 3], [4, 4]]
