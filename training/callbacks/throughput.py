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


class ThroughputCallback(TrainerCallback):
    """Adds the speed since the last one to each log of the loss, without waiting for the device before that.

    - `tokens_per_second`: over all processes, counting real tokens where the batch has an `attention_mask`, else all
      tokens of its rows. The clock stands still during evaluations, samples and checkpoints.
    - `mfu`: see [`flops_per_token`]; left out where the device's peak is unknown (a CPU, float32), and where the
      work is another than the formula's: adapters on frozen weights, a reference model beside the trained one.
    - `data_wait`: share of that time which this process spent fetching batches: from the workers, or reading them
      itself. On CUDA this is the loader's part alone only with pinned memory and `non_blocking` copies.
    - `eta_seconds`: to the last step, at the pace of this session so far, evaluations and all.

    Args:
        trainer: Its `get_batch_samples` is wrapped to take the time of each fetch.
        run_card: Receives the entry `throughput`: medians over the logs, FLOPs per token, peak memory.
    """

    def __init__(self, trainer: Trainer, run_card: dict[str, Any]):
        self.trainer, self.run_card = trainer, run_card
        self.flops = find_flops(trainer)
        self.peak = find_peak(trainer) if self.flops else None
        trainer.get_batch_samples = self._timed(trainer.get_batch_samples)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step, self.began = state.global_step, time.perf_counter()
        self.away, self.last_step_end = False, self.began
        self._reset()

    def _reset(self) -> None:
        self.since, self.waited, self.paused = time.perf_counter(), 0.0, 0.0
        self.tokens: torch.Tensor | int = 0
        self.rows = self.row_tokens = 0

    def _timed(self, get_batch_samples: Callable) -> Callable:
        def fetch(batches, *args):
            if self.away:
                self.paused += time.perf_counter() - self.last_step_end
                self.away = False
            return get_batch_samples(self._watched(batches), *args)

        return fetch

    def _watched(self, batches: Iterator[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self._count(batch)
            yield batch

    def _count(self, batch: dict[str, torch.Tensor]) -> None:
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        self.tokens = self.tokens + (ids.numel() if mask is None else mask.sum())
        longest = getattr(self.trainer.args, "max_length", None) or ids.shape[-1]  # rows packed into one are split
        self.rows += max(1, -(-ids.shape[-1] // longest)) * (ids.numel() // ids.shape[-1])
        self.row_tokens += ids.numel()

    def on_step_end(self, args, state, control, **kwargs):
        self.last_step_end = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.away = True

    on_save = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = self.last_step_end = time.perf_counter()
        seconds = now - self.since - self.paused
        tokens = torch.as_tensor(self.tokens, device=args.device).reshape(1)
        speed = self.trainer.accelerator.reduce(tokens, "sum").item() / seconds
        found = {"tokens_per_second": speed}
        if self.peak:
            found["mfu"] = speed * self.flops(self.length) / (self.peak * args.world_size)
        found["data_wait"] = self.waited / seconds
        pace = (now - self.began) / (state.global_step - self.first_step)
        found["eta_seconds"] = pace * (state.max_steps - state.global_step)
        logs.update(found)
        state.log_history[-1].update(found)  # it was filled before the callbacks were called
        self.run_card["throughput"] = self._summary(state.log_history)
        self._reset()

    @property
    def length(self) -> int:
        return round(self.row_tokens / self.rows)

    def _summary(self, history: list[dict[str, float]]) -> dict[str, Any]:
        series = {
            key: [row[key] for row in history if key in row] for key in ("tokens_per_second", "mfu", "data_wait")
        }
        medians = {f"median_{key}": statistics.median(values) for key, values in series.items() if values}
        work = {"row_length": self.length, "flops_per_token": self.flops(self.length)} if self.flops else {}
        return {**medians, **work, **peak_memory(self.trainer.args.device)}


def find_flops(trainer: Trainer) -> Callable[[int], float] | None:
    """[`flops_per_token`] of the trainer's model by row length, or None where training does other work than that."""
    if isinstance(trainer.model, PeftModel) or hasattr(trainer, "ref_model"):
        return None
    fixed, one = (flops_per_token(trainer.model.config, length) for length in (0, 1))
    return lambda length: fixed + (one - fixed) * length  # rows of chat differ in length from log to log


def find_peak(trainer: Trainer) -> float | None:
    """FLOP/s of one of the run's devices at best, or None where it is not known."""
    args = trainer.args
    if args.device.type != "cuda":
        return None
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
    return peak_flops(torch.cuda.get_device_name(args.device), dtype)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: of tensors on a CUDA device at most, else of this process in main memory at most."""
    if device.type == "cuda":
        return {"peak_cuda_memory_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_process_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
