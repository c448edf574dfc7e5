"""Arguments of every command: `--config FILE.yaml`, then `--key value`; an unknown key is an error."""

import argparse
from importlib.util import find_spec
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from buddygpt.cli.errors import UserError, did_you_mean


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
    match = did_you_mean(key.replace("-", "_"), keys)
    return f"; did you mean `{match}`?" if match else "; see --help for every key"


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
