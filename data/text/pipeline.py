"""Stages of data preparation: how documents pass from one stage to the next, and how stages run on this machine.

A stage is a datatrove pipeline that is split into tasks. It starts when the stage before it is complete. A complete
task is never run again, so a killed run resumes with the tasks that are left.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO, NamedTuple

import multiprocess
import orjson
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from buddygpt.cli.errors import UserError

logger.disable("datatrove")  # it would print a traceback above every one-line error


class Stage(NamedTuple):
    """One pipeline and the number of tasks it is split into."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def documents_path(folder: Path, rank: int) -> Path:
    """Return the file that holds a task's documents between two stages."""
    return folder / f"{rank:05d}.jsonl"


class DocumentReader(PipelineStep):
    """Yields the documents that an earlier stage wrote to FOLDER/{rank:05d}.jsonl.

    Args:
        folder: Folder of the files.
        groups: The numbers of the files that each task reads. Default: task n reads file n.
    """

    type, name = "READER", "documents"

    def __init__(self, folder: Path, groups: list[list[int]] | None = None) -> None:
        super().__init__()
        self.folder, self.groups = folder, groups

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        numbers = [rank] if self.groups is None else self.groups[rank]
        for number in numbers:
            with open(documents_path(self.folder, number), "rb") as file:
                for line in file:
                    row = orjson.loads(line)
                    yield Document(row["text"], id=row["id"], metadata=row["metadata"])


class DocumentWriter(PipelineStep):
    """Writes the documents of a task for a [`DocumentReader`], and passes them on. An existing file is replaced."""

    type, name = "WRITER", "documents"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(documents_path(self.folder, rank), "wb") as file:
            for document in data:
                write_document(file, document)
                yield document


def write_document(file: BinaryIO, document: Document) -> None:
    """Write a document as one line for a [`DocumentReader`]."""
    row = {"text": document.text, "id": document.id, "metadata": document.metadata}
    file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file, also across machines that share the disk.

    It is a POSIX lock, which belongs to the process: child processes do not hold it after the process has ended.

    Raises:
        BlockingIOError: Another process holds the lock and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class LockedTasks:
    """Mixin for datatrove executors: one process at a time runs a task, and its error is written to error.txt.

    A worker may outlive the command that started it. The next command then waits for the worker's task, and finds it
    complete when it gets the lock.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.working_directory = os.getcwd()  # paths may be relative, and Ray's workers start in another folder

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        os.chdir(self.working_directory)
        folder = Path(self.logging_dir.path)
        with lock(folder / "locks" / f"{rank:05d}"):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            except UserError as error:
                error_file(folder).write_text(str(error), encoding="utf-8")
                raise


class LocalExecutor(LockedTasks, LocalPipelineExecutor):
    """Runs the tasks of a stage in processes of this machine."""


def make_local_executor(stage: Stage, workers: int, logs: Path) -> LocalExecutor:
    """Return an executor that runs `workers` tasks of the stage at a time."""
    return LocalExecutor(stage.steps, stage.tasks, workers=workers, logging_dir=str(logs))


def run_stages(
    stages: list[Stage],
    work: Path,
    workers: int,
    make_executor: Callable[[Stage, int, Path], PipelineExecutor] = make_local_executor,
) -> None:
    """Run the stages in order, without the tasks that an earlier call completed.

    Args:
        stages: The stages in order.
        work: Folder of the run. WORK/logs records which tasks are complete.
        workers: Number of tasks that run at the same time.
        make_executor: Returns the executor for a stage, a number of workers and a folder for logs.

    Raises:
        UserError: A task raised it.
    """
    # Worker processes fork from a server process. It imports the steps once, so that workers need not.
    modules = {type(step).__module__ for stage in stages for step in stage.steps}
    multiprocess.set_forkserver_preload(["buddygpt.data.prepare_pretrain", *sorted(modules)])
    for number, stage in enumerate(stages, start=1):
        logs = work / "logs" / stage.name
        executor = make_executor(stage, min(workers, stage.tasks), logs)
        error_file(logs).unlink(missing_ok=True)
        with _progress(executor, f"{number}/{len(stages)} {stage.name}"):
            executor.run()
        if executor.get_incomplete_ranks():  # Ray logs a warning where the local executor raises
            _raise_failure(logs)


def error_file(logs: Path) -> Path:
    """Return the file with the message of the last [`UserError`] that a task of a stage raised."""
    return logs / "error.txt"


def _raise_failure(logs: Path) -> None:
    if error_file(logs).exists():
        raise UserError(error_file(logs).read_text(encoding="utf-8"))
    raise RuntimeError(f"tasks of stage {logs.name} failed: see {logs / 'logs'}")


@contextmanager
def _progress(executor: PipelineExecutor, name: str) -> Iterator[None]:
    """Show how many tasks of a stage are complete, updated every second."""
    with tqdm(total=executor.world_size, desc=name, unit="task") as bar:
        done = Event()

        def update() -> None:
            completed = executor.world_size - len(executor.get_incomplete_ranks())
            bar.update(completed - bar.n)

        def watch() -> None:
            while not done.wait(1):
                update()

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            update()
