"""Submit the stages of data preparation to a Slurm cluster, each as an array of jobs that waits for the one before."""

import getpass
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor

from buddygpt.cli.errors import UserError
from buddygpt.data.text.pipeline import LockedTasks, Stage, error_file

NOT_SUBMITTED = -1  # datatrove's job id of a stage that needs no job


class SlurmExecutor(LockedTasks, SlurmPipelineExecutor):
    """Runs the tasks of a stage as an array of Slurm jobs.

    `stage_before` is the folder of logs and the number of tasks of the stage before, or None for the first stage.
    """

    stage_before: tuple[Path, int] | None = None

    def launch_merge_stats(self) -> None:
        """Skip datatrove's job that merges statistics: nothing reads its output."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        # datatrove splits a large stage into several arrays, and the next stage waits for the last of them only.
        if self.stage_before:
            logs, tasks = self.stage_before
            completed = len(list(logs.glob("completions/*")))
            if completed < tasks:
                raise UserError(f"tasks of stage {logs.name} have failed; run the same command again")
        return super()._run_for_rank(rank, local_rank, node_rank)


def submit_stages(stages: list[Stage], work: Path, workers: int, options: dict[str, Any]) -> None:
    """Submit what is not complete yet, unless jobs of an earlier call are still queued or running.

    Args:
        stages: The stages in order.
        work: Folder of the run, on a disk that the cluster shares.
        workers: Number of tasks of a stage that run at the same time.
        options: Arguments of datatrove's `SlurmPipelineExecutor`: at least `partition` and `time`.

    Raises:
        UserError: An option is wrong, or Slurm is missing or refuses a job.
    """
    logs = work / "logs"
    submitted = logs / "jobs"
    options = _complete_options(options, logs)
    if queued := _queued_jobs(submitted):
        print(f"still queued or running: squeue --jobs={','.join(queued)}; run the same command again after that")
        return
    previous: SlurmExecutor | None = None
    stage_before: tuple[Path, int] | None = None
    is_submitted = True
    for stage in stages:
        # Report why a task of an earlier call failed.
        folder = logs / stage.name
        if error_file(folder).exists():
            print(f"{stage.name} failed: {error_file(folder).read_text(encoding='utf-8')}")
            error_file(folder).unlink()

        # Make a job that waits for the stage before.
        settings = {"job_name": stage.name, "logging_dir": str(folder), "workers": workers, **options}
        try:
            job = SlurmExecutor(stage.steps, stage.tasks, depends=previous, **settings)
        except TypeError as error:
            reason = str(error).split("__init__() ")[-1]
            raise UserError(f"`slurm`: {reason}; see SlurmPipelineExecutor") from error
        job.stage_before = stage_before

        # Without `sbatch`, the scripts of all stages are written nevertheless.
        if not _submit(job, folder / "launch_script.slurm", submitted):
            is_submitted = False
        previous, stage_before = job, (folder.absolute(), stage.tasks)
    if not is_submitted:
        raise UserError("there is no `sbatch` here: run the same command on a machine of the cluster that has it")
    print("submitted; run the same command again to see whether all jobs are done, or to resume after a failure")


def _complete_options(options: dict[str, Any], logs: Path) -> dict[str, Any]:
    """Check the `slurm` options and add the defaults."""
    if not isinstance(options.get("time"), str) or "partition" not in options:
        raise UserError("`slurm` needs at least a partition and a time in quotes: `{partition: cpu, time: '4:00:00'}`")
    if re.search(r"\s", str(logs.absolute())):
        raise UserError(f"{logs.absolute()}: a job script takes no path with a space; choose another `output`")
    defaults = {}
    if sys.prefix != sys.base_prefix:  # jobs activate this virtual environment
        defaults["venv_path"] = f"{sys.prefix}/bin/activate"
    # A job that depends on a failed job would otherwise wait forever.
    sbatch_args = {"kill-on-invalid-dep": "yes"} | (options.get("sbatch_args") or {})
    return defaults | options | {"sbatch_args": sbatch_args}


def _submit(job: SlurmExecutor, script: Path, submitted: Path) -> bool:
    """Write the job script, submit it and append its id to a file. Return False if there is no `sbatch`."""
    try:
        job.run()
    except FileNotFoundError as error:
        if error.filename != "sbatch":
            raise
        job.job_id = NOT_SUBMITTED
        print(f"job script: {script}, {job.tasks} tasks")
        return False
    except subprocess.CalledProcessError as error:  # sbatch has printed the reason
        raise UserError(f"sbatch refused {script}; fix `slurm` and run again") from error
    finally:
        # Also after a failure: one of several arrays may have been submitted.
        if job.job_id not in (None, NOT_SUBMITTED):
            with open(submitted, "a", encoding="utf-8") as file:
                file.write(f"{job.job_id}\n")
    if job.job_id != NOT_SUBMITTED:  # else every task is complete
        print(f"job {job.job_id}: {script}, {job.tasks} tasks")
    return True


def _queued_jobs(submitted: Path) -> list[str]:
    """Return the ids of the submitted jobs that are still queued or running."""
    if not submitted.exists():
        return []
    command = ["squeue", "--noheader", "--format=%F", f"--user={getpass.getuser()}"]
    try:
        queued = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"cannot ask `squeue` whether the jobs in {submitted} are still running: {error}") from error
    return [job for job in submitted.read_text(encoding="utf-8").split() if job in queued]
