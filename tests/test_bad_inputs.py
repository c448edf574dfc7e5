"""Every command refuses bad input with exit status 2 and one line `error: ...`, and leaves every file as it was.

Each case runs a command in a forked child (bad_inputs.py) on inputs that bad_files.py makes. The recipes have a
table of their own in tests/training.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bad_files
import pytest
from bad_inputs import Outcome, assert_refused, import_modules_of, run_command

pytestmark = pytest.mark.slow

COMMANDS: dict[str, dict[str, str]] = {  # arguments that are right
    "data/convert_chat.py": {"input": "{good}/chat.jsonl", "output": "{out}/o.jsonl"},
    "data/prepare_pretrain.py": {
        "sources": "{good}/documents.jsonl",
        "tokenizer": "{good}/tokenizer",
        "output": "{out}/o",
    },
    "data/sample/make_sample.py": {"output": "{out}/o"},
    "eval/compare.py": {"results": "{good}/results", "output": "{out}/o.md"},
    "eval/judge.py": {
        "a": "{good}/results",
        "b": "{good}/results",
        "model": "a",
        "url": "http://127.0.0.1:9/v1",
        "output": "{out}/o",
    },
    "eval/local_exams.py": {"cmmlu": "{good}/cmmlu", "output": "{out}/o"},
    "eval/long_context.py": {
        "checkpoints": "a={good}/checkpoint",
        "text": "{good}/documents.jsonl",
        "length": "64",
        "needles": "0",
        "output": "{out}/o",
    },
    "eval/report.py": {"results": "{good}/results", "output": "{out}/o.md"},
    "eval/run_eval.py": {"checkpoints": "a={good}/checkpoint", "tasks": "heldout_text", "output": "{out}/o"},
    "eval/speed.py": {"checkpoints": "a={good}/checkpoint", "lengths": "4", "rounds": "1", "output": "{out}/o"},
    "export/from_native.py": {"checkpoint": "{good}/native", "output": "{out}/o"},
    "export/to_native.py": {"checkpoint": "{good}/checkpoint", "output": "{out}/o"},
    "runs/ask.py": {"model": "{good}/native", "questions": "a", "output": "{out}/o.json"},
    "runs/summarize.py": {"run": "{out}/run"},
    "tokenizer/train_tokenizer.py": {"files": "{good}/documents.jsonl", "output": "{out}/o", "vocab_size": "400"},
    "tools/measure_tokenizer.py": {"tokenizers": "{good}/tokenizer", "output": "{out}/o", "seconds": "0.01"},
    "tools/plan.py": {"model_config": "debug", "memory": "12GB", "block_size": "16"},
    "tools/prune_vocabulary.py": {
        "tokenizer": "{good}/tokenizer",
        "files": "{good}/documents.jsonl",
        "output": "{out}/o",
        "vocab_size": "300",
    },
    "tools/store_teacher.py": {
        "teacher": "{good}/checkpoint",
        "train_files": "{good}/chat.jsonl",
        "max_length": "64",
        "output": "{out}/o",
    },
    "tools/to_gguf.py": {"checkpoint": "{good}/native", "output": "{out}/o"},
}
OTHERS = (
    "data/doctor.py",
    "data/inspect_shards.py",
    "export/publish.py",
    "runs/dry_run.py",
    "buddygpt.check",
    "buddygpt.model.parameters",
)
LOADING = {  # commands that load a model, with their arguments for the checkpoint {out}/c, and what it is a copy of
    "export/to_native.py": (["--checkpoint", "{out}/c", "--output", "{out}/o"], "checkpoint"),
    "export/from_native.py": (["--checkpoint", "{out}/c", "--output", "{out}/o"], "native"),
    "tools/store_teacher.py": (
        ["--teacher", "{out}/c", "--train_files", "{good}/chat.jsonl", "--max_length", "64", "--output", "{out}/o"],
        "checkpoint",
    ),
    "tools/to_gguf.py": (["--checkpoint", "{out}/c", "--output", "{out}/o"], "native"),
    "eval/run_eval.py": (
        ["--checkpoints", "a={out}/c", "--tasks", "heldout_text", "--output", "{out}/o"],
        "checkpoint",
    ),
    "eval/long_context.py": (
        ["--checkpoints", "a={out}/c", "--text", "{good}/documents.jsonl", "--length", "64", "--output", "{out}/o"],
        "checkpoint",
    ),
    "buddygpt.check": (["{out}/c", "--only", "causality"], "checkpoint"),
}
READING = {  # commands that read the config of a model
    "tools/plan.py": (["--model_config", "{out}/c", "--memory", "12GB", "--block_size", "16"], "native"),
    "buddygpt.model.parameters": (["{out}/c"], "checkpoint"),
}
TOKENIZING = {  # commands that read a tokenizer
    "data/doctor.py": (["{good}/chat.jsonl", "--tokenizer", "{out}/c"], "tokenizer"),
    "data/convert_chat.py": (["--input", "{good}/chat.jsonl", "--output", "{out}/o", "--tokenizer", "{out}/c"],
                             "tokenizer"),
    "data/prepare_pretrain.py": (["--sources", "{good}/documents.jsonl", "--output", "{out}/o", "--tokenizer",
                                  "{out}/c"], "tokenizer"),
    "tools/measure_tokenizer.py": (["--tokenizers", "{out}/c", "--seconds", "0.01"], "tokenizer"),
    "data/inspect_shards.py": (["{good}/shards", "--block", "0", "--block_size", "16", "--tokenizer", "{out}/c"],
                               "tokenizer"),
}  # fmt: skip
ODD: list[Any] = [None, [], {}, "x", -1, [None], True, 1e400, 10**30, "<b>|x\n", {"a": {}}]


class Case(NamedTuple):
    """A command with bad input. `may_work`: the input is odd, and a command may also make something of it."""

    script: str
    words: list[str]
    setup: Callable[[Path, Path], object] | None = None  # gets the folders of good inputs and of this case
    may_work: bool = False


CASES: dict[str, Case] = {}


def add(name: str, case: Case) -> None:
    number = sum(other.partition("#")[0] == name for other in CASES)
    CASES[f"{name}#{number}" if number else name] = case


def write_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("old")


def words(script: str, **changed: str) -> list[str]:
    """Return the right arguments of a command with some replaced."""
    return [word for key, value in {**COMMANDS[script], **changed}.items() for word in (f"--{key}", value)]


# --- arguments ---

PLACES = {"folder": "{bad}/folder", "long name": "n" * 300, "below a file": "{bad}/file/a", "loop": "{bad}/loop",
          "device": "/dev/zero"}  # fmt: skip
for script in COMMANDS:
    kinds = bad_files.BAD_YAML if script == "eval/report.py" else ("list", "large")
    for kind in kinds:
        add(f"{script} config {kind}", Case(script, ["--config", f"{{bad}}/{kind}.yaml"]))
    for kind, place in PLACES.items():
        add(f"{script} config {kind}", Case(script, ["--config", place]))
    for word in ("--nosuch", "stray"):
        add(f"{script} {word}", Case(script, [*words(script), word]))
    if "output" in COMMANDS[script]:
        outputs = {
            "below a file": "{bad}/file/o",
            "in a loop": "{bad}/loop/o",
            "loop": "{bad}/loop",
            "dangling": "{bad}/dangling",
            "below dangling": "{bad}/dangling/o",
            "pipe": "{bad}/pipe",
            "long name": "{out}/" + "n" * 300,
            "empty": "",
            "unwritable": "/proc/nosuch/o",
            "root": "/",
            "other kind": "{bad}/folder" if Path(COMMANDS[script]["output"]).suffix else "{bad}/file",
        }
        if script == "tools/measure_tokenizer.py":
            del outputs["empty"]  # it writes no file then
        for kind, place in outputs.items():
            add(f"{script} output {kind}", Case(script, words(script, output=place)))
file_of_model = Case("eval/run_eval.py", words("eval/run_eval.py"), lambda good, out: write_file(out / "o" / "a"))
add("eval/run_eval.py output/NAME a file", file_of_model)
for script in OTHERS:
    for word in ("--nosuch", "--vocab_size=x", "--max_length=x", "--block=x", "--only=x"):
        add(f"{script} {word}", Case(script, ["{good}/chat.jsonl", word]))
    for kind, place in PLACES.items():
        add(f"{script} {kind}", Case(script, [place]))

NUMBERS = {
    "data/convert_chat.py": {"eval_fraction": ("-1", "1", "nan", "x"), "schema": ("nosuch",)},
    "data/prepare_pretrain.py": {
        "eval_fraction": ("-1", "1", "nan"),
        "workers": ("0", "-1", "x", "nan"),
        "tasks": ("0", "-1"),
        "shard_bytes": ("0", "-1", "1.5"),
        "batch_chars": ("0",),
        "sources": ("", "n" * 300, "ms://..", "ms://../a", "ms://", "hf://x", "hf://datasets/../..", "{bad}/pipe"),
        "tokenizer": ("", "..", "n" * 300, "{bad}/file", "ms://.."),
        "clean": ("nosuch", "../nosuch", "{bad}/folder", "{bad}/list.yaml", "{bad}/binary.yaml"),
    },
    "eval/long_context.py": {
        "checkpoints": ("x", "a={bad}/folder", "a b\n={good}/checkpoint"),
        "text": ("", "n" * 300, "{bad}/file", "{bad}/folder", "{good}/chat.jsonl"),
        "length": ("0", "-1", "100", "1000000008", "x", "1e9"),
        "needles": ("-1", "x", "100000"),
        "needle_lengths": ("0", "-1", "65", "x"),
        "untrained": ("nosuch",),
        "max_tokens": ("0", "x"),
        "device": ("nosuch",),
        "dtype": ("int8",),
    },
    "eval/run_eval.py": {
        "limit": ("0", "-1", "x"),
        "num_fewshot": ("-1",),
        "batch_size": ("0", "-1", "x"),
        "device": ("nosuch", "cuda:99"),
        "dtype": ("nosuch", "int8"),
        "checkpoints": ("..={good}/checkpoint", "a/b={good}/checkpoint", "a", "={good}/checkpoint", "a={bad}/loop"),
        "minutes": ("0", "-1", "nan", "inf", "x"),
        "suite": ("tiny", "nosuch"),  # besides tasks
        "gen_kwargs": ("nosuch=1", "max_gen_toks=0", "{", "temperature=nan"),
        "every_checkpoint": ("a", "b"),
    },
    "eval/speed.py": {
        "checkpoints": ("x", "a={bad}/folder", "a=http://localhost/v1"),
        "batch_sizes": ("0", "-1", "x"),
        "lengths": ("0", "x", "64"),
        "new_tokens": ("1", "100"),
        "rounds": ("0",),
        "device": ("nosuch",),
        "dtype": ("int8",),
    },
    "tokenizer/train_tokenizer.py": {
        "vocab_size": ("0", "-1", "9" * 30),
        "max_bytes": ("0", "-1"),
        "min_frequency": ("-1", "9" * 30),
        "max_token_length": ("0", "-1", "9" * 30),
        "model_max_length": ("0", "-1"),
        "files": ("", "n" * 300, "{bad}/pipe", "{bad}/loop"),
    },
    "tools/measure_tokenizer.py": {"seconds": ("nan", "inf"), "max_bytes": ("0", "-1"), "texts": ("a", "a=", "=")},
    "tools/prune_vocabulary.py": {"vocab_size": ("0", "-1"), "max_bytes": ("0", "-1")},
    "tools/plan.py": {
        "per_device_train_batch_size": ("0", "-4"),
        "gpus": ("0", "1.5", "nan"),
        "hours": ("nan", "0", "-1", "inf"),
        "memory": ("0GB", "x", "-1GB"),
        "block_size": ("0", "-1"),
        "mfu": ("0", "2", "nan"),
        "accelerate_config": ("{bad}/list.yaml", "{bad}/folder", "{bad}/binary.yaml", "{bad}/large.yaml", "/dev/zero"),
    },
    "eval/local_exams.py": {"cmmlu": ("{bad}/folder", "{bad}/file", "{bad}/loop", "n" * 300)},
    "eval/compare.py": {"results": ("{bad}/folder", "{bad}/file", "a={bad}/loop", "a=" + "n" * 300)},
    "eval/judge.py": {
        "a": ("{bad}/folder", "{bad}/file", "{bad}/loop", "n" * 300),
        "url": ("", "localhost", "file:///etc/passwd"),
        "workers": ("0", "x"),
    },
    "eval/report.py": {
        "results": ("{bad}/folder", "{bad}/file", "{bad}/loop", "n" * 300),
        "shards": ("{bad}/folder", "{bad}/file"),
    },
    "runs/summarize.py": {"run": ("{bad}/folder", "{bad}/file", "{bad}/loop", "n" * 300, "")},
    "runs/ask.py": {"model": ("{bad}/folder", "{bad}/file", "n" * 300), "timeout": ("0", "-1"),
                    "max_tokens": ("0", "-1")},
}  # fmt: skip
for script, options in NUMBERS.items():
    for option, values in options.items():
        for value in values:
            add(f"{script} {option}={value[:20]}", Case(script, words(script, **{option: value})))


# --- checkpoints and tokenizers ---

FEW_JSON = ("empty", "cut", "list", "null", "nul", "deep", "object")


def copy_of(kind: str, damage: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Return the setup that copies a good folder to {out}/c and damages it."""

    def setup(good: Path, out: Path) -> None:
        shutil.copytree(good / kind, out / "c")
        damage(out / "c")

    return setup


