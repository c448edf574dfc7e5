"""Find the checkpoint to resume from, see that it is whole and fits, and continue its counts."""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import sort_checkpoints

from buddygpt.cli.errors import UserError, library_errors, reading
from buddygpt.cli.files import file_sha256
from buddygpt.training.finished_folder import (
    as_part_of_run,
)
from buddygpt.training.pickles import require_plain_metadata
from buddygpt.training.saving import CHECKSUMS

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Start:
    """The point a run starts from.

    Attributes:
        checkpoint: Folder to resume from; None for a new run.
        step: Optimizer steps already taken.
        card: Run card (`run.json`) of the run that wrote the checkpoint; empty if there is none.
    """

    checkpoint: str | None = None
    step: int = 0
    card: dict[str, Any] = field(default_factory=dict)


def find_start(args: TrainingArguments, model: Model) -> Start:
    """Return where to start: `args.resume_from_checkpoint` if set, else the [`last_checkpoint`] in `output_dir`.

    Rank 0 decides and broadcasts, so all ranks start at the same step.

    Args:
        args: Arguments of the run.
        model: The model about to be trained.

    Raises:
        UserError: As [`last_checkpoint`]; the requested checkpoint is missing or damaged; or an argument would make
            this run impossible to resume later.
    """
    _require_resumable(args)
    # An error is broadcast as well: if only rank 0 raised it, the other ranks would wait for rank 0 forever.
    result: list[Start | UserError | None] = [None]
    if args.process_index == 0:
        try:
            result[0] = _find_start_on_rank_0(args, model)
        except UserError as error:
            result[0] = error
    broadcast_object_list(result)
    if isinstance(result[0], UserError):
        raise result[0]
    return result[0]


def _require_resumable(args: TrainingArguments) -> None:
    if args.enable_jit_checkpoint:
        raise UserError(
            "enable_jit_checkpoint: a run stopped by SIGTERM would look finished. Remove the option: a run always "
            "resumes from its last checkpoint; lower save_steps to lose fewer steps"
        )
    if args.save_total_limit == 1:
        raise UserError(
            "save_total_limit is 1: if the only checkpoint is damaged, there is none to resume from; use at least 2"
        )


def _find_start_on_rank_0(args: TrainingArguments, model: Model) -> Start:
    if args.resume_from_checkpoint is None:
        checkpoint = last_checkpoint(args.output_dir, model)
        if checkpoint is None:
            return Start()
    else:
        checkpoint = str(as_part_of_run(Path(args.resume_from_checkpoint)))
        if not Path(checkpoint).is_dir():
            raise UserError(
                f"resume_from_checkpoint: there is no folder {checkpoint}. Without this option, a run resumes from "
                "the last checkpoint in its output_dir"
            )
        damage = find_damage(Path(checkpoint))
        if damage:
            raise UserError(f"cannot resume from {checkpoint}: {damage}")
        _require_same_model(Path(checkpoint), model)
    require_plain_metadata(Path(checkpoint))
    card = Path(checkpoint).parent / "run.json"
    return Start(checkpoint, _read_step(Path(checkpoint) / TRAINER_STATE_NAME), _read_card(card))


def _read_step(path: Path) -> int:
    """Return the step of a `trainer_state.json`, after checking all that callbacks and trainers read from it."""
    with _reading_for_resume(path):
        state = TrainerState.load_from_json(str(path))
        steps = [row["step"] for row in state.log_history]
        Path(state.best_model_checkpoint or "")
        if not all(type(step) is int and step >= 0 for step in [state.global_step, *steps]):
            raise ValueError("a step is not a whole number")
        return state.global_step


def _read_card(path: Path) -> dict[str, Any]:
    """Return the run card; empty if there is none."""
    if not path.exists():
        return {}
    with _reading_for_resume(path):
        card = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in {"origin": dict, "training_arguments": dict, "data_history": list}.items():
            if not isinstance(card.get(key, kind()), kind):
                raise ValueError(f"{key} is of another type")
        return card


@contextmanager
def _reading_for_resume(path: Path) -> Iterator[None]:
    try:
        with reading(path):
            yield
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"cannot resume: {error}, or set another output_dir") from error


