"""The exported stock model equals the checkpoint and needs no code of ours; other models are refused."""

import json
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from buddygpt.cli.errors import UserError
from buddygpt.export import from_native, to_native
from buddygpt.model import BuddyGPTConfig, BuddyGPTForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEXT = "The capital of France is Paris.\n床前明月光，疑是地上霜。 12345"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# attention_bias, use_qk_norm, Qwen tokenizer, expected class
TARGETS = [
    (True, False, True, "Qwen2ForCausalLM"),
    (True, False, False, "LlamaForCausalLM"),
    (False, True, False, "Qwen3ForCausalLM"),
    (True, True, True, "Qwen3ForCausalLM"),
    (False, False, False, "LlamaForCausalLM"),
]
MLA = dict(num_key_value_heads=None, head_dim=None, kv_lora_rank=12, q_lora_rank=20)
MLA |= dict(qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10)
MOE = dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, first_k_dense_replace=1)
SIGMOID = MOE | dict(scoring_func="sigmoid", n_shared_experts=2, n_group=2, topk_group=1, routed_scaling_factor=1.5)
# name -> attention_bias, use_qk_norm, other fields, expected class
VARIANTS = {
    "mla": (False, False, MLA, "DeepseekV3ForCausalLM"),
    "mla-bias": (True, False, MLA | dict(tie_word_embeddings=True), "DeepseekV3ForCausalLM"),
    "mla-moe": (False, False, MLA | SIGMOID | dict(q_lora_rank=None), "DeepseekV3ForCausalLM"),
    "mla-moe-unshared": (True, False, MLA | SIGMOID | dict(n_shared_experts=0), "DeepseekV3ForCausalLM"),
    "moe": (True, False, SIGMOID, "Glm4MoeForCausalLM"),
    "moe-norm-unshared": (False, True, SIGMOID | dict(n_shared_experts=0, n_group=1), "Glm4MoeForCausalLM"),
    "moe-softmax": (True, True, MOE, "Qwen3MoeForCausalLM"),
    "moe-softmax-top-1": (False, True, MOE | dict(num_experts_per_tok=1, norm_topk_prob=False), "Qwen3MoeForCausalLM"),
}


def make_tokenizer(like_qwen: bool) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    marks = dict(eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=TEMPLATE)
    if not like_qwen:
        return PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return Qwen2Tokenizer(vocab=model["vocab"], merges=merges, extra_special_tokens=SPECIAL[1:2], **marks)


