"""Warn about NaN, steps that learn nothing, loss spikes, dead experts, data stalls, and rewards that teach nothing.

Each warning is one line on stderr and an entry of `warnings` in run.json. It names the step and the data it read.
"""

import math
import statistics
import sys
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback

from buddygpt.training.callbacks.experts import ExpertLoadCallback
from buddygpt.training.run_card import write_run_card

# A spike is a loss above three limits: median + SPIKE_SIGMAS standard deviations of the last SPIKE_WINDOW steps,
# SPIKE_FACTOR x median, and median + SPIKE_RISE nats, because a loss near zero often multiplies without meaning. The
# standard deviation is estimated as 1.4826 x the median absolute deviation, which the spike itself hardly moves.
SPIKE_WINDOW, SPIKE_MIN_STEPS, SPIKE_SIGMAS, SPIKE_FACTOR, SPIKE_RISE = 64, 32, 6, 1.1, 0.2
# A dead expert got no token between two logs, while an even load would have given it at least this many.
DEAD_EXPERT_TOKENS = 100
# The loader is stalled if this share of the time was spent waiting for it, in this many logs in a row.
STALLED_SHARE, STALLED_LOGS = 0.3, 3
# A reward is flat if in this many logs in a row all answers got 0, or all answers to each question got the same.
FLAT_LOGS = 3
# Answers are short or long if their mean length is below or above these shares of that at the start, and cut if this
# share of them ends at `max_completion_length`.
SHORT_ANSWERS, LONG_ANSWERS, CUT_ANSWERS = 0.25, 4, 0.5
# Answers have become alike if their entropy is below this share of that at the start, and more groups than there have
# equal rewards.
LOW_ENTROPY = 0.1


