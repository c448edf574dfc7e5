"""Write a report of lm-eval results: every score with its chance level and its 95% interval.

    python eval/report.py --results outputs/eval --output outputs/eval/report.md

Reads `RESULTS/NAME/**/results_*.json` and the samples next to it, as `eval/run_eval.py` or
`lm_eval --output_path RESULTS/NAME --log_samples` writes them. If a task was run more than once, the newest counts.
Writes the report, and `scores.png` and `scores.json` to the same folder. The scores also go to the run card and the
model card of each checkpoint that our recipes have trained.
"""

import json
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from scipy.stats import binomtest

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, reading, run_script
from buddygpt.cli.files import read_json, write_atomically
from buddygpt.cli.fonts import use_chinese_font
from buddygpt.cli.tables import escape_markdown, markdown_table
from buddygpt.training.model_card import add_evaluation

Sample = dict[str, Any]  # one question with the model's answer, a line of lm-eval's samples_*.jsonl
Score = dict[str, Any]  # value, n, ci95: [low, high] or None, chance: a float or None
TaskScores = dict[str, dict[str, Score]]  # task or task/subject -> metric -> score
Run = tuple[Path, dict[str, Any]]  # a results file and its content

METRICS = {"acc": "accuracy", "acc_norm": "per character", "exact_match": "exact match"}  # in the picture


@dataclass
class ReportArguments:
    results: str = field(default="outputs/eval", metadata={"help": "A folder with one folder per checkpoint."})
    output: str = field(
        default="outputs/eval/report.md",
        metadata={"help": "The report. scores.png and scores.json go to the same folder."},
    )


def main() -> None:
    (args,) = parse_arguments(ReportArguments, description=__doc__)
    runs = read_runs(Path(args.results))
    scores = {checkpoint: score_tasks(of_checkpoint) for checkpoint, of_checkpoint in runs.items()}
    report = to_markdown(scores, runs)

    output = Path(args.output)
    with write_atomically(output.parent / "scores.json") as partial:
        partial.write_text(json.dumps(scores, indent=2, ensure_ascii=False), encoding="utf-8")
    plot(scores, runs, output.parent / "scores.png")
    with write_atomically(output) as partial:
        partial.write_text(report, encoding="utf-8")
    for checkpoint, of_checkpoint in scores.items():
        add_evaluation(*describe_evaluation(of_checkpoint, runs[checkpoint]))
    print(f"{output}: {len(scores)} checkpoints")


def describe_evaluation(scores: TaskScores, runs: list[Run]) -> tuple[str, dict[str, Any]]:
    """Return the folder of a checkpoint, and what its model card tells of the evaluation: prompts, tasks, scores."""
    path, results = runs[-1]
    with reading(path):
        folder = str(results["config"]["model_args"]["pretrained"])
    prompts = "chat template" if results.get("chat_template") else "bare text"
    tasks = {task: metrics for task, metrics in scores.items() if "/" not in task}  # without subjects
    return folder, {"prompts": prompts, "tasks": tasks}