def last_checkpoint(output_dir: str | Path, model: Model) -> str | None:
    """Return the newest undamaged `checkpoint-N` folder, or None if there is none.

    Damaged checkpoints are skipped with a warning. A checkpoint is damaged if a file differs from its checksum, see
    [`save_checkpoints_atomically`].

    Args:
        output_dir: Output folder of the run; need not exist.
        model: The model about to be trained.

    Raises:
        UserError: The checkpoint holds another model.
    """
    for name in reversed(sort_checkpoints(str(output_dir))):
        folder = Path(name)
        damage = find_damage(folder)
        if damage is None:
            _require_same_model(folder, model)
            return str(folder)
        print(f"warning: skipped {folder}, which is damaged: {damage}")
    return None


def find_damage(folder: Path) -> str | None:
    """Return a description of the first file that differs from the checkpoint's checksums, or None if all match."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        expected = {name: {key: facts[key] for key in ("bytes", "sha256")} for name, facts in expected.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{CHECKSUMS} is missing or incomplete (it is written last)"

    # Sizes first: they are cheap to read and reveal most damage.
    for name, facts in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != facts["bytes"]:
            return f"{name} has {size} bytes instead of {facts['bytes']}"

    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: file_sha256(folder / name), expected)
        for (name, facts), sha256 in zip(expected.items(), hashes, strict=True):
            if sha256 != facts["sha256"]:
                return f"{name} was changed: its sha256 differs from the one in {CHECKSUMS}"
    return None


def _require_same_model(folder: Path, model: Model) -> None:
    """Raise UserError if checkpoint and model differ in the names or shapes of their tensors."""
    saved = _saved_shapes(folder)
    if not saved:  # FSDP and ZeRO-3 may write other files only; they compare shapes themselves when they load them
        return
    current = _model_shapes(model)
    if isinstance(model, PeftModel):
        # PEFT decides on saving whether the embedding belongs to the adapter: compare what both have.
        shared = saved.keys() & current.keys()
        current = {name: shape for name, shape in current.items() if name in shared}
        saved = {name: shape for name, shape in saved.items() if name in shared}
    else:
        # A tied weight may be saved a second time (DeepSpeed does) or not at all.
        for name in [*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())]:
            saved.pop(name, None)
            current.pop(name, None)
    for name in [*current, *saved]:
        if saved.get(name) != current.get(name):
            there, here = saved.get(name, "missing"), current.get(name, "missing")
            raise UserError(
                f"cannot resume from {folder}: tensor {name} is {there} there, {here} in this run's model. "
                "Set another output_dir, or delete that one"
            )
    if not isinstance(model, PeftModel):
        _require_same_heads(folder, model.config)


def _require_same_heads(folder: Path, config: PreTrainedConfig) -> None:
    """Raise UserError if checkpoint and model differ in one of the two properties that shapes do not show.

    Any number of attention heads can split the same matrices, and the output head has one shape, tied or not.
    """
    with _reading_for_resume(folder / "config.json"):
        saved = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    for key in ("num_attention_heads", "tie_word_embeddings"):
        if key in saved and saved[key] != getattr(config, key, None):
            raise UserError(
                f"cannot resume from {folder}: its {key} is {saved[key]}, this run's is {getattr(config, key, None)}. "
                "Set another output_dir, or delete that one"
            )


def _saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in a checkpoint, sharded or not, from the headers of its files."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with library_errors(f"cannot read {path}", "Delete this checkpoint"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no dictionary
                shapes[name] = file.get_slice(name).get_shape()
    return shapes


def _model_shapes(model: Model) -> dict[str, list[int]]:
    """Return the shape of every tensor of `model`, under the name that `save_pretrained` gives it."""
    tensors = model.state_dict(keep_vars=True)
    if isinstance(model, PeftModel):
        tensors = get_peft_model_state_dict(model, tensors, save_embedding_layers=False)
    # ZeRO-3 leaves an empty placeholder on each rank, with the full shape as its attribute.
    empty = {
        name: torch.empty(getattr(tensor, "ds_shape", tensor.shape), device="meta") for name, tensor in tensors.items()
    }
    if not isinstance(model, PeftModel):
        # Some stock architectures join weights in memory that they save separately, such as the experts of a layer.
        empty = revert_weight_conversion(model, empty)
    return {name: list(tensor.shape) for name, tensor in empty.items()}


def require_training_state(folder: Path, trainer: Trainer) -> None:
    """Raise UserError if a checkpoint lacks the optimizer state or the schedule that the trainer would load from it.

    Trainers then begin with fresh ones, silently, or end in errors of their own.
    """
    there, here = _saved_state(folder), _needed_state(trainer)
    remedy = f"or start a new run from its weights: --model_name_or_path {folder} and another output_dir"
    if there is None:
        raise UserError(
            f"cannot resume from {folder}: it holds no optimizer and schedule, as save_only_model writes it. Resume "
            f"from another checkpoint (resume_from_checkpoint), {remedy}"
        )
    if there != here:
        raise UserError(
            f"cannot resume from {folder}: its optimizer state is for {there}, this run is {here}. Start it as "
            f"before, {remedy}"
        )


def _saved_state(folder: Path) -> str | None:
    """Return the kind of optimizer state in a checkpoint, or None if it is not complete."""
    if (folder / "latest").is_file():  # the name of DeepSpeed's folder
        states = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        partitions = len([*states.glob("*zero_pp_rank_*_optim_states.pt")])
        stage = 3 if [*states.glob("*zero_pp_rank_*_model_states.pt")] else 2
        return _describe_deepspeed(stage if partitions else 0, partitions)
    if not (folder / SCHEDULER_NAME).is_file():
        return None
    if (folder / OPTIMIZER_NAME_BIN).is_file() or [*folder.glob("optimizer_*/.metadata")]:
        return "FSDP"
    return "plain or data-parallel training" if (folder / OPTIMIZER_NAME).is_file() else None


def _needed_state(trainer: Trainer) -> str:
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return _describe_deepspeed(stage, trainer.args.world_size)
    return "FSDP" if trainer.is_fsdp_enabled else "plain or data-parallel training"


def _describe_deepspeed(stage: int, processes: int) -> str:
    if stage == 0:
        return "DeepSpeed without ZeRO"
    name = "ZeRO-3" if stage == 3 else "ZeRO-1 or ZeRO-2"
    return f"{name} on {processes} process{'es' if processes > 1 else ''}"


class ResumedStateCallback(TrainerCallback):
    """Restores what trainers lose on resume: the best checkpoint of a folder that was moved, and TRL's `num_tokens`.

    Args:
        trainer: The trainer, not yet started.
        checkpoint: The checkpoint that the run resumes from.
    """

    def __init__(self, trainer: Trainer, checkpoint: str | None) -> None:
        self.trainer = trainer
        self.checkpoint = checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        if hasattr(self.trainer, "_total_train_tokens"):
            self.trainer._total_train_tokens = state.num_input_tokens_seen
        if self.checkpoint is None:
            return
        best = TrainerState.load_from_json(str(Path(self.checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
        if best is None:
            return
        # The folder of the run comes first: the recorded one may be that of the original, of which this is a copy.
        candidates = [Path(args.output_dir) / Path(best).name, Path(self.checkpoint).with_name(Path(best).name), best]
        existing = [str(folder) for folder in candidates if os.path.isdir(folder)]
        if existing:
            state.best_model_checkpoint = existing[0]
        else:
            print(
                f"warning: the best checkpoint, {best}, is gone; the best of the next ones is taken", file=sys.stderr
            )
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def on_step_end(self, args, state, control, **kwargs):
        if hasattr(self.trainer, "_total_train_tokens"):
            # Trainers that generate count in the state itself.
            state.num_input_tokens_seen = max(state.num_input_tokens_seen, self.trainer._total_train_tokens)


def expect_tied_weights_once(trainer: Trainer) -> None:
    """Let a trainer load checkpoints without a warning that tied weights, which are saved once, are missing."""
    warn = trainer._issue_warnings_after_load

    def warn_about_others(load_result: Any) -> None:
        missing = load_result.missing_keys
        tied = getattr(trainer.model, "all_tied_weights_keys", {})
        others = [name for name in missing if name not in tied or tied[name] in missing]
        warn(load_result._replace(missing_keys=others))

    trainer._issue_warnings_after_load = warn_about_others
