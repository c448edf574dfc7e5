"""Share of planted near-duplicates found by similarity, false positives, and speed of deduplication.

    python tools/benchmarks/deduplication.py           # a few minutes
    python tools/benchmarks/deduplication.py --quick   # checks in seconds that it runs

Half of the planted texts consist of Han characters, half of words. Copies are edited until their shingles have the
requested similarity. False positives are counted among unrelated pages, and among pages with a common frame, which
share a third of their shingles. Speed is text per CPU second of one process over all stages, in documents as long as
web pages.
"""

import json
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from ab import RESULTS, Report, alternate, cpu_seconds, spread
from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import run_script
from buddygpt.data.text.steps.deduplicate import BUCKETS, HASHES, SIMILAR, duplicate_stages, removed_file, shingles

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]
WORDS = [f"{a}{b}{c}" for a in ("con", "re", "tra", "mo", "sil") for b in "aeiou" for c in ("ta", "ner", "lid", "mos")]
SIMILARITIES = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


@dataclass
class DeduplicationArguments:
    pairs: int = field(default=1000, metadata={"help": "Planted pairs per similarity."})
    others: int = field(default=5000, metadata={"help": "Unrelated pages, and also pages with a common frame."})
    megabytes: int = field(default=20, metadata={"help": "Megabytes of text for the speed."})
    rounds: int = field(default=5, metadata={"help": "Measurements of the speed."})
    quick: bool = field(default=False, metadata={"help": "Little data; nothing is written."})


def make_text(rng: random.Random, units: int) -> str:
    """Return `units` random Han characters or random words."""
    return "".join(rng.choices(HAN, k=units)) if rng.random() < 0.5 else " ".join(rng.choices(WORDS, k=units))


def edit(rng: random.Random, text: str, similarity: float) -> str:
    """Replace units until the Jaccard similarity of the shingles is at most `similarity`."""
    separator, alphabet = (" ", WORDS) if " " in text else ("", HAN)
    units, original = text.split() if separator else list(text), np.unique(shingles(text))
    places = iter(rng.sample(range(len(units)), len(units)))
    while True:
        units[next(places)] = rng.choice(alphabet)
        edited = separator.join(units)
        common = len(np.intersect1d(original, grams := np.unique(shingles(edited)), assume_unique=True))
        if common <= similarity * (len(original) + len(grams) - common):
            return edited


def deduplicate(method: str, work: Path, texts: list[str]) -> set[int]:
    """Return the numbers of the texts that are removed."""
    (work / "documents").mkdir(parents=True, exist_ok=True)
    with open(work / "documents" / "00000.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "id": "", "metadata": {}}) + "\n" for text in texts)
    run(method, work)
    removed = removed_file(work / "duplicates" / method, 0)
    return set(np.fromfile(removed, "<u8")[1::2].tolist()) if removed.exists() else set()


def run(method: str, work: Path) -> None:
    """Run all stages in this process."""
    for stage in duplicate_stages(method, work, 1):
        for rank in range(stage.tasks):
            data = None
            for step in stage.steps:
                data = step(data, rank, stage.tasks)


def expected(similarity: float, buckets: int = BUCKETS) -> float:
    """Return the probability of sharing at least one bucket of eight hashes."""
    return 1 - (1 - similarity**HASHES) ** buckets


def measure_found(args: DeduplicationArguments, report: Report) -> None:
    """Add a row for each similarity, for unrelated pages and for pages with a common frame."""
    rng = random.Random(0)
    texts, kinds = [], []
    for similarity in tqdm(SIMILARITIES, unit="similarity"):
        originals = [make_text(rng, rng.randint(200, 800)) for _ in range(args.pairs)]
        texts += originals + [edit(rng, text, similarity) for text in originals]
        kinds += [""] * args.pairs + [similarity] * args.pairs
    frame = make_text(rng, 160)
    texts += [make_text(rng, rng.randint(200, 800)) for _ in range(args.others)]
    texts += [frame + "。" + "".join(rng.choices(HAN, k=160)) for _ in range(args.others)]
    kinds += ["unrelated pages"] * args.others + ["pages of one frame"] * args.others
    with tempfile.TemporaryDirectory() as folder:
        removed = deduplicate("minhash", Path(folder), texts)
    for kind in [*SIMILARITIES, "unrelated pages", "pages of one frame"]:
        numbers = [number for number, each in enumerate(kinds) if each == kind]
        found = len(removed.intersection(numbers)) / len(numbers)
        theory = [expected(kind, buckets) if kind in SIMILARITIES else "" for buckets in (BUCKETS, 14)]
        cells = [f"{share:.3f}" if share != "" else "" for share in theory]
        report.add([kind, len(numbers), f"{found:.3f}", *cells], kind=kind, documents=len(numbers), found=found)


def measure_speed(args: DeduplicationArguments, report: Report) -> None:
    """Measure megabytes per CPU second, for the line below the table and for the JSON."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        texts, size = [], 0
        while size < args.megabytes * 1e6:
            texts.append(make_text(rng, rng.randint(300, 2000)))
            size += len(texts[-1].encode())
        deduplicate("exact", Path(folder), texts)
        variants = {
            method: lambda method=method: size / 1e6 / cpu_seconds(lambda: run(method, Path(folder)))
            for method in ("exact", "minhash")
        }
        samples = alternate(variants, args.rounds)
    for method, values in samples.items():
        report.rows.append({"kind": method, "megabytes_per_cpu_second": values})
    speeds = ", ".join(f"`{method}` {spread(values)}" for method, values in samples.items())
    report.how = f"Megabytes of text a CPU second, all stages: {speeds}. Measured"


def draw(report: Report, path: Path) -> None:
    """Plot the found and the expected share over the similarity."""
    rows = [row for row in report.rows if row["kind"] in SIMILARITIES]
    line = np.linspace(0.3, 1, 100)
    figure, axes = plt.subplots(figsize=(6, 4))
    axes.plot(line, expected(line), "--", color="grey", label=f"{BUCKETS} buckets of {HASHES} hashes, in theory")
    axes.plot([row["kind"] for row in rows], [row["found"] for row in rows], "o-", label="found, sketches compared")
    axes.axvline(SIMILAR, color="lightgrey")
    axes.set(xlabel="Jaccard similarity of the shingles", ylabel="share of planted copies", ylim=(-0.02, 1.02))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = parse_arguments(DeduplicationArguments, description=__doc__)
    if args.quick:
        args.pairs, args.others, args.megabytes, args.rounds = 30, 100, 1, 1
    report = Report("deduplication", ["similarity", "documents", "removed", "in theory", "of datatrove's 14 buckets"])
    measure_found(args, report)
    measure_speed(args, report)
    report.finish(args)
    if not args.quick:
        draw(report, RESULTS / "deduplication.png")


if __name__ == "__main__":
    run_script(main)
