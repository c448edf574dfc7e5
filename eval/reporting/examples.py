"""Wrong answers, to be read by people: what was asked, what is right, and what each checkpoint answered."""

from collections import Counter
from typing import Any, NamedTuple

from buddygpt.cli.errors import reading
from buddygpt.eval.reporting.results import Run, Sample, leaf_tasks, options_of, read_samples, reported_tasks
from buddygpt.eval.reporting.scores import Question

EXCERPT = 200  # characters


class Answer(NamedTuple):
    """A question with the answer of one checkpoint, as short texts."""

    prompt: str
    right: str
    given: str
    is_wrong: bool


def wrong_answers(task: str, runs: dict[str, list[Run]], names: list[str], count: int) -> list[list[str]]:
    """Return some questions that the last checkpoint with this task answered wrongly.

    Args:
        task: A task or group.
        runs: Results files by checkpoint.
        names: The checkpoints to show.
        count: How many questions; they are spread over the task.

    Returns:
        A row per question: the end of its prompt, the right answer, the answer of each checkpoint. Empty for a task
        whose questions are neither right nor wrong.
    """
    answers = {name: read_answers(runs[name], task) for name in names}
    last = next((of for of in reversed(list(answers.values())) if of), {})
    wrong = [question for question, answer in last.items() if answer.is_wrong]
    chosen = [wrong[place * len(wrong) // count] for place in range(min(count, len(wrong)))] if count else []
    if len(wrong) <= count:
        chosen = wrong
    rows = []
    for question in chosen:
        given = [of[question].given if question in of else "" for of in answers.values()]
        rows.append([last[question].prompt, last[question].right, *given])
    return rows


def read_answers(runs: list[Run], task: str) -> dict[Question, Answer]:
    """Return the answers of one checkpoint in the newest run of a task, if they are right or wrong."""
    for path, results in reversed(runs):
        with reading(path):
            if task in reported_tasks(results):
                answers: dict[Question, Answer] = {}
                copies: Counter = Counter()
                for leaf in leaf_tasks(task, results["group_subtasks"]):
                    for sample in read_samples(path, leaf, results):
                        # The name of a question, as in scores.py; with several filters, the first one counts.
                        metric = next((name for name in sample["metrics"] if sample[name] in (0, 1)), None)
                        mark = sample.get("doc_hash") or sample["doc_id"]
                        copies[leaf, mark, sample["filter"]] += 1
                        question = (leaf, mark, copies[leaf, mark, sample["filter"]])
                        if metric and sample.get("target") and question not in answers:
                            answers[question] = describe(sample, metric)
                return answers
    return {}


def describe(sample: Sample, metric: str) -> Answer:
    """Return a sample as short texts."""
    options = [[*request, "", ""][:2] for request in options_of(sample)]
    prompt = str(options[0][0]) if options else ""
    right, given = str(sample.get("target", "")), first_text(sample.get("filtered_resps", ""))
    if len(options) > 1:
        texts = [str(answer) for _, answer in options]
        if len(set(texts)) == 1:  # the options stand in the prompt
            texts = [str(prompt) for prompt, _ in options]
        likelihoods = [float(first_text(response)) for response in sample.get("filtered_resps", [])[: len(options)]]
        if likelihoods:
            given = texts[max(range(len(likelihoods)), key=likelihoods.__getitem__)]
        if right.isdecimal() and int(right) < len(texts):
            right = texts[int(right)]
    short_prompt = prompt if len(prompt) <= EXCERPT else "… " + prompt[-EXCERPT:]
    return Answer(visible(short_prompt), shorten(right), shorten(given), sample[metric] == 0)


def first_text(value: Any) -> str:
    """Return the first text in nested lists."""
    while isinstance(value, list) and value:
        value = value[0]
    return str(value)


def shorten(text: str) -> str:
    text = text.strip()
    return visible(text if len(text) <= EXCERPT else text[:EXCERPT] + " …")


def visible(text: str) -> str:
    """Show line breaks, which a cell of a table cannot hold."""
    return text.strip().replace("\n", " ⏎ ")
