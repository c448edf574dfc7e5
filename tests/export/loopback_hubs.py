"""Hugging Face and ModelScope on a loopback address: the parts of their protocols that uploading and loading use.

The handlers follow huggingface_hub 2.4 (hf_api.py, _commit_api.py, lfs.py), the requests of hf_xet 1.8, and
modelscope_hub 0.5 (_legacy_api.py).
"""

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "a-token"
COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        repositories: {"USER/NAME": {"private": bool, "files": {path: bytes}}}.
        blobs: Content of large files, by sha256.
        requests: Method and path of every request.
        breaks: How many more uploads of large files lose their connection halfway.
        quota: Message with which large files are refused; None: they are taken.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.breaks = 0
        self.quota: str | None = None

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name]["files"]


@contextmanager
def running(handler: type[BaseHTTPRequestHandler]) -> Iterator[Hub]:
    """Run a hub in a thread."""
    with Hub(handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, content: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def put_blob(self) -> None:
        length = int(self.headers["Content-Length"])
        if self.server.breaks > 0:
            self.server.breaks -= 1
            self.rfile.read(length // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        data = self.rfile.read(length)
        digest = hashlib.sha256(data).hexdigest()
        assert self.path.endswith(digest)
        self.server.blobs[digest] = data
        self.reply({})

    def large_objects(self, objects: list[dict]) -> dict:
        """Answer a batch request of Git LFS: where to send what is not here yet."""
        answers = []
        for each in objects:
            upload = {"actions": {"upload": {"href": f"{self.server.address}/blob/{each['oid']}"}}}
            answers.append(each if each["oid"] in self.server.blobs else {**each, **upload})
        return {"transfer": "basic", "objects": answers}

    def create(self, name: str, private: bool) -> bool:
        """Return whether the repository is new."""
        if name in self.server.repositories:
            return False
        self.server.repositories[name] = {"private": private, "files": {}}
        return True


class HuggingFace(Handler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        data = self.body()
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if parts[0] in ("v1", "v2"):  # of the Xet protocol
            answers = {"xorbs": {"was_inserted": True}, "shards": {"result": 1}}
            answer = answers.get(parts[1]) if parts[0] == "v1" else None
            return self.reply(answer, 404 if answer is None else 200)
        if not self.is_allowed():
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            is_new = self.create(name, asked.get("visibility") == "private")
            error = {} if is_new else {"error": "You already created this model repo"}
            return self.reply({"url": f"{self.server.address}/{name}"} | error, 200 if is_new else 409)
        if "lfs" in parts:
            if self.server.quota:
                return self.reply({"error": self.server.quota}, 403)
            return self.reply(
                self.large_objects(json.loads(data)["objects"]),
                headers={"Content-Type": "application/vnd.git-lfs+json"},
            )
        name = "/".join(parts[2:4])
        if "preupload" in parts:
            return self.reply({"files": [self.mode(name, file) for file in json.loads(data)["files"]]})
        return self.commit(name, [json.loads(line) for line in data.splitlines()])

    def mode(self, name: str, file: dict) -> dict:
        here = self.server.files(name).get(file["path"])
        is_large = file["path"].endswith((".safetensors", ".gguf"))
        oid = None
        if here is not None:
            oid = hashlib.sha256(here).hexdigest() if is_large else git_hash(here)
        mode = "lfs" if is_large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def commit(self, name: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files(name)[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                # Xet sends a file in parts of a format of its own: keep its hash.
                self.server.files(name)[value["path"]] = self.server.blobs.get(value["oid"], value["oid"].encode())
        self.reply({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self) -> None:
        self.server.requests.append("PUT a large file")
        self.put_blob()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if "xet-write-token" in parts:
            return self.reply({"accessToken": "x", "exp": int(time.time()) + 3600, "casUrl": self.server.address})
        if parts[0] in ("v1", "v2"):
            return self.reply({}, 404)
        if parts[0] == "api":
            name = "/".join(parts[2:4])
            repository = self.server.repositories.get(name)
            if repository is None or "tree" in parts:
                code = "RepoNotFound" if repository is None else "EntryNotFound"
                return self.reply({"error": "not found"}, 404, {"X-Error-Code": code})
            siblings = [{"rfilename": path} for path in repository["files"]]
            info = {"id": name, "private": repository["private"], "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.reply(info)
        file = self.server.files("/".join(parts[:2])).get("/".join(parts[4:]))  # USER/NAME/resolve/main/PATH
        if file is None:
            return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.reply(file, headers={"ETag": f'"{git_hash(file)}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET


class ModelScope(Handler):
    def do_POST(self) -> None:
        self.server.requests.append(f"POST {self.path}")
        asked = json.loads(self.body())
        parts = self.path.removeprefix("/api/v1/").split("/")
        if not self.is_allowed():
            return self.reply({"Code": 10010201002, "Message": "token is invalid", "Success": False}, 401)
        if parts == ["models"]:
            name = f"{asked['Path']}/{asked['Name']}"
            if not self.create(name, asked["Visibility"] == 1):
                return self.reply({"Code": 10010101001, "Message": "model already exists", "Success": False}, 400)
            return self.reply({"Code": 200, "Success": True, "Data": {"Path": asked["Path"], "Name": asked["Name"]}})
        name = "/".join(parts[2:4])
        if "lfs" in parts:
            if self.server.quota:
                return self.reply({"Code": 10010101099, "Message": self.server.quota, "Success": False}, 403)
            return self.reply({"Code": 200, "Success": True, "Data": self.large_objects(asked["objects"])})
        for action in asked["actions"]:
            is_large = action["type"] == "lfs"
            content = self.server.blobs[action["sha256"]] if is_large else base64.b64decode(action["content"])
            self.server.files(name)[action["path"]] = content
        return self.reply({"Code": 200, "Success": True, "Data": {"oid": COMMIT}})

    def do_PUT(self) -> None:
        self.server.requests.append("PUT a large file")
        self.put_blob()

    def do_GET(self) -> None:
        repository = self.server.repositories.get("/".join(self.path.split("?")[0].split("/")[-2:]))
        if repository is None:
            return self.reply({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
        data = {"Visibility": 1 if repository["private"] else 5, "visibility": 1 if repository["private"] else 5}
        return self.reply({"Code": 200, "Success": True, "success": True, "Data": data, "data": data})


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
