"""Write a dense model as one GGUF file, for llama.cpp, Ollama, LM Studio and the like.

    python tools/to_gguf.py --checkpoint outputs/native --output outputs/gguf
    python tools/to_gguf.py --checkpoint outputs/native --output outputs/gguf --file_type q8_0

makes `model-f16.gguf` (or `model-q8_0.gguf`), with the tokenizer inside, and a `Modelfile` for Ollama that names the
file written last: `ollama create NAME -f outputs/gguf/Modelfile`. The file is read back by transformers and its logits
are compared with the checkpoint's; unless they agree, nothing is left behind.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf_tokenizer import add_tokenizer
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.export.architectures import buddygpt_config, convert, native_configs
from buddygpt.export.conversion import logit_difference, read_checkpoint
from buddygpt.model import BuddyGPTConfig

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
# Type of the matrices, llama.cpp's number for such a file, and the largest difference of logits in float32 as a share
# of the largest logit. A wrong tensor gives 0.5 and more.
FILE_TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType, float]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 1e-5),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 1e-2),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 5e-2),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 1e-1),
}
# What a GGUF file can say of a scaled rotary embedding: nothing beyond these keys of `rope_parameters`.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
CONVERTER = "use llama.cpp's own converter: python convert_hf_to_gguf.py NATIVE_EXPORT"
# Ollama's template language is Go's. `.Messages` holds the system message too. Tool calls are left to llama.cpp's
# server, which reads the template inside the file.
OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
CHAT = [{"role": role, "content": f"Some {role} text."} for role in ("system", "user", "assistant", "user")]


@dataclass
class GGUFArguments:
    checkpoint: str = field(
        metadata={"help": "A dense BuddyGPT model, its native export, or any Qwen2, Qwen3, Llama."}
    )
    output: str = field(metadata={"help": "Folder to write to; may hold GGUF files of other types."})
    file_type: Literal["f32", "f16", "bf16", "q8_0"] = field(
        default="f16", metadata={"help": "Type of the matrices; norms and biases are always float32."}
    )


def gguf_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the first architecture that equals a model and that a GGUF file of it can express.

    Raises:
        ValueError: There is none; the message says why.
    """
    if config.model_type in ARCHITECTURES:
        if not what_is_missing(config):
            return config
        config = buddygpt_config(config)  # an equal architecture may do: Llama, for a Qwen2 with wide heads
    if not isinstance(config, BuddyGPTConfig):
        raise ValueError(f"it is `{config.model_type}`, none of {', '.join(ARCHITECTURES)}; {CONVERTER}")
    for twin in native_configs(config):
        if not (obstacle := what_is_missing(twin)):
            return twin
    raise ValueError(f"{obstacle}; {CONVERTER}")


def what_is_missing(config: PreTrainedConfig) -> str | None:
    """Say what of a stock model has no place in a GGUF file, or in llama.cpp's graph of it; None if all has."""
    if config.model_type not in ARCHITECTURES:
        return f"it is `{config.model_type}`, and GGUF is written for dense models only"
    rope = config.rope_parameters
    extra = rope.keys() - {"rope_type", "rope_theta"} - ROPE_KEYS.get(rope["rope_type"], set())
    if rope["rope_type"] not in ROPE_KEYS or extra:
        return f"its `rope_parameters` {rope} are not written here"
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        return "it has another activation than silu, or a sliding window"
    heads = config.num_attention_heads * head_dim(config)
    if config.model_type == "qwen2" and heads != config.hidden_size:
        return f"llama.cpp's qwen2 has heads of `hidden_size` {config.hidden_size} in all, not of {heads}"
    return None


