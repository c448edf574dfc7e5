"""Text to token shards: read, clean, hold out, tokenise, with a manifest of everything that was done.

    python data/prepare_pretrain.py --config data/configs/quickstart.yaml

Reads `.jsonl`, `.json` (an array, or lines), `.parquet`, `.csv` and `.txt` files, each also as `.gz`, and writes

    OUT/train/       token files for pretraining (see buddygpt.data.token_shards)
    OUT/eval/        the same for the held-out documents
    OUT/eval.jsonl   the held-out documents as text, for bits per byte

The work is done in OUT.partial and renamed at its end: a killed run goes on where it stopped, by input file.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from loguru import logger
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from buddygpt.data.text_files import find_files, progress_bar, read_rows
from buddygpt.data.token_shards import FORMAT_VERSION, MANIFEST, tokenizer_fingerprint
from buddygpt.launch import UserError, file_sha256, load_tokenizer, parse_arguments, run_script

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
MAX_SOURCES = 20  # that held-out text is told apart by
MANY_BLANK_LINES = re.compile("\n(?:[ \t\u3000]*\n){3,}")
logger.disable("datatrove")  # it would print a traceback above every one-line error


def clean(text: str) -> str:
    """Return the text with \\n line ends, no control characters, at most two blank lines on end, and bare ends.

    Full-width punctuation and everything else that can be seen stays as it is (no NFC, no NFKC).
    """
    text = CONTROL_CHARACTERS.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return MANY_BLANK_LINES.sub("\n\n\n", text).strip()


@dataclass
class PretrainDataArguments:
    """What to read, how to clean it, and where the shards go."""

    sources: list[str] = field(metadata={"help": "Files or globs of text."})
    tokenizer: str = field(metadata={"help": "Folder or Hub name of a tokenizer."})
    output: str = field(metadata={"help": "The folder to make."})
    text_key: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns; the first that a row has is its text."}
    )
    txt_sample_by: Literal["document", "line"] = field(
        default="document", metadata={"help": "A .txt file is one document, or has one on every line."}
    )
    document_separator: str = field(
        default="<|endoftext|>", metadata={"help": "The token written after every document."}
    )
    min_chars: int = field(default=1, metadata={"help": "Shorter documents are dropped and counted."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of documents held out, chosen by a hash of their text."}
    )
    shuffle_seed: int | None = field(
        default=42, metadata={"help": "Shuffles the documents inside each shard; null keeps their order."}
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "A row that cannot be read stops the run, or is named and counted."}
    )
    tasks: int | None = field(
        default=None, metadata={"help": "Shards to make, each of whole input files; null: one an input file."}
    )
    workers: int = field(default=1, metadata={"help": "Processes, each busy with one shard at a time."})
    batch_size: int = field(default=64, metadata={"help": "Documents tokenised at once, which bounds the memory."})

    def __post_init__(self) -> None:
        for key in ("sources", "text_key"):
            if isinstance(getattr(self, key), str):
                setattr(self, key, [getattr(self, key)])
        for key, allowed in {"txt_sample_by": ("document", "line"), "on_bad_row": ("stop", "skip")}.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is `{getattr(self, key)}`; use {' or '.join(allowed)}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; use a number from 0 to below 1")
        for key in ("tasks", "workers", "batch_size"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; use at least 1")


class TextReader(PipelineStep):
    """Reads every n-th file. datatrove's own readers log rows that they cannot read and go on without them."""

    type, name = "READER", "text"

    def __init__(self, files: list[Path], args: PretrainDataArguments) -> None:
        super().__init__()
        self.files, self.args = files, args

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        files, names = self.files[rank::world_size], source_names(self.files)
        position = rank % self.args.workers
        with progress_bar(files, desc=f"shard {rank + 1}/{world_size}", position=position, leave=False) as bar:
            for file in files:
                for row in read_rows(file, self.args.text_key, bar, self.args.txt_sample_by):
                    self.stat_update("read")
                    if not row.error:
                        yield Document(
                            row.content, id=f"{file}:{row.number}", metadata={"source": str(file), "name": names[file]}
                        )
                    elif self.args.on_bad_row == "skip":
                        self.stat_update("dropped_bad_row")
                        tqdm.write(f"skipped {file}:{row.number}: {row.error}", file=sys.stderr)
                    else:
                        raise UserError(f"{file}:{row.number}: {row.error}. Mend it, or set `on_bad_row: skip`.")


class Cleaner(BaseFilter):
    """Cleans the text and drops what is empty or too short then."""

    name = "clean"

    def __init__(self, min_chars: int) -> None:
        super().__init__()
        self.min_chars = min_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        doc.text = clean(doc.text)
        if len(doc.text) < self.min_chars or not doc.text:
            return False, "too_short" if doc.text else "empty"
        return True


