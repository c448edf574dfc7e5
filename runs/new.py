"""Write a recipe folder for your own model, from a machine and hours:

    python runs/new.py mine --gpu 3090 --hours 24                        # public text and chats, downloaded by name
    python runs/new.py mine --gpu cpu --cores 2 --hours 1 --text DIR --chat FILE.jsonl --pairs PAIRS.jsonl
    bash outputs/mine/run.sh --dry_run                                   # checks every stage within a minute
    bash outputs/mine/run.sh                                             # trains; stop and repeat it at any time

The folder holds a YAML for each stage, which you may edit, and a README that explains every number and says what to
expect. The rules are in planning/rules.py. A name without `/` becomes outputs/NAME: everything that is generated goes
there, and git ignores it. What the run writes goes to the same folder.
"""

import argparse
import glob
import itertools
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from buddygpt.cli.errors import ArgumentParser, UserError, run_script
from buddygpt.cli.files import file_type, find_files, require_output, write_atomically
from buddygpt.data.text.rows import is_url, read_rows
from buddygpt.data.text.sources import load_readers
from buddygpt.planning.budget import (
    Budget,
    Plan,
    bytes_of_text,
    choose_run,
    find_speed,
    make_plan,
    relative,
    require_text,
)
from buddygpt.planning.explanation import explain
from buddygpt.planning.hardware import GPUS, Speed, find_machine
from buddygpt.planning.probe import measure_speed
from buddygpt.planning.recipe_files import Inputs, Recipe, recipe_files

ROOT = Path(__file__).resolve().parents[1]
TEXT_KEYS = ["text", "content", "completion"]
CHARACTERS_TO_JUDGE = 20_000

# Public sets by name (data/sources.yaml), for budgets without --text. Above SMALL_RUN tokens, Ultra-FineWeb: each of
# its files holds about 0.5 B tokens, by its size and number of files.
SMALL_RUN = 0.3e9
FILE_TOKENS = 0.45e9
SMALL_SOURCES = [{"reader": "minimind", "path": "hf://jingyaogong/minimind_dataset/pretrain_t2t_mini.jsonl"}]
ULTRA = "hf://openbmb/Ultra-FineWeb/data/ultrafineweb_{language}/ultrafineweb-{language}-part-{number}-of-*.parquet"
ANNEAL = [
    {"reader": "ultra-fineweb-l3", "language": language, "path": f"hf://openbmb/Ultra-FineWeb-L3/data/{folder}"}
    for language, folder in (("zh", "ultrafineweb_zh_l3/qa/*0.parquet"), ("en", "ultrafineweb_en_l3/qa/*00.parquet"))
]
PUBLIC_CHAT = ["hf://jingyaogong/minimind_dataset/sft_t2t_mini.jsonl"]
PUBLIC_PAIRS = ["hf://jingyaogong/minimind_dataset/dpo.jsonl"]


class TextFile(NamedTuple):
    """A file of text: its bytes of text, and the language of its beginning."""

    path: Path
    size: float
    language: str


