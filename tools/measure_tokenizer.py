"""Compare tokenizers: characters and bytes a token, and speed, on Chinese, English, code and digits.

    python tools/measure_tokenizer.py --tokenizers outputs/quickstart/tokenizer QWEN --output outputs/tokenizers
    python tools/measure_tokenizer.py --tokenizers A B --texts zh=corpus/zh/*.jsonl en=corpus/en/*.txt

More bytes a token mean shorter sequences; the price is the vocabulary. A tokenizer looks better on the kind of text it
was trained on, so compare on text that none of them has seen. The built-in texts are a few lines each: good for
a first look, too short and too repetitive to rank speed.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import PreTrainedTokenizerBase

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
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
    """What to compare, on what, and where to put the result."""

    tokenizers: list[str] = field(metadata={"help": "Tokenizer folders."})
    texts: list[str] = field(default_factory=list, metadata={"help": "NAME=GLOB; the built-in texts if none."})
    text_key: list[str] = field(default_factory=lambda: ["text"], metadata={"help": "Columns that may hold the text."})
    max_bytes: int = field(default=2_000_000, metadata={"help": "Read at most, of each text."})
    seconds: float = field(default=1.0, metadata={"help": "Each speed is taken over at least this time."})
    output: str | None = field(default=None, metadata={"help": "Folder for tokenizers.md and tokenizers.png."})


@dataclass
class Measurement:
    """One tokenizer on one text."""

    tokenizer: str
    vocabulary: int
    text: str
    chars_per_token: float
    bytes_per_token: float
    mb_per_second: float


def read_documents(pattern: str, args: MeasureArguments) -> list[str]:
    """Return documents of the files behind a glob, up to `max_bytes`."""
    documents, left = [], args.max_bytes
    files = find_files([pattern])
    with progress_bar(files, desc=pattern, leave=False) as bar:
        for row_file, row in ((file, row) for file in files for row in read_rows(file, args.text_key, bar)):
            if row.error:
                raise UserError(f"{row_file}:{row.number}: {row.error}")
            data = row.content.encode()[:left]
            documents.append(data.decode(errors="ignore"))
            left -= len(data)
            if not left:
                break
    return documents


def read_texts(args: MeasureArguments) -> dict[str, list[str]]:
    """Return name -> documents; UserError where a text is not NAME=GLOB or holds nothing."""
    texts = {} if args.texts else {name: [text] for name, text in BUILT_IN.items()}
    for item in args.texts:
        name, separator, pattern = item.partition("=")
        if not separator:
            raise UserError(f"texts: `{item}` is not NAME=GLOB, such as zh=corpus/*.jsonl")
        texts[name] = read_documents(pattern, args)
        if not any(texts[name]):
            raise UserError(f"texts: there is no text in {pattern}")
    return texts


def measure(tokenizer: PreTrainedTokenizerBase, documents: list[str], seconds: float) -> tuple[float, float, float]:
    """Return characters a token, bytes a token and MB/s of encoding, with no special tokens added."""
    backend = tokenizer.backend_tokenizer
    characters, size = sum(map(len, documents)), sum(len(text.encode()) for text in documents)
    rounds, start = 0, time.perf_counter()
    while rounds == 0 or time.perf_counter() - start < seconds:
        encoded = backend.encode_batch_fast(documents, add_special_tokens=False)
        rounds += 1
    elapsed = time.perf_counter() - start
    tokens = sum(map(len, encoded))
    return characters / tokens, size / tokens, rounds * size / elapsed / 1e6


def to_markdown(rows: list[Measurement]) -> str:
    lines = ["| tokenizer | vocabulary | text | characters/token | bytes/token | MB/s |", "|---|--:|---|--:|--:|--:|"]
    for row in rows:
        figures = f"{row.chars_per_token:.2f} | {row.bytes_per_token:.2f} | {row.mb_per_second:.2f}"
        lines.append(f"| {row.tokenizer} | {row.vocabulary:,} | {row.text} | {figures} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Measurement], path: Path) -> None:
    """Draw bytes a token, one group of bars a text."""
    texts, tokenizers = list(dict.fromkeys(r.text for r in rows)), list(dict.fromkeys(r.tokenizer for r in rows))
    width = 0.8 / len(tokenizers)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, name in enumerate(tokenizers):
        heights = [row.bytes_per_token for row in rows if row.tokenizer == name]
        bars = axes.bar([x + (i + 0.5) * width - 0.4 for x in range(len(texts))], heights, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(texts)), texts)
    axes.set_ylabel("bytes per token (more is shorter)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    (args,) = parse_arguments(MeasureArguments, description=__doc__)
    texts = read_texts(args)
    rows = []
    for folder in args.tokenizers:
        tokenizer = load_tokenizer(folder)
        for name, documents in texts.items():
            figures = measure(tokenizer, documents, args.seconds)
            rows.append(Measurement(Path(folder).name, len(tokenizer), name, *figures))
    table = to_markdown(rows)
    print(table, end="")
    if args.output:
        output = Path(args.output)
        output.mkdir(parents=True, exist_ok=True)
        (output / "tokenizers.md").write_text(table, encoding="utf-8")
        plot(rows, output / "tokenizers.png")


if __name__ == "__main__":
    run_script(main)
