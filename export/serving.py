"""Serve checkpoints with `transformers serve`, after an export to a stock architecture where they need one."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buddygpt.cli.checkpoints import checkpoint_sha256, require_causal_lm
from buddygpt.cli.errors import UserError, reading
from buddygpt.cli.files import read_json
from buddygpt.export.to_native import export
from buddygpt.model import BuddyGPTConfig

SECONDS_TO_START = 300


def newest_run(folder: Path) -> Path:
    """Return the finished run below `folder` that was written last, a tuned one if there is any.

    Raises:
        UserError: There is none.
    """
    runs = []
    for path in folder.glob("**/run.json"):
        with reading(path):
            card = read_json(path)
            is_whole = (path.parent / "config.json").exists() and not path.parent.name.startswith("checkpoint-")
            if is_whole and "metrics" in card:  # of a finished run
                runs.append((card["recipe"] != "pretrain", path.stat().st_mtime, path.parent))
    if not runs:
        raise UserError(f"{folder} holds no finished run; make one with `make quickstart`, or name a checkpoint")
    return max(runs)[2]


def servable(checkpoint: str, exports: Path) -> str:
    """Return a folder that `transformers serve` can load: the checkpoint, or its export to a stock architecture.

    Args:
        checkpoint: Folder or Hub name of a causal language model.
        exports: Folder of the exports. One that is there already is used again.

    Raises:
        UserError: The checkpoint is incomplete, or there is no equivalent stock architecture.
    """
    config = require_causal_lm(checkpoint)
    if not isinstance(config, BuddyGPTConfig):
        return checkpoint
    output = exports / f"{Path(checkpoint).resolve().name}-{checkpoint_sha256(checkpoint)[:8]}"
    if not (output / "config.json").exists():
        export(checkpoint, output)
    return str(output)


@contextmanager
def serve(model: str | None = None, device: str = "cpu", timeout: int = SECONDS_TO_START) -> Iterator[str]:
    """Run `transformers serve` of this Python environment on this machine, and yield its address.

    Args:
        model: The model to load at once. None: each request names a folder, which is loaded when first asked for.
        device: cpu, cuda, cuda:1, mps or auto.
        timeout: Seconds that the server may take to start.

    Raises:
        UserError: The server exits, or does not answer in time.
    """
    for name in ("no_proxy", "NO_PROXY"):  # a proxy for the internet cannot reach this machine
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))
    port = _find_free_port()
    address = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).with_name("transformers")), "serve", *([model] if model else [])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", device, "--log-level", "error"]
    command += ["--model-timeout", "-1"]  # never unload a model
    server = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        _wait_until_healthy(address, server, timeout)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it waits for an answer that nobody reads
            server.kill()
            server.wait()


def _find_free_port() -> int:
    """Return a port that the operating system considers free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_until_healthy(address: str, server: subprocess.Popen, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health").close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"transformers serve did not answer within {timeout} s (exit status {server.poll()})")
