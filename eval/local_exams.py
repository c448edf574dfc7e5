"""Write lm-eval task files that read benchmarks from local files instead of the Hub.

    python eval/local_exams.py --cmmlu DIR --ceval DIR --mmlu DIR --ifeval FILE --output outputs/eval_tasks
    lm_eval --model hf --model_args pretrained=CHECKPOINT,trust_remote_code=True \
        --include_path outputs/eval_tasks --tasks cmmlu,ceval-valid,mmlu,ifeval

Prompts, metrics and task names stay those of lm-eval and of eval/tasks; only the data comes from the files, so nothing
is downloaded. `BENCHMARKS` lists the tasks and the names of the files, eval/README.md their columns. In a folder, the
files are found by these names; a file that you name may have any other, and examples are looked for next to it.
Examples for few-shot never come from the split that is evaluated: without another one, a task is zero-shot.
"""

import importlib.resources
import re
import sys
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks._yaml_loader import load_yaml

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import require_output, write_atomically
from buddygpt.eval.benchmarks.local_rows import read_files

OUR_TASKS = Path(__file__).parent / "tasks"
STOCK_TASKS = Path(str(importlib.resources.files("lm_eval"))) / "tasks"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with a task of lm-eval, or of eval/tasks, or both.

    Attributes:
        option: The option that names its file or folder.
        reader: How a file is read, a key of `buddygpt.eval.benchmarks.local_rows.READERS`.
        files: Split of the task -> pattern of names of files, possibly with {subject}. The first is evaluated.
        task: lm-eval's task file, with {subject} if each subject is a task; None if it has none.
        group: lm-eval's file of the group of all subjects.
        ours: Tasks of eval/tasks over the same rows, whose splits are `test` and `dev`.
        rows_from: The file of eval/tasks that takes the rows from local files.
        source: What to do for lack of the files.
    """

    option: str
    reader: str
    files: dict[str, str]
    task: str | None = None
    group: str | None = None
    ours: tuple[str, ...] = ()
    rows_from: str = "local_rows"
    source: str = "the Hub has it"


def exam(option: str, split: str, pattern: str, task: str, group: str, *ours: str, source: str = "") -> Benchmark:
    """Return a benchmark with a file for each subject in the folders of its splits."""
    files = {name: f"{name}/{pattern.replace('SPLIT', name)}" for name in (split, "dev")}
    return Benchmark(option, option, files, task, group, ours, source=source)


def arc(level: str) -> Benchmark:
    files = {split: f"**/ARC-{level}-{name}.jsonl" for split, name in ARC_SPLITS.items()}
    name = f"arc_{level.lower()}"
    return Benchmark("arc", "arc", files, f"arc/{name}.yaml", ours=(f"{name}_cloze",), source="data.allenai.org/arc")


ARC_SPLITS = {"test": "Test", "validation": "Dev", "train": "Train"}
BENCHMARKS = (
    exam("cmmlu", "test", "{subject}.csv", "cmmlu/cmmlu_{subject}.yaml", "cmmlu/_cmmlu.yaml", "cmmlu_cloze",
         source="github.com/haonan-li/CMMLU"),
    exam("ceval", "val", "{subject}_SPLIT.csv", "ceval/ceval-valid_{subject}.yaml", "ceval/_ceval-valid.yaml",
         "ceval-valid_cloze", "ceval-valid_ppl", "ceval-valid_gen", source="github.com/hkust-nlp/ceval"),
    exam("mmlu", "test", "{subject}_SPLIT.csv", "mmlu/default/mmlu_{subject}.yaml", "mmlu/default/_mmlu.yaml",
         "mmlu_cloze", source="github.com/hendrycks/test"),
    arc("Easy"),
    arc("Challenge"),
    Benchmark("arc", "arc_zh", {"test": "**/zh_test.json*", "validation": "**/zh_validation.json*"},
              "okapi/arc_multilingual/arc_zh.yaml", ours=("arc_zh_cloze",)),
    Benchmark("gpqa", "gpqa", {"train": "gpqa_{subject}.csv"}, "gpqa/zeroshot/gpqa_{subject}_zeroshot.yaml",
              rows_from="local_rows_gpqa",
              source="ask for access at huggingface.co/datasets/Idavidrein/gpqa and unpack its dataset.zip"),
    Benchmark("ifeval", "ifeval", {"train": "*.jsonl"}, "ifeval/ifeval.yaml",
              source="input_data.jsonl of google-research/instruction_following_eval"),
    Benchmark("aime24", "aime", {"train": "*.jsonl"}, "aime/aime24.yaml", source="Maxwell-Jia/AIME_2024 on the Hub"),
    Benchmark("math500", "math", {"test": "*.jsonl"}, "minerva_math/minerva_math500.yaml",
              source="HuggingFaceH4/MATH-500 on the Hub"),
    Benchmark("math500", "math", {"test": "*.jsonl"}, "hendrycks_math/hendrycks_math500.yaml",
              source="HuggingFaceH4/MATH-500 on the Hub"),
    Benchmark("gsm8k", "gsm8k", {"test": "test*.jsonl", "train": "train*.jsonl"}, "gsm8k/gsm8k.yaml",
              source="github.com/openai/grade-school-math"),
    Benchmark("piqa", "piqa", {"validation": "valid.jsonl", "train": "train.jsonl"}, "piqa/piqa.yaml",
              source="valid.jsonl and valid-labels.lst of yonatanbisk.com/piqa"),
    Benchmark("hellaswag", "hellaswag", {"validation": "*val*.jsonl", "train": "*train*.jsonl"},
              "hellaswag/hellaswag.yaml", source="github.com/rowanz/hellaswag"),
    Benchmark("xstorycloze_zh", "xstorycloze", {"eval": "*zh*eval.tsv", "train": "*zh*train.tsv"},
              "xstorycloze/default_zh.yaml", source="juletxara/xstory_cloze on the Hub"),
    Benchmark("zhoblimp", "pairs", {"train": "{subject}.jsonl"}, "zhoblimp/{subject}.yaml",
              "zhoblimp/zhoblimp_group.yaml", source="github.com/sjtu-compling/ZhoBLiMP"),
    Benchmark("blimp", "pairs", {"train": "{subject}.jsonl"}, "blimp/{subject}.yaml", "blimp/_blimp.yaml",
              source="github.com/alexwarstadt/blimp"),
    Benchmark("livecodebench", "livecodebench", {"test": "test{subject}.jsonl"}, ours=("livecodebench",),
              source="livecodebench/code_generation_lite on the Hub"),
    Benchmark("livecodebench_output", "livecodebench_output", {"test": "test{subject}.jsonl"},
              ours=("livecodebench_output",), source="livecodebench/test_generation on the Hub"),
    Benchmark("lambada", "text", {"test": "*test*.jsonl"}, "lambada/lambada_openai.yaml",
              source="EleutherAI/lambada_openai on the Hub"),
)  # fmt: skip
OPTIONS = list(dict.fromkeys(benchmark.option for benchmark in BENCHMARKS))


def describe(option: str) -> str:
    """Return the help of an option: the tasks that it writes, and the files that it reads."""
    of_option = [benchmark for benchmark in BENCHMARKS if benchmark.option == option]
    patterns = ", ".join(dict.fromkeys(pattern for each in of_option for pattern in each.files.values()))
    kind = "Folder" if any("/" in each.files[next(iter(each.files))] for each in of_option) else "File, or folder"
    return f"{kind} of {option}: {patterns}."


BenchmarkArguments = make_dataclass(
    "BenchmarkArguments",
    [
        *((option, str | None, field(default=None, metadata={"help": describe(option)})) for option in OPTIONS),
        (
            "output",
            str,
            field(default="outputs/eval_tasks", metadata={"help": "Folder of task files, for --include_path."}),
        ),
    ],
)


def main() -> None:
    (args,) = parse_arguments(BenchmarkArguments, description=__doc__)
    require_output(Path(args.output), "folder")
    given = {option: Path(getattr(args, option)) for option in OPTIONS if getattr(args, option)}
    if not given:
        raise UserError(f"give the files of a benchmark: {', '.join(f'--{option}' for option in OPTIONS)}.")
    tasks: dict[str, dict[str, Any]] = {}
    for option, path in given.items():
        tasks |= build_option(option, path)
    write_tasks(tasks, Path(args.output))
    print(f"{len(tasks):,} task files -> {args.output}")


def build_option(option: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return lm-eval configurations by file name for the benchmarks of an option, and print what they are.

    Raises:
        UserError: There are no questions, lm-eval does not know a subject, or a row is malformed.
    """
    if not path.exists():
        source = next(benchmark.source for benchmark in BENCHMARKS if benchmark.option == option)
        raise UserError(f"{option}: {path} does not exist; where to get it: {source}.")
    tasks: dict[str, dict[str, Any]] = {}
    for benchmark in (each for each in BENCHMARKS if each.option == option):
        if files := find_files(benchmark, path):
            tasks |= build_tasks(benchmark, files)
    if not tasks:
        patterns = [next(iter(each.files.values())) for each in BENCHMARKS if each.option == option]
        pattern = " or ".join(dict.fromkeys(pattern.replace("{subject}", "*") for pattern in patterns))
        raise UserError(f"{option}: {path} has no {pattern}.")
    return tasks


