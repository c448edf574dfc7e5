"""Evaluate several checkpoints with lm-eval in one process.

    python eval/run_eval.py --config eval/configs/quickstart.yaml
    python eval/run_eval.py --checkpoints base=DIR sft=DIR --chat sft --tasks sample_exam_text --sample_dir DIR
    python eval/run_eval.py --checkpoints base=DIR peer=OWNER/MODEL served=http://HOST:8000/v1#MODEL --suite tiny
    python eval/run_eval.py --checkpoints base=RUN --every_checkpoint base --suite tiny --minutes 10

Writes lm-eval's own `results_TIME.json` and `samples_TASK_TIME.jsonl` to `OUTPUT/NAME/` for each checkpoint, like
`lm_eval --output_path OUTPUT/NAME --log_samples`. `eval/report.py` turns them into a report. Checkpoints named in
`chat` are prompted through their chat template, all others with bare text; nothing is guessed.
"""

import logging
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# The libraries below read these when they are imported. Nothing waits for a network unless HF_HUB_OFFLINE=0 is set.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", os.environ["HF_HUB_OFFLINE"])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import AutoTokenizer

import buddygpt.eval.harness  # makes lm-eval score every answer from its first token
import buddygpt.model  # noqa: F401  registers the model with the Auto classes
from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_quick_template
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.eval.checkpoints import choose_device, is_endpoint, read_checkpoints
from buddygpt.eval.running.arguments import EvalArguments
from buddygpt.eval.running.models import DOCUMENT_SEPARATOR, Checkpoint
from buddygpt.eval.running.subsets import describe, make_entries, measure, plan
from buddygpt.eval.running.task_loading import LoadedTasks, load_tasks

TASKS = Path(__file__).parent / "tasks"

# lm-eval's warnings about what is intended or what the report shows, by logger. They may come once per prompt.
HARMLESS_WARNINGS = {
    "lm_eval.api.task": "Custom kwargs can be passed",
    "lm_eval.evaluator": "chat template is not applied|Overwriting default num_fewshot of .* from None|"
    "settings will update set parameters in yaml tasks",
    "lm_eval.models.huggingface": "Combined length of context|Left truncation applied",
    "lm_eval.tasks._index": "overrides existing task",
}


class Run(NamedTuple):
    """What is the same for all checkpoints.

    Attributes:
        args: As given.
        device: For checkpoints.
        loaded: The tasks.
        samples: Rows of each task to ask, or None for all.
        notes: More entries for the results.
    """

    args: EvalArguments
    device: str
    loaded: LoadedTasks
    samples: dict[str, list[int]] | None
    notes: dict[str, Any]


def main() -> None:
    started = psutil.Process().create_time() if __name__ == "__main__" else time.time()  # with the imports
    (args,) = parse_arguments(EvalArguments, description=__doc__)

    silence_harmless_warnings()

    # Check everything before the first model runs: an evaluation may take hours.
    device = choose_device(args.device)
    places = read_checkpoints(args.checkpoints, args.every_checkpoint, endpoints=True)
    for folder in (Path(args.output), *(Path(args.output) / name for name in places)):
        require_output(folder, "folder")
    for name in args.chat:
        if not any(is_named(each, [name]) for each in places):
            raise UserError(f"chat: `{name}` is not among the checkpoints ({', '.join(places)}).")
    model_args = {
        name: build_model_args(name, place, args) for name, place in places.items() if not is_endpoint(place)
    }
    loaded = load_requested_tasks(args)
    endpoints = connect_endpoints(places, loaded, args)
    model_args |= {name: {"pretrained": places[name]} for name in endpoints}
    outputs = {name: make_output(Path(args.output) / name) for name in places}

    samples, notes = None, {}
    if args.suite:
        notes["suite"] = {"name": args.suite, "missing": loaded.missing}
    if args.minutes:
        samples, notes["subset"] = choose_questions(model_args, endpoints, device, loaded, started, args)
    run = Run(args, device, loaded, samples, notes)
    for name, place in places.items():
        print(f"== {name}: {place}{' (chat template)' if is_named(name, args.chat) else ''}", flush=True)
        evaluate(run, name, endpoints.get(name), model_args[name], outputs[name])
    if args.minutes:
        print(f"the run took {(time.time() - started) / 60:.1f} of {args.minutes:g} minutes")


