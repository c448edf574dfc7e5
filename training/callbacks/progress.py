"""Print each log as one short line; transformers prints a dictionary."""

import re
from datetime import timedelta

from transformers import ProgressCallback, Trainer


def _short_number(value: float) -> str:
    if value < 10_000:
        return f"{value:.0f}"
    if value < 1e7:
        return f"{value / 1000:.0f}k"
    return f"{value / 1e6:.1f}M"


# The values to print, in this order; trackers and `trainer_state.json` have all values.
COLUMNS = {
    "loss": lambda value: f"loss {value:.4f}",
    "bits_per_byte": lambda value: f"bits/byte {value:.4f}",
    "mean_token_accuracy": lambda value: f"token accuracy {value:.1%}",
    "rewards/accuracies": lambda value: f"preferred {value:.1%}",
    "accuracy": lambda value: f"preferred {value:.1%}",  # of reward models
    "rewards/margins": lambda value: f"margin {value:.3f}",
    "kl": lambda value: f"KL {value:.4f}",
    "completions/mean_length": lambda value: f"length {value:.1f}",
    "grad_norm": lambda value: f"grad {value:.2f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "router/load_max": lambda value: f"busiest expert {value:.2f}x",
    "tokens_per_second": lambda value: f"{_short_number(value)} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "data_wait": lambda value: f"data wait {value:.1%}",
    "eta_seconds": lambda value: f"ETA {timedelta(seconds=round(value))}",
}


REWARD = re.compile("rewards/(.+)/mean")  # of one reward of several


def describe_log(logs: dict[str, float], step: int, max_steps: int) -> str | None:
    """Return a log of training or evaluation as one line; None for other logs, such as the totals at the end.

    The keys of a log share a prefix, which is found from its loss: "" in training, "eval_" or "eval_SOURCE_" in
    evaluation, "train_" in the totals.
    """
    prefix = None
    for key in logs:
        if key == "loss" or key.endswith("_loss"):
            prefix = key.removesuffix("loss")
            break
    if prefix is None or prefix == "train_":
        return None
    parts = [f"step {step}/{max_steps}"]
    if prefix:
        parts.append(prefix.rstrip("_").replace("_", " "))
    for key, show in COLUMNS.items():
        if logs.get(prefix + key) is not None:
            parts.append(show(logs[prefix + key]))
        if key == "loss":
            parts += _describe_rewards(logs, prefix)
    return "  ".join(parts)


def _describe_rewards(logs: dict[str, float], prefix: str) -> list[str]:
    """Return the values of reinforcement learning that have names of their own, or that other trainers log, too."""
    if logs.get(prefix + "reward") is None:
        return []
    parts = [f"reward {logs[prefix + 'reward']:.3f}"]
    for key, value in logs.items():
        if (reward := REWARD.fullmatch(key.removeprefix(prefix))) and value is not None:
            parts.append(f"{reward[1]} {value:.3f}")
    if logs.get(prefix + "entropy") is not None:
        parts.append(f"entropy {logs[prefix + 'entropy']:.3f}")
    if not prefix:  # one answer to each question, as in most evaluations, has no other to differ from
        parts.append(f"equal groups {logs['frac_reward_zero_std']:.0%}")
    return parts


class ProgressLineCallback(ProgressCallback):
    """transformers' progress bar with the lines of [`describe_log`] above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = describe_log(logs, state.global_step, state.max_steps)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


def show_progress_lines(trainer: Trainer) -> None:
    """Replace transformers' progress bar, if there is one, with [`ProgressLineCallback`]."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLineCallback())
