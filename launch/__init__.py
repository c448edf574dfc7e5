"""What every script does around its own work: strict arguments, one-line errors, resume, train, save."""

from .arguments import UserError, parse_arguments, run_script
from .checkpoints import checkpoint_sha256, file_sha256, load_tokenizer, require_causal_lm

__all__ = [
    "UserError",
    "checkpoint_sha256",
    "file_sha256",
    "load_tokenizer",
    "parse_arguments",
    "require_causal_lm",
    "run_script",
]