def head_dim(config: PreTrainedConfig) -> int:
    """Channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q_proj or k_proj, (heads * head_dim, ...), from rotated halves to llama.cpp's pairs.

    Only its `llama` architecture rotates neighbouring channels; Qwen's rotates halves, as transformers does.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def add_model(writer: GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    """Put the sizes of the model into the file's metadata."""
    rope = config.rope_parameters
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's name and the float32 values of every weight; UserError at one it has no place for."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output.weight
        module = name.split(".")[-2]
        if config.model_type == "qwen3" and module == "o_proj" and name.endswith("bias"):
            if weight.any():
                raise UserError(f"`{name}` is not zero, and llama.cpp's qwen3 has no such bias")
            continue
        if config.model_type == "llama" and module in heads:
            weight = permute(weight, heads[module])
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if ours is None:
            raise UserError(f"`{name}` has no place in llama.cpp's {config.model_type}")
        yield ours, weight.float()


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, file_type: str, name: str) -> None:
    """Write model and tokenizer into the GGUF file `path`; UserError where either does not fit."""
    matrix_type, file_number, _ = FILE_TYPES[file_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    add_model(writer, model.config, name)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    writer.add_file_type(file_number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    block, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    uneven = 0
    for key, weight in tensors(model):
        kind = matrix_type if weight.dim() > 1 else GGMLQuantizationType.F32
        if kind == matrix_type and weight.shape[-1] % block:
            kind, uneven = GGMLQuantizationType.F16, uneven + 1
        writer.add_tensor(key, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    if uneven:
        print(f"{uneven} matrices stay in f16: their rows do not divide into {file_type}'s blocks of {block}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def read_back(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that transformers reads from a GGUF file, in float32."""
    read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    # In the file, but the reader takes `head_dim` from Llama's only and never looks for biases or a scaled rope.
    scaled = config.rope_parameters["rope_type"] != "default"
    for name in ("head_dim", "attention_bias", *(["rope_parameters"] if scaled else [])):
        if hasattr(config, name):
            setattr(read, name, getattr(config, name))
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=read, dtype=torch.float32)
    return convert(model, read)  # a plain model: the reader's calls itself quantised, which cannot be cast


def is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes a conversation without tools as plain ChatML."""
    chatml = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in CHAT)
    try:
        prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):  # it refuses a system message; there is no template
        return False
    return prompt == f"{chatml}<|im_start|>assistant\n"


def modelfile(file: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a Modelfile as Ollama documents it; without a TEMPLATE where the model's is not ChatML."""
    lines = [f"FROM ./{file}"]
    if is_chatml(tokenizer):
        lines.append(f'TEMPLATE """{OLLAMA_CHATML}"""')
    else:
        print("warning: the chat template is not plain ChatML: write the TEMPLATE of the Modelfile yourself")
    ends = model.generation_config.eos_token_id
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [] if ends is None else [ends])
    stops += [tokenizer.eos_token, getattr(tokenizer, "document_separator_token", None)]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop]
    lines.append(f"PARAMETER num_ctx {model.config.max_position_embeddings}")
    return "\n".join(lines) + "\n"


def export(checkpoint: str, folder: Path, file_type: str) -> None:
    """Write the GGUF file and the Modelfile into `folder` and print what was compared.

    Raises:
        UserError: The model or its tokenizer does not fit, or the file written differs from the checkpoint.
    """
    file, limit = f"model-{file_type}.gguf", FILE_TYPES[file_type][2]
    try:
        config = gguf_config(require_causal_lm(checkpoint))
        model, tokenizer = read_checkpoint(checkpoint)
        model = convert(model, config)
        write(model, tokenizer, folder / file, file_type, Path(checkpoint).resolve().name)
        read = read_back(folder / file, config)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint} cannot be written as GGUF: {error}") from error
    difference = logit_difference(model, read)
    if not difference <= limit:
        raise UserError(
            f"{checkpoint} is not written: as {file_type} its logits differ by {difference:.1e} of the largest, "
            f"above {limit:.0e}"
        )
    print(f"{config.model_type} in {file_type}: the logits differ by {difference:.1e} of the largest (in float32)")
    (folder / "Modelfile").write_text(modelfile(file, model, tokenizer), encoding="utf-8")


def main() -> None:
    (args,) = parse_arguments(GGUFArguments, description=__doc__)
    output, file = Path(args.output), f"model-{args.file_type}.gguf"
    present = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if file in present or output.is_file():
        raise UserError(f"{output / file if present else output} exists: delete it, or give another --output")
    if foreign := {name for name in present if not name.endswith(".gguf")} - {"Modelfile"}:
        raise UserError(f"{output} holds more than GGUF files ({min(foreign)}): give another --output")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        export(args.checkpoint, partial, args.file_type)
        output.mkdir(exist_ok=True)
        for name in (file, "Modelfile"):
            os.replace(partial / name, output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {output / file} and {output / 'Modelfile'}")


if __name__ == "__main__":
    run_script(main)
