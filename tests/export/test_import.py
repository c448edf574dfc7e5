"""An imported stock checkpoint is the same model and can be trained further; other models are refused."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import TEMPLATE, TEXT, logits, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    GenerationConfig,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError
from buddygpt.export import from_native, to_native
from buddygpt.model import BuddyGPTConfig

SIZES = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=3,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=3)
GROUPS = EXPERTS | dict(n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2, first_k_dense_replace=1)
MLA = dict(kv_lora_rank=12, q_lora_rank=20, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10)
MLA |= dict(num_key_value_heads=4)
QWEN3_MOE = EXPERTS | dict(num_experts=8, norm_topk_prob=True)
GLM = GROUPS | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0})
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
BIAS, TIED, SLIDING = dict(attention_bias=True), dict(tie_word_embeddings=True), dict(use_sliding_window=True)
CASES = {
    "qwen2": (Qwen2Config, TIED),
    "qwen3": (Qwen3Config, dict(head_dim=16)),
    "qwen3-bias": (Qwen3Config, dict(head_dim=16) | BIAS | TIED),
    "llama": (LlamaConfig, {}),
    "deepseek": (DeepseekV3Config, MLA | GROUPS),
    "deepseek-dense": (DeepseekV3Config, MLA | GROUPS | BIAS | dict(first_k_dense_replace=3, q_lora_rank=None)),
    "deepseek-yarn": (DeepseekV3Config, MLA | GROUPS | dict(rope_parameters=YARN | {"mscale_all_dim": 1.0}) | TIED),
    "glm": (Glm4MoeConfig, GLM | BIAS | dict(head_dim=16)),
    "glm-norm": (Glm4MoeConfig, GLM | dict(use_qk_norm=True, head_dim=12)),
    "qwen3-moe": (Qwen3MoeConfig, QWEN3_MOE | BIAS | TIED),
    "qwen3-moe-dense-bottom": (Qwen3MoeConfig, QWEN3_MOE | dict(mlp_only_layers=[0, 1], norm_topk_prob=False)),
}
HALVES = MLA | GROUPS | BIAS | dict(rope_interleave=False)


def make_stock(folder: Path, config: type[PreTrainedConfig], fields: dict, dtype=torch.float32) -> Path:
    """Save a random stock model whose every weight matters; only biases of `o_proj` are 0."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(like_qwen=config is Qwen2Config)
    model = AutoModelForCausalLM.from_config(config(**SIZES | fields))
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            std = 0.0 if name.endswith("o_proj.bias") else 0.3
            torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=std)
    eos = [tokenizer.eos_token_id, 0]
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, max_new_tokens=9)
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    def call(script: ModuleType, checkpoint: Path, output: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(checkpoint), "--output", str(output)])
        script.main()
        return capsys.readouterr().out

    return call


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, torch.bfloat16) for case in ("qwen2", "deepseek", "glm", "qwen3-moe")],
)
def test_import_and_export_give_the_stock_checkpoint_back(tmp_path, call, case, dtype):
    stock = make_stock(tmp_path / "stock", *CASES[case], dtype)
    text = call(from_native, stock, tmp_path / "ours")
    assert f"BuddyGPTForCausalLM in {dtype}: the logits differ by 0.0 of the largest" in text
    if dtype == torch.float32 or "moe" not in case:  # Qwen3-MoE's router computes in the model's dtype
        assert torch.equal(logits(stock), logits(tmp_path / "ours"))

    call(to_native, tmp_path / "ours", tmp_path / "again")
    first, last = load(stock), load(tmp_path / "again")
    assert type(first) is type(last)
    first, last = first.state_dict(), last.state_dict()
    assert first.keys() == last.keys()
    for name, weight in first.items():
        assert weight.dtype == last[name].dtype and torch.equal(weight, last[name]), name