def make_checkpoint(
    folder: Path, bias: bool, qk_norm: bool, like_qwen: bool = False, dtype=torch.float32, **sizes
) -> Path:
    """Save a random model whose every weight matters: large matrices, biases off 0, norms off 1."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(like_qwen)
    fields = dict(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        attention_bias=bias,
        use_qk_norm=qk_norm,
        tie_word_embeddings=qk_norm,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BuddyGPTForCausalLM(BuddyGPTConfig(**(fields | sizes)))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.3)
    if model.config.scoring_func == "sigmoid":
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                torch.nn.init.normal_(bias, std=0.3)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, 0], pad_token_id=tokenizer.pad_token_id, max_new_tokens=24
    )
    model.save_pretrained(folder)
    model = BuddyGPTForCausalLM.from_pretrained(folder, dtype=dtype)  # unlike .to(), keeps the selection bias as it is
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def export(monkeypatch, capsys):
    def call(checkpoint: Path, output: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(checkpoint), "--output", str(output)])
        to_native.main()
        return capsys.readouterr().out

    return call


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokens = torch.arange(200).view(2, 100)
    mask = torch.ones_like(tokens)
    mask[0, :30] = 0
    with torch.no_grad():
        return model(tokens, attention_mask=mask).logits[mask.bool()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "qk_norm", "like_qwen", "name"), TARGETS)
def test_the_export_equals_the_checkpoint_bit_for_bit(tmp_path, export, bias, qk_norm, like_qwen, name, dtype):
    source = make_checkpoint(tmp_path / "source", bias, qk_norm, like_qwen, dtype)
    text = export(source, tmp_path / "native")
    assert "the logits differ by 0.0 of the largest" in text
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert (type(native).__name__, native.dtype, native.config.head_dim) == (name, dtype, 16)
    assert torch.equal(logits(source), logits(tmp_path / "native"))

    files = {path.name for path in (tmp_path / "native").iterdir()}
    modes = {path.stat().st_mode for path in (tmp_path / "native").iterdir()}
    assert len(modes) == 1  # whoever can read config.json can read the weights
    assert not any(file.endswith(".py") for file in files)
    assert "auto_map" not in (tmp_path / "native" / "config.json").read_text()
    assert native.generation_config.eos_token_id == [2, 0] and native.generation_config.max_new_tokens == 24
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "native"), AutoTokenizer.from_pretrained(source)
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    saved = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text())  # transformers 4 can read it
    assert saved["tokenizer_class"] == ("Qwen2Tokenizer" if like_qwen else "PreTrainedTokenizerFast")
    assert saved.get("extra_special_tokens", {}) == {}
    assert theirs.chat_template == TEMPLATE and (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")


def test_the_exported_template_needs_no_transformers_and_is_imported_with_its_marks(tmp_path, export, monkeypatch):
    source, native, again = make_checkpoint(tmp_path / "source", True, False), tmp_path / "native", tmp_path / "again"
    template = (ROOT / "tokenizer" / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").write_text(template)
    export(source, native)
    exported = (native / "chat_template.jinja").read_text()
    jinja2.Environment().parse(exported)  # refuses `{% generation %}`
    tokenizer = AutoTokenizer.from_pretrained(native)
    chat = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "?"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == expected

    monkeypatch.setattr(sys, "argv", ["x", "--checkpoint", str(native), "--output", str(again)])
    from_native.main()
    assert (again / "chat_template.jinja").read_text() == template


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, torch.float32) for variant in VARIANTS]
    + [(variant, torch.bfloat16) for variant in ("mla-moe", "moe", "moe-softmax")],
)
def test_latent_attention_and_experts_are_exported_bit_for_bit(tmp_path, export, variant, dtype):
    bias, qk_norm, sizes, name = VARIANTS[variant]
    source = make_checkpoint(tmp_path / "source", bias, qk_norm, dtype=dtype, **sizes)
    text = export(source, tmp_path / "native")
    assert f"{name} in {dtype}: the logits differ by 0.0 of the largest" in text
    assert ("shared_experts" in text) == ("unshared" in variant)
    assert ("o_proj.bias" in text) == (bias and name != "Glm4MoeForCausalLM")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native", dtype="auto")
    assert (type(native).__name__, native.dtype) == (name, dtype)
    if dtype == torch.float32 or not name.startswith("Qwen3Moe"):  # whose router computes in the model's dtype
        assert torch.equal(logits(source), logits(tmp_path / "native"))


@pytest.mark.slow
def test_engines_find_an_output_head_and_no_unknown_layers(tmp_path, export):
    tied = dict(tie_word_embeddings=True)
    for variant in ("mla", "mla-moe-unshared", "moe", "moe-softmax"):
        bias, qk_norm, sizes, name = VARIANTS[variant]
        source = make_checkpoint(tmp_path / f"{variant}-source", bias, qk_norm, **sizes | tied)
        native = tmp_path / variant
        export(source, native)
        config = json.loads((native / "config.json").read_text())
        weights = load_file(native / "model.safetensors")
        assert ("lm_head.weight" in weights) == (name != "Qwen3MoeForCausalLM")
        assert config.get("num_nextn_predict_layers", 0) == 0 and config.get("n_shared_experts", 1) > 0
        assert not any("gate_up_proj" in weight for weight in weights)  # one tensor per expert, as upstream
        # transformers 4 reads these names; its defaults are other numbers.
        assert config["rope_theta"] == 500000.0 and "rope_scaling" not in config
        assert config.get("partial_rotary_factor") == (1.0 if name == "Glm4MoeForCausalLM" else None)
        assert config.get("num_experts") == (sizes["n_routed_experts"] if name == "Qwen3MoeForCausalLM" else None)
        # vLLM reads DeepSeek's routing here; its default is softmax scores without a selection bias.
        routing = ("sigmoid", "noaux_tc") if name == "DeepseekV3ForCausalLM" else (None, None)
        assert (config.get("scoring_func"), config.get("topk_method")) == routing


def test_a_scaled_rope_and_an_uneven_head_survive(tmp_path, export):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    source = make_checkpoint(
        tmp_path / "source", False, True, rope_parameters=rope, num_attention_heads=6, head_dim=10
    )
    export(source, tmp_path / "native")
    assert torch.equal(logits(source), logits(tmp_path / "native"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())  # as transformers 4 reads it
    assert config["rope_scaling"] | {"rope_theta": config["rope_theta"]} == rope


GENERATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Paris"}], tokenize=False)
    tokens = model.generate(**tokenizer("床前明月 Paris", return_tensors="pt"), do_sample=False)
    print(json.dumps([tokens[0].tolist(), text, model.generation_config.eos_token_id]))
assert "buddygpt" not in sys.modules
"""


