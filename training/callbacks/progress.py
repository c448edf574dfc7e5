"""One short line for each log in the terminal, where transformers prints a dictionary."""

from datetime import timedelta

from transformers import ProgressCallback, Trainer


def _whole(value: float) -> str:
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k" if value < 1e7 else f"{value / 1e6:.1f}M"


# What is shown, in this order; trackers and `trainer_state.json` have everything.
COLUMNS = {
    "loss": lambda value: f"loss {value:.4f}",
    "bits_per_byte": lambda value: f"bits/byte {value:.4f}",
    "mean_token_accuracy": lambda value: f"token accuracy {value:.1%}",
    "rewards/accuracies": lambda value: f"preferred {value:.1%}",
    "rewards/margins": lambda value: f"margin {value:.3f}",
    "grad_norm": lambda value: f"grad {value:.2f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "router/load_max": lambda value: f"busiest expert {value:.2f}x",
    "tokens_per_second": lambda value: f"{_whole(value)} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "data_wait": lambda value: f"data wait {value:.1%}",
    "eta_seconds": lambda value: f"ETA {timedelta(seconds=round(value))}",
}


def describe_log(logs: dict[str, float], step: int, max_steps: int) -> str | None:
    """Return a log as one line, or None where it holds nothing to show: the totals at the end of training."""
    prefix = next((key.removesuffix("loss") for key in logs if key == "loss" or key.endswith("_loss")), None)
    if prefix in (None, "train_"):
        return None
    shown = [show(logs[prefix + key]) for key, show in COLUMNS.items() if prefix + key in logs]
    title = prefix.rstrip("_").replace("_", " ")
    return "  ".join([f"step {step}/{max_steps}", *([title] if title else []), *shown])


class ProgressLineCallback(ProgressCallback):
    """transformers' progress bar with [`describe_log`]'s lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = describe_log(logs, state.global_step, state.max_steps)
        if state.is_world_process_zero and self.training_bar is not None and line:
            self.training_bar.write(line)


def show_progress_lines(trainer: Trainer) -> None:
    """Put [`ProgressLineCallback`] in the place of transformers' progress bar, where there is one."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLineCallback())
