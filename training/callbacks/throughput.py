"""Speed of a run: tokens per second, MFU (defined in training/flops.py), time spent waiting for data, peak memory."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback

from buddygpt.training.flops import flops_per_token, peak_flops
from buddygpt.training.zero3 import zero3_off


class ThroughputCallback(TrainerCallback):
    """Adds the speed since the last log to each log of the loss; reads from the device only when something is logged.

    - `tokens_per_second`: over all processes. Counts real tokens if the batch has an `attention_mask`, else all tokens
      of its rows; of batches of prompts, the tokens of prompts and generated answers. Time spent in evaluations,
      samples and checkpoints is not counted.
    - `mfu`: see [`flops_per_token`]. Left out if the peak of the device is unknown (a CPU, float32), and if training
      does other work than the formula counts: adapters on frozen weights, a reference model or teacher, generation.
    - `data_wait`: share of the same time that this process spent fetching batches, from workers or by reading them
      itself. On CUDA, copies to the device are included unless memory is pinned and copies are `non_blocking`.
    - `eta_seconds`: seconds to the last step at the average pace since the start or resume, with evaluations.

    Args:
        trainer: Its `get_batch_samples` is wrapped to measure each fetch.
        run_card: Receives the entry `throughput`: medians over the logs, FLOPs per token, peak memory.
    """

    def __init__(self, trainer: Trainer, run_card: dict[str, Any]):
        self.trainer = trainer
        self.run_card = run_card
        self.flops = find_flops(trainer)
        self.peak = find_peak(trainer) if self.flops else None
        self.generates = False  # whether batches are prompts, and the trainer generates the rest of the tokens
        trainer.get_batch_samples = self._measured(trainer.get_batch_samples)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self.train_start = self.last_step_end = time.perf_counter()
        self.paused = False
        self._start_window()

    def _start_window(self) -> None:
        """Reset what is measured from one log to the next."""
        self.window_start = time.perf_counter()
        self.fetch_seconds = 0.0
        self.pause_seconds = 0.0
        self.tokens: torch.Tensor | int = 0  # a tensor if counted from attention masks, which are on the device
        self.rows = 0
        self.row_tokens = 0
        self.tokens_generated_before = self.trainer.state.num_input_tokens_seen

    # Counting: the trainer fetches the batches of a step through these.

    def _measured(self, get_batch_samples: Callable) -> Callable:
        def fetch(batches, *args):
            if self.paused:  # the first fetch after an evaluation or checkpoint ends the pause
                self.pause_seconds += time.perf_counter() - self.last_step_end
                self.paused = False
            return get_batch_samples(self._counted(batches), *args)

        return fetch

    def _counted(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.fetch_seconds += time.perf_counter() - start
            if batch is None:
                return
            self._count(batch)
            yield batch

    def _count(self, batch: dict[str, torch.Tensor] | list[dict[str, Any]]) -> None:
        if isinstance(batch, list):  # rows of text: TRL counts their tokens once it has generated
            self.generates = True
            return
        for kind in ("", "chosen_", "rejected_"):  # trl.experimental pads the two answers of a pair apart
            if f"{kind}input_ids" in batch:
                self._count_rows(batch[f"{kind}input_ids"], batch.get(f"{kind}attention_mask"))

    def _count_rows(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        width = ids.shape[-1]
        self.tokens = self.tokens + (ids.numel() if mask is None else mask.sum())
        # Padding-free batches join several rows into one: count the rows of `max_length` that it stands for.
        max_length = getattr(self.trainer.args, "max_length", None) or width
        rows_in_one = max(1, -(-width // max_length))  # rounded up
        self.rows += rows_in_one * (ids.numel() // width)
        self.row_tokens += ids.numel()

    # Pauses: they begin at the end of the step, or at its log, which ends the window.

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step_end = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.paused = True

    on_save = on_evaluate

    # Logging.

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = self.last_step_end = time.perf_counter()
        seconds = now - self.window_start - self.pause_seconds
        speed = self._tokens_of_all_processes() / seconds
        values = {"tokens_per_second": speed}
        if self.peak:
            values["mfu"] = speed * self.flops(self.row_length) / (self.peak * args.world_size)
        values["data_wait"] = self.fetch_seconds / seconds
        pace = (now - self.train_start) / (state.global_step - self.first_step)
        values["eta_seconds"] = pace * (state.max_steps - state.global_step)
        logs.update(values)
        state.log_history[-1].update(values)  # the trainer copied the logs before it called the callbacks
        self.run_card["throughput"] = self._summary(state.log_history)
        self._start_window()

    def _tokens_of_all_processes(self) -> float:
        if self.generates:
            return self.trainer.state.num_input_tokens_seen - self.tokens_generated_before
        tokens = torch.as_tensor(self.tokens, device=self.trainer.args.device).reshape(1)
        return self.trainer.accelerator.reduce(tokens, "sum").item()

    @property
    def row_length(self) -> int:
        """Mean tokens per row since the last log."""
        return round(self.row_tokens / self.rows)

    def _summary(self, history: list[dict[str, float]]) -> dict[str, Any]:
        summary = {}
        for key in ("tokens_per_second", "mfu", "data_wait"):
            values = [row[key] for row in history if key in row]
            if values:
                summary[f"median_{key}"] = statistics.median(values)
        if self.flops:
            summary |= {"row_length": self.row_length, "flops_per_token": self.flops(self.row_length)}
        return summary | peak_memory(self.trainer.args.device)


def find_flops(trainer: Trainer) -> Callable[[int], float] | None:
    """Return a function from row length to [`flops_per_token`], or None if training does other work than it counts."""
    if isinstance(trainer.model, PeftModel) or hasattr(trainer, "ref_model") or hasattr(trainer, "teacher_model"):
        return None
    # The formula is linear in the length, and rows of chat differ in length from log to log.
    with zero3_off(trainer.args):
        fixed = flops_per_token(trainer.model.config, 0)
        slope = flops_per_token(trainer.model.config, 1) - fixed
    return lambda length: fixed + slope * length


def find_peak(trainer: Trainer) -> float | None:
    """Return the peak FLOP/s of one device of the run, or None if it is unknown."""
    args = trainer.args
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
    return peak_flops(torch.cuda.get_device_name(args.device), dtype)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory in bytes: of tensors on a CUDA device, else of this process."""
    if device.type == "cuda":
        return {"peak_cuda_memory_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return {"peak_process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
