"""`Trainer` for pretraining: resumes at the exact step with the same random state, and logs bits per byte."""

import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from buddygpt.data.shards.blocks import BlockStream
from buddygpt.data.shards.trace import describe_blocks
from buddygpt.training.pickles import reporting_damage


class StreamTrainer(Trainer):
    """`Trainer` whose `train_dataset` is a [`BlockStream`] of the whole run.

    `Trainer` itself sees one long epoch. `epoch` in the logs, and the strategies that act at the end of each epoch,
    use the mixture epochs of the data. The blocks of a step depend only on the step and the global batch, not on how
    the global batch is split into processes, accumulation and batch per device.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.args.ignore_data_skip = True  # our sampler starts at the right position, so there is nothing to skip
        self.add_callback(EpochCallback(self))
        self._rng_checkpoint: str | None = None

    @property
    def blocks_read(self) -> int:
        """Blocks that the steps so far have read, which is also the next position in the stream."""
        return self.state.global_step * self.get_total_train_batch_size(self.args)

    def _get_train_sampler(self, train_dataset: BlockStream | None = None) -> Sampler:
        return PositionSampler(len(self.train_dataset), lambda: self.blocks_read)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Postpone to the first batch: `Trainer` calls this before it opens the loader, which uses random numbers."""
        self._rng_checkpoint = checkpoint

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._rng_checkpoint is not None:
            with reporting_damage(self._rng_checkpoint):
                super()._load_rng_state(self._rng_checkpoint)
            self._rng_checkpoint = None
        return batches


class PretrainTrainer(StreamTrainer):
    """[`StreamTrainer`] that logs bits per byte with every loss, and what it has read from each source.

    Bits per byte are nats per token x tokens per byte of text / ln 2. `epochs/SOURCE` counts source epochs, and
    `share/SOURCE` is the source's share of all blocks read. If the evaluation data is a dictionary of sources,
    `eval_loss` is the mean over all their blocks.

    Args:
        tokens_per_byte: Tokens per byte of text for "train", "eval" and "eval_SOURCE".
    """

    def __init__(self, *args, tokens_per_byte: dict[str, float], **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tokens_per_byte = tokens_per_byte

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for split, ratio in self.tokens_per_byte.items():
            prefix = "" if split == "train" else f"{split}_"
            if f"{prefix}loss" in logs:
                logs[f"{prefix}bits_per_byte"] = logs[f"{prefix}loss"] * ratio / math.log(2)
        if "loss" in logs:
            progress = self.train_dataset.order.progress_by_source(self.blocks_read)
            for source, (epochs, share) in progress.items():
                logs[f"epochs/{source}"] = epochs
                logs[f"share/{source}"] = share
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # Evaluation needs no logits. `Trainer` passes the same argument to Liger's models.
        if prediction_loss_only and "skip_logits" in inspect.signature(self.model.forward).parameters:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is not None or not isinstance(self.eval_dataset, dict):
            return metrics
        # The loss of the whole is the mean over all blocks.
        counts = {source: len(blocks) for source, blocks in self.eval_dataset.items()}
        total = sum(metrics[f"eval_{source}_loss"] * count for source, count in counts.items())
        whole = {"eval_loss": total / sum(counts.values())}
        self.log(whole)
        return {**metrics, **whole}

    def describe_step(self, step: int) -> str:
        """Return the shards, documents and input files of the blocks that a step reads."""
        stream = self.train_dataset
        indices = stream.order.which_blocks(step, self.get_total_train_batch_size(self.args))
        return describe_blocks(stream.blocks, indices)


class PositionSampler(Sampler[int]):
    """The positions of a run, from the current one to the end. `len` counts all positions of the run.

    Args:
        length: Positions in the whole run.
        begin: Returns the current position when an iteration starts.
    """

    def __init__(self, length: int, begin: Callable[[], int]) -> None:
        self.length = length
        self.begin = begin

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin(), self.length))

    def __len__(self) -> int:
        return self.length


class EpochCallback(TrainerCallback):
    """Counts mixture epochs and tokens in the trainer's state; logs, evaluates and saves at epoch ends on request."""

    def __init__(self, trainer: StreamTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        stream = self.trainer.train_dataset
        state.num_train_epochs = math.ceil(stream.order.epoch(len(stream)))

    def on_step_end(self, args, state, control, **kwargs):
        stream = self.trainer.train_dataset
        position = self.trainer.blocks_read
        previous_position = position - self.trainer.get_total_train_batch_size(args)
        state.epoch = stream.order.epoch(position)
        state.num_input_tokens_seen = position * stream.block_size

        # The flow callback sets what `logging_strategy`, `eval_strategy` and `save_strategy: epoch` ask for. After the
        # last step, `Trainer` calls it itself.
        epoch_ended = int(stream.order.epoch(previous_position)) < int(state.epoch)
        if epoch_ended and state.global_step < state.max_steps:
            DefaultFlowCallback().on_epoch_end(args, state, control)
