"""Text to token shards: read, clean, decontaminate, deduplicate, hold out, tokenise, with a manifest of all that.

    python data/prepare_pretrain.py --config data/configs/quickstart.yaml
    python data/prepare_pretrain.py --config data/configs/quickstart.yaml --append true   # input files that are new

writes

    OUT/train/       token files for pretraining (see buddygpt.data.token_shards)
    OUT/eval/        the same for the held-out documents
    OUT/eval.jsonl   the held-out documents as text, for bits per byte
    OUT/report.md    what cleaning dropped, by rule, with examples

The work is done in OUT.partial, in stages of tasks that local processes, a Slurm cluster or Ray carry out. A killed
run goes on after the last finished task, and OUT appears, or changes, when all is done.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.shards.format import MANIFEST, TokenShards, read_manifest
from buddygpt.data.shards.mixture import achieve_mixture, collect_wishes
from buddygpt.data.text.clean import Cleaner, load_profile
from buddygpt.data.text.pipeline import DocumentReader, DocumentWriter, Stage, lock, run_stages
from buddygpt.data.text.publish import ManifestWriter, Publisher, finish_publishing
from buddygpt.data.text.report import ExampleWriter
from buddygpt.data.text.sources import Source, SourceReader, describe_file, read_sources
from buddygpt.data.text.steps.decontaminate import Decontaminator, ExamIndexer
from buddygpt.data.text.steps.deduplicate import DuplicateFilter, duplicate_stages
from buddygpt.data.text.tokenize import TextTokenizer, read_text_tokenizer
from buddygpt.data.text.write_shards import HoldOut, ShardWriter

MEANS_NOTHING_TO_SHARDS = ("output", "append", "executor", "workers", "slurm")


@dataclass
class PretrainDataArguments:
    """What to read, how to clean it, and where the shards go."""

    sources: list[str] = field(  # or mappings, which come from YAML alone
        metadata={"help": "Files or globs of text; in YAML also mappings, see data/README.md."}
    )
    tokenizer: str = field(metadata={"help": "Folder or Hub name of a tokenizer."})
    output: str = field(metadata={"help": "The folder to make."})
    append: bool = field(default=False, metadata={"help": "Add input files that are new to what `output` holds."})
    text_key: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Columns; the first that a row has is its text."}
    )
    txt_sample_by: Literal["document", "line"] = field(
        default="document", metadata={"help": "A .txt file is one document, or has one on every line."}
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "A row that cannot be read stops the run, or is named and counted."}
    )
    clean: str = field(default="none", metadata={"help": "A profile of data/profiles, or the path of another."})
    deduplicate: Literal["none", "exact", "minhash"] = field(
        default="none", metadata={"help": "Copies to drop, across all sources: none, exact or near ones."}
    )
    decontaminate: list[str] = field(
        default_factory=list, metadata={"help": "Folders of exams; documents that overlap with one are dropped."}
    )
    languages: dict[str, float] | None = field(
        default=None, metadata={"help": "Wanted ratio of the languages' tokens, in YAML: {zh: 3, en: 1}."}
    )
    document_separator: str = field(
        default="<|endoftext|>", metadata={"help": "The token written after every document."}
    )
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Share of documents held out, chosen by a hash of their text."}
    )
    shuffle_seed: int | None = field(
        default=42, metadata={"help": "Shuffles the documents inside each shard; null keeps their order."}
    )
    shard_bytes: int = field(default=100_000_000, metadata={"help": "Text in a shard, after which another begins."})
    batch_chars: int = field(
        default=50_000, metadata={"help": "Characters tokenised at once, which bounds the memory of a process."}
    )
    tasks: int | None = field(
        default=None, metadata={"help": "Parts the input files are dealt to; null: one an input file."}
    )
    executor: Literal["local", "slurm", "ray"] = field(default="local", metadata={"help": "Who does the tasks."})
    workers: int = field(default=1, metadata={"help": "Processes, each busy with one task at a time."})
    slurm: dict[str, Any] | None = field(
        default=None, metadata={"help": "Of SlurmPipelineExecutor, in YAML: {partition: cpu, time: '4:00:00'}."}
    )

    def __post_init__(self) -> None:
        for key in ("sources", "text_key", "decontaminate"):
            if not isinstance(getattr(self, key), list):
                setattr(self, key, [getattr(self, key)])
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction is {self.eval_fraction}; use a number from 0 to below 1")
        for key in ("tasks", "workers", "shard_bytes", "batch_chars"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"{key} is {getattr(self, key)}; use at least 1")


def make_plan(
    args: PretrainDataArguments, sources: list[Source], tokenizer: TextTokenizer, base: dict | None
) -> dict[str, Any]:
    """Return everything that the shards depend on: two equal plans make equal shards.

    Args:
        args: What was asked for.
        sources: What `args.sources` means.
        tokenizer: What `args.tokenizer` means.
        base: The manifest that is added to; the plan leaves the input files that it knows.
    """
    files = [file for source in sources for file in source.files]
    inputs = [describe_file(file) for file in tqdm(files, desc="hashing the input", leave=False)]
    if base:
        inputs = find_new_inputs(inputs, base["inputs"])
    new = {entry["file"] for entry in inputs}
    parts = [(source.name, part) for source in sources for part in split_files(source, new, args.tasks, len(new))]
    return {
        "config": {key: value for key, value in asdict(args).items() if key not in MEANS_NOTHING_TO_SHARDS},
        "generation": len(base["generations"]) if base else 0,
        "tasks_before": sum(generation["tasks"] for generation in base["generations"]) if base else 0,
        "inputs": inputs,
        "assignments": parts,
        "sources": list_wishes(sources),
        "clean": {source.name: source.clean for source in sources},
        "exams": [describe_file(str(file)) for file in find_files(args.decontaminate)],
        "profiles": {name: asdict(load_profile(name)) for name in sorted({source.clean for source in sources})},
        "tokens": tokenizer.facts,
    }


def list_wishes(sources: list[Source]) -> dict[str, dict[str, Any]]:
    """Return what the config says of how its sources are to be read."""
    keys = ("language", "epochs", "weight")
    return {source.name: {key: getattr(source, key) for key in keys} for source in sources}


def split_files(source: Source, new: set[str], tasks: int | None, all_files: int) -> list[list[str]]:
    """Deal the new files of a source to its share of the tasks, at least one; without `tasks`, each has its own."""
    files = [file for file in source.files if file in new]
    count = min(len(files), max(1, round((tasks or all_files) * len(files) / max(all_files, 1))))
    return [files[number::count] for number in range(count)]


def find_new_inputs(inputs: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the input files with content that is not known; UserError where one was changed."""
    hashes = {entry["file"]: entry["sha256"] for entry in known}
    for entry in inputs:
        if hashes.get(entry["file"], entry["sha256"]) != entry["sha256"]:
            raise UserError(
                f"{entry['file']} was changed since it was read into the shards; give what is new in a file of its own"
            )
    return [entry for entry in inputs if entry["sha256"] not in hashes.values()]


