"""The recipes train, resume, and leave a folder that the next stage loads; mistakes of users give one line."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, dpo_arguments, history, pretrain_arguments, run, sft_arguments
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError
from buddygpt.model import BuddyGPTForCausalLM

SCRIPT_OF = {
    "tokenizer": "tokenizer/train_tokenizer.py",
    "data": "data/prepare_pretrain.py",
    "pretrain": "pretrain/pretrain.py",
    "sft": "sft/sft.py",
    "rlhf": "rlhf/dpo.py",
    "eval": "eval/run_eval.py",
}
CPU = dict.fromkeys(("pretrain", "sft", "rlhf"), ["--use_cpu", "true", "--bf16", "false"])  # where there is no GPU
SEPARATOR, END = "<|endoftext|>", "<|im_end|>"
QWEN = ROOT.parent / "shared" / "data" / "tokenizers" / "qwen2.5"


def check_folder(folder: Path, recipe: str) -> dict:
    """Check that later stages can use a folder: it loads, generates, stops, and records how it was made."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is BuddyGPTForCausalLM and tokenizer.chat_template
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= model.config.auto_map.keys()
    assert {"modeling_buddygpt.py", "loss_curve.png", "samples.md"} <= {path.name for path in folder.iterdir()}
    separator = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert {tokenizer.eos_token_id, separator} <= set(model.generation_config.eos_token_id)
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    for file in folder.rglob("tokenizer_config.json"):  # those of checkpoints and adapters, too
        saved = json.loads(file.read_text())
        assert (saved["tokenizer_class"], saved["extra_special_tokens"]) == ("PreTrainedTokenizerFast", {}), file
    for weights in folder.rglob("*.safetensors"):
        assert weights.stat().st_mode == (folder / "run.json").stat().st_mode, weights
    assert model.config.use_cache and model.generation_config.do_sample == (None if recipe == "pretrain" else True)
    check_published_files(folder)
    card = json.loads((folder / "run.json").read_text())
    assert card["recipe"] == recipe and card["versions"]["torch"] and math.isfinite(card["metrics"]["eval_loss"])
    assert card["training_arguments"]["output_dir"] == "/".join(folder.parts[-2:])
    return card


def check_published_files(folder: Path) -> None:
    """Check that what `hf upload` and `modelscope upload` send has a card, no training state and no local path."""
    ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
    for file in folder.glob("**/*"):  # as both commands look for files
        if file.is_file():
            assert file.name not in ("optimizer.pt", "training_args.bin", "trainer_state.json"), file
            if file.suffix in (".json", ".md") and file.parent == folder:
                text = file.read_text(encoding="utf-8")
                assert not any(f"{path}/" in text for path in (folder.parent, ROOT, Path.home())), file


