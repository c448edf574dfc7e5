"""Check every stage of a recipe folder before anything long starts; run and write nothing.

    python runs/dry_run.py FOLDER    # the same as: bash runs/recipe.sh FOLDER --dry_run

For each stage: its own script parses its YAML, its files exist or an earlier stage makes them, the model's shape is
possible, its rows are not longer than its positions, and training fits into the memory of the recipe's machine.
recipes/README.md describes the folder.
"""

import contextlib
import importlib.util
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from transformers import PreTrainedConfig

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import ArgumentParser, UserError, did_you_mean, library_errors, reading, run_script
from buddygpt.cli.files import find_files
from buddygpt.cli.tables import markdown_table
from buddygpt.data.text.sources import load_readers
from buddygpt.model.parameters import count_parameters
from buddygpt.model.presets import PRESETS, load_config
from buddygpt.planning.hardware import find_machine
from buddygpt.planning.memory import MemoryPlan, gib
from buddygpt.planning.setups import read_setup, tuned_rows
from buddygpt.training.limits import require_limits

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    """A stage: its script with fixed options, the keys that name what it reads, and the key that names its output."""

    script: str
    options: tuple[str, ...]
    reads: tuple[str, ...]
    writes: str


PRETRAIN = ("train_data", "eval_data", "tokenizer", "model_config", "model_name_or_path")
TUNE = ("train_files", "eval_files", "model_name_or_path", "exams")
STAGES = {  # in the order of runs/recipe.sh
    "sample": Stage("data/sample/make_sample.py", (), (), "output"),
    "tokenizer": Stage("tokenizer/train_tokenizer.py", (), ("files",), "output"),
    "data": Stage("data/prepare_pretrain.py", (), ("sources", "tokenizer", "decontaminate"), "output"),
    "pretrain": Stage("pretrain/pretrain.py", (), PRETRAIN, "output_dir"),
    "anneal_data": Stage("data/prepare_pretrain.py", (), ("sources", "tokenizer", "decontaminate"), "output"),
    "anneal": Stage("pretrain/pretrain.py", (), PRETRAIN, "output_dir"),
    "chat": Stage("data/convert_chat.py", ("--kind", "sft"), ("input", "exams"), "output"),
    "sft": Stage("sft/sft.py", (), TUNE, "output_dir"),
    "pairs": Stage("data/convert_chat.py", ("--kind", "preference"), ("input", "exams"), "output"),
    "dpo": Stage("rlhf/dpo.py", (), TUNE, "output_dir"),
    "exams": Stage("eval/local_exams.py", (), ("cmmlu", "ceval"), "output"),
    "eval": Stage("eval/run_eval.py", (), ("checkpoints", "include_path", "heldout_text", "sample_dir"), "output"),
}
TRAINING = ("pretrain", "anneal", "sft", "dpo")
OTHER_FILES = ("recipe", "accelerate")
KEYS = {  # of recipe.yaml -> whether it is required, and its type
    "name": (True, str),
    "output": (True, str),
    "accelerate_config": (False, str),
    "threads": (False, int),
    "gpu": (False, str),
    "gpus": (False, int),
    "memory": (False, str),
    "hours": (False, float),
    "export": (False, str),
    "needs": (False, list),
}


class Parsed(Exception):
    """Carries what a script has parsed out of its `main`."""


