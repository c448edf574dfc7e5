"""Import a stock checkpoint, without loss, so that pretraining, SFT and DPO continue from its weights.

    python export/from_native.py --checkpoint Qwen/Qwen3-0.6B --output outputs/qwen3

Qwen2, Qwen3, Llama, DeepSeek-V3, GLM-4-MoE and Qwen3-MoE become BuddyGPT checkpoints with their tokenizer, chat
template, generation config and dtype. What was written is read back and compared with the checkpoint; unless logits
and tokens agree, nothing is left behind.
"""

from dataclasses import dataclass, field
from pathlib import Path

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import run_script
from buddygpt.export.architectures import buddygpt_config
from buddygpt.export.conversion import convert_checkpoint


@dataclass
class ImportArguments:
    checkpoint: str = field(metadata={"help": "Folder or Hub name of a stock model."})
    output: str = field(metadata={"help": "Folder to make; must be empty or not exist."})


def main() -> None:
    (args,) = parse_arguments(ImportArguments, description=__doc__)
    config = require_causal_lm(args.checkpoint)
    convert_checkpoint(args.checkpoint, Path(args.output), map(buddygpt_config, [config]))


if __name__ == "__main__":
    run_script(main)
