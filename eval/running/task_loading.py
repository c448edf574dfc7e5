"""Load the tasks of an evaluation, or find out before it begins that one is missing or has no data."""

import time
from collections.abc import Collection
from typing import Any, NamedTuple

from lm_eval.tasks import TaskManager

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.eval.suites import explain_missing, suite_tasks


class LoadedTasks(NamedTuple):
    """Tasks with their data.

    Attributes:
        names: Tasks and groups to report.
        manager: Which loads them by name.
        tasks: What it has loaded: tasks, groups and group_map.
        missing: Tasks of the suite that are left out.
        seconds: That loading took.
    """

    names: list[str]
    manager: TaskManager
    tasks: dict[str, Any]
    missing: list[str]
    seconds: float


def load_tasks(
    manager: TaskManager, names: list[str], suite: str | None, skip_missing: bool, given: Collection[str] = ()
) -> LoadedTasks:
    """Return the tasks of these names or of a suite.

    Args:
        manager: Which knows all tasks.
        names: Tasks and groups, if there is no suite.
        suite: Name of a suite, or None.
        skip_missing: Leave out tasks of the suite whose data is not here.
        given: Tasks whose data the user has named, so that it is not missing but wrong if it cannot be read.

    Raises:
        UserError: A task does not exist, or its data is missing or wrong.
    """
    candidates = suite_tasks(suite) if suite else names
    missing = find_missing(manager, candidates, given) if suite else []
    names = [name for name in candidates if name not in missing]
    if suite and missing:
        message = explain_missing(suite, missing)
        if not names or not skip_missing:
            raise UserError(message + ("" if not names else "; or leave them out with --skip_missing"))
        print(f"{message}. They are left out")

    for task in names:
        if task not in manager.all_tasks:
            match = did_you_mean(task, manager.all_tasks)
            hint = f"did you mean `{match}`?" if match else "`lm_eval ls tasks` lists lm-eval's own."
            raise UserError(f"tasks: there is no task `{task}`; {hint}")
    started = time.monotonic()
    try:
        tasks = manager.load(names)
    except UserError:
        raise
    except Exception as error:  # of any kind: task files may run code
        raise UserError(f"tasks: {error} (benchmarks from local files: eval/README.md)") from error
    if any("ifeval" in name for name in tasks["tasks"]):
        require_punkt()
    return LoadedTasks(names, manager, tasks, missing, time.monotonic() - started)


def find_missing(manager: TaskManager, names: list[str], given: Collection[str]) -> list[str]:
    """Return the tasks that do not exist or cannot be loaded, such as those whose data would have to be downloaded.

    Raises:
        UserError: A task of `given` cannot be loaded.
    """
    missing = []
    for name in names:
        try:
            if name not in manager.all_tasks:
                raise KeyError(name)
            manager.load([name])
        except Exception as error:  # of any kind: see load_tasks
            if name in given:
                raise UserError(f"tasks: {name}: {error}") from error
            missing.append(name)
    return missing


def require_punkt() -> None:
    """Raise UserError if nltk's data for sentences is missing: IFEval would fail after all answers are generated."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UserError("tasks: IFEval needs nltk's data: run `python -m nltk.downloader punkt_tab` once") from error
