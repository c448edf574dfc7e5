"""Scores of checkpoints with their intervals, from the outcome of every question."""

import fnmatch
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import stdev
from typing import Any

from buddygpt.cli.errors import UserError, reading
from buddygpt.eval.reporting.intervals import ratio_interval, wilson
from buddygpt.eval.reporting.results import (
    Run,
    Sample,
    by_run,
    leaf_tasks,
    options_of,
    prompt_form,
    read_samples,
    reported_tasks,
    split_by_subject,
)

Score = dict[str, Any]  # value, n, ci95: [low, high] or None, chance: a number or None, kind
TaskScores = dict[str, dict[str, Score]]  # task or task/subject -> metric -> score
Question = tuple[str, Any, int]  # task, hash of the question (its number if there is none), number of the copy

LENGTHS = ("n_chars", "n_tokens")  # of answers: neither longer nor shorter is better

# How a score follows from the ratio of two sums over questions. lm-eval's samples hold (log-likelihood, bytes) for
# these; for all other metrics they hold one number, and the score is the mean.
FROM_RATIO = {
    "share": lambda mean: mean,
    "number": lambda mean: mean,
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
    "perplexity": lambda ratio: math.exp(-ratio),
}


@dataclass
class Outcomes:
    """One metric of one checkpoint in one task, question by question.

    Attributes:
        kind: A key of `FROM_RATIO`; `share` if every question is right or wrong.
        values: A number and its weight for each question; the weight is 1 unless the metric is a ratio of sums.
        chance: The expected score of guessing, if there are options.
        figure: lm-eval's own score. It is shown without interval if it is not what `values` give.
        higher_is_better: None if neither is better, as for the length of an answer.
    """

    kind: str
    values: dict[Question, tuple[float, float]] = field(default_factory=dict)
    chance: float | None = None
    figure: float | None = None
    higher_is_better: bool | None = None

    @property
    def is_binary(self) -> bool:
        return self.kind == "share" and all(value in (0, 1) for value, _ in self.values.values())

    def total(self) -> float:
        """Return the score."""
        numerators, weights = zip(*self.values.values(), strict=True)
        return FROM_RATIO[self.kind](sum(numerators) / sum(weights))

    def is_known(self) -> bool:
        """Return whether `values` give lm-eval's own score, or there is none to compare with."""
        if not self.values:
            return False
        return self.figure is None or math.isclose(self.total(), self.figure, rel_tol=1e-4, abs_tol=1e-9)

    def only(self, questions: list[Question]) -> "Outcomes":
        """Return the outcomes of some of the questions."""
        values = {question: self.values[question] for question in questions}
        return Outcomes(self.kind, values, self.chance, None, self.higher_is_better)


TaskOutcomes = dict[str, dict[str, Outcomes]]  # task or task/subject -> metric -> outcomes


def read_outcomes(runs: list[Run]) -> TaskOutcomes:
    """Return the outcomes of one checkpoint by task and by `task/subject`. Later runs replace earlier ones."""
    outcomes: TaskOutcomes = {}
    for path, results in runs:
        with reading(path):
            for task in reported_tasks(results):
                leaves = leaf_tasks(task, results["group_subtasks"])
                samples = {leaf: read_samples(path, leaf, results) for leaf in leaves}
                outcomes = {name: of for name, of in outcomes.items() if name.partition("/")[0] != task}
                outcomes[task] = collect(samples, results, task)
                for subject, of_subject in split_by_subject(task, samples).items():
                    outcomes[f"{task}/{subject}"] = collect(of_subject, results, None)
    return outcomes