def test_pretraining_learns_and_leaves_a_checkpoint(workspace, base):
    card = check_folder(base, "pretrain")
    losses = [row["loss"] for row in history(base) if "loss" in row]
    assert abs(losses[0] - math.log(512)) < 1 and losses[-1] < losses[0] - 0.5
    assert card["tokens_seen"] == 12 * 4 * 64
    manifest = json.loads((workspace / "shards" / "eval" / "manifest.json").read_text())
    expected = card["metrics"]["eval_loss"] / math.log(2) * manifest["tokens"] / manifest["text_bytes"]
    evaluations = [row["eval_bits_per_byte"] for row in history(base) if "eval_bits_per_byte" in row]
    assert evaluations[-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_pretraining_resumes_bit_for_bit(workspace, base):
    interrupted = workspace / "interrupted"
    shutil.copytree(base / "checkpoint-6", interrupted / "checkpoint-6")
    shutil.copytree(base / "checkpoint-12", interrupted / "checkpoint-12")
    (interrupted / "checkpoint-12" / "trainer_state.json").unlink()  # as a kill in the middle of writing leaves it
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", interrupted)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (interrupted, base))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.slow
def test_pretraining_continues_from_a_checkpoint_and_isolates_documents(workspace, base):
    arguments = [*pretrain_arguments(workspace), "--max_steps", 2, "--isolate_documents", "true"]
    config = workspace / "continued.yaml"
    text = (ROOT / "pretrain/configs/debug.yaml").read_text().replace("model_config:", "model_name_or_path:")
    config.write_text(text.replace("model/configs/debug.json", str(base)))
    arguments[1] = config
    run("pretrain/pretrain.py", *arguments, "--output_dir", workspace / "continued", "--logging_steps", 1)
    first = history(workspace / "continued")[0]["loss"]
    assert first < math.log(512) - 1  # it did not start from scratch


@pytest.mark.skipif(not QWEN.exists(), reason="needs shared/data/tokenizers/qwen2.5")
def test_pretraining_with_an_existing_tokenizer(workspace, tmp_path):
    """Qwen's tokenizer has 151,665 entries (so uint32 shards, a larger model) and pads with the document separator."""
    data = ["--sources", workspace / "sample/qa_test.jsonl", "--text_key", "question", "--eval_fraction", 0.1]
    run("data/prepare_pretrain.py", *data, "--tokenizer", QWEN, "--output", tmp_path / "shards")
    shards = ["--train_data", tmp_path / "shards/train", "--eval_data", tmp_path / "shards/eval", "--tokenizer", QWEN]
    steps = ["--max_steps", 2, "--logging_steps", 1, "--block_size", 32, "--output_dir", tmp_path / "qwen"]
    run("pretrain/pretrain.py", "--config", "pretrain/configs/debug.yaml", *shards, *steps)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen")
    assert model.config.vocab_size == len(tokenizer) > 2**16
    assert abs(history(tmp_path / "qwen")[0]["loss"] - math.log(len(tokenizer))) < 0.5
    text = [{"role": "user", "content": "你好"}]
    assert "<|im_start|>user\n你好<|im_end|>" in tokenizer.apply_chat_template(text, tokenize=False)


def test_sft_answers_are_what_is_learned(workspace, base, chat_model):
    check_folder(chat_model, "sft")
    losses = [row["eval_loss"] for row in history(chat_model) if "eval_loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_sft_counts_tokens_across_a_resume(workspace, base, chat_model):
    resumed = workspace / "sft-resumed"
    shutil.copytree(chat_model / "checkpoint-3", resumed / "checkpoint-3")
    run("sft/sft.py", *sft_arguments(workspace, base), "--output_dir", resumed)
    counts = [[row["num_tokens"] for row in history(run) if "num_tokens" in row] for run in (resumed, chat_model)]
    assert counts[0] == counts[1] and counts[0][-1] > counts[0][0]
    card, expected = (json.loads((run / "run.json").read_text()) for run in (resumed, chat_model))
    assert card["tokens_seen"] == expected["tokens_seen"] == counts[0][-1]


@pytest.mark.slow
def test_sft_with_lora_ends_with_a_merged_model(workspace, base):
    output = workspace / "sft-lora"
    lora = ["--use_peft", "true", "--lora_r", 4, "--lora_target_modules", "all-linear"]
    run("sft/sft.py", *sft_arguments(workspace, base), *lora, "--output_dir", output)
    check_folder(output, "sft")
    assert (output / "adapter" / "adapter_model.safetensors").exists()
    before, merged = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == merged.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all("proj" in name for name in changed)
    with pytest.raises(UserError, match=r"its lora_alpha was 32, this run's is 256. Set another output_dir"):
        run("sft/sft.py", *sft_arguments(workspace, base), *lora, "--lora_alpha", 256, "--output_dir", output)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--use_peft", "true", "--lora_r", 4]], ids=["full", "lora"])
def test_answers_of_a_base_model_with_another_eos_stop(workspace, base, tmp_path, extra):
    """As in Qwen's base models: eos is <|endoftext|>, but the template ends a turn with <|im_end|>."""
    start = shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("checkpoint-*"))
    separator, end = (AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(t) for t in (SEPARATOR, END))
    for name, change in {
        "tokenizer_config.json": {"eos_token": SEPARATOR, "pad_token": None},
        "config.json": {"eos_token_id": separator},
        "generation_config.json": {"eos_token_id": separator},
    }.items():
        (start / name).write_text(json.dumps(json.loads((start / name).read_text()) | change))
    run("sft/sft.py", *sft_arguments(workspace, start), *extra, "--max_steps", 2, "--output_dir", tmp_path / "sft")
    run("export/to_native.py", "--checkpoint", tmp_path / "sft", "--output", tmp_path / "native")
    for name in ("sft", "native"):
        model, tokenizer = (each.from_pretrained(tmp_path / name) for each in (AutoModelForCausalLM, AutoTokenizer))
        assert model.generation_config.eos_token_id == [end, separator] and model.config.eos_token_id == end
        assert (tokenizer.eos_token, tokenizer.pad_token) == (END, SEPARATOR)


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [[], ["--use_peft", "true", "--precompute_ref_log_probs", "false"]], ids=["full", "lora"]
)
def test_dpo_prefers_the_chosen_answers(workspace, chat_model, extra):
    output = workspace / f"dpo-{len(extra)}"
    run("rlhf/dpo.py", *dpo_arguments(workspace, chat_model), *extra, "--output_dir", output)
    card = check_folder(output, "dpo")
    assert card["metrics"]["eval_loss"] < math.log(2)  # what a model equal to its reference has