def check_mixture(wishes: dict[str, dict], base: dict | None, languages: dict[str, float] | None) -> None:
    """Raise UserError where the mixture is impossible whatever the sources hold: before any work."""
    wishes = collect_wishes(base["generations"] if base else [], wishes)
    sizes = {"tokens": 1, "documents": 1, "text_bytes": 1}
    achieve_mixture([{"name": name, **wish, **sizes} for name, wish in wishes.items()], languages)


def check_base(plan: dict[str, Any], base: dict[str, Any], output: Path) -> None:
    """Raise UserError where what is added would not be of one kind with what is there."""
    for key in ("document_separator", "clean", "deduplicate"):
        was, now = base["config"][key], plan["config"][key]
        if was != now:
            raise UserError(f"append: {output} was made with `{key}: {was}`, not {now}. Use that, or another `output`")
    for made in base["generations"]:
        for source, name in plan["clean"].items():
            if made["clean"].get(source, name) != name:
                raise UserError(f"append: source {source} was made with `clean: {made['clean'][source]}`, not {name}")
        for name, profile in plan["profiles"].items():
            if made["profiles"].get(name, profile) != profile:
                raise UserError(f"append: the profile {name} is not what {output} was made with. Bring it back")


def is_made_already(output: Path, plan: dict[str, Any]) -> bool:
    """Whether `output` exists, made from this plan; UserError where it is anything else."""
    if not output.exists():
        return False
    if not (output / "train" / MANIFEST).is_file():
        raise UserError(f"{output} exists and is no folder of shards; choose another `output`")
    made = read_manifest(output / "train")
    old = made["config"] | {key: made["generations"][-1][key] for key in ("profiles", "exams")}
    new = plan["config"] | {key: plan[key] for key in ("profiles", "exams")}
    for each, inputs, tokens in ((old, made["inputs"], made), (new, plan["inputs"], plan["tokens"])):
        each["inputs"] = sorted(inputs, key=itemgetter("file"))
        each["tokenizer_sha256"] = tokens["tokenizer_sha256"]
    if changed := [key for key in new if new[key] != old.get(key)]:
        raise UserError(
            f"{output} was made with other {', '.join(changed)}. Delete it, choose another `output`, or, where input "
            "files came along, add them with `--append true`."
        )
    return True


