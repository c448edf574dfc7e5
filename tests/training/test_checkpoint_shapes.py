"""A run resumes only from checkpoints whose tensors are those of its model, however they were saved."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import VARIANTS, make_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from buddygpt.cli.errors import UserError
from buddygpt.training.resume import last_checkpoint
from buddygpt.training.saving import write_checksums

MIXTURE = Qwen3MoeConfig(
    vocab_size=97,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
)


def save_checkpoint(model, output_dir: Path, **options) -> Path:
    folder = output_dir / "checkpoint-1"
    model.save_pretrained(folder, **options)
    write_checksums(folder)
    return folder


def lora(rank: int):
    return get_peft_model(make_model(), LoraConfig(r=rank, target_modules="all-linear"))


@pytest.mark.parametrize("variant", ["gqa", "mla-moe", "soft-moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_model_is_accepted_also_in_several_files(tmp_path, variant, tied):
    fields = VARIANTS[variant] | dict(tie_word_embeddings=tied)
    folder = save_checkpoint(make_model(**fields), tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert last_checkpoint(tmp_path, make_model(**fields)) == str(folder)


def test_a_stock_mixture_is_accepted_although_its_experts_are_saved_one_by_one(tmp_path):
    folder = save_checkpoint(AutoModelForCausalLM.from_config(MIXTURE), tmp_path)
    assert last_checkpoint(tmp_path, AutoModelForCausalLM.from_config(MIXTURE)) == str(folder)


def test_a_tied_head_may_be_saved_twice(tmp_path):
    """As DeepSpeed does."""
    model = make_model(tie_word_embeddings=True)
    folder = save_checkpoint(model, tmp_path)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    write_checksums(folder)
    assert last_checkpoint(tmp_path, model) == str(folder)


def test_the_full_shapes_of_weights_sharded_by_zero3_are_compared(tmp_path):
    """DeepSpeed leaves an empty tensor in each parameter and its full shape in `ds_shape`."""
    folder = save_checkpoint(make_model(), tmp_path)
    model = make_model()
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    assert last_checkpoint(tmp_path, model) == str(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab_size=100), r"embed_tokens.weight is \[97, \d+\] there, \[100, \d+\] in this run's"),
        (dict(num_hidden_layers=4), r"tensor model.layers.3.\S+ is missing there, \[\d+"),
        (dict(num_hidden_layers=2), r"tensor model.layers.2.\S+ is \[.*\] there, missing in this run's model"),
        (
            dict(tie_word_embeddings=False),
            "tensor lm_head.weight is missing there",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, fields, message):
    save_checkpoint(make_model(tie_word_embeddings=True), tmp_path)
    with pytest.raises(UserError, match=message + ".*Set another output_dir"):
        last_checkpoint(tmp_path, make_model(**dict(tie_word_embeddings=True) | fields))


def test_a_tied_model_does_not_resume_from_an_untied_one(tmp_path):
    save_checkpoint(make_model(tie_word_embeddings=False), tmp_path)
    with pytest.raises(UserError, match="tie_word_embeddings is False, this run's is True"):
        last_checkpoint(tmp_path, make_model(tie_word_embeddings=True))


def test_other_heads_in_matrices_of_the_same_shape_are_refused(tmp_path):
    config = make_model().config
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    save_checkpoint(make_model(), tmp_path)
    fewer = make_model(num_attention_heads=heads // 2, num_key_value_heads=kv_heads // 2, head_dim=size * 2)
    with pytest.raises(UserError, match=f"num_attention_heads is {heads}, this run's is {heads // 2}"):
        last_checkpoint(tmp_path, fewer)


def test_an_adapter_is_accepted_with_its_own_rank_only(tmp_path):
    folder = save_checkpoint(lora(4), tmp_path)
    assert last_checkpoint(tmp_path, lora(4)) == str(folder)
    with pytest.raises(UserError, match=r"lora_A.weight is \[4, \d+\] there, \[8, \d+\] in this run's"):
        last_checkpoint(tmp_path, lora(8))