def read_runs(results: Path) -> dict[str, list[Run]]:
    """Return the results files of each checkpoint, oldest first; checkpoints in the order of their first run.

    Raises:
        UserError: There are no results files.
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    # The names contain the time, so sorting by name sorts by time.
    for path in sorted(results.glob("*/**/results_*.json"), key=lambda path: path.name):
        checkpoint = path.relative_to(results).parts[0]
        runs[checkpoint].append((path, read_json(path)))
    if not runs:
        raise UserError(f"{results} has no NAME/results_*.json; eval/run_eval.py writes them.")
    return dict(runs)


def score_tasks(runs: list[Run]) -> TaskScores:
    """Return the scores of one checkpoint by task and by `task/subject`. Later runs replace earlier ones.

    The subjects of a group are its subtasks. The subjects of a single task are the values of the column `subject`, if
    its rows have one.
    """
    scores: TaskScores = {}
    for path, results in runs:
        with reading(path):
            for task in reported_tasks(results):
                leaves = leaf_tasks(task, results["group_subtasks"])
                samples = {leaf: read_samples(path, leaf, results) for leaf in leaves}
                all_samples = [sample for of_leaf in samples.values() for sample in of_leaf]
                scores[task] = score_samples(all_samples, dict(results["results"].get(task, {})))
                for subject, of_subject in split_by_subject(task, samples).items():
                    scores[f"{task}/{subject}"] = score_samples(of_subject, {})
    return scores


def reported_tasks(results: dict[str, Any]) -> list[str]:
    """Return the tasks and groups of a results file. Tasks of a group are left out: they are its subjects."""
    tasks = {*results["results"], *results.get("groups", {})}
    for children in results["group_subtasks"].values():
        tasks -= set(children)
    if not tasks:
        raise ValueError("no tasks")
    return sorted(tasks)


def leaf_tasks(task: str, subtasks: dict[str, list[str]]) -> list[str]:
    """Return the tasks of a group, also those of groups inside it; for a task, the task itself."""
    if not subtasks.get(task):
        return [task]
    leaves = []
    for child in subtasks[task]:
        leaves += leaf_tasks(child, subtasks)
    return leaves


def read_samples(path: Path, task: str, results: dict[str, Any]) -> list[Sample]:
    """Return the samples of a task that belong to the results file `path`.

    Raises:
        UserError: The samples are missing, incomplete or damaged.
    """
    time = path.stem.removeprefix("results_")
    path = path.with_name(f"samples_{task}_{time}.jsonl")
    if not path.is_file():
        raise UserError(f"{path} does not exist; run lm_eval with --log_samples.")
    with reading(path), path.open(encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
        expected = results.get("n-samples", {}).get(task, {}).get("effective")
        found = len({sample["doc_id"] for sample in samples})
        if not samples or (expected is not None and found != expected):
            raise ValueError(f"{found} of {expected or 'at least 1'} questions")
        for sample in samples:
            len(sample["arguments"]), sample["filter"].strip(), "subject" in sample["doc"]  # used later
            if any(sample[metric] is None for metric in sample["metrics"]):
                raise ValueError(f"question {sample['doc_id']} has no score")
    return samples


def split_by_subject(task: str, samples: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
    """Return the samples of each subject, for a task or for a group of tasks; see [`score_tasks`]."""
    is_group = list(samples) != [task]
    if is_group:
        return {leaf.removeprefix(f"{task}_"): of_leaf for leaf, of_leaf in samples.items()}
    subjects: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples[task]:
        if "subject" in sample["doc"]:
            subjects[sample["doc"]["subject"]].append(sample)
    return dict(sorted(subjects.items()))


def score_samples(samples: list[Sample], aggregated: dict[str, float]) -> dict[str, Score]:
    """Return the score of each metric over some samples.

    A metric that is 0 or 1 for each question becomes a proportion with an interval. For any other (bits per byte), the
    score is lm-eval's own figure, without an interval; it is left out if lm-eval has none.

    Args:
        samples: Samples of one task, group or subject.
        aggregated: lm-eval's figures for the same samples, by "metric,filter".
    """
    # A task with several filters has one sample per question and filter.
    by_metric: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            by_metric[metric, sample["filter"]].append(sample)

    scores = {}
    for (metric, filter_name), of_metric in by_metric.items():
        name = metric if filter_name == "none" else f"{metric},{filter_name}"
        values = [sample[metric] for sample in of_metric]
        if all(value in (0, 1) for value in values):
            scores[name] = proportion(int(sum(values)), len(values), chance_level(of_metric))
        elif f"{metric},{filter_name}" in aggregated:
            value = float(aggregated[f"{metric},{filter_name}"])
            scores[name] = {"value": value, "n": len(values), "ci95": None, "chance": None}
    return scores


def chance_level(samples: list[Sample]) -> float | None:
    """Return the expected score of a random choice, the mean of 1 / options, or None without options."""
    n_options = [len(sample["arguments"]) for sample in samples]
    if min(n_options) <= 1:
        return None
    return sum(1 / n for n in n_options) / len(n_options)


def proportion(successes: int, n: int, chance: float | None) -> Score:
    """Return a proportion as a score with its 95% Wilson interval."""
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return {"value": successes / n, "n": n, "ci95": [float(interval.low), float(interval.high)], "chance": chance}


def at_chance(score: Score) -> bool:
    """Return True if the chance level lies inside the score's 95% interval."""
    if score["chance"] is None:
        return False
    low, high = score["ci95"]
    return low <= score["chance"] <= high


