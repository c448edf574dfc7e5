"""Run the project's scripts in this process, because imports take ten seconds, and train one tiny chain of models."""

import gc
import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have the most slow tests, so that two processes end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: the tests of a file stay together


def pytest_collection_finish() -> None:
    """Leave the objects of all imports out of later garbage collections: every training ends with one."""
    gc.collect()
    gc.freeze()


def run(script: str, *arguments: object) -> None:
    """Call `main()` of a script of this project with command-line arguments, from the project's folder."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    argv, folder = sys.argv, os.getcwd()
    sys.argv = [script, *map(str, arguments)]
    os.chdir(ROOT)
    try:
        module.main()
    finally:
        sys.argv = argv
        os.chdir(folder)


def history(folder: Path) -> list[dict]:
    """Return the log history of the last checkpoint of a run."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]


@pytest.fixture
def fresh_compiler() -> None:
    """Forget the shapes that flex_attention was compiled for: torch 2.13 fails to compile it for varying ones."""
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A folder with the bundled sample, a tokenizer of 512 entries trained on it, and shards of it."""
    folder = tmp_path_factory.mktemp("workspace")
    run("data/sample/make_sample.py", "--output", folder / "sample")
    text = folder / "sample" / "pretrain.jsonl"
    run("tokenizer/train_tokenizer.py", "--files", text, "--vocab_size", 512, "--output", folder / "tokenizer")
    prepare = ["--sources", text, "--tokenizer", folder / "tokenizer", "--output", folder / "shards"]
    run("data/prepare_pretrain.py", *prepare, "--eval_fraction", 0.02)
    return folder


@pytest.fixture(scope="session")
def base(workspace) -> Path:
    """A pretrained checkpoint."""
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", workspace / "base")
    return workspace / "base"


@pytest.fixture(scope="session")
def chat_model(workspace, base) -> Path:
    """A chat checkpoint."""
    run("sft/sft.py", *sft_arguments(workspace, base), "--output_dir", workspace / "sft")
    return workspace / "sft"


def pretrain_arguments(workspace: Path) -> list[object]:
    shards = workspace / "shards"
    data = ["--train_data", shards / "train", "--eval_data", shards / "eval", "--tokenizer", workspace / "tokenizer"]
    return ["--config", "pretrain/configs/debug.yaml", *data]


def sft_arguments(workspace: Path, model: Path) -> list[object]:
    rows = workspace / "sample" / "sft_eval.jsonl"
    data = ["--train_files", rows, "--eval_files", rows, "--model_name_or_path", model]
    return ["--config", "sft/configs/debug.yaml", *data]


def dpo_arguments(workspace: Path, model: Path) -> list[object]:
    rows = workspace / "sample" / "preference_eval.jsonl"
    data = ["--train_files", rows, "--eval_files", rows, "--model_name_or_path", model]
    return ["--config", "rlhf/configs/debug.yaml", *data]
