"""Evaluate with the same result for every batch size, packing and number of processes.

`Trainer` and TRL average over batches, so a short batch weighs as much as a long one, and with several processes some
rows count twice. Here each value is a sum over tokens divided by the tokens (of pairs: over pairs), each row once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOTrainer, KTOTrainer, RewardTrainer


def average_over_tokens(trainer: Trainer) -> None:
    """Make a trainer's evaluations weigh each batch by its tokens or pairs, and read each row once."""
    accelerator = trainer.accelerator
    get_loader, run_loop, run_step = trainer.get_eval_dataloader, trainer.evaluation_loop, trainer.prediction_step
    answers = getattr(trainer, "num_generations_eval", 1)  # that a trainer generates to each row
    steps: list[torch.Tensor] = []  # (loss, weights) of each step of this process, on the device
    names: list[str] = []  # of the weights

    def get_eval_dataloader(*args, **kwargs) -> DataLoaderShard:
        drop_last, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
        loader = get_loader(*args, **kwargs)
        trainer.args.dataloader_drop_last = drop_last
        if accelerator.num_processes > 1 and trainer.args.eval_batch_size % answers == 0:
            # The loader shards its batches among the processes; give it those of this process instead.
            batches = EvenBatches(len(loader.dataset), trainer.args.eval_batch_size, accelerator, answers)
            loader.batch_sampler.batch_sampler = batches
            loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
            loader.batch_sampler.even_batches = False
        return loader

    def prediction_step(model, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        weights = count_weights(trainer, inputs)
        loss, logits, labels = run_step(model, inputs, *args, **kwargs)
        if weights:
            names[:] = weights
            steps.append(torch.stack([loss.float(), *(weight.to(loss.device) for weight in weights.values())]))
        return loss, logits, labels

    def evaluation_loop(loader, description, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        steps.clear()
        output = run_loop(loader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if not steps:
            return output
        values = accelerator.gather(torch.stack(steps)[None]).cpu().double()  # (processes, steps, 1 + weights)
        shared_steps = len(loader.dataset) * answers // (trainer.args.eval_batch_size * accelerator.num_processes)
        values[1:, shared_steps:, 1:] = 0  # all processes have read the same rows
        losses, weights = values[..., 0], dict(zip(names, values[..., 1:].unbind(-1), strict=True))
        output.metrics[f"{metric_key_prefix}_loss"] = weighted_mean(losses, weights["loss"])
        # TRL keeps a list of other values, one per step, each over all processes. KTO adds none without weight.
        metrics = getattr(trainer, "_metrics", None) or getattr(trainer, "_stored_metrics", {"eval": {}})
        for name, values_of_steps in metrics["eval"].items():
            weight = weights.get(name.removeprefix("eval_"), weights["loss"]).sum(0)
            if len(values_of_steps) < len(steps):
                weight = weight[weight > 0]
            if len(values_of_steps) == len(weight) and name != "num_tokens":
                values_of_steps[:] = [weighted_mean(torch.tensor(values_of_steps).double(), weight)]
        means = metrics["eval"]
        if isinstance(trainer, KTOTrainer) and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = [means["rewards/chosen"][0] - means["rewards/rejected"][0]]
        return output

    trainer.get_eval_dataloader = get_eval_dataloader
    trainer.prediction_step = prediction_step
    trainer.evaluation_loop = evaluation_loop


def count_weights(trainer: Trainer, inputs: dict[str, Any] | list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return what a batch weighs in the mean of each value; "loss" also stands for the values that are not named.

    Empty for a trainer whose batches are neither labeled tokens nor pairs nor rows of text.
    """
    if isinstance(inputs, list):  # rows to answer
        return {"loss": torch.tensor(len(inputs))}
    if isinstance(trainer, DPOTrainer):  # the first half of the rows is chosen, the second rejected
        chosen, rejected = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        return {
            "loss": torch.tensor(len(chosen)),
            "entropy": chosen.sum() + rejected.sum(),
            "mean_token_accuracy": chosen.sum(),
            "logits/chosen": chosen.sum(),
            "logits/rejected": rejected.sum(),
        }
    if isinstance(trainer, KTOTrainer):
        good, tokens = inputs["label"], inputs["completion_mask"][:, 1:].sum(1)
        weights = {"loss": torch.tensor(len(good)), "entropy": tokens.sum()}
        for answers, rows in (("chosen", good), ("rejected", ~good)):
            weights |= {f"logits/{answers}": tokens[rows].sum(), f"logps/{answers}": rows.sum()}
            weights[f"rewards/{answers}"] = rows.sum()
        return weights
    if isinstance(trainer, RewardTrainer):
        weights = {"loss": torch.tensor(len(inputs["input_ids"]) // 2)}
        for number, name in enumerate(getattr(trainer, "sources", ())):  # of rlhf/reward.py
            weights[f"accuracy/{name}"] = (inputs["source"] == number).sum()
        return weights
    if "chosen_input_ids" in inputs:  # trl.experimental
        return {"loss": torch.tensor(len(inputs["chosen_input_ids"]))}
    if inputs.get("labels") is None:
        return {}
    return {"loss": (inputs["labels"][:, 1:] != -100).sum()}


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> float:
    counts = weights > 0  # a batch without tokens has the loss 0 / 0
    return ((values * weights)[counts].sum() / weights.sum()).item()


class EvenBatches(Sampler[list[int]]):
    """The batches of one process, as many as those of every other.

    The rows that are too few to give each process a batch are read by all. accelerate would repeat other rows.

    Args:
        rows: Number of all rows.
        batch_size: Of one process, counting repeats.
        accelerator: Knows the processes.
        repeats: How often a row stands in its batch, once for each answer to generate.
    """

    def __init__(self, rows: int, batch_size: int, accelerator, repeats: int = 1) -> None:
        self.rows = rows
        self.batch_size = batch_size // repeats
        self.accelerator = accelerator
        self.repeats = repeats

    def __iter__(self) -> Iterator[list[int]]:
        size, processes = self.batch_size, self.accelerator.num_processes
        shared = self.rows - self.rows % (size * processes)
        for start in range(self.accelerator.process_index * size, shared, size * processes):
            yield self._repeated(range(start, start + size))
        for start in range(shared, self.rows, size):
            yield self._repeated(range(start, min(start + size, self.rows)))

    def _repeated(self, rows: range) -> list[int]:
        return [row for row in rows for _ in range(self.repeats)]

    def __len__(self) -> int:
        return sum(1 for _ in self)
