"""Write a model as one GGUF file for llama.cpp, Ollama, LM Studio and others.

    python tools/to_gguf.py --checkpoint outputs/native --output outputs/gguf
    python tools/to_gguf.py --checkpoint outputs/native --output outputs/gguf --file_type q8_0

This writes `model-f16.gguf` (or `model-q8_0.gguf`), which includes the tokenizer, and a `Modelfile` for Ollama that
names the last file written: `ollama create NAME -f outputs/gguf/Modelfile`. The file is read back, and its logits are
compared with the checkpoint's; if they differ, the script stops with an error and writes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf_tensors import ARCHITECTURES, tensors, weights
from gguf_tokenizer import add_tokenizer
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.export.architectures import buddygpt_config, convert, native_configs
from buddygpt.export.conversion import logit_differences, read_checkpoint
from buddygpt.model import BuddyGPTConfig

READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3")


class FileType(NamedTuple):
    """How matrices are stored.

    Attributes:
        matrix_type: Number format of the matrices.
        number: llama.cpp's number for such a file.
        tolerance: Largest allowed difference of logits in float32, relative to the largest logit. One wrong tensor
            gives 0.5 and more.
    """

    matrix_type: GGMLQuantizationType
    number: LlamaFileType
    tolerance: float


FILE_TYPES = {
    "f32": FileType(GGMLQuantizationType.F32, LlamaFileType.ALL_F32, 1e-5),
    "f16": FileType(GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 1e-2),
    "bf16": FileType(GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 5e-2),
    "q8_0": FileType(GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 1e-1),
}
# `rope_type` -> the keys of `rope_parameters` that a GGUF file can express.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
USE_LLAMA_CPP_CONVERTER = "use llama.cpp's own converter: python convert_hf_to_gguf.py NATIVE_EXPORT"
# Ollama's template language is Go's. `.Messages` includes the system message.
OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
OLLAMA_TOOLS = Path(__file__).with_name("ollama_chatml.gotmpl")  # the same with tools and thoughts
CHAT = [{"role": role, "content": f"Some {role} text."} for role in ("system", "user", "assistant", "user")]
TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL_CHAT = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [TOOL_CALL]},
    {"role": "tool", "content": "r"},
]
TOOL_PROMPT = """<|im_start|>user
q<|im_end|>
<|im_start|>assistant
<think>
t
</think>

