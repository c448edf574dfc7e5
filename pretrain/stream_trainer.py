"""`Trainer` on a stream of blocks: a run goes on at the step itself, with nothing to skip and the same randomness."""

import math
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from buddygpt.data.shards.blocks import BlockStream


class StreamTrainer(Trainer):
    """`Trainer` whose `train_dataset` is a [`BlockStream`] of the whole run.

    `Trainer` itself sees one long epoch; `epoch` in the logs, and the strategies that ask for each epoch, go by the
    epochs of the data. Which blocks a step reads depends on the step and the global batch only, however that is split
    into processes, accumulation and batch per device.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.args.ignore_data_skip = True  # the sampler begins where `Trainer` would have to skip to
        self.add_callback(EpochCallback(self))
        self._rng_checkpoint: str | None = None

    @property
    def blocks_read(self) -> int:
        """Position in the stream: blocks that the steps taken so far have read."""
        return self.state.global_step * self.get_total_train_batch_size(self.args)

    def _get_train_sampler(self, train_dataset: BlockStream | None = None) -> Sampler:
        return PositionSampler(len(self.train_dataset), lambda: self.blocks_read)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """`Trainer` asks for this before it opens the loader, which draws a random number itself: it is put off."""
        self._rng_checkpoint = checkpoint

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple:
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        super()._load_rng_state(self._rng_checkpoint)
        self._rng_checkpoint = None
        return batches


class PositionSampler(Sampler[int]):
    """Positions from where the run stands when it is iterated to the end; its length is the whole run's."""

    def __init__(self, length: int, begin: Callable[[], int]) -> None:
        self.length, self.begin = length, begin

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.begin(), self.length))

    def __len__(self) -> int:
        return self.length


class EpochCallback(TrainerCallback):
    """Keeps `state.epoch` and the tokens seen; logs, evaluates and saves at the ends of epochs where that is asked."""

    def __init__(self, trainer: StreamTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        stream = self.trainer.train_dataset
        state.num_train_epochs = math.ceil(stream.order.epoch(len(stream)))

    def on_step_end(self, args, state, control, **kwargs):
        position, size = self.trainer.blocks_read, self.trainer.get_total_train_batch_size(args)
        order = self.trainer.train_dataset.order
        state.epoch = order.epoch(position)
        state.num_input_tokens_seen = position * self.trainer.train_dataset.block_size
        if int(order.epoch(position - size)) < int(state.epoch) and state.global_step < state.max_steps:
            DefaultFlowCallback().on_epoch_end(args, state, control)