@pytest.mark.slow
def test_a_mixture_of_experts_goes_through_every_recipe(workspace, tmp_path):
    pretrain = [*pretrain_arguments(workspace), "--model_config", "debug-mla-moe"]
    run("pretrain/pretrain.py", *pretrain, "--output_dir", tmp_path / "whole")
    logged = [row for row in history(tmp_path / "whole") if "loss" in row]
    assert all(row["router/dropped"] == 0 and 0 < row["router/entropy"] <= 1 for row in logged)
    assert all(row["router/load_min"] <= 1 <= row["router/load_max"] for row in logged)
    assert (tmp_path / "whole" / "expert_load.png").exists()

    shutil.copytree(tmp_path / "whole/checkpoint-6", tmp_path / "resumed/checkpoint-6")
    run("pretrain/pretrain.py", *pretrain, "--output_dir", tmp_path / "resumed")
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    biases = [name for name in expected if name.endswith("e_score_correction_bias")]
    assert len(biases) == 1 and 0 < expected[biases[0]].abs().max() <= 12 * 0.001 + 1e-6

    run("sft/sft.py", *sft_arguments(workspace, tmp_path / "whole"), "--output_dir", tmp_path / "sft")
    run("rlhf/dpo.py", *dpo_arguments(workspace, tmp_path / "sft"), "--output_dir", tmp_path / "dpo")
    check_folder(tmp_path / "dpo", "dpo")
    tuned = load_file(tmp_path / "dpo" / "model.safetensors")
    assert torch.equal(tuned[biases[0]], expected[biases[0]])  # tuning leaves the balance alone
    assert any("router/entropy" in row for row in history(tmp_path / "sft"))


@pytest.mark.slow
def test_weights_may_be_bfloat16_throughout(workspace, tmp_path):
    pretrain = [*pretrain_arguments(workspace), "--model_config", "debug-mla-moe", "--dtype", "bfloat16"]
    run("pretrain/pretrain.py", *pretrain, "--output_dir", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name for name, weight in weights.items() if weight.dtype != torch.bfloat16}
    assert kept == {name for name in weights if name.endswith("e_score_correction_bias")}  # moved by thousandths
    states = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt")["state"].values()
    assert {state["exp_avg_sq"].dtype for state in states} == {torch.bfloat16}
    losses = [row["loss"] for row in history(tmp_path) if "loss" in row]
    assert losses[-1] < losses[0] - 0.5


