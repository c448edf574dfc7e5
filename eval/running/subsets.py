"""Choose questions so that an evaluation ends in time: the same for every checkpoint, and nested from run to run.

Each task has one seeded order of its questions, and a run asks the first so many. A longer run therefore asks all the
questions of a shorter one. How many fit is computed from the measured seconds of a few questions of each task.
"""

import math
import random
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED

from buddygpt.cli.errors import UserError
from buddygpt.eval.running.models import Checkpoint

MIN_QUESTIONS = 20  # of every task; of a group with more subtasks than that, one of each
RESERVE = 0.15  # of the time, for what is not measured: other programs, metrics, writing results

Question = tuple[str, int]  # (task without subtasks, number of the row)


class Entry(NamedTuple):
    """A task or group that the report shows.

    Attributes:
        name: Of the task or group.
        tasks: The tasks of the group by name, or the task itself.
        order: All of its questions; a run asks the first so many.
    """

    name: str
    tasks: dict[str, Task]
    order: list[Question]

    @property
    def floor(self) -> int:
        """Number of questions that every run asks."""
        return min(len(self.order), max(MIN_QUESTIONS, len(self.tasks)))


def order_questions(sizes: dict[str, int], seed: int) -> list[Question]:
    """Return all questions of a group: one of each task, then in proportion to the sizes of the tasks.

    Args:
        sizes: Number of questions of each task.
        seed: Of the order within a task.
    """
    keyed = []
    for place, (task, size) in enumerate(sizes.items()):
        rows = list(range(size))
        random.Random(f"{seed} {task}").shuffle(rows)
        keyed += [(number / size, place, task, row) for number, row in enumerate(rows)]
    return [(task, row) for _, _, task, row in sorted(keyed)]


def make_entries(loaded: dict[str, Any], seed: int) -> list[Entry]:
    """Return the tasks and groups that `TaskManager.load` has returned, without those inside another group."""
    tasks, children = loaded["tasks"], loaded["group_map"]
    inner = {child for names in children.values() for child in names}

    def leaves(name: str) -> list[str]:
        return [leaf for child in children[name] for leaf in leaves(child)] if name in children else [name]

    entries = []
    for name in [*(group for group in children if group not in inner), *(task for task in tasks if task not in inner)]:
        own = {leaf: tasks[leaf] for leaf in leaves(name)}
        sizes = {leaf: len(task.eval_docs) for leaf, task in own.items()}
        entries.append(Entry(name, own, order_questions(sizes, seed)))
    return entries


def choose_rows(questions: Iterable[Question]) -> dict[str, list[int]]:
    """Return the rows of each task, in the order of its data: lm-eval would mix up the rows otherwise."""
    rows: dict[str, list[int]] = {}
    for task, row in sorted(questions):
        rows.setdefault(task, []).append(row)
    return rows


def measure(
    model: LM, entries: list[Entry], uses_chat_template: bool, num_fewshot: int | None, gen_kwargs: dict | None
) -> dict[str, float]:
    """Return the seconds that a model takes for a question of each entry, on the first `floor` of them.

    Answers are measured at their full length, because another checkpoint may not end them. The arguments are those of
    lm-eval's `simple_evaluate`.
    """
    settings = {
        "apply_chat_template": uses_chat_template,
        "fewshot_as_multiturn": uses_chat_template,
        "chat_template": model.apply_chat_template if uses_chat_template else None,
    }
    if isinstance(model, Checkpoint):
        model.only_full_answers = True
    seconds = {}
    for entry in entries:
        rows = choose_rows(entry.order[: entry.floor])
        for _ in range(2 if not seconds else 1):  # the first time is slower
            started = time.perf_counter()
            requests: dict[str, list[Instance]] = {}
            for name, task in entry.tasks.items():
                prepare(task, num_fewshot, gen_kwargs)
                task.build_all_requests(samples=rows[name], **settings)
                for request in task.instances:
                    requests.setdefault(request.request_type, []).extend([request] * (request.repeats or 1))
            for kind, of_kind in requests.items():
                getattr(model, kind)(of_kind)
            seconds[entry.name] = (time.perf_counter() - started) / entry.floor
    return seconds


def prepare(task: Task, num_fewshot: int | None, gen_kwargs: dict | None) -> None:
    """Change the settings of a task as `simple_evaluate` does."""
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    if gen_kwargs and task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def share_time(entries: list[Entry], seconds: dict[str, float], available: float) -> dict[str, int]:
    """Return the number of questions of each entry, so that all get the same time unless they need less or more.

    Args:
        entries: Tasks and groups.
        seconds: That one question of each takes on all checkpoints together.
        available: Seconds for all questions; at least what every `floor` takes.
    """
    least = {entry.name: entry.floor * seconds[entry.name] for entry in entries}
    most = {entry.name: len(entry.order) * seconds[entry.name] for entry in entries}
    low, high = 0.0, max(most.values())
    for _ in range(60):
        share = (low + high) / 2
        used = sum(min(most[name], max(least[name], share)) for name in most)
        low, high = (share, high) if used <= available else (low, share)
    share = high if sum(most.values()) <= available else low
    return {
        entry.name: min(len(entry.order), max(entry.floor, math.floor(share / seconds[entry.name] + 1e-9)))
        for entry in entries
    }


def plan(
    entries: list[Entry], minutes: float, elapsed: float, measured: list[dict[str, float]], fixed: float
) -> dict[str, int]:
    """Return the number of questions of each entry for a run of all checkpoints.

    Args:
        entries: Tasks and groups.
        minutes: For the whole run, measurements included.
        elapsed: Seconds since its start.
        measured: For every checkpoint, the seconds of one question of each entry.
        fixed: Seconds that all checkpoints together take without questions.

    Raises:
        UserError: Not even the smallest run fits.
    """
    seconds = {entry.name: sum(of_checkpoint[entry.name] for of_checkpoint in measured) for entry in entries}
    available = minutes * 60 * (1 - RESERVE) - elapsed - fixed
    missing = sum(entry.floor * seconds[entry.name] for entry in entries) - available
    if missing > 0:
        needed = math.ceil(minutes + missing / 60 / (1 - RESERVE))
        raise UserError(
            f"minutes: {minutes:g} are too few for {MIN_QUESTIONS} questions of each task on {len(measured)} "
            f"checkpoints; give about {needed}, or fewer tasks or checkpoints"
        )
    counts = share_time(entries, seconds, available)
    for entry in entries:
        print(f"{entry.name}: {counts[entry.name]:,} of {len(entry.order):,} questions")
    return counts


def describe(
    entries: list[Entry], counts: dict[str, int], minutes: float, seed: int
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Return lm-eval's `samples`, and what results.json tells about the subset."""
    rows = choose_rows(question for entry in entries for question in entry.order[: counts[entry.name]])
    asked = {entry.name: {"asked": counts[entry.name], "of": len(entry.order)} for entry in entries}
    return rows, {"minutes": minutes, "seed": seed, "questions": asked, "doc_ids": rows}
