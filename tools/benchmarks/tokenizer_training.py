"""Tokenizer training compared with three other trainers: compression of held-out text, CPU time and memory.

    pip install sentencepiece==0.2.3 rustbpe==0.1.0    # optional: missing trainers are skipped
    python tools/benchmarks/tokenizer_training.py --folder DATA_DIR           # about 20 minutes
    python tools/benchmarks/tokenizer_training.py --folder DATA_DIR --quick   # checks that it runs

Chinese and English are the files of the folder with zh or en in their names; code is Python's standard library. A
twentieth of the documents, chosen by a hash of the text, is held out. Every trainer runs in one thread of a process
and splits digits: tokenizers and rustbpe work on bytes with our pre-tokenization, sentencepiece has Llama's settings
(byte fallback, no normalization). Our trainer reads at most its default `max_bytes`, the others read everything. Peak
memory is measured from the moment when the text has been read.
"""

import io
import json
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from ab import Report, alternate, spread
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.data.text.rows import progress_bar, read_rows
from buddygpt.tokenizer.byte_level_bpe import PATTERN, SPECIAL_TOKENS, TOOL_TOKENS, train_byte_level_bpe
from buddygpt.tokenizer.train_tokenizer import TokenizerArguments, read_texts

KINDS = ("zh", "en", "code")
Count = Callable[[list[str]], int]  # texts -> number of tokens


@dataclass
class TokenizerTrainingArguments:
    folder: str = field(metadata={"help": "Folder of text files named by language, such as zh_web.jsonl.gz."})
    text_key: list[str] = field(default_factory=lambda: ["text", "content"], metadata={"help": "Columns of the text."})
    vocab_sizes: list[int] = field(default_factory=lambda: [8192, 16384, 32768], metadata={"help": "Entries."})
    rounds: int = field(default=3, metadata={"help": "Times each trainer runs."})
    quick: bool = field(default=False, metadata={"help": "One small vocabulary and little text; nothing is written."})


def read_kind(kind: str, args: TokenizerTrainingArguments) -> list[str]:
    """Return the documents of one kind."""
    if kind == "code":
        library = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "test", "tests", "idle_test"}
        files = [file for file in sorted(library.rglob("*.py")) if not left_out & {*file.relative_to(library).parts}]
        return [file.read_text(encoding="utf-8", errors="ignore") for file in files]
    files = [file for file in sorted(Path(args.folder).glob("*")) if kind in file.name.split(".")[0].split("_")]
    with progress_bar(files, desc=kind) as bar:
        rows = [row for file in files for row in read_rows(file, args.text_key, bar)]
    return [row.content for row in rows if not row.error and row.content]


def write_text(folder: Path, args: TokenizerTrainingArguments) -> None:
    """Write the training text and the held-out text of each kind."""
    for kind in KINDS:
        documents = read_kind(kind, args)[:: 40 if args.quick else 1]
        random.Random(0).shuffle(documents)  # a trainer that reads only a part sees every source
        train, held_out = split_by_hash(documents)
        for name, side in {"train": train, "held_out": held_out}.items():
            if not side:
                raise UserError(f"folder: {args.folder} has too little text for {kind} ({name})")
            (folder / name).mkdir(exist_ok=True)
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in side)
            (folder / name / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def split_by_hash(texts: list[str]) -> tuple[list[str], list[str]]:
    """Return the texts to train on, and about a twentieth of them held out. Equal texts are on the same side."""
    train, held_out = [], []
    for text in texts:
        first_byte = sha256(text.encode()).digest()[0]
        side = held_out if first_byte < 256 // 20 else train
        side.append(text)
    return train, held_out


def train_buddygpt(texts: list[str], vocab_size: int) -> Count:
    limits = TokenizerArguments.min_frequency, TokenizerArguments.max_token_length
    tokenizer = train_byte_level_bpe(texts, vocab_size, *limits)
    return lambda documents: sum(map(len, tokenizer.encode_batch_fast(documents, add_special_tokens=False)))


def train_tokenizers(texts: list[str], vocab_size: int) -> Count:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "special_tokens": SPECIAL_TOKENS + TOOL_TOKENS}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options))
    return lambda documents: sum(map(len, tokenizer.encode_batch_fast(documents, add_special_tokens=False)))


