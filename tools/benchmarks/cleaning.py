"""Speed of each cleaning profile, and the share of documents that it drops.

    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --text_key content    # about a minute
    python tools/benchmarks/cleaning.py --files DATA_DIR/web.jsonl.gz --quick               # checks that it runs

CPU time of one core, without reading and writing. A megabyte is 10^6 bytes of UTF-8.
"""

import copy
from dataclasses import dataclass, field
from itertools import islice
from statistics import median

from ab import Report, alternate, cpu_seconds, spread
from datatrove.data import Document
from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.text.clean import PROFILES, Cleaner, load_profile
from buddygpt.data.text.rows import progress_bar, read_rows


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
        rows = (row for file in files for row in read_rows(file, args.text_key, bar))
        texts = [row.content for row in islice(rows, args.documents) if not row.error]
    if not texts:
        raise UserError(f"files: no text in {', '.join(args.files)}; see --text_key")
    return [Document(text, id=str(i), metadata={"source": "text"}) for i, text in enumerate(texts)]


def main() -> None:
    (args,) = parse_arguments(CleaningArguments, description=__doc__)
    if args.quick:
        args.rounds, args.documents = 1, 50
    documents = read_documents(args)
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
