"""A report of what lm-eval measured: every score beside its chance level and its 95% interval.

    python eval/report.py --results outputs/eval --output outputs/eval/report.md

Reads `RESULTS/NAME/**/results_*.json` and the samples beside it, as `eval/run_eval.py` or
`lm_eval --output_path RESULTS/NAME --log_samples` wrote them; where a task was run more than once the newest counts.
Writes the report, `scores.png` and `scores.json` into the folder of `output`.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from scipy.stats import binomtest

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script

Score = dict[str, Any]  # value, n, ci95 (low, high) or None, chance or None
Scores = dict[str, dict[str, dict[str, Score]]]  # checkpoint -> task or task/subject -> metric -> score
Run = tuple[Path, dict[str, Any]]  # a results file and what it holds


@dataclass
class ReportArguments:
    results: str = field(default="outputs/eval", metadata={"help": "A folder with one folder per checkpoint."})
    output: str = field(
        default="outputs/eval/report.md",
        metadata={"help": "The report; its folder also gets scores.png, scores.json."},
    )


def main() -> None:
    (args,) = parse_arguments(ReportArguments, description=__doc__)
    runs = read_runs(Path(args.results))
    scores = {name: checkpoint_scores(of_checkpoint) for name, of_checkpoint in runs.items()}
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output.parent / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False))
    plot(scores, output.parent / "scores.png")
    _write(output, report(scores, runs))
    print(f"{output}: {len(scores)} checkpoints")


def read_runs(results: Path) -> dict[str, list[Run]]:
    """The results files of each checkpoint, oldest first.

    Raises:
        UserError: There are none.
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(results.glob("*/**/results_*.json"), key=lambda path: path.name):
        runs[path.relative_to(results).parts[0]].append((path, json.loads(path.read_text(encoding="utf-8"))))
    if not runs:
        raise UserError(f"{results} has no NAME/results_*.json; eval/run_eval.py writes them.")
    return dict(sorted(runs.items(), key=lambda item: item[1][0][0].name))


def checkpoint_scores(runs: list[Run]) -> dict[str, dict[str, Score]]:
    """Scores of one checkpoint by task, and by `task/subject` where a task has subjects or a group has tasks.

    A metric that is 0 or 1 for each question is counted from the samples, and so is chance: the mean of 1 / options.
    Any other (bits per byte) is lm-eval's own figure, without an interval.
    """
    scores: dict[str, dict[str, Score]] = {}
    for path, results in runs:
        subtasks = results["group_subtasks"]
        inner = {child for children in subtasks.values() for child in children}
        for task in sorted({*results["results"], *results.get("groups", {})} - inner):
            samples = {leaf: _samples(path, leaf) for leaf in _leaves(task, subtasks)}
            everything = [sample for rows in samples.values() for sample in rows]
            scores[task] = _scores(everything, results["results"].get(task, {}))
            for subject, rows in _by_subject(task, samples):
                scores[f"{task}/{subject}"] = _scores(rows, {})
    return scores


def _leaves(task: str, subtasks: dict[str, list[str]]) -> Iterator[str]:
    for child in subtasks.get(task, []):
        yield from _leaves(child, subtasks)
    if not subtasks.get(task):
        yield task


def _samples(results: Path, task: str) -> list[dict[str, Any]]:
    path = results.with_name(f"samples_{task}_{results.stem.removeprefix('results_')}.jsonl")
    if not path.is_file():
        raise UserError(f"{path} does not exist; run lm_eval with --log_samples.")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _by_subject(task: str, samples: dict[str, list[dict]]) -> Iterator[tuple[str, list[dict]]]:
    if list(samples) != [task]:
        for leaf, rows in samples.items():
            yield leaf.removeprefix(f"{task}_"), rows
        return
    subjects = defaultdict(list)
    for sample in samples[task]:
        if "subject" in sample["doc"]:
            subjects[sample["doc"]["subject"]].append(sample)
    yield from sorted(subjects.items())


