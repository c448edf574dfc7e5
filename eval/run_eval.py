"""Evaluate several checkpoints with lm-eval in one process.

    python eval/run_eval.py --config eval/configs/quickstart.yaml
    python eval/run_eval.py --checkpoints base=DIR sft=DIR --chat sft --tasks sample_exam_text --sample_dir DIR

Writes lm-eval's own `results_TIME.json` and `samples_TASK_TIME.jsonl` to `OUTPUT/NAME/` for each checkpoint, like
`lm_eval --output_path OUTPUT/NAME --log_samples`. `eval/report.py` turns them into a report. Checkpoints named in
`chat` are prompted through their chat template, all others with bare text; nothing is guessed.
"""

import logging
import math
import os
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The libraries below read these when they are imported. Nothing waits for a network unless HF_HUB_OFFLINE=0 is set.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import Task
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer

import buddygpt.eval.harness  # makes lm-eval score every answer from its first token
import buddygpt.model  # noqa: F401  registers the model with the Auto classes
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_quick_template
from buddygpt.cli.errors import UserError, did_you_mean, run_script
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.eval.checkpoints import choose_device, read_checkpoints

TASKS = Path(__file__).parent / "tasks"

# lm-eval's warnings about what is intended or what the report shows, by logger. They may come once per prompt.
HARMLESS_WARNINGS = {
    "lm_eval.api.task": "Custom kwargs can be passed",
    "lm_eval.evaluator": "chat template is not applied|Overwriting default num_fewshot of .* from None",
    "lm_eval.models.huggingface": "Combined length of context|Left truncation applied",
    "lm_eval.tasks._index": "overrides existing task",
}


@dataclass
class EvalArguments:
    checkpoints: list[str] = field(metadata={"help": "One or more NAME=FOLDER."})
    tasks: list[str] = field(metadata={"help": "Tasks or groups of eval/tasks, of include_path, or of lm-eval."})
    output: str = field(
        default="outputs/eval", metadata={"help": "Folder for the results, one folder per checkpoint."}
    )
    chat: list[str] = field(
        default_factory=list, metadata={"help": "Names of the checkpoints to prompt through their chat template."}
    )
    include_path: list[str] = field(
        default_factory=list, metadata={"help": "More folders of task files, such as eval/local_exams.py writes."}
    )
    sample_dir: str | None = field(default=None, metadata={"help": "Sample folder, for the sample_* tasks."})
    heldout_text: str | None = field(default=None, metadata={"help": "jsonl file with `text`, for heldout_text."})
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question, if the task has a split for them."}
    )
    limit: int | None = field(default=None, metadata={"help": "First N rows of each task, for a quick look."})
    batch_size: str = field(default="16", metadata={"help": "A number, or `auto`."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, mps. None: a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, ... auto: as in the checkpoint."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code found in a checkpoint. Ours needs none: buddygpt is installed."}
    )

    def __post_init__(self) -> None:
        for key in ("checkpoints", "tasks", "chat", "include_path"):
            values = getattr(self, key)
            if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
                raise ValueError(f"{key} is {values}; give a list of names")
        if not (self.checkpoints and self.tasks):
            raise ValueError("give one or more checkpoints and tasks")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; give a number of rows, at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot is {self.num_fewshot}; give 0 or more examples")
        if not re.fullmatch(r"[1-9]\d*|auto(:\d+)?", str(self.batch_size)):
            raise ValueError(f"batch_size is {self.batch_size}; give a number, at least 1, or `auto`")
        dtype = getattr(torch, self.dtype, None)
        if self.dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype is {self.dtype}; give float32, bfloat16, float16 or auto")


def main() -> None:
    (args,) = parse_arguments(EvalArguments, description=__doc__)

    silence_harmless_warnings()

    # Check everything before the first model runs: an evaluation may take hours.
    device = choose_device(args.device)
    folders = read_checkpoints(args.checkpoints)
    for name in args.chat:
        if name not in folders:
            raise UserError(f"chat: `{name}` is not among the checkpoints ({', '.join(folders)}).")
    model_args = {name: build_model_args(name, folder, args) for name, folder in folders.items()}
    task_manager, tasks = load_tasks(args)
    outputs = {name: make_output(Path(args.output) / name) for name in folders}

    for name, folder in folders.items():
        uses_chat_template = name in args.chat
        print(f"== {name}: {folder}{' (chat template)' if uses_chat_template else ''}", flush=True)
        evaluate(model_args[name], device, outputs[name], uses_chat_template, task_manager, tasks, args)


def silence_harmless_warnings() -> None:
    """Filter `HARMLESS_WARNINGS` out of lm-eval's log."""
    for logger, pattern in HARMLESS_WARNINGS.items():
        is_harmless = re.compile(pattern).search
        logging.getLogger(logger).addFilter(
            lambda record, is_harmless=is_harmless: not is_harmless(" ".join(record.getMessage().split()))
        )


