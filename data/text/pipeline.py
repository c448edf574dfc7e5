"""The stages of data preparation, and the executors that run them: on this machine, on a Slurm cluster, under Ray."""

import fcntl
import getpass
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import multiprocess
import orjson
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from tqdm import tqdm

from buddygpt.cli.errors import UserError

GIGABYTES_PER_WORKER = 0.5  # that Ray sets aside: what a worker needs at most, see tools/benchmarks/data_cost.py
logger.disable("datatrove")  # it would print a traceback above every one-line error


class Stage(NamedTuple):
    """One pipeline and the number of tasks it is split into; a stage begins when the one before it is complete."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def documents_path(folder: Path, rank: int) -> Path:
    """Return where the documents of a task lie between two stages."""
    return folder / f"{rank:05d}.jsonl"


class DocumentReader(PipelineStep):
    """Yields the documents that an earlier stage left in FOLDER/{rank:05d}.jsonl.

    Args:
        folder: Where they lie.
        groups: The files of each task, by number; without, task n reads file n.
    """

    type, name = "READER", "documents"

    def __init__(self, folder: Path, groups: list[list[int]] | None = None) -> None:
        super().__init__()
        self.folder, self.groups = folder, groups

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for number in [rank] if self.groups is None else self.groups[rank]:
            with open(documents_path(self.folder, number), "rb") as file:
                for line in file:
                    row = orjson.loads(line)
                    yield Document(row["text"], id=row["id"], metadata=row["metadata"])


class DocumentWriter(PipelineStep):
    """Leaves the documents of a task for a [`DocumentReader`], whatever was there before."""

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


def write_document(file: Any, document: Document) -> None:
    row = {"text": document.text, "id": document.id, "metadata": document.metadata}
    file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Keep every other process, on any machine with a shared disk, from the same `lock`.

    The lock is of the process alone, as POSIX has it: what it forks does not hold it on after its end.

    Raises:
        BlockingIOError: Another process has it and `wait` is False.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class _OneAtATime:
    """Makes a task wait while another process is at it: a worker may outlive the command that started it.

    When its turn comes it finds the task completed, and nothing is left to do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cwd = os.getcwd()  # Ray's workers have another

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        os.chdir(self.cwd)
        folder = Path(self.logging_dir.path)
        with lock(folder / "locks" / f"{rank:05d}"):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            except UserError as error:
                (folder / "error.txt").write_text(str(error), encoding="utf-8")
                raise


class _Local(_OneAtATime, LocalPipelineExecutor):
    pass


class _Ray(_OneAtATime, RayPipelineExecutor):
    pass