@pytest.fixture(scope="session")
def strange(workspace) -> Path:
    """Files and folders that a user may give by mistake."""
    folder = workspace / "strange"
    text = workspace / "sample" / "qa_test.jsonl"
    run("tokenizer/train_tokenizer.py", "--files", text, "--text_column", "question", "--vocab_size", 400,
        "--output", folder / "tokenizer")  # fmt: skip
    (folder / "t5").mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    (folder / "cut.jsonl").write_text('{"messages": [\n')
    (folder / "empty.jsonl").touch()
    (folder / "plain.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    return folder


MISTAKES = {
    "unknown key": ("pretrain", ["--learning_rat", 1], "learning_rat.*did you mean `learning_rate`"),
    "bad value": ("pretrain", ["--max_steps", "many"], "max_steps.*many"),
    "no shards": ("pretrain", ["--train_data", "nowhere"], "nowhere.*manifest.json"),
    "other tokenizer": ("pretrain", ["--tokenizer", "STRANGE/tokenizer"], "is not the one that .* was made with"),
    "no tokenizer": ("pretrain", ["--tokenizer", "STRANGE/adapter"], "cannot read a tokenizer from"),
    "long blocks": ("pretrain", ["--block_size", 10_000_000], "less than one block"),
    "blocks longer than the model": (
        "pretrain",
        ["--block_size", 129],
        "block_size is 129, but the model has only 128",
    ),
    "rows longer than the model": ("sft", ["--max_length", 129], "max_length is 129, but the model has only 128"),
    "pairs longer than the model": ("rlhf", ["--max_length", 129], "max_length is 129, but the model has only 128"),
    "two models": ("pretrain", ["--model_name_or_path", "BASE"], "give one of model_config"),
    "two precisions": ("pretrain", ["--dtype", "bfloat16", "--fp16", "true"], "contradict each other"),
    "no model config": ("pretrain", ["--model_config", "none.json"], "cannot read the model config none.json"),
    "no checkpoint": ("sft", ["--model_name_or_path", "STRANGE/none"], "no such checkpoint folder"),
    "no model in it": ("sft", ["--model_name_or_path", "STRANGE"], "it has no config.json"),
    "other kind": ("sft", ["--model_name_or_path", "STRANGE/t5"], "`t5` model, which is not a causal"),
    "adapter": ("rlhf", ["--model_name_or_path", "STRANGE/adapter"], "LoRA adapter"),
    "bad row": ("sft", ["--train_files", "STRANGE/rows.jsonl"], r"rows\.jsonl"),
    "cut row": ("sft", ["--train_files", "STRANGE/cut.jsonl"], r"cut\.jsonl"),
    "empty file": ("rlhf", ["--train_files", "STRANGE/empty.jsonl"], r"empty\.jsonl"),
    "no template": ("sft", ["--chat_template_path", "STRANGE/t5"], "t5 is not a .jinja file"),
    "unmarked template": ("sft", ["--chat_template_path", "STRANGE/plain.jinja"], "has no {% generation %} marks"),
    "no file": ("rlhf", ["--train_files", "STRANGE/none.jsonl"], r"none\.jsonl"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(mistake, workspace, base, strange):
    recipe, extra, message = MISTAKES[mistake]
    script, arguments = {
        "pretrain": ("pretrain/pretrain.py", pretrain_arguments(workspace)),
        "sft": ("sft/sft.py", sft_arguments(workspace, base)),
        "rlhf": ("rlhf/dpo.py", dpo_arguments(workspace, base)),
    }[recipe]
    extra = [str(word).replace("STRANGE", str(strange)).replace("BASE", str(base)) for word in extra]
    output = workspace / "mistaken"
    with pytest.raises(UserError, match=message):
        run(script, *arguments, *extra, "--output_dir", output)
    assert not output.exists()


def test_another_models_checkpoints_are_not_resumed(workspace, base):
    arguments = [*pretrain_arguments(workspace), "--model_config", "model/configs/quickstart.json"]
    message = r"cannot resume from .*embed_tokens.weight is \[512, 64\] there, \[512, 128\] in this run's"
    with pytest.raises(UserError, match=message):
        run("pretrain/pretrain.py", *arguments, "--output_dir", base)


def test_a_run_is_not_resumed_with_other_inputs_or_another_optimizer(workspace, base, chat_model, tmp_path):
    arguments = sft_arguments(workspace, chat_model)  # was trained from `base`
    with pytest.raises(UserError, match="its base_sha256 was .*Set another output_dir"):
        run("sft/sft.py", *arguments, "--output_dir", chat_model)
    arguments = sft_arguments(workspace, base)
    with pytest.raises(UserError, match="its optim was adamw_torch, this run's is sgd"):
        run("sft/sft.py", *arguments, "--optim", "sgd", "--output_dir", chat_model)
    template = tmp_path / "other.jinja"
    text = (ROOT / "tokenizer/chat_template.jinja").read_text(encoding="utf-8")
    template.write_text(text.replace("'assistant\\n'", "'bot\\n'").replace("|>assistant", "|>bot"), encoding="utf-8")
    with pytest.raises(UserError, match="its tokenizer_sha256 was"):
        run("sft/sft.py", *arguments, "--chat_template_path", template, "--output_dir", chat_model)
    with pytest.raises(UserError, match="its block_size was 64, this run's is 32"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--block_size", 32, "--output_dir", base)


def test_a_finished_model_is_never_overwritten(workspace, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(UserError, match="model holds a finished model .* Set another output_dir"):
        run("sft/sft.py", *sft_arguments(workspace, model), "--output_dir", model)
    with pytest.raises(UserError, match="model holds a finished model"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", model)
    other = base / "checkpoint-6"
    with pytest.raises(UserError, match="model holds a finished model"):
        run(
            *("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", model),
            *("--resume_from_checkpoint", other),
        )
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_token_that_the_model_does_not_embed_is_named(workspace, base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match=r"<\|new\|> has the id 512, but the model has only 512 embeddings"):
        run("sft/sft.py", *sft_arguments(workspace, model), "--output_dir", tmp_path / "run")


def test_checkpoints_of_another_program_are_not_deleted(workspace, tmp_path):
    file = tmp_path / "run" / "checkpoint-3" / "optimizer.pt"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="checkpoint-3 is not a checkpoint of these recipes .* Set another output_dir"):
        run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", tmp_path / "run")
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_changed_arguments_are_told_on_resuming(workspace, base, capsys):
    run("pretrain/pretrain.py", *pretrain_arguments(workspace), "--output_dir", base, "--logging_steps", 3)
    assert "checkpoint-12 with logging_steps 2 -> 3" in capsys.readouterr().out


@pytest.mark.slow
def test_exit_status_and_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "sft/sft.py"), "--config", "none.yaml"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1] == "error: no such file: none.yaml"
    assert "Traceback" not in result.stderr


SCRIPTS = [
    *("pretrain/pretrain.py", "sft/sft.py", "rlhf/dpo.py", "rlhf/grpo.py", "tokenizer/train_tokenizer.py"),
    *("tools/measure_tokenizer.py", "tools/prune_vocabulary.py", "data/prepare_pretrain.py", "data/convert_chat.py"),
    *("data/sample/make_sample.py", "eval/run_eval.py", "eval/report.py", "eval/local_exams.py"),
    *("export/to_native.py", "export/from_native.py", "tools/to_gguf.py", "runs/ask.py", "runs/summarize.py"),
    *("sft/distill.py", "tools/store_teacher.py", "eval/long_context.py", "data/identity.py", "runs/compare.py"),
    *("rlhf/kto.py", "rlhf/orpo.py", "rlhf/simpo.py", "rlhf/reward.py", "data/sample/make_tool_sample.py"),
]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_opens_with_the_purpose_and_the_command(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    told = capsys.readouterr().out
    assert stop.value.code == 0 and script in told and "--config FILE.yaml" in told


@pytest.mark.parametrize("config", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/configs/*.yaml")))
def test_every_config_has_only_known_keys(config, monkeypatch):
    """Each config is parsed by its own script, up to the point where the work would start."""

    class Parsed(Exception):
        pass

    def parse_only(*args, **kwargs):
        parse_arguments(*args, **kwargs)
        raise Parsed

    monkeypatch.setattr("buddygpt.cli.arguments.parse_arguments", parse_only)
    with pytest.raises(Parsed):
        run(script_of(config), "--config", config, *CPU.get(config.split("/")[0], []))


def script_of(config: str) -> str:
    """Return the recipe of a config: of `quickstart-grpo.yaml`, `grpo.py` if there is one; or that of its folder."""
    folder = config.split("/")[0]
    named = f"{folder}/{Path(config).stem.rpartition('-')[2]}.py"
    return named if (ROOT / named).exists() else SCRIPT_OF[folder]
