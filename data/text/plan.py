"""The plan of a run: everything that the shards depend on, fixed before any work starts."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import find_files, write_atomically
from buddygpt.data.shards.format import MANIFEST, read_manifest
from buddygpt.data.shards.mixture import collect_requests, resolve_mixture
from buddygpt.data.text.benchmarks import BENCHMARK_TYPES
from buddygpt.data.text.clean import load_profile
from buddygpt.data.text.hubs import describe_file
from buddygpt.data.text.sources import Source
from buddygpt.data.text.tokenize import TextTokenizer

# Version of the hashes of `steps/ngrams.py` and of what the steps make of them. Work that another version left is not
# resumed, and an index of fingerprints that another version made is refused.
FINGERPRINTS = 3


@dataclass(frozen=True)
class Plan:
    """Plain data. Two equal plans make equal shards.

    Attributes:
        config: The arguments that the shards depend on.
        append_round: 0 for new shards; 1 for the first text appended to them, and so on.
        tasks_before: Number of tasks of all earlier rounds.
        inputs: `file`, `bytes` and `sha256` of the input files that are new in this round.
        assignments: For each task, the name of a source and the files of it to read.
        sources: Requested `language`, `epochs` and `weight` of each source.
        clean: Name of the cleaning profile of each source.
        benchmarks: `file`, `bytes` and `sha256` of the files of benchmarks.
        profiles: Content of each cleaning profile.
        tokens: Facts of the tokenizer for the manifest.
    """

    config: dict[str, Any]
    append_round: int
    tasks_before: int
    inputs: list[dict[str, Any]]
    assignments: list[tuple[str, list[str]]]
    sources: dict[str, dict[str, Any]]
    clean: dict[str, str]
    benchmarks: list[dict[str, Any]]
    profiles: dict[str, dict[str, Any]]
    tokens: dict[str, Any]

    def digest(self) -> str:
        """Return a hash of the plan, for the name of a folder."""
        content = json.dumps([FINGERPRINTS, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def make_plan(
    config: dict[str, Any], sources: list[Source], tokenizer: TextTokenizer, base: dict[str, Any] | None
) -> Plan:
    """Hash the input files, and assign those that are new to tasks.

    Args:
        config: The arguments that the shards depend on.
        sources: The sources that the arguments list.
        tokenizer: The tokenizer that the arguments name.
        base: Manifest of the shards that the run appends to, or None.

    Raises:
        UserError: A file cannot be read, or was changed since an earlier round.
    """
    files = [file for source in sources for file in source.files]
    inputs = [describe_file(file) for file in tqdm(files, desc="hashing the input", leave=False)]
    rounds = base["generations"] if base else []
    if base:
        inputs = _find_new_inputs(inputs, base["inputs"])

    new_files = {entry["file"] for entry in inputs}
    assignments = []
    for source in sources:
        for part in _split_files(source, new_files, config["tasks"]):
            assignments.append((source.name, part))

    profiles = sorted({source.clean for source in sources})
    return Plan(
        config=config,
        append_round=len(rounds),
        tasks_before=sum(each["tasks"] for each in rounds),
        inputs=inputs,
        assignments=assignments,
        sources=list_requests(sources),
        clean={source.name: source.clean for source in sources},
        benchmarks=[describe_file(str(file)) for file in find_files(config["decontaminate"], BENCHMARK_TYPES)],
        profiles={name: _describe_profile(name) for name in profiles},
        tokens=tokenizer.facts,
    )


def _describe_profile(name: str) -> dict[str, Any]:
    """Return the content of a profile, without `max_chars` if it is not set, as in earlier manifests."""
    return {key: value for key, value in asdict(load_profile(name)).items() if value is not None}


def list_requests(sources: list[Source]) -> dict[str, dict[str, Any]]:
    """Return the requested language, epochs and weight of each source."""
    return {
        source.name: {"language": source.language, "epochs": source.epochs, "weight": source.weight}
        for source in sources
    }


def _split_files(source: Source, new_files: set[str], tasks: int | None) -> list[list[str]]:
    """Split the new files of a source into its share of the tasks, at least one. By default each file is a task."""
    files = [file for file in source.files if file in new_files]
    share = round((tasks or len(new_files)) * len(files) / max(len(new_files), 1))
    count = min(len(files), max(1, share))
    return [files[number::count] for number in range(count)]


def _find_new_inputs(inputs: list[dict[str, Any]], known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the input files with content that is not known. Raises UserError if a known file was changed."""
    hashes = {entry["file"]: entry["sha256"] for entry in known}
    for entry in inputs:
        if hashes.get(entry["file"], entry["sha256"]) != entry["sha256"]:
            raise UserError(
                f"{entry['file']} was changed since it was read into the shards; put new text into a new file"
            )
    return [entry for entry in inputs if entry["sha256"] not in hashes.values()]


