"""Import a stock checkpoint, without loss, as a BuddyGPT checkpoint for further pretraining, SFT or DPO.

    python export/from_native.py --checkpoint Qwen/Qwen3-0.6B --output outputs/qwen3

Supports Qwen2, Qwen3, Llama, DeepSeek-V3, GLM-4-MoE and Qwen3-MoE; keeps tokenizer, chat template, generation config
and dtype. The result is read back and compared with the checkpoint; if logits or tokenizer differ, the script stops
with an error and writes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import require_causal_lm
from buddygpt.cli.errors import run_script
from buddygpt.export.architectures import buddygpt_config
from buddygpt.export.conversion import convert_checkpoint
from buddygpt.model import BuddyGPTConfig


@dataclass
class ImportArguments:
    checkpoint: str = field(metadata={"help": "Folder or Hub name of a stock model."})
    output: str = field(metadata={"help": "Folder to make; must be empty or not exist."})


def main() -> None:
    (args,) = parse_arguments(ImportArguments, description=__doc__)
    config = require_causal_lm(args.checkpoint)
    convert_checkpoint(args.checkpoint, Path(args.output), buddygpt_configs(config))


def buddygpt_configs(config: PreTrainedConfig) -> Iterator[BuddyGPTConfig]:
    """Yield the only BuddyGPT config that equals `config`. A generator, so `convert_checkpoint` reports its errors."""
    yield buddygpt_config(config)


if __name__ == "__main__":
    run_script(main)
