"""Draw `loss_curve.png` from the values that `Trainer` logged."""

import math
import re
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from buddygpt.cli.fonts import plot_labels
from buddygpt.training.callbacks.figures import plt, save_figure

# title -> {key of the logs: label}
PANELS = {
    "loss": {"loss": "training", "eval_loss": "held-out"},
    "bits per byte": {"bits_per_byte": "training", "eval_bits_per_byte": "held-out"},
    "preference accuracy": {
        "rewards/accuracies": "training",
        "eval_rewards/accuracies": "held-out",
        "accuracy": "training",  # of reward models
        "eval_accuracy": "held-out",
    },
    "margin of the better answers": {"rewards/margins": "training", "eval_rewards/margins": "held-out"},
    "reward": {"reward": "training", "eval_reward": "held-out"},
    "KL divergence from the start": {"kl": "training", "eval_kl": "held-out"},
    "entropy of the answers": {"entropy": "training", "eval_entropy": "held-out"},
    "answer length (tokens)": {"completions/mean_length": "training", "eval_completions/mean_length": "held-out"},
    "groups of equal rewards": {"frac_reward_zero_std": "share of the groups"},
    "expert load (1 = even)": {"router/load_max": "busiest expert", "router/load_min": "idlest expert"},
    "learning rate": {"learning_rate": "learning rate"},
}
PAUSE = 10  # seconds between two drawings, each of which takes up to one
SOURCE = re.compile("eval_(.+)_bits_per_byte")  # bits per byte of the held-out text of one source
SOURCES_PANEL = "held-out bits per byte by source"
REWARD = re.compile("rewards/(.+)/mean")
REWARDS_PANEL = "rewards"
ONLY_WITH_REWARD = "entropy of the answers"  # supervised trainers log an entropy, too
LOG_SCALE = ("loss", "bits per byte", SOURCES_PANEL)  # if the first steps would flatten the rest of the curve


class CurveCallback(TrainerCallback):
    """Draws `output_dir/loss_curve.png` at the end, and at evaluations that are `PAUSE` seconds apart or more."""

    def __init__(self):
        self.drawn = time.monotonic()
        self.is_over = False

    def on_evaluate(self, args, state, control, **kwargs):
        if self.is_over or time.monotonic() - self.drawn >= PAUSE:
            self._draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.is_over = True  # an evaluation may follow
        self._draw(args, state)

    def _draw(self, args, state) -> None:
        if state.is_world_process_zero:
            plot_history(state.log_history, Path(args.output_dir) / "loss_curve.png")
            self.drawn = time.monotonic()


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel, two in a row, for each entry of `PANELS` that occurs in `history` (`TrainerState.log_history`)."""
    panels = _find_panels(history)
    if not panels:
        return
    rows = math.ceil(len(panels) / 2)
    columns = min(len(panels), 2)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis, (title, labels) in zip(axes.flat, panels.items(), strict=False):
        for key, label in labels.items():
            _draw_line(axis, history, key, label)
        drawn = [value for line in axis.lines for value in line.get_ydata()]
        if title in LOG_SCALE and drawn and 0 < 4 * min(drawn) < max(drawn):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(_label_two_and_five)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3, which="both")
        if len(labels) > 1:
            axis.legend(fontsize="small")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    save_figure(figure, path)


def _draw_line(axis: plt.Axes, history: list[dict[str, Any]], key: str, label: str) -> None:
    steps = [row["step"] for row in history if row.get(key) is not None]
    values = [row[key] for row in history if row.get(key) is not None]
    style = "o-" if key.startswith("eval_") else "-"
    axis.plot(steps, values, style, markersize=3, label=label)


def _label_two_and_five(value: float, position: int) -> str:
    """Return the label of a minor tick of a logarithmic axis: 0.2 and 0.5, but not 0.3."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _find_panels(history: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the keys to draw in each panel and their labels; panels without values are left out."""
    logged = {key for row in history for key in row}
    panels = {}
    for title, labels in PANELS.items():
        panels[title] = {key: label for key, label in labels.items() if key in logged}
    if "reward" not in logged:
        panels.pop(ONLY_WITH_REWARD)
    for title, pattern in ((REWARDS_PANEL, REWARD), (SOURCES_PANEL, SOURCE)):
        keys = sorted(key for key in logged if pattern.fullmatch(key))
        names = [pattern.fullmatch(key)[1] for key in keys]
        panels[title] = dict(zip(keys, plot_labels(names), strict=True))
    if len(panels[REWARDS_PANEL]) == 1:  # it is the total
        panels.pop(REWARDS_PANEL)
    return {title: labels for title, labels in panels.items() if labels}
