"""Mistakes of users give one line and exit status 2, from wherever they are raised."""

import errno
import json
import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig

from buddygpt.cli.arguments import ALIASES, StrictParser, parse_arguments, read_config, read_option
from buddygpt.cli.errors import UserError, library_errors, run_script
from buddygpt.pretrain.pretrain import PretrainArguments
from buddygpt.training.tuning import TuningArguments


@dataclass
class Arguments:
    name: str = field(metadata={"help": "a name"})
    size: int = 1
    rate: float = 0.1
    limit: int | None = None
    path: str | None = None
    flags: list[str] = field(default_factory=list)
    kind: Literal["small", "large"] = "small"
    rates: list[float] = field(default_factory=list)
    is_big: bool = False
    options: dict[str, str] | str | None = None


def parse(monkeypatch, *words: str) -> Arguments:
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    return parse_arguments(Arguments)[0]


def test_command_line_overrides_yaml_overrides_defaults(monkeypatch, tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("name: yaml\nsize: 2\nrate: 1e-3\nflags: [a, b]\n")
    expected = Arguments(name="yaml", size=3, rate=1e-3, flags=["a", "b"])
    assert parse(monkeypatch, "--config", str(config), "--size", "3") == expected


def test_a_config_that_cannot_be_read_is_named(monkeypatch, tmp_path):
    hint = "is not valid UTF-8; it looks like {0}: convert it with `iconv -f {0} -t UTF-8"
    for data, message in (
        ("name: 一只小猫 # 名字".encode("gb18030"), hint.format("GB18030")),
        ("name: a".encode("utf-16"), hint.format("UTF-16")),
        (b"name: caf\xe9", "is not valid UTF-8"),
        (b"name: a\x00", "is not valid YAML: unacceptable character"),
    ):
        (tmp_path / "own.yaml").write_bytes(data)
        with pytest.raises(UserError, match=f"own.yaml {message}"):
            parse(monkeypatch, "--config", str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("yaml", "words", "message"),
    [
        ("name: a\nsizes: 2", [], "unknown key `sizes` in the config file; did you mean `size`?"),
        ("name: a", ["--sise", "2"], "unknown argument `--sise`; did you mean `size`?"),
        ("name: a", ["--siz", "2"], "unknown argument `--siz`"),  # no abbreviations
        ("name: a", ["--size", "two"], "invalid int value: 'two'"),
        ("name: a\nkind: huge", [], "`kind` in the config file is huge, must be one of small, large"),
        ("name: a", ["--kind", "huge"], "'huge'"),
        ("name: a", ["stray"], "stray"),
        ("size: 2", [], "required: --name"),
        ("- name", [], "must contain a YAML mapping"),
        ("name: [", [], "not valid YAML"),
        ("name: a\nsize: 1.5", [], "`size` in the config file is 1.5, must be a whole number"),
        ("name: a\nsize: true", [], "`size` in the config file is True, must be a whole number"),
        ("name: a\nrate: [0.1]", [], "`rate`"),
        ("name: a\nrate: {a: 1}", [], "`rate` in the config file is {'a': 1}, must be a number"),
        ("name: a\nrate: .nan", [], "`rate` is nan; give a finite number"),
        ("name: a", ["--rate", "inf"], "`rate` is inf; give a finite number"),
        ("name: a\nrates: [1.0, .nan]", [], "`rates` is nan; give a finite number"),
        ("name: a\nrates: [[1.0]]", [], "`rates` in the config file is [[1.0]], must be a list"),
        ("name: [a, b]", [], "`name` in the config file is ['a', 'b'], must be text"),
        ("name: {a: b}", [], "must be text (in quotes)"),
        ("name: 2026-11-28", [], "`name` in the config file is datetime.date(2026, 11, 28), must be text (in quotes)"),
        ("name:", [], "`name` in the config file is empty, must be text"),
        ("name: a\nflags: 2", [], "`flags` in the config file is 2, must be a list"),
        ("name: a\nis_big: 7", [], "`is_big` in the config file is 7, must be true or false"),
        ("name: a\noptions: [b]", [], "`options` in the config file is ['b'], must be a mapping or text"),
        ('name: "a\\0"', [], "`name` holds a null character"),
        ("1: 2", [], "keywords must be strings"),
        ("[" * 5000, [], "is not valid YAML"),
        ("a: " + "x" * 2**20, [], "has 1,048,579 bytes; a config has at most 1,048,576"),
    ],
)
def test_mistakes_in_arguments(monkeypatch, tmp_path, yaml, words, message):
    (tmp_path / "a.yaml").write_text(yaml)
    with pytest.raises(UserError) as error:
        parse(monkeypatch, "--config", str(tmp_path / "a.yaml"), *words)
    assert message in str(error.value)


def test_values_of_yaml_become_what_the_command_line_gives(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("name: 2026\nflags: a\nrates: null\noptions: {b: c}\n")
    expected = Arguments(name="2026", flags=["a"], options={"b": "c"})
    assert parse(monkeypatch, "--config", str(tmp_path / "a.yaml")) == expected


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "is a folder"),
        ("/dev/zero", "is no file"),
        ("a" * 300, "File name too long"),
        ("no.yaml", "no such file"),
    ],
)
def test_a_config_that_is_no_file_is_refused(path, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        parse(monkeypatch, "--config", path)


def test_what_libraries_refuse_is_one_line_and_mistakes_of_ours_are_not():
    with pytest.raises(UserError, match=r"^cannot start: Expecting .*\. Change it$"):  # noqa: SIM117
        with library_errors("cannot start", "Change it"):
            json.loads("{")
    for mistake in (lambda: {}["key"], lambda: json.loads(wrong="word"), lambda: 1 / 0):
        with pytest.raises((KeyError, TypeError, ZeroDivisionError)), library_errors("cannot start", "Change it"):
            mistake()


def test_a_bare_no_in_yaml_is_the_word_no(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: out\neval_strategy: no\nsave_strategy: no\n")
    monkeypatch.setattr("sys.argv", ["script.py", "--config", str(tmp_path / "a.yaml")])
    (args,) = parse_arguments(TrainingArguments)
    assert args.eval_strategy == "no" and args.save_strategy == "no"


@pytest.mark.parametrize("word", ["null", "none", "None", ""])
def test_a_value_may_be_none(monkeypatch, tmp_path, word):
    (tmp_path / "a.yaml").write_text(f'name: a\nlimit: 3\npath: "{word}"\nflags: [a]\n')
    words = ["--config", str(tmp_path / "a.yaml")]
    assert parse(monkeypatch, *words) == Arguments("a", limit=3, flags=["a"])
    words += ["--limit", word, "--flags", word, "--path", word]
    assert parse(monkeypatch, *words) == Arguments("a", flags=[])


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("--lr", "learning_rate"),
        ("--bs", "per_device_train_batch_size"),
        ("--batch-size=4", "per_device_train_batch_size"),
        ("--epochs", "num_train_epochs"),
        ("--grad_accum", "gradient_accumulation_steps"),
        ("--max_len", "max_length"),
        ("--model", "model_name_or_path"),
        ("--lora_rank", "lora_r"),
        ("--learning_rat", "learning_rate"),
    ],
)
def test_common_short_forms_get_a_hint(monkeypatch, word, option):
    monkeypatch.setattr("sys.argv", ["script.py", word, "1"])
    with pytest.raises(UserError, match=f"did you mean `{option}`"):
        parse_arguments(SFTConfig, ModelConfig)


