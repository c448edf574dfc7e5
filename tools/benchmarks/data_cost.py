"""Cost of preparing text: megabytes tokenized per CPU second, and peak memory.

    python tools/benchmarks/data_cost.py --files DATA_DIR/*.jsonl.gz --tokenizers OURS QWEN  # ten minutes
    python tools/benchmarks/data_cost.py --files DATA_DIR/*.jsonl.gz --tokenizers OURS QWEN --quick  # a test run

Speed compares the tokenize stage of data/prepare_pretrain.py with a bare loop that calls `encode_batch` and writes the
ids to a memmap, and with `datasets.map` and `group_texts` as in transformers' run_clm.py. Memory is the peak of the
process that runs all stages, including near-duplicate removal, for each tokenizer and for one file of each size, whose
lines are drawn from the given files.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path

import numpy as np
from ab import ROOT, Report, alternate, cpu_seconds, ratios, spread
from datasets import Dataset, disable_progress_bars
from datatrove.data import Document
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.text.pipeline import DocumentReader, DocumentWriter
from buddygpt.data.text.rows import progress_bar, read_rows
from buddygpt.data.text.tokenize import ShardWriter, raw_text_tokenizer, token_dtype

LINES = 20  # per document


@dataclass
class DataCostArguments:
    files: list[str] = field(metadata={"help": "Files or globs of text."})
    tokenizers: list[str] = field(metadata={"help": "Folders or Hub names; the first for the speed, all for memory."})
    text_key: list[str] = field(default_factory=lambda: ["text", "content"], metadata={"help": "Columns of the text."})
    separator: str = field(default="<|endoftext|>", metadata={"help": "The token after every document."})
    rounds: int = field(default=5, metadata={"help": "Measurements of each way."})
    megabytes: float = field(default=20, metadata={"help": "Megabytes of text for the speed."})
    sizes: list[float] = field(
        default_factory=lambda: [20, 80, 320], metadata={"help": "Megabytes of text for the memory."}
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens in a block of `group_texts`."})
    quick: bool = field(default=False, metadata={"help": "One round on little text; nothing is written."})


def read_lines(args: DataCostArguments) -> list[str]:
    files = find_files(args.files)
    with progress_bar(files, desc="reading") as bar:
        rows = (row for file in files for row in read_rows(file, args.text_key, bar))
        lines = [line for row in rows if not row.error for line in row.content.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"files: no text in {', '.join(args.files)}; see --text_key")
    return lines


def write_documents(path: Path, lines: list[str], megabytes: float) -> None:
    """Write a .jsonl file with `megabytes` of text, in documents of randomly drawn lines."""
    draw, size = random.Random(0), 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "\n".join(draw.choices(lines, k=LINES))
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


class BareLoop:
    """Calls `encode_batch` and writes the ids to a memmap."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, args: DataCostArguments, work: Path):
        self.texts, self.work, self.megabytes = texts, work, args.megabytes
        self.backend = tokenizer.backend_tokenizer
        self.eos, self.dtype = tokenizer.convert_tokens_to_ids(args.separator), token_dtype(tokenizer.get_vocab())

    def tokenize(self) -> None:
        size, tokens = 0, np.memmap(self.work / "bare", self.dtype, "w+", shape=sum(map(len, self.texts)) * 2)
        for start in range(0, len(self.texts), 100):
            for encoding in self.backend.encode_batch(self.texts[start : start + 100], add_special_tokens=False):
                tokens[size : size + len(encoding.ids)] = encoding.ids
                size += len(encoding.ids) + 1
                tokens[size - 1] = self.eos
        tokens.flush()

    def __call__(self) -> float:
        return self.megabytes / cpu_seconds(self.tokenize)


