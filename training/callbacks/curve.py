"""`loss_curve.png`: what `Trainer` logged, as a picture that is refreshed at every evaluation."""

import os
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import TrainerCallback

PANELS = {
    "loss": ("loss", "eval_loss"),
    "bits per byte": ("bits_per_byte", "eval_bits_per_byte"),
    "preference accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "expert load, 1 = even": ("router/load_max", "router/load_min"),
    "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",),
}
SOURCE = re.compile("eval_(.+)_bits_per_byte")


def plot_history(history: list[dict[str, float]], path: Path) -> None:
    """Draw one panel per quantity that occurs in `history` (`TrainerState.log_history`) against the step."""
    by_source = {key for row in history for key in row if SOURCE.fullmatch(key)}
    panels = PANELS | {"held-out bits per byte by source": tuple(sorted(by_source))}
    panels = {title: keys for title, keys in panels.items() if any(key in row for row in history for key in keys)}
    if not panels:
        return
    size = (4.5 * len(panels) + 1.5 * bool(by_source), 3.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes[0], panels.items(), strict=True):
        for key in keys:
            points = [(row["step"], row[key]) for row in history if key in row]
            style = "o-" if key.startswith("eval_") else "-"
            label = SOURCE.sub(r"\1", key)
            axis.plot(*zip(*points, strict=True), style, markersize=3, label=label) if points else None
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        beside = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if by_source.issuperset(keys) else {}
        axis.legend(fontsize="small", **beside)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=120)
    plt.close(figure)
    os.replace(partial, path)


class CurveCallback(TrainerCallback):
    """Draws `output_dir/loss_curve.png` at every evaluation and at the end."""

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            plot_history(state.log_history, Path(args.output_dir) / "loss_curve.png")

    on_train_end = on_evaluate
