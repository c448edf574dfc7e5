"""Run a command in a forked child with limits, and report what it did: for tests with bad input.

    outcome = run_command("sft/sft.py", "--config", file, watch=[tmp_path])
    assert_refused(outcome, "part of the message")

Importing transformers takes ten seconds, a fork takes none: call `import_modules_of(SCRIPTS)` before the first fork.
"""

import contextlib
import hashlib
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil
import torch
from conftest import ROOT

HASHED = 2**20  # bytes; of a larger file, only size and time are compared
SHOWN = 2**20  # bytes of output to keep
NETWORK_MARK = "the command used the network"


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        status: Its exit status; minus the signal if it was killed; None if the time limit ended it.
        memory: Peak of its resident memory in bytes, above that of the process that started it.
        changed: Files and folders below `watch` that were added, changed or removed.
    """

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    memory: int
    changed: list[str]

    @property
    def errors(self) -> list[str]:
        """The lines that begin with `error: `."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def import_modules_of(scripts: Iterable[str]) -> None:
    """Import what the scripts import, so that their forked children need not."""
    path = list(sys.path)
    for script in scripts:
        if script.endswith(".py"):
            sys.path.insert(0, str((ROOT / script).parent))
            runpy.run_path(str(ROOT / script), run_name="imported")
        else:
            runpy.run_module(script, run_name="imported")
    sys.path[:] = path


def run_command(
    script: str,
    *arguments: object,
    watch: Iterable[Path] = (),
    seconds: float = 30,
    memory: int = 4 * 2**30,
    env: dict[str, str] | None = None,
) -> Outcome:
    """Run a script of this project, or a module such as `buddygpt.check`, from the project's folder.

    Args:
        script: Path below the project's folder, or name of a module.
        arguments: Words of the command line.
        watch: Folders that are compared before and after.
        seconds: Time limit; the child and its children are killed after it.
        memory: Address space that the child may use in addition to what it has when it starts.
        env: More environment variables.
    """
    before = [snapshot(folder) for folder in watch]
    resident = psutil.Process().memory_info().rss
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _run(script, [str(word) for word in arguments], out.fileno(), err.fileno(), memory, env or {})
        status, usage = _wait(child, seconds)
        duration = time.monotonic() - start
        stdout, stderr = _text(out), _text(err)
    changed = []
    for folder, old in zip(watch, before, strict=True):
        new = snapshot(folder)
        changed += sorted(str(path) for path in old.keys() | new.keys() if old.get(path) != new.get(path))
    peak = max(usage.ru_maxrss * 1024 - resident, 0)
    return Outcome(status, stdout, stderr, duration, peak, changed)


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Assert the promise of every command for bad input, and that its message holds these parts.

    Exit status 2, one line `error: ...`, no traceback, no file changed, no network used.
    """
    shown = f"status {outcome.status} after {outcome.seconds:.1f} s\n{outcome.stderr[-4000:]}"
    assert "Traceback" not in outcome.stderr, shown
    assert outcome.status == 2, shown
    assert len(outcome.errors) == 1, shown
    assert not outcome.changed, f"{outcome.changed}\n{shown}"
    assert NETWORK_MARK not in outcome.stderr, shown
    for part in parts:
        assert part in outcome.errors[0], f"no `{part}` in: {outcome.errors[0]}"


def snapshot(folder: Path) -> dict[Path, object]:
    """Return a description of everything below a folder, which changes if the content does."""
    found: dict[Path, object] = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[path] = info.st_mode
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file():
            found[path] = (info.st_size, info.st_mtime_ns)
            if info.st_size <= HASHED:
                found[path] = hashlib.sha256(path.read_bytes()).digest()
    return found


def _run(script: str, words: list[str], out: int, err: int, memory: int, env: dict[str, str]) -> NoReturn:
    """In the child: set the limits, call the command and exit. Never returns to the test."""
    status = 1
    try:
        os.setsid()  # so that its children can be killed, too
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stdin = open(os.devnull)  # noqa: SIM115
        os.environ.update(env)
        os.chdir(ROOT)
        limit = psutil.Process().memory_info().vms + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        torch.set_num_threads(1)  # a fork has no threads of its parent's pool
        socket.getaddrinfo = _no_network
        sys.argv = [script, *words]
        if script.endswith(".py"):
            sys.path.insert(0, str((ROOT / script).parent))
            runpy.run_path(str(ROOT / script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _no_network(host: object, *_, **__) -> NoReturn:
    print(f"{NETWORK_MARK}: {host}", file=sys.stderr)
    raise OSError(NETWORK_MARK)


def _wait(child: int, seconds: float) -> tuple[int | None, resource.struct_rusage]:
    """Wait for the child, kill what is left of its session, and return its status and its use of resources."""
    deadline = time.monotonic() + seconds
    is_late = False
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline and not is_late:
            is_late = True
            _kill_session(child)
        time.sleep(0.005)
    _kill_session(child)
    return (None if is_late else os.waitstatus_to_exitcode(status)), usage


def _kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _text(file) -> str:
    file.seek(0)
    return file.read(SHOWN).decode(errors="replace")
