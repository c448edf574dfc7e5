"""Memory and time of the loss head: full logits against four ways that never hold all of them.

    python tools/benchmarks/loss_head.py            # needs Linux; takes minutes
    python tools/benchmarks/loss_head.py --quick    # checks that it runs
    python tools/benchmarks/loss_head.py --device cuda --tokens 2048 8192 32768 --hidden_size 1024

Each cell (head, tokens) runs in a new process, which gives its peak memory. The heads take turns within a round. Loss
and gradient of every head are compared with those of the full head.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from ab import Report
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.model.losses_buddygpt import ChunkedCrossEntropy, rows_per_chunk

MIB = 2**20


@dataclass
class LossHeadArguments:
    tokens: list[int] = field(default_factory=lambda: [512, 1024, 2048], metadata={"help": "Rows of logits."})
    vocab_size: int = field(default=151_669, metadata={"help": "Vocabulary entries."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden states."})
    heads: list[str] = field(
        default_factory=lambda: ["full", "buddygpt", "torch", "checkpointed"],
        metadata={"help": "full, buddygpt, torch, checkpointed, and on CUDA liger."},
    )
    rounds: int = field(default=3, metadata={"help": "Runs of each cell."})
    device: str = field(default="cpu", metadata={"help": "cpu (float32) or cuda (bfloat16 autocast)."})
    quick: bool = field(default=False, metadata={"help": "One round of 512 tokens and a vocabulary of 20,000."})
    cell: str | None = field(default=None, metadata={"help": "Internal: run this head only and print JSON."})


def full(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def buddygpt(hidden, weight, targets):
    return ChunkedCrossEntropy.apply(hidden, weight, targets)


def torch_op(hidden, weight, targets):
    if torch.is_autocast_enabled(hidden.device.type):  # the operator ignores autocast
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    options = LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk(hidden.device, weight.shape[0]))
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def checkpointed(hidden, weight, targets):
    rows = rows_per_chunk(hidden.device, weight.shape[0])
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return sum(checkpoint(full, x, weight, target, use_reentrant=False) for x, target in chunks)


def liger(hidden, weight, targets):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # pyright: ignore  optional

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")


HEADS = {"full": full, "buddygpt": buddygpt, "torch": torch_op, "checkpointed": checkpointed, "liger": liger}


def run_cell(args: LossHeadArguments) -> dict[str, float]:
    """Compute a loss and its gradient: additional peak memory, seconds, and norms for the comparison of heads."""
    torch.manual_seed(0)
    tokens, cuda = args.tokens[0], args.device == "cuda"
    weight = (torch.randn(args.vocab_size, args.hidden_size, device=args.device) * 0.02).requires_grad_()
    hidden = torch.randn(tokens, args.hidden_size, device=args.device, requires_grad=True)
    targets = torch.randint(args.vocab_size, (tokens,), device=args.device)
    targets[::7] = -100

    def peak() -> float:  # in bytes since the last reset; ru_maxrss would include the parent process
        status = Path("/proc/self/status").read_text()
        return torch.cuda.max_memory_allocated() if cuda else int(status.split("VmHWM:")[1].split()[0]) * 1024

    def reset_peak() -> None:
        torch.cuda.reset_peak_memory_stats() if cuda else Path("/proc/self/clear_refs").write_text("5")

    def step() -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=cuda):
            loss = HEADS[args.cell](hidden, weight, targets) / tokens
        loss.backward()
        return loss.detach()

    if cuda:  # compile and load kernels before timing
        step()
        weight.grad = hidden.grad = None
        torch.cuda.synchronize()
    reset_peak()
    before, start = peak(), (time.perf_counter() if cuda else time.process_time())
    loss = step()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() if cuda else time.process_time()) - start
    return {
        "peak_mib": (peak() - before) / MIB,
        "seconds": seconds,
        "loss": loss.item(),
        "weight_gradient": weight.grad.double().norm().item(),
        "hidden_gradient": hidden.grad.double().norm().item(),
    }


def measure(args: LossHeadArguments) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Run each cell in a process: tokens -> head -> one result per round."""
    results = {str(tokens): {head: [] for head in args.heads} for tokens in args.tokens}
    cells = [(tokens, head) for _ in range(args.rounds) for tokens in args.tokens for head in args.heads]
    for tokens, head in tqdm(cells, unit="cell"):
        sizes = [f"--{name}={getattr(args, name)}" for name in ("vocab_size", "hidden_size", "device")]
        command = [sys.executable, __file__, "--cell", head, "--tokens", str(tokens), *sizes]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[str(tokens)][head].append(json.loads(output))
    return results


def report(args: LossHeadArguments, results: dict) -> Report:
    """Make a row per head: medians, the range of the times, and the largest difference from the full head."""
    clock = "ms" if args.device == "cuda" else "CPU ms"
    columns = [f"{tokens} tokens: peak MiB, {clock}" for tokens in results]
    found = Report("loss_head", ["head", *columns, "largest difference"])
    for head in args.heads:
        row, difference = [], 0.0
        for by_head in results.values():
            runs, expected = by_head[head], by_head[args.heads[0]][0]
            milliseconds = sorted(1000 * run["seconds"] for run in runs)
            spread = f"[{milliseconds[0]:.0f}-{milliseconds[-1]:.0f}]"
            row.append(f"{median(run['peak_mib'] for run in runs):.0f}, {median(milliseconds):.0f} {spread}")
            keys = ("loss", "weight_gradient", "hidden_gradient")
            difference = max(difference, *(abs(runs[0][key] / expected[key] - 1) for key in keys))
        runs = {tokens: by_head[head] for tokens, by_head in results.items()}
        found.add([head, *row, f"{difference:.0e}"], head=head, runs=runs)
    return found


def main() -> None:
    (args,) = parse_arguments(LossHeadArguments, description=__doc__)
    if args.cell:
        print(json.dumps(run_cell(args)))
        return
    if args.quick:
        args.rounds, args.vocab_size, args.tokens = 1, 20_000, [512]
    report(args, measure(args)).finish(args)


if __name__ == "__main__":
    run_script(main)
