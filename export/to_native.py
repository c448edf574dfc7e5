"""Export a BuddyGPT checkpoint, without loss, to its equivalent stock architecture of transformers.

    python export/to_native.py --checkpoint outputs/sft --output outputs/native

The result loads without remote code (`transformers serve`, vLLM, llama.cpp, ...). It is read back and compared with
the checkpoint; if logits or tokenizer differ, the script stops with an error and writes nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import UserError, run_script
from buddygpt.export.architectures import native_configs
from buddygpt.export.conversion import convert_checkpoint
from buddygpt.model import BuddyGPTConfig


@dataclass
class ExportArguments:
    checkpoint: str = field(metadata={"help": "Folder of a complete BuddyGPT model (no LoRA adapter)."})
    output: str = field(metadata={"help": "Folder to make; must be empty or not exist."})


def main() -> None:
    (args,) = parse_arguments(ExportArguments, description=__doc__)
    export(args.checkpoint, Path(args.output))


def export(checkpoint: str, output: Path) -> None:
    """Write the native export of a checkpoint.

    Raises:
        UserError: It is no BuddyGPT model, no architecture equals it, or the result differs.
    """
    config = require_causal_lm(checkpoint)
    if not isinstance(config, BuddyGPTConfig):
        raise UserError(f"{checkpoint} is a `{config.model_type}` model, not a BuddyGPT one: nothing to export")
    convert_checkpoint(checkpoint, output, native_configs(config))


if __name__ == "__main__":
    run_script(main)
