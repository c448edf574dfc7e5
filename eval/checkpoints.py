"""The checkpoints that a command of this folder evaluates, and the device that it uses."""

import re
from pathlib import Path

import torch

from buddygpt.cli.errors import UserError


def read_checkpoints(items: list[str]) -> dict[str, str]:
    """Return name -> folder for items of the form NAME=FOLDER.

    Raises:
        UserError: An item has another form, a name is not a plain folder name or occurs twice, or a folder is not a
            checkpoint.
    """
    folders: dict[str, str] = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not folder or not re.fullmatch(r"\w[\w.+ -]{0,99}", name):  # it becomes a folder below `output`
            raise UserError(
                f"checkpoints: `{item}` is not NAME=FOLDER, with a name of letters, digits, `.`, `-`, `_`."
            )
        if name in folders:
            raise UserError(f"checkpoints: the name `{name}` is given twice, for {folders[name]} and {folder}.")
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"checkpoints: {name}={folder} is not a checkpoint: it has no config.json.")
        folders[name] = folder
    return folders


def choose_device(device: str | None) -> str:
    """Return `device`, or without one, the accelerator if there is one (lm-eval's default is cuda in any case).

    Raises:
        UserError: There is no such device. lm-eval would use another one.
    """
    if device is None:
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device: {device} cannot be used here ({str(error).splitlines()[0]})") from error
    return "cpu" if torch.device(device).type == "cpu" else device  # lm-eval does not know cpu:0