def _scores(samples: list[dict[str, Any]], aggregated: dict[str, float]) -> dict[str, Score]:
    rows: dict[str, list[dict]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            rows[metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"].append(sample)
    scores = {}
    for name, of_metric in rows.items():
        metric, _, filter_name = name.partition(",")
        values = [sample[metric] for sample in of_metric]
        if all(value in (0, 1) for value in values):
            scores[name] = proportion(int(sum(values)), len(values), _chance(of_metric))
        elif f"{metric},{filter_name or 'none'}" in aggregated:
            value = aggregated[f"{metric},{filter_name or 'none'}"]
            scores[name] = {"value": value, "n": len(values), "ci95": None, "chance": None}
    return scores


def _chance(samples: list[dict[str, Any]]) -> float | None:
    options = [len(sample["arguments"]) for sample in samples]
    return sum(1 / number for number in options) / len(options) if min(options) > 1 else None


def proportion(successes: int, n: int, chance: float | None) -> Score:
    """A proportion with its 95% Wilson interval."""
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return {"value": successes / n, "n": n, "ci95": [float(interval.low), float(interval.high)], "chance": chance}


def at_chance(score: Score) -> bool:
    """Whether chance lies inside the score's 95% interval."""
    return score["chance"] is not None and score["ci95"][0] <= score["chance"] <= score["ci95"][1]


def report(scores: Scores, runs: dict[str, list[Run]]) -> str:
    """The report as Markdown."""
    tasks = list(dict.fromkeys(task for of_checkpoint in scores.values() for task in of_checkpoint))
    overall = [task for task in tasks if "/" not in task]
    lines = [
        "# Evaluation",
        "",
        "Score in percent, with its 95% Wilson interval; `(chance)`: the interval holds the chance level.",
        "",
        *_table("task", overall, scores),
        "",
        "![scores](scores.png)",
    ]
    for task in overall:
        subjects = [name for name in tasks if name.startswith(f"{task}/")]
        if subjects:
            lines += ["", f"## {task} by subject", "", *_table("subject", subjects, scores, first_metric_only=True)]
    lines += ["", "## Checkpoints", "", *_checkpoints(runs)]
    return "\n".join(lines) + "\n"


def _table(head: str, tasks: list[str], scores: Scores, first_metric_only: bool = False) -> list[str]:
    lines = [f"| {head} | metric | n | chance | {' | '.join(scores)} |", "|---|---|--:|--:|" + "--:|" * len(scores)]
    for task in tasks:
        metrics = list(dict.fromkeys(metric for measured in scores.values() for metric in measured.get(task, {})))
        for metric in metrics[:1] if first_metric_only else metrics:
            row = [of_checkpoint.get(task, {}).get(metric) for of_checkpoint in scores.values()]
            n = "/".join(dict.fromkeys(str(score["n"]) for score in row if score))
            chance = next((f"{score['chance']:.1%}" for score in row if score and score["chance"]), "")
            cells = " | ".join(_cell(score) for score in row)
            lines.append(f"| {task.rpartition('/')[2]} | {metric} | {n} | {chance} | {cells} |")
    return lines


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    if score["ci95"] is None:
        return f"{score['value']:.4f}"
    low, high = score["ci95"]
    return f"{score['value']:.1%} [{100 * low:.1f}, {100 * high:.1f}]" + (" (chance)" if at_chance(score) else "")


def _checkpoints(runs: dict[str, list[Run]]) -> list[str]:
    lines = ["| name | folder | prompts | limit | lm-eval |", "|---|---|---|---|---|"]
    for name, of_checkpoint in runs.items():
        for _, results in of_checkpoint:
            config = results["config"]
            prompts = "chat template" if results.get("chat_template") else "bare text"
            limit = "none" if config["limit"] is None else f"first {config['limit']:g}"
            folder = config["model_args"]["pretrained"]
            lines.append(f"| {name} | {folder} | {prompts} | {limit} | {results['lm_eval_version']} |")
    return list(dict.fromkeys(lines))


def plot(scores: Scores, path: Path) -> None:
    """Draw every proportion by checkpoint, with its interval and, dashed, its chance level."""
    rows = dict.fromkeys(
        (task, metric)
        for tasks in scores.values()
        for task, metrics in tasks.items()
        for metric, score in metrics.items()
        if "/" not in task and score["ci95"]
    )
    figure, axes = plt.subplots(figsize=(max(6.0, 1.5 * len(rows)), 4), layout="constrained")
    width = 0.8 / len(scores)
    for place, (name, tasks) in enumerate(scores.items()):
        drawn = [(x, tasks[task][metric]) for x, (task, metric) in enumerate(rows) if metric in tasks.get(task, {})]
        values = [score["value"] for _, score in drawn]
        below = [score["value"] - score["ci95"][0] for _, score in drawn]
        above = [score["ci95"][1] - score["value"] for _, score in drawn]
        middles = [x - 0.4 + width * (place + 0.5) for x, _ in drawn]
        axes.bar(middles, values, width, yerr=[below, above], capsize=3, label=name)
        for x, score in drawn:
            if score["chance"]:
                axes.hlines(score["chance"], x - 0.45, x + 0.45, colors="black", linestyles="dashed", linewidth=1)
    axes.set_xticks(range(len(rows)), [f"{task}\n{metric}" for task, metric in rows], fontsize=8)
    axes.set(ylim=(0, 1.02), ylabel="score, 95% interval (dashed: chance)")
    axes.legend()
    unfinished = path.with_name("unfinished_" + path.name)
    figure.savefig(unfinished, dpi=120)
    plt.close(figure)
    os.replace(unfinished, path)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


if __name__ == "__main__":
    run_script(main)
