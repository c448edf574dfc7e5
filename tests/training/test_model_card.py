"""Model cards: valid for the Hub, the same numbers as the run card, and never over a person's text."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from buddygpt.training.finished_folder import as_part_of_run, bring_training_state_back, set_training_state_aside
from buddygpt.training.model_card import add_evaluation, describe_base, write_model_card
from buddygpt.training.run_card import portable

CONFIG = {
    "model_type": "buddygpt",
    "architectures": ["BuddyGPTForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
PRETRAINED = {
    "recipe": "pretrain",
    "parameters": 125312,
    "non_embedding_parameters": 92544,
    "active_parameters": 125312,
    "steps": 12,
    "tokens_seen": 7_200_000,
    "throughput": {"median_tokens_per_second": 1000.0},
    "device": "cpu",
    "arguments": {"block_size": 64},
    "training_arguments": {"learning_rate": 0.004},
    "origin": {"global_batch": 4},
    "model_config": CONFIG,
    "metrics": {"eval_loss": 5.25},
    "data": [
        {"name": "wiki", "language": "zh", "tokens": 900, "license": "CC BY-SA 3.0", "hub": "OWNER/wiki"},
        {"name": "own", "language": "en", "tokens": 100, "license": None, "hub": None},
    ],
}
TUNED = {key: value for key, value in PRETRAINED.items() if key not in ("data", "tokens_seen")} | {
    "recipe": "sft",
    "arguments": {"train_files": ["data/chat.jsonl"]},
}
SCORES = {"exam": {"acc": {"value": 0.3, "n": 100, "ci95": [0.22, 0.4], "chance": 0.25}}}


def write_run(folder: Path, card: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "run.json").write_text(json.dumps(card))
    write_model_card(folder, card)
    return folder


def load(folder: Path) -> ModelCard:
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.pipeline_tag == "text-generation" and "buddygpt" in card.data.tags
    return card


def test_a_card_has_the_numbers_of_its_run(tmp_path):
    card = load(write_run(tmp_path / "tiny", PRETRAINED))
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en", "zh"], ["OWNER/wiki"])
    assert card.data.library_name == "transformers" and card.data.base_model is None
    for language in card.text.split("## 中文"):
        for text in ("125,312", "92,544", "| 7,200,000 | 12 | 0.004 | 4 x 64 | 2.00 |", "CC BY-SA 3.0", "5.2500"):
            assert text in language, text
    assert "from scratch" in card.text and "从零" in card.text
    assert card.text.count('"USER/NAME", trust_remote_code=True') == 2  # also the tokenizer, or transformers asks


def test_a_card_tells_all_stages_and_scores(tmp_path):
    base = write_run(tmp_path / "tiny" / "pretrain", PRETRAINED)
    tuned = write_run(tmp_path / "tiny" / "sft", TUNED | describe_base(str(base)))
    add_evaluation(tuned, {"prompts": "chat template", "tasks": SCORES})
    card = load(tuned)
    assert card.data.model_name == "tiny-sft" and "| pretraining | wiki, own |" in card.text
    (result,) = card.data.eval_results
    score = SCORES["exam"]["acc"]
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("exam", "acc", score["value"])
    assert result.metric_args == {key: score[key] for key in ("n", "ci95", "chance")}
    assert card.text.count("| exam | acc | 100 | 25.0% | 30.0% [22.0, 40.0] |") == 2
    assert json.loads((tuned / "run.json").read_text())["evaluation"]["tasks"] == SCORES


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B-Base", None])
def test_a_card_names_the_base_model_if_others_can_find_it(tmp_path, name):
    (tmp_path / "Qwen").mkdir()
    card = load(write_run(tmp_path / "tuned", TUNED | describe_base(name or str(tmp_path / "Qwen"))))
    assert card.data.base_model == name and card.data.license == "other"
    assert f"from {name or 'Qwen'}" in card.text and str(tmp_path) not in card.content


def test_an_adapter_is_loaded_on_its_base(tmp_path):
    folder = write_run(tmp_path / "sft", TUNED)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "OWNER/base"}')
    write_model_card(folder / "adapter", TUNED)
    card = load(folder / "adapter")
    assert (card.data.library_name, card.data.base_model) == ("peft", "OWNER/base") and "PeftModel" in card.text


def test_what_a_person_wrote_stays(tmp_path, capsys):
    folder = write_run(tmp_path / "run", PRETRAINED)
    write_model_card(folder, PRETRAINED | {"parameters": 7})  # our own card is renewed
    assert "A base model of 7 parameters" in load(folder).text
    edited = (folder / "README.md").read_text().replace("## Limits", "## Limits\n\nMy own words.")
    for text in (edited, "# Mine\n"):
        (folder / "README.md").write_text(text)
        write_model_card(folder, PRETRAINED)
        assert (folder / "README.md").read_text() == text and "it stays as it is" in capsys.readouterr().out


def test_run_cards_name_no_place_of_the_machine(tmp_path):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    value = {
        "output_dir": str(run),
        "files": [str(tmp_path / "my data" / "a.jsonl"), "outputs/b.jsonl", str(Path.cwd() / "outputs/c.jsonl")],
        "warnings": [f"step 3 read {run}/x.ds:7 and {tmp_path}/more/y.ds:8"],
        "prompts": ["/think 1/2 km/h? https://a.org/b/c /v1/models"],
        "steps": 3,
    }
    (tmp_path / "my data").mkdir()
    assert portable(value, run) == {
        "output_dir": "runs/one",
        "files": ["my data/a.jsonl", "outputs/b.jsonl", "outputs/c.jsonl"],
        "warnings": ["step 3 read x.ds:7 and more/y.ds:8"],
        "prompts": ["/think 1/2 km/h? https://a.org/b/c /v1/models"],
        "steps": 3,
    }


def test_uploads_leave_out_the_training_state_of_a_finished_run(tmp_path):
    run = tmp_path / "run"
    for name in ("model.safetensors", "checkpoint-2/optimizer.pt", "runs/x/events", "adapter/a.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    set_training_state_aside(run)
    # as huggingface_hub and modelscope look for files
    sent = {path.relative_to(run).as_posix() for path in run.glob("**/*") if path.is_file()}
    assert sent == {"model.safetensors", "adapter/a.json"}
    assert (run / "checkpoint-2/optimizer.pt").read_text() == "checkpoint-2/optimizer.pt"  # through a link
    assert as_part_of_run(tmp_path / "run.training/checkpoint-2") == run / "checkpoint-2"

    bring_training_state_back(run)
    assert not (run / "checkpoint-2").is_symlink() and not (tmp_path / "run.training").exists()

    (tmp_path / "run.training/checkpoint-2").mkdir(parents=True)  # of a deleted run: nothing links to it
    bring_training_state_back(run)
    assert (run / "checkpoint-2/optimizer.pt").exists()
    set_training_state_aside(run)
    assert (tmp_path / "run.training/checkpoint-2/optimizer.pt").exists()