<tool_call>
{"name": "f", "arguments": {"a": 1}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
r
</tool_response><|im_end|>
<|im_start|>assistant
"""


@dataclass
class GGUFArguments:
    checkpoint: str = field(
        metadata={
            "help": "A BuddyGPT model, its native export, or any Qwen2, Qwen3, Llama, Qwen3-MoE, GLM-4-MoE or "
            "DeepSeek-V3 model."
        }
    )
    output: str = field(metadata={"help": "Folder to write to; may contain GGUF files of other types."})
    file_type: Literal["f32", "f16", "bf16", "q8_0"] = field(
        default="f16", metadata={"help": "Type of the matrices; norms, biases and routers are always float32."}
    )


def main() -> None:
    (args,) = parse_arguments(GGUFArguments, description=__doc__)
    output = Path(args.output)
    gguf_file = output / f"model-{args.file_type}.gguf"
    modelfile = output / "Modelfile"
    require_gguf_folder(output, gguf_file)
    try:
        # The GGUF file is renamed first, so a Modelfile never names a file that is not there.
        with write_atomically(modelfile) as new_modelfile, write_atomically(gguf_file) as new_gguf_file:
            text = export(args.checkpoint, new_gguf_file, args.file_type, gguf_file.name)
            new_modelfile.write_text(text, encoding="utf-8")
    finally:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()  # a refused export leaves nothing behind
    print(f"wrote {gguf_file} and {modelfile}")


def require_gguf_folder(output: Path, gguf_file: Path) -> None:
    """Raise UserError if `gguf_file` exists, or if `output` is not a folder with nothing but GGUF files."""
    if output.is_file() or gguf_file.exists():
        existing = output if output.is_file() else gguf_file
        raise UserError(f"{existing} exists: delete it, or choose another --output")
    if output.is_dir():
        for path in sorted(output.iterdir()):
            if path.suffix != ".gguf" and path.name != "Modelfile" and not path.name.endswith(".partial"):
                raise UserError(f"{output} holds more than GGUF files ({path.name}): choose another --output")


def export(checkpoint: str, gguf_path: Path, file_type: str, file_name: str) -> str:
    """Write the GGUF file, print the comparison with the checkpoint, and return the text of the Modelfile.

    Args:
        checkpoint: Folder or Hub name of the model.
        gguf_path: File to write.
        file_type: Key of `FILE_TYPES`.
        file_name: Name of the GGUF file in the Modelfile.

    Raises:
        UserError: The model or its tokenizer does not fit, or the written file differs from the checkpoint.
    """
    try:
        config = gguf_config(require_causal_lm(checkpoint))
        model, tokenizer = read_checkpoint(checkpoint)
        model = convert(model, config)
        write(model, tokenizer, gguf_path, file_type, Path(checkpoint).resolve().name)
        written = read_back(gguf_path, config)
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{checkpoint} cannot be written as GGUF: {error}") from error

    tolerance = FILE_TYPES[file_type].tolerance
    differences = logit_differences(model, written)
    # Rounding decides near ties between experts differently, which changes a few tokens by much, but not the median.
    statistic, difference = "", differences.max().item()
    if config.model_type not in READ_BY_TRANSFORMERS:
        statistic, difference = " (median of the tokens)", differences.median().item()
    if not difference <= tolerance:  # also refuses NaN
        raise UserError(
            f"{checkpoint} is not written: as {file_type} its logits differ by {difference:.1e} of the largest"
            f"{statistic}, above {tolerance:.0e}"
        )
    print(
        f"{config.model_type} in {file_type}: the logits differ by {difference:.1e} of the largest{statistic} (in "
        "float32)"
    )
    return modelfile_text(file_name, model, tokenizer)


def gguf_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the first equivalent architecture that a GGUF file can express.

    Raises:
        ValueError: There is none; the message says why.
    """
    if config.model_type in ARCHITECTURES:
        if obstacle_to_gguf(config) is None:
            return config
        # Another equivalent architecture may fit: Llama, for a Qwen2 model with wide heads.
        config = buddygpt_config(config)
    if not isinstance(config, BuddyGPTConfig):
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"it is `{config.model_type}`, none of {supported}; {USE_LLAMA_CPP_CONVERTER}")

    for native_config in native_configs(config):
        obstacle = obstacle_to_gguf(native_config)
        if obstacle is None:
            return native_config
    raise ValueError(obstacle)


def obstacle_to_gguf(config: PreTrainedConfig) -> str | None:
    """Return why a model of `ARCHITECTURES` cannot be written as GGUF or run by llama.cpp; None if it can."""
    rope = config.rope_parameters
    known_keys = {"rope_type", "rope_theta", "partial_rotary_factor"} | ROPE_KEYS.get(rope["rope_type"], set())
    if rope["rope_type"] not in ROPE_KEYS or rope.keys() - known_keys:
        return f"its `rope_parameters` {rope} are not written here"
    if config.hidden_act != "silu" or getattr(config, "use_sliding_window", False):
        return "it has another activation than silu, or a sliding window"
    heads_size = config.num_attention_heads * head_dim(config)
    if config.model_type == "qwen2" and heads_size != config.hidden_size:
        return f"llama.cpp's qwen2 needs heads of `hidden_size` {config.hidden_size} in total, not {heads_size}"
    if config.model_type == "qwen3_moe":
        if config.mlp_only_layers or config.decoder_sparse_step != 1:
            return "llama.cpp's Qwen3-MoE has experts in every layer, and this model has dense ones"
        if not config.norm_topk_prob:
            return "llama.cpp's Qwen3-MoE always normalizes the scores of the chosen experts (`norm_topk_prob`)"
    if config.model_type == "deepseek_v3":
        return obstacle_to_latent_attention(config)
    return None


def obstacle_to_latent_attention(config: PreTrainedConfig) -> str | None:
    """Return why llama.cpp would compute a DeepSeek-V3 model differently; None if it would not."""
    if config.rope_parameters["rope_type"] != "default" or not config.rope_interleave:
        return "latent attention is written with plain, interleaved rotary angles only"
    if config.rms_norm_eps != 1e-6:
        return f"llama.cpp uses `rms_norm_eps` {config.rms_norm_eps} for the norms of the latents, too, not 1e-6"
    if config.num_hidden_layers in (26, 27) and config.q_lora_rank is not None:
        return "llama.cpp takes 26 or 27 layers for DeepSeek-V2-Lite, which has no `q_lora_rank`"
    return None


