"""Names, sizes and licenses of the data sets that shards were made from, for run cards and model cards."""

import json
import re
from pathlib import Path
from typing import Any

from buddygpt.data.shards.format import MANIFEST
from buddygpt.data.text.sources import COLUMNS, load_readers

HUB_PATH = re.compile(r"hf://(?:datasets/)?([\w.-]+/[\w.-]+)")


def describe_data(shards: Path) -> list[dict[str, Any]]:
    """Return `name`, `language`, `tokens`, `documents`, `license` and `hub` of each source in a folder of shards.

    The license is that of data/sources.yaml, and None for other text, of which nothing is known.
    """
    manifest = json.loads((shards / MANIFEST).read_text(encoding="utf-8"))
    entries = [
        entry for each in manifest.get("generations", []) for entry in each.get("config", {}).get("sources", [])
    ]
    known = dict(_identify(entry) for entry in entries)
    unknown = {"license": None, "hub": None}
    keys = ("name", "language", "tokens", "documents")
    return [
        {key: source.get(key) for key in keys} | known.get(source["name"], unknown) for source in manifest["sources"]
    ]


def _identify(entry: str | dict[str, Any]) -> tuple[str, dict[str, str | None]]:
    """Return the name of a source and what is known about it, for an entry of `sources`."""
    given = entry if isinstance(entry, dict) else {"path": entry}
    path = str(given.get("path") or "")
    readers = load_readers()
    for reader in readers.values():
        if isinstance(entry, str) and entry in (reader.name, reader.hub) and entry:
            given = {"reader": reader.name}
    reader = readers.get(given.get("reader", COLUMNS))
    hub = HUB_PATH.match(path)
    facts = {"license": None, "hub": hub[1] if hub else None}
    if reader is None or reader.name == COLUMNS:
        return given.get("name") or Path(path).name.split(".")[0], facts
    facts = {"license": reader.license or None, "hub": reader.hub or None}
    return given.get("name") or reader.name, facts