@pytest.mark.slow
def test_deepseek_with_halved_rope_is_reordered(tmp_path, call):
    for number, rank in enumerate((20, None)):
        fields = HALVES | dict(q_lora_rank=rank)
        stock = make_stock(tmp_path / f"stock{number}", DeepseekV3Config, fields)
        assert "the logits differ by 0.0 of the largest" in call(from_native, stock, tmp_path / f"ours{number}")
        assert torch.equal(logits(stock), logits(tmp_path / f"ours{number}"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen3-bias", "deepseek", "qwen3-moe"])
def test_the_import_is_a_checkpoint_that_trains_and_answers_as_before(tmp_path, call, case):
    stock, ours = make_stock(tmp_path / "stock", *CASES[case]), tmp_path / "ours"
    call(from_native, stock, ours)
    assert isinstance(config := require_causal_lm(str(ours)), BuddyGPTConfig)
    assert config.tie_word_embeddings == CASES[case][1].get("tie_word_embeddings", False)
    assert {"modeling_buddygpt.py", "configuration_buddygpt.py", "chat_template.jinja"} <= {
        path.name for path in ours.iterdir()
    }
    tokenizer, model = AutoTokenizer.from_pretrained(ours), load(ours)
    assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(stock)(TEXT).input_ids
    assert tokenizer.chat_template == TEMPLATE
    assert model.generation_config.eos_token_id == [2, 0] and model.generation_config.max_new_tokens == 9
    inputs = tokenizer("床前明月 Paris", return_tensors="pt")
    tokens = [each.generate(**inputs, do_sample=False).tolist() for each in (load(stock), model)]
    assert tokens[0] == tokens[1] and len(tokens[0][0]) > inputs.input_ids.shape[1] + 1

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        loss = model.train()(**inputs, labels=inputs.input_ids).loss
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (MistralConfig, {}, "a `mistral` model cannot become a BuddyGPT one; these can: qwen2, qwen3, llama, "),
        (LlamaConfig, dict(mlp_bias=True), "`llama` model has biases in its feed-forward layers"),
        (LlamaConfig, BIAS, "o_proj.bias is not zero, and BuddyGPTForCausalLM has no such weight"),
        (Qwen2Config, SLIDING | dict(max_window_layers=2), "`qwen2` model has sliding-window attention"),
        (Qwen3Config, SLIDING | dict(max_window_layers=0), "`qwen3` model has sliding-window attention"),
        (Qwen3MoeConfig, SLIDING | QWEN3_MOE, "`qwen3_moe` model has sliding-window attention"),
        (Glm4MoeConfig, GROUPS, "`glm4_moe` model rotates 0.5 of each head"),
        (Qwen3MoeConfig, QWEN3_MOE | dict(decoder_sparse_step=2), "experts in one of 2 layers"),
        (Qwen3MoeConfig, QWEN3_MOE | dict(mlp_only_layers=[2]), r"has dense layers \[2\]"),
        (Qwen3MoeConfig, QWEN3_MOE | dict(num_experts_per_tok=1), "the router would get no gradient"),
    ],
)
def test_a_model_that_buddygpt_cannot_express_is_refused_with_the_reason(tmp_path, call, config, fields, message):
    stock = make_stock(tmp_path / "stock", config, fields)
    if fields is BIAS:
        weights = load_file(stock / "model.safetensors")
        weights["model.layers.1.self_attn.o_proj.bias"][5] = 1e-3
        save_file(weights, stock / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="(?s)cannot be converted: .*" + message):
        call(from_native, stock, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]


def test_wrong_folders_are_user_errors(tmp_path, call):
    with pytest.raises(UserError, match="no such checkpoint folder"):
        call(from_native, tmp_path / "stock", tmp_path / "ours")
    stock = make_stock(tmp_path / "stock", LlamaConfig, {})
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        call(from_native, stock, stock)
    (stock / "config.json").write_text(
        (stock / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "fp8"},', 1)
    )
    with pytest.raises(UserError, match="`llama` model is quantized"):
        call(from_native, stock, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["stock"]
