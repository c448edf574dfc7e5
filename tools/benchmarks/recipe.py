"""The real pretraining recipe inside a benchmark, for speedrun.py and sweep.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ab import ROOT
from transformers import TrainerCallback
from transformers.trainer import DEFAULT_CALLBACKS

from buddygpt.pretrain import pretrain


def make_missing(commands: dict[Path, list[Any]]) -> None:
    """Run, in order, the command of each output that does not exist; `--output` is added."""
    for output, command in commands.items():
        if not output.exists():
            subprocess.run([sys.executable, *map(str, command), "--output", str(output)], cwd=ROOT, check=True)


def train(options: dict[str, Any], callback: TrainerCallback) -> None:
    """Run pretrain/pretrain.py in this process with these options and one more callback."""
    words = [word for key, value in options.items() for word in (f"--{key}", _as_word(value))]
    before = sys.argv
    sys.argv = ["pretrain/pretrain.py", *words]
    DEFAULT_CALLBACKS.append(callback)
    try:
        pretrain.main()
    finally:
        DEFAULT_CALLBACKS.remove(callback)
        sys.argv = before


def _as_word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | bool) else str(value)
