"""Average the weights of several checkpoints of one run.

    python tools/merge_checkpoints.py --checkpoints RUN/checkpoint-1400 RUN/checkpoint-1500 --output RUN-average

The last checkpoints of a run at a constant learning rate lie around a better point than each of them, so their average
stands in for a decay of the rate (arXiv:2405.18392 section 4, arXiv:2203.05482). After a decay, it brings little:
docs/results.md has a measurement.
"""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import write_atomically
from buddygpt.cli.weights import require_all_weights

# Everything else of a checkpoint describes its training.
KEPT = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "*.py")


@dataclass
class MergeArguments:
    checkpoints: list[str] = field(metadata={"help": "Two or more folders of the same model, such as checkpoint-N."})
    output: str = field(metadata={"help": "Folder to make."})

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoints, list) or len(self.checkpoints) < 2:
            raise ValueError(f"checkpoints is {self.checkpoints}; give two or more folders")


def main() -> None:
    (args,) = parse_arguments(MergeArguments, description=__doc__)
    folders = [Path(folder) for folder in args.checkpoints]
    output = Path(args.output)
    if output.exists():
        raise UserError(f"{output} exists: choose another output, or delete it")
    for folder in folders:
        require_all_weights(str(folder))
    for folder in folders[1:]:
        if weight_shapes(folder) != weight_shapes(folders[0]):
            raise UserError(f"{folder} and {folders[0]} are not the same model: their weights differ in name or shape")
    with write_atomically(output) as partial:
        partial.mkdir()
        for pattern in (*KEPT, "*.safetensors.index.json"):
            for file in folders[0].glob(pattern):
                shutil.copyfile(file, partial / file.name)
        for file in weight_files(folders[0]):
            averaged = average([folder / file.name for folder in folders])
            save_file(averaged, partial / file.name, metadata={"format": "pt"})
    print(f"wrote {output}, the average of {len(folders)} checkpoints")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a checkpoint; UserError if they are not in the safetensors format."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors")
    return files


def weight_shapes(folder: Path) -> dict[str, tuple[str, list[int], str]]:
    """Return the file, shape and dtype of each weight by name."""
    shapes = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  it is no dict
                piece = weights.get_slice(name)
                shapes[name] = (file.name, piece.get_shape(), piece.get_dtype())
    return shapes


def average(files: list[Path]) -> dict[str, torch.Tensor]:
    """Return the mean of each weight over files of the same weights, in their dtype.

    Sums are taken in float64, one weight at a time.
    """
    result = {}
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        for name in opened[0].keys():  # noqa: SIM118
            weights = [of_file.get_tensor(name) for of_file in opened]
            mean = sum(weight.double() for weight in weights) / len(weights)
            result[name] = mean.to(weights[0].dtype)
    return result


if __name__ == "__main__":
    run_script(main)