def test_hints_name_options_that_exist():
    pretraining, tuning = [PretrainArguments, TrainingArguments], [TuningArguments, SFTConfig, ModelConfig]
    known = {action.dest for types in (pretraining, tuning) for action in StrictParser(types)._actions}
    known |= {"checkpoint", "checkpoints", "files", "input", "output", "sources"}  # of the other scripts
    assert not {option for options in ALIASES.values() for option in options} - known


def test_a_config_begins_with_the_values_of_another(monkeypatch, tmp_path, capsys):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "all.yaml").write_text("name: shared\nsize: 2\nflags: [a]\n", encoding="utf-8")
    own = tmp_path / "model" / "own.yaml"
    own.parent.mkdir()
    own.write_text("defaults: ../shared/all.yaml\nname: own\nrate: 0.5\n", encoding="utf-8")
    assert parse(monkeypatch, "--config", str(own)) == Arguments("own", 2, 0.5, flags=["a"])
    assert parse(monkeypatch, "--config", str(own), "--size", "3").size == 3
    assert read_option("size") == "3" and read_config(own)["flags"] == ["a"]
    link = tmp_path / "link.yaml"
    link.symlink_to(own)
    assert read_config(link) == read_config(own)
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--help")
    assert "`defaults: OTHER.yaml`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "content", "message"),
    [
        ("none.yaml", None, r"`defaults` in .*own\.yaml: no such file: .*none\.yaml"),
        ("own.yaml", None, r"which has `defaults` itself: remove it"),
        ("other.yaml", "defaults: third.yaml", r"names .*other\.yaml, which has `defaults` itself"),
        ("other.yaml", "- a", r"other\.yaml must contain a YAML mapping"),
        ("other.yaml", "a: [", r"other\.yaml is not valid YAML"),
        ("other.yaml", "sizes: 2", "unknown key `sizes`"),
        (".", None, "is a folder; name a YAML file in it"),
        ("[a, b]", None, r"`defaults` in .*own\.yaml is .*; name one YAML file"),
    ],
)
def test_mistakes_in_defaults(monkeypatch, tmp_path, named, content, message):
    if content:
        (tmp_path / named).write_text(content, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(f"defaults: {named}\nname: own\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        parse(monkeypatch, "--config", str(tmp_path / "own.yaml"))


def test_config_without_a_name(monkeypatch):
    with pytest.raises(UserError, match="needs the name of a YAML file"):
        parse(monkeypatch, "--name", "a", "--config")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("one\n  line"), 2, "error: one line\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.safetensors"), 2, "error: the disk is full ("),
        (MemoryError(), 2, "error: there is not enough memory (MemoryError). Use smaller batches"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            2,
            "error: there is not enough memory (CUDA",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_end_with_a_status_and_one_line(error, status, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    printed = capsys.readouterr().err
    assert stop.value.code == status and printed.startswith(line) and printed.count("\n") == bool(line)


def test_the_first_process_of_a_machine_prints_first(monkeypatch, capsys):
    """The launcher kills all processes when one exits, so the others wait before they print."""
    waited = []

    def main():
        raise UserError("once")

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit):
        run_script(main)
    assert waited and waited[0] > 1 and capsys.readouterr().err == "error: once\n"


def test_programming_errors_are_not_hidden():
    def main():
        raise OSError(errno.EACCES, "not allowed")

    with pytest.raises(OSError, match="not allowed"):
        run_script(main)