class HoldOut(BaseFilter):
    """Sets documents aside by a hash of their text: the same ones in any order, and copies all on one side."""

    name = "hold out"

    def __init__(self, fraction: float, folder: Path) -> None:
        # A folder for each source, from which a shard is made: they are evaluated one by one.
        writer = JsonlWriter(str(folder), "${name}/${rank}.jsonl", compression=None, adapter=held_out_row)
        super().__init__(exclusion_writer=writer)
        self.fraction = fraction

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        digest = hashlib.sha256(doc.text.encode()).digest()
        return int.from_bytes(digest[:8], "big") >= self.fraction * 2**64 or (False, "held_out")


def held_out_row(writer: JsonlWriter, document: Document) -> dict[str, str]:
    return {"text": document.text, "source": document.metadata["source"]}


def source_names(files: list[Path]) -> dict[Path, str]:
    """Name what held-out text is evaluated by: the input files, or their folders where those are fewer, or all."""
    stems, folders = {file: file.name.split(".")[0] for file in files}, {file: file.parent.name for file in files}
    if len(set(stems.values())) == len(files) <= MAX_SOURCES:
        return stems
    return folders if len(set(folders.values())) <= MAX_SOURCES else dict.fromkeys(files, "all")


class ShardWriter(DocumentTokenizer):
    """Writes ids and counts bytes of text. Nothing that stands in a text becomes a special token."""

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def token_size(self) -> int:
        return token_dtype(self.tokenizer.get_vocab()).itemsize

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        super().run(self._counted(data), rank, world_size)

    def _counted(self, data: Iterator[Document]) -> Iterator[Document]:
        for document in data:
            self.stat_update("written")
            self.stat_update("text_bytes", value=len(document.text.encode()))
            yield document


def token_dtype(vocabulary: dict[str, int]) -> np.dtype:
    """Return the smallest type that holds every id; datatrove goes by their number, which gaps make too small."""
    return np.dtype("<u2" if max(vocabulary.values()) <= np.iinfo(np.uint16).max else "<u4")


