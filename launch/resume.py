"""Where a run continues: the newest complete checkpoint in its output folder."""

from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Return the newest `checkpoint-N` folder that was written to its end, or None where there is none.

    `Trainer` writes `trainer_state.json` after the weights, the optimizer and the scheduler, so a checkpoint whose
    writing was cut off (power, `kill -9`, a full disk) lacks it or holds half of it, and the one before it is taken.
    """
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for folder in sorted(checkpoints, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        if _is_complete(folder):
            return str(folder)
        print(f"warning: {folder} is incomplete and is passed over")
    return None


def _is_complete(folder: Path) -> bool:
    try:
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return True