def find_files(benchmark: Benchmark, path: Path) -> dict[str, dict[str, Path]]:
    """Return subject ("" if there are none) -> split -> file, for subjects with a file of the evaluated split."""
    (split, pattern), *others = benchmark.files.items()
    if path.is_dir():
        folder, found = path, match_files(path, pattern)
    else:
        folder = path.parent
        if "/" in pattern.removeprefix("**/"):
            raise UserError(f"{benchmark.option}: {path} is a file; give the folder that holds {pattern}.")
        subject = re.fullmatch(as_regex(pattern), path.name)
        if benchmark.task and "{subject}" in pattern and not subject:
            raise UserError(f"{benchmark.option}: {path} is not {pattern}, whose name tells its task.")
        found = {subject["subject"] if subject and "{subject}" in pattern else "": path}
    files = {subject: {split: file} for subject, file in found.items()}
    for name, examples in others:
        for subject, file in match_files(folder, examples).items():
            if subject in files and file != files[subject][split]:
                files[subject][name] = file
    return files


def as_regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\{subject\}", "(?P<subject>.*)").replace(r"\*", ".*")


def match_files(folder: Path, pattern: str) -> dict[str, Path]:
    """Return the files of a folder by the subject in their names; what else lies next to them is printed."""
    files = sorted(file for file in folder.glob(pattern.replace("{subject}", "*")) if file.is_file())
    if "{subject}" not in pattern:
        if len(files) > 1:
            raise UserError(f"{folder} has several files {pattern}: {', '.join(map(str, files))}; name one of them.")
        return {"": files[0]} if files else {}
    if files:
        place = files[0].parent
        others = sorted({path.name for path in place.iterdir() if path.name[0] != "."} - {file.name for file in files})
        if others:
            print(
                f"skipped {len(others):,} of {len(files) + len(others):,} files in {place}, whose names are not "
                f"{Path(pattern).name}: {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}",
                file=sys.stderr,
            )
    name = as_regex(Path(pattern).name)
    return {re.fullmatch(name, file.name)["subject"]: file for file in files}


