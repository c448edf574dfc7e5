"""LoRA trains what was asked for and says so; the merged model has the base model's own weights and types."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import dpo_arguments, pretrain_arguments, run, sft_arguments
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_hardware import config_with, launch
from tiny_models import VARIANTS, make_model, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig
from trl import ModelConfig

from buddygpt.cli.errors import UserError
from buddygpt.training.adapters import describe_lora, prepare_lora

SIZES = dict(hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MLA = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def prepare(variant: str, **settings) -> ModelConfig:
    configs = {"qwen3-moe": Qwen3MoeConfig, "mixtral": MixtralConfig}
    config = configs[variant](**SIZES) if variant in configs else make_model(**VARIANTS[variant]).config
    model_args = ModelConfig(**{"model_name_or_path": "base", "use_peft": True} | settings)
    prepare_lora(model_args, config, SimpleNamespace(deepspeed_plugin=None, trust_remote_code=False))
    return model_args


@pytest.mark.parametrize(
    "settings, modules",
    [
        ({}, "all-linear"),
        ({"lora_target_modules": ["q_proj"]}, ["q_proj"]),  # one word: a regular expression to TRL and peft
        ({"lora_target_modules": "q_proj"}, ["q_proj"]),  # as YAML reads `lora_target_modules: q_proj`
        ({"lora_target_modules": ["q_proj,v_proj", "o_proj"]}, ["q_proj", "v_proj", "o_proj"]),
        ({"lora_target_modules": [r".*layers\.[01]\..*(q|v)_proj"]}, r".*layers\.[01]\..*(q|v)_proj"),
    ],
)
def test_targets_in_every_spelling(settings, modules):
    assert prepare("gqa", **settings).lora_target_modules == modules


MISTAKES = [
    ("gqa", {"lora_target_modules": ["q_proj", "nosuch"]}, "lora_target_modules: .* named nosuch; it has q_proj, k_"),
    ("gqa", {"lora_target_modules": ["q_proj,v_prj"]}, "nothing in the model is named v_prj; did you mean v_proj"),
    ("gqa", {"lora_target_modules": ["q_prj"]}, "named q_prj; did you mean q_proj"),
    ("gqa", {"lora_target_modules": ["all"]}, "named all; it has .*down_proj, all-linear$"),
    ("gqa", {"lora_target_modules": [".*q_prj"]}, r"peft refuses .*\.\*q_prj not found"),
    ("gqa", {"lora_target_modules": ["(q_proj"]}, "peft refuses .*unterminated"),
    ("gqa", {"lora_target_modules": ["q_proj", "norm"]}, "peft refuses .*RMSNorm.* is not supported"),
    ("gqa", {"lora_target_modules": ["q_proj", "lm_head"]}, "cannot train lm_head.*--lora_modules_to_save lm_head"),
    ("gqa", {"lora_target_modules": ["q_proj", "embed_tokens"]}, "cannot train model.embed_tokens.*tied"),
    ("gqa", {"lora_modules_to_save": ["lm_head", "embed_token"]}, "lora_modules_to_save: .*mean embed_tokens"),
    ("gqa", {"lora_target_parameters": EXPERTS}, r"lora_target_parameters: .* named experts\.\w+; it has none"),
    ("gqa", {"lora_r": 0}, "peft refuses .*`r` should be a positive"),
    ("gqa", {"lora_task_type": "SEQ_CLS"}, "lora_task_type is SEQ_CLS"),
    ("gqa", {"use_peft": False, "load_in_4bit": True}, "load_in_4bit and load_in_8bit need use_peft"),
    ("mla-moe", {"lora_target_modules": ["q_a_proj", "kv_a_proj"]}, "kv_a_proj; did you mean kv_b_proj"),
    ("mla-moe", {"lora_target_parameters": EXPERTS}, "without dropout only, and lora_dropout is 0.05. Add --lora_dr"),
    ("mla-moe", {"lora_target_parameters": ["gateup_proj"]}, r"gateup_proj; did you mean experts.gate_up_proj"),
    ("mla-moe", {"lora_target_parameters": EXPERTS, "lora_dropout": 0, "use_dora": True}, "peft refuses .*use_dora"),
    ("qwen3-moe", {}, "without dropout only"),  # where all-linear includes the experts
    ("qwen3-moe", {"lora_target_modules": ["gate_proj"], "lora_dropout": 0}, "gate_proj without also targeting up_"),
    ("mixtral", {"lora_target_modules": ["w1", "w2", "w3", "w4"], "lora_dropout": 0}, "nothing .* is named w4"),
]


@pytest.mark.parametrize("variant, settings, message", MISTAKES)
def test_settings_that_peft_refuses_or_ignores(variant, settings, message):
    with pytest.raises(UserError, match=message):
        prepare(variant, **settings)


def test_a_quantized_base_is_refused():
    config = make_model().config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(UserError, match="base is quantized, so LoRA could not be merged"):
        prepare_lora(ModelConfig("base", use_peft=True), config, SimpleNamespace(deepspeed_plugin=None))


@pytest.mark.parametrize(
    "variant, targets, expected",
    [
        ("gqa", {}, "in q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."),
        ("mla-moe", {}, f"in {', '.join(MLA)}, gate_proj, up_proj, down_proj. Routed experts are not trained (55,296 "
         "parameters); to train them, add --lora_target_parameters experts.gate_up_proj experts.down_proj "
         "--lora_dropout 0"),
        ("mla-moe", {"target_parameters": EXPERTS[:1]}, "experts.gate_up_proj. Routed experts are not trained (18,432 "
         "parameters); to train them, add --lora_target_parameters experts.down_proj --lora_dropout 0"),
        ("mla-moe", {"target_parameters": EXPERTS}, ", experts.gate_up_proj, experts.down_proj."),
        ("soft-moe", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "in q_proj, lm_head. Routed "
         "experts are not trained (27,648 parameters); to train them, add --lora_target_parameters mlp.gate_up_proj "
         "mlp.gate_down_proj --lora_dropout 0"),
    ],
)  # fmt: skip
def test_what_lora_trains_is_told(variant, targets, expected):
    settings = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear"} | targets)
    model = get_peft_model(make_model(**VARIANTS[variant]), settings)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    line = describe_lora(model)
    assert line.startswith(f"LoRA trains {trained:,} parameters (") and line.endswith(expected)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 30)).logits


def check_merged(base, output) -> None:
    """The merged model is the base plus the adapter; what LoRA does not train has its bits, all has its type."""
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert {name: weight.dtype for name, weight in before.items()} == {n: w.dtype for n, w in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    assert "quantization_config" not in json.loads((output / "config.json").read_text())

    loaded = AutoModelForCausalLM.from_pretrained(base)
    untrained = logits(loaded)
    trained = logits(PeftModel.from_pretrained(loaded, output / "adapter"))
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(output)), trained, atol=1e-4, rtol=1e-4)


LORA = ["--use_peft", "true", "--lora_r", 4, "--learning_rate", 0.02]


@pytest.mark.slow
def test_experts_are_trained_merged_and_moved_with_their_base(workspace, tmp_path, monkeypatch, capsys):
    """In bfloat16, from weights in float32."""
    base, output = tmp_path / "both" / "base", tmp_path / "both" / "lora"
    pretrain = [*pretrain_arguments(workspace), "--model_config", "debug-mla-moe", "--max_steps", 1]
    run("pretrain/pretrain.py", *pretrain, "--output_dir", base)
    experts = ["--lora_target_parameters", *EXPERTS, "--lora_dropout", 0, "--dtype", "bfloat16"]
    run("sft/sft.py", *sft_arguments(workspace, base), *LORA, *experts, "--output_dir", output)
    assert ", experts.gate_up_proj, experts.down_proj.\n" in capsys.readouterr().out
    check_merged(base, output)
    merged = logits(AutoModelForCausalLM.from_pretrained(output))

    # Each adapter names its base by a path from its own folder: both folders may be moved.
    moved = tmp_path / "moved"
    (tmp_path / "both").rename(moved)
    for folder in ("adapter", "checkpoint-6"):
        monkeypatch.chdir(moved / "lora" / folder)
        adapter = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32)
        torch.testing.assert_close(logits(adapter), merged, atol=1e-4, rtol=1e-4)
    for file in [*(moved / "lora").glob("*"), *(moved / "lora" / "adapter").glob("*")]:
        if file.suffix in (".json", ".md"):
            assert str(tmp_path) not in file.read_text(encoding="utf-8"), file
    card = (moved / "lora/adapter/README.md").read_text(encoding="utf-8")
    assert "trained on, `base`; `adapter_config.json` has its path" in card and "基座 `base`；" in card
    # The moved run goes on, and the next stages take the merged model.
    more = [*sft_arguments(workspace, moved / "base"), *LORA, *experts, "--max_steps", 7, "--output_dir"]
    run("sft/sft.py", *more, moved / "lora")
    run("export/to_native.py", "--checkpoint", moved / "lora", "--output", tmp_path / "native")
    with pytest.raises(UserError, match="holds a LoRA adapter, not a whole model; use the merged model one folder up"):
        run("export/to_native.py", "--checkpoint", moved / "lora/adapter", "--output", tmp_path / "other")
    shutil.copytree(moved / "lora/adapter", tmp_path / "alone")
    with pytest.raises(UserError, match="not a whole model; merge it as its README.md shows"):
        run("rlhf/dpo.py", *dpo_arguments(workspace, tmp_path / "alone"), "--output_dir", tmp_path / "other")


@pytest.mark.slow
def test_added_tokens_are_trained_merged_and_exported(workspace, base, tmp_path):
    """Embedding and head of a model whose two are one weight: the merged model has both, also in its native form."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    tokenizer.add_tokens(["buddyword"])
    new = tokenizer.convert_tokens_to_ids("buddyword")
    model.resize_token_embeddings(len(tokenizer))
    for each in (tokenizer, model):
        each.save_pretrained(tmp_path / "base")
    assert model.config.tie_word_embeddings
    rows = []
    for i in range(64):
        turns = [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"buddyword{i}"}]
        rows.append({"messages": turns})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [*sft_arguments(workspace, tmp_path / "base"), *LORA, "--output_dir", tmp_path / "lora"]
    ends = ["--lora_modules_to_save", "embed_tokens", "lm_head", "--train_files", tmp_path / "rows.jsonl"]
    run("sft/sft.py", *arguments, *ends)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert not merged.config.tie_word_embeddings
    for end in ("get_input_embeddings", "get_output_embeddings"):
        assert not torch.equal(getattr(merged, end)().weight[new], getattr(model, end)().weight[new]), end
    adapted = PeftModel.from_pretrained(model, tmp_path / "lora/adapter")
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-4, rtol=1e-4)
    run("export/to_native.py", "--checkpoint", tmp_path / "lora", "--output", tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    torch.testing.assert_close(logits(native), logits(merged), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_merged_in_float(workspace, base, chat_model, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    script, arguments, start = {
        4: ("sft/sft.py", sft_arguments(workspace, base), base),
        8: ("rlhf/dpo.py", dpo_arguments(workspace, chat_model), chat_model),
    }[bits]
    run(script, *arguments, *LORA, f"--load_in_{bits}bit", "true", "--output_dir", tmp_path / "lora")
    check_merged(start, tmp_path / "lora")
    # The next stage takes it.
    next_stage = [*dpo_arguments(workspace, tmp_path / "lora"), "--max_steps", 1, "--eval_strategy", "no"]
    run("rlhf/dpo.py", *next_stage, "--output_dir", tmp_path / "next")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed builds its CPU communication with g++")
def test_zero3_in_bfloat16_merges_in_float32(workspace, base, tmp_path):
    """Only the first process writes the run card and merges, so neither may need the others' share of the weights."""
    config = config_with(tmp_path, "zero3.yaml", num_processes=2, use_cpu=True)
    rows = [*sft_arguments(workspace, base), "--per_device_train_batch_size", 1, "--bf16", "true"]
    command = ["accelerate", "launch", "--config_file", config, "sft/sft.py", *rows, *LORA]
    steps = ["--max_steps", 3, "--eval_strategy", "no", "--eval_files", "null"]
    result = launch([*command, *steps, "--output_dir", tmp_path / "lora"], timeout=900)
    assert result.returncode == 0, result.stderr
    card = json.loads((tmp_path / "lora/run.json").read_text())
    assert card["hardware"]["distributed_type"] == "DEEPSPEED ZeRO-3 (DeepSpeedEngine)"
    assert card["hardware"]["parameters"] == "bfloat16" and card["parameters"] > card["non_embedding_parameters"]
    check_merged(base, tmp_path / "lora")