def is_named(name: str, names: list[str]) -> bool:
    """Return whether a checkpoint, or the run that it is from (NAME@STEP), is in a list."""
    return name in names or name.partition("@")[0] in names


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
    except UserError as error:
        if Path(folder).is_dir() or os.environ["HF_HUB_OFFLINE"] == "0":
            raise
        raise UserError(f"checkpoints: {name}: {error} HF_HUB_OFFLINE=0 downloads it.") from error
    except Exception as error:  # transformers and tokenizers raise many kinds for damaged files
        raise UserError(f"checkpoints: {name}={folder} cannot be loaded: {error}") from error
    if is_named(name, args.chat) and not tokenizer.chat_template:
        raise UserError(f"chat: {name}={folder} has no chat template; leave `{name}` out of `chat`.")

    model_args = {"pretrained": folder, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    # The token before the first token of a document, as in training. lm-eval's default is eos, which ends a chat turn
    # here and never precedes a document in training.
    separator = tokenizer.get_vocab().get(DOCUMENT_SEPARATOR)
    if separator is not None:
        model_args["prefix_token_id"] = separator
    return model_args


def make_task_manager(args: EvalArguments) -> TaskManager:
    """Return lm-eval's index of all tasks. Those of `include_path` replace others of the same name."""
    for folder in args.include_path:
        if not Path(folder).is_dir():
            raise UserError(f"include_path: {folder} is not a folder; eval/local_exams.py writes one.")
    metadata = {"sample_dir": args.sample_dir, "heldout_text": args.heldout_text}
    return TaskManager(include_path=[TASKS, *args.include_path], metadata=metadata)


def load_requested_tasks(args: EvalArguments) -> LoadedTasks:
    """Return the tasks of `tasks` or `suite`.

    Raises:
        UserError: A task is missing, has no data, or runs generated programs without permission.
    """
    manager = make_task_manager(args)
    given = {file.stem.lstrip("_") for folder in args.include_path for file in Path(folder).glob("*.yaml")}
    given |= {"heldout_text"} if args.heldout_text else set()
    loaded = load_tasks(manager, args.tasks, args.suite, args.skip_missing, given)
    for name, task in loaded.tasks["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not args.run_generated_code:
            raise UserError(f"tasks: {name} runs programs that the model writes; allow it: --run_generated_code")
    return loaded


def connect_endpoints(places: dict[str, str], loaded: LoadedTasks, args: EvalArguments) -> dict[str, LM]:
    """Return lm-eval's model of each endpoint among `places`; UserError if one does not answer or cannot do a task."""
    served = {name: place for name, place in places.items() if is_endpoint(place)}
    if not served:
        return {}
    from buddygpt.eval.running.endpoints import connect  # slow to import, and few runs need it

    needs_likelihoods = any(task.OUTPUT_TYPE != "generate_until" for task in loaded.tasks["tasks"].values())
    at_once = int(args.batch_size) if args.batch_size.isdecimal() else 1
    return {
        name: connect(name, place, is_named(name, args.chat), needs_likelihoods, at_once)
        for name, place in served.items()
    }


def load_model(model_args: dict[str, Any], device: str, args: EvalArguments) -> Checkpoint:
    """Return lm-eval's model for a checkpoint; UserError if its weights are NaN."""
    model = Checkpoint(**model_args, backend="causal", batch_size=args.batch_size, device=device)
    require_finite_weights(model.model, model_args["pretrained"])
    return model


def make_output(folder: Path) -> Path:
    """Create a folder for results and return it; UserError if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        raise UserError(f"output: cannot write to {folder}: {error}") from error
    return folder


def choose_questions(
    model_args: dict[str, dict[str, Any]],
    endpoints: dict[str, LM],
    device: str,
    loaded: LoadedTasks,
    started: float,
    args: EvalArguments,
) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Measure each kind of checkpoint, and return the rows of each task that fit into `minutes`, and notes on them.

    Checkpoints whose weights have the same size, as those of one run, are measured once.

    Raises:
        UserError: The smallest run does not fit.
    """
    entries = make_entries(loaded.tasks, args.seed)
    seconds: dict[Any, dict[str, float]] = {}
    fixed, measured = 0.0, []
    for name, of_model in model_args.items():
        uses_chat_template = is_named(name, args.chat)
        size = sum(file.stat().st_size for file in Path(of_model["pretrained"]).glob("*.safetensors"))
        kind = (size or name, uses_chat_template)
        if kind not in seconds:
            began = time.time()
            model = endpoints.get(name) or load_model(of_model, device, args)
            load_seconds = time.time() - began
            of_entries = measure(model, entries, uses_chat_template, args.num_fewshot, args.gen_kwargs)
            seconds[kind] = {"load": load_seconds, **of_entries}
            del model  # before the next is loaded
        measured.append(seconds[kind])
        fixed += seconds[kind]["load"] + loaded.seconds
    counts = plan(entries, args.minutes, time.time() - started, measured, fixed)
    return describe(entries, counts, args.minutes, args.seed)


def evaluate(run: Run, name: str, endpoint: LM | None, model_args: dict[str, Any], output: Path) -> None:
    """Evaluate one checkpoint or endpoint, print lm-eval's table and write its results to the folder `output`.

    Raises:
        UserError: Weights or likelihoods are NaN, an endpoint stops to answer, or the results could not be written.
    """
    args, uses_chat_template = run.args, is_named(name, run.args.chat)
    tracker = EvaluationTracker(output_path=str(output / "results.json"))
    model = endpoint or load_model(model_args, run.device, args)
    try:
        results = simple_evaluate(
            model=model,
            model_args=model_args,  # for the record, with the two below
            batch_size=args.batch_size,
            device=None if endpoint else run.device,
            tasks=run.loaded.names,
            task_manager=run.loaded.manager,
            num_fewshot=args.num_fewshot,
            gen_kwargs=args.gen_kwargs,
            limit=args.limit,
            samples=run.samples,
            bootstrap_iters=1000 if run.samples else 100_000,  # lm-eval's default takes minutes for a perplexity
            apply_chat_template=uses_chat_template,
            fewshot_as_multiturn=uses_chat_template,
            evaluation_tracker=tracker,
            confirm_run_unsafe_code=args.run_generated_code,
        )
    except Exception as error:
        if not endpoint or isinstance(error, UserError):
            raise
        raise UserError(f"checkpoints: {model_args['pretrained']} failed during the evaluation: {error}") from error
    if results is None:  # under `accelerate launch`, only rank 0 has results
        return

    print(make_table(results))
    rows = results.pop("samples")
    require_finite_likelihoods(rows, model_args)
    results |= run.notes
    if isinstance(model, Checkpoint):
        results |= find_shortened(model, rows)
    tracker.save_results_aggregated(results=results, samples=rows)
    for task, of_task in rows.items():
        tracker.save_results_samples(task_name=task, samples=of_task)
    # lm-eval only logs a warning if it cannot write.
    if not list(output.glob(f"samples_*_{tracker.date_id}.jsonl")):
        raise UserError(f"the results could not be written to {output}; see the warning above.")


def find_shortened(model: Checkpoint, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print which prompts and answers the context has shortened, and return it for the results."""
    truncated = {task: count_truncated(model, rows) for task, rows in samples.items()}
    for task, count in truncated.items():
        if count:
            print(
                f"{task}: {count} questions had their prompt truncated to the {model.max_length} tokens of the model."
            )
    for task, (before, after) in model.shortened.items():
        print(
            f"{task}: answers had {after} tokens at most, not {before}: the model has a context of {model.max_length}."
        )
    return {"truncated_prompts": truncated, "shortened_answers": model.shortened}


def count_truncated(model: Checkpoint, samples: list[dict[str, Any]]) -> int:
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