def read_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("name", help="name of the model, or the path of the folder to write")
    parser.add_argument("--gpu", default="cpu", help=f"cpu, laptop, an Apple chip such as M2, or {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs")
    parser.add_argument("--cores", type=int, help="cores of the CPU; default: all of this machine")
    parser.add_argument("--memory", help="memory of a GPU or of the machine, such as 12GB")
    parser.add_argument("--hours", type=float, required=True, help="hours for everything, from text to evaluation")
    parser.add_argument("--params", help="size of the model, such as 64M; default: what suits the hours")
    parser.add_argument("--vocab_size", type=int, help="entries of the tokenizer; default: what suits the text")
    parser.add_argument("--text", nargs="+", default=[], help="files, folders, or names of data/sources.yaml")
    parser.add_argument("--text_column", nargs="+", default=TEXT_KEYS, help="columns of text; the first found counts")
    parser.add_argument("--chat", nargs="+", default=[], help="files of chats, of any schema of data/convert_chat.py")
    parser.add_argument("--pairs", nargs="+", default=[], help="files of preference pairs")
    parser.add_argument("--languages", help="requested ratio of tokens, such as zh=3,en=1")
    parser.add_argument(
        "--eval_fraction", type=float, help="share of documents to hold out; default: more of less text"
    )
    parser.add_argument("--cmmlu", help="folder of CMMLU, to evaluate on and to keep out of the text")
    parser.add_argument("--ceval", help="folder of C-Eval, likewise")
    parser.add_argument("--mfu", type=float, help="share of the GPU's peak that training reaches; default: measured")
    parser.add_argument("--gflops", type=float, help="GFLOP/s of a core; default: measured on this machine")
    parser.add_argument("--price_per_hour", type=float, help="price of one GPU per hour")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    folder = choose_folder(args.name)
    languages = parse_languages(args.languages)
    require_numbers(args)
    machine = find_machine(args.gpu, args.memory, args.gpus, args.cores)
    for name in ("cmmlu", "ceval"):
        if getattr(args, name) and not Path(getattr(args, name)).is_dir():
            raise UserError(f"--{name} {getattr(args, name)} is not a folder")
    names = [name for name in args.text if is_url(name) or is_reader(name)]
    files = inspect_text([name for name in args.text if name not in names], args.text_column)
    if files and not names:
        local_sources(files, languages)  # refuse languages that no file has before anything is measured

    budget = Budget(
        machine=machine,
        hours=args.hours,
        text_bytes=None if names or not args.text else sum(file.size for file in files),
        chat_bytes=local_bytes(args.chat),
        pair_bytes=local_bytes(args.pairs),
        parameters=parse_size(args.params),
        vocab_size=args.vocab_size,
        mfu=args.mfu,
    )
    if machine.name == "a CPU" and args.gflops is None:
        require_text(budget)
        run = choose_run(budget, find_speed(budget), args.hours * 3600 / 2)
        print("measuring the speed of this CPU: some seconds, more if other programs use it", file=sys.stderr)
        budget = replace(budget, speed=measure_speed(run, machine.count))
    elif machine.kind == "cpu" and args.gflops:
        speed = Speed(args.gflops * 1e9 * machine.count, None, f"{args.gflops:g} GFLOP/s a core, as given (--gflops)")
        budget = replace(budget, speed=speed)
    plan = make_plan(budget)
    require_disk(plan, folder)
    inputs = choose_inputs(args, files, names, languages, plan)
    recipe = Recipe(folder.name, relative(folder, ROOT), machine, args.hours, plan, inputs)
    write_recipe(recipe, folder, args)
    print_summary(recipe, folder)


# --- what is asked for ---


def choose_folder(name: str) -> Path:
    """Return the folder to write: outputs/NAME, or NAME if it is a path.

    Raises:
        UserError: It exists, or cannot be written.
    """
    path = Path(name) if "/" in name else ROOT / "outputs" / name
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", path.name):
        raise UserError(f"name `{name}`: use letters, digits, `-`, `_` and `.`")
    path = path.absolute()
    if path.exists():
        raise UserError(f"{path} exists: give another name, or continue with bash {path}/run.sh")
    require_output(path, "folder")
    return path


