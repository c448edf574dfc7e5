"""What the run card of pretraining says about its data."""

import json

from buddygpt.data.shards.format import MANIFEST
from buddygpt.data.text.licenses import describe_data
from buddygpt.data.text.sources import load_readers


def test_licenses_are_those_of_the_public_sets(tmp_path):
    reader = next(reader for reader in load_readers().values() if reader.hub and reader.license == "Apache-2.0")
    entries = {
        reader.name: reader.name,
        "mine": {"reader": reader.name, "name": "mine"},
        "books": "datasets/books.jsonl.gz",
        "web": {"path": "hf://datasets/OWNER/NAME@main/**/*.parquet", "name": "web"},
    }
    sources = [{"name": name, "language": "zh", "tokens": 5, "documents": 1, "share": 0.1} for name in entries]
    manifest = {"sources": sources, "generations": [{"config": {"sources": list(entries.values())}}]}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    found = {source["name"]: (source["license"], source["hub"]) for source in describe_data(tmp_path)}
    assert found == {
        reader.name: ("Apache-2.0", reader.hub),
        "mine": ("Apache-2.0", reader.hub),
        "books": (None, None),
        "web": (None, "OWNER/NAME"),
    }
    assert describe_data(tmp_path)[0]["tokens"] == 5
