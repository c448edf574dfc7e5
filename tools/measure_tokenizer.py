"""Compare tokenizers on Chinese, English, code and digits: characters and bytes per token, and speed.

    python tools/measure_tokenizer.py --tokenizers outputs/quickstart/tokenizer QWEN --output outputs/tokenizers
    python tools/measure_tokenizer.py --tokenizers A B --texts zh=corpus/zh/*.jsonl en=corpus/en/*.txt

More bytes per token mean shorter sequences, at the price of a larger vocabulary. A tokenizer looks better on text like
that it was trained on, so compare on text that none of them has seen. The built-in texts are a few lines each: enough
for a first look, but too short and repetitive to rank speed.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.arguments import parse_arguments, require_count
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files, write_atomically
from buddygpt.cli.tables import markdown_table
from buddygpt.data.text.rows import progress_bar, read_rows

BUILT_IN = {
    "zh": "人工智能是研究如何让机器表现出智能的学科。春天到了，院子里的桃花开了，孩子们在树下读书、唱歌、做游戏。"
    "请问从北京到上海坐高铁需要多长时间？大约四个半小时，票价因座位等级而不同。",
    "en": "The quick brown fox jumps over the lazy dog. In the spring of that year, they moved to a house by the "
    "river, where she could read and write in peace. How long does it take to learn a language? That depends on you.",
    "code": "import json\n\n\ndef load_rows(path, limit=None):\n    rows = []\n    with open(path) as file:\n"
    "        for number, line in enumerate(file):\n            if limit is not None and number >= limit:\n"
    "                break\n            rows.append(json.loads(line))\n    return rows\n",
    "digits": "3.14159265358979 2026-11-22 16:49:05 +86 138 0013 8000 1,234,567.89 0xFF00 1024 * 768 = 786432 99.95%",
}


@dataclass
class MeasureArguments:
    """What to compare, on which texts, and the folder for the result."""

    tokenizers: list[str] = field(metadata={"help": "Tokenizer folders."})
    texts: list[str] = field(default_factory=list, metadata={"help": "NAME=GLOB. Default: the built-in texts."})
    text_key: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "Columns that may hold the text."})
    max_bytes: int = field(default=2_000_000, metadata={"help": "Read at most this much of each text."})
    seconds: float = field(default=1.0, metadata={"help": "Measure each speed for at least this long."})
    output: str | None = field(default=None, metadata={"help": "Folder for tokenizers.md and tokenizers.png."})

    def __post_init__(self) -> None:
        require_count("max_bytes", self.max_bytes)


@dataclass
class Measurement:
    """One tokenizer on one text."""

    tokenizer: str
    vocabulary: int
    text: str
    chars_per_token: float
    bytes_per_token: float
    mb_per_second: float


def main() -> None:
    (args,) = parse_arguments(MeasureArguments, description=__doc__)
    texts = read_texts(args)
    measurements = []
    for folder, name in zip(args.tokenizers, short_names(args.tokenizers), strict=True):
        tokenizer = load_tokenizer(folder)
        for text, documents in texts.items():
            chars_per_token, bytes_per_token, mb_per_second = measure(tokenizer, documents, args.seconds)
            measurements.append(
                Measurement(name, len(tokenizer), text, chars_per_token, bytes_per_token, mb_per_second)
            )
    table = to_markdown(measurements)
    print(table, end="")
    if args.output:
        output = Path(args.output)
        with write_atomically(output / "tokenizers.md") as partial:
            partial.write_text(table, encoding="utf-8")
        plot(measurements, output / "tokenizers.png")


def short_names(folders: list[str]) -> list[str]:
    """Return the part of each path that tells it apart: outputs/a/tokenizer, outputs/b/tokenizer -> a, b."""
    paths = [Path(os.path.abspath(folder)) if Path(folder).is_dir() else Path(folder) for folder in folders]
    parts = [(path.parent if path.name == "tokenizer" and path.parent.name else path).parts for path in paths]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    tails = [each[-depth:] for each in parts]
    while all(len(tail) > 1 for tail in tails) and len({tail[-1] for tail in tails}) == 1:
        tails = [tail[:-1] for tail in tails]
    return ["/".join(tail) for tail in tails]


def read_texts(args: MeasureArguments) -> dict[str, list[str]]:
    """Return name -> documents.

    Raises:
        UserError: An item of `texts` is not NAME=GLOB, or its files hold no text.
    """
    if not args.texts:
        return {name: [text] for name, text in BUILT_IN.items()}
    texts = {}
    for item in args.texts:
        name, separator, pattern = item.partition("=")
        if not separator:
            raise UserError(f"texts: `{item}` is not NAME=GLOB, such as zh=corpus/*.jsonl")
        texts[name] = list(read_documents(pattern, args.text_key, args.max_bytes))
        if not any(texts[name]):
            raise UserError(f"texts: there is no text in {pattern}")
    return texts


def read_documents(pattern: str, text_key: list[str], max_bytes: int) -> Iterator[str]:
    """Yield documents of the files that match a glob, in total at most `max_bytes` of UTF-8."""
    files = find_files([pattern])
    remaining = max_bytes
    with progress_bar(files, desc=pattern, leave=False) as bar:
        for file in files:
            for row in read_rows(file, text_key, bar):
                if row.error:
                    raise UserError(f"{file}:{row.number}: {row.error}")
                data = row.content.encode()[:remaining]
                yield data.decode(errors="ignore")  # the limit may cut a character
                remaining -= len(data)
                if remaining == 0:
                    return


def measure(tokenizer: PreTrainedTokenizerBase, documents: list[str], seconds: float) -> tuple[float, float, float]:
    """Return characters per token, bytes per token and MB/s of encoding, without special tokens."""
    backend = tokenizer.backend_tokenizer
    n_chars = sum(len(document) for document in documents)
    n_bytes = sum(len(document.encode()) for document in documents)

    rounds, start = 0, time.perf_counter()
    while rounds == 0 or time.perf_counter() - start < seconds:
        encodings = backend.encode_batch_fast(documents, add_special_tokens=False)
        rounds += 1
    elapsed = time.perf_counter() - start

    n_tokens = sum(len(encoding) for encoding in encodings)
    return n_chars / n_tokens, n_bytes / n_tokens, rounds * n_bytes / elapsed / 1e6


def to_markdown(measurements: list[Measurement]) -> str:
    """Return the measurements as a Markdown table."""
    header = ["tokenizer", "vocabulary", "text", "characters/token", "bytes/token", "MB/s"]
    rows = []
    for one in measurements:
        figures = [f"{figure:.2f}" for figure in (one.chars_per_token, one.bytes_per_token, one.mb_per_second)]
        rows.append([one.tokenizer, f"{one.vocabulary:,}", one.text, *figures])
    return markdown_table(header, rows, align=["---", "--:", "---", "--:", "--:", "--:"]) + "\n"


def plot(measurements: list[Measurement], path: Path) -> None:
    """Draw bytes per token: one group of bars per text, one bar per tokenizer."""
    texts = list(dict.fromkeys(one.text for one in measurements))
    tokenizers = list(dict.fromkeys(one.tokenizer for one in measurements))
    width = 0.8 / len(tokenizers)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, name in enumerate(tokenizers):
        heights = [one.bytes_per_token for one in measurements if one.tokenizer == name]
        # The bars of a text are centered on its tick.
        centers = [tick - 0.4 + (number + 0.5) * width for tick in range(len(texts))]
        bars = axes.bar(centers, heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(texts)), texts)
    axes.set_ylabel("bytes per token (more is shorter)")
    axes.legend()
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_script(main)