def change_json(file: str, fields: dict[str, Any]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | fields))

    return damage


for script, (arguments, kind) in LOADING.items():
    for way in bad_files.BAD_WEIGHTS:
        # `check` reports NaN as failed checks. run_eval.py finds it after lm-eval's ten seconds of preparation.
        if not (way in ("nan", "inf") and script in ("buddygpt.check", "eval/run_eval.py")):
            damage = copy_of(kind, lambda folder, way=way: bad_files.damage_weights(folder, way))
            add(f"{script} weights {way}", Case(script, arguments, damage))
for script, (arguments, kind) in {**LOADING, **READING}.items():
    for name, fields in bad_files.BAD_CONFIGS.items():
        damage = copy_of(kind, change_json("config.json", fields))
        may_work = name in ("architectures", "eos_text", "encoder")  # not every command reads these
        add(f"{script} config.json {name}", Case(script, arguments, damage, may_work=may_work))
    for name in FEW_JSON:
        content = bad_files.BAD_JSON[name]
        damage = copy_of(kind, lambda folder, content=content: (folder / "config.json").write_bytes(content))
        add(f"{script} config.json {name}", Case(script, arguments, damage))
for script, (arguments, kind) in TOKENIZING.items():
    for name in FEW_JSON:
        content = bad_files.BAD_JSON[name]
        damage = copy_of(kind, lambda folder, content=content: (folder / "tokenizer.json").write_bytes(content))
        add(f"{script} tokenizer.json {name}", Case(script, arguments, damage))
    for name, fields in bad_files.BAD_TOKENIZERS.items():
        damage = copy_of(kind, change_json("tokenizer_config.json", fields))
        add(f"{script} tokenizer_config.json {name}", Case(script, arguments, damage, may_work=True))
