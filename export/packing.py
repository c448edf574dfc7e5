"""Choose the files of a checkpoint that can be published, and complete them for other people."""

import json
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import read_json
from buddygpt.export.hubs import HUB_NAME, Target

GGUF = "-GGUF"
# Names of files and folders that are not sent, at any depth.
LEFT_OUT = {
    "training state": (
        *("checkpoint-*", "*.partial", "global_step*", "optimizer*", "scheduler*", "scaler*", "rng_state*"),
        *("training_args.bin", "trainer_state.json", "checksums.json", "run.lock"),
    ),
    "logs": ("runs", "*.log", "events.out.tfevents*"),
    "hidden or temporary": (".*", "__pycache__"),
}
GGUF_CARD = """---
{metadata}
---

# USER/NAME-GGUF

GGUF files of USER/NAME, whose page is the model card: data, training, scores, limits.

USER/NAME 的 GGUF 文件；数据、训练、评测与局限见该模型的主页。

```sh
llama-cli -m {file}
ollama create NAME -f Modelfile
```
"""


# What training/model_card.md.jinja says of an adapter whose base model is a folder, after "`BASE_MODEL` is ...".
FOLDER_OF_BASE = re.compile(
    r", `[^`]*`; `adapter_config\.json` has its path from this folder, so that both can be moved together"
    r"| `[^`]*`；`adapter_config\.json` 中是它相对本文件夹的路径，两者可以一起移动"
)


class Parcel(NamedTuple):
    """What one repository gets.

    Attributes:
        suffix: Follows the name that the user gives: "", "-native" or "-GGUF".
        folder: Folder with exactly the files to send.
        left_out: Paths that are not sent, with the reason.
        card: Text of README.md.
    """

    suffix: str
    folder: Path
    left_out: dict[str, str]
    card: str


def pack(source: Path, folder: Path, suffix: str, base: str | None = None) -> Parcel:
    """Fill a new folder with links to the files of `source` that can be published.

    Args:
        source: Finished run, native export or adapter.
        folder: Folder to make.
        suffix: See [`Parcel`].
        base: Published name of an adapter's base model.

    Raises:
        UserError: `source` is an adapter of a model that others cannot find.
    """
    left_out: dict[str, str] = {}
    for place, folders, files in os.walk(source):
        here = Path(place)
        for name in sorted([*folders, *files]):
            path = here / name
            reason = _reason_to_leave_out(path, base)
            if reason:
                left_out[path.relative_to(source).as_posix()] = reason
            elif name in files:
                _link(path, folder / path.relative_to(source))
        folders[:] = [name for name in folders if (here / name).relative_to(source).as_posix() not in left_out]

    config = folder / "adapter_config.json"
    if config.is_file() and base is None and (local := _local_base(source)):
        raise UserError(
            f"{source} is an adapter of {local}, a folder that others do not have; publish that model first, and add "
            "--base USER/NAME"
        )
    if base is not None:
        for config in folder.rglob("adapter_config.json"):
            _name_base(config, base)
    card = folder / "README.md"
    return Parcel(suffix, folder, left_out, card.read_text(encoding="utf-8") if card.is_file() else "")


def _reason_to_leave_out(path: Path, base: str | None) -> str | None:
    for reason, patterns in LEFT_OUT.items():
        if any(fnmatch(path.name, pattern) for pattern in patterns):
            return reason
    if path.is_symlink() and path.is_dir():
        return "link to a folder"
    if path.name == "adapter" and base is None and _local_base(path):
        return "its base model is a folder here; --base USER/NAME sends it"
    return None


def _local_base(adapter: Path) -> str | None:
    """Return the base model of an adapter if it is no name of the Hub."""
    config = adapter / "adapter_config.json"
    if not config.is_file():
        return None
    base = str(read_json(config).get("base_model_name_or_path"))
    return None if HUB_NAME.fullmatch(base) and not Path(base).exists() else base


def _name_base(config: Path, base: str) -> None:
    """Name the base model in the settings and the model card of an adapter."""
    _replace(config, json.dumps(read_json(config) | {"base_model_name_or_path": base}, indent=2) + "\n")
    file = config.with_name("README.md")
    if file.is_file():
        text = FOLDER_OF_BASE.sub("", file.read_text(encoding="utf-8"))
        card = ModelCard(text.replace("BASE_MODEL", base))
        card.data.base_model = base
        _replace(file, str(card))


def _link(path: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(path.resolve())
    except OSError:  # of a file system without links
        shutil.copyfile(path, place)


def _replace(link: Path, text: str) -> None:
    """Replace a link by a file, so that what it links to stays."""
    link.unlink()
    link.write_text(text, encoding="utf-8")


def address_card(parcel: Parcel, target: Target) -> None:
    """Write the name of the repository into the card, which says USER/NAME until it is known."""
    card = parcel.folder / "README.md"
    if parcel.card:
        name = target.name if parcel.suffix == GGUF else f"{target.name}{parcel.suffix}"
        _replace(card, parcel.card.replace("USER/NAME", name))


def write_gguf_card(folder: Path, checkpoint: Path) -> None:
    """Write a card for GGUF files that names the model, and repeats license, languages and tags of its card."""
    data = {"base_model": "USER/NAME", "base_model_relation": "quantized", "library_name": "gguf"}
    if (checkpoint / "README.md").is_file():
        of_model = ModelCard.load(checkpoint / "README.md").data.to_dict()
        kept = ("license", "license_name", "language", "tags", "datasets", "pipeline_tag")
        data |= {key: of_model[key] for key in kept if key in of_model}
    file = next(folder.glob("*.gguf")).name
    text = GGUF_CARD.format(metadata=ModelCardData(**data).to_yaml().strip(), file=file)
    (folder / "README.md").write_text(text, encoding="utf-8")
