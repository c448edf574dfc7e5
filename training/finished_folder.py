"""Keep what only a resume needs out of the folder of a finished run, so that the folder can be uploaded as it is.

While a run trains, its checkpoints are in `output_dir`. When it is finished they move to `output_dir.training`, and
links take their places: `hf upload` and `modelscope upload` do not follow links. A run that continues moves them back.
"""

import os
import shutil
import sys
from pathlib import Path

STATE = ("checkpoint-*", "runs")  # `runs` holds the logs of tensorboard


def set_training_state_aside(output_dir: Path) -> None:
    """Move checkpoints out of `output_dir`, unless the file system has no links or its parent cannot be written."""
    aside = _aside(output_dir)
    for path in _state_of(output_dir):
        if path.is_symlink():
            continue
        target = aside / path.name
        try:
            aside.mkdir(exist_ok=True)
            if target.exists():  # left by a run whose folder was deleted
                shutil.rmtree(target)
            path.rename(target)
            try:
                path.symlink_to(os.path.relpath(target, output_dir), target_is_directory=True)
            except OSError:
                target.rename(path)
                raise
        except OSError as error:
            print(f"warning: {path} stays, leave it out when you publish {output_dir} ({error})", file=sys.stderr)


def bring_training_state_back(output_dir: Path) -> None:
    """Undo [`set_training_state_aside`]. The folder of a run that was moved receives copies."""
    aside = _aside(output_dir)
    for path in _state_of(output_dir):
        if not path.is_symlink():
            continue
        target = path.resolve()
        path.unlink()
        if target.parent == aside.resolve():
            target.rename(path)
        else:
            shutil.copytree(target, path)
    if aside.is_dir() and not any(aside.iterdir()):
        aside.rmdir()


def as_part_of_run(checkpoint: Path) -> Path:
    """Return the place of a checkpoint in the folder of its run, if it was set aside."""
    folder = checkpoint.parent
    place = folder.with_name(folder.name.removesuffix(".training")) / checkpoint.name
    return place if place.is_symlink() and place.resolve() == checkpoint.resolve() else checkpoint


def _aside(output_dir: Path) -> Path:
    folder = Path(os.path.abspath(output_dir))
    return folder.with_name(f"{folder.name}.training")


def _state_of(output_dir: Path) -> list[Path]:
    return sorted(path for pattern in STATE for path in output_dir.glob(pattern) if path.is_dir())