class _Slurm(_OneAtATime, SlurmPipelineExecutor):
    before: tuple[Path, int] | None = None  # logs and tasks of the stage before

    def launch_merge_stats(self) -> None:
        """Do without a job that sums up what nobody reads."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        """Refuse to begin too early: of a stage in several arrays, Slurm has waited for the last one only."""
        if self.before and sum(1 for _ in self.before[0].glob("completions/*")) < self.before[1]:
            raise UserError(f"tasks of stage {self.before[0].name} have failed; run the same command again")
        return super()._run_for_rank(rank, local_rank, node_rank)


def run_stages(stages: list[Stage], work: Path, executor: str, workers: int, slurm: dict[str, Any]) -> bool:
    """Run the stages in turn, each without the tasks that an earlier call has completed.

    Args:
        stages: In their order.
        work: In its `logs` it is remembered which tasks are completed.
        executor: `local`, `slurm`, or `ray`: the cluster that RAY_ADDRESS names, or one of this machine.
        workers: Tasks at work at the same time.
        slurm: Arguments of datatrove's `SlurmPipelineExecutor`.

    Returns:
        Whether they are complete; False where they were handed to Slurm.

    Raises:
        UserError: As a task has raised it, or Slurm cannot be reached.
    """
    logs = work / "logs"
    if executor == "slurm":
        _submit(stages, workers, logs, slurm)
        return False
    if executor == "ray":
        _start_ray(workers)
    else:  # what takes seconds to import is imported once, not by every worker of every stage
        multiprocess.set_forkserver_preload(["buddygpt.data.prepare_pretrain"])
    for number, stage in enumerate(stages, start=1):
        common = {"workers": min(workers, stage.tasks), "logging_dir": str(logs / stage.name)}
        if executor == "ray" and stage.tasks > 1:
            runner = _Ray(stage.steps, stage.tasks, mem_per_cpu_gb=GIGABYTES_PER_WORKER, **common)
        else:
            runner = _Local(stage.steps, stage.tasks, **common)
        (logs / stage.name / "error.txt").unlink(missing_ok=True)
        with _progress(runner, f"{number}/{len(stages)} {stage.name}"):
            runner.run()
        if runner.get_incomplete_ranks():  # Ray only warns
            _raise_failure(logs / stage.name)
    return True


def _start_ray(workers: int) -> None:
    try:
        import ray
    except ImportError as error:
        raise UserError("executor `ray` needs ray: pip install ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        here = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(logging_level="warning", **here)
        except ConnectionError as error:
            address = os.environ.get("RAY_ADDRESS")
            raise UserError(f"RAY_ADDRESS is {address}, and no cluster answers there: {error}") from error


def _raise_failure(logs: Path) -> None:
    if (logs / "error.txt").exists():
        raise UserError((logs / "error.txt").read_text(encoding="utf-8"))
    raise RuntimeError(f"tasks of stage {logs.name} failed: see {logs / 'logs'}")


@contextmanager
def _progress(runner: LocalPipelineExecutor | RayPipelineExecutor, name: str) -> Iterator[None]:
    """Show how many tasks are completed."""
    with tqdm(total=runner.world_size, desc=name, unit="task") as bar:
        done = Event()

        def watch() -> None:
            while not done.wait(1):
                bar.update(runner.world_size - len(runner.get_incomplete_ranks()) - bar.n)

        thread = Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            bar.update(runner.world_size - len(runner.get_incomplete_ranks()) - bar.n)


def _submit(stages: list[Stage], workers: int, logs: Path, options: dict[str, Any]) -> None:
    """Hand every stage to Slurm as an array of jobs that begins when the one before it has succeeded."""
    options, previous, before, is_reached = _slurm_options(options, logs), None, None, True
    if queued := _queued_jobs(logs / "jobs"):
        print(f"still queued or at work: squeue --jobs={','.join(queued)}; run the same command again after that")
        return
    for stage in stages:
        folder = logs / stage.name
        if (folder / "error.txt").exists():
            print(f"{stage.name} had failed: {(folder / 'error.txt').read_text(encoding='utf-8')}")
            (folder / "error.txt").unlink()
        names = {"job_name": stage.name, "logging_dir": str(folder), "workers": workers}
        try:
            job = _Slurm(stage.steps, stage.tasks, depends=previous, **(names | options))
        except TypeError as error:
            raise UserError(f"`slurm`: {str(error).split('__init__() ')[-1]}; see SlurmPipelineExecutor") from error
        job.before = before
        is_reached &= _submit_job(job, folder / "launch_script.slurm", logs / "jobs")
        previous, before = job, (folder.absolute(), stage.tasks)
    if not is_reached:
        raise UserError("there is no `sbatch` here: run the same command on a machine of the cluster that has it")
    print("submitted; run the same command again to see whether all is done, or to go on after a failure")


def _slurm_options(options: dict[str, Any], logs: Path) -> dict[str, Any]:
    if not isinstance(options.get("time"), str) or "partition" not in options:
        raise UserError("`slurm` needs at least a partition and a time in quotes: `{partition: cpu, time: '4:00:00'}`")
    if re.search(r"\s", str(logs.absolute())):
        raise UserError(f"{logs.absolute()}: a job script takes no path with a space; choose another `output`")
    venv = {"venv_path": f"{sys.prefix}/bin/activate"} if sys.prefix != sys.base_prefix else {}
    # A job that waits for one that has failed would wait forever.
    return venv | options | {"sbatch_args": {"kill-on-invalid-dep": "yes"} | (options.get("sbatch_args") or {})}


def _submit_job(job: _Slurm, script: Path, submitted: Path) -> bool:
    """Write the job script, submit it and note its id; False where there is no `sbatch`."""
    try:
        job.run()
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        job.job_id = -1
        print(f"job script: {script}, {job.tasks} tasks")
        return False
    except subprocess.CalledProcessError as error:  # it has said why
        raise UserError(f"sbatch refused {script}; mend `slurm` and run again") from error
    finally:
        if job.job_id not in (None, -1):
            with open(submitted, "a", encoding="utf-8") as file:
                file.write(f"{job.job_id}\n")
    if job.job_id != -1:  # all is done already
        print(f"job {job.job_id}: {script}, {job.tasks} tasks")
    return True


def _queued_jobs(submitted: Path) -> list[str]:
    """Return those of the jobs which an earlier call has submitted that are not at their end."""
    if not submitted.exists():
        return []
    command = ["squeue", "--noheader", "--format=%F", f"--user={getpass.getuser()}"]
    try:
        queued = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"`squeue` does not say whether the jobs in {submitted} are at work: {error}") from error
    return [job for job in submitted.read_text(encoding="utf-8").split() if job in queued]
