"""Write a checkpoint in another architecture, and leave it only if it is the same model with the same tokenizer."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from buddygpt.cli.errors import UserError
from buddygpt.export.architectures import convert

# Largest difference of logits in float32, as a share of the largest logit. 0.0 is expected: both run the same
# operations; a BLAS library may round the last bit otherwise where memory is aligned otherwise.
TOLERANCE = 1e-5


def convert_checkpoint(checkpoint: str, output: Path, configs: Iterator[PreTrainedConfig]) -> None:
    """Write the checkpoint as the first of `configs` that keeps its tokenizer, and print what was compared.

    Raises:
        UserError: The output exists; the checkpoint is not whole or has no twin; or what was written differs from it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: give another --output, or delete it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_and_compare(checkpoint, partial, configs)
        os.replace(partial, output)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint} cannot be converted: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {output}")


def _write_and_compare(checkpoint: str, output: Path, configs: Iterator[PreTrainedConfig]) -> None:
    configs = itertools.chain([next(configs)], configs)  # what has no twin is refused before the weights are read
    model, tokenizer = read_checkpoint(checkpoint)
    for config in configs:
        convert(model, config).save_pretrained(output)
        tokenizer.save_pretrained(output)
        twin, twin_tokenizer = read_checkpoint(output)
        name = f"{type(twin).__name__} in {twin.dtype}"
        if reads_alike(tokenizer, twin_tokenizer):
            break
        print(f"not {name}: transformers would read the tokenizer in another way")
    else:
        raise UserError(f"{checkpoint} is not converted: no architecture leaves its tokenizer as it is")
    added = {name.split(".", 3)[-1] for name in twin.state_dict().keys() - model.state_dict().keys()}
    if added:
        print(f"zeros, which change nothing, where only {name} has weights: {', '.join(sorted(added))}")
    difference = logit_difference(model, twin)
    if not difference <= TOLERANCE:
        limits = f"{difference:.1e} of the largest, above {TOLERANCE:.0e}"
        raise UserError(f"{checkpoint} is not converted: as {name} its logits differ by {limits}")
    print(f"{name}: the logits differ by {difference} of the largest (in float32)")


def read_checkpoint(checkpoint: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a whole model in the dtype it was saved in, and its tokenizer.

    Raises:
        UserError: Weights are missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
    if loaded["missing_keys"]:
        raise UserError(f"{checkpoint} lacks weights: {', '.join(sorted(loaded['missing_keys']))}")
    return model, tokenizer


def reads_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers are the same from normaliser to decoder, vocabulary included."""
    first, second = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other))
    return first == second


@torch.no_grad()
def logit_difference(model: PreTrainedModel, twin: PreTrainedModel) -> float:
    """Largest difference of the logits over two random sequences, as a share of the largest logit. Both models are
    left in float32."""
    length = min(256, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected, actual = (each.float().eval()(tokens, use_cache=False).logits for each in (model, twin))
    return ((expected - actual).abs().max() / expected.abs().max()).item()