def to_markdown(scores: dict[str, TaskScores], runs: dict[str, list[Run]]) -> str:
    """Return the report: a table of all tasks, a table per task of its subjects, and the checkpoints."""
    names = list(dict.fromkeys(name for of_checkpoint in scores.values() for name in of_checkpoint))
    tasks = [name for name in names if "/" not in name]
    sections = [
        "# Evaluation",
        "Score in percent, with its 95% Wilson interval; `(chance)`: the interval holds the chance level.",
        score_table("task", tasks, scores),
        "![scores](scores.png)",
    ]
    for task in tasks:
        subjects = [name for name in names if name.startswith(f"{task}/")]
        if subjects:
            sections += [
                f"## {escape_markdown(task)} by subject",
                score_table("subject", subjects, scores, first_metric_only=True),
            ]
    sections += [
        "## Prompts",
        "Examples before each question (few-shot), and questions whose prompt was truncated on the left to fit into "
        "the model's context. Only `eval/run_eval.py` counts the latter.",
        prompt_table(tasks, runs),
        "## Checkpoints",
        checkpoint_table(runs),
    ]
    return "\n\n".join(sections) + "\n"


def score_table(title: str, names: list[str], scores: dict[str, TaskScores], first_metric_only: bool = False) -> str:
    """Return a table with a row per task (or subject) and metric, and a column per checkpoint.

    Args:
        title: Title of the first column.
        names: Tasks or `task/subject` names.
        scores: Scores of each checkpoint.
        first_metric_only: Show only the first metric of each name.
    """
    header = [title, "metric", "n", "chance", *map(escape_markdown, scores)]
    align = ["---", "---", "--:", "--:"] + ["--:"] * len(scores)
    rows = []
    for name in names:
        by_checkpoint = [of_checkpoint.get(name, {}) for of_checkpoint in scores.values()]
        metrics = list(dict.fromkeys(metric for measured in by_checkpoint for metric in measured))
        if first_metric_only:
            metrics = metrics[:1]
        for metric in metrics:
            found = [measured[metric] for measured in by_checkpoint if metric in measured]
            # Checkpoints may have been asked a different number of questions: 100/200.
            n = "/".join(dict.fromkeys(str(score["n"]) for score in found))
            chances = [f"{score['chance']:.1%}" for score in found if score["chance"]]
            cells = [format_score(measured.get(metric)) for measured in by_checkpoint]
            names_of_row = map(escape_markdown, (name.rpartition("/")[2], metric))
            rows.append([*names_of_row, n, chances[0] if chances else "", *cells])
    return markdown_table(header, rows, align)


def format_score(score: Score | None) -> str:
    """Return `25.1% [20.8, 29.8] (chance)`, or a plain number for a score without interval."""
    if score is None:
        return ""
    if score["ci95"] is None:
        return f"{score['value']:.4f}"
    low, high = score["ci95"]
    mark = " (chance)" if at_chance(score) else ""
    return f"{score['value']:.1%} [{100 * low:.1f}, {100 * high:.1f}]{mark}"


def prompt_table(tasks: list[str], runs: dict[str, list[Run]]) -> str:
    """Return a table with a row per task, and a column per checkpoint: `5-shot, 12 truncated`."""
    cells = {task: dict.fromkeys(runs, "") for task in tasks}
    for checkpoint, of_checkpoint in runs.items():
        for path, results in of_checkpoint:
            with reading(path):
                for task in reported_tasks(results):
                    leaves = leaf_tasks(task, results["group_subtasks"])
                    shots = "/".join(sorted({str(results["n-shot"][leaf]) for leaf in leaves}))
                    counts = results.get("truncated_prompts")
                    truncated = f"{sum(counts[leaf] for leaf in leaves)} truncated" if counts else "not counted"
                    cells[task][checkpoint] = escape_markdown(f"{shots}-shot, {truncated}")
    rows = [[escape_markdown(task), *of_task.values()] for task, of_task in cells.items()]
    return markdown_table(["task", *map(escape_markdown, runs)], rows)


