"""The options of eval/run_eval.py."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch

from buddygpt.eval.running.answers import read_gen_kwargs
from buddygpt.eval.suites import SUITES, suite_tasks


@dataclass
class EvalArguments:
    checkpoints: list[str] = field(
        metadata={"help": "One or more NAME=FOLDER, NAME=OWNER/MODEL (of the Hub) or NAME=http://HOST/v1#MODEL."}
    )
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks or groups of eval/tasks, of include_path, or of lm-eval."}
    )
    suite: str | None = field(
        default=None, metadata={"help": f"Instead of tasks: {', '.join(SUITES)}. eval/suites.py shows the tasks."}
    )
    skip_missing: bool = field(
        default=False, metadata={"help": "Leave out the tasks of the suite that have no data here."}
    )
    output: str = field(
        default="outputs/eval", metadata={"help": "Folder for the results, one folder per checkpoint."}
    )
    chat: list[str] = field(
        default_factory=list, metadata={"help": "Names of the checkpoints to prompt through their chat template."}
    )
    every_checkpoint: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of runs, each to be replaced by all its checkpoints, named NAME@STEP."},
    )
    include_path: list[str] = field(
        default_factory=list, metadata={"help": "More folders of task files, such as eval/local_exams.py writes."}
    )
    sample_dir: str | None = field(default=None, metadata={"help": "Sample folder, for the sample_* tasks."})
    heldout_text: str | None = field(default=None, metadata={"help": "jsonl file with `text`, for heldout_text."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question, if the task has a split for them."}
    )
    gen_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Settings for generated answers, such as max_gen_toks=64,temperature=0.8; or JSON."},
    )
    limit: int | None = field(default=None, metadata={"help": "First N rows of each task, for a quick look."})
    minutes: float | None = field(
        default=None, metadata={"help": "Time for the whole run: asks as many questions as fit, drawn with `seed`."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the questions that `minutes` draws."})
    run_generated_code: bool = field(
        default=False, metadata={"help": "Run the programs that a model writes, for tasks such as livecodebench."}
    )
    batch_size: str = field(default="16", metadata={"help": "A number, or `auto`. For an endpoint: requests at once."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps. None: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ... auto: as in the checkpoint."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code found in a checkpoint. Ours needs none: buddygpt is installed."}
    )

    def __post_init__(self) -> None:
        for key in ("checkpoints", "tasks", "chat", "include_path", "every_checkpoint"):
            values = getattr(self, key)
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{key} is {values}; give a list of names")
        if not self.checkpoints:
            raise ValueError("give one or more checkpoints")
        if bool(self.tasks) == bool(self.suite):
            raise ValueError("give either tasks or a suite" + (", not both" if self.suite else ""))
        if self.suite:
            suite_tasks(self.suite)  # or it does not exist
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; give a number of rows, at least 1")
        if self.minutes is not None and not (0 < self.minutes < math.inf):
            raise ValueError(f"minutes is {self.minutes}; give a number above 0")
        if self.minutes is not None and self.limit is not None:
            raise ValueError("limit and minutes choose different questions; give one of them")
        if self.minutes is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("minutes works in one process only; give limit, or start without accelerate launch")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot is {self.num_fewshot}; give 0 or more examples")
        if not re.fullmatch(r"[1-9]\d*|auto(:\d+)?", str(self.batch_size)):
            raise ValueError(f"batch_size is {self.batch_size}; give a number, at least 1, or `auto`")
        dtype = getattr(torch, self.dtype, None)
        if self.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {self.dtype}; give float32, bfloat16, float16 or auto")
        self.gen_kwargs = read_gen_kwargs(self.gen_kwargs)
