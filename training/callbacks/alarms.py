"""What should stop a person in their tracks: NaN, a loss spike, a dead expert, a loader that keeps the device waiting.

Each becomes one line on stderr and an entry of `warnings` in run.json, with the step and what the step read.
"""

import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from buddygpt.training.callbacks.experts import ExpertLoadCallback
from buddygpt.training.run_card import write_run_card

# A spike is a loss above median + SPIKE_SIGMAS x 1.4826 MAD of the last steps (1.4826 MAD is a normal distribution's
# standard deviation, and neither it nor the median is moved by the spike itself), and above SPIKE_FACTOR x median.
SPIKE_WINDOW, SPIKE_LEAST_STEPS, SPIKE_SIGMAS, SPIKE_FACTOR = 64, 32, 6, 1.1
# A dead expert got no token in a window in which an even load would have given it this many.
DEAD_EXPERT_TOKENS = 100
# A loader is stalled when, in so many logs in a row, so much of the time went into waiting for it.
STALLED_LOGS, STALLED_SHARE = 3, 0.3


class AlarmCallback(TrainerCallback):
    """Warns of what `STALLED_*`, `SPIKE_*` and `DEAD_*` above describe, and of a loss or gradient that is not finite.

    Loss and gradient norm of every step are kept on the device and read when something is logged, so the step named is
    the right one though no step waits. A state that lasts is reported once.

    Args:
        trainer: Its `training_step` and `_get_grad_norm` are wrapped to keep what they return.
        run_card: What run.json is written with, see [`write_run_card`].
        expert_load: Of a mixture of experts, called before this one.
        describe_step: A step -> what it read, in words.
    """

    def __init__(
        self,
        trainer: Trainer,
        run_card: dict[str, Any],
        expert_load: ExpertLoadCallback | None = None,
        describe_step: Callable[[int], str] | None = None,
    ):
        self.trainer, self.run_card = trainer, run_card
        self.expert_load, self.describe_step = expert_load, describe_step
        self.micro_losses: list[torch.Tensor] = []
        self.window: list[torch.Tensor] = []  # loss and gradient norm of each step since the last log
        self.grad_norm: torch.Tensor | float | None = None
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.lasting: set[str] = set()
        self.dead: set[tuple[int, int]] = set()
        self.stalled_logs = -1  # the first log has the start of the workers in it
        trainer.training_step = self._keeping(trainer.training_step, self.micro_losses.append)
        trainer._get_grad_norm = self._keeping(trainer._get_grad_norm, self._keep_grad_norm)

    @staticmethod
    def _keeping(function: Callable, keep: Callable) -> Callable:
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            keep(result)
            return result

        return wrapper

    def _keep_grad_norm(self, grad_norm: torch.Tensor | float | None) -> None:
        self.grad_norm = grad_norm

    def on_step_end(self, args, state, control, **kwargs):
        loss = torch.stack(self.micro_losses).sum()
        # A step that a float16 loss scaler skipped overflowed on purpose.
        skipped = self.grad_norm is None or self.trainer.accelerator.optimizer_step_was_skipped
        norm = self.grad_norm.full_tensor() if isinstance(self.grad_norm, DTensor) else self.grad_norm
        norm = loss.new_zeros(()) if skipped else torch.as_tensor(norm).to(loss)
        self.window.append(torch.stack([loss, norm]))
        self.micro_losses.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self.window:
            return
        found = self.trainer.accelerator.reduce(torch.stack(self.window), "mean").tolist()
        self.window.clear()
        self.trainer._tr_loss.nan_to_num_(0.0)  # Trainer's sum since the last log, which NaN would never leave
        if not state.is_world_process_zero:
            return
        first = state.global_step - len(found) + 1
        warnings = [
            *((step, text) for step, values in enumerate(found, first) for text in self._judge_step(*values)),
            *((state.global_step, text) for text in self._judge_window(logs, first, state.global_step)),
        ]
        for step, text in warnings:
            self._warn(step, text)

    def _warn(self, step: int, text: str) -> None:
        read = f". The step read {self.describe_step(step)}" if self.describe_step else ""
        line = f"step {step}: {text}{read}"
        tqdm.write(f"warning: {line}", file=sys.stderr)
        self.trainer.state.log_history.append({"warning": line, "step": step})
        write_run_card(self.trainer, self.run_card)

    def _judge_step(self, loss: float, grad_norm: float) -> Iterator[str]:
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self._begins("not finite", not finite):
            yield f"the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}"
        if not math.isfinite(loss):
            return
        if len(self.recent) >= SPIKE_LEAST_STEPS:
            median = statistics.median(self.recent)
            deviation = statistics.median(abs(each - median) for each in self.recent)
            limit = max(median + SPIKE_SIGMAS * 1.4826 * deviation, SPIKE_FACTOR * median)
            if self._begins("spike", loss > limit):
                yield f"loss spike: {loss:.4g}; the median of the last steps is {median:.4g}, the limit {limit:.4g}"
        self.recent.append(loss)

    def _judge_window(self, logs: dict[str, float], first: int, last: int) -> Iterator[str]:
        waiting = logs.get("data_wait", 0.0) > STALLED_SHARE
        self.stalled_logs = self.stalled_logs + 1 if waiting or self.stalled_logs < 0 else 0
        if self._begins("stalled", self.stalled_logs >= STALLED_LOGS):
            yield f"{logs['data_wait']:.0%} of the time goes into waiting for data; give more dataloader_num_workers"
        if self.expert_load is not None:
            counts = self.expert_load.last_logged
            enough = counts.sum(1) >= DEAD_EXPERT_TOKENS * counts.shape[1]
            dead = {tuple(each) for each in ((counts == 0) & enough[:, None]).nonzero().tolist()}
            if new := sorted(dead - self.dead):
                names = ", ".join(f"expert {expert} of MoE layer {layer}" for layer, expert in new)
                yield f"no token reached {names} in steps {first} to {last}"
            self.dead = dead

    def _begins(self, state: str, holds: bool) -> bool:
        """Whether a state holds that did not hold when it was last asked for."""
        begins = holds and state not in self.lasting
        (self.lasting.add if holds else self.lasting.discard)(state)
        return begins
