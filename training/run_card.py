"""Write `run.json`, the run card: everything needed to trace and repeat a run."""

import json
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from buddygpt.cli.files import write_atomically
from buddygpt.model.parameters import count_parameters
from buddygpt.training.model_card import write_model_card
from buddygpt.training.zero3 import number_of_parameters, zero3_off

# With at least two parts, and not within a word, a relative path or a URL.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/[\w.@+-]+(?:/[\w.@+-]+)+")

PACKAGES = ("buddygpt", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "datatrove")


def write_run_card(trainer: Trainer, facts: dict[str, Any]) -> None:
    """Write `output_dir/run.json` from the state of the trainer and the entries of the recipe, and the model card.

    Args:
        trainer: Its resolved arguments, world size, step, tokens seen and warnings are recorded.
        facts: Further entries; values that JSON does not have are written as strings.
    """
    args, state = trainer.args, trainer.state
    with zero3_off(args):
        count = count_parameters(trainer.model.config)
    card = {
        **facts,
        "training_arguments": args.to_dict(),
        "model_config": trainer.model.config.to_dict(),
        "parameters": number_of_parameters(trainer.model),
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
    card = portable(json.loads(json.dumps(card, default=str)), Path(args.output_dir))
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    with write_atomically(Path(args.output_dir) / "run.json") as partial:
        partial.write_text(text, encoding="utf-8")
    if "metrics" in card:  # of the finished run
        for folder in (Path(args.output_dir), Path(args.output_dir) / "adapter"):
            if folder.is_dir():
                write_model_card(folder, card)


def portable(value: Any, run_dir: Path) -> Any:
    """Replace the absolute paths in a JSON value, so that a published card tells nothing of this machine.

    Paths below the working directory or the run's folder become relative to it, of others the last two parts remain.
    """
    if isinstance(value, dict):
        return {key: portable(item, run_dir) for key, item in value.items()}
    if isinstance(value, list):
        return [portable(item, run_dir) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("/") and "\n" not in value and Path(value).parent.is_dir():  # a path, maybe with spaces
        return _shorten(value, run_dir)
    return ABSOLUTE_PATH.sub(lambda found: _shorten(found[0], run_dir), value)


def _shorten(path: str, run_dir: Path) -> str:
    for folder in (Path.cwd(), run_dir.absolute()):
        if Path(path).is_relative_to(folder) and Path(path) != folder:
            return Path(path).relative_to(folder).as_posix()
    parts = Path(path).parts[1:]
    if not parts or not Path("/", parts[0]).exists():  # no path of this machine, such as the URL path /v1/models
        return path
    return "/".join(parts[-2:]) if len(parts) > 1 else path


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