class AlarmCallback(TrainerCallback):
    """Warns if a loss or gradient norm is not finite or both are 0, and about spikes, dead experts and stalls.

    In reinforcement learning, also about rewards that no answer gets, groups whose answers all get the same, and
    answers that become much shorter, longer or more alike.

    A state that lasts is reported once. `Trainer` logs the mean loss of many steps and the gradient norm of the last
    one only. To name the step that went wrong, this callback records both for every step on the device, and reads them
    when something is logged, so that no step waits for the device.

    Args:
        trainer: Its `training_step` and `_get_grad_norm` are wrapped to record what they return.
        run_card: Entries of run.json, see [`write_run_card`].
        expert_load: The callback that counts tokens per expert, if the model has experts. It must run before this one.
        describe_step: Returns a description of the data that a step reads.
    """

    def __init__(
        self,
        trainer: Trainer,
        run_card: dict[str, Any],
        expert_load: ExpertLoadCallback | None = None,
        describe_step: Callable[[int], str] | None = None,
    ):
        self.trainer = trainer
        self.run_card = run_card
        self.expert_load = expert_load
        self.describe_step = describe_step
        # Recorded on the device.
        self.micro_losses: list[torch.Tensor] = []  # of the current step
        self.grad_norm: torch.Tensor | float | None = None  # of the current step
        self.steps: list[torch.Tensor] = []  # (loss, gradient norm) of each step since the last log
        # Known from earlier logs.
        self.recent_losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.active_states: set[str] = set()
        self.dead_experts: set[tuple[int, int]] = set()
        self.flat_logs: Counter[str] = Counter()  # logs in a row in which a reward taught nothing
        self.first_length: float | None = None  # mean of the answers in the first log
        self.first_variety: tuple[float, float] | None = None  # entropy and share of equal groups in the first log
        self.stalled_logs = -1  # the first log does not count: it includes the start of the data loader's workers
        self._record_results(trainer)

    # Recording, at every step.

    def _record_results(self, trainer: Trainer) -> None:
        training_step, get_grad_norm = trainer.training_step, trainer._get_grad_norm

        def recorded_step(*args, **kwargs) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            self.micro_losses.append(loss)
            return loss

        def recorded_grad_norm(*args, **kwargs) -> torch.Tensor | float | None:
            self.grad_norm = get_grad_norm(*args, **kwargs)
            return self.grad_norm

        trainer.training_step = recorded_step
        trainer._get_grad_norm = recorded_grad_norm

    def on_step_end(self, args, state, control, **kwargs):
        loss = torch.stack(self.micro_losses).sum()
        if self.grad_norm is None or self.trainer.accelerator.optimizer_step_was_skipped:
            norm = loss.new_zeros(())  # a float16 loss scaler skips steps that overflow: that is no fault
        elif isinstance(self.grad_norm, DTensor):
            norm = self.grad_norm.full_tensor().to(loss)
        else:
            norm = torch.as_tensor(self.grad_norm).to(loss)
        self.steps.append(torch.stack([loss, norm]))
        self.micro_losses.clear()

    # Judging, at every log of the loss.

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self.steps:
            return
        values = self.trainer.accelerator.reduce(torch.stack(self.steps), "mean").tolist()
        self.steps.clear()
        # `Trainer` subtracts the logged sum of losses from itself to start the next one: NaN would remain in it.
        self.trainer._tr_loss.nan_to_num_(0.0)
        if not state.is_world_process_zero:
            return
        first, last = state.global_step - len(values) + 1, state.global_step
        for step, (loss, grad_norm) in enumerate(values, first):
            self._check_finite(step, loss, grad_norm)
            self._check_zero(step, loss, grad_norm)
            if "reward" not in logs:  # the loss of reinforcement learning has no level
                self._check_spike(step, loss)
        self._check_data_wait(last, logs.get("data_wait", 0.0))
        if self.expert_load is not None:
            self._check_experts(first, last, self.expert_load.last_logged)
        if "reward" in logs:
            self._check_rewards(last, logs)
            self._check_lengths(last, logs["completions/mean_length"], logs["completions/clipped_ratio"])
            if "entropy" in logs:  # not with Liger's loss
                self._check_variety(last, logs["entropy"], logs["frac_reward_zero_std"])

    def _check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self._begins("not finite", not finite):
            self._warn(step, f"the loss is {loss:.4g}, the gradient norm {grad_norm:.4g}")

    def _check_zero(self, step: int, loss: float, grad_norm: float) -> None:
        if self._begins("zero", loss == grad_norm == 0):
            self._warn(step, "the loss and the gradient norm are 0: no token counts, or there is nothing to learn")

    def _check_spike(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            return
        if len(self.recent_losses) >= SPIKE_MIN_STEPS:
            median = statistics.median(self.recent_losses)
            deviation = statistics.median(abs(recent - median) for recent in self.recent_losses)
            rise = max(SPIKE_SIGMAS * 1.4826 * deviation, SPIKE_RISE)
            limit = max(median + rise, SPIKE_FACTOR * median)
            if self._begins("spike", loss > limit):
                text = f"loss spike: {loss:.4g}; the median of the last steps is {median:.4g}, the limit {limit:.4g}"
                self._warn(step, text)
        self.recent_losses.append(loss)

    def _check_data_wait(self, step: int, data_wait: float) -> None:
        if self.stalled_logs < 0 or data_wait > STALLED_SHARE:
            self.stalled_logs += 1
        else:
            self.stalled_logs = 0
        if self._begins("stalled", self.stalled_logs >= STALLED_LOGS):
            self._warn(step, f"{data_wait:.0%} of the time is spent waiting for data; increase dataloader_num_workers")

    def _check_experts(self, first: int, last: int, counts: torch.Tensor) -> None:
        """Check (layers, experts) tokens received in the steps from `first` to `last`."""
        enough_tokens = counts.sum(1, keepdim=True) >= DEAD_EXPERT_TOKENS * counts.shape[1]
        dead = {(layer, expert) for layer, expert in ((counts == 0) & enough_tokens).nonzero().tolist()}
        new = sorted(dead - self.dead_experts)
        if new:
            names = ", ".join(f"expert {expert} of MoE layer {layer}" for layer, expert in new)
            self._warn(last, f"no token reached {names} in steps {first} to {last}")
        self.dead_experts = dead

    def _check_rewards(self, step: int, logs: dict[str, float]) -> None:
        for key in logs:
            name = key.removeprefix("rewards/").removesuffix("/mean")
            if key == name or not key.endswith("/mean"):
                continue
            if self._lasts(f"flat {name}", logs[key] == 0 and not logs[f"rewards/{name}/std"]):
                text = f"the reward {name} was 0 for every answer of {FLAT_LOGS} logs, so it teaches nothing"
                self._warn(step, f"{text}: use easier questions or a better start, or check what it expects")
        if self._lasts("equal groups", logs["frac_reward_zero_std"] == 1):
            text = f"all answers to a question got the same reward in {FLAT_LOGS} logs, so the rewards teach nothing"
            self._warn(step, f"{text}: use harder or easier questions, more num_generations or a higher temperature")

    def _check_lengths(self, step: int, length: float, cut: float) -> None:
        self.first_length = self.first_length or length
        change = f"answers have {length:.1f} tokens, at the start {self.first_length:.1f}"
        if self._begins("short answers", length < SHORT_ANSWERS * self.first_length):
            self._warn(step, f"{change}: look whether a reward favors short ones (`log_completions: true`)")
        if self._begins("long answers", length > LONG_ANSWERS * self.first_length):
            self._warn(step, f"{change}: look whether a reward favors long ones (`log_completions: true`)")
        if self._begins("cut answers", cut > CUT_ANSWERS):
            text = f"{cut:.0%} of the answers do not end within max_completion_length"
            self._warn(step, f"{text}: raise it, or reward short answers (`length`)")

    def _check_variety(self, step: int, entropy: float, equal: float) -> None:
        """Check the entropy in nats per token, and the share of questions whose answers all got the same reward."""
        self.first_variety = self.first_variety or (entropy, equal)
        first_entropy, first_equal = self.first_variety
        if self._begins("alike answers", entropy < LOW_ENTROPY * first_entropy and equal > first_equal):
            change = f"the entropy of the answers is {entropy:.3f}, at the start {first_entropy:.3f}"
            groups = f"the share of groups with equal rewards {equal:.0%}, at the start {first_equal:.0%}"
            advice = "look whether all questions get the same answer (`log_completions: true`)"
            self._warn(step, f"{change}; {groups}: {advice}; if so, add another reward or raise beta")

    def _lasts(self, state: str, holds: bool) -> bool:
        """Return True if a state has held in `FLAT_LOGS` logs in a row, once."""
        self.flat_logs[state] = self.flat_logs[state] + 1 if holds else 0
        return self._begins(state, self.flat_logs[state] >= FLAT_LOGS)

    def _begins(self, state: str, holds: bool) -> bool:
        """Return True if a state holds that did not hold at the last call."""
        begins = holds and state not in self.active_states
        if holds:
            self.active_states.add(state)
        else:
            self.active_states.discard(state)
        return begins

    def _warn(self, step: int, text: str) -> None:
        line = f"step {step}: {text}"
        if self.describe_step:
            line += f". The step read {self.describe_step(step)}"
        tqdm.write(f"warning: {line}", file=sys.stderr)
        self.trainer.state.log_history.append({"warning": line, "step": step})
        write_run_card(self.trainer, self.run_card)
