"""Prepare text for pretraining: read, clean, decontaminate, deduplicate, hold out, tokenize, and write token shards.

    python data/prepare_pretrain.py --config data/configs/quickstart.yaml
    python data/prepare_pretrain.py --config data/configs/quickstart.yaml --append true   # add new input files

writes

    OUT/train/       token files for pretraining (see buddygpt.data.shards.format)
    OUT/eval/        the same for the held-out documents
    OUT/eval.jsonl   the held-out documents as text, for bits per byte
    OUT/report.md    what cleaning dropped, by rule, with examples

The work is done in OUT.partial, in stages that are split into tasks. Local processes, a Slurm cluster or Ray run the
tasks. A killed run resumes after the last complete task. OUT appears, or changes, when everything is done.
"""

import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output
from buddygpt.data.shards.format import TokenShards, read_manifest
from buddygpt.data.text.clean import Cleaner, load_profile
from buddygpt.data.text.counts import CountWriter
from buddygpt.data.text.hold_out import HoldOutCheck, HoldOutCounter
from buddygpt.data.text.pipeline import DocumentReader, DocumentWriter, Stage, lock, run_stages
from buddygpt.data.text.plan import (
    Plan,
    check_base,
    check_mixture,
    is_made_already,
    make_plan,
    open_work_folder,
    tokenizer_file,
)
from buddygpt.data.text.publish import ManifestWriter, Publisher, finish_publishing
from buddygpt.data.text.readers import SourceReader
from buddygpt.data.text.report import ExampleWriter
from buddygpt.data.text.rows import is_url
from buddygpt.data.text.sources import Source, read_sources
from buddygpt.data.text.tokenize import HoldOut, ShardWriter, read_text_tokenizer

IRRELEVANT_TO_SHARDS = ("output", "append", "executor", "workers", "slurm")


