"""Members of transformers' and TRL's trainers that this project relies on although they are not a stable interface.

transformers may rename or remove them in any release. tests/training/test_trainer_internals.py checks that each still
exists, and that the code uses no private member that is not listed here.
"""

import importlib
import inspect
from dataclasses import dataclass


@dataclass(frozen=True)
class Internal:
    """One member of a trainer.

    Attributes:
        owner: Package and class, "transformers.Trainer".
        name: Name of the method or attribute.
        use: "call", "read", "override" (in a subclass) or "replace" (on an instance).
        file: The file of this project that uses it.
        why: The reason why the public interface is not enough.
    """

    owner: str
    name: str
    use: str
    file: str
    why: str


def _trainer(name: str, use: str, file: str, why: str) -> Internal:
    return Internal("transformers.Trainer", name, use, file, why)


INTERNALS = (
    # Saving
    _trainer(
        "_save_checkpoint", "replace", "training/resume.py", "checkpoints are complete or absent, with checksums"
    ),
    _trainer("_get_output_dir", "replace", "training/resume.py", "saves to a temporary folder, which is then renamed"),
    _trainer("_push_from_checkpoint", "replace", "training/resume.py", "uploads after the rename, not before"),
    # Resuming
    _trainer("_get_train_sampler", "override", "pretrain/stream_trainer.py", "starts at a position, skips no batches"),
    _trainer("_load_rng_state", "override", "pretrain/stream_trainer.py", "restores after the loader drew its seed"),
    _trainer("_load_from_checkpoint", "call", "pretrain/replay.py", "loads weights before a step without training"),
    _trainer(
        "get_batch_samples", "override", "pretrain/stream_trainer.py", "restores the random state just before it"
    ),
    _trainer("get_batch_samples", "replace", "training/run.py", "a finished run must not take one more step"),
    # Watching
    _trainer("get_batch_samples", "replace", "training/callbacks/throughput.py", "measures the time of each fetch"),
    _trainer("training_step", "replace", "training/callbacks/alarms.py", "logs hold the mean loss of many steps only"),
    _trainer("_get_grad_norm", "replace", "training/callbacks/alarms.py", "logs hold the norm of the last step only"),
    _trainer("_tr_loss", "read", "training/callbacks/alarms.py", "removes NaN, which would stay in the sum forever"),
    _trainer("callback_handler", "read", "training/run.py", "our callbacks must run before those of the trainer"),
    _trainer("_prepare_inputs", "call", "pretrain/replay.py", "computes the loss of one row as training does"),
    _trainer("compute_loss_context_manager", "call", "pretrain/replay.py", "computes in the precision of the run"),
    Internal(
        "trl.DPOTrainer",
        "ref_model",
        "read",
        "training/callbacks/throughput.py",
        "no MFU if a reference model works too",
    ),
)


def missing_internals() -> list[Internal]:
    """Return the entries that the installed transformers and TRL do not have."""
    missing = []
    for internal in INTERNALS:
        package, name = internal.owner.rsplit(".", 1)
        owner = getattr(importlib.import_module(package), name)
        # Attributes that methods assign exist on instances only.
        is_assigned = f"self.{internal.name} = " in inspect.getsource(owner)
        if not hasattr(owner, internal.name) and not is_assigned:
            missing.append(internal)
    return missing
