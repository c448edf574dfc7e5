"""Tests of the sandbox for generated programs: each is an attack, and what it reached."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from buddygpt.cli.errors import UserError
from buddygpt.eval.benchmarks import sandbox
from buddygpt.eval.benchmarks.sandbox import run_program

try:
    sandbox.require_sandbox()
    REASON = ""
except UserError as error:
    REASON = str(error)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(REASON), reason=REASON)]

# Prints how each way ends: `reached`, or the name of the error.
ATTEMPT = """
def attempt(function, *arguments):
    try:
        function(*arguments)
        print("reached")
    except BaseException as error:
        print(type(error).__name__)
"""
ATTACKS = {
    "endless loop": ("while True: pass", "timeout", ""),
    "ignores SIGTERM": ("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)", "timeout", ""),
    "sleeps": ("import time; time.sleep(60)", "timeout", ""),
    "crashes": ("import os; os.kill(os.getpid(), 11); os.abort()", "failed", ""),
    "fork bomb": (
        "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "        n += 1\nexcept BlockingIOError:\n    print(n < 8)",
        "passed",
        "True\n",
    ),
    "bomb of all children": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout", ""),
    "10 GB list": ("attempt(lambda: [0] * (10 * 2**30 // 8))", "passed", "MemoryError\n"),
    "endless output": ("while True: print('x' * 1000)", "failed", None),
    "large file": ("attempt(lambda: open('x', 'wb').write(bytes(64 << 20)))", "passed", "OSError\n"),
    "many files": (
        "n = 0\ntry:\n    while n < 64:\n        open(str(n), 'wb').write(bytes(1 << 20))\n        n += 1\n"
        "except OSError:\n    print(n <= 16)",
        "passed",
        "True\n",
    ),
    "writes outside": (
        "import os\nfor path in ('/x', '/tmp/x', '/usr/x', '/etc/x', '/root/x', '/dev/x'): attempt(open, path, 'w')",
        "passed",
        None,
    ),
    "reads secrets": (
        "import os\nprint([p for p in ('/root/.ssh', '/home', '/etc/passwd', '/proc', '/var', '/sys', '/dev/shm') "
        "if os.path.exists(p)], os.path.exists(HOME + '/.ssh'), os.path.exists(FOLDER))",
        "passed",
        "[] False False\n",
    ),
    "network": (
        "import socket\nfor host in ('127.0.0.1', '1.1.1.1'): attempt(socket.create_connection, (host, PORT), 2)\n"
        "attempt(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto, b'x', ('127.0.0.1', PORT))",
        "passed",
        "OSError\n" * 3,
    ),
    "kills the parent": (
        "import os\nprint(os.getpid(), os.getppid())\nfor pid in (PARENT, SUPERVISOR): attempt(os.kill, pid, 9)\n"
        "attempt(os.kill, -1, 9)",
        "passed",
        "1 0\n" + "ProcessLookupError\n" * 3,
    ),
    "zombie children": (
        "import os, time\nfor _ in range(2):\n    if os.fork() == 0: os._exit(0)\ntime.sleep(0.1)\nprint('done')",
        "passed",
        "done\n",
    ),
    "daemon": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    os.execv('/bin/sleep', ['left', '1234'])\nprint('left')",
        "passed",
        "left\n",
    ),
    "privileges": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(os.getuid() == 0, libc.mount(b'none', b'/box', b'tmpfs', 0, None), libc.chroot(b'/box'))\n"
        "attempt(os.setuid, 0)\nprint(sorted(n for n in range(64) if os.path.exists('/dev/null') and is_open(n)))",
        "passed",
        "False -1 -1\nPermissionError\n[0, 1, 2]\n",
    ),
    "raises its limits": (
        "import resource\nfor name in ('AS', 'FSIZE', 'NPROC', 'CPU'):\n"
        "    attempt(resource.setrlimit, getattr(resource, 'RLIMIT_' + name), (-1, -1))",
        "passed",
        "ValueError\n" * 4,
    ),
}  # fmt: skip
HELPERS = "import os\ndef is_open(n):\n    try: os.fstat(n); return True\n    except OSError: return False\n" + ATTEMPT


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_reaches_nothing(name, tmp_path):
    program, status, printed = ATTACKS[name]
    words = {"PARENT": os.getpid(), "SUPERVISOR": os.getppid(), "PORT": 22, "HOME": str(Path.home())}
    for word, value in {**words, "FOLDER": str(tmp_path)}.items():
        program = program.replace(word, repr(value))
    before = children()
    started = time.monotonic()
    outcome = run_program(HELPERS + program, seconds=1 if status == "timeout" else 20)
    assert time.monotonic() - started < 60
    assert outcome.status == status, outcome
    assert printed is None or outcome.stdout == printed, outcome
    assert len(outcome.stdout) <= sandbox.FILE_BYTES and "reached" not in outcome.stdout
    assert children() == before
    assert not [
        each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["left"]
    ]  # it has no parent


def test_a_program_reads_its_input_and_may_use_threads_and_files():
    program = (
        "import threading\nthreading.stack_size(1 << 26)\nopen('note', 'w').write(input())\n"
        "thread = threading.Thread(target=lambda: print(open('note').read()[::-1]))\nthread.start()\nthread.join()"
    )
    assert run_program(program, stdin="你好\n") == ("passed", "好你\n", "")
    assert run_program("import os; print(os.listdir('.'))").stdout == "['program.py']\n"  # nothing is left of it
    assert run_program("raise SystemExit(3)").status == "failed"
    assert "SyntaxError" in run_program("def").stderr


def test_the_program_ends_with_the_process_that_runs_it():
    program = "import time; time.sleep(4321)"
    code = f"from buddygpt.eval.benchmarks.sandbox import run_program; run_program('{program}', seconds=60)"
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until(
        lambda: [c for c in psutil.Process(process.pid).children(recursive=True) if "program.py" in c.cmdline()]
    )
    inner = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not [each for each in inner if each.is_running() and each.status() != psutil.STATUS_ZOMBIE])


def test_nothing_runs_without_isolation(monkeypatch):
    monkeypatch.setattr(sandbox, "SYSTEM", ("/dev/null",))  # without the libraries, the program cannot start
    with pytest.raises(UserError, match="generated code cannot be run safely here .*; use Linux 5.12 or newer"):
        run_program("print(1)")
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(UserError, match="darwin has no namespaces"):
        run_program("print(1)")


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def wait_until(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)
