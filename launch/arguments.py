"""Arguments from YAML and the command line, read strictly, and users' mistakes as one line with exit status 2."""

import argparse
import difflib
import errno
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .extensions import claim_extensions

# How OSError and safetensors say so, and torch.save, which only says that its file has not the length it should have.
DISK_IS_FULL = (os.strerror(errno.ENOSPC), "inline_container.cc", "PytorchStreamWriter failed writing")

PATIENCE = 10  # seconds


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what is wrong, where, what to do."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the script's docstring and names every default."""


class StrictParser(TrlParser):
    """`TrlParser` whose every complaint is a [`UserError`] and whose options cannot be abbreviated."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        actions = {action.dest: action for action in self._actions}
        for key, value in config.items():
            if key not in actions:
                raise UserError(f"unknown key `{key}` in the config file{_closest(key, set(actions))}")
            choices = actions[key].choices  # argparse looks at these on the command line only
            given = value if isinstance(value, list) else [value]
            if choices and any(each is not None and each not in choices for each in given):
                allowed = ", ".join(map(str, choices))
                raise UserError(f"`{key}` in the config file is {value}, must be one of {allowed}")
        return super().set_defaults_with_config(**config)

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            option = word.split("=")[0]
            if option.startswith("--") and option not in self._option_string_actions:
                keys = {action.dest for action in self._actions}
                raise UserError(f"unknown argument `{option}`{_closest(option.lstrip('-'), keys)}")
        return super().parse_known_args(args, namespace)


def _closest(key: str, keys: set[str]) -> str:
    match = difflib.get_close_matches(key.replace("-", "_"), keys, n=1)
    return f"; did you mean `{match[0]}`?" if match else "; see --help for every key"


def house_defaults() -> dict[str, Any]:
    """Where recipes differ from `TrainingArguments`, unless they say something else."""
    # A NaN is shown as one, and no step waits for the device to look for it.
    defaults: dict[str, Any] = {"logging_nan_inf_filter": False}
    if find_spec("trackio"):  # keeps its tables on this machine: `trackio show`
        defaults |= {"report_to": "trackio", "project": "buddygpt"}
    return defaults


def parse_arguments(*dataclass_types: type, description: str | None = None) -> tuple[Any, ...]:
    """Read `--config FILE.yaml`, then `--key value` overrides, into one instance per dataclass.

    Args:
        dataclass_types: Dataclasses whose fields, together, are all keys that exist.
        description: What `--help` opens with; usually the script's `__doc__`.

    Returns:
        One instance per dataclass, in order.

    Raises:
        UserError: An unknown key, a missing or malformed config file, or a value the dataclasses refuse.
    """
    parser = StrictParser(
        dataclass_types,
        description=description,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        usage="%(prog)s [--config FILE.yaml] [--key value ...]",
    )
    known = {action.dest for action in parser._actions}
    parser.set_defaults_with_config(**{key: value for key, value in house_defaults().items() if key in known})
    try:
        return parser.parse_args_and_config()
    except FileNotFoundError as error:
        raise UserError(f"no such file: {error.filename}") from error
    except yaml.YAMLError as error:
        raise UserError(f"the config file is not valid YAML: {error}") from error
    except IndexError as error:
        raise UserError("--config needs the name of a YAML file") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; turn a [`UserError`] or a full disk into one line on stderr and exit status 2."""
    if "LOCAL_RANK" in os.environ:  # DeepSpeed may be among what was launched
        claim_extensions()
    try:
        main()
    except UserError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not any(sign in str(error) for sign in DISK_IS_FULL):
            raise
        _exit_with(f"the disk is full ({error}). Free some space and run the same command again")


def _exit_with(message: object) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)  # the first process to end brings down the others: leave it to rank 0, if it can
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
