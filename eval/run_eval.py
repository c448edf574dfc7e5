"""Evaluate several checkpoints in one process with lm-eval.

    python eval/run_eval.py --config eval/configs/quickstart.yaml
    python eval/run_eval.py --checkpoints base=DIR sft=DIR --chat sft --tasks sample_exam_text --sample_dir DIR

Each checkpoint's folder `OUTPUT/NAME/` receives lm-eval's own `results_TIME.json` and `samples_TASK_TIME.jsonl`, as
from `lm_eval --output_path OUTPUT/NAME --log_samples`; `eval/report.py` turns them into a report. The checkpoints
named in `chat` are asked through their chat template, all others with bare text: nothing guesses which is which.
"""

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Read when the libraries are imported. Unless the user says HF_HUB_OFFLINE=0, nothing waits for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoConfig, AutoTokenizer

import buddygpt.model  # noqa: F401  registers the model with the Auto classes
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script

TASKS = Path(__file__).parent / "tasks"


@dataclass
class EvalArguments:
    checkpoints: list[str] = field(metadata={"help": "NAME=FOLDER, one or more."})
    tasks: list[str] = field(metadata={"help": "Tasks or groups of eval/tasks, of include_path, or lm-eval's own."})
    output: str = field(default="outputs/eval", metadata={"help": "Where the results go, a folder per checkpoint."})
    chat: list[str] = field(
        default_factory=list, metadata={"help": "Names of the checkpoints to ask through their chat template."}
    )
    include_path: list[str] = field(
        default_factory=list, metadata={"help": "More folders of task files, such as eval/local_exams.py writes."}
    )
    sample_dir: str | None = field(default=None, metadata={"help": "The sample's folder, for the sample_* tasks."})
    heldout_text: str | None = field(default=None, metadata={"help": "jsonl with `text`, for heldout_text."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question, where the task has a split for them."}
    )
    limit: int | None = field(default=None, metadata={"help": "First N rows of each task. For trying things out."})
    batch_size: str = field(default="16", metadata={"help": "A number, or `auto`."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps. None: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ... auto: as in the checkpoint."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code found in a checkpoint. Ours needs none: buddygpt is installed."}
    )


def main() -> None:
    (args,) = parse_arguments(EvalArguments, description=__doc__)
    folders = _folders(args)
    model_args = {name: _model_args(name, folder, args) for name, folder in folders.items()}
    task_manager = _task_manager(args)
    for name, folder in folders.items():
        print(f"== {name}: {folder}{' (chat template)' if name in args.chat else ''}", flush=True)
        _evaluate(model_args[name], Path(args.output) / name, name in args.chat, task_manager, args)


def _folders(args: EvalArguments) -> dict[str, str]:
    folders: dict[str, str] = {}
    for item in args.checkpoints:
        name, _, folder = item.partition("=")
        if not name or not folder or "/" in name:
            raise UserError(f"checkpoints: `{item}` is not NAME=FOLDER.")
        if name in folders:
            raise UserError(f"checkpoints: the name `{name}` is given twice, for {folders[name]} and {folder}.")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"checkpoints: {name}={folder} is not a checkpoint: it has no config.json.")
        folders[name] = folder
    for name in args.chat:
        if name not in folders:
            raise UserError(f"chat: `{name}` is not among the checkpoints ({', '.join(folders)}).")
    return folders


def _model_args(name: str, folder: str, args: EvalArguments) -> dict[str, Any]:
    """lm-eval's arguments for one checkpoint, which is looked at before any is evaluated."""
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoints: {name}={folder} cannot be loaded: {error}") from error
    if name in args.chat and not tokenizer.chat_template:
        raise UserError(f"chat: {name}={folder} has no chat template; leave `{name}` out of `chat`.")
    model_args = {"pretrained": folder, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    # What a document begins after. lm-eval would take eos, which ends a turn and in training stood before no document.
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    return model_args if separator is None else {**model_args, "prefix_token_id": separator}


def _task_manager(args: EvalArguments) -> TaskManager:
    """Index every task and load the chosen ones, so that a mistake shows before the first model runs."""
    for folder in args.include_path:
        if not Path(folder).is_dir():
            raise UserError(f"include_path: {folder} is not a folder; eval/local_exams.py writes one.")
    metadata = {"sample_dir": args.sample_dir, "heldout_text": args.heldout_text}
    manager = TaskManager(include_path=[TASKS, *args.include_path], metadata=metadata)
    for task in args.tasks:
        if task not in manager.all_tasks:
            close = difflib.get_close_matches(task, manager.all_tasks, n=1)
            hint = f"did you mean `{close[0]}`?" if close else "`lm_eval ls tasks` lists lm-eval's own."
            raise UserError(f"tasks: there is no task `{task}`; {hint}")
    try:
        manager.load(args.tasks)
    except (OSError, ValueError) as error:
        raise UserError(f"tasks: {error} (exams from local folders: eval/local_exams.py)") from error
    return manager


def _any_device() -> str:
    # lm-eval's own default is cuda, with or without one.
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def _evaluate(
    model_args: dict[str, Any], output: Path, chat: bool, task_manager: TaskManager, args: EvalArguments
) -> None:
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    results = simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=args.tasks,
        task_manager=task_manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        device=args.device or _any_device(),
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        evaluation_tracker=tracker,
    )
    if results is None:  # another rank of `accelerate launch` writes them
        return
    print(make_table(results))
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    # lm-eval logs a failure to write and goes on.
    if not list(output.glob(f"samples_*_{tracker.date_id}.jsonl")):
        raise UserError(f"the results could not be written to {output}; see the warning above.")


if __name__ == "__main__":
    run_script(main)
