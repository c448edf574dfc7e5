"""Whether a run may go on in its folder: what must be the same as before, and what belongs to somebody else."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import Trainer

from buddygpt.cli.checkpoints import tokenizer_rules
from buddygpt.cli.errors import UserError
from buddygpt.training.resume import Start
from buddygpt.training.run_card import portable
from buddygpt.training.saving import CHECKSUMS


def require_no_other_model(output_dir: Path, checkpoint: str | None) -> None:
    """Raise UserError if the folder holds a model, tokenizer or checkpoint that is not of the run being resumed."""
    if checkpoint and Path(checkpoint).parent.resolve() == output_dir.resolve():
        return
    for pattern in ("config.json", "adapter_config.json", "tokenizer.json", "*.safetensors"):
        for file in output_dir.glob(pattern):
            raise UserError(
                f"{output_dir} holds a finished model or tokenizer ({file.name}) and no checkpoint to resume from: "
                "this run would overwrite it. Set another output_dir, or delete that one"
            )
    for folder in output_dir.glob("checkpoint-*"):
        if not (folder / CHECKSUMS).exists():
            raise UserError(
                f"{folder} is not a checkpoint of these recipes (it has no {CHECKSUMS}), and this run might delete "
                "it. Set another output_dir, or delete that one"
            )


def describe_state(trainer: Trainer) -> dict[str, Any]:
    """Return what must be the same for the state of a run to fit: the batch, the optimizer and the tokenizer."""
    tokenizer = trainer.processing_class
    rules = [tokenizer_rules(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template]
    changes = getattr(trainer.args, "model_init_kwargs", None) or {}
    return {
        "rope_parameters": changes.get("rope_parameters"),
        "global_batch": trainer.get_total_train_batch_size(trainer.args),
        "optim": str(trainer.args.optim.value).removesuffix("_fused"),
        "tokenizer_sha256": sha256(json.dumps(rules).encode()).hexdigest(),
    }


def require_same_origin(start: Start, origin: dict[str, Any]) -> None:
    folder = Path(start.checkpoint).parent
    before = start.card.get("origin", origin)
    for key, now in origin.items():
        if before.get(key) == now:
            continue
        if key == "global_batch":
            product = "per_device_train_batch_size x gradient_accumulation_steps x processes"
            remedy = f"Choose {product} = {before.get(key)}, or set another output_dir"
        else:
            remedy = "Set another output_dir, or delete that one"
        raise UserError(
            f"cannot resume the run in {folder}: its {key} was {before.get(key)}, this run's is {now}. {remedy}"
        )


def describe_changed_arguments(start: Start, trainer: Trainer) -> str:
    """Return the training arguments that differ from those in the run card: " with key old -> new, ..."."""
    before = start.card.get("training_arguments", {})
    now = portable(json.loads(json.dumps(trainer.args.to_dict(), default=str)), Path(trainer.args.output_dir))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f" with {', '.join(changed)}" if changed else ""
