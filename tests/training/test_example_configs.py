"""The example configs: one per method for each model that users start with, with the same settings."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from buddygpt.model.presets import load_config

METHODS = {
    "sft": ("", "-lora", "-distill", "-identity", "-tools"),
    "rlhf": ("", "-lora", "-kto", "-orpo", "-simpo", "-reward", "-grpo"),
}
EXAMPLES = [f"{folder}/configs/{{}}{method}.yaml" for folder, methods in METHODS.items() for method in methods]


@pytest.mark.parametrize("example", EXAMPLES)
def test_both_models_have_each_method_with_the_same_settings(example):
    """MiniMind's tokenizer needs our chat template; else only the names differ."""
    texts = {name: (ROOT / example.format(name)).read_text("utf-8") for name in ("buddygpt-0.1b", "minimind-3-64m")}
    for name, text in texts.items():
        load_config(name)  # there is a preset
        assert text.startswith("# ") and yaml.safe_load(text)["output_dir"].startswith(f"outputs/{name}/")
    ours, minimind = (yaml.safe_load(text.replace("buddygpt-0.1b", "minimind-3-64m")) for text in texts.values())
    assert minimind | ours == minimind and minimind.keys() - ours.keys() <= {"chat_template_path"}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_comments_of_an_example_name_where_its_rows_come_from(example):
    """A published data set, a command that makes them, or the config that tells."""
    for name in ("buddygpt-0.1b", "minimind-3-64m"):
        text = (ROOT / example.format(name)).read_text("utf-8")
        comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        told = ["data/convert_chat.py", "data/identity.py", *(f"{folder}/configs/{name}.yaml" for folder in METHODS)]
        assert any(each in comment for each in told), example
        for word in comment.replace("`", " ").split():
            if word.endswith((".yaml", ".py")) and "/" in word:
                assert Path(ROOT / word).is_file(), word
