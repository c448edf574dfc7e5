"""The last steps of data preparation: manifests and report from what the tasks left, and all of it to its place."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from buddygpt.cli.errors import UserError
from buddygpt.data.shards.format import FORMAT_VERSION, MANIFEST, read_manifest
from buddygpt.data.shards.mixture import collect_requests, resolve_mixture
from buddygpt.data.text.pipeline import DocumentReader
from buddygpt.data.text.report import write_report

SIZES = ("tokens", "documents", "text_bytes")
PUBLISHED = "published"  # folder in WORK with what is on its way to OUTPUT
COUNTED = ("read", "written", "dropped_", "changed_", "language_")


class ManifestWriter(PipelineStep):
    """Writes WORK/result: the manifests, eval.jsonl and the report, after what OUTPUT holds where that is added to.

    Args:
        plan: What buddygpt.data.prepare_pretrain makes of the arguments.
        work: Where the tasks left their shards, lists, statistics and examples.
        output: The folder that is added to, if it exists.
    """

    type, name = "WRITER", "manifest"

    def __init__(self, plan: dict[str, Any], work: Path, output: Path) -> None:
        super().__init__()
        self.plan, self.work, self.output = plan, work, output

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        train = self._write_manifest("train", {"cleaning": self._count_rows()})
        if not train["shards"]:
            counts = dict(sum(train["cleaning"].values(), Counter()))
            raise UserError(f"no document is left to train on ({counts}); see `clean` and `eval_fraction`")
        if fraction := self.plan["config"]["eval_fraction"]:
            self._write_held_out()
            if not self._write_manifest("eval", {})["shards"]:
                raise UserError(f"eval_fraction {fraction} holds out none of {train['documents']} documents; raise it")
        if (index := self.work / "duplicates" / "index").exists():
            index.rename(self.work / "result" / "index")
        write_report(self.work / "result", train, self.work / "examples")

    def _read_lists(self, split: str) -> list[dict[str, Any]]:
        """Return what the tasks wrote about their shards."""
        return [
            entry for path in sorted((self.work / split).glob("*.json")) for entry in json.loads(path.read_bytes())
        ]

    def _old_manifest(self, split: str) -> dict[str, Any]:
        """Return the manifest of what is added to; an empty one where that is nothing."""
        if (self.output / split / MANIFEST).exists():
            return read_manifest(self.output / split)
        return {"shards": [], "inputs": [], "generations": [], "cleaning": {}}

    def _write_manifest(self, split: str, facts: dict[str, Any]) -> dict[str, Any]:
        folder, plan = self.work / "result" / split, self.plan
        old, new = self._old_manifest(split), self._read_lists(split)
        shards = [*old["shards"], *new]
        generation = {key: plan[key] for key in ("sources", "inputs", "config", "clean", "profiles", "exams")}
        generation |= {"tasks": len(plan["assignments"]), "shards": [shard["file"] for shard in new]}
        manifest = {
            "format_version": FORMAT_VERSION,
            **plan["tokens"],
            **{key: sum(shard[key] for shard in shards) for key in SIZES},
            "sources": self._describe_sources(split, old["generations"], shards),
            **facts,
            "shards": shards,
            "inputs": [*old["inputs"], *plan["inputs"]],
            "config": plan["config"],
            "generations": [*old["generations"], generation],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
        return manifest

    def _describe_sources(self, split: str, old: list[dict], shards: list[dict]) -> list[dict[str, Any]]:
        """Return the sources with what they hold; held-out text is read once, whatever the mixture."""
        wishes = collect_requests(old, self.plan["sources"])
        sizes = {name: Counter() for name in wishes}
        for shard in shards:
            sizes[shard["source"]].update({key: shard[key] for key in SIZES})
        sources = [{"name": name, **wishes[name], **{key: sizes[name][key] for key in SIZES}} for name in wishes]
        if not shards:
            return []
        if split == "train":
            return resolve_mixture(sources, self.plan["config"]["languages"])
        return resolve_mixture([source | {"epochs": 1, "weight": None} for source in sources if source["tokens"]])

    def _count_rows(self) -> dict[str, Counter]:
        """Return what became of the rows of each source: read, written, and dropped by rule."""
        counts = {name: Counter(rules) for name, rules in self._old_manifest("train")["cleaning"].items()}
        for stage in ("clean", "tokenise"):
            for rank, (source, _) in enumerate(self.plan["assignments"]):
                stats = self.work / "logs" / stage / "stats" / f"{rank:05d}.json"
                counts.setdefault(source, Counter()).update(_read_counts(stats))
        return counts

    def _write_held_out(self) -> None:
        """Write all held-out documents as lines of {"text", "source"}, the new ones after the old."""
        with open(self.work / "result" / "eval.jsonl", "wb") as file:
            if (self.output / "eval.jsonl").exists():
                with open(self.output / "eval.jsonl", "rb") as old:
                    shutil.copyfileobj(old, file)
            for rank in range(len(self.plan["assignments"])):
                for document in DocumentReader(self.work / "held_out").run(rank=rank):
                    row = {"text": document.text, "source": document.metadata["source"]}
                    file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _read_counts(stats: Path) -> Counter:
    """Return the sums of one task's counters over its steps."""
    counts: Counter = Counter()
    for step in json.loads(stats.read_bytes()):
        for label, value in step["stats"].items():
            if label.startswith(COUNTED):
                counts[label] += value["total"] if isinstance(value, dict) else value
    return counts


class Publisher(PipelineStep):
    """Moves WORK/result to OUTPUT: as a whole, or, where that exists, file by file as [`finish_publishing`] does."""

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
    """Move what is to be added to its place, the manifests last; return whether this had begun.

    Until the last file is in its place, OUTPUT is what its old manifest says; what is moved already is not again.
    """
    published = work / PUBLISHED
    files = filter(Path.is_file, published.rglob("*"))
    for file in sorted(files, key=lambda file: (file.name == MANIFEST, file.parent.name == "train", file)):
        place = output / file.relative_to(published)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
    return published.exists()
