"""Write the manifests and the report after the last task, and move everything to the output folder."""

import json
import shutil
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import FORMAT_VERSION, MANIFEST, SIZES, read_manifest
from buddygpt.data.shards.mixture import collect_requests, resolve_mixture
from buddygpt.data.text.counts import RowCounts, read_counts, sum_counts
from buddygpt.data.text.hold_out import none_held_out
from buddygpt.data.text.pipeline import DocumentReader
from buddygpt.data.text.plan import Plan
from buddygpt.data.text.report import write_report

PUBLISHED = "published"  # folder in WORK with the files that are being moved to an existing OUTPUT


class ManifestWriter(PipelineStep):
    """Writes the manifests, eval.jsonl and the report to WORK/result. In an append round, the old entries come first.

    Args:
        plan: The plan of the run.
        work: Folder with the shards, lists, counts and examples that the tasks wrote.
        output: The folder that the run appends to, if it exists.
    """

    type, name = "WRITER", "manifest"

    def __init__(self, plan: Plan, work: Path, output: Path) -> None:
        super().__init__()
        self.plan, self.work, self.output = plan, work, output

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        # Training shards.
        counts = self._count_rows()
        cleaning = {"cleaning": {source: each.to_json() for source, each in counts.items()}}
        train = self._write_manifest("train", cleaning)
        if not train["shards"]:
            total = sum_counts(counts.values()).to_json()
            raise UserError(f"no document is left to train on ({total}); see `clean` and `eval_fraction`")

        # Held-out documents, as shards and as text.
        fraction = self.plan.config["eval_fraction"]
        if fraction:
            self._write_held_out()
            if not self._write_manifest("eval", {})["shards"]:
                raise none_held_out(fraction, train["documents"])

        # The index of duplicates, which the next append round needs.
        index = self.work / "duplicates" / "index"
        if index.exists():
            index.rename(self.work / "result" / "index")
        write_report(self.work / "result", train, self.work / "examples")

    def _read_lists(self, split: str) -> list[dict[str, Any]]:
        """Return the entries of the shards that the tasks wrote, in the order of the tasks."""
        entries = []
        for path in sorted((self.work / split).glob("*.json")):
            entries.extend(json.loads(path.read_bytes()))
        return entries

    def _old_manifest(self, split: str) -> dict[str, Any]:
        """Return the manifest of the output that the run appends to, or an empty one."""
        if (self.output / split / MANIFEST).exists():
            return read_manifest(self.output / split)
        return {"shards": [], "inputs": [], "generations": [], "cleaning": {}}

    def _write_manifest(self, split: str, facts: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest of `train` or `eval`, with more facts, and return it."""
        plan = self.plan
        old, new_shards = self._old_manifest(split), self._read_lists(split)
        shards = [*old["shards"], *new_shards]
        append_round = {
            "sources": plan.sources,
            "inputs": plan.inputs,
            "config": plan.config,
            "clean": plan.clean,
            "profiles": plan.profiles,
            "exams": plan.benchmarks,
            "tasks": len(plan.assignments),
            "shards": [shard["file"] for shard in new_shards],
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            **plan.tokens,
            **{key: sum(shard[key] for shard in shards) for key in SIZES},
            "sources": self._describe_sources(split, old["generations"], shards),
            **facts,
            "shards": shards,
            "inputs": [*old["inputs"], *plan.inputs],
            "config": plan.config,
            "generations": [*old["generations"], append_round],
        }
        folder = self.work / "result" / split
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        return manifest

    def _describe_sources(
        self, split: str, old_rounds: list[dict[str, Any]], shards: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the manifest's `sources`: sizes, epochs and share of each source."""
        if not shards:
            return []
        requests = collect_requests(old_rounds, self.plan.sources)
        sizes = {name: dict.fromkeys(SIZES, 0) for name in requests}
        for shard in shards:
            for key in SIZES:
                sizes[shard["source"]][key] += shard[key]
        sources = [{"name": name, **request, **sizes[name]} for name, request in requests.items()]
        if split == "train":
            return resolve_mixture(sources, self.plan.config["languages"])
        # Held-out text is read once, whatever mixture was requested for training.
        return resolve_mixture([source | {"epochs": 1, "weight": None} for source in sources if source["tokens"]])

    def _count_rows(self) -> dict[str, RowCounts]:
        """Return the counts of each source, of all append rounds."""
        cleaning = self._old_manifest("train")["cleaning"]
        counts = {source: RowCounts.from_json(labels) for source, labels in cleaning.items()}
        for stage in ("clean", "tokenize"):
            for rank, (source, _) in enumerate(self.plan.assignments):
                total = counts.setdefault(source, RowCounts())
                total.update(read_counts(self.work / "counts" / stage, rank))
        return counts

    def _write_held_out(self) -> None:
        """Write all held-out documents as lines of {"text", "source"}, those of earlier rounds first."""
        with open(self.work / "result" / "eval.jsonl", "wb") as file:
            if (self.output / "eval.jsonl").exists():
                with open(self.output / "eval.jsonl", "rb") as old:
                    shutil.copyfileobj(old, file)
            reader = DocumentReader(self.work / "held_out")
            for rank in range(len(self.plan.assignments)):
                for document in reader.run(rank=rank):
                    row = {"text": document.text, "source": document.metadata["source"]}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


class Publisher(PipelineStep):
    """Moves WORK/result to OUTPUT: as a whole, or, if OUTPUT exists, file by file with [`finish_publishing`]."""

    type, name = "WRITER", "publisher"

    def __init__(self, work: Path, output: Path) -> None:
        super().__init__()
        self.work, self.output = work, output

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        result = self.work / "result"
        if not self.output.exists():
            result.rename(self.output)
        elif result.exists():
            result.rename(self.work / PUBLISHED)
        finish_publishing(self.work, self.output)


def finish_publishing(work: Path, output: Path) -> bool:
    """Move the files in WORK/published to OUTPUT, the manifests last. Return whether there was such a folder.

    Until the last file is moved, OUTPUT is what its old manifest describes. A call after a kill moves the files that
    are left.
    """
    published = work / PUBLISHED
    files = [path for path in published.rglob("*") if path.is_file()]
    # The manifest of `train` is the last file of all: training reads it.
    for file in sorted(files, key=lambda file: (file.name == MANIFEST, file.parent.name == "train", file)):
        target = output / file.relative_to(published)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    return published.exists()
