"""Resume: checkpoints that are whole or not there at all, and where a run goes on after whatever ended it."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedConfig, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256

CHECKSUMS = "checksums.json"
PARTIAL = f"{PREFIX_CHECKPOINT_DIR}.partial"
# What the configs of one architecture may differ in without their weights being of another shape.
_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "use_qk_norm",
    "tie_word_embeddings",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_soft_experts",
)


def last_checkpoint(output_dir: str | Path, config: PreTrainedConfig) -> str | None:
    """Return the newest `checkpoint-N` folder that is as it was written, or None where there is none.

    One that is not (cut short by a crash of the machine, a bad disk, a careless hand) is named in a warning, and the
    one before it is taken. The bytes are compared with the checksums in it: see [`write_checkpoints_beside`].

    Args:
        output_dir: The run's output folder; need not exist.
        config: Config of the model about to be trained.

    Raises:
        UserError: The checkpoint is of a model of another shape.
    """
    for folder in map(Path, reversed(sort_checkpoints(str(output_dir)))):
        damage = find_damage(folder)
        if damage is None:
            _require_same_shape(folder, config)
            return str(folder)
        print(f"warning: {folder} is damaged and is passed over: {damage}")
    return None


def _require_same_shape(folder: Path, config: PreTrainedConfig) -> None:
    if not (folder / "config.json").exists():  # LoRA: the checkpoint holds the adapter only
        return
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in _SHAPE_KEYS:
        if key in saved and saved[key] != getattr(config, key, None):
            raise UserError(
                f"cannot resume from {folder}: its {key} is {saved[key]}, this run's is {getattr(config, key, None)}. "
                "Give another --output_dir, or delete that one"
            )


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: The folder it goes on from; None at the beginning.
        step: Optimizer steps taken before.
        card: The run card (`run.json`) of the run that made the checkpoint; empty where there is none.
    """

    checkpoint: str | None = None
    step: int = 0
    card: dict[str, Any] = field(default_factory=dict)


def find_start(args: TrainingArguments, config: PreTrainedConfig) -> Start:
    """Find where a run goes on: at `args.resume_from_checkpoint`, else at the [`last_checkpoint`] in `output_dir`.

    The first process looks and all others are told, so that they never begin at different steps.

    Raises:
        UserError: As [`last_checkpoint`], the checkpoint that was named is missing or damaged, or the run could not be
            resumed later as it is promised.
    """
    _require_resumable(args)
    found: list[Start | UserError | None] = [None]
    if args.process_index == 0:
        try:
            found[0] = _look_for_start(args, config)
        except UserError as error:
            found[0] = error
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _require_resumable(args: TrainingArguments) -> None:
    if args.enable_jit_checkpoint:
        raise UserError(
            "enable_jit_checkpoint: a run ended by SIGTERM would be left as if it were finished. Leave it out: a run "
            "goes on from its last checkpoint whatever has ended it; lower save_steps to lose less"
        )
    if args.save_total_limit == 1:
        raise UserError(
            "save_total_limit is 1: a damaged checkpoint would leave none before it to go on from; use at least 2"
        )


def _look_for_start(args: TrainingArguments, config: PreTrainedConfig) -> Start:
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = last_checkpoint(args.output_dir, config)
        if checkpoint is None:
            return Start()
    elif damage := find_damage(Path(checkpoint)):
        raise UserError(f"cannot resume from {checkpoint}: {damage}")
    card = Path(checkpoint).parent / "run.json"
    return Start(
        checkpoint,
        TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step,
        json.loads(card.read_text(encoding="utf-8")) if card.exists() else {},
    )


def claim_folder(folder: str | Path) -> TextIO | None:
    """Hold a folder for this process, until it ends or closes the file returned.

    Where a launcher was killed alone, its processes may train on: a second run must not write between them.

    Raises:
        UserError: Another process holds it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    file = open(Path(folder) / "run.lock", "a+")  # noqa: SIM115  held
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UserError(
            f"{folder} is in use: process {file.read()} is training there. End it, or give another --output_dir"
        ) from error
    except OSError:  # a file system that knows no locks
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def find_damage(folder: Path) -> str | None:
    """Say in words which file of a checkpoint is not as it was written; None where all are."""
    try:
        promised = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{CHECKSUMS}, which is written last, is missing or cut short"
    for name, expected in promised.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != expected["bytes"]:
            what = "is missing" if size is None else f"holds {size} bytes where {expected['bytes']} were written"
            return f"{name} {what}"
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: file_sha256(folder / name), promised)
        for (name, expected), found in zip(promised.items(), hashes, strict=True):
            if found != expected["sha256"]:
                return f"{name} was changed: its sha256 is not the one written with it"
    return None


def write_checkpoints_beside(trainer: Trainer) -> None:
    """Make a trainer write its checkpoints under another name and rename them when they are whole, with checksums.

    Nothing half-written ever stands under the name `checkpoint-N`, whatever ends the run at whatever moment. What is
    renamed was flushed to the disk before, and holds `checksums.json`: size and sha256 of every other file.
    """
    save, run_dir = trainer._save_checkpoint, Path(trainer.args.output_dir)
    partial, wait = run_dir / PARTIAL, trainer.accelerator.wait_for_everyone

    def save_beside(model: torch.nn.Module, trial: Any = None) -> None:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        wait()
        written = partial / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        try:
            with _replaced(trainer, _get_output_dir=lambda trial: str(partial), _push_from_checkpoint=lambda _: None):
                save(model, trial)
            wait()  # every process has written its part
            _name_best_checkpoint(trainer, written, run_dir)
            if trainer.args.should_save:
                write_checksums(written)
                _move_into_place(written, run_dir / written.name)
        finally:
            if trainer.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        wait()
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(run_dir / written.name))
        if trainer.args.should_save:
            limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)

    trainer._save_checkpoint = save_beside


@contextmanager
def _replaced(trainer: Trainer, **methods: Callable) -> Iterator[None]:
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            delattr(trainer, name)


def _name_best_checkpoint(trainer: Trainer, written: Path, run_dir: Path) -> None:
    """Where this checkpoint is the best so far, its state names the folder that it is about to leave."""
    if trainer.state.best_model_checkpoint == str(written):
        trainer.state.best_model_checkpoint = str(run_dir / written.name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(written / TRAINER_STATE_NAME))


def write_checksums(folder: Path) -> None:
    """Flush the files of a checkpoint to the disk and write down what they hold, last of all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        facts = pool.map(lambda path: {"bytes": path.stat().st_size, "sha256": file_sha256(path, flush=True)}, files)
        checksums = {path.relative_to(folder).as_posix(): fact for path, fact in zip(files, facts, strict=True)}
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(checksums, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(written: Path, folder: Path) -> None:
    if folder.exists():  # damaged, or saved twice at one step
        folder.rename(written.with_name("replaced"))
    written.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)  # the new name, too, shall outlive a power cut
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def written_beside(trainer: Trainer) -> Iterator[Path]:
    """Give a folder to write into; in the end each file of it is moved to the same name in `output_dir`."""
    output_dir, wait = Path(trainer.args.output_dir), trainer.accelerator.wait_for_everyone
    partial = output_dir / "final.partial"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    try:
        yield partial
        wait()
        for path in [*partial.rglob("*")] if trainer.args.should_save else ():
            if path.is_file():
                place = output_dir / path.relative_to(partial)
                place.parent.mkdir(exist_ok=True)
                path.replace(place)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