def head_dim(config: PreTrainedConfig) -> int:
    """Return the width of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, file_type: str, name: str) -> None:
    """Write model and tokenizer into the GGUF file `path`. Raises UserError if either does not fit."""
    matrix_type = FILE_TYPES[file_type].matrix_type

    # Metadata
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    add_model(writer, model.config, name)
    add_tokenizer(writer, tokenizer, model.config.vocab_size)
    writer.add_file_type(FILE_TYPES[file_type].number)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    # Tensors: vectors and routers in float32, matrices in the chosen type if its blocks divide their rows.
    block_size, _ = gguf.GGML_QUANT_SIZES[matrix_type]
    uneven_matrices = 0
    for key, weight in tensors(model):
        if weight.dim() == 1 or "ffn_gate_inp" in key:
            tensor_type = GGMLQuantizationType.F32
        elif weight.shape[-1] % block_size == 0:
            tensor_type = matrix_type
        else:
            tensor_type = GGMLQuantizationType.F16
            uneven_matrices += 1
        writer.add_tensor(key, gguf.quants.quantize(weight.contiguous().numpy(), tensor_type), raw_dtype=tensor_type)
    if uneven_matrices:
        print(
            f"{uneven_matrices} matrices stay in f16: their rows are no multiple of {file_type}'s "
            f"block size {block_size}"
        )

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def add_model(writer: GGUFWriter, config: PreTrainedConfig, name: str) -> None:
    """Add the sizes of the model to the file's metadata."""
    rope = config.rope_parameters
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "deepseek_v3":
        add_latent_attention(writer, config)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
        writer.add_rope_dimension_count(head_dim(config))
    if config.model_type not in READ_BY_TRANSFORMERS:
        add_experts(writer, config)

    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def add_latent_attention(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Add the sizes of latent attention: llama.cpp sees one key-value head, the latent and the rotary key."""
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def add_experts(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Add the sizes and the routing of a mixture of experts, or of a DeepSeek-V3 model without experts."""
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        return
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    if config.first_k_dense_replace >= config.num_hidden_layers:
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


def read_back(path: Path, config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model that a GGUF file holds, in float32: as transformers reads it, if transformers can."""
    if config.model_type not in READ_BY_TRANSFORMERS:
        stored = {
            each.name: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type))
            for each in gguf.GGUFReader(path).tensors
        }
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(weights(model, stored), strict=True)
        return model
    config_read = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    # transformers' reader ignores some fields that are in the file: it reads `head_dim` for Llama only, and neither
    # biases nor a scaled RoPE.
    ignored_fields = ["head_dim", "attention_bias"]
    if config.rope_parameters["rope_type"] != "default":
        ignored_fields.append("rope_parameters")
    for name in ignored_fields:
        if hasattr(config, name):
            setattr(config_read, name, getattr(config, name))
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config_read, dtype=torch.float32
    )
    return convert(model, config_read)  # the reader marks its model as quantized, which forbids casting it


def modelfile_text(file_name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a Modelfile as documented by Ollama, without a TEMPLATE if the model's is not ChatML."""
    lines = [f"FROM ./{file_name}"]
    stops = []
    if is_chatml(tokenizer):
        stops.append("<|im_end|>")  # even if the model's eos token is another one
        template = OLLAMA_TOOLS.read_text(encoding="utf-8") if has_tools(tokenizer) else OLLAMA_CHATML
        lines.append(f'TEMPLATE """{template}"""')
    else:
        print("warning: the chat template is not plain ChatML: write the TEMPLATE of the Modelfile yourself")

    end_ids = model.generation_config.eos_token_id
    if end_ids is None:
        end_ids = []
    elif not isinstance(end_ids, list):
        end_ids = [end_ids]
    stops += tokenizer.convert_ids_to_tokens(end_ids)
    stops += [tokenizer.eos_token, getattr(tokenizer, "document_separator_token", None)]
    for stop in dict.fromkeys(stops):  # each once
        if stop:
            lines.append(f'PARAMETER stop "{stop}"')

    lines.append(f"PARAMETER num_ctx {model.config.max_position_embeddings}")
    return "\n".join(lines) + "\n"


def is_chatml(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the chat template formats a conversation without tools as plain ChatML."""
    chatml = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in CHAT)
    try:
        prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):  # it refuses a system message, or there is no template
        return False
    return prompt == f"{chatml}<|im_start|>assistant\n"


def has_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if the chat template writes thoughts, calls and results as `OLLAMA_TOOLS` does: ours, Qwen3's."""
    try:
        return tokenizer.apply_chat_template(TOOL_CHAT, tokenize=False, add_generation_prompt=True) == TOOL_PROMPT
    except (TemplateError, ValueError, TypeError):
        return False


if __name__ == "__main__":
    run_script(main)
