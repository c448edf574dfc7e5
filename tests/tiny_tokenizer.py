"""A tokenizer of 400 entries, trained on four short texts, and helpers to run tokenizer scripts in this process."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from buddygpt.tokenizer import train_tokenizer

TEXTS = [
    "春天到了，院子里的桃花开了。孩子们在树下读书、唱歌。",
    "The spring has come, and the children read under the trees.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 22))\n",
    "二〇二六年，Python3.11发布了？是的！",
]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Call `main()` of a script that is imported as a module, with command-line arguments."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    module.main()


def train_tiny_tokenizer(folder: Path) -> Path:
    """Write `folder`/text.jsonl and return the tokenizer `folder`/made that is trained on it."""
    file = write_jsonl(folder / "text.jsonl", TEXTS * 5)
    with pytest.MonkeyPatch.context() as patch:
        run(train_tokenizer, patch, "--files", file, "--output", folder / "made", "--vocab_size", 400)
    return folder / "made"