def open_work_folder(partial: Path, plan: dict[str, Any], tokenizer: str) -> Path:
    """Return the folder of this plan below `partial`; what a run of another plan has left there is removed.

    Workers of such a run may be alive still: they come back to their own folder, not to this one.
    """
    work = partial / hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    for left in filter(Path.is_dir, partial.iterdir()):
        if left == work:
            print(f"going on in {work}")
        else:
            print(f"{left} was left by a run of another config: starting afresh")
            shutil.rmtree(left, ignore_errors=True)
    work.mkdir(exist_ok=True)
    if not (work / "tokenizer.json").exists():
        (work / "tokenizer.part").write_text(tokenizer, encoding="utf-8")
        (work / "tokenizer.part").rename(work / "tokenizer.json")
    return work


def make_stages(
    args: PretrainDataArguments, sources: list[Source], plan: dict[str, Any], work: Path, output: Path
) -> list[Stage]:
    """Return the stages from input files to `output`; the tasks of all that handle documents are the same."""
    tasks = len(plan["assignments"])
    stages = cleaning_stages(args, sources, plan, work)
    if args.deduplicate != "none":
        stages += duplicate_stages(args.deduplicate, work, tasks, output / "index", plan["tasks_before"])
    stages += shard_stages(args, plan, work)
    stages.append(Stage("manifest", [ManifestWriter(plan, work, output)], 1))
    return [*stages, Stage("publish", [Publisher(work, output)], 1)]


def cleaning_stages(
    args: PretrainDataArguments, sources: list[Source], plan: dict[str, Any], work: Path
) -> list[Stage]:
    """Return the stages from input files to WORK/documents."""
    named = {source.name: source for source in sources}
    assignments = [(named[name], tuple(files)) for name, files in plan["assignments"]]
    profiles = {source.name: load_profile(source.clean) for source in sources}
    examples, exams = work / "examples", work / "exams"
    stages, steps = [], [SourceReader(assignments, args.on_bad_row, ExampleWriter(examples / "read"))]
    steps.append(Cleaner(profiles, ExampleWriter(examples / "clean")))
    if args.decontaminate:
        stages.append(Stage("index", [ExamIndexer(args.decontaminate, exams)], 1))
        steps.append(Decontaminator(exams, ExampleWriter(examples / "exams")))
    return [*stages, Stage("clean", [*steps, DocumentWriter(work / "documents")], len(assignments))]