def checkpoint_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of each checkpoint's folder and of how it was evaluated."""
    rows = []
    for checkpoint, of_checkpoint in runs.items():
        for path, results in of_checkpoint:
            with reading(path):
                config = results["config"]
                folder = str(config["model_args"]["pretrained"])
                prompts = "chat template" if results.get("chat_template") else "bare text"
                limit = "none" if config["limit"] is None else f"first {config['limit']:g}"
                row = [*map(escape_markdown, (checkpoint, folder)), prompts, limit]
                row.append(escape_markdown(str(results["lm_eval_version"])))
            if row not in rows:
                rows.append(row)
    header = ["name", "folder", "prompts", "limit", "lm-eval"]
    return markdown_table(header, rows, align=["---"] * len(header))


def plot(scores: dict[str, TaskScores], runs: dict[str, list[Run]], path: Path) -> None:
    """Draw every proportion of every task as a bar per checkpoint, with its interval and a dashed chance level."""
    # One group of bars per task and metric.
    groups: list[tuple[str, str]] = []
    for of_checkpoint in scores.values():
        for task, metrics in of_checkpoint.items():
            for metric, score in metrics.items():
                is_drawn = "/" not in task and score["ci95"]
                if is_drawn and (task, metric) not in groups:
                    groups.append((task, metric))

    figure, axes = plt.subplots(figsize=(max(6.0, 1.7 * len(groups)), 4), layout="constrained")
    width = 0.8 / len(scores)
    for place, (label, of_checkpoint) in enumerate(zip(drawable(list(scores)), scores.values(), strict=True)):
        centers, values, below, above, chances = [], [], [], [], []
        for x, (task, metric) in enumerate(groups):
            score = of_checkpoint.get(task, {}).get(metric)
            if score is None or not score["ci95"]:
                continue
            low, high = score["ci95"]
            centers.append(x - 0.4 + width * (place + 0.5))
            values.append(100 * score["value"])
            below.append(100 * (score["value"] - low))
            above.append(100 * (high - score["value"]))
            if score["chance"]:
                chances.append((x, 100 * score["chance"]))
        axes.bar(centers, values, width, yerr=[below, above], capsize=3, label=label)
        for x, chance in chances:
            axes.hlines(chance, x - 0.45, x + 0.45, colors="black", linestyles="dashed", linewidth=1)
    axes.set_xticks(range(len(groups)), drawable([bar_title(group, groups, runs) for group in groups]), fontsize=9)
    axes.set(ylim=(0, 102), ylabel="score in %, with 95% interval\n(dashed: chance)")
    figure.legend(loc="outside upper center", ncols=len(scores))
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def bar_title(group: tuple[str, str], groups: list[tuple[str, str]], runs: dict[str, list[Run]]) -> str:
    """Return the `task_alias` of a task in short lines, and the metric if several metrics of the task are drawn."""
    task, metric = group
    title = task
    for of_checkpoint in runs.values():
        for path, results in of_checkpoint:
            with reading(path):
                title = str(results["results"].get(task, {}).get("alias", title))
    if sum(other == task for other, _ in groups) > 1:
        title += f" ({METRICS.get(metric, metric)})"
    return textwrap.fill(title.replace("_", " ").strip(), 18)


def drawable(labels: list[str]) -> list[str]:
    """Return labels that matplotlib can draw: without a Chinese font, a number instead of other than ASCII."""
    if all(label.isascii() for label in labels) or use_chinese_font():
        return labels
    return [label if label.isascii() else f"no. {number}" for number, label in enumerate(labels, 1)]


if __name__ == "__main__":
    run_script(main)
