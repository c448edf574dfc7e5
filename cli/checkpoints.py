"""Checkpoints and tokenizers as scripts are given them: can this folder be used?"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def checkpoint_sha256(name_or_path: str) -> str:
    """Return the sha256 of a local checkpoint's weights; a Hub name stands for itself."""
    weights = sorted(Path(name_or_path).glob("*.safetensors"))
    return hashlib.sha256("".join(map(file_sha256, weights)).encode()).hexdigest() if weights else name_or_path


def load_tokenizer(name_or_path: str) -> "PreTrainedTokenizerBase":
    """`AutoTokenizer.from_pretrained`, whose failure is a [`UserError`]."""
    from transformers import AutoTokenizer  # imports torch, which not every script that is told a checkpoint needs

    if "/" in name_or_path and _is_missing(Path(name_or_path)):
        raise UserError(f"no such tokenizer folder: {name_or_path}")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read a tokenizer from {name_or_path}: {str(error).splitlines()[0]}") from error


def _is_missing(folder: Path) -> bool:
    """Whether this is no folder and no OWNER/NAME of the Hub either, where a slip of the pen is looked for in vain."""
    return not folder.is_dir() and (folder.is_absolute() or len(folder.parts) != 2 or folder.parent.is_dir())


def require_causal_lm(name_or_path: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """Return the config of a causal language model, from a local folder or the Hub.

    Raises:
        UserError: The folder is missing, holds no model, holds only a LoRA adapter, or a model of another kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import buddygpt.model  # noqa: F401  registers the model with the Auto classes

    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise UserError(f"{folder} holds a LoRA adapter, not a whole model: give the folder above it (merged)")
        raise UserError(f"{folder} is not a checkpoint: it has no config.json")
    if _is_missing(folder):
        raise UserError(f"no such checkpoint folder: {name_or_path}")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f"cannot read a model config from {name_or_path}: {str(error).splitlines()[0]}") from error
    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{name_or_path} is a `{config.model_type}` model, which is not a causal language model")
    return config
