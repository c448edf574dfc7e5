"""The checkpoints that a command of this folder evaluates, and the device that it uses."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from buddygpt.cli.errors import UserError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def read_checkpoints(
    items: list[str], every_checkpoint: Iterable[str] = (), endpoints: bool = False
) -> dict[str, str]:
    """Return name -> place for items of the form NAME=FOLDER, NAME=OWNER/MODEL (of the Hub) or NAME=ADDRESS.

    Args:
        items: As given.
        every_checkpoint: Names of runs. Each is replaced by all its checkpoints, named NAME@STEP.
        endpoints: Whether the address of an OpenAI-compatible endpoint is allowed.

    Raises:
        UserError: An item has another form, a name is not a plain folder name or occurs twice, a folder is not a
            checkpoint, or a run has none.
    """
    places: dict[str, str] = {}
    for item in items:
        name, _, place = item.partition("=")
        if not place or not re.fullmatch(r"\w[\w.+ @-]{0,99}", name):  # it becomes a folder below `output`
            raise UserError(
                f"checkpoints: `{item}` is not NAME=FOLDER, with a name of letters, digits, `.`, `-`, `_`."
            )
        if name in places:
            raise UserError(f"checkpoints: the name `{name}` is given twice, for {places[name]} and {place}.")
        if is_endpoint(place):
            if not endpoints:
                raise UserError(f"checkpoints: {name}={place} is an endpoint; this command needs the weights.")
        elif (
            name not in every_checkpoint and not _may_be_on_hub(place) and not (Path(place) / "config.json").is_file()
        ):
            raise UserError(f"checkpoints: {name}={place} is not a checkpoint: it has no config.json.")
        places[name] = place

    for name in every_checkpoint:
        if name not in places:
            raise UserError(f"every_checkpoint: `{name}` is not among the checkpoints ({', '.join(places)}).")
    return {
        each: folder
        for name, place in places.items()
        for each, folder in (list_checkpoints(name, place) if name in every_checkpoint else {name: place}).items()
    }


def is_endpoint(place: str) -> bool:
    """Return whether a checkpoint is an address of the web and no folder or name."""
    return place.startswith(("http://", "https://"))


def list_checkpoints(name: str, run: str) -> dict[str, str]:
    """Return NAME@STEP -> folder of all checkpoints of a run, by step; UserError if it has none.

    A finished run has moved them to RUN.training. Links to them are in RUN, unless the folder was copied.
    """
    found: dict[int, Path] = {}
    for folder in (Path(f"{run.rstrip('/')}.training"), Path(run)):
        for path in folder.glob("checkpoint-*"):
            step = path.name.removeprefix("checkpoint-")
            if step.isdecimal() and (path / "config.json").is_file():
                found[int(step)] = path
    if not found:
        raise UserError(f"every_checkpoint: {name}={run} has no checkpoint-STEP with a config.json.")
    return {f"{name}@{step}": str(found[step]) for step in sorted(found)}


def _may_be_on_hub(place: str) -> bool:
    """Return whether a name may be OWNER/MODEL: no such folder exists, nor one of that owner."""
    return bool(HUB_NAME.fullmatch(place)) and not Path(place).exists() and not Path(place).parent.is_dir()


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