def build_model_args(name: str, folder: str, args: EvalArguments) -> dict[str, Any]:
    """Return lm-eval's arguments for one checkpoint; UserError if it cannot be loaded."""
    try:
        require_all_weights(folder, args.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)
        require_quick_template(tokenizer)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many kinds for damaged files
        raise UserError(f"checkpoints: {name}={folder} cannot be loaded: {error}") from error
    if name in args.chat and not tokenizer.chat_template:
        raise UserError(f"chat: {name}={folder} has no chat template; leave `{name}` out of `chat`.")

    model_args = {"pretrained": folder, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    # The token before the first token of a document, as in training. lm-eval's default is eos, which ends a chat turn
    # here and never precedes a document in training.
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    if separator is not None:
        model_args["prefix_token_id"] = separator
    return model_args


def load_tasks(args: EvalArguments) -> tuple[TaskManager, dict[str, Task]]:
    """Return a task manager and the requested tasks by name; UserError if one is missing or lacks its data."""
    for folder in args.include_path:
        if not Path(folder).is_dir():
            raise UserError(f"include_path: {folder} is not a folder; eval/local_exams.py writes one.")
    metadata = {"sample_dir": args.sample_dir, "heldout_text": args.heldout_text}
    manager = TaskManager(include_path=[TASKS, *args.include_path], metadata=metadata)
    for task in args.tasks:
        if task not in manager.all_tasks:
            match = did_you_mean(task, manager.all_tasks)
            hint = f"did you mean `{match}`?" if match else "`lm_eval ls tasks` lists lm-eval's own."
            raise UserError(f"tasks: there is no task `{task}`; {hint}")
    try:
        tasks = manager.load(args.tasks)["tasks"]
    except UserError:
        raise
    except Exception as error:  # of any kind: task files may run code
        raise UserError(f"tasks: {error} (benchmarks from local files: eval/README.md)") from error
    if any("ifeval" in name for name in tasks):
        require_punkt()
    return manager, tasks


def require_punkt() -> None:
    """Raise UserError if nltk's data for sentences is missing: IFEval would fail after all answers are generated."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UserError("tasks: IFEval needs nltk's data: run `python -m nltk.downloader punkt_tab` once") from error


def make_output(folder: Path) -> Path:
    """Create a folder for results and return it; UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"output: cannot write to {folder}: {error}") from error
    return folder


def evaluate(
    model_args: dict[str, Any],
    device: str,
    output: Path,
    uses_chat_template: bool,
    task_manager: TaskManager,
    tasks: dict[str, Task],
    args: EvalArguments,
) -> None:
    """Evaluate one checkpoint, print lm-eval's table and write its results to the folder `output`.

    Raises:
        UserError: The model's weights or likelihoods are NaN, its context is too short, or the results could not be
            written.
    """
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    model = HFLM(**model_args, backend="causal", batch_size=args.batch_size, device=device)
    require_finite_weights(model.model, model_args["pretrained"])
    require_room_for_answers(model, tasks)
    results = simple_evaluate(
        model=model,
        model_args=model_args,  # for the record, with the two below
        batch_size=args.batch_size,
        device=device,
        tasks=args.tasks,
        task_manager=task_manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=uses_chat_template,
        fewshot_as_multiturn=uses_chat_template,
        evaluation_tracker=tracker,
    )
    if results is None:  # under `accelerate launch`, only rank 0 has results
        return

    print(make_table(results))
    samples = results.pop("samples")
    require_finite_likelihoods(samples, model_args)
    results["truncated_prompts"] = {task: count_truncated(model, rows) for task, rows in samples.items()}
    for task, count in results["truncated_prompts"].items():
        if count:
            print(
                f"{task}: {count} questions had their prompt truncated to the {model.max_length} tokens of the model."
            )
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    # lm-eval only logs a warning if it cannot write.
    if not list(output.glob(f"samples_*_{tracker.date_id}.jsonl")):
        raise UserError(f"the results could not be written to {output}; see the warning above.")


def count_truncated(model: HFLM, samples: list[dict[str, Any]]) -> int:
    """Return how many questions had a prompt that lm-eval cut on the left, because it exceeded the context."""
    truncated = set()
    for sample in samples:
        for prompt, *answer in sample["arguments"]:
            if not answer:  # a whole document, read in windows
                continue
            if isinstance(answer[0], dict):  # the settings of generation
                text = prompt
                room = model.max_length - normalize_gen_kwargs(answer[0], model.max_gen_toks)["max_gen_toks"]
            else:
                text = prompt + answer[0]
                room = model.max_length + 1  # nothing is predicted after the last token
            if len(model.tok_encode(text)) > room:
                truncated.add(sample["doc_id"])
    return len(truncated)


def require_room_for_answers(model: HFLM, tasks: dict[str, Task]) -> None:
    """Raise UserError if a task may generate more tokens than the model's context has."""
    for name, task in tasks.items():
        if task.OUTPUT_TYPE == "generate_until":
            length = normalize_gen_kwargs(task.config.generation_kwargs, model.max_gen_toks)["max_gen_toks"]
            if length >= model.max_length:
                raise UserError(
                    f"tasks: {name} generates up to {length} tokens, but {model.pretrained} has a context of "
                    f"{model.max_length}; set a lower `max_gen_toks` in generation_kwargs of the task"
                )


def require_finite_likelihoods(samples: dict[str, list[dict[str, Any]]], model_args: dict[str, Any]) -> None:
    """Raise UserError if the model does not compute numbers. lm-eval would take the first option as its answer."""
    for task, rows in samples.items():
        for row in rows:
            for response in row["resps"]:  # (likelihood, is greedy), likelihood or text, in a list
                value = response[0][0] if isinstance(response[0], tuple) else response[0]
                if isinstance(value, float) and math.isnan(value):
                    raise UserError(
                        f"{task}: {model_args['pretrained']} gives NaN in {model_args['dtype']}; try --dtype float32"
                    )


if __name__ == "__main__":
    run_script(main)
