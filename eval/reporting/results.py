"""Read what lm-eval writes: `RESULTS/NAME/**/results_TIME.json` and `samples_TASK_TIME.jsonl` next to it."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from buddygpt.cli.errors import UserError, reading
from buddygpt.cli.files import read_json
from buddygpt.cli.tables import one_line
from buddygpt.eval.reporting.subjects import categories_of

Sample = dict[str, Any]  # one question with the model's answer, a line of samples_*.jsonl
Run = tuple[Path, dict[str, Any]]  # a results file and its content


def read_runs(results: Path) -> dict[str, list[Run]]:
    """Return the results files of each checkpoint, oldest first; checkpoints in the order of their first run.

    The checkpoints `NAME@STEP` of one training run follow each other by step.

    Raises:
        UserError: There are no results files.
    """
    runs: dict[str, list[Run]] = defaultdict(list)
    # The names contain the time, so sorting by name sorts by time.
    for path in sorted(results.glob("*/**/results_*.json"), key=lambda path: (path.name, path)):
        checkpoint = path.relative_to(results).parts[0]
        runs[checkpoint].append((path, read_json(path)))
    if not runs:
        raise UserError(f"{results} has no NAME/results_*.json; eval/run_eval.py writes them.")
    places = {name: place for place, name in reversed(list(enumerate(split_step(name)[0] for name in runs)))}
    return dict(sorted(runs.items(), key=lambda item: (places[split_step(item[0])[0]], split_step(item[0])[1] or 0)))


def split_step(name: str) -> tuple[str, int | None]:
    """Return the run and the step of a checkpoint `RUN@STEP`; the whole name and None for any other."""
    run, mark, step = name.rpartition("@")
    if mark and run and step.isascii() and step.isdigit():
        return run, int(step)
    return name, None


def by_run(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the checkpoints of each training run with two or more `RUN@STEP`, in the order of their steps."""
    runs: dict[str, list[str]] = defaultdict(list)
    for name in names:
        run, step = split_step(name)
        if step is not None:
            runs[run].append(name)
    return {run: of_run for run, of_run in runs.items() if len(of_run) > 1}


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
            arguments_of(sample), sample["filter"].strip(), "subject" in sample["doc"]  # used later
            hash(sample.get("doc_hash"))
            if any(sample[metric] is None for metric in sample["metrics"]):
                raise ValueError(f"question {sample['doc_id']} has no score")
    return samples


def arguments_of(sample: Sample) -> list[list[Any]]:
    """Return the arguments of each request for a sample: prompt and answer, prompt and settings, or a text alone."""
    requests = sample["arguments"]
    requests = requests.values() if isinstance(requests, dict) else requests
    return [list(request.values()) if isinstance(request, dict) else list(request) for request in requests]


def options_of(sample: Sample) -> list[list[Any]]:
    """Return the arguments of each option. acc_mutual_info also asks for every option without its question."""
    requests = arguments_of(sample)
    return [request for request in requests if request[:1] != [""]] or requests


def few_shot(task: str, results: dict[str, Any]) -> str:
    """Return `5-shot`: the examples before each question, or `0/5-shot` if the tasks of a group differ."""
    leaves = leaf_tasks(task, results["group_subtasks"])
    return "/".join(sorted({str(results["n-shot"][leaf]) for leaf in leaves})) + "-shot"


def prompt_form(results: dict[str, Any]) -> str:
    """Return whether questions were asked through the chat template."""
    return "chat template" if results.get("chat_template") else "bare text"


def split_by_subject(task: str, samples: dict[str, list[Sample]]) -> dict[str, dict[str, list[Sample]]]:
    """Return the samples of each subject by task, after those of each category of subjects (STEM, humanities, ...).

    The subjects of a group are its tasks. The subjects of a single task are the values of the column `subject`, if its
    rows have one. `subjects.yaml` knows the categories.
    """
    subjects = _subjects(task, samples)
    categories: dict[str, dict[str, list[Sample]]] = {}
    for subject, of_subject in subjects.items():
        for category in categories_of(task, subject):
            of_category = categories.setdefault(category, {})
            for leaf, of_leaf in of_subject.items():
                of_category[leaf] = of_category.get(leaf, []) + of_leaf
    return categories | subjects


def _subjects(task: str, samples: dict[str, list[Sample]]) -> dict[str, dict[str, list[Sample]]]:
    is_group = list(samples) != [task]
    if is_group:
        return {leaf.removeprefix(f"{task}_"): {leaf: of_leaf} for leaf, of_leaf in samples.items()}
    subjects: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples[task]:
        if "subject" in sample["doc"]:
            subjects[one_line(str(sample["doc"]["subject"]))].append(sample)
    return {subject: {task: of_subject} for subject, of_subject in sorted(subjects.items())}
