"""Speed of each cleaning profile, and the share of documents that it drops; or a sample of what its rules remove.

    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --text_key content    # about a minute
    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --quick               # checks that it runs
    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --profiles zh-web --removals all
    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --profiles zh-web --removals remove_sentences

The last two print removals for people to judge: the rule, the place, and what goes between [- and -], with the text
around it (and what comes instead between {+ and +}), or the beginning of a dropped document. A removal that occurs
several times is shown once.

CPU time of one core, without reading and writing. A megabyte is 10^6 bytes of UTF-8.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import islice
from statistics import median

from ab import Report, alternate, cpu_seconds, spread
from datatrove.data import Document
from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.text.clean import FIRST_STEP, PROFILES, Cleaner, load_profile
from buddygpt.data.text.mappers import MAPPERS
from buddygpt.data.text.measures import MEASURES
from buddygpt.data.text.rows import progress_bar, read_rows

AROUND, DROPPED = 60, 400  # characters shown around a change, and of a dropped document


@dataclass
class CleaningArguments:
    files: list[str] = field(metadata={"help": "Files or globs of text."})
    text_key: list[str] = field(default_factory=lambda: ["text", "content"], metadata={"help": "Columns of the text."})
    profiles: list[str] = field(
        default_factory=lambda: sorted(path.stem for path in PROFILES.glob("*.yaml")),
        metadata={"help": "Names or paths of profiles."},
    )
    rounds: int = field(default=5, metadata={"help": "Measurements of each profile."})
    documents: int = field(default=10_000, metadata={"help": "Maximum number of documents."})
    removals: str | None = field(
        default=None, metadata={"help": "Print what this rule of the profiles removes, or `all`; measure nothing."}
    )
    sample: int = field(default=100, metadata={"help": "Maximum number of removals of each rule to print."})
    seed: int = field(default=0, metadata={"help": "Chooses the removals to print."})
    quick: bool = field(default=False, metadata={"help": "One round of few documents; nothing is written."})


class Cleaning:
    """Cleans all documents with one profile and returns the megabytes per CPU second."""

    def __init__(self, profile: str, documents: list[Document]) -> None:
        self.profile, self.documents = load_profile(profile), documents
        self.megabytes = sum(len(document.text.encode()) for document in documents) / 1e6
        self.kept = 0

    def __call__(self) -> float:
        cleaner, documents = Cleaner({"text": self.profile}), copy.deepcopy(self.documents)
        verdicts: list = []
        seconds = cpu_seconds(lambda: verdicts.extend(map(cleaner.filter, documents)))
        self.kept = sum(verdict is True for verdict in verdicts)
        return self.megabytes / seconds


def read_documents(args: CleaningArguments) -> list[Document]:
    files = find_files(args.files)
    with progress_bar(files, desc="reading") as bar:
        rows = ((f"{file}:{row.number}", row) for file in files for row in read_rows(file, args.text_key, bar))
        texts = {place: row.content for place, row in islice(rows, args.documents) if not row.error}
    if not texts:
        raise UserError(f"files: no text in {', '.join(args.files)}; see --text_key")
    return [Document(text, id=place, metadata={"source": "text"}) for place, text in texts.items()]


def find_removals(profile: str, text: str) -> Iterator[tuple[str, str]]:
    """Yield the rule and the text of every change that a profile makes, until it drops the document."""
    for step in (FIRST_STEP, *load_profile(profile).steps):
        if not text.strip():
            return
        if step.operator in MAPPERS:
            before, text = text, MAPPERS[step.operator](text, **step.parameters)
            yield from ((step.operator, change) for change in show_changes(before, text))
        else:
            value = MEASURES[step.operator](text, **step.parameters)
            if rule := step.broken_rule(value):
                yield rule, f"{value} [-{text[:DROPPED]}-]"
                return


def show_changes(before: str, after: str) -> Iterator[str]:
    """Yield each change with the text around it. Lines are compared first, then the characters of changed lines."""
    if before == after:
        return
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    for kind, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        left, right = "".join(old[i:j]), "".join(new[k:m])
        context = "".join(old[max(0, i - 3) : i])
        for edit, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
            if edit == "equal":
                continue
            ahead = (context + left[:a])[-AROUND:]
            shown = f"[-{left[a:b]}-]" if b > a else ""
            shown += f"{{+{right[c:d]}+}}" if d > c else ""
            yield f"…{ahead}{shown}{(left[b:] + ''.join(old[j : j + 3]))[:AROUND]}…"


def print_removals(args: CleaningArguments, documents: list[Document]) -> None:
    """Print a sample of the removals of each rule, or of the one that `args.removals` names."""
    found: dict[str, dict[str, str]] = {}  # rule -> removal -> place
    for document in tqdm(documents, unit="document"):
        for profile in args.profiles:
            for rule, removal in find_removals(profile, document.text):
                found.setdefault(f"{profile} {rule}", {}).setdefault(removal, document.id)
    names = [name for name in sorted(found) if args.removals in ("all", name.split()[1])]
    if not names:
        raise UserError(f"removals: `{args.removals}` removes nothing; these rules do: {', '.join(sorted(found))}")
    for name in names:
        removals = list(found[name].items())
        sample = random.Random(args.seed).sample(removals, min(args.sample, len(removals)))
        print(f"\n{name}: {len(removals):,} different removals, {len(sample):,} shown")
        for removal, place in sample:
            print(f"{place}: {' '.join(removal.split())}")


def main() -> None:
    (args,) = parse_arguments(CleaningArguments, description=__doc__)
    if args.quick:
        args.rounds, args.documents = 1, 50
    documents = read_documents(args)
    if args.removals:
        print_removals(args, documents)
        return
    variants = {name: Cleaning(name, documents) for name in args.profiles}
    with tqdm(total=len(variants) * (args.rounds + 1), unit="run") as progress:
        samples = alternate(variants, args.rounds, progress)
    report = Report("cleaning", ["profile", "MB a second and core", "documents", "dropped"])
    for name, speeds in samples.items():
        dropped = 1 - variants[name].kept / len(documents)
        cells = [name, spread(speeds), f"{len(documents):,}", f"{dropped:.1%}"]
        report.add(cells, name=name, megabytes_per_second=median(speeds), dropped=dropped)
    report.finish(args)


if __name__ == "__main__":
    run_script(main)
