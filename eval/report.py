"""Write a report of lm-eval results: what scored how much, with which certainty, and what differs.

    python eval/report.py --results outputs/eval --output outputs/eval/report.md
    python eval/report.py --results outputs/eval --output outputs/eval/report.md --baseline base \\
        --average "sft=sft-seed*" --shards outputs/shards/train

Reads `RESULTS/NAME/**/results_*.json` and the samples next to it, as `eval/run_eval.py` or
`lm_eval --output_path RESULTS/NAME --log_samples` writes them. If a task was run more than once, the newest counts.
Checkpoints `RUN@STEP` are those of one training run: they become curves, and the last of them are averaged.

Writes the report, and to the same folder report.html (the report in one file, for any browser), scores.json,
comparisons.json, scores.png and, for runs with steps, scores_by_step.png. The scores also go to the run card and the
model card of each checkpoint that our recipes have trained.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, did_you_mean, reading, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.eval.reporting.comparisons import Comparison, compare_outcomes, compared_pairs, difference_table, explain
from buddygpt.eval.reporting.examples import wrong_answers
from buddygpt.eval.reporting.page import (
    Block,
    Folded,
    Heading,
    Picture,
    Table,
    Text,
    require_markdown,
    to_html,
    to_markdown,
)
from buddygpt.eval.reporting.plots import plot_scores, plot_steps
from buddygpt.eval.reporting.results import Run, by_run, few_shot, leaf_tasks, prompt_form, read_runs, reported_tasks
from buddygpt.eval.reporting.scores import (
    Average,
    TaskOutcomes,
    TaskScores,
    average,
    describe_evaluation,
    equalize_kinds,
    find_averages,
    format_score,
    read_outcomes,
    score_all,
    tasks_at_chance,
)
from buddygpt.training.model_card import add_evaluation


@dataclass
class ReportArguments:
    results: str = field(default="outputs/eval", metadata={"help": "A folder with one folder per checkpoint."})
    output: str = field(
        default="outputs/eval/report.md",
        metadata={"help": "The report. report.html, scores.json and pictures go to the same folder."},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "The checkpoint to compare all others with. Default: the first."}
    )
    average: list[str] = field(
        default_factory=list,
        metadata={"help": "LABEL=NAME,NAME,... or LABEL=PATTERN: average these checkpoints, such as several seeds."},
    )
    last: int = field(default=3, metadata={"help": "Average so many last checkpoints of each RUN@STEP. 0: none."})
    shards: str | None = field(
        default=None, metadata={"help": "Training shards: search the questions in their text, about 0.2 MB/s."}
    )
    examples: int = field(default=5, metadata={"help": "Wrong answers to show per task."})

    def __post_init__(self) -> None:
        for key in ("last", "examples"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} is {getattr(self, key)}; give a number, at least 0")


@dataclass
class Report:
    """Everything that a report shows.

    Attributes:
        runs: Results files by checkpoint.
        scores: Scores by checkpoint, averages included.
        averages: By their label.
        steps: The checkpoints of each run with `RUN@STEP`.
        pairs: Comparisons by (A, B).
        shown: The checkpoints in the main table: of a run with steps the last one, then the averages.
    """

    runs: dict[str, list[Run]]
    scores: dict[str, TaskScores]
    averages: dict[str, Average]
    steps: dict[str, list[str]]
    pairs: dict[tuple[str, str], list[Comparison]]
    shown: list[str]

    @property
    def names(self) -> list[str]:
        """All tasks and `task/subject`."""
        return list(dict.fromkeys(name for of_checkpoint in self.scores.values() for name in of_checkpoint))

    @property
    def tasks(self) -> list[str]:
        return [name for name in self.names if "/" not in name]


def main() -> None:
    (args,) = parse_arguments(ReportArguments, description=__doc__)
    output = Path(args.output)
    require_markdown(output)
    report = evaluate(args)
    blocks = build(report, args)

    comparisons = [{"a": a, "b": b, "rows": rows} for (a, b), rows in report.pairs.items()]
    measured = {name: report.scores[name] for name in report.runs}
    for name, content in {"scores.json": measured, "comparisons.json": comparisons}.items():
        with write_atomically(output.parent / name) as partial:
            partial.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    plot_scores({name: report.scores[name] for name in report.shown}, report.runs, output.parent / "scores.png")
    if report.steps:
        plot_steps(report.scores, report.steps, report.runs, output.parent / "scores_by_step.png")
    with write_atomically(output.parent / "report.html") as partial:
        partial.write_text(to_html("Evaluation / 评测", blocks, output.parent), encoding="utf-8")
    with write_atomically(output) as partial:
        partial.write_text(to_markdown(blocks), encoding="utf-8")
    for checkpoint, of_checkpoint in measured.items():
        add_evaluation(*describe_evaluation(of_checkpoint, report.runs[checkpoint]))
    print(f"{output}: {len(measured)} checkpoints")


def evaluate(args: ReportArguments) -> Report:
    """Read the results, and compute scores, averages and comparisons."""
    runs = read_runs(Path(args.results))
    if args.baseline is not None and args.baseline not in runs:
        match = did_you_mean(args.baseline, runs)
        hint = f"did you mean `{match}`?" if match else f"there are {', '.join(runs)}"
        raise UserError(f"baseline: `{args.baseline}` was not evaluated; {hint}")
    outcomes = {name: read_outcomes(of_checkpoint) for name, of_checkpoint in runs.items()}
    equalize_kinds(outcomes.values())
    averages = {
        label: average(outcomes, members)
        for label, members in find_averages(list(runs), args.average, args.last).items()
    }
    everything: dict[str, TaskOutcomes] = outcomes | {label: each.outcomes for label, each in averages.items()}
    scores = {name: score_all(of_checkpoint) for name, of_checkpoint in everything.items()}
    names = [name for name in everything if everything[name]]
    wanted = compared_pairs(list(runs), args.baseline)
    if len(averages) > 1:  # an average is compared with other averages, and not with its own members
        wanted += compared_pairs(list(averages))
    pairs = {(a, b): compare_outcomes(everything[a], everything[b]) for a, b in wanted}
    steps = by_run(runs)
    earlier = {name for of_run in steps.values() for name in of_run[:-1]}
    shown = [name for name in names if name not in earlier]
    return Report(runs, scores, averages, steps, pairs, shown)


def build(report: Report, args: ReportArguments) -> list[Block]:
    """Return the content of the report."""
    blocks: list[Block] = [
        Heading("Evaluation", "评测", level=1),
        Text(
            "Scores in percent, with their 95% interval; (chance): the interval holds the score of guessing. "
            "分数为百分比，方括号内为 95% 置信区间；(chance) 表示区间包含随机水平。"
        ),
    ]
    if useless := tasks_at_chance(report.scores):
        blocks.append(
            Text(
                f"The accuracy of all checkpoints is at chance in {', '.join(useless)}: it says nothing about the "
                "models. 所有模型在上述任务上的准确率都处于随机水平，不能用来比较。",
                warning=True,
            )
        )
    shown = {name: report.scores[name] for name in report.shown}
    blocks += [
        Heading("Scores", "得分"),
        score_table("task", report.tasks, shown),
        Picture("scores", "scores.png"),
        *difference_blocks(report),
        *step_blocks(report),
        *average_blocks(report),
        *subject_blocks(report, shown),
        *wrong_blocks(report, args.examples),
    ]
    if args.shards:
        blocks += shard_blocks(report, Path(args.shards))
    return [
        *blocks,
        Heading("Prompts", "提示"),
        Text(
            "Examples before each question (few-shot), and questions whose prompt was truncated on the left to fit "
            "into the model's context. Only eval/run_eval.py counts the latter."
        ),
        prompt_table(report.tasks, report.runs),
        Heading("Checkpoints", "检查点"),
        checkpoint_table(report.runs),
    ]


def score_table(title: str, names: list[str], scores: dict[str, TaskScores], first_metric_only: bool = False) -> Table:
    """Return a table with a row per task (or subject) and metric, and a column per checkpoint.

    Args:
        title: Title of the first column.
        names: Tasks or `task/subject` names.
        scores: Scores of each checkpoint.
        first_metric_only: Show only the first metric of each name.
    """
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
            rows.append([name.partition("/")[2] or name, metric, n, chances[0] if chances else "", *cells])
    align = ["---", "---", "--:", "--:"] + ["--:"] * len(scores)
    return Table([title, "metric", "n", "chance", *scores], rows, align)


def difference_blocks(report: Report) -> list[Block]:
    """Return a table of differences for each compared pair of checkpoints."""
    blocks: list[Block] = []
    for (a, b), rows in report.pairs.items():
        if rows:
            blocks += [Heading(f"{b} against {a}", f"{b} 对比 {a}", level=3), difference_table(a, b, rows)]
    if not blocks:
        return []
    return [Heading("Differences on the same questions", "同题差异"), Text(explain(report.pairs.values())), *blocks]


def step_blocks(report: Report) -> list[Block]:
    """Return the curves of runs with steps, and the scores of all steps."""
    if not report.steps:
        return []
    blocks: list[Block] = [Heading("During training", "训练过程"), Picture("scores by step", "scores_by_step.png")]
    for run, names in report.steps.items():
        table = score_table("task", report.tasks, {name: report.scores[name] for name in names})
        blocks.append(Folded(f"{run}: all steps / 各步得分", [table]))
    return blocks


def average_blocks(report: Report) -> list[Block]:
    """Return the averages over checkpoints with their spread."""
    rows = []
    for label, each in report.averages.items():
        for task, spreads in each.spread.items():
            for metric, spread in spreads.items():
                score = report.scores[label][task][metric]
                if "/" not in task:
                    deviation = f"{100 * spread:.1f} points" if score["kind"] == "share" else f"{spread:.3g}"
                    rows.append([label, task, metric, str(score["n"]), format_score(score), deviation])
    if not rows:
        return []
    members = "; ".join(f"{label}: {', '.join(each.members)}" for label, each in report.averages.items())
    text = (
        f"The interval is over the questions, the standard deviation over the checkpoints. {members}. "
        "置信区间针对题目，标准差针对各检查点。"
    )
    header = ["average", "task", "metric", "n", "mean", "standard deviation"]
    return [
        Heading("Averages over checkpoints", "检查点平均"),
        Text(text),
        Table(header, rows, ["---"] * 3 + ["--:"] * 3),
    ]


def subject_blocks(report: Report, shown: dict[str, TaskScores]) -> list[Block]:
    """Return a folded table of subjects for each task that has some."""
    blocks: list[Block] = []
    for task in report.tasks:
        subjects = [name for name in report.names if name.startswith(f"{task}/")]
        if subjects:
            table = score_table("subject", subjects, shown, first_metric_only=True)
            blocks.append(Folded(f"{task} by subject / 分科得分 ({len(subjects)})", [table]))
    return [Heading("By subject", "分科得分"), *blocks] if blocks else []


def wrong_blocks(report: Report, count: int) -> list[Block]:
    """Return folded tables of wrong answers."""
    names = [name for name in report.shown if name in report.runs]
    blocks: list[Block] = []
    for task in report.tasks if count else []:
        if rows := wrong_answers(task, report.runs, names, count):
            header = ["prompt / 题目", "right / 正确", *names]
            blocks.append(Folded(f"{task} ({len(rows)})", [Table(header, rows, ["---"] * len(header))]))
    return [Heading("Wrong answers", "答错的例子"), *blocks] if blocks else []


def shard_blocks(report: Report, shards: Path) -> list[Block]:
    """Return what part of each benchmark the training shards contain."""
    from buddygpt.eval.reporting.contamination import (  # imports the data stage
        describe,
        removed_documents,
        search_shards,
    )

    header = ["task", "questions", "long enough to find", "found", "share", "a training document with one"]
    table = Table(header, describe(search_shards(report.runs, shards)), ["---"] + ["--:"] * 4 + ["---"])
    removed = removed_documents(shards)
    text = "; ".join(f"{name}: {count}" for name, count in removed.items()) or "none"
    return [
        Heading("Found in the training data", "训练数据中的题目"),
        Text(
            f"Questions that a document of {shards} contains, by the rule of data/text/steps/decontaminate.py. "
            f"Documents left out when the shards were made, by benchmark: {text}."
        ),
        table,
    ]


def prompt_table(tasks: list[str], runs: dict[str, list[Run]]) -> Table:
    """Return a table with a row per task, and a column per checkpoint: `5-shot, 12 truncated`."""
    cells: dict[str, dict[str, str]] = {task: dict.fromkeys(runs, "") for task in tasks}
    for checkpoint, of_checkpoint in runs.items():
        for path, results in of_checkpoint:
            with reading(path):
                for task in reported_tasks(results):
                    counts = results.get("truncated_prompts")
                    leaves = leaf_tasks(task, results["group_subtasks"])
                    truncated = f"{sum(counts[leaf] for leaf in leaves)} truncated" if counts else "not counted"
                    cells[task][checkpoint] = f"{few_shot(task, results)}, {truncated}"
    return Table(["task", *runs], [[task, *of_task.values()] for task, of_task in cells.items()])


def checkpoint_table(runs: dict[str, list[Run]]) -> Table:
    """Return a table of each checkpoint's folder and of how it was evaluated."""
    rows: list[list[Any]] = []
    for checkpoint, of_checkpoint in runs.items():
        for path, results in of_checkpoint:
            with reading(path):
                config = results["config"]
                folder = str(config["model_args"]["pretrained"])
                limit = "none" if config["limit"] is None else f"first {config['limit']:g}"
                limit = "fixed subset" if results.get("subset") else limit  # of --minutes
                row = [checkpoint, folder, prompt_form(results), limit, str(results["lm_eval_version"])]
            if row not in rows:
                rows.append(row)
    header = ["name", "folder", "prompts", "limit", "lm-eval"]
    return Table(header, rows, align=["---"] * len(header))


if __name__ == "__main__":
    run_script(main)
