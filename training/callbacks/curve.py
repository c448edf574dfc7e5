"""Draw `loss_curve.png` from the values that `Trainer` logged."""

import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from buddygpt.training.callbacks.figures import plt, save_figure

PANELS = {
    "loss": ("loss", "eval_loss"),
    "bits per byte": ("bits_per_byte", "eval_bits_per_byte"),
    "preference accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "expert load, 1 = even": ("router/load_max", "router/load_min"),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
}
SOURCE = re.compile("eval_(.+)_bits_per_byte")  # bits per byte of the held-out text of one source
SOURCES_PANEL = "held-out bits per byte by source"


class CurveCallback(TrainerCallback):
    """Draws `output_dir/loss_curve.png` at every evaluation and at the end."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_history(state.log_history, Path(args.output_dir) / "loss_curve.png")

    on_train_end = on_evaluate


def plot_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw one panel for each entry of `PANELS` that occurs in `history` (`TrainerState.log_history`), by step."""
    panels = _find_panels(history)
    if not panels:
        return
    width = 4.5 * len(panels)
    if SOURCES_PANEL in panels:
        width += 1.5  # for its legend, which has many lines and stands to the right of the panel
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 3.5), squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
        for key in keys:
            steps = [row["step"] for row in history if key in row]
            values = [row[key] for row in history if key in row]
            style = "o-" if key.startswith("eval_") else "-"
            axis.plot(steps, values, style, markersize=3, label=SOURCE.sub(r"\1", key))
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if title == SOURCES_PANEL:
            axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        else:
            axis.legend(fontsize="small")
    save_figure(figure, path)


def _find_panels(history: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the keys to draw in each panel; panels without values are left out."""
    logged = {key for row in history for key in row}
    panels = {title: [key for key in keys if key in logged] for title, keys in PANELS.items()}
    panels[SOURCES_PANEL] = sorted(key for key in logged if SOURCE.fullmatch(key))
    return {title: keys for title, keys in panels.items() if keys}
