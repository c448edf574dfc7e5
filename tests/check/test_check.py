"""Good models pass all checks, and each broken model fails at the right check."""

import json
import subprocess
import sys

import broken_models as broken
import pytest
import torch
from broken_models import with_broken
from torch._inductor.exc import InductorError
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    Mamba2Config,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from buddygpt.check import CHECKS, Subject, __main__, open_subject, reduce_config, run_check
from buddygpt.check.__main__ import main
from buddygpt.check.advice import ADVICE
from buddygpt.cli.errors import UserError
from buddygpt.model import modeling_buddygpt as modeling
from buddygpt.model.presets import PRESETS, load_config

GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2}
STOCK = {
    "qwen2": reduce_config(Qwen2Config(tie_word_embeddings=True)),
    "deepseek_v3": reduce_config(DeepseekV3Config(num_mtp_layers=0)),
    "gemma3": reduce_config(
        Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    ),
    "smollm3": reduce_config(SmolLM3Config()),
}


def failures(subject: Subject) -> dict[str, str]:
    """Run all checks except the slow ones (a new process; flex_attention, which compiles) and return the failures."""
    subject.model._supports_flex_attn = False
    rows = [run_check(name, subject) for name in CHECKS if name != "fresh_process"]
    assert sum(row.status == "n/a" for row in rows) <= 2
    return {row.check: row.note or str(row.measure) for row in rows if row.status == "FAIL"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_pass(name):
    assert failures(open_subject(name, reduced=True)) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", STOCK)
def test_stock_architectures_pass(name):
    assert failures(Subject(STOCK[name])) == {}


@pytest.mark.slow
def test_flex_attention_passes():
    """Of one kind of attention, as it takes long to compile; tests/model has both."""
    row = run_check("attention_backends", open_subject("debug", reduced=True))
    assert (row.status, row.note) == ("pass", "")  # no backend was left out


BROKEN_MODELS = {
    "mla-without-transpose": (
        with_broken(modeling.BuddyGPTLatentAttention, broken.HeadsAsTime),
        "buddygpt-0.3b-mla",
        {"causality", "cached_decoding", "left_padding", "packed_documents"},
    ),
    "router-sums-indices": (
        with_broken(modeling.BuddyGPTTopkRouter, broken.IndexSummingRouter),
        "buddygpt-0.7b-mla-moe",
        {"router_choice"},
    ),
    "published-soft-moe": (
        with_broken(modeling.BuddyGPTSoftMoE, broken.SequenceSoftMoE),
        "steel-1.1b",
        {"causality", "cached_decoding", "left_padding", "packed_documents"},
    ),
    "rotation-ignores-positions": (
        with_broken(modeling.BuddyGPTRotaryEmbedding, broken.CountingRotaryEmbedding),
        "debug",
        {"position_ids", "cached_decoding", "left_padding"},
    ),
    "model-ignores-positions": (broken.IgnoredPositions, "debug", {"position_ids", "packed_documents"}),
    "ignored-mask": (broken.IgnoredMask, "debug", {"left_padding"}),
    "ignored-cache": (broken.IgnoredCache, "debug", {"cached_decoding", "left_padding"}),
    "cache-drops-a-token": (broken.ForgetfulCache, "debug", {"cached_decoding", "left_padding"}),
    "unscaled-accumulated-loss": (broken.MeanOfEachStep, "debug", {"loss_accumulation"}),
    "unshifted-loss": (broken.UnshiftedLoss, "debug", {"loss_accumulation", "initial_loss"}),
    "untied-after-load": (broken.UntiedWhenLoaded, "debug", {"tied_weights"}),
    "unset-after-load": (broken.UnsetWhenLoaded, "debug", {"loaded_buffers"}),
    "unused-layer": (broken.UnusedModule, "debug", {"parameter_gradients"}),
    "wrong-in-sdpa": (
        with_broken(modeling.BuddyGPTAttention, broken.SharpOnlyInSdpa),
        "debug",
        {"attention_backends"},
    ),
    "wrong-in-eager-experts": (
        with_broken(modeling.BuddyGPTExperts, broken.LoudEagerExperts),
        "minimind-moe",
        {"experts_backends"},
    ),
    "counts-its-calls": (
        with_broken(modeling.BuddyGPTMLP, broken.CallDependentMLP),
        "debug",
        {"gradient_checkpointing", "determinism"},
    ),
    "bfloat16-angles": (
        with_broken(modeling.BuddyGPTRotaryEmbedding, broken.Bfloat16RotaryEmbedding),
        "buddygpt-0.1b",
        {"bfloat16"},
    ),
    "unseeded-noise": (with_broken(modeling.BuddyGPTMLP, broken.NoisyMLP), "debug", {"determinism"}),
    "wild-start": (broken.WildStart, "debug", {"initial_loss"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_each_fault_is_caught_by_its_check_alone(name):
    build, preset, expected = BROKEN_MODELS[name]
    config = reduce_config(load_config(preset, **GROUPS if name == "router-sums-indices" else {}))
    assert failures(Subject(config, build)).keys() == expected


@pytest.mark.slow
def test_top_1_with_normalized_weights_leaves_the_router_without_gradient():
    config = Qwen3MoeConfig(num_experts=4, num_experts_per_tok=1, norm_topk_prob=True, moe_intermediate_size=32)
    found = failures(Subject(reduce_config(config)))
    assert found.keys() == {"parameter_gradients"} and "mlp.gate.weight" in found["parameter_gradients"]


def test_reducing_keeps_the_structure():
    full, small = DeepseekV3Config(), reduce_config(DeepseekV3Config())
    kept = ("n_group", "topk_group", "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob")
    assert all(getattr(small, name) == getattr(full, name) for name in kept)
    assert small.n_routed_experts % small.n_group == 0 and small.num_hidden_layers == full.first_k_dense_replace + 1
    qwen = reduce_config(Qwen2Config(num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=24))
    assert qwen.num_attention_heads == 7 * qwen.num_key_value_heads and len(qwen.layer_types) == 2
    assert reduce_config(DeepseekV3Config(q_lora_rank=None)).q_lora_rank is None
    assert reduce_config(GPT2Config(n_layer=12)).n_layer == 2
    assert reduce_config(Gemma3Config()).model_type == "gemma3_text"
    with pytest.raises(UserError, match="`mamba2` model cannot be reduced: its config has no num_attention_heads"):
        reduce_config(Mamba2Config())


def test_a_check_that_raises_has_failed():
    class Unable(broken.Broken):
        def forward(self, input_ids, position_ids=None, past_key_values=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids, position_ids=position_ids, use_cache=use_cache)

    row = run_check("loss_accumulation", Subject(reduce_config(load_config("debug")), Unable))
    assert row.status == "FAIL" and row.note.startswith("TypeError") and "labels" in row.note


def test_a_backend_that_torch_cannot_compile_is_left_out(monkeypatch):
    subject = Subject(STOCK["qwen2"])
    logits = subject.logits

    def without_compiler(ids: torch.Tensor, **kwargs) -> torch.Tensor:
        if subject.model.config._attn_implementation == "flex_attention":
            raise InductorError(RuntimeError("C++ compile error"), None)
        return logits(ids, **kwargs)

    monkeypatch.setattr(subject, "logits", without_compiler)
    row = run_check("attention_backends", subject)
    assert row.status == "pass" and row.note == "without flex_attention, which torch cannot compile here"


def test_a_model_with_nan_logits_fails_every_check_of_them():
    subject = Subject(reduce_config(load_config("debug")))
    subject.model.model.norm.weight.data[0] = torch.nan
    others = {"fresh_process", "experts_backends", "router_choice", "initial_loss", "determinism"}
    assert failures(subject).keys() >= CHECKS.keys() - others


@pytest.mark.slow
def test_saved_code_that_differs_from_the_model_fails_in_a_fresh_process():
    build = with_broken(modeling.BuddyGPTLatentAttention, broken.HeadsAsTime)
    build.__name__ = "BuddyGPTForCausalLM"  # so that the saved class is found; its attention has no fault
    row = run_check("fresh_process", Subject(reduce_config(load_config("buddygpt-0.3b-mla")), build))
    assert row.status == "FAIL" and row.measure.value > 1


def run_command(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


@pytest.mark.slow
def test_checkpoint_folder_through_the_command(monkeypatch, capsys, tmp_path):
    AutoModelForCausalLM.from_config(STOCK["qwen2"]).save_pretrained(tmp_path / "qwen2")
    assert run_command(monkeypatch, tmp_path / "qwen2", "--only", "fresh_process", "experts_backends") == 0
    output = capsys.readouterr().out
    assert "fresh_process           pass" in output and "experts_backends        n/a" in output
    assert "1 hold, 0 fail, 1 do not apply" in output


def test_exit_status_of_a_failure(monkeypatch, capsys):
    subject = Subject(reduce_config(load_config("debug")), broken.WildStart)
    monkeypatch.setattr(__main__, "open_subject", lambda *options: subject)
    assert run_command(monkeypatch, "wild", "--only", "initial_loss") == 1
    output = capsys.readouterr().out
    assert "initial_loss            FAIL" in output and output.endswith("and at whether the loss is shifted.\n")
    assert ADVICE.keys() == CHECKS.keys()


@pytest.mark.slow
def test_vocabulary_size_can_be_replaced(monkeypatch, capsys):
    assert run_command(monkeypatch, "minimind-26m", "--vocab_size", 100, "--only", "initial_loss", "--seed", 3) == 0
    assert open_subject("debug", vocab_size=100).config.vocab_size == 100


def test_help_explains_every_check(monkeypatch, capsys):
    assert run_command(monkeypatch, "--help") == 0
    output = capsys.readouterr().out
    assert all(f"\n  {name} " in output for name in CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "cannot open the model"),
        ({"model_type": "buddygpt", "num_attention_heads": 4, "num_key_value_heads": 3}, r"\(4\).*\(3\)"),
        ({"model_type": "t5"}, "T5Config"),
        ({"model_type": "unheard_of"}, "unheard_of"),
    ],
)
def test_wrong_model_is_a_user_error(monkeypatch, tmp_path, fields, message):
    path = tmp_path / "model.json"
    if fields is not None:
        path.write_text(json.dumps(fields))
    monkeypatch.setattr(sys, "argv", ["check", str(path)])
    with pytest.raises(UserError, match=message):
        main()


def test_vocabulary_size_of_a_checkpoint_cannot_be_replaced(tmp_path):
    with pytest.raises(UserError, match="vocab_size 5 does not fit the weights"):
        open_subject(str(tmp_path), vocab_size=5)


@pytest.mark.slow
def test_exit_status_of_a_wrong_model():
    result = subprocess.run([sys.executable, "-m", "buddygpt.check", "no-such-preset"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "no-such-preset" in result.stderr
