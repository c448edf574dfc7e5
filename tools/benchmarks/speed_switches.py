"""What each switch of the recipe costs or brings: a bare training step with one thing changed at a time.

    python tools/benchmarks/speed_switches.py           # about 3 minutes on two cores, half of it compiling
    python tools/benchmarks/speed_switches.py --quick   # seconds: does it run?

On a processor; on a GPU the answers differ, which gpu.py is for, and where Liger's kernels are one more
switch. dataloader_num_workers is in loader.py, memory of the loss head in loss_head.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from ab import Report, alternate, cpu_seconds
from bare_loop import BareLoop
from tqdm import tqdm
from training_step import shapes
from transformers import AutoModelForCausalLM

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.training.optimizers import muon_adamw


@dataclass
class SwitchesArguments:
    rounds: int = field(default=5, metadata={"help": "Times each variant is measured."})
    steps: int = field(default=2, metadata={"help": "Training steps in one measurement."})
    rows: int = field(default=4, metadata={"help": "Rows of a batch."})
    length: int = field(default=256, metadata={"help": "Tokens in a row."})
    quick: bool = field(default=False, metadata={"help": "One round of a tiny shape, uncompiled; nothing is written."})


def make_loops(args: SwitchesArguments) -> dict[str, BareLoop]:
    """Name -> a loop that differs from the first in what its name says."""
    config = shapes(args.quick)["BuddyGPT"]

    def loop(checkpointing: bool = False, **options) -> BareLoop:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if checkpointing:
            model.activation_checkpointing_enable()
        return BareLoop(model, args.rows, args.length, **options)

    documents = torch.arange(args.length) % (args.length // 4)  # four to a row
    loops = {
        "as it comes (chunked loss head, AdamW, sdpa)": loop(),
        "full logits in place of the chunked head": loop(skip_logits=False),
        "isolate_documents": loop(position_ids=documents.expand(args.rows, -1)),
        "activation_checkpointing": loop(checkpointing=True),
        "optimizer: muon": loop(optimizer=lambda model: muon_adamw(model, weight_decay=0.1, lr=3e-4, fused=True)),
    }
    if not args.quick:
        loops["torch_compile"] = loop(compile=True)
    return loops


def timed(loop: BareLoop, steps: int) -> Callable[[], float]:
    """A measurement: CPU seconds of one of `steps` training steps."""
    return lambda: cpu_seconds(lambda: loop.steps(steps)) / steps


def main() -> None:
    (args,) = parse_arguments(SwitchesArguments, description=__doc__)
    if args.quick:
        args.rounds, args.steps, args.rows, args.length = 1, 1, 2, 32
    variants = {name: timed(loop, args.steps) for name, loop in make_loops(args).items()}
    with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
        samples = alternate(variants, args.rounds, progress)
    report = Report("speed_switches", ["switch", "CPU s a step", "ratio to the first"])
    report.add_samples(samples, "CPU s a step")
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