def build_tasks(benchmark: Benchmark, files: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    """Return the configurations of a benchmark by file name: its tasks, their groups, and those of eval/tasks."""
    n_questions = 0
    for of_subject in files.values():
        sizes = [len(read_files(benchmark.reader, str(file))) for file in of_subject.values()]  # checks every row
        n_questions += sizes[0]
    tasks: dict[str, dict[str, Any]] = {}
    for subject, of_subject in files.items() if benchmark.task else ():
        stock = STOCK_TASKS / benchmark.task.format(subject=subject)
        if not stock.is_file():
            first = next(iter(of_subject.values()))
            raise UserError(
                f"{benchmark.option}: {first} is not a subject of this benchmark: lm-eval has no task {stock.stem}."
            )
        config = build_task(benchmark, stock, of_subject)
        tasks[config["task"]] = config
    zero_shot = sum("num_fewshot" in config for config in tasks.values())
    if benchmark.group:
        tasks |= build_groups(STOCK_TASKS / benchmark.group, list(tasks.values()))
    for name in benchmark.ours:
        tasks[name] = build_our_task(name, benchmark, files)
    subjects = f"{len(files):,} subjects ({zero_shot:,} without examples: zero-shot), " if benchmark.group else ""
    names = [
        name.removeprefix("_") for name in tasks if not benchmark.group or name[0] == "_" or name in benchmark.ours
    ]
    print(f"{benchmark.option}: {subjects}{n_questions:,} questions: {', '.join(names)}")
    return tasks


def build_task(benchmark: Benchmark, stock: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Return the configuration of one task: lm-eval's own file, with the data replaced.

    Args:
        benchmark: The benchmark.
        stock: lm-eval's task file.
        files: A file for each split that there is; the first is evaluated.
    """
    of_stock = load_yaml(stock, resolve_func=False)
    config: dict[str, Any] = {
        "include": [str(stock), str(OUR_TASKS / benchmark.rows_from)],
        "task": of_stock["task"],
        "dataset_kwargs": {
            "reader": benchmark.reader,
            "files": {split: str(file.resolve()) for split, file in files.items()},
        },
    }
    evaluated = next(iter(files))
    examples = {of_stock.get(key) for key in ("fewshot_split", "training_split", "validation_split")} - {
        None,
        evaluated,
    }
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if of_stock.get(key) and of_stock[key] not in files:
            config[key] = None
    has_own = "samples" in (of_stock.get("fewshot_config") or {})
    if not (examples & set(files) or has_own):
        config |= {"fewshot_split": None, "num_fewshot": 0}
    return config


def build_groups(stock: Path, tasks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the configurations of a group, and of the groups inside it, by file name, for the given tasks."""
    group = load_yaml(stock, resolve_func=False)["group"]
    by_tag: dict[str, list[str]] = {}
    for task in tasks:
        tag = load_yaml(task["include"][0], resolve_func=False).get("tag", "")
        by_tag.setdefault(tag.removesuffix("_tasks"), []).append(task["task"])
    if list(by_tag) == [""]:
        return {f"_{group}": {"include": str(stock), "task": by_tag[""]}}
    inner = {
        f"_{tag}": {"include": str(stock.with_name(f"_{tag}.yaml")), "task": names} for tag, names in by_tag.items()
    }
    return {f"_{group}": {"include": str(stock), "task": list(by_tag)}} | inner


def build_our_task(name: str, benchmark: Benchmark, files: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """Return the configuration of a task of eval/tasks, with local files by split and subject."""
    task = OUR_TASKS / f"{name}.yaml"
    evaluated = next(iter(benchmark.files))
    splits = {"test": evaluated, "dev": "dev" if "dev" in benchmark.files else "validation"}
    by_split = {
        ours: {subject: str(of[split].resolve()) for subject, of in files.items() if split in of}
        for ours, split in splits.items()
    }
    settings = load_yaml(task, resolve_func=False).get("dataset_kwargs", {})
    config = {"include": str(task), "task": name, "dataset_kwargs": settings | {"files": by_split}}
    return config if by_split["dev"] else config | {"num_fewshot": 0}


def write_tasks(tasks: dict[str, dict[str, Any]], output: Path) -> None:
    """Write each configuration to `output`/NAME.yaml."""
    for name, config in tasks.items():
        with write_atomically(output / f"{name}.yaml") as partial:
            partial.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
