"""Write checkpoints and the final model of a run so that they are complete or absent.

[`save_checkpoints_atomically`], [`save_final_model`]; [`claim_folder`] keeps a second run out of the folder.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from buddygpt.cli.checkpoints import finish_checkpoint
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256
from buddygpt.training.adapters import make_adapter_movable, save_merged
from buddygpt.training.finished_folder import bring_training_state_back, set_training_state_aside

CHECKSUMS = "checksums.json"
PARTIAL = f"{PREFIX_CHECKPOINT_DIR}.partial"


def claim_folder(folder: str | Path) -> TextIO | None:
    """Lock a folder until this process ends or closes the returned file.

    If only the launcher of a run was killed, its processes may still be training: a second run must not write to the
    same folder.

    Raises:
        UserError: Another process holds the lock.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    file = open(Path(folder) / "run.lock", "a+")  # noqa: SIM115  stays open, and so locked
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UserError(
            f"{folder} is in use: process {file.read()} is training there. Stop it, or set another output_dir"
        ) from error
    except OSError:  # the file system has no locks
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def save_checkpoints_atomically(trainer: Trainer) -> None:
    """Make a trainer write each checkpoint under a temporary name, add checksums, and rename it when it is complete.

    `checkpoint-N` is always complete, even if the run is killed while saving. All files are flushed to disk before the
    rename; `checksums.json` holds the size and sha256 of every other file.
    """
    trainer_save = trainer._save_checkpoint
    wait = trainer.accelerator.wait_for_everyone
    run_dir = Path(trainer.args.output_dir)
    partial = run_dir / PARTIAL
    if trainer.args.should_save:
        bring_training_state_back(run_dir)
    wait()

    def save(model: torch.nn.Module, trial: Any = None) -> None:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        wait()
        written = partial / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        try:
            # The trainer saves as usual, but into another folder, and leaves the upload for later.
            with _methods_replaced(
                trainer,
                _get_output_dir=lambda trial: str(partial),
                _push_from_checkpoint=lambda folder: None,
                create_model_card=lambda **names: None,  # TRL's calls the model "fine-tuned version of None"
            ):
                trainer_save(model, trial)
            wait()  # until every rank has written its part
            _name_best_checkpoint(trainer, written, run_dir)
            if trainer.args.should_save:
                finish_checkpoint(written)
                make_adapter_movable(written, run_dir / written.name)
                write_checksums(written)
                _move_into_place(written, run_dir / written.name)
        finally:
            if trainer.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
        wait()
        if trainer.args.push_to_hub:
            trainer._push_from_checkpoint(str(run_dir / written.name))
        if trainer.args.should_save:
            # Delete old checkpoints: the trainer has looked for them in the temporary folder, where there are none.
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), trainer.args.save_total_limit, best, use_mtime=True)

    trainer._save_checkpoint = save


@contextmanager
def _methods_replaced(trainer: Trainer, **methods: Callable) -> Iterator[None]:
    vars(trainer).update(methods)
    try:
        yield
    finally:
        for name in methods:
            delattr(trainer, name)


def _name_best_checkpoint(trainer: Trainer, written: Path, run_dir: Path) -> None:
    """Record the final folder name if this checkpoint is the best so far: the trainer recorded the temporary one."""
    if trainer.state.best_model_checkpoint == str(written):
        trainer.state.best_model_checkpoint = str(run_dir / written.name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(written / TRAINER_STATE_NAME))


def write_checksums(folder: Path) -> None:
    """Flush all files of a checkpoint to disk, then write their sizes and hashes as the last file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CHECKSUMS)
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda path: file_sha256(path, flush=True), files))
    checksums = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256}
        for path, sha256 in zip(files, hashes, strict=True)
    }
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as file:
        json.dump(checksums, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(written: Path, folder: Path) -> None:
    if os.path.lexists(folder):  # a damaged checkpoint, one saved twice at the same step, or a link to nothing
        folder.rename(written.with_name("replaced"))
    written.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)  # so that the rename survives a power failure
    os.fsync(descriptor)
    os.close(descriptor)


def save_final_model(trainer: Trainer) -> None:
    """Save the weights, or with LoRA the adapter and the merged weights, into `output_dir`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    with _final_folder(trainer) as folder:
        if not isinstance(model, PeftModel):
            trainer.save_model(str(folder))
            return
        trainer.save_model(str(folder / "adapter"))
        if trainer.is_world_process_zero():
            save_merged(trainer, folder / "adapter", folder)
            trainer.processing_class.save_pretrained(folder)


@contextmanager
def _final_folder(trainer: Trainer) -> Iterator[Path]:
    """Yield a temporary folder for the final model; afterwards move each file to the same path in `output_dir`.

    Then the folder can be published: cards of libraries, pickles and training state are not left in it.
    """
    output_dir = Path(trainer.args.output_dir)
    wait = trainer.accelerator.wait_for_everyone
    partial = output_dir / "final.partial"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    try:
        yield partial
        wait()  # until every rank has written its part
        if trainer.args.should_save:
            for name in ("training_args.bin", "README.md"):  # a pickle, cards of libraries: run.json tells more
                for file in partial.rglob(name):
                    file.unlink()
            finish_checkpoint(partial)
            make_adapter_movable(partial / "adapter", output_dir / "adapter")
            for path in list(partial.rglob("*")):
                if path.is_file():
                    target = output_dir / path.relative_to(partial)
                    target.parent.mkdir(exist_ok=True)
                    path.replace(target)
            set_training_state_aside(output_dir)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
