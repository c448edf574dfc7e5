"""Tokens per expert are counted as they were routed, and moving the selection bias balances them."""

import pytest
import torch
from datasets import Dataset
from tiny_models import VARIANTS, make_model, random_ids
from transformers import Trainer, TrainingArguments

from buddygpt.training.callbacks.experts import ExpertLoadCallback, find_routers, load_statistics


def make_trainer(folder, steps: int, speed: float, **arguments) -> tuple[Trainer, ExpertLoadCallback]:
    model = make_model(**VARIANTS["gqa-moe"] | dict(num_experts_per_tok=2))
    ids = random_ids(16, 32).tolist()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **dict(learning_rate=0.0, logging_steps=1) | arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}))
    callback = ExpertLoadCallback(trainer, speed)
    trainer.callback_handler.callbacks.insert(0, callback)
    return trainer, callback


def routing(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Return the tokens per expert of each layer, from the router indices of the model."""
    indices = model.model(ids, output_router_indices=True, use_cache=False).router_indices
    return [layer.flatten().bincount(minlength=8) for layer in indices]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_logged_is_what_was_routed(tmp_path, accumulate):
    trainer, _ = make_trainer(tmp_path, steps=16 // 4 // accumulate, speed=0, gradient_accumulation_steps=accumulate)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 // accumulate
    expected = torch.stack(routing(trainer.model, random_ids(16, 32)))
    if accumulate == 4:  # one step saw all rows
        assert logged[0]["router/load_max"] == pytest.approx(expected.max().item() / (16 * 32 * 2 / 8))
        assert logged[0]["router/load_min"] == pytest.approx(expected.min().item() / (16 * 32 * 2 / 8))
    assert all(row["router/dropped"] == 0 for row in logged)


def test_evaluation_is_not_counted(tmp_path):
    trainer, callback = make_trainer(tmp_path, steps=1, speed=0)
    trainer.evaluate(trainer.train_dataset)
    assert not callback.step.any() and not callback.logged.any()


@pytest.mark.slow
def test_moving_the_bias_balances_the_load(tmp_path):
    trainer, _ = make_trainer(tmp_path, steps=160, speed=0.004, logging_steps=8)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    first, last = logged[0], logged[-1]
    assert first["router/load_max"] > 1.5 and first["router/entropy"] < 0.98
    assert last["router/load_max"] < 1.35 and last["router/entropy"] > 0.99
    assert (tmp_path / "expert_load.png").stat().st_size > 1000
    for router in find_routers(trainer.model):
        steps = router.e_score_correction_bias / 0.004
        assert steps.abs().max() > 1 and torch.allclose(steps, steps.round(), atol=1e-2)  # whole steps, both signs
        assert steps.min() < 0 < steps.max()


def test_dense_models_have_nothing_to_count():
    assert not find_routers(make_model(**VARIANTS["gqa"])) and not find_routers(make_model(**VARIANTS["soft-moe"]))


def test_statistics_of_known_loads():
    even = load_statistics(torch.full((2, 4), 25), routed=100)
    assert even == {
        "router/load_max": 1,
        "router/load_min": 1,
        "router/entropy": pytest.approx(1),
        "router/dropped": 0,
    }
    one = load_statistics(torch.tensor([[60, 0, 0, 0]]), routed=80)
    assert one == pytest.approx(
        {"router/load_max": 4, "router/load_min": 0, "router/entropy": 0, "router/dropped": 0.25}
    )