@dataclass
class Check:
    """What is known of a recipe so far.

    Attributes:
        folder: The recipe's.
        settings: Content of recipe.yaml.
        made: Paths that the stages so far make.
        vocabularies: Entries of each tokenizer that a stage makes.
        models: Config of each checkpoint that a stage makes.
        rows: A row of the table per stage.
        measured: Memory of the training stages so far.
        problems: What prevents the recipe from running.
        notes: What could not be checked here.
    """

    folder: Path
    settings: dict[str, Any]
    made: set[str] = field(default_factory=set)
    vocabularies: dict[str, int] = field(default_factory=dict)
    models: dict[str, PreTrainedConfig] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    measured: dict[tuple, MemoryPlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of recipe.yaml.

    Raises:
        UserError: It is absent or damaged, or a key is unknown, absent or of another type.
    """
    path = folder / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"there is no {path}: recipes/README.md describes a recipe folder")
    with reading(path):
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(error) from error
        if not isinstance(settings, dict):
            raise ValueError("not a mapping of keys")
    if isinstance(settings.get("gpu"), int):
        settings["gpu"] = str(settings["gpu"])  # 3090 is a number to YAML
    for key, value in settings.items():
        if key not in KEYS:
            match = did_you_mean(str(key), KEYS)
            raise UserError(f"{path}: unknown key `{key}`" + (f"; did you mean `{match}`?" if match else ""))
        kind = KEYS[key][1]
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{path}: `{key}` is {value!r}; give {kind.__name__}")
    for key, (required, _) in KEYS.items():
        if required and not settings.get(key):
            raise UserError(f"{path} has no `{key}`")
    return settings


def check_names(folder: Path) -> None:
    """Raise UserError if a YAML of the folder belongs to no stage, which is likely a slip."""
    for path in sorted(folder.glob("*.y*ml")):
        known = [f"{name}.yaml" for name in (*STAGES, *OTHER_FILES)]
        if path.name not in known:
            match = did_you_mean(path.name, known)
            raise UserError(
                f"{path} is the config of no stage"
                + (f"; did you mean {match}?" if match else f": {', '.join(known)}")
            )


def parse(stage: Stage, config: Path, more: list[str]) -> tuple[Any, ...]:
    """Return the arguments of a script by its own parser: its `main` runs until it has parsed them."""
    spec = importlib.util.spec_from_file_location(f"dry_run_{Path(stage.script).stem}", ROOT / stage.script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def parse_and_stop(*classes: type, **options: Any) -> None:
        raise Parsed(parse_arguments(*classes, **options))

    module.parse_arguments = parse_and_stop
    words = sys.argv
    sys.argv = [stage.script, *stage.options, "--config", str(config), *more]
    try:
        module.main()
    except Parsed as parsed:
        return parsed.args[0]
    finally:
        sys.argv = words
    raise RuntimeError(f"{stage.script} parses no arguments")


def check_stage(name: str, config: Path, check: Check) -> None:
    """Check one stage, and add what it makes to `check`."""
    stage = STAGES[name]
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    needs_gpu = name in TRAINING and read_hardware(check).get("use_cpu") is False and not has_gpu
    parsed = parse(stage, config, ["--use_cpu", "true"] if needs_gpu else [])
    if needs_gpu and "this machine has no GPU" not in "".join(check.notes):
        check.notes.append("this machine has no GPU: precision and kernels were not checked")
    if name in TRAINING:
        require_limits(*parsed)
    options = {key: value for each in reversed(parsed) for key, value in vars(each).items()}
    with contextlib.redirect_stderr(io.StringIO()):  # notes on skipped files come again in the run
        inputs = [check_input(name, key, value, check) for key in stage.reads for value in as_list(options[key])]
    add_outputs(name, options, check)
    shape = check_shape(name, options, check) if name in TRAINING else ""
    if shape:
        shape += check_memory(name, parsed, check)
    check.rows.append([name, "; ".join(filter(None, inputs)), str(options[stage.writes]), shape])


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def check_input(name: str, key: str, value: Any, check: Check) -> str:
    """Return how an input is there; if it is not, add a problem. An input may be a path, glob, preset or Hub name."""
    if isinstance(value, dict):  # an entry of `sources`
        if value.get("path"):
            return "; ".join(check_input(name, key, each, check) for each in as_list(value["path"]))
        return f"{value.get('reader')} from the Hub"
    if name == "eval" and key == "checkpoints":
        value = value.partition("=")[2]
    path = str(Path(value))
    is_checkpoint = Path(value).name.startswith("checkpoint-") and str(Path(value).parent) in check.models
    if path in check.made or is_checkpoint:
        return ""
    if key == "model_config" and value in PRESETS:
        return f"preset {value}"
    if "://" in value or is_reader(value):
        return f"{value} from the Hub"
    if key in ("tokenizer", "model_name_or_path", "checkpoints") and is_hub_name(value):
        return f"{value} from the Hub"
    if any(path.startswith(f"{made}/") for made in check.made):
        check.problems.append(f"{name}.yaml: {key}: no earlier stage makes {value}")
        return ""
    try:
        files = [Path(value)] if Path(value).is_dir() and key != "sources" else find_files([value])
        return f"{value} ({len(files)} files)" if len(files) > 1 else value
    except UserError as error:
        check.problems.append(f"{name}.yaml: {key}: {error}, and no earlier stage makes it")
        return ""


def is_reader(value: str) -> bool:
    return any(value in (reader.name, reader.hub) for reader in load_readers().values())


def is_hub_name(value: str) -> bool:
    return value.count("/") == 1 and not Path(value.split("/")[0]).exists() and not value.startswith("outputs/")


def add_outputs(name: str, options: dict[str, Any], check: Check) -> None:
    """Add what a stage makes to `check.made`, and the size of a tokenizer."""
    output = str(Path(options[STAGES[name].writes]))
    check.made.add(output)
    if name in ("data", "anneal_data"):
        check.made.add(f"{output}/train")
        if options["eval_fraction"]:
            check.made |= {f"{output}/eval", f"{output}/eval.jsonl"}
    if name in ("chat", "pairs") and options["eval_output"]:
        check.made.add(str(Path(options["eval_output"])))
    if name == "sample":
        kinds = ("sft", "preference")
        check.made |= {f"{output}/{kind}_{part}.jsonl" for kind in kinds for part in ("train", "eval")}
    if name == "tokenizer":
        check.vocabularies[output] = options["vocab_size"]


def check_shape(name: str, options: dict[str, Any], check: Check) -> str:
    """Return the size of the model of a training stage; its rows must not be longer than its positions."""
    config = read_model(name, options, check)
    if config is None:
        return ""
    check.models[str(Path(options["output_dir"]))] = config
    length = options.get("block_size") or options.get("max_length")
    changes = options.get("model_init_kwargs")
    positions = getattr(config, "max_position_embeddings", None)
    if length and positions and length > positions and not changes:
        check.problems.append(
            f"{name}.yaml: rows of {length} tokens are longer than the model's {positions} positions"
        )
    return f"{count_parameters(config).total / 1e6:,.1f}M parameters, rows of {length}"


def check_memory(name: str, parsed: tuple[Any, ...], check: Check) -> str:
    """Return the memory of a training stage on the machine that the recipe names; add a problem if it does not fit."""
    settings, training = check.settings, parsed[1]
    machine = find_machine(settings.get("gpu", "cpu"), settings.get("memory"), settings.get("gpus", 1))
    stage = "pretrain" if name in ("pretrain", "anneal") else name
    setup = read_setup(stage, machine, parsed[0], training, parsed[2] if len(parsed) > 2 else None, zero_stage(check))
    rows = tuned_rows(stage, training)
    key = (rows, setup, count_parameters(check.models[str(Path(training.output_dir))]))
    if key not in check.measured:  # stages of the same shape share it
        config = check.models[str(Path(training.output_dir))]
        with library_errors(f"{name}.yaml: cannot build the model", "Fix its config"):
            check.measured[key] = MemoryPlan(config, setup, machine, rows)
    plan = check.measured[key]
    if not plan.fits:
        check.problems.append(
            f"{name}.yaml: {gib(plan.as_requested.peak)} GiB do not fit into {gib(plan.usable)} GiB of "
            f"{machine.title}; tools/plan.py tells what would"
        )
    return f", {gib(plan.as_requested.peak)} of {gib(plan.usable)} GiB"


def read_hardware(check: Check) -> dict[str, Any]:
    """Return the content of the recipe's hardware file; nothing for a CPU without one."""
    for path in (check.folder / "accelerate.yaml", ROOT / check.settings.get("accelerate_config", "")):
        if path.is_file():
            with reading(path):
                return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    return {}


def zero_stage(check: Check) -> int:
    """Return the ZeRO stage of the recipe's hardware; FSDP counts as 3."""
    content = read_hardware(check)
    if content.get("distributed_type") == "FSDP":
        return 3
    return content.get("deepspeed_config", {}).get("zero_stage", 0)


def read_model(name: str, options: dict[str, Any], check: Check) -> PreTrainedConfig | None:
    """Return the config of the model that a stage trains; None if it is on the Hub."""
    start = options["model_name_or_path"]
    if start:
        for folder in (Path(start), Path(start).parent):  # or one of its checkpoints
            if str(folder) in check.models:
                return check.models[str(folder)]
        return load_config(start) if Path(start).is_dir() else None
    vocab_size = options.get("vocab_size") or count_entries(options["tokenizer"], check)
    try:
        return load_config(options["model_config"], **({} if vocab_size is None else {"vocab_size": vocab_size}))
    except Exception as error:  # transformers raises many kinds for odd configs
        raise UserError(f"{name}.yaml: cannot read model_config {options['model_config']}: {error}") from error


def count_entries(tokenizer: str, check: Check) -> int | None:
    """Return the entries of a tokenizer that a stage makes or that is a folder here; None if it is on the Hub."""
    if str(Path(tokenizer)) in check.vocabularies:
        return check.vocabularies[str(Path(tokenizer))]
    return len(load_tokenizer(tokenizer)) if Path(tokenizer).is_dir() else None


def check_recipe(folder: Path) -> Check:
    """Return what is known of a recipe after all its stages were checked.

    Raises:
        UserError: A YAML has a wrong name or cannot be parsed.
    """
    check = Check(folder, read_settings(folder))
    check_names(folder)
    accelerate = check.settings.get("accelerate_config")
    if accelerate and not (ROOT / accelerate).is_file():
        raise UserError(f"{folder}/recipe.yaml: accelerate_config {accelerate} is not a file")
    configs = {name: folder / f"{name}.yaml" for name in STAGES if (folder / f"{name}.yaml").is_file()}
    if not configs:
        raise UserError(
            f"{folder} has no stage: it needs at least one of {', '.join(f'{name}.yaml' for name in STAGES)}"
        )
    for name, config in configs.items():
        try:
            check_stage(name, config, check)
        except UserError as error:
            raise UserError(str(error) if str(config) in str(error) else f"{config.name}: {error}") from error
    return check


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the recipe folder")
    folder = parser.parse_args().folder
    check = check_recipe(folder)
    print(f"# {check.settings['name']}\n")
    print(markdown_table(["stage", "reads from outside", "writes", "model"], check.rows, ["---"] * 4))
    for need in check.settings.get("needs", []):
        print(f"\nneeds: {need}", end="")
    for note in check.notes:
        print(f"\nnote: {note}", end="")
    print()
    if check.problems:
        raise UserError("; ".join(check.problems))
    print(f"\nEvery stage can run. Start: bash runs/recipe.sh {folder}")


if __name__ == "__main__":
    run_script(main)
