"""Export a BuddyGPT checkpoint, without loss, to the stock transformers architecture that it equals.

    python export/to_native.py --checkpoint outputs/sft --output outputs/native

The result loads with no remote code (`transformers serve`, vLLM, llama.cpp, ...). What was written is read back and
compared with the checkpoint; unless logits and tokens agree, nothing is left behind.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
)

from buddygpt import BuddyGPTConfig
from buddygpt.launch import UserError, parse_arguments, require_causal_lm, run_script

# (attention_bias, use_qk_norm) -> architectures that have them, the usual one first. The `attention_bias` of Qwen3 and
# Llama gives o_proj a bias too: it is exported as zeros. Llama stands in for Qwen2 because transformers always reads a
# tokenizer beside a Qwen2 model with Qwen's own normaliser and pre-tokenizer, whatever tokenizer.json says.
TARGETS: dict[tuple[bool, bool], tuple[type[PreTrainedConfig], ...]] = {
    (True, False): (Qwen2Config, LlamaConfig),
    (False, True): (Qwen3Config,),
    (True, True): (Qwen3Config,),
    (False, False): (LlamaConfig,),
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# Largest difference of logits in float32, as a share of the largest logit. 0.0 is expected: both run the same
# operations; a BLAS library may round the last bit otherwise where memory is aligned otherwise.
TOLERANCE = 1e-5


@dataclass
class ExportArguments:
    checkpoint: str = field(metadata={"help": "Folder of a whole BuddyGPT model (no LoRA adapter)."})
    output: str = field(metadata={"help": "Folder to make; must be empty or not exist."})


def to_native(model: PreTrainedModel, target: type[PreTrainedConfig]) -> PreTrainedModel:
    """Return a stock model of `target` with the weights, dtype and generation config of a BuddyGPT model.

    Raises:
        StrictDataclassError: The stock config refuses the sizes.
        RuntimeError: The weights do not fit.
    """
    fields = [*SHARED_FIELDS, "attention_bias"] if hasattr(target, "attention_bias") else SHARED_FIELDS
    config = target(**{name: getattr(model.config, name) for name in fields})
    native = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    state = model.state_dict()
    for name, weight in native.state_dict().items():
        if name.endswith("o_proj.bias"):
            state[name] = torch.zeros_like(weight)
    native.load_state_dict(state, strict=True)
    native.generation_config = model.generation_config
    return native


@torch.no_grad()
def logit_difference(model: PreTrainedModel, native: PreTrainedModel) -> float:
    """Largest difference of the logits over two random sequences in float32, as a share of the largest logit."""
    length = min(256, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    expected, actual = (each.float().eval()(tokens, use_cache=False).logits for each in (model, native))
    return ((expected - actual).abs().max() / expected.abs().max()).item()


def reads_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers are the same from normaliser to decoder, vocabulary included."""
    first, second = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other))
    return first == second


def export(checkpoint: str, output: Path) -> None:
    """Write the stock model into the folder `output` and print what was compared.

    Raises:
        UserError: Not a BuddyGPT checkpoint, no stock architecture fits it, or the written model differs from it.
    """
    config = require_causal_lm(checkpoint)
    if not isinstance(config, BuddyGPTConfig):
        raise UserError(f"{checkpoint} is a `{config.model_type}` model, not a BuddyGPT one: nothing to export")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        model, loaded = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", output_loading_info=True)
        if loaded["missing_keys"]:
            raise UserError(f"{checkpoint} lacks weights: {', '.join(sorted(loaded['missing_keys']))}")
        for target in TARGETS[config.attention_bias, config.use_qk_norm]:
            to_native(model, target).save_pretrained(output)
            tokenizer.save_pretrained(output)
            native = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
            name = f"{type(native).__name__} in {native.dtype}"
            if reads_alike(tokenizer, AutoTokenizer.from_pretrained(output)):
                break
            print(f"not {name}: transformers would read the tokenizer in another way")
        else:
            raise UserError(f"{checkpoint} cannot be exported: no architecture leaves its tokenizer as it is")
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint} cannot be exported: {error}") from error
    difference = logit_difference(model, native)
    if not difference <= TOLERANCE:
        limits = f"{difference:.1e} of the largest, above {TOLERANCE:.0e}"
        raise UserError(f"{checkpoint} is not exported: as {name} its logits differ by {limits}")
    print(f"{name}: the logits differ by {difference} of the largest (in float32)")


def main() -> None:
    (args,) = parse_arguments(ExportArguments, description=__doc__)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: give another --output, or delete it")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        export(args.checkpoint, partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
