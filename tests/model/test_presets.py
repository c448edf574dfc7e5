"""Presets have the published sizes, the table is correct, and the vocabulary size can be chosen."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, TrainingArguments

from buddygpt.cli.errors import UserError
from buddygpt.model import parameters
from buddygpt.model.presets import PRESETS, load_config

# Millions of parameters, to the digits they were published or recounted with: total, non-embedding, active.
PUBLISHED = {
    "buddygpt-0.1b": (158.97, 42.5, 158.97),
    "buddygpt-0.3b": (381.90, 226.6, 381.90),
    "buddygpt-0.3b-mla": (433.03, 200.1, 433.03),
    "buddygpt-0.7b-mla-moe": (803.55, 570.6, 407.2),
    "minimind-26m": (26.88, 23.6, 26.88),
    "minimind-moe": (96.10, 92.8, 61.5),
    "minimind-108m": (108.75, 103.8, 108.75),
    "minimind-3-64m": (63.91, 59.0, 63.91),
    "minimind-3-moe-198m": (198.42, 193.5, 63.9),
    "bitbrain-0.6b": (596.05, 440.5, 596.05),
    "steel-1.1b": (1122.92, 578.4, 1122.92),
    "mini-qwen-1b": (998.81, 843.2, 998.81),
}
VARIANTS = {  # the other side of a contradiction between a published table and its code
    "buddygpt-0.7b-mla-moe": ({"n_routed_experts": 12}, (690.15, None, None)),
    "minimind-moe": ({"n_shared_experts": 2}, (113.40, None, None)),
}
CASES = [(name, {}, counts) for name, counts in PUBLISHED.items()] + [(k, *v) for k, v in VARIANTS.items()]


def run_parameters(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["parameters", *arguments])
    parameters.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "overrides", "published"), CASES)
def test_preset_has_the_published_size(name, overrides, published):
    count = parameters.count_parameters(load_config(name, **overrides))
    for ours, theirs, digits in zip(
        (count.total, count.non_embedding, count.active), published, (0.005, 0.05, 0.05), strict=True
    ):
        assert theirs is None or ours / 1e6 == pytest.approx(theirs, abs=digits + 1e-9)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_unused_fields(name):
    fields = json.loads(PRESETS[name].read_text())
    config = load_config(name)
    config.validate()
    assert {field: getattr(config, field) for field in fields} == fields
    assert set(fields) <= set(type(config).__annotations__) | {"model_type"}
    assert parameters.count_parameters(config).total > 0


def test_quickstart_shadow_works_as_much_per_token_as_the_dense_one():
    dense, sparse = (parameters.count_parameters(load_config(f"quickstart{end}")) for end in ("", "-mla-moe"))
    assert sparse.active == pytest.approx(dense.total, rel=0.02)


def test_counts_agree_with_real_weights():
    """Untied head, shared, routed and dense layers: nothing is counted twice, and idle experts are not used."""
    config = load_config("debug-mla-moe", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    count = parameters.count_parameters(config)
    assert count.total == sum(weight.numel() for weight in model.parameters())
    assert count.non_embedding == count.total - 2 * config.vocab_size * config.hidden_size

    model.set_experts_implementation("eager")
    model(torch.tensor([[7]])).logits.sum().backward()  # one token, so that idle experts get no gradient
    experts = model.model.layers[1].mlp.experts
    touched = [weight.grad.flatten(1).any(1).sum() for weight in experts.parameters()]
    assert touched == [2, 2]
    idle = 6 * sum(weight[0].numel() for weight in experts.parameters())
    assert count.active == count.total - idle


def test_stock_architectures_are_counted_too():
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8)
    count = parameters.count_parameters(Qwen3MoeConfig(**sizes, **experts))
    assert count.total - count.active == 2 * 6 * 3 * 16 * 8


@pytest.mark.parametrize("name", ["debug", "debug-mla-moe", "quickstart-mla-moe"])
def test_cache_grows_as_the_table_says(name):
    config = load_config(name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert cache_size(model, tokens=9, device="cpu") == 9 * parameters.cache_bytes_per_token(config)


def test_latent_cache_against_grouped_query_attention_of_the_same_heads_and_width():
    latent = load_config("buddygpt-0.3b-mla")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    grouped = load_config("buddygpt-0.3b", **{size: getattr(latent, size) for size in sizes}, head_dim=96)
    with torch.device("meta"):
        pair = [AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16) for config in (latent, grouped)]
    measured = [cache_size(model, tokens=1, device="meta") for model in pair]
    assert measured == [960, 36864]
    text = (ROOT / "model" / "README.md").read_text()
    assert "960 bytes per token" in text and "36,864" in text


def cache_size(model, tokens: int, device: str) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@pytest.mark.slow
def test_table_in_the_readme_is_what_the_command_prints(monkeypatch, capsys):
    table = run_parameters(monkeypatch, capsys)
    assert table.count("\n") == len(PRESETS) + 2
    assert table in (ROOT / "model" / "README.md").read_text(), "run `python -m buddygpt.model.parameters` and paste"


def test_same_body_with_a_small_vocabulary(monkeypatch, capsys):
    table = run_parameters(monkeypatch, capsys, "buddygpt-0.1b", "--vocab_size", "16384")
    row = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert row[5:10] == ["16,384", "55.08M", "42.49M", "55.08M", "22.8%"]


def test_config_files_and_checkpoint_folders_are_read(monkeypatch, capsys, tmp_path):
    load_config("debug").save_pretrained(tmp_path)
    table = run_parameters(monkeypatch, capsys, str(tmp_path), "model/configs/debug.json", "debug")
    rows = [row.split("|")[2:] for row in table.splitlines()[2:]]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (None, ["buddygpt-1b"], "no preset or file buddygpt-1b; the presets are bitbrain-0.6b, buddygpt-0.1b"),
        (None, ["debug", "--vocab_size", "0"], r"vocab_size \(0\) must be at least 1"),
        ({"model_type": "qwen3"}, [], "is a qwen3 model"),
        ({"hidden_size": 8}, [], "model_type"),
        ({"model_type": "buddygpt", "num_attention_heads": 3, "num_key_value_heads": 2}, [], r"\(3\).*\(2\)"),
        ({"model_type": "buddygpt", "hidden_size": "wide"}, [], "hidden_size"),
    ],
)
def test_refusals_are_one_line_and_status_two(config, arguments, message, monkeypatch, capsys, tmp_path):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        arguments = [str(tmp_path)]
    with pytest.raises(SystemExit) as exit_status:
        run_parameters(monkeypatch, capsys, *arguments)
    output = capsys.readouterr()
    assert exit_status.value.code == 2 and not output.out
    assert output.err.count("\n") == 1
    assert re.search(message, output.err)


@pytest.fixture(scope="module")
def pretrain():
    from buddygpt.pretrain import pretrain

    return pretrain


@pytest.fixture
def load_model(pretrain):
    words = {word: number for number, word in enumerate(["<unk>", "<eos>", "<pad>", *"abcdefg"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), eos_token="<eos>", pad_token="<pad>"
    )
    training_args = TrainingArguments(output_dir="unused", use_cpu=True)
    return lambda **arguments: pretrain.load_model(
        pretrain.PretrainArguments(train_data="unused", tokenizer="letters", block_size=64, **arguments),
        training_args,
        tokenizer,
    )


@pytest.mark.parametrize(("vocab_size", "rows"), [(None, 10), (10, 10), (64, 64)])
def test_pretraining_takes_a_preset_and_its_vocabulary_from_the_tokenizer(load_model, vocab_size, rows):
    model = load_model(model_config="debug-mla-moe", vocab_size=vocab_size)
    assert model.get_input_embeddings().weight.shape == model.lm_head.weight.shape == (rows, 64)
    assert model.config.vocab_size == rows and model.config.eos_token_id == 1 and model.config.pad_token_id == 2
    assert model.config.kv_lora_rank == 16


def test_pretraining_still_takes_a_path(load_model, tmp_path):
    (tmp_path / "mine.json").write_text(PRESETS["debug"].read_text())
    assert load_model(model_config=str(tmp_path / "mine.json")).config.vocab_size == 10


def test_pretraining_refuses_a_vocabulary_that_does_not_fit(load_model, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size \(9\) is less than the 10 entries of letters"):
        load_model(model_config="debug", vocab_size=9)
    with pytest.raises(UserError, match="vocab_size belongs to a new model"):
        load_model(model_name_or_path=str(tmp_path), vocab_size=64)
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"model_type": "buddygpt", "num_attention_heads": 3, "num_key_value_heads": 2}))
    with pytest.raises(UserError, match=r"cannot read the model config(.|\n)*\(3\)(.|\n)*\(2\)"):
        load_model(model_config=str(bad))