def require_numbers(args: argparse.Namespace) -> None:
    for name in ("gflops", "hours", "gpus", "vocab_size", "mfu", "cores", "price_per_hour"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 10**9:
            raise UserError(f"--{name} {value:g}: must be more than 0")
    if args.mfu is not None and args.mfu > 1:
        raise UserError(f"--mfu {args.mfu}: must be a share of the peak, such as 0.4")
    if args.eval_fraction is not None and not 0 < args.eval_fraction < 0.5:
        raise UserError(f"--eval_fraction {args.eval_fraction}: must be a share, such as 0.005")
    if args.vocab_size is not None and args.vocab_size < 512:
        raise UserError(f"--vocab_size {args.vocab_size}: must be at least 512")


def parse_size(text: str | None) -> float | None:
    """Return the number of parameters: "64M" -> 64e6."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmb]?)", text.strip().lower())
    size = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]] if match else 0
    if not 2e5 <= size <= 1e11:
        raise UserError(f"--params {text}: give a size from 0.2M to 100B, such as 64M")
    return size


def parse_languages(text: str | None) -> dict[str, float] | None:
    """Return the ratio: "zh=3,en=1" -> {"zh": 3.0, "en": 1.0}."""
    if text is None:
        return None
    ratio = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]{2,3})\s*=\s*(\d+(?:\.\d+)?)\s*", part)
        if not match or float(match[2]) <= 0:
            raise UserError(f"--languages {text}: write it as zh=3,en=1")
        ratio[match[1]] = float(match[2])
    return ratio


def is_reader(name: str) -> bool:
    return any(name in (reader.name, reader.hub) for reader in load_readers().values())


# --- text ---


def inspect_text(names: list[str], columns: list[str]) -> list[TextFile]:
    """Return the files of text, each with its size and language.

    Raises:
        UserError: There is no such file, or a file has none of the columns.
    """
    found = []
    for path in find_files(names) if names else []:
        size = bytes_of_text(path)
        require_column(path, columns)
        if size:
            found.append(TextFile(path, size, find_language(path, columns)))
    return found


def require_column(path: Path, columns: list[str]) -> None:
    """Raise UserError if the first good row has none of the columns; .txt and .md files have no columns."""
    if file_type(path) in (".txt", ".md"):
        return
    row = next((row for row in itertools.islice(read_rows(path), 100) if not row.error and row.content), None)
    if row and not set(columns) & set(row.content):
        known = ", ".join(row.content)
        raise UserError(f"{path} has no column {' or '.join(columns)}, but {known}. Give --text_column")


def find_language(path: Path, columns: list[str]) -> str:
    """Return "zh" if a tenth of the beginning is Chinese characters, otherwise "en"."""
    text = ""
    for row in read_rows(path, columns, txt_sample_by="line"):
        text += "" if row.error else row.content[:CHARACTERS_TO_JUDGE]
        if len(text) >= CHARACTERS_TO_JUDGE:
            break
    return "zh" if len(re.findall(r"[\u4e00-\u9fff]", text)) > 0.1 * len(text) else "en"


def local_bytes(names: list[str]) -> float | None:
    """Return the bytes of local files; None if there is none, or if one is of a hub."""
    if not names or any(is_url(name) for name in names):
        return None
    return sum(bytes_of_text(path) for path in find_files(names))


def choose_inputs(
    args: argparse.Namespace,
    files: list[TextFile],
    names: list[str],
    languages: dict[str, float] | None,
    plan: Plan,
) -> Inputs:
    """Return what the recipe reads: the user's text and chats, otherwise public ones or the bundled sample."""
    anneal: list[Any] = []
    keys = list(args.text_column)
    if args.text:
        sources, tokenizer_files = local_sources(files, languages)
        sources += names
        tokenizer_files += [name for name in names if is_url(name)]
        if not tokenizer_files:
            raise UserError("--text names public sets only: give a file for the tokenizer, too, or leave --text out")
    else:
        sources, tokenizer_files, anneal = public_sources(plan, languages)
        keys = ["content"] if anneal else ["text"]
    is_public = not args.text
    return Inputs(
        sources=sources,
        tokenizer_files=tokenizer_files,
        text_keys=keys,
        languages=languages,
        anneal_sources=anneal,
        chat=absolute(args.chat) or (PUBLIC_CHAT if is_public else []),
        pairs=absolute(args.pairs) or (PUBLIC_PAIRS if is_public else []),
        eval_fraction=args.eval_fraction or held_out_share(files if args.text and not names else None),
        exams={name: absolute([getattr(args, name)])[0] for name in ("cmmlu", "ceval") if getattr(args, name)},
    )


def held_out_share(files: list[TextFile] | None) -> float:
    """Return the share of documents to hold out: of little text a larger one, so that there is enough to judge by."""
    size = float("inf") if files is None else sum(file.size for file in files)
    return 0.05 if size < 5e6 else 0.01 if size < 50e6 else 0.005


def local_sources(files: list[TextFile], languages: dict[str, float] | None) -> tuple[list[Any], list[str]]:
    """Return entries of `sources` and the files, by absolute path. A ratio of languages needs a source for each."""
    paths = [glob.escape(str(file.path.absolute())) for file in files]
    if not languages:
        return list(paths), paths
    found = {language: [path for path, file in zip(paths, files, strict=True) if file.language == language]
             for language in ("zh", "en")}  # fmt: skip
    for language in languages:
        if not found.get(language):
            raise UserError(
                f"--languages: no file of --text is {language} by its beginning; put each language into files of its "
                "own, or leave --languages out"
            )
    sources = [{"name": name, "path": group, "language": name} for name, group in found.items() if group]
    return sources, paths


def public_sources(plan: Plan, languages: dict[str, float] | None) -> tuple[list[Any], list[str], list[Any]]:
    """Return sources, files for the tokenizer, and sources for annealing, of public sets."""
    if plan.run.tokens < SMALL_RUN and not languages:
        return list(SMALL_SOURCES), [SMALL_SOURCES[0]["path"]], []
    shares = languages or {"zh": 1.0, "en": 1.0}
    sources, tokenizer_files = [], []
    for language, share in shares.items():
        if language not in ("zh", "en"):
            raise UserError(f"--languages: the public sets are zh and en; for {language} give --text")
        count = max(1, round(plan.run.tokens * share / sum(shares.values()) / FILE_TOKENS + 0.5))
        width = {"zh": 3, "en": 4}[language]
        parts = [ULTRA.format(language=language, number=f"{number:0{width}d}") for number in range(1, count + 1)]
        sources.append({"name": language, "reader": "ultra-fineweb", "language": language, "path": parts})
        tokenizer_files.append(parts[0])
    anneal = [source for source in ANNEAL if source["language"] in shares]
    return sources, tokenizer_files, anneal if plan.run.tokens > SMALL_RUN else []


def absolute(names: list[str]) -> list[str]:
    """Return local files by absolute path, and names of hubs as they are."""
    return [name if is_url(name) else str(Path(name).absolute()) for name in names]


# --- what is written ---


def require_disk(plan: Plan, folder: Path) -> None:
    parent = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.disk:
        raise UserError(
            f"the run writes about {plan.disk / 1e9:,.1f} GB, {parent} has {free / 1e9:,.1f} GB free: free some "
            "space, give a path on another disk as NAME, or give fewer hours"
        )


def write_recipe(recipe: Recipe, folder: Path, args: argparse.Namespace) -> None:
    """Write all files of the folder, or none."""
    files = recipe_files(recipe)
    files["README.md"] = explain(recipe, f"python {' '.join(sys.argv)}", args.price_per_hour)
    with write_atomically(folder) as partial:
        partial.mkdir()
        for name, content in files.items():
            (partial / name).write_text(content, encoding="utf-8")


def print_summary(recipe: Recipe, folder: Path) -> None:
    plan, run = recipe.plan, recipe.plan.run
    print(
        f"{folder}: {run.shape.parameters / 1e6:,.1f}M parameters, {run.tokens / 1e6:,.1f}M tokens, about "
        f"{plan.expected_bits:.2f} bits per byte after {recipe.hours:g} h on {recipe.machine.title}"
    )
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"Read {folder}/README.md, check with bash {folder}/run.sh --dry_run, start with bash {folder}/run.sh")


if __name__ == "__main__":
    run_script(main)