def load_text_tokenizer(name_or_path: str, separator: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(name_or_path)
    if separator not in tokenizer.get_added_vocab():
        raise UserError(f"document_separator: `{separator}` is no special token of {name_or_path}. Name one that is")
    return tokenizer


def raw_text_tokenizer(tokenizer: PreTrainedTokenizerBase, separator: str) -> str:
    """Return the tokenizer's JSON with the separator and all that its chat template writes marked as special.

    Text never encodes to special tokens here, and Qwen's `<tool_call>` is one in all but name.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    template = f"{separator} {tokenizer.chat_template}"
    for token in state["added_tokens"]:
        token["special"] |= bool(token["content"].strip()) and token["content"] in template
    return json.dumps(state, ensure_ascii=False)


def make_plan(args: PretrainDataArguments, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return everything that the shards depend on: two equal plans make equal shards."""
    config = {key: value for key, value in asdict(args).items() if key not in ("output", "workers", "batch_size")}
    hashes = tqdm(files, desc="hashing the input", leave=False)
    inputs = [{"file": str(file), "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in hashes]
    return {"config": config, "inputs": inputs, "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}


def is_made_already(output: Path, plan: dict[str, Any]) -> bool:
    """Whether `output` exists, made from this plan; UserError where it is anything else."""
    if not output.exists():
        return False
    try:
        manifest = json.loads((output / "train" / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{output} exists and is no folder of shards; choose another `output`") from error
    changed = [key for key in plan["config"] if manifest["config"].get(key) != plan["config"][key]]
    changed += [key for key in ("inputs", "tokenizer_sha256") if manifest[key] != plan[key]]
    if changed:
        raise UserError(f"{output} was made with other {', '.join(changed)}. Delete it, or choose another `output`.")
    return True


def open_work_folder(work: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or keep it where a run of the same plan was stopped: its finished shards are not made again."""
    text = json.dumps(plan, indent=2, ensure_ascii=False)
    if (work / "plan.json").is_file() and (work / "plan.json").read_text(encoding="utf-8") == text:
        print(f"going on in {work}")
        return
    if work.exists():
        print(f"{work} was left by a run of another config: starting afresh")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / "plan.json").write_text(text, encoding="utf-8")


def write_shards(split: str, files: list[Path], filters: list[BaseFilter], tasks: int, args: Any, work: Path) -> None:
    """Run the files through the filters and into `work/split`, one token file a task."""
    writer = ShardWriter(
        output_folder=str(work / split),
        tokenizer_name_or_path=str(work / "tokenizer.json"),
        eos_token=args.document_separator,
        save_final_metadata=False,
        batch_size=args.batch_size,
        seed=args.shuffle_seed,
        shuffle_documents=args.shuffle_seed is not None,
    )
    steps = [TextReader(files, args), *filters, writer]
    # Its log folder also says which tasks are done. It is safe to keep because the work folder belongs to one plan.
    LocalPipelineExecutor(steps, tasks, min(args.workers, tasks), logging_dir=str(work / "logs" / split)).run()


def read_counts(stats: Path) -> Counter:
    """Return the sums of one task's counters over its steps."""
    counts: Counter = Counter()
    for step in json.loads(stats.read_text(encoding="utf-8")):
        for label, value in step["stats"].items():
            counts[label] += value["total"] if isinstance(value, dict) else value
    return counts


def write_manifest(
    split: str, origins: list[dict[str, Any]], plan: dict[str, Any], tokenizer: PreTrainedTokenizerBase, work: Path
) -> dict[str, Any]:
    """Describe the token files of `work/split` and remove those that stayed empty; return the manifest.

    `origins` says of each task where its documents came from.
    """
    folder, counts = work / split, [read_counts(path) for path in sorted((work / "logs" / split).glob("stats/*.json"))]
    shards = []
    for rank, count in enumerate(counts):
        (file,) = folder.glob(f"{rank:05d}_*.ds")
        if count["written"]:
            sizes = {"tokens": count["tokens"], "documents": count["written"], "text_bytes": count["text_bytes"]}
            shards.append({"file": file.name, **sizes, "sha256": file_sha256(file), **origins[rank]})
        else:
            file.unlink()
            file.with_name(f"{file.name}.index").unlink()
    total = sum(counts, Counter())
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": plan["config"]["tokenizer"],
        "tokenizer_sha256": plan["tokenizer_sha256"],
        "vocab_size": len(tokenizer),
        "dtype": token_dtype(tokenizer.get_vocab()).name,
        "separator": plan["config"]["document_separator"],
        "eos_id": tokenizer.convert_tokens_to_ids(plan["config"]["document_separator"]),
        **{key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "text_bytes")},
        "cleaning": {key: n for key, n in total.items() if key in ("read", "written") or key.startswith("dropped_")},
        "shards": shards,
        "inputs": plan["inputs"],
        "config": plan["config"],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    return manifest


def make_shards(
    args: PretrainDataArguments, files: list[Path], plan: dict, tokenizer: PreTrainedTokenizerBase, work: Path
) -> None:
    """Fill the work folder: train/, and eval/ with eval.jsonl where documents are held out."""
    (work / "tokenizer.json").write_text(raw_text_tokenizer(tokenizer, args.document_separator), encoding="utf-8")
    filters = [Cleaner(args.min_chars), HoldOut(args.eval_fraction, work / "held_out")]
    tasks = min(args.tasks or len(files), len(files))
    write_shards("train", files, filters, tasks, args, work)
    origins = [{"sources": list(map(str, files[rank::tasks]))} for rank in range(tasks)]
    train = write_manifest("train", origins, plan, tokenizer, work)
    if not train["shards"]:
        raise UserError(f"no document is left to train on ({train['cleaning']}); see min_chars and eval_fraction")
    if not args.eval_fraction:
        return
    names = source_names(files)
    parts = [folder for folder in sorted((work / "held_out").glob("*")) if folder.is_dir()]
    texts = [concatenate(sorted(part.glob("*.jsonl")), part.with_name(f"{part.name}.jsonl")) for part in parts]
    if not concatenate(texts, work / "eval.jsonl").stat().st_size:
        raise UserError(
            f"eval_fraction {args.eval_fraction} holds out none of {train['documents']} documents; raise it"
        )
    write_shards("eval", texts, [], len(texts), replace(args, text_key=["text"]), work)
    origins = [
        {"source": part.name, "sources": [str(file) for file in files if names[file] == part.name]} for part in parts
    ]
    write_manifest("eval", origins, plan, tokenizer, work)


def concatenate(parts: list[Path], path: Path) -> Path:
    """Write the files one after another into a new one, and return it."""
    with open(path, "wb") as merged:
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, merged)
    return path


def main() -> None:
    (args,) = parse_arguments(PretrainDataArguments, description=__doc__)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", str(args.workers == 1).lower())
    files = find_files(args.sources)
    tokenizer = load_text_tokenizer(args.tokenizer, args.document_separator)
    plan = make_plan(args, files, tokenizer)
    output = Path(args.output)
    if is_made_already(output, plan):
        print(f"{output} was already made from this config and these files")
        return
    work = output.with_name(f"{output.name}.partial")
    open_work_folder(work, plan)
    make_shards(args, files, plan, tokenizer, work)
    for leftover in ("logs", "held_out"):
        shutil.rmtree(work / leftover, ignore_errors=True)
    for leftover in ("tokenizer.json", "plan.json"):
        (work / leftover).unlink()
    work.rename(output)
    for manifest in sorted(output.glob(f"*/{MANIFEST}")):
        made = json.loads(manifest.read_text(encoding="utf-8"))
        print(f"{manifest.parent}: {made['documents']:,} documents, {made['tokens']:,} tokens; {made['cleaning']}")


if __name__ == "__main__":
    # Classes of __main__ would be pickled by value, locks and all, and the worker processes would hang.
    from buddygpt.data import prepare_pretrain

    run_script(prepare_pretrain.main)
