"""Is the exported stock model the same model, does it need none of our code, and is everything else refused?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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

from buddygpt import BuddyGPTConfig, BuddyGPTForCausalLM
from buddygpt.launch import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "export"))
import to_native  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
TEXT = "The capital of France is Paris.\n床前明月光，疑是地上霜。 12345"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# attention_bias, use_qk_norm, tokenizer of Qwen's kind, the class expected
TARGETS = [
    (True, False, True, "Qwen2ForCausalLM"),
    (True, False, False, "LlamaForCausalLM"),
    (False, True, False, "Qwen3ForCausalLM"),
    (True, True, True, "Qwen3ForCausalLM"),
    (False, False, False, "LlamaForCausalLM"),
]


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
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, 0], pad_token_id=tokenizer.pad_token_id, max_new_tokens=24
    )
    model.to(dtype).save_pretrained(folder)
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
    assert not any(file.endswith(".py") for file in files)
    assert "auto_map" not in (tmp_path / "native" / "config.json").read_text()
    assert native.generation_config.eos_token_id == [2, 0] and native.generation_config.max_new_tokens == 24
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "native"), AutoTokenizer.from_pretrained(source)
    assert theirs(TEXT).input_ids == ours(TEXT).input_ids
    assert theirs.chat_template == TEMPLATE and (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|pad|>")


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


GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("床前明月 Paris", return_tensors="pt")
    print(AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, do_sample=False)[0].tolist())
assert "buddygpt" not in sys.modules
"""


def test_a_process_without_our_code_generates_the_same_tokens(tmp_path, export):
    expected = []
    for number, (bias, qk_norm, like_qwen, _) in enumerate(TARGETS):
        source = make_checkpoint(tmp_path / f"source{number}", bias, qk_norm, like_qwen)
        export(source, tmp_path / f"native{number}")
        tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
        tokens = model.generate(**tokenizer("床前明月 Paris", return_tensors="pt"), do_sample=False)
        expected.append(tokens[0].tolist())
    folders = [str(path) for path in sorted(tmp_path.glob("native*"))]
    command = [sys.executable, "-c", GENERATE, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    assert [json.loads(line) for line in done.stdout.split("\n") if line.startswith("[")] == expected


def test_a_model_that_would_differ_is_refused_and_nothing_is_left(tmp_path, export, monkeypatch):
    source = make_checkpoint(tmp_path / "source", False, True)
    monkeypatch.delitem(BuddyGPTConfig.__annotations__, "rope_parameters")
    with pytest.raises(UserError, match="is not converted: as Qwen3ForCausalLM .* its logits differ by"):
        export(source, tmp_path / "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def break_checkpoint(folder: Path, how: str) -> Path:
    """Make what is not a whole BuddyGPT checkpoint and return its place."""
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
        ("tokenizer", "cannot be converted"),
        ("weights", "cannot be converted: .*no file named"),
        ("truncated", "cannot be converted"),
        ("incomplete", "lacks weights: model.norm.weight"),
    ],
)
def test_what_is_not_a_whole_checkpoint_is_refused(tmp_path, export, how, message):
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
