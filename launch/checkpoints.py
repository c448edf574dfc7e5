"""Checkpoints and tokenizers as scripts are given them: can this folder be used, and where does a run continue?"""

import hashlib
import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .arguments import UserError

# What the configs of one architecture may differ in without their weights being of another shape.
_SHAPE_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_bias",
    "use_qk_norm",
    "tie_word_embeddings",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_soft_experts",
)


def file_sha256(path: str | Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoint_sha256(name_or_path: str) -> str:
    """Return the sha256 of a local checkpoint's weights; a Hub name stands for itself."""
    weights = sorted(Path(name_or_path).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, weights)).encode()).hexdigest() if weights else name_or_path


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, whose failure is a [`UserError`]."""
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a tokenizer from {name_or_path}: {str(error).splitlines()[0]}") from error


def require_causal_lm(name_or_path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Return the config of a causal language model, from a local folder or the Hub.

    Raises:
        UserError: The folder is missing, holds no model, holds only a LoRA adapter, or a model of another kind.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder} holds a LoRA adapter, not a whole model: give the folder above it (merged)")
        raise UserError(f"{folder} is not a checkpoint: it has no config.json")
    if not folder.is_dir() and (folder.is_absolute() or name_or_path.count("/") != 1 or folder.parent.is_dir()):
        raise UserError(f"no such checkpoint folder: {name_or_path}")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot read a model config from {name_or_path}: {str(error).splitlines()[0]}") from error
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{name_or_path} is a `{config.model_type}` model, which is not a causal language model")
    return config


def last_checkpoint(output_dir: str | Path, config: PreTrainedConfig) -> str | None:
    """Return the newest `checkpoint-N` folder that was written to its end, or None where there is none.

    `Trainer` writes `trainer_state.json` after the weights, the optimizer and the scheduler, so a checkpoint whose
    writing was cut off (power, `kill -9`, a full disk) lacks it or holds half of it, and the one before it is taken.

    Args:
        output_dir: The run's output folder; need not exist.
        config: Config of the model about to be trained.

    Raises:
        UserError: The checkpoint is of a model of another shape.
    """
    checkpoints = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for folder in sorted(checkpoints, key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True):
        if _is_complete(folder):
            _require_same_shape(folder, config)
            return str(folder)
        print(f"warning: {folder} is incomplete and is passed over")
    return None


def _is_complete(folder: Path) -> bool:
    try:
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False
    return True


def _require_same_shape(folder: Path, config: PreTrainedConfig) -> None:
    if not (folder / "config.json").exists():  # LoRA: the checkpoint holds the adapter only
        return
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in _SHAPE_KEYS:
        if key in saved and saved[key] != getattr(config, key, None):
            raise UserError(
                f"cannot resume from {folder}: its {key} is {saved[key]}, this run's is {getattr(config, key, None)}. "
                "Give another --output_dir, or delete that one"
            )
