"""Command-line arguments: `--config FILE.yaml`, then `--key value` overrides; an unknown key is an error.

A config file may begin with the values of another one, `defaults: ../shared/pretrain.yaml`, whose path is relative to
it. Its own values replace those.
"""

import argparse
import math
import reprlib
import sys
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from buddygpt.cli.encoding import not_utf8
from buddygpt.cli.errors import UserError, did_you_mean, library_errors
from buddygpt.cli.files import require_output

MAX_CONFIG_BYTES = 2**20  # the YAML parser takes seconds for a megabyte
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}

# Other names that people know for an option. The first that the script has is suggested.
ALIASES = {
    "lr": ("learning_rate",),
    "bs": ("per_device_train_batch_size",),
    "batch": ("per_device_train_batch_size",),
    "batch_size": ("per_device_train_batch_size",),
    "train_batch_size": ("per_device_train_batch_size",),
    "micro_batch_size": ("per_device_train_batch_size",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "epochs": ("num_train_epochs",),
    "epoch": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "n_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "iters": ("max_steps",),
    "max_iters": ("max_steps",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_acc": ("gradient_accumulation_steps",),
    "accum_steps": ("gradient_accumulation_steps",),
    "accumulation_steps": ("gradient_accumulation_steps",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "clip_grad": ("max_grad_norm",),
    "warmup": ("warmup_steps",),
    "warmup_iters": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "wd": ("weight_decay",),
    "scheduler": ("lr_scheduler_type",),
    "lr_scheduler": ("lr_scheduler_type",),
    "lr_decay_style": ("lr_scheduler_type",),
    "max_len": ("max_length", "block_size"),
    "max_seq_len": ("max_length", "block_size"),
    "max_seq_length": ("max_length", "block_size"),
    "seq_len": ("max_length", "block_size"),
    "seq_length": ("max_length", "block_size"),
    "cutoff_len": ("max_length", "block_size"),
    "context_length": ("max_length", "block_size"),
    "length": ("max_length", "block_size"),
    "model": ("model_name_or_path", "checkpoint", "checkpoints"),
    "model_path": ("model_name_or_path", "checkpoint", "checkpoints"),
    "model_name": ("model_name_or_path", "checkpoint", "checkpoints"),
    "init_from": ("model_name_or_path",),
    "preset": ("model_config",),
    "data": ("train_files", "train_data", "sources", "files", "input"),
    "data_path": ("train_files", "train_data", "sources", "files", "input"),
    "dataset": ("train_files", "train_data", "sources", "files", "input"),
    "train_file": ("train_files", "train_data"),
    "out": ("output_dir", "output"),
    "out_dir": ("output_dir", "output"),
    "save_dir": ("output_dir", "output"),
    "save_interval": ("save_steps",),
    "eval_interval": ("eval_steps",),
    "log_interval": ("logging_steps",),
    "resume": ("resume_from_checkpoint",),
    "lora": ("use_peft",),
    "use_lora": ("use_peft",),
    "lora_rank": ("lora_r",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "wandb": ("report_to",),
}
NULLS = ("null", "none", "~", "")
DEFAULTS = "defaults"  # the key of a config file that names another one


def parse_arguments(
    *dataclass_types: type, description: str | None = None, defaults: dict[str, Any] | None = None
) -> tuple[Any, ...]:
    """Read `--config FILE.yaml`, then `--key value` overrides, into one instance per dataclass.

    Args:
        dataclass_types: Dataclasses whose fields are the valid keys.
        description: First lines of `--help`; usually the script's `__doc__`.
        defaults: Values that replace the defaults of the dataclasses; the config file and the command line win.

    Returns:
        One instance per dataclass, in order.

    Raises:
        UserError: An unknown key, a missing or malformed config file, a value that a dataclass rejects, or an output
            that cannot be written.
    """
    _require_readable_config()
    parser = StrictParser(
        dataclass_types,
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        usage="%(prog)s [--config FILE.yaml] [--key value ...]",
        epilog="In FILE.yaml, `defaults: OTHER.yaml` (relative to FILE.yaml) names a file with values to start from.",
    )
    parser.set_defaults_with_config(**defaults or {})
    try:
        parsed = parser.parse_args_and_config()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {error.filename}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{_config_file()} is not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_config_file()} is {not_utf8(error.object)}") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    except Exception as error:  # of any library that an option belongs to, while it is parsed
        with library_errors("cannot use these arguments", "Change or remove the one it names, see --help"):
            raise error
    for arguments in parsed:
        for key, value in vars(arguments).items():
            _check_value(key, value)
            if key in ("output", "eval_output") and value is not None:
                require_output(Path(value).absolute())
    return parsed


def _config_file() -> str:
    """Return the word after `--config`, as `TrlParser` finds it."""
    return sys.argv[sys.argv.index("--config") + 1]


def _require_readable_config() -> None:
    if "--config" not in sys.argv:
        return
    if sys.argv[-1] == "--config":
        raise UserError("--config needs the name of a YAML file")
    _require_config_file("--config", Path(_config_file()))


def _require_config_file(option: str, path: Path) -> None:
    """Raise UserError if a path that an option names is a folder, a device or too large; not if it does not exist."""
    try:
        if path.is_dir():
            raise UserError(f"{option} {path} is a folder; name a YAML file in it")
        if path.is_char_device() or path.is_block_device():
            raise UserError(f"{option} {path} is no file")
        if path.is_file() and (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise UserError(f"{option} {path} has {size:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}")
    except OSError as error:  # such as a name of 300 characters
        raise UserError(f"{option}: {error.strerror}: {error.filename}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Return the values of a config file, with those of the file that its `defaults` names.

    Raises:
        UserError: One of the two is missing, no mapping or no valid YAML, or the other one names `defaults`, too.
    """
    return _add_defaults(_read_mapping("config:", path), path)


def _add_defaults(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of the config file `path` over those of the file that its `defaults` names."""
    if DEFAULTS not in config:
        return config
    name = config[DEFAULTS]
    if not isinstance(name, str) or not name:
        raise UserError(f"`{DEFAULTS}` in {path} is `{name}`; name one YAML file, relative to {path}")
    named = (path.resolve() if path.is_symlink() else path).parent / name  # relative to the file that a link leads to
    other = _read_mapping(f"`{DEFAULTS}` in {path}:", named)
    if DEFAULTS in other:  # or a file could name itself
        raise UserError(f"`{DEFAULTS}` in {path} names {named}, which has `{DEFAULTS}` itself: remove it")
    own = {key: value for key, value in config.items() if key != DEFAULTS}
    return other | own


def _read_mapping(option: str, path: Path) -> dict[str, Any]:
    """Return the content of a YAML file; `option` says in an error who names the file."""
    _require_config_file(option, path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is {not_utf8(error.object)}") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UserError(f"{option} no such file: {path}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a YAML mapping")
    return content


def read_option(key: str) -> Any:
    """Return one option before the others are parsed, because it decides which others there are; None without it.

    What is wrong with it, or with the config file, [`parse_arguments`] says.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument(f"--{key}")
    words, _ = parser.parse_known_args()
    if getattr(words, key) is not None or not words.config:
        return getattr(words, key)
    try:
        return read_config(Path(words.config)).get(key)
    except UserError:
        return None


def require_count(key: str, value: int, largest: int = 10**15) -> None:
    """Raise ValueError if the value of an argument is not between 1 and `largest`."""
    if not 1 <= value <= largest:
        raise ValueError(f"{key} is {value}; use a number from 1 to {largest:,}")


class StrictParser(TrlParser):
    """`TrlParser` that raises [`UserError`] on every mistake and accepts no abbreviated options.

    An option that is None or an empty list by default may be given as `null`, `none` or an empty string.
    """

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any) -> None:
        super().__init__(dataclass_types, **kwargs)
        self.hints = {key: hint for each in dataclass_types for key, hint in get_type_hints(each).items()}
        self.nothing = {
            each.dest: each.default for each in self._actions if each.default in (None, []) and not each.required
        }

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        if DEFAULTS in config:
            config = _add_defaults(config, Path(_config_file()))
        actions = {action.dest: action for action in self._actions}
        for key, value in config.items():
            if key not in actions:
                raise UserError(f"unknown key `{key}` in the config file{_suggestion(key, actions)}")
            if value is False and "no" in (actions[key].choices or ()):
                config[key] = value = "no"  # YAML 1.1 reads a bare `no` as false, as in `eval_strategy: no`
            if key in self.nothing and (value is None or isinstance(value, str) and value.lower() in NULLS):
                config[key] = value = copy(self.nothing[key])
            if isinstance(value, str) and get_origin(self.hints.get(key)) is list:
                config[key] = value = [value]  # as on the command line
            if type(value) in (int, float) and self.hints.get(key) in (str, str | None):
                config[key] = value = str(value)  # a name such as 2026, or `batch_size: 16` where `auto` is allowed
            if value == [] and actions[key].required:
                raise UserError(f"`{key}` in the config file is an empty list; name at least one")
            _check_choices(key, value, actions[key].choices)
            _check_type(key, value, self.hints.get(key, Any))
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            option = word.split("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                known = [action.dest for action in self._actions]
                raise UserError(f"unknown argument `{option}`{_suggestion(option.lstrip('-'), known)}")
        return super().parse_known_args(args, namespace)

    def _get_values(self, action, arg_strings):
        if action.dest in self.nothing and len(arg_strings) == 1 and arg_strings[0].lower() in NULLS:
            return copy(self.nothing[action.dest])
        if "" in arg_strings and (action.required or isinstance(action.default, str)):
            raise UserError(f"--{action.dest} is empty; give a value")
        return super()._get_values(action, arg_strings)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the script's docstring and shows every default."""


def _check_choices(key: str, value: Any, choices: Iterable[Any] | None) -> None:
    """Raise UserError if a value of the config file is not allowed; argparse checks the command line only."""
    if not choices:
        return
    for item in value if isinstance(value, list) else [value]:
        if item is not None and item not in choices:
            allowed = ", ".join(map(str, choices))
            raise UserError(f"`{key}` in the config file is {value}, must be one of {allowed}")


def _check_type(key: str, value: Any, hint: Any) -> None:
    """Raise UserError if a value of the config file does not fit its key; argparse converts strings only."""
    if not _fits(value, hint):
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
        expected = [TYPE_NAMES.get(get_origin(each) or each, "a mapping") for each in options if each is not NoneType]
        shown = "empty" if value is None else reprlib.repr(value)
        quotes = " (in quotes)" if expected == ["text"] else ""
        raise UserError(f"`{key}` in the config file is {shown}, must be {' or '.join(expected)}{quotes}")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of an annotation; a string fits what argparse converts it to."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is list:  # of data/prepare_pretrain.py's sources, each may be a name or a mapping
        return isinstance(value, list) and all(
            isinstance(item, str | dict) or _fits(item, *(inner or [Any])) for item in value
        )
    if kind in (dict, NoneType):
        return isinstance(value, kind)
    if kind not in (int, float, bool, str) or isinstance(value, str):
        return True
    return type(value) is kind or (kind is float and type(value) is int)


def _check_value(key: str, value: Any) -> None:
    """Raise UserError if a value is or holds a float that is no finite number, or text that is no file name."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"`{key}` is {value}; give a finite number")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"`{key}` holds a null character; remove it")
    if isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _check_value(key, item)


def _suggestion(key: str, known: Iterable[str]) -> str:
    name, known = key.replace("-", "_"), list(known)
    aliases = [option for option in ALIASES.get(name.lower(), ()) if option in known]
    match = aliases[0] if aliases else did_you_mean(name, known)
    return f"; did you mean `{match}`?" if match else "; see --help for every key"
