"""The endpoints of the Hugging Face Hub and of ModelScope that their clients read data sets with, on this machine."""

import functools
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from huggingface_hub import constants


class Replies(http.server.SimpleHTTPRequestHandler):
    def reply(self, body: object, status: int = 200, headers: dict | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class Hub(Replies):
    """The endpoints of the Hugging Face Hub that its file system reads with, over a folder OWNER/NAME/FILE."""

    gated: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        if path.startswith("/api/datasets/"):
            return self.describe(
                path.removeprefix("/api/datasets/"), "recursive=True" in query or "recursive=true" in query
            )
        owner_name, file = path.removeprefix("/datasets/").split("/resolve/main/")
        if owner_name in self.gated:
            return self.reply(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        data = Path(self.directory, owner_name, file).read_bytes()
        start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.reply(data[start : end + 1], status=206)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        names = json.loads(body)["paths"]
        repository = Path(self.directory, self.path.removeprefix("/api/datasets/").split("/paths-info/")[0])
        self.reply([self.entry(repository, repository / name) for name in names if (repository / name).exists()])

    def describe(self, path: str, recursive: bool) -> None:
        owner, name, *rest = path.split("/")
        repository = Path(self.directory, owner, name)
        if not repository.is_dir():
            return self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] != ["tree"]:
            return self.reply({"id": f"{owner}/{name}", "_id": "0", "sha": "0" * 40, "siblings": [], "tags": []})
        folder = repository.joinpath(*rest[2:])
        if not folder.is_dir():
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        self.reply([self.entry(repository, each) for each in (folder.rglob("*") if recursive else folder.iterdir())])

    def entry(self, repository: Path, path: Path) -> dict:
        name = str(path.relative_to(repository))
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "1" * 40, "size": 0}
        data = path.read_bytes()
        entry = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
        if path.suffix == ".parquet":  # large files are in LFS
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return entry


class ModelScope(Replies):
    """The endpoints of ModelScope that its package downloads with, over a folder OWNER/NAME/FILE."""

    fetched: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        owner, name, *rest = url.path.removeprefix("/api/v1/datasets/").split("/")
        repository = Path(self.directory, owner, name)
        if rest == ["repo"]:
            self.fetched.append(query["FilePath"])
            self.reply((repository / query["FilePath"]).read_bytes())
        elif rest == ["repo", "tree"] and (repository / query.get("Root", "")).is_dir():
            folder = repository / query.get("Root", "")
            files = [self.entry(repository, path) for path in folder.rglob("*") if path.is_file()]
            self.reply({"Code": 200, "Success": True, "Data": {"Files": files}})
        else:
            self.reply({"Code": 404, "Message": "no such thing", "Success": False}, 404)

    def entry(self, repository: Path, path: Path) -> dict:
        data = path.read_bytes()
        facts = {"Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
        return {"Path": str(path.relative_to(repository)), "Type": "blob"} | facts


@contextmanager
def serving(handler: type[Replies], folder: Path) -> Iterator[str]:
    """Yield the address of a server of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Set what `HF_ENDPOINT` sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