def train_rustbpe(texts: list[str], vocab_size: int) -> Count:
    import rustbpe  # pyright: ignore  optional

    tokenizer = rustbpe.Tokenizer()
    size = vocab_size - len(SPECIAL_TOKENS + TOOL_TOKENS)
    tokenizer.train_from_iterator(iter(texts), vocab_size=size, pattern=PATTERN)
    return lambda documents: sum(map(len, tokenizer.batch_encode(documents)))


def train_sentencepiece(texts: list[str], vocab_size: int) -> Count:
    import sentencepiece  # pyright: ignore  optional

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, user_defined_symbols=["\n"], num_threads=1,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9995,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        max_sentence_length=1 << 30, minloglevel=2,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return lambda documents: sum(map(len, tokenizer.encode(documents)))


TRAINERS = {
    "buddygpt": train_buddygpt,
    "tokenizers": train_tokenizers,
    "rustbpe": train_rustbpe,
    "sentencepiece": train_sentencepiece,
}


def memory(key: str) -> int:
    """Return bytes: `VmRSS` is the current memory, `VmHWM` the peak since the last reset."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def read_all(files: list[Path], max_bytes: int = 1 << 40) -> list[str]:
    return list(read_texts(files, ["text"], max_bytes))


def measure(trainer: str, vocab_size: int, folder: Path) -> dict[str, float]:
    """Train once, in a fresh process, and encode the held-out texts."""
    limit = {"max_bytes": TokenizerArguments.max_bytes} if trainer == "buddygpt" else {}
    texts = read_all(sorted((folder / "train").glob("*.jsonl")), **limit)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    count = TRAINERS[trainer](texts, vocab_size)
    found = {"seconds": time.process_time() - start, "peak_bytes": memory("VmHWM") - before}
    found["text_bytes"] = sum(len(text.encode()) for text in texts)
    for kind in KINDS:
        documents = read_all([folder / "held_out" / f"{kind}.jsonl"])
        found[kind] = sum(len(text.encode()) for text in documents) / count(documents)
    return found


def measure_apart(trainer: str, vocab_size: int, folder: Path) -> dict[str, float]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, trainer, vocab_size, folder).result()


def main() -> None:
    (args,) = parse_arguments(TokenizerTrainingArguments, description=__doc__)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    sizes, rounds = ([8192], 1) if args.quick else (args.vocab_sizes, args.rounds)
    names = [name for name in TRAINERS if name == "buddygpt" or find_spec(name)]
    for name in TRAINERS.keys() - names:
        print(f"{name} is not installed; skipped")
    header = ["entries", "trainer", *(f"bytes a token, {kind}" for kind in KINDS), "worst, against the best"]
    report = Report("tokenizer_training", [*header, "text, MB", "CPU seconds", "to the fastest", "peak MB"])
    with tempfile.TemporaryDirectory() as temporary, tqdm(total=len(sizes) * len(names) * (rounds + 1)) as progress:
        folder = Path(temporary)
        write_text(folder, args)
        for size in sizes:
            ways = {name: lambda name=name, size=size: measure_apart(name, size, folder) for name in names}
            samples = alternate(ways, rounds, progress)
            add_rows(report, size, samples)
    report.finish(args)


def add_rows(report: Report, size: int, samples: dict[str, list[dict[str, float]]]) -> None:
    """Add a row for each trainer with one vocabulary size."""
    best = {kind: max(found[0][kind] for found in samples.values()) for kind in KINDS}
    seconds = {name: [each["seconds"] for each in found] for name, found in samples.items()}
    fastest = min(map(median, seconds.values()))
    for name, found in samples.items():
        figures = [found[0][kind] for kind in KINDS]
        worst = min(figure / best[kind] for kind, figure in zip(KINDS, figures, strict=True)) - 1
        peak, text = median(each["peak_bytes"] for each in found), found[0]["text_bytes"]
        cells = [f"{size:,}", name, *(f"{figure:.3f}" for figure in figures), f"{worst:+.1%}", f"{text / 1e6:.0f}"]
        cells += [spread(seconds[name]), f"{median(seconds[name]) / fastest:.2f}", f"{peak / 1e6:,.0f}"]
        report.add(cells, vocab_size=size, trainer=name, samples=found, worst=worst)


if __name__ == "__main__":
    run_script(main)
