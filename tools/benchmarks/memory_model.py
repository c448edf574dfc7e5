"""Does the planner's memory model (tools/memory.py) hold? Its peak of a training step against a measured one.

    python tools/benchmarks/memory_model.py           # the presets at 1 and 8 x 1,024, on fake tensors
    python tools/benchmarks/memory_model.py --quick   # one small preset

A step (forward, backward, optimizer) runs operator by operator on fake tensors of the real sizes, and every storage
that comes and goes is counted (peak_memory.py). Autograd, autocast and checkpointing are PyTorch's own, so that the
order of events is the real one; kernels are those of the processor, and the chunks of logits too.
"""

import contextlib
from dataclasses import dataclass, field, replace

import torch
from ab import Report
from memory import MemoryModel, Setup
from peak_memory import PeakMemory
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.model.presets import load_config
from buddygpt.training.optimizers import muon_adamw

GIB = 2**30
MODELS = ("buddygpt-0.1b", "buddygpt-0.3b-mla", "buddygpt-0.7b-mla-moe", "bitbrain-0.6b", "mini-qwen-1b", "steel-1.1b")
AUTOCAST, LEAST = Setup(device="cpu"), Setup("bf16_params", "muon", checkpointing=True, device="cpu")
CASES = [
    ("bf16 autocast, AdamW", AUTOCAST, 1),
    ("bf16 autocast, AdamW", AUTOCAST, 8),
    ("bf16 autocast, AdamW, checkpointing", replace(AUTOCAST, checkpointing=True), 8),
    ("bf16 autocast, AdamW, accumulation", replace(AUTOCAST, accumulation=2), 8),
    ("bf16 weights, Muon, checkpointing", LEAST, 1),
    ("bf16 weights, Muon, checkpointing", LEAST, 8),
]


@dataclass
class MemoryModelArguments:
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": "Presets or config JSONs."})
    block_size: int = field(default=1024, metadata={"help": "Tokens in a row."})
    quick: bool = field(default=False, metadata={"help": "buddygpt-0.1b only; nothing is written."})


def measure_peak(config: PreTrainedConfig, setup: Setup, rows: int, fake: bool = True) -> int:
    """Bytes at the fullest moment of the second training step, when the optimizer has its states."""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        dtype = torch.bfloat16 if setup.precision == "bf16_params" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if setup.checkpointing:
            model.activation_checkpointing_enable()
        if setup.optimizer == "muon":
            optimizer = muon_adamw(model, weight_decay=0.1, lr=1e-3, fused=True)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        tokens = torch.zeros(rows, setup.block_size, dtype=torch.long)
        peak = PeakMemory()
        with peak:
            peak.track(*model.parameters(), *model.buffers())
            for _ in range(2):
                peak.peak = peak.live
                for _ in range(setup.accumulation):
                    with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "fp32_master"):
                        loss = model(
                            input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=tokens.numel()
                        ).loss
                    loss.backward()
                    del loss
                optimizer.step()
                optimizer.zero_grad()
        return peak.peak


def main() -> None:
    (args,) = parse_arguments(MemoryModelArguments, description=__doc__)
    report = Report("memory_model", ["model", "setting", "rows", "predicted GiB", "measured GiB", "difference"])
    models = args.models[:1] if args.quick else args.models
    for name, (label, setup, rows) in tqdm([(name, case) for name in models for case in CASES], unit="step"):
        config, setup = load_config(name), replace(setup, block_size=args.block_size)
        predicted, measured = MemoryModel(config, setup).peak(rows), measure_peak(config, setup, rows)
        cells = [
            name,
            label,
            rows,
            f"{predicted / GIB:.2f}",
            f"{measured / GIB:.2f}",
            f"{predicted / measured - 1:+.1%}",
        ]
        report.add(cells, model=name, setting=label, rows=rows, predicted_bytes=predicted, measured_bytes=measured)
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
