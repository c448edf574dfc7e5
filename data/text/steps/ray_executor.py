"""Run the stages of data preparation on Ray: on the cluster that RAY_ADDRESS names, or on this machine."""

import os
from pathlib import Path

from datatrove.executor import RayPipelineExecutor

from buddygpt.cli.errors import UserError
from buddygpt.data.text.pipeline import LocalExecutor, LockedTasks, Stage, make_local_executor, run_stages

GIGABYTES_PER_WORKER = 0.5  # memory that Ray reserves: the most a worker needs, see tools/benchmarks/data_cost.py


class RayExecutor(LockedTasks, RayPipelineExecutor):
    """Runs the tasks of a stage on a Ray cluster."""


def run_stages_on_ray(stages: list[Stage], work: Path, workers: int) -> None:
    """Run the stages as [`run_stages`] does, with the tasks on Ray.

    Raises:
        UserError: Ray is not installed, the cluster does not answer, or a task raised it.
    """
    _connect(workers)
    run_stages(stages, work, workers, _make_executor)


def _connect(workers: int) -> None:
    try:
        import ray
    except ImportError as error:
        raise UserError("executor `ray` needs ray: pip install ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return
    # Without RAY_ADDRESS, Ray starts a cluster of this machine, which takes these settings.
    address = os.environ.get("RAY_ADDRESS")
    settings = {} if address else {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(logging_level="warning", **settings)
    except ConnectionError as error:
        raise UserError(f"RAY_ADDRESS is {address}, and no cluster answers there: {error}") from error


def _make_executor(stage: Stage, workers: int, logs: Path) -> RayExecutor | LocalExecutor:
    """Return a Ray executor, or a local one for a stage of one task, which is not worth sending."""
    if stage.tasks == 1:
        return make_local_executor(stage, workers, logs)
    return RayExecutor(
        stage.steps, stage.tasks, workers=workers, mem_per_cpu_gb=GIGABYTES_PER_WORKER, logging_dir=str(logs)
    )