def check_mixture(sources: list[Source], base: dict[str, Any] | None, languages: dict[str, float] | None) -> None:
    """Raise UserError if the requested mixture is impossible for any amount of text, before any work starts."""
    requests = collect_requests(base["generations"] if base else [], list_requests(sources))
    sizes = {"tokens": 1, "documents": 1, "text_bytes": 1}
    resolve_mixture([{"name": name, **request, **sizes} for name, request in requests.items()], languages)


def check_base(plan: Plan, base: dict[str, Any], output: Path) -> None:
    """Raise UserError if the new text would be prepared with other settings than the existing shards."""
    for key in ("document_separator", "clean", "deduplicate"):
        old, new = base["config"][key], plan.config[key]
        if old != new:
            raise UserError(f"append: {output} was made with `{key}: {old}`, not {new}. Use that, or another `output`")
    for made in base["generations"]:
        for source, name in plan.clean.items():
            if made["clean"].get(source, name) != name:
                raise UserError(f"append: source {source} was made with `clean: {made['clean'][source]}`, not {name}")
        for name, profile in plan.profiles.items():
            if made["profiles"].get(name, profile) != profile:
                raise UserError(f"append: the profile {name} was changed since {output} was made. Restore it")


def is_made_already(output: Path, plan: Plan) -> bool:
    """Return whether `output` exists and was made from this plan. Raises UserError if it is anything else."""
    if not output.exists():
        return False
    if not (output / "train" / MANIFEST).is_file():
        raise UserError(f"{output} exists and is no folder of shards; choose another `output`")
    made = read_manifest(output / "train")
    last_round = made["generations"][-1]
    old = {
        **made["config"],
        "profiles": last_round["profiles"],
        "benchmarks": last_round["exams"],
        "inputs": _by_file(made["inputs"]),
        "tokenizer_sha256": made["tokenizer_sha256"],
    }
    new = {
        **plan.config,
        "profiles": plan.profiles,
        "benchmarks": plan.benchmarks,
        "inputs": _by_file(plan.inputs),
        "tokenizer_sha256": plan.tokens["tokenizer_sha256"],
    }
    changed = [key for key in new if new[key] != old.get(key)]
    if changed:
        raise UserError(
            f"{output} was made with other {', '.join(changed)}. Delete it, choose another `output`, or, if there are "
            "new input files, add them with `--append true`."
        )
    return True


def _by_file(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(inputs, key=lambda entry: entry["file"])


def open_work_folder(partial: Path, plan: Plan, tokenizer: TextTokenizer) -> Path:
    """Return the folder for the work on this plan, below `partial`. Folders of other plans are deleted.

    Worker processes of another plan may still be alive, so each plan has a different folder.
    """
    work = partial / plan.digest()
    for folder in partial.iterdir():
        if folder == work:
            print(f"resuming in {work}")
        elif folder.is_dir():
            print(f"{folder} was left by a run of another config or version: starting from scratch")
            shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(exist_ok=True)
    if not tokenizer_file(work).exists():
        with write_atomically(tokenizer_file(work)) as file:
            file.write_text(tokenizer.state, encoding="utf-8")
    return work


def tokenizer_file(work: Path) -> Path:
    """Return the file that [`open_work_folder`] writes for the tasks that tokenize."""
    return work / "tokenizer.json"