def collect(samples: dict[str, list[Sample]], results: dict[str, Any], task: str | None) -> dict[str, Outcomes]:
    """Return the outcomes of each metric over some samples.

    A metric whose samples are neither numbers nor (log-likelihood, bytes) has lm-eval's own figure and no outcomes; it
    is left out if lm-eval has none.

    Args:
        samples: Samples by task.
        results: Content of the results file.
        task: The task or group that all of them belong to, for lm-eval's figure; None for a part of a task.

    Raises:
        ValueError: A sample has a value that its metric cannot have.
    """
    # A task with several filters has one sample per question and filter.
    found: dict[tuple[str, str], list[tuple[str, Sample]]] = defaultdict(list)
    for leaf, of_leaf in samples.items():
        for sample in of_leaf:
            for metric in sample["metrics"]:
                found[metric, sample["filter"]].append((leaf, sample))

    outcomes = {}
    for (metric, filter_name), of_metric in found.items():
        name = metric if filter_name == "none" else f"{metric},{filter_name}"
        kind, values = _values(metric, of_metric)
        figure = results["results"].get(task, {}).get(f"{metric},{filter_name}")
        if not isinstance(figure, int | float) or not math.isfinite(figure) or (values and len(samples) > 1):
            figure = None  # of a group, lm-eval may give the mean of its tasks; here every question counts the same
        measured = Outcomes(kind, values, chance_level([sample for _, sample in of_metric]), figure)
        direction = (results.get("higher_is_better") or {}).get(of_metric[0][0]) or {}
        measured.higher_is_better = direction.get(metric, True if measured.kind == "share" else None)
        if metric in LENGTHS:
            measured.higher_is_better = None  # also in older results, which call longer answers better
        if metric == "perplexity":  # of the mean log-likelihood, as in lambada
            measured.kind = "perplexity"
        if measured.values or figure is not None:
            outcomes[name] = measured
    return outcomes


def _values(metric: str, samples: list[tuple[str, Sample]]) -> tuple[str, dict[Question, tuple[float, float]]]:
    """Return the kind of a metric, and its values: none if they are neither numbers nor pairs."""
    is_pair = metric == "bits_per_byte" or metric.endswith("_perplexity")
    copies: Counter = Counter()
    values = {}
    for task, sample in samples:
        value = sample[metric]
        if is_pair:
            value, weight = float(value[0]), float(value[1])
            if weight <= 0 or not math.isfinite(value / weight):
                raise ValueError(f"question {sample['doc_id']} has {metric} {sample[metric]}")
        elif isinstance(value, int | float) and math.isfinite(value):
            weight = 1.0
        else:
            return "number", {}
        mark = sample.get("doc_hash") or sample["doc_id"]
        copies[task, mark] += 1
        values[task, mark, copies[task, mark]] = (float(value), weight)
    if is_pair:
        return "bits_per_byte" if metric == "bits_per_byte" else "perplexity", values
    return "share" if all(value in (0, 1) for value, _ in values.values()) else "number", values


def chance_level(samples: list[Sample]) -> float | None:
    """Return the expected score of a random choice, the mean of 1 / options, or None without options."""
    n_options = [len(options_of(sample)) for sample in samples]
    if min(n_options) <= 1:
        return None
    return sum(1 / n for n in n_options) / len(n_options)


def equalize_kinds(outcomes: Iterable[TaskOutcomes]) -> None:
    """Let a metric have one kind in all checkpoints: numbers may happen to be 0 or 1 for all questions of one."""
    kinds: dict[tuple[str, str], set[str]] = defaultdict(set)
    every = [
        (task.partition("/")[0], metric, measured)
        for of_checkpoint in outcomes
        for task, metrics in of_checkpoint.items()
        for metric, measured in metrics.items()
    ]
    for task, metric, measured in every:
        kinds[task, metric].add(measured.kind)
    for task, metric, measured in every:
        if kinds[task, metric] == {"share", "number"}:
            measured.kind = "number"


def score_all(outcomes: TaskOutcomes) -> TaskScores:
    """Return the score of every task and metric."""
    return {task: {name: score(each) for name, each in metrics.items()} for task, metrics in outcomes.items()}


def score(outcomes: Outcomes) -> Score:
    """Return a score with its 95% interval: value, n, ci95, chance, kind. Equal numbers have no interval."""
    n = len(outcomes.values)
    if outcomes.is_binary:
        return proportion(int(sum(value for value, _ in outcomes.values.values())), n, outcomes.chance)
    chance = outcomes.chance if outcomes.kind == "share" else None
    if not outcomes.is_known():
        return {"value": outcomes.figure, "n": n, "ci95": None, "chance": None, "kind": "number"}
    interval = ratio_interval(*zip(*outcomes.values.values(), strict=True))
    ci95 = sorted(FROM_RATIO[outcomes.kind](ratio) for ratio in interval[1:]) if interval else None
    return {"value": outcomes.total(), "n": n, "ci95": ci95, "chance": chance, "kind": outcomes.kind}


def proportion(successes: int, n: int, chance: float | None) -> Score:
    """Return a proportion as a score with its 95% Wilson interval."""
    return {"value": successes / n, "n": n, "ci95": list(wilson(successes, n)), "chance": chance, "kind": "share"}


def at_chance(score: Score) -> bool:
    """Return True if the chance level lies inside the score's 95% interval."""
    if score["chance"] is None or score["ci95"] is None:
        return False
    low, high = score["ci95"]
    return low <= score["chance"] <= high


