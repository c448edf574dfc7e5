"""Write `run.json`, the run card: everything needed to trace and repeat a run."""

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from buddygpt.cli.files import write_atomically
from buddygpt.model.parameters import count_parameters

PACKAGES = ("buddygpt", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "datatrove")


def write_run_card(trainer: Trainer, facts: dict[str, Any]) -> None:
    """Write `output_dir/run.json` from the state of the trainer and the entries of the recipe.

    Args:
        trainer: Its resolved arguments, world size, step, tokens seen and warnings are recorded.
        facts: Further entries; values that JSON does not have are written as strings.
    """
    args, state = trainer.args, trainer.state
    count = count_parameters(trainer.model.config)
    card = {
        **facts,
        "training_arguments": args.to_dict(),
        "model_config": trainer.model.config.to_dict(),
        "parameters": trainer.model.num_parameters(),
        "non_embedding_parameters": count.non_embedding,
        "active_parameters": count.active,
        "steps": state.global_step,
        "tokens_seen": state.num_input_tokens_seen or None,
        "world_size": args.world_size,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "warnings": [row["warning"] for row in state.log_history if "warning" in row],
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = json.dumps(card, indent=2, ensure_ascii=False, default=str) + "\n"
    with write_atomically(Path(args.output_dir) / "run.json") as partial:
        partial.write_text(text, encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
