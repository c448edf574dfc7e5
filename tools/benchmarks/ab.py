"""Comparisons that can be trusted: variants take turns in one process, medians come with their spread, and the figures
go to `tools/benchmarks/results/NAME.json` and, as a table, to docs/performance.md.

Needs torch and transformers only, so that it runs on a rented machine as it is.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"


def alternate(variants: dict[str, Callable[[], float]], rounds: int, progress: Any = None) -> dict[str, list[float]]:
    """Call every variant once a round, every other round in reverse order, and keep what each returns.

    Args:
        variants: Name -> a measurement. Each is called once before, and that is thrown away.
        rounds: How often each is measured.
        progress: A tqdm bar to move on, or None.
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
    """Median and range, at three digits and more."""
    middle, low, high = (
        f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" for x in (median(values), min(values), max(values))
    )
    return f"{middle} [{low}-{high}]"


def ratios(values: list[float], baseline: list[float]) -> list[float]:
    """Each round's value over the baseline's of the same round: what the machine did to both cancels out."""
    return [value / base for value, base in zip(values, baseline, strict=True)]


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Seconds of processor time that a call takes, over all threads: unlike the clock, no matter what else runs."""
    start = time.process_time()
    work()
    return time.process_time() - start


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on."""
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
    """Rows of a benchmark, as a table for people and as JSON for the planner.

    Args:
        name: Of the benchmark: the JSON's name and the marker in docs/performance.md.
        header: Of the table.
        how: What was done to get the figures, in one word.
    """

    def __init__(self, name: str, header: list[str], how: str = "Measured") -> None:
        self.name = name
        self.header = header
        self.how = how
        self.cells: list[list[str]] = []
        self.rows: list[dict[str, Any]] = []

    def add(self, cells: list[Any], **row: Any) -> None:
        """One row: its cells in the table, and its figures in the JSON."""
        self.cells.append([str(cell) for cell in cells])
        self.rows.append(row)

    def add_samples(self, samples: dict[str, list[float]], unit: str, better: str = "less") -> None:
        """A row for each variant of [`alternate`]: name, median and range, ratio to the first variant."""
        baseline = next(iter(samples.values()))
        for name, values in samples.items():
            by_round = ratios(values, baseline)
            self.add([name, spread(values), spread(by_round)], name=name, unit=unit, better=better, values=values)

    def table(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def finish(self, args: Any) -> None:
        """Print the table; unless `args.quick`, write the JSON (with `args`) and put the table into the document."""
        where, quick = machine(getattr(args, "device", "cpu")), args.quick
        note = f"{where['device']}, {where['threads']} threads, torch {where['torch']}, " + time.strftime("%Y-%m-%d")
        print(f"\n{self.table()}\n\n{self.name}: {note}" + (" (quick: not written)" if quick else ""))
        if quick:
            return
        RESULTS.mkdir(exist_ok=True)
        content = {"benchmark": self.name, "machine": where, "date": time.strftime("%Y-%m-%d")}
        content |= {"settings": {key: _anywhere(value) for key, value in vars(args).items()}, "rows": self.rows}
        _replace(RESULTS / f"{self.name}.json", json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
        document = DOCUMENT.read_text(encoding="utf-8")
        _replace(DOCUMENT, insert_table(document, self.name, f"{self.table()}\n\n{self.how} on {note}."))


def _anywhere(value: Any) -> Any:
    """Return a setting without the folders of this machine: of an absolute path, the name."""
    if isinstance(value, list):
        return [_anywhere(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def insert_table(document: str, name: str, text: str) -> str:
    """Put `text` between the markers `<!-- NAME -->` and `<!-- /NAME -->`, in place of what is there.

    Raises:
        ValueError: The document lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise ValueError(f"docs/performance.md lacks the markers {start} and {end}")
    return document[: document.index(start) + len(start)] + f"\n{text}\n" + document[document.index(end) :]


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