def shard_stages(args: PretrainDataArguments, plan: dict[str, Any], work: Path) -> list[Stage]:
    """Return the stages from WORK/documents to WORK/result/train, and to WORK/result/eval."""

    def writer(split: str) -> ShardWriter:
        return ShardWriter(
            folder=work / "result" / split,
            lists=work / split,
            tokenizer=work / "tokenizer.json",
            separator=args.document_separator,
            prefix=f"{plan['generation']:02d}",
            shuffle_seed=args.shuffle_seed,
            shard_bytes=args.shard_bytes,
            batch_chars=args.batch_chars,
            dtype=plan["tokens"]["dtype"],
        )

    ranks: dict[str, list[int]] = {}
    for rank, (source, _) in enumerate(plan["assignments"]):
        ranks.setdefault(source, []).append(rank)
    steps = [DocumentReader(work / "documents")]
    if args.deduplicate != "none":
        examples = ExampleWriter(work / "examples" / "duplicates")
        steps.append(DuplicateFilter(args.deduplicate, work, plan["tasks_before"], examples))
    if not args.eval_fraction:
        return [Stage("tokenise", [*steps, writer("train")], len(plan["assignments"]))]
    aside = DocumentReader(work / "held_out", list(ranks.values()))
    steps.append(HoldOut(args.eval_fraction, work / "held_out"))
    tokenise = Stage("tokenise", [*steps, writer("train")], len(plan["assignments"]))
    return [tokenise, Stage("eval", [aside, writer("eval")], len(ranks))]


def prepare(args: PretrainDataArguments, output: Path, partial: Path) -> tuple[list[Stage], Path] | None:
    """Return the stages that make `output`, or add to it, and their work folder; None where all is done."""
    for work in filter(Path.is_dir, partial.iterdir()):
        if finish_publishing(work, output):
            print(f"brought to its place what a stopped run had begun to add to {output}")
    sources = read_sources(args.sources, text_key=args.text_key, txt_sample_by=args.txt_sample_by, clean=args.clean)
    there = TokenShards(output / "train") if args.append else None
    base = there.manifest if there else None
    check_mixture(list_wishes(sources), base, args.languages)
    tokenizer = read_text_tokenizer(args.tokenizer, args.document_separator)
    if there:
        there.check_fingerprint(args.tokenizer, tokenizer.facts["tokenizer_sha256"])
    plan = make_plan(args, sources, tokenizer, base)
    if base:
        check_base(plan, base, output)
        if not plan["inputs"]:
            print(f"{output} holds all these input files already")
            return None
    elif is_made_already(output, plan):
        print(f"{output} was already made from this config and these files")
        return None
    work = open_work_folder(partial, plan, tokenizer.state)
    return make_stages(args, sources, plan, work, output), work


def main() -> None:
    (args,) = parse_arguments(PretrainDataArguments, description=__doc__)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", str(args.executor == "local" and args.workers == 1).lower())
    output, is_done = Path(args.output), False
    partial = output.with_name(f"{output.name}.partial")
    try:
        with lock(partial / "lock", wait=False):
            try:
                prepared = prepare(args, output, partial)
                is_done = not prepared or run_stages(*prepared, args.executor, args.workers, args.slurm or {})
            finally:
                if is_done or not any(map(Path.is_dir, partial.iterdir())):
                    shutil.rmtree(partial)
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with what is done in {partial}", file=sys.stderr)
        raise
    except BlockingIOError as error:
        raise UserError(f"{partial} is being worked on by another process; wait for its end") from error
    for folder in (output / "train", output / "eval") if is_done else ():
        if folder.exists():
            made = read_manifest(folder)
            print(f"{folder}: {made['documents']:,} documents, {made['tokens']:,} tokens")


if __name__ == "__main__":
    # Classes of __main__ would be pickled by value, locks and all, and the worker processes would hang.
    from buddygpt.data import prepare_pretrain

    run_script(prepare_pretrain.main)
