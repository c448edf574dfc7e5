"""Write a checkpoint in another architecture, only if logits and tokenizer stay the same."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from buddygpt.cli.checkpoints import finish_checkpoint, load_tokenizer, save_tokenizer
from buddygpt.cli.errors import UserError
from buddygpt.cli.files import write_atomically
from buddygpt.cli.weights import require_all_weights, require_finite_weights
from buddygpt.export.architectures import convert
from buddygpt.export.generation_marks import hide_generation_marks, restore_generation_marks
from buddygpt.model import BuddyGPTConfig
from buddygpt.training.model_card import write_model_card

# Largest allowed difference of logits in float32, relative to the largest logit. 0.0 is expected, because both models
# run the same operations; with other memory alignment a BLAS library may round the last bit differently.
TOLERANCE = 1e-5


def convert_checkpoint(checkpoint: str, output: Path, configs: Iterator[PreTrainedConfig]) -> None:
    """Write the checkpoint as the first of `configs` that keeps its tokenizer, and print the comparison.

    Args:
        checkpoint: Folder or Hub name of the model to convert.
        output: Folder to make.
        configs: Configs of equivalent models, the preferred one first. If there is none, the first `next` raises
            ValueError with the reason.

    Raises:
        UserError: The output exists; the checkpoint is incomplete or has no equivalent architecture; or the converted
            model differs from it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: choose another output, or delete it")
    try:
        with write_atomically(output) as folder:
            _write_and_compare(checkpoint, folder, configs)
        _write_cards(Path(checkpoint), output)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint} cannot be converted: {error}") from error
    print(f"wrote {output}")


def _write_and_compare(checkpoint: str, output: Path, configs: Iterator[PreTrainedConfig]) -> None:
    config = next(configs)  # fails before the weights are read if there is no equivalent architecture
    model, tokenizer = read_checkpoint(checkpoint)
    if isinstance(tokenizer.chat_template, str):
        change = restore_generation_marks if isinstance(config, BuddyGPTConfig) else hide_generation_marks
        tokenizer.chat_template = change(tokenizer.chat_template)

    # Write one architecture after another until one of them keeps the tokenizer.
    while True:
        convert(model, config).save_pretrained(output)
        if not isinstance(config, BuddyGPTConfig):
            add_fields_of_other_readers(output / "config.json")
        save_tokenizer(tokenizer, output)
        finish_checkpoint(output)
        converted, converted_tokenizer = read_checkpoint(output)
        name = f"{type(converted).__name__} in {converted.dtype}"
        if is_same_tokenizer(tokenizer, converted_tokenizer):
            break
        print(f"not {name}: transformers would read the tokenizer differently")
        config = next(configs, None)
        if config is None:
            raise UserError(f"{checkpoint} is not converted: no equivalent architecture keeps its tokenizer")

    # model.layers.0.self_attn.q_proj.bias -> self_attn.q_proj.bias
    added = {parameter.split(".", 3)[-1] for parameter in converted.state_dict().keys() - model.state_dict().keys()}
    if added:
        print(f"added weights that only {name} has, as zeros, which change nothing: {', '.join(sorted(added))}")
    difference = logit_difference(model, converted)
    if not difference <= TOLERANCE:  # also refuses NaN
        raise UserError(
            f"{checkpoint} is not converted: as {name} its logits differ by {difference:.1e} of the largest, "
            f"above {TOLERANCE:.0e}"
        )
    print(f"{name}: the logits differ by {difference} of the largest (in float32)")


def _write_cards(checkpoint: Path, output: Path) -> None:
    """Copy the run card, and write a model card from it that tells how to load the result."""
    if (checkpoint / "run.json").is_file():
        shutil.copyfile(checkpoint / "run.json", output / "run.json")
        write_model_card(output, json.loads((output / "run.json").read_text(encoding="utf-8")))


def read_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model, in the dtype it was saved in, and its tokenizer.

    Raises:
        UserError: A file is damaged, or a weight is missing, has another shape or is no number.
    """
    tokenizer = load_tokenizer(str(checkpoint))
    require_all_weights(str(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    require_finite_weights(model, checkpoint)
    return model, tokenizer


def add_fields_of_other_readers(file: Path) -> None:
    """Add to config.json what others read there, and would replace by defaults of their own.

    transformers 4 has other names than version 5; vLLM and SGLang need those of DeepSeek's own file for its routing.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    scaling = dict(config["rope_parameters"])
    config["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if scaling["rope_type"] != "default":
        config["rope_scaling"] = scaling
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    if config["model_type"] == "deepseek_v3":
        config["scoring_func"], config["topk_method"] = "sigmoid", "noaux_tc"
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_same_tokenizer(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return True if two tokenizers have the same normalizer, pre-tokenizer, vocabulary, merges and decoder."""
    return json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(other.backend_tokenizer.to_str())


def logit_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Return the largest of [`logit_differences`]."""
    return logit_differences(model, other).max().item()


@torch.no_grad()
def logit_differences(model: PreTrainedModel, other: PreTrainedModel) -> torch.Tensor:
    """Return each token's largest difference of the logits, for two random sequences, relative to the largest logit.

    Both models are converted to float32 in place.
    """
    length = min(256, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected = model.float().eval()(tokens, use_cache=False).logits
    found = other.float().eval()(tokens, use_cache=False).logits
    return (expected - found).abs().amax(dim=-1) / expected.abs().max()