def tasks_at_chance(scores: dict[str, TaskScores]) -> list[str]:
    """Return the tasks with a chance level whose scores of all checkpoints are at chance, in every such metric."""
    found: dict[str, list[bool]] = defaultdict(list)
    for of_checkpoint in scores.values():
        for task, metrics in of_checkpoint.items():
            found[task] += [at_chance(score) for score in metrics.values() if score["chance"] is not None]
    return [task for task, marks in found.items() if marks and all(marks) and "/" not in task]


def format_score(score: Score | None) -> str:
    """Return `25.1% [20.8, 29.8] (chance)`, `0.231 [0.220, 0.242]`, or a plain number for a score without interval."""
    if score is None:
        return ""
    ci95 = score["ci95"]
    if score.get("kind", "share") == "share" and ci95:
        mark = " (chance)" if at_chance(score) else ""
        return f"{score['value']:.1%} [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]{mark}"
    if ci95 is None:
        return f"{score['value']:.4f}"
    value, low, high = format_numbers(score["value"], *ci95)
    return f"{value} [{low}, {high}]"


def format_numbers(*values: float, digits: int = 4, sign: str = "") -> list[str]:
    """Return numbers with equal decimals; the first of them that is not 0 gets so many digits."""
    leading = next((math.floor(math.log10(abs(value))) for value in values if value), 0)
    return [f"{value:{sign}.{min(max(digits - 1 - leading, 0), 9)}f}" for value in values]


@dataclass
class Average:
    """The average over several checkpoints of the questions that all of them answered.

    Attributes:
        members: Names of the checkpoints.
        outcomes: The average outcome of each question.
        spread: Standard deviation of the checkpoints' scores, by task and metric.
    """

    members: list[str]
    outcomes: TaskOutcomes
    spread: dict[str, dict[str, float]]


def find_averages(names: list[str], wanted: list[str], last: int) -> dict[str, list[str]]:
    """Return which checkpoints to average, by the label of the average.

    Args:
        names: All checkpoints.
        wanted: Items LABEL=NAME,NAME,...; a name may be a pattern, such as `sft-seed*`.
        last: Also average so many last checkpoints of each run with `RUN@STEP`; 0 for none.

    Raises:
        UserError: An item has another form, or matches fewer than two checkpoints.
    """
    averages = {}
    for item in wanted:
        label, _, patterns = item.partition("=")
        members = [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns.split(","))]
        if not label or len(members) < 2:
            raise UserError(
                f"average: `{item}` is not LABEL=NAME,NAME,... with two or more of the checkpoints {', '.join(names)}"
            )
        averages[f"{label} (mean of {len(members)})"] = members
    if last > 1:
        for run, of_run in by_run(names).items():
            members = of_run[-last:]
            averages[f"{run} (mean of last {len(members)})"] = members
    return averages


def average(outcomes: dict[str, TaskOutcomes], members: list[str]) -> Average:
    """Return the average of checkpoints; tasks and metrics that not all of them have are left out."""
    merged: TaskOutcomes = {}
    spread: dict[str, dict[str, float]] = {}
    first, *others = (outcomes[name] for name in members)
    for task, metrics in first.items():
        for metric, measured in metrics.items():
            all_measured = [measured, *(other[task][metric] for other in others if metric in other.get(task, {}))]
            kinds = {each.kind for each in all_measured}
            common = [q for q in measured.values if all(q in each.values for each in all_measured)]
            if len(all_measured) < len(members) or len(kinds) > 1 or not common or not measured.is_known():
                continue
            parts = [each.only(common) for each in all_measured]
            mean = measured.only(common)
            for question in common:
                pairs = [part.values[question] for part in parts]
                mean.values[question] = tuple(sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            merged.setdefault(task, {})[metric] = mean
            spread.setdefault(task, {})[metric] = stdev(part.total() for part in parts)
    return Average(members, merged, spread)


def describe_evaluation(scores: TaskScores, runs: list[Run]) -> tuple[str, dict[str, Any]]:
    """Return the folder of a checkpoint, and what its model card tells of the evaluation: prompts, tasks, scores."""
    path, results = runs[-1]
    with reading(path):
        folder = str(results["config"]["model_args"]["pretrained"])
    tasks = {task: metrics for task, metrics in scores.items() if "/" not in task}  # without subjects
    return folder, {"prompts": prompt_form(results), "tasks": tasks}
