"""Fair comparisons for benchmarks: variants take turns in one process, and each median is shown with its range.

A [`Report`] writes `tools/benchmarks/results/NAME.json` and a table in docs/performance.md. Needs torch, transformers
and this checkout only, so that it runs on a rented machine.
"""

import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"

# On a rented machine the project is not installed: the packages of `buddygpt` are the folders of this checkout.
if importlib.util.find_spec("buddygpt") is None:
    sys.modules["buddygpt"] = ModuleType("buddygpt")
    sys.modules["buddygpt"].__path__ = [str(ROOT)]

from buddygpt.cli.files import write_atomically  # noqa: E402
from buddygpt.cli.tables import markdown_table  # noqa: E402


def alternate(variants: dict[str, Callable[[], float]], rounds: int, progress: Any = None) -> dict[str, list[float]]:
    """Call every variant once per round, in reverse order every other round, and return all results by name.

    Args:
        variants: Name -> a measurement. A first call of each is a warm-up, whose result is dropped.
        rounds: Measurements of each variant.
        progress: tqdm bar to update, or None.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name in list(variants)[:: 1 if number % 2 else -1]:
            value = variants[name]()
            if number >= 0:
                samples[name].append(value)
            if progress is not None:
                progress.update()
    return samples


def spread(values: list[float]) -> str:
    """Return "median [lowest-highest]" with at least three digits."""
    middle, low, high = (
        f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in (median(values), min(values), max(values))
    )
    return f"{middle} [{low}-{high}]"


def ratios(values: list[float], baseline: list[float]) -> list[float]:
    """Divide each value by the baseline's of the same round, which cancels out changes of the machine's speed."""
    return [value / base for value, base in zip(values, baseline, strict=True)]


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call over all threads, which other processes change less than wall time."""
    start = time.process_time()
    work()
    return time.process_time() - start


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return a description of the hardware and of the library versions."""
    found = {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        found["device"] = models[0].split(":")[1].strip() if models else found["device"]
    if device.startswith("cuda"):
        found["device"] = torch.cuda.get_device_name()
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    found |= {"threads": torch.get_num_threads(), "python": platform.python_version()}
    return found | {"torch": torch.__version__, "transformers": transformers.__version__}


class Report:
    """Results of a benchmark, as a table for the document and as JSON for the planner.

    Args:
        name: Name of the JSON file and of the markers in docs/performance.md.
        header: Titles of the table's columns.
        how: First words of the line below the table, which continues "on MACHINE".
    """

    def __init__(self, name: str, header: list[str], how: str = "Measured") -> None:
        self.name = name
        self.header = header
        self.how = how
        self.cells: list[list[str]] = []
        self.rows: list[dict[str, Any]] = []

    def add(self, cells: list[Any], **row: Any) -> None:
        """Add a row: its cells in the table, and its values in the JSON."""
        self.cells.append([str(cell) for cell in cells])
        self.rows.append(row)

    def add_samples(self, samples: dict[str, list[float]], unit: str, better: str = "less") -> None:
        """Add a row for each variant of [`alternate`]: name, median and range, ratio to the first variant."""
        baseline = next(iter(samples.values()))
        for name, values in samples.items():
            by_round = ratios(values, baseline)
            self.add([name, spread(values), spread(by_round)], name=name, unit=unit, better=better, values=values)

    def table(self) -> str:
        return markdown_table(self.header, self.cells, ["---"] * len(self.header))

    def finish(self, args: Any) -> None:
        """Print the table. Unless `args.quick` is set, write the JSON (with `args`) and the table in the document."""
        where, quick = machine(getattr(args, "device", "cpu")), args.quick
        note = f"{where['device']}, {where['threads']} threads, torch {where['torch']}, " + time.strftime("%Y-%m-%d")
        print(f"\n{self.table()}\n\n{self.name}: {note}" + (" (quick: not written)" if quick else ""))
        if quick:
            return
        content = {"benchmark": self.name, "machine": where, "date": time.strftime("%Y-%m-%d")}
        content |= {"settings": {key: _anywhere(value) for key, value in vars(args).items()}, "rows": self.rows}
        with write_atomically(RESULTS / f"{self.name}.json") as path:
            text = json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
            path.write_text(text, encoding="utf-8")
        document = DOCUMENT.read_text(encoding="utf-8")
        document = insert_table(document, self.name, f"{self.table()}\n\n{self.how} on {note}.")
        with write_atomically(DOCUMENT) as path:
            path.write_text(document, encoding="utf-8")


def _anywhere(value: Any) -> Any:
    """Return a setting without folders of this machine: an absolute path becomes its last part."""
    if isinstance(value, list):
        return [_anywhere(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def insert_table(document: str, name: str, text: str) -> str:
    """Replace the text between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    Raises:
        ValueError: The document lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise ValueError(f"docs/performance.md lacks the markers {start} and {end}")
    return document[: document.index(start) + len(start)] + f"\n{text}\n" + document[document.index(end) :]


class BareLoop:
    """The plainest training loop: a model, random tokens and an optimizer.

    Args:
        model: Is moved to `device` and put into training mode.
        rows, length: Shape of a batch; each step has new random tokens.
        autocast: Compute in bf16 over the model's weights.
        optimizer: Function that makes one from the model. Default: fused AdamW.
        compile: Compile the model's forward pass.
        device: "cpu" or "cuda".
        forward: Further arguments of each forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        length: int,
        autocast: bool = False,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        compile: bool = False,
        device: str = "cpu",
        **forward: Any,
    ) -> None:
        self.model = model.to(device).train()
        self.vocab_size = model.config.vocab_size
        self.rows, self.length, self.autocast, self.device, self.forward = rows, length, autocast, device, forward
        make = optimizer or (lambda model: torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True))
        self.optimizer = make(self.model)
        self.run = torch.compile(self.model) if compile else self.model
        self.generator = torch.Generator(device).manual_seed(0)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.length

    def step(self) -> torch.Tensor:
        """Run forward, backward and update; return the loss as a tensor on the device."""
        shape = (self.rows, self.length)
        ids = torch.randint(self.vocab_size, shape, device=self.device, generator=self.generator)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.run(input_ids=ids, labels=ids, use_cache=False, **self.forward).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def steps(self, number: int) -> None:
        """Run `number` steps."""
        for _ in range(number):
            self.step()