@pytest.mark.slow
def test_a_process_without_our_code_generates_the_same_tokens(tmp_path, export):
    models = [(bias, qk_norm, dict(like_qwen=like_qwen)) for bias, qk_norm, like_qwen, _ in TARGETS]
    expected = []
    for number, (bias, qk_norm, sizes) in enumerate([*models, *(variant[:3] for variant in VARIANTS.values())]):
        source = make_checkpoint(tmp_path / f"source{number}", bias, qk_norm, **sizes)
        export(source, tmp_path / f"native{number:02}")
        tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
        tokens = model.generate(**tokenizer("床前明月 Paris", return_tensors="pt"), do_sample=False)
        expected.append([tokens[0].tolist(), "<|im_start|>user\nParis<|im_end|>\n", [2, 0]])
    folders = [str(path) for path in sorted(tmp_path.glob("native*"))]
    command = [sys.executable, "-c", GENERATE, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert [json.loads(line) for line in done.stdout.split("\n") if line.startswith("[[")] == expected
    assert len({str(tokens) for tokens, *_ in expected}) > 10  # they do not all end at once


def test_a_model_that_would_differ_is_refused_and_nothing_is_left(tmp_path, export, monkeypatch):
    source = make_checkpoint(tmp_path / "source", False, True)
    monkeypatch.delitem(BuddyGPTConfig.__annotations__, "rope_parameters")
    with pytest.raises(UserError, match="is not converted: as Qwen3ForCausalLM .* its logits differ by"):
        export(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("bias", "qk_norm", "sizes", "message"),
    [
        (
            False,
            True,
            MOE | dict(n_shared_experts=1),
            "only, which has no shared experts; Qwen2-MoE gates its own",
        ),
        (False, False, MOE, "Qwen3-MoE only, which has normalized queries and keys"),
        (False, True, MOE | dict(n_group=4, topk_group=2), "Qwen3-MoE only, which has no expert groups"),
        (False, True, MOE | dict(routed_scaling_factor=2.0), "Qwen3-MoE only, which has no routed_scaling_factor"),
        (False, False, MLA | MOE, "Qwen3-MoE only, which has no latent attention; DeepSeek-V3 has sigmoid scores"),
        (False, False, dict(n_soft_experts=3, moe_intermediate_size=16), "no architecture .* has a soft mixture"),
    ],
)
def test_a_model_without_equivalent_architecture_is_refused(tmp_path, export, bias, qk_norm, sizes, message):
    source = make_checkpoint(tmp_path / "source", bias, qk_norm, **sizes)
    with pytest.raises(UserError, match=f"cannot be converted: .*{message}"):
        export(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_selection_bias_that_the_stock_model_lacks_is_refused(tmp_path, export):
    source = make_checkpoint(tmp_path / "source", False, True, **MOE)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][3] = 0.5
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="e_score_correction_bias is not zero, and Qwen3MoeForCausalLM has no such"):
        export(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def break_checkpoint(folder: Path, how: str) -> Path:
    """Make a folder that is not a complete BuddyGPT checkpoint and return it."""
    if how == "adapter":
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    elif how == "llama":
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    elif how != "missing":
        make_checkpoint(folder, False, False, **({"num_attention_heads": 10} if how == "heads" else {}))
        for file in {"tokenizer": ["tokenizer.json", "tokenizer_config.json"], "weights": ["model.safetensors"]}.get(
            how, []
        ):
            (folder / file).unlink()
        if how == "truncated":
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        if how == "incomplete":
            weights = load_file(folder / "model.safetensors")
            weights.pop("model.norm.weight")
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such checkpoint folder"),
        ("adapter", "holds a LoRA adapter"),
        ("llama", "is a `llama` model, not a BuddyGPT one"),
        ("heads", "(?s)cannot be converted: .*48.* is not a multiple of the number of attention heads"),
        ("tokenizer", "cannot read a tokenizer"),
        ("weights", "cannot read the weights .*no file named"),
        ("truncated", "cannot read the weights"),
        ("incomplete", "lacks model.norm.weight"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(tmp_path, export, how, message):
    source = break_checkpoint(tmp_path / "source", how)
    with pytest.raises(UserError, match=message):
        export(source, tmp_path / "native")
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_an_existing_folder_is_never_overwritten(tmp_path, export):
    source = make_checkpoint(tmp_path / "source", False, False)
    (tmp_path / "native").mkdir()
    export(source, tmp_path / "native")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        export(source, tmp_path / "native")
