"""Pictures of scores: bars of all checkpoints, and curves over the steps of a run, readable on a phone."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from buddygpt.cli.errors import reading
from buddygpt.cli.files import write_atomically
from buddygpt.cli.fonts import use_chinese_font
from buddygpt.eval.reporting.results import Run, split_step
from buddygpt.eval.reporting.scores import Score, TaskScores
from buddygpt.eval.suites import load_rows

METRICS = {
    "acc": "accuracy",
    "acc_norm": "per character",
    "acc_bytes": "per byte",
    "exact_match": "exact match",
    "bits_per_byte": "bits/byte",
}
BARS = 3  # groups of bars in a row of the picture
WIDTH = 6.0  # inches: letters stay readable when a phone shows the whole picture
Group = tuple[str, str]  # task and metric


def plot_scores(scores: dict[str, TaskScores], runs: dict[str, list[Run]], path: Path) -> None:
    """Draw every proportion of every task as a bar per checkpoint, with its interval and a dashed chance level."""
    groups = drawn_groups(scores, ("share",))
    titles = dict(zip(groups, drawable([bar_title(group, groups, runs) for group in groups]), strict=True))
    names = drawable(list(scores))
    rows = [groups[start : start + BARS] for start in range(0, len(groups), BARS)] or [[]]
    figure, all_axes = plt.subplots(
        len(rows), 1, figsize=(WIDTH, 0.6 + 2.3 * len(rows)), layout="constrained", squeeze=False
    )
    for axes, row in zip(all_axes[:, 0], rows, strict=True):
        draw_bars(axes, row, scores, names)
        axes.set_xticks(range(len(row)), [titles[group] for group in row], fontsize=9)
        axes.set(ylim=(0, 102), xlim=(-0.5, min(BARS, max(1, len(groups))) - 0.5))
    figure.supylabel("score in %, with 95% interval (dashed: chance)", fontsize=9)
    labels = all_axes[0, 0].get_legend_handles_labels()
    if labels[0]:
        figure.legend(*labels, loc="outside upper center", ncols=min(len(scores), 4), fontsize=9)
    save(figure, path)


def draw_bars(axes: Any, groups: list[Group], scores: dict[str, TaskScores], names: list[str]) -> None:
    """Draw a bar for each group and checkpoint; `names` are those of the checkpoints in the legend."""
    width = 0.8 / len(scores)
    for place, (label, of_checkpoint) in enumerate(zip(names, scores.values(), strict=True)):
        centers, values, below, above, chances = [], [], [], [], []
        for x, (task, metric) in enumerate(groups):
            score = of_checkpoint.get(task, {}).get(metric)
            if score is None or not score["ci95"]:
                continue
            low, high = score["ci95"]
            centers.append(x - 0.4 + width * (place + 0.5))
            values.append(100 * score["value"])
            below.append(max(100 * (score["value"] - low), 0))
            above.append(max(100 * (high - score["value"]), 0))
            if score["chance"]:
                chances.append((x, 100 * score["chance"]))
        axes.bar(centers, values, width, yerr=[below, above], capsize=2, error_kw={"elinewidth": 1}, label=label)
        for x, chance in chances:
            axes.hlines(chance, x - 0.45, x + 0.45, colors="black", linestyles="dashed", linewidth=1)


def plot_steps(
    scores: dict[str, TaskScores], of_runs: dict[str, list[str]], runs: dict[str, list[Run]], path: Path
) -> None:
    """Draw the scores of training runs by step: a panel per task, of its main metric, with intervals as bands.

    Args:
        scores: Scores by checkpoint.
        of_runs: The checkpoints `RUN@STEP` of each run, in the order of their steps.
        runs: Results files by checkpoint.
        path: The picture.
    """
    drawn = {name: scores[name] for names in of_runs.values() for name in names}
    groups = main_groups(drawn_groups(drawn, ("share", "number", "bits_per_byte")))
    titles = drawable([bar_title(group, [group] * 2, runs, width=34) for group in groups])  # with the metric
    labels = drawable(list(of_runs))
    n_rows = -(-len(groups) // 2)
    figure, all_axes = plt.subplots(
        n_rows, 2, figsize=(WIDTH, 0.5 + 2.4 * n_rows), layout="constrained", squeeze=False
    )
    panels = all_axes.ravel()
    for axes, (task, metric), title in zip(panels, groups, titles, strict=False):
        chance = None
        for label, names in zip(labels, of_runs.values(), strict=True):
            points = [
                (split_step(name)[1], scores[name][task][metric]) for name in names if _has(scores, name, task, metric)
            ]
            chance = next((score["chance"] for _, score in points if score["chance"]), chance)
            draw_curve(axes, points, label)
        if chance:
            axes.axhline(100 * chance, color="black", linestyle="dashed", linewidth=1)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.ticklabel_format(style="plain", useOffset=False)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.grid(alpha=0.3)
    for axes in panels[len(groups) :]:
        axes.remove()
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("score (accuracies in %), with 95% interval", fontsize=9)
    handles = panels[0].get_legend_handles_labels()
    if len(of_runs) > 1:
        figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=9)
    save(figure, path)


def draw_curve(axes: Any, points: Sequence[tuple[int | None, Score]], label: str) -> None:
    """Draw one run in a panel."""
    scale = 100 if all(score["kind"] == "share" for _, score in points) else 1
    steps = [step for step, _ in points]
    values = [scale * score["value"] for _, score in points]
    (line,) = axes.plot(steps, values, marker="o", markersize=3, label=label)
    bounds = [score["ci95"] or [score["value"]] * 2 for _, score in points]
    low, high = ([scale * bound for bound in column] for column in zip(*bounds, strict=True))
    axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())


def drawn_groups(scores: dict[str, TaskScores], kinds: tuple[str, ...]) -> list[Group]:
    """Return the tasks and metrics of these kinds that some checkpoint has, without subjects."""
    groups: dict[Group, None] = {}
    for of_checkpoint in scores.values():
        for task, metrics in of_checkpoint.items():
            for metric, score in metrics.items():
                if "/" not in task and score["ci95"] and score["kind"] in kinds:
                    groups[task, metric] = None
    return list(groups)


def main_groups(groups: list[Group]) -> list[Group]:
    """Keep one metric of each task: the one that eval/suites.yaml says to read, or bits per byte, or the first."""
    to_read = {row.task: row.metric for row in load_rows()}
    by_task: dict[str, list[str]] = {}
    for task, metric in groups:
        by_task.setdefault(task, []).append(metric)
    kept = []
    for task, metrics in by_task.items():
        wanted = [to_read.get(task), "bits_per_byte", metrics[0]]
        kept.append((task, next(metric for metric in wanted if metric in metrics)))
    return kept


def _has(scores: dict[str, TaskScores], name: str, task: str, metric: str) -> bool:
    return metric in scores[name].get(task, {})


def bar_title(group: Group, groups: list[Group], runs: dict[str, list[Run]], width: int = 18) -> str:
    """Return the `task_alias` of a task in short lines, and the metric if several metrics of the task are drawn."""
    task, metric = group
    title = task
    for of_checkpoint in runs.values():
        for path, results in of_checkpoint:
            with reading(path):
                title = str(results["results"].get(task, {}).get("alias", title))
    if sum(other == task for other, _ in groups) > 1:
        title += f" ({METRICS.get(metric, metric)})"
    return textwrap.fill(title.replace("_", " ").replace("$", r"\$").strip(), width)


def drawable(labels: list[str]) -> list[str]:
    """Return labels that matplotlib can draw: without a Chinese font, a number instead of other than ASCII.

    Call it before the figure is made: its texts keep the font that they begin with.
    """
    if all(label.isascii() for label in labels) or use_chinese_font():
        return labels
    return [label if label.isascii() else f"no. {number}" for number, label in enumerate(labels, 1)]


def save(figure: Any, path: Path) -> None:
    """Write a figure as a picture and close it."""
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
