"""Compare models of several evaluations in one table per model: better, worse, or cannot tell.

    python eval/compare.py --results outputs/quickstart/eval --baseline base
    python eval/compare.py --results ours=outputs/a/eval theirs=outputs/b/eval/scores.json --baseline ours/sft

Each of `results` is a folder that `eval/run_eval.py` wrote, for any model that it can evaluate: a checkpoint, a model
of the Hub, an endpoint. With such folders, models are compared question by question, on the questions that both
answered. A `scores.json` of eval/report.py holds no answers: its scores are compared as if their questions were
different. `LABEL=PATH` calls the models `LABEL/NAME`. `--output FILE.md` also writes the tables, with FILE.html and
FILE.json next to it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, did_you_mean, reading, run_script
from buddygpt.cli.files import read_json, write_atomically
from buddygpt.eval.reporting.comparisons import Comparison, compare_outcomes, compare_scores, difference_table, explain
from buddygpt.eval.reporting.page import Block, Heading, Table, Text, require_markdown, to_html, to_markdown
from buddygpt.eval.reporting.results import few_shot, prompt_form, read_runs, reported_tasks
from buddygpt.eval.reporting.scores import TaskOutcomes, TaskScores, equalize_kinds, read_outcomes, score_all


@dataclass
class CompareArguments:
    results: list[str] = field(metadata={"help": "Folders of results, or scores.json files, each as [LABEL=]PATH."})
    baseline: str | None = field(
        default=None, metadata={"help": "The model to compare all others with. Default: the first."}
    )
    tasks: list[str] = field(default_factory=list, metadata={"help": "Compare only these tasks."})
    output: str | None = field(default=None, metadata={"help": "A .md file for the tables, which are also printed."})

    def __post_init__(self) -> None:
        for key in ("results", "tasks"):
            values = getattr(self, key)
            if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
                raise ValueError(f"{key} is {values}; give a list of names")
        if not self.results:
            raise ValueError("results: give one or more folders of results, or scores.json files")


@dataclass
class Model:
    """What is known of a model: its scores, the outcome of every question if there are answers, and its prompts."""

    scores: TaskScores
    outcomes: TaskOutcomes | None
    prompts: dict[str, str]  # by task


def main() -> None:
    (args,) = parse_arguments(CompareArguments, description=__doc__)
    if args.output:
        require_markdown(Path(args.output))
    models: dict[str, Model] = {}
    for item in args.results:
        for name, model in read_models(item).items():
            if name in models:
                raise UserError(f"results: `{name}` is in two of them; give LABEL=PATH, such as new={item}")
            models[name] = model
    equalize_kinds(model.outcomes for model in models.values() if model.outcomes is not None)
    baseline = choose_baseline(args.baseline, list(models))
    pairs = {name: compare(models[baseline], model, args.tasks) for name, model in models.items() if name != baseline}
    if not any(pairs.values()):
        raise UserError(f"results: no other model has a score of the same task and metric as {baseline}")

    blocks = build(baseline, pairs, models)
    if args.output:
        output = Path(args.output)
        rows = [{"a": baseline, "b": name, "rows": of_pair} for name, of_pair in pairs.items()]
        page = to_html("Comparison / 对比", blocks, output.parent)
        for suffix, text in {".json": json.dumps(rows, indent=2, ensure_ascii=False), ".html": page}.items():
            with write_atomically(output.with_suffix(suffix)) as partial:
                partial.write_text(text, encoding="utf-8")
        with write_atomically(output) as partial:
            partial.write_text(to_markdown(blocks), encoding="utf-8")
    print(to_markdown(blocks))


def read_models(item: str) -> dict[str, Model]:
    """Return the models of one of `results` by name.

    Raises:
        UserError: There is no such file or folder, or it is damaged.
    """
    label, mark, place = item.rpartition("=")
    if Path(item).exists() or not mark:  # a path may hold `=`
        label, place = "", item
    path = Path(place)
    if path.is_dir():
        models = {name: read_model(runs) for name, runs in read_runs(path).items()}
    elif path.is_file():
        models = {name: Model(scores, None, {}) for name, scores in read_scores(path).items()}
    else:
        raise UserError(
            f"results: there is no {place}; eval/run_eval.py writes a folder, eval/report.py a scores.json"
        )
    return {f"{label}/{name}" if label else name: model for name, model in models.items()}


def read_model(runs: list[Any]) -> Model:
    """Return a model from its results files."""
    prompts = {}
    for path, results in runs:
        with reading(path):
            for task in reported_tasks(results):
                prompts[task] = f"{few_shot(task, results)}, {prompt_form(results)}"
    outcomes = read_outcomes(runs)
    return Model(score_all(outcomes), outcomes, prompts)


def read_scores(path: Path) -> dict[str, TaskScores]:
    """Return the content of a scores.json; UserError if it has another form."""
    scores = read_json(path)
    with reading(path):
        for of_model in scores.values():
            for metrics in of_model.values():
                for score in metrics.values():
                    low, high = score["ci95"] or (0.0, 0.0)
                    float(score["value"]), low + high, score["n"] + 0, str(score["chance"])  # used later
        if not scores:
            raise ValueError("no scores")
    return scores


def choose_baseline(wanted: str | None, names: list[str]) -> str:
    """Return the baseline; UserError if there is none of that name, or nothing to compare with it."""
    if len(names) < 2:
        raise UserError(f"results: there is only {names[0]}; give more folders of results")
    if wanted is not None and wanted not in names:
        match = did_you_mean(wanted, names)
        hint = f"did you mean `{match}`?" if match else f"there are {', '.join(names)}"
        raise UserError(f"baseline: there is no model `{wanted}`; {hint}")
    return wanted or names[0]


def compare(baseline: Model, model: Model, tasks: list[str]) -> list[Comparison]:
    """Return the comparison of a model with the baseline in the wanted tasks; [] stands for all."""

    def wanted(content: dict[str, Any]) -> dict[str, Any]:
        return {task: metrics for task, metrics in content.items() if not tasks or task in tasks}

    if baseline.outcomes is None or model.outcomes is None:
        return compare_scores(wanted(baseline.scores), wanted(model.scores))
    return compare_outcomes(wanted(baseline.outcomes), wanted(model.outcomes))


def build(baseline: str, pairs: dict[str, list[Comparison]], models: dict[str, Model]) -> list[Block]:
    """Return the tables, and how each model was prompted."""
    blocks: list[Block] = [
        Heading(f"Comparison with {baseline}", f"与 {baseline} 对比", level=1),
        Text(explain(pairs.values())),
    ]
    for name, rows in pairs.items():
        if rows:
            blocks += [Heading(name), difference_table(baseline, name, rows)]
    tasks = list(dict.fromkeys(row["task"] for rows in pairs.values() for row in rows))
    rows = [[task, *(model.prompts.get(task, "unknown") for model in models.values())] for task in tasks]
    blocks += [
        Heading("Prompts", "提示"),
        Text(
            "Scores with other prompts or other numbers of examples measure something else. "
            "提示方式不同的分数不宜直接比较。"
        ),
        Table(["task", *models], rows),
    ]
    return blocks


if __name__ == "__main__":
    run_script(main)