class TokenizeStage:
    """Turns documents of the clean stage into a shuffled shard with index, hash and table of documents."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, args: DataCostArguments, work: Path):
        self.work, self.args, self.dtype = work, args, token_dtype(tokenizer.get_vocab()).name
        (work / "tokenizer.json").write_text(raw_text_tokenizer(tokenizer, args.separator), encoding="utf-8")
        documents = (Document(text, id=f"a.jsonl:{i}", metadata={"source": "a"}) for i, text in enumerate(texts))
        for _ in DocumentWriter(work / "documents").run(documents):
            pass

    def tokenize(self) -> None:
        writer = ShardWriter(
            folder=self.work / "shards",
            lists=self.work / "lists",
            tokenizer=self.work / "tokenizer.json",
            separator=self.args.separator,
            prefix="00",
            shuffle_seed=42,
            shard_bytes=100_000_000,
            batch_chars=50_000,
            dtype=self.dtype,
        )
        writer.run(DocumentReader(self.work / "documents").run())

    def __call__(self) -> float:
        return self.args.megabytes / cpu_seconds(self.tokenize)


class MapAndGroup:
    """Calls `datasets.map` twice: to tokenize, then for `group_texts`."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, args: DataCostArguments, work: Path):
        self.rows, self.tokenizer, self.args = Dataset.from_dict({"text": texts}), tokenizer, args
        self.work, self.calls = work, 0

    def group_texts(self, examples: dict[str, list]) -> dict[str, list]:
        joined, size = {key: list(chain(*examples[key])) for key in examples}, self.args.block_size
        total = len(joined["input_ids"]) // size * size
        result = {key: [ids[i : i + size] for i in range(0, total, size)] for key, ids in joined.items()}
        return result | {"labels": result["input_ids"].copy()}

    def tokenize(self) -> None:
        self.calls += 1  # a new file each time, so that nothing comes from the cache
        cache = [str(self.work / f"map{self.calls}-{step}.arrow") for step in "ab"]
        rows = self.rows.map(
            lambda row: self.tokenizer(row["text"]), batched=True, remove_columns=["text"], cache_file_name=cache[0]
        )
        rows.map(self.group_texts, batched=True, cache_file_name=cache[1])

    def __call__(self) -> float:
        seconds = cpu_seconds(self.tokenize)
        for file in self.work.glob("map*.arrow"):
            file.unlink()
        return self.args.megabytes / seconds


def peak_memory(megabytes: float, lines: list[str], tokenizer: str, args: DataCostArguments, work: Path) -> float:
    """Return the peak memory in MiB of the process that runs all stages. Needs Linux."""
    write_documents(work / "text.jsonl", lines, megabytes)
    command = [sys.executable, ROOT / "data" / "prepare_pretrain.py", "--sources", work / "text.jsonl"]
    command += ["--tokenizer", tokenizer, "--document_separator", args.separator, "--output", work / "out"]
    command += ["--clean", "text", "--deduplicate", "minhash", "--eval_fraction", "0.01"]
    peak, process = 0, subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    while process.poll() is None:  # rusage would include the memory of this process at the fork
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+) kB", status))])
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"data/prepare_pretrain.py ended with status {process.returncode}")
    return peak / 1024


def main() -> None:
    (args,) = parse_arguments(DataCostArguments, description=__doc__)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bars()
    if args.quick:
        args.rounds, args.megabytes, args.sizes = 1, 0.5, [0.5, 1]
    lines, tokenizer = read_lines(args), AutoTokenizer.from_pretrained(args.tokenizers[0])
    report = Report("data_cost", ["", "MB of text a second of a core", "of the bare loop", "peak memory, MiB"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_documents(work / "text.jsonl", lines, args.megabytes)
        texts = [json.loads(line)["text"] for line in open(work / "text.jsonl", encoding="utf-8")]  # noqa: SIM115
        ways = {"bare loop": BareLoop, "prepare_pretrain.py": TokenizeStage, "datasets.map + group_texts": MapAndGroup}
        variants = {name: way(texts, tokenizer, args, work) for name, way in ways.items()}
        with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
            samples = alternate(variants, args.rounds, progress)
        for name, values in samples.items():
            against = ratios(values, samples["bare loop"])
            report.add([name, spread(values), spread(against), ""], name=name, values=values, ratios=against)
    for name, size in tqdm(list(product(args.tokenizers, args.sizes)), desc="memory", unit="run"):
        with tempfile.TemporaryDirectory() as folder:
            peak = peak_memory(size, lines, name, args, Path(folder))
        entries = len(AutoTokenizer.from_pretrained(name))
        row = [f"all stages, {size:g} MB of text, {entries:,} entries", "", "", f"{peak:.0f}"]
        report.add(row, megabytes=size, entries=entries, peak_mib=peak)
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