@dataclass
class PretrainDataArguments:
    """What to read, how to clean it, and where to write the shards."""

    sources: list[str] = field(  # or mappings, which only YAML can give
        metadata={"help": "Files or globs of text; in YAML also mappings, see data/README.md."}
    )
    tokenizer: str = field(metadata={"help": "Folder or Hub name of a tokenizer."})
    output: str = field(metadata={"help": "Folder to create."})
    append: bool = field(default=False, metadata={"help": "Add the input files that `output` does not have yet."})
    text_key: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns; the first that a row has is its text."}
    )
    txt_sample_by: Literal["document", "paragraph", "line"] = field(
        default="document",
        metadata={"help": "What is a document in .txt files: a file, a paragraph (between blank lines) or a line."},
    )
    txt_separator: str | None = field(
        default=None,
        metadata={
            "help": "Splits .txt files instead: a regular expression. A line that begins with a match begins a "
            "document, without the match: '={5,}', or '(?=第.{1,9}章)' to keep the headings."
        },
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "Stop at a row that cannot be read, or print, count and skip it."}
    )
    clean: str = field(default="none", metadata={"help": "Name of a profile in data/profiles, or path of another."})
    deduplicate: Literal["none", "exact", "minhash"] = field(
        default="none", metadata={"help": "Duplicates to drop, across all sources: none, exact or near ones."}
    )
    decontaminate: list[str] = field(
        default_factory=list, metadata={"help": "Folders of benchmarks; documents that contain an item are dropped."}
    )
    languages: dict[str, float] | None = field(
        default=None, metadata={"help": "Requested ratio of tokens by language, in YAML: {zh: 3, en: 1}."}
    )
    document_separator: str = field(
        default="<|endoftext|>", metadata={"help": "The token written after every document."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of documents to hold out, chosen by a hash of their text."}
    )
    shuffle_seed: int | None = field(
        default=42, metadata={"help": "Shuffles the documents inside each shard; null keeps their order."}
    )
    shard_bytes: int = field(default=100_000_000, metadata={"help": "Bytes of text after which a new shard starts."})
    batch_chars: int = field(
        default=50_000, metadata={"help": "Characters tokenized at once, which bounds the memory of a process."}
    )
    tasks: int | None = field(
        default=None, metadata={"help": "Number of tasks to split the input files into; null: one per input file."}
    )
    executor: Literal["local", "slurm", "ray"] = field(default="local", metadata={"help": "What runs the tasks."})
    workers: int = field(default=1, metadata={"help": "Number of tasks that run at the same time."})
    slurm: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of SlurmPipelineExecutor, in YAML: {partition: cpu, time: '4:00:00'}."},
    )

    def __post_init__(self) -> None:
        for key in ("sources", "text_key", "decontaminate"):
            if not isinstance(getattr(self, key), list):
                setattr(self, key, [getattr(self, key)])
        try:
            re.compile(self.txt_separator or "")
        except re.error as error:
            raise ValueError(f"txt_separator is `{self.txt_separator}`, no regular expression: {error}") from error
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; use a number from 0 to below 1")
        for key in ("tasks", "workers", "shard_bytes", "batch_chars"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; use at least 1")


def main() -> None:
    (args,) = parse_arguments(PretrainDataArguments, description=__doc__)
    # Several processes would compete if each tokenized with all cores.
    is_one_process = args.executor == "local" and args.workers == 1
    os.environ.setdefault("TOKENIZERS_PARALLELISM", str(is_one_process).lower())

    output = Path(args.output)
    require_output(output)
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists() and not (partial / "lock").is_file():
        raise UserError(f"{partial} exists and is no work folder of this script; choose another `output`")
    try:
        with lock(partial / "lock", wait=False):
            is_done = False
            try:
                is_done = prepare(args, output, partial)
            finally:
                # Keep work that can be resumed, but no folder without any.
                has_work = any(path.is_dir() for path in partial.iterdir())
                if is_done or not has_work:
                    shutil.rmtree(partial)
    except KeyboardInterrupt:
        print(f"stopped; the same command resumes from {partial}", file=sys.stderr)
        raise
    except BlockingIOError as error:
        raise UserError(f"another process is working in {partial}; wait until it ends") from error
    if is_done:
        print_sizes(output)


def prepare(args: PretrainDataArguments, output: Path, partial: Path) -> bool:
    """Create `output`, or append to it. Return False if jobs on a Slurm cluster have yet to do that."""
    # An append that was killed while it moved files to `output` is finished first.
    for work in partial.iterdir():
        if work.is_dir() and finish_publishing(work, output):
            print(f"finished an interrupted append to {output}")

    # Read the sources, the existing shards and the tokenizer.
    defaults = {key: getattr(args, key) for key in ("text_key", "txt_sample_by", "txt_separator", "clean")}
    sources = read_sources(args.sources, **defaults)
    existing = TokenShards(output / "train") if args.append else None
    base = existing.manifest if existing else None
    check_mixture(sources, base, args.languages)
    tokenizer = read_text_tokenizer(args.tokenizer, args.document_separator)
    if existing:
        existing.check_backend(args.tokenizer, tokenizer.state)
        tokenizer.facts["tokenizer_sha256"] = base["tokenizer_sha256"]  # an old manifest keeps its kind of hash

    # Plan the work, and compare the plan with what exists.
    config = {key: value for key, value in asdict(args).items() if key not in IRRELEVANT_TO_SHARDS}
    plan = make_plan(config, sources, tokenizer, base)
    if base:
        check_base(plan, base, output)
        if not plan.inputs:
            print(f"{output} has all these input files already")
            return True
    elif is_made_already(output, plan):
        print(f"{output} was already made from this config and these files")
        return True

    # Run the stages. Tasks that an earlier run of the same plan completed are skipped.
    work = open_work_folder(partial, plan, tokenizer)
    stages = [
        *cleaning_stages(args, sources, plan, work),
        *duplicate_stages(args, plan, work, output),
        *shard_stages(args, plan, work),
        Stage("manifest", [ManifestWriter(plan, work, output)], 1),
        Stage("publish", [Publisher(work, output)], 1),
    ]
    try:
        return run(args, stages, work)
    except UserError:
        # The remedy changes the files or the config, and so the plan, unless a download failed.
        if args.executor != "slurm" and not any(is_url(file) for source in sources for file in source.files):
            shutil.rmtree(work, ignore_errors=True)
        raise


def cleaning_stages(args: PretrainDataArguments, sources: list[Source], plan: Plan, work: Path) -> list[Stage]:
    """Return the stages from the input files to WORK/documents."""
    source_by_name = {source.name: source for source in sources}
    assignments = [(source_by_name[name], tuple(files)) for name, files in plan.assignments]
    profiles = {source.name: load_profile(source.clean) for source in sources}

    # Every filter keeps examples of what it drops, for the report.
    stages = []
    steps = [
        SourceReader(assignments, args.on_bad_row, ExampleWriter(work / "examples" / "read")),
        Cleaner(profiles, ExampleWriter(work / "examples" / "clean")),
    ]
    # Benchmark questions are indexed first, in a separate stage, and looked up after cleaning.
    if args.decontaminate:
        from buddygpt.data.text.steps.decontaminate import BenchmarkIndexer, Decontaminator

        index = work / "benchmarks"
        stages.append(Stage("index", [BenchmarkIndexer(args.decontaminate, index)], 1))
        steps.append(Decontaminator(index, ExampleWriter(work / "examples" / "benchmarks")))

    counts = CountWriter(work / "counts" / "clean", steps)
    if not args.eval_fraction or plan.append_round:
        return [*stages, Stage("clean", [*steps, DocumentWriter(work / "documents"), counts], len(assignments))]

    # Too few documents to hold one out are reported before the long stages.
    held_out = work / "counts" / "held_out"
    steps = [*steps, HoldOutCounter(args.eval_fraction, held_out)]
    stages.append(Stage("clean", [*steps, DocumentWriter(work / "documents"), counts], len(assignments)))
    return [*stages, Stage("check", [HoldOutCheck(args.eval_fraction, held_out)], 1)]


def duplicate_stages(args: PretrainDataArguments, plan: Plan, work: Path, output: Path) -> list[Stage]:
    """Return the stages that find duplicates in WORK/documents: of each other, and of documents in `output`."""
    if args.deduplicate == "none":
        return []
    from buddygpt.data.text.steps import deduplicate

    tasks = len(plan.assignments)
    return deduplicate.duplicate_stages(args.deduplicate, work, tasks, output / "index", plan.tasks_before)


def shard_stages(args: PretrainDataArguments, plan: Plan, work: Path) -> list[Stage]:
    """Return the stages from WORK/documents to WORK/result/train and WORK/result/eval."""

    def make_writer(split: str) -> ShardWriter:
        return ShardWriter(
            folder=work / "result" / split,
            lists=work / split,
            tokenizer=tokenizer_file(work),
            separator=args.document_separator,
            prefix=f"{plan.append_round:02d}",
            shuffle_seed=args.shuffle_seed,
            shard_bytes=args.shard_bytes,
            batch_chars=args.batch_chars,
            dtype=plan.tokens["dtype"],
        )

    # Drop duplicates, hold documents out, and write the others to the training shards.
    steps = []
    if args.deduplicate != "none":
        from buddygpt.data.text.steps.deduplicate import DuplicateFilter

        examples = ExampleWriter(work / "examples" / "duplicates")
        steps.append(DuplicateFilter(args.deduplicate, work, plan.tasks_before, examples))
    if args.eval_fraction:
        steps.append(HoldOut(args.eval_fraction, work / "held_out"))
    steps.append(make_writer("train"))
    counts = CountWriter(work / "counts" / "tokenize", steps)
    tokenize = Stage("tokenize", [DocumentReader(work / "documents"), *steps, counts], len(plan.assignments))
    if not args.eval_fraction:
        return [tokenize]

    # A task of the last stage writes the held-out documents of all tasks of one source.
    tasks_by_source: dict[str, list[int]] = {}
    for task, (source, _) in enumerate(plan.assignments):
        tasks_by_source.setdefault(source, []).append(task)
    held_out = DocumentReader(work / "held_out", list(tasks_by_source.values()))
    return [tokenize, Stage("eval", [held_out, make_writer("eval")], len(tasks_by_source))]


def run(args: PretrainDataArguments, stages: list[Stage], work: Path) -> bool:
    """Run the stages with the chosen executor. Return whether they are complete."""
    if args.executor == "slurm":
        from buddygpt.data.text.steps.slurm_executor import submit_stages

        submit_stages(stages, work, args.workers, args.slurm or {})
        return False
    if args.executor == "ray":
        from buddygpt.data.text.steps.ray_executor import run_stages_on_ray

        run_stages_on_ray(stages, work, args.workers)
    else:
        run_stages(stages, work, args.workers)
    return True


def print_sizes(output: Path) -> None:
    """Print the number of documents and tokens in `output`."""
    for folder in (output / "train", output / "eval"):
        if folder.exists():
            manifest = read_manifest(folder)
            print(f"{folder}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")


if __name__ == "__main__":
    # Run the `main` of the importable module: datatrove would pickle classes of `__main__` by value, locks included,
    # and worker processes would hang.
    from buddygpt.data import prepare_pretrain

    run_script(prepare_pretrain.main)
