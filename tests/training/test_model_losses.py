"""SFT, DPO, GRPO and RLOO train with the balance loss and the z-loss of the model's config."""

import pytest
import torch
from datasets import Dataset
from test_evaluation import OPTIONS, labeled_rows, pairs, tiny_tokenizer
from tiny_models import GQA, MOE, make_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from buddygpt.cli.errors import UserError
from buddygpt.training.model_losses import add_model_losses

LOSSES = [{"aux_loss_alpha": 0.5}, {"z_loss_coef": 0.1}, {"aux_loss_alpha": 0.5, "z_loss_coef": 0.1}]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def make_sft(model, folder, **options) -> SFTTrainer:
    args = SFTConfig(**OPTIONS | dict(output_dir=str(folder), max_length=64) | options)
    return SFTTrainer(model, args, train_dataset=labeled_rows(), processing_class=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("losses", LOSSES, ids=lambda losses: "+".join(losses))
@pytest.mark.parametrize("options", [{}, {"packing": True}, {"gradient_checkpointing": True}], ids=str)
def test_sft_has_the_gradient_of_the_model_itself(tmp_path, losses, options):
    fields = GQA | MOE | losses
    trainer = make_sft(make_model(**fields), tmp_path, per_device_train_batch_size=4, **options)
    add_model_losses(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    items = torch.tensor(50)  # tokens of this batch and of others in the same step
    if options.get("gradient_checkpointing"):
        trainer.model.gradient_checkpointing_enable()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()

    model = make_model(**fields).train()
    expected = model(**batch, use_cache=False, num_items_in_batch=items).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(trainer.model)[name], gradient, rtol=1e-4, atol=1e-5)


def test_dpo_balances_the_experts_and_keeps_logits_small(tmp_path):
    def difference(**losses) -> dict[str, torch.Tensor]:
        """The change of DPO's gradients by these losses."""
        found = []
        for fields in (GQA | MOE, GQA | MOE | losses):
            args = DPOConfig(**OPTIONS, output_dir=str(tmp_path), per_device_train_batch_size=4)
            trainer = DPOTrainer(
                make_model(**fields), make_model(seed=1, **GQA | MOE), args, train_dataset=pairs(),
                processing_class=tiny_tokenizer(),
            )  # fmt: skip
            add_model_losses(trainer)
            torch.manual_seed(0)
            batch = next(iter(trainer.get_train_dataloader()))
            trainer.model.train()
            trainer.compute_loss(trainer.model, dict(batch)).backward()
            found.append(gradients(trainer.model))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        model = make_model(**GQA | MOE | losses).train()
        plain = make_model(**GQA | MOE).train()
        for each in (model, plain):
            each(
                batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, use_cache=False
            ).loss.backward()
        expected = {name: gradient - gradients(plain)[name] for name, gradient in gradients(model).items()}
        for name, gradient in expected.items():
            torch.testing.assert_close(found[1][name] - found[0][name], gradient, rtol=1e-3, atol=1e-5)
        return expected

    assert all(gradient.abs().max() > 0 for gradient in difference(**LOSSES[2]).values())


@pytest.mark.slow
@pytest.mark.parametrize("classes", [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)], ids=["grpo", "rloo"])
def test_reinforcement_learning_balances_the_experts_and_keeps_logits_small(tmp_path, classes):
    """Answers of advantage 0 have no other gradient."""
    options = dict(per_device_train_batch_size=4, num_generations=2, gradient_accumulation_steps=2, beta=0.0)
    args = classes[0](**OPTIONS, **options, output_dir=str(tmp_path))
    rows = Dataset.from_list([{"prompt": "w3 w4 w5"}] * 8)
    trainer = classes[1](
        make_model(**GQA | MOE | LOSSES[2]), lambda completions, **_: [0.0] * len(completions), args,
        train_dataset=rows, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    add_model_losses(trainer)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    prompts, answers = torch.randint(2, 97, (4, 3)), torch.randint(2, 97, (4, 5))
    mask = torch.ones_like(answers)
    mask[0, 2:] = 0
    zeros = torch.zeros(4)
    batch = {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "advantages": zeros, "old_logps": zeros}
    batch |= {"completion_ids": answers, "completion_mask": mask, "num_items_in_batch": mask.sum()}
    loss = trainer.compute_loss(trainer.model, batch)
    (loss if classes[1] is GRPOTrainer else loss / 2).backward()  # `Trainer` divides that of RLOO

    ids, attention_mask = torch.cat([prompts, answers], 1), torch.cat([torch.ones_like(prompts), mask], 1)
    labels = torch.cat([torch.full_like(prompts, -100), answers.masked_fill(mask == 0, -100)], 1)
    model, plain = make_model(**GQA | MOE | LOSSES[2]).train(), make_model(**GQA | MOE).train()
    for each in (model, plain):
        (each(ids, attention_mask=attention_mask, labels=labels, use_cache=False).loss / 2).backward()
    for name, gradient in gradients(trainer.model).items():
        expected = gradients(model)[name] - gradients(plain)[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
        assert expected.abs().max() > 0


def test_what_cannot_be_applied_is_refused(tmp_path):
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_sft(make_model(**GQA | MOE, aux_loss_alpha=0.01), tmp_path, **checkpointing)
    with pytest.raises(UserError, match="use_reentrant"):
        add_model_losses(trainer)
    trainer = make_sft(make_model(**GQA, z_loss_coef=1e-4), tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(UserError, match=r"z_loss_coef \(0.0001\)"):
        add_model_losses(trainer)
