"""Run a program that a model wrote, in a process that can do no harm.

    outcome = run_program("print(int(input()) + 1)", stdin="1", seconds=5)
    assert outcome.status == "passed" and outcome.stdout == "2\\n"

The program runs in Linux namespaces of its own (`sandbox_child.py`): without network, without other processes to see
or signal, and with a file system that holds Python, the system's libraries (read-only) and /box, an empty folder in
memory. It has no privileges and limits on time, memory, files and processes. Where the kernel does not offer this, as
in most containers and on other systems, nothing runs: [`require_sandbox`] says so.

Limits of this protection: a fault of the kernel itself; and memory is limited for each process, so a program can take
`PROCESSES` times as much.
"""

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from buddygpt.cli.errors import UserError

PROCESSES = 4  # processes and threads; solutions may start a thread for a deeper stack
MEMORY = 1 << 30  # bytes of address space of each process
FILE_BYTES = 16 << 20  # of all files together, and of the output
OPEN_FILES = 64
CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/box", "TMPDIR": "/box", "LANG": "C.UTF-8"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads count as processes

numbers = itertools.count(os.getpid() % 4096 << 12)  # of the programs, each with a user of its own if root starts it


class Outcome(NamedTuple):
    """How a program ended.

    Attributes:
        status: `passed` if it ended with exit status 0, `failed` if with another or by a signal, `timeout` if its time
            was over.
        stdout: What it wrote, at most `FILE_BYTES`. Bytes that are not UTF-8 are replaced.
        stderr: The same.
    """

    status: str
    stdout: str
    stderr: str


def run_program(program: str, stdin: str = "", seconds: float = 10, memory: int = MEMORY) -> Outcome:
    """Run a Python program and return how it ended.

    Args:
        program: Its source.
        stdin: What it reads.
        seconds: Wall-clock time that it may take. It may take as much CPU time, rounded up.
        memory: Bytes of address space for each of its processes. Python itself takes 20 MB.

    Raises:
        UserError: It cannot be run safely here.
    """
    outcome, error = _run(program, stdin, seconds, memory)
    if outcome is None:
        raise UserError(
            f"generated code cannot be run safely here ({error}); use Linux 5.12 or newer with user namespaces, not "
            "inside a container without them"
        )
    return outcome


@cache
def require_sandbox() -> None:
    """Raise UserError if programs cannot be run safely here."""
    run_program("pass")


def _run(program: str, stdin: str, seconds: float, memory: int) -> tuple[Outcome | None, str]:
    """Return the outcome, or None and the reason why the program was not started."""
    if sys.platform != "linux":
        return None, f"{sys.platform} has no namespaces"
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        paths = {name: Path(folder, name) for name in ("root", "program", "stdin", "stdout", "stderr")}
        paths["root"].mkdir()
        paths["program"].write_text(program, encoding="utf-8", errors="replace")
        paths["stdin"].write_text(stdin, encoding="utf-8", errors="replace")
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe:
            try:
                supervisor = _start(paths, _settings(paths, seconds, memory) | {"report": writing}, writing)
            finally:
                os.close(writing)
            try:
                report = json.loads(pipe.readline() or b"{}")
            finally:
                supervisor.terminate()  # without effect after its report; after Ctrl+C, it ends the program
                supervisor.wait()
        texts = {name: paths[name].read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")}
    if "code" not in report:
        return None, report.get("error") or texts["stderr"].strip().rpartition("\n")[2] or "it did not start"
    status = "timeout" if report["timeout"] else "failed" if report["code"] else "passed"
    return Outcome(status, **texts), ""


def _start(paths: dict[str, Path], settings: dict[str, Any], report: int) -> subprocess.Popen:
    with paths["stdin"].open("rb") as stdin, paths["stdout"].open("wb") as out, paths["stderr"].open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD), json.dumps(settings)],
            stdin=stdin,
            stdout=out,
            stderr=err,
            pass_fds=[report],
            start_new_session=True,  # Ctrl+C ends this process alone
        )


def _settings(paths: dict[str, Path], seconds: float, memory: int) -> dict[str, Any]:
    """Return what sandbox_child.py needs to know."""
    python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parent.parent)}
    binds = [path for path in SYSTEM if os.path.lexists(path)]
    for folder in sorted(python):  # a folder before those inside it
        if not any(Path(folder).is_relative_to(path) for path in binds):
            binds.append(folder)
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: PROCESSES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    return {
        "root": str(paths["root"]),
        "program": str(paths["program"]),
        "command": [sys.executable, "-I", "-B", "program.py"],
        "environment": ENVIRONMENT,
        "binds": binds,
        "file_bytes": FILE_BYTES,
        "limits": list(limits.items()),
        "number": next(numbers),
        "seconds": seconds,
    }