for script in ("data/doctor.py", "export/to_native.py"):
    arguments, kind = {**TOKENIZING, **LOADING}[script]
    for name, template in bad_files.BAD_TEMPLATES.items():
        damage = copy_of(kind, lambda folder, text=template: (folder / "chat_template.jinja").write_text(text))
        may_work = name not in ("endless", "giant", "doubling")
        add(f"{script} template {name}", Case(script, arguments, damage, may_work=may_work))


# --- rows ---

ROW_READERS = {
    "data/doctor.py": [],
    "data/convert_chat.py": ["--input"],
    "tokenizer/train_tokenizer.py": ["--files"],
    "data/prepare_pretrain.py": ["--sources"],
}
for script, option in ROW_READERS.items():
    others = {key: value for key, value in COMMANDS.get(script, {}).items() if f"--{key}" not in option}
    rest = [word for key, value in others.items() for word in (f"--{key}", value)]
    names = ["binary.jsonl", "cut.json", "deep.jsonl", "digits.jsonl", "list.json", "nul.jsonl", "empty.jsonl"]
    for name in [
        *names,
        "folder.jsonl",
        "pipe.jsonl",
        "zero.jsonl",
        "loop.jsonl",
        "pipe.parquet",
        "zero.csv",
        "zero.txt",
    ]:
        add(
            f"{script} rows {name}",
            Case(script, [*option, f"{{bad}}/{name}", *rest], may_work=script == "data/doctor.py"),
        )


# --- shards, results and runs ---


def odd_values(content: Any, path: tuple = ()) -> Iterator[tuple[str, Any]]:
    """Yield the content with each of its values replaced by each of `ODD`, or missing, with a name."""
    places = content.items() if isinstance(content, dict) else enumerate(content[:1]) if content else ()
    for key, value in list(places):
        for odd in ODD:
            changed = json.loads(json.dumps(content))
            changed[key] = odd
            yield f"{'.'.join(map(str, (*path, key)))}={str(odd)[:12]!r}", changed
        if isinstance(value, dict | list):
            for name, inner in odd_values(value, (*path, key)):
                yield name, {**content, key: inner} if isinstance(content, dict) else [inner, *content[1:]]


def replace_file(kind: str, copy: str, pattern: str, content: bytes) -> Callable[[Path, Path], object]:
    """Return the setup that copies a good folder and replaces the content of one of its files."""

    def setup(good: Path, out: Path) -> None:
        shutil.copytree(good / kind, out / copy, dirs_exist_ok=True)
        next((out / copy).glob(pattern)).write_bytes(content)

    return setup


EVERY = 7  # of the odd values, this share is tried for each file; the number changes which
FILES = {  # script -> its arguments, the folder to copy, the copy, the files in it
    "data/inspect_shards.py": (["{out}/s", "--block", "0", "--block_size", "16"], "shards", "s", ["manifest.json"]),
    "eval/report.py": (["--results", "{out}/r", "--output", "{out}/o.md"], "results", "r",
                       ["base/results_*.json", "base/samples_*.jsonl"]),
    "runs/summarize.py": (["--run", "{out}/run"], "run", "run",
                          ["eval/scores.json", "dpo/run.json", "pretrain/run.json", "chat.json"]),
}  # fmt: skip
for script, (arguments, kind, copy, files) in FILES.items():
    for file in files:
        for name, content in bad_files.BAD_JSON.items():
            add(f"{script} {file} {name}", Case(script, arguments, replace_file(kind, copy, file, content)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The folders of good and of bad inputs."""
    folder = tmp_path_factory.mktemp("bad_inputs")
    (folder / "good").mkdir()
    bad_files.make_good_inputs(folder / "good")
    bad_files.make_bad_files(folder / "bad")
    import_modules_of([*COMMANDS, *OTHERS])
    return {"good": folder / "good", "bad": folder / "bad"}


def run_case(case: Case, folders: dict[str, Path], out: Path) -> Outcome:
    """Run a command, and assert that it has kept the promise."""
    if case.script == "runs/summarize.py":
        shutil.copytree(folders["good"] / "run", out / "run", dirs_exist_ok=True)
    if case.setup:
        case.setup(folders["good"], out)
    arguments = [word.replace("{out}", str(out)) for word in case.words]
    for name, folder in folders.items():
        arguments = [word.replace(f"{{{name}}}", str(folder)) for word in arguments]
    outcome = run_command(case.script, *arguments, watch=[*folders.values(), out], seconds=60, memory=3 * 2**30)
    if not case.may_work or outcome.status not in (0, 1):
        assert_refused(outcome)
    assert "Traceback" not in outcome.stderr
    assert outcome.memory < 2**30
    return outcome


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_in_one_line(name, folders, tmp_path):
    run_case(CASES[name], folders, tmp_path)


@pytest.mark.parametrize("script", FILES)
def test_odd_values_in_a_file_are_refused_or_make_no_difference(script, folders, tmp_path):
    arguments, kind, copy, files = FILES[script]
    number = 0
    for file in files:
        source = next((folders["good"] / kind).glob(file)).read_text()
        content = json.loads(source.splitlines()[0] if file.endswith(".jsonl") else source)
        for name, changed in odd_values(content):
            number += 1
            if number % EVERY:
                continue
            out = tmp_path / str(number)
            out.mkdir()
            lines = [json.dumps(changed), *(source.splitlines()[1:] if file.endswith(".jsonl") else [])]
            setup = replace_file(kind, copy, file, "\n".join(lines).encode())
            try:
                run_case(Case(script, arguments, setup, may_work=True), folders, out)
            except AssertionError as error:
                raise AssertionError(f"{file} {name}") from error
    assert number > 50
