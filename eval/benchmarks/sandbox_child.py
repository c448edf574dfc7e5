"""The process that `sandbox.py` starts: it locks a program into new namespaces and ends it when its time is over.

Run with a JSON object of settings; imports the standard library only. The supervisor stays outside, where the program
cannot signal it. Its child becomes process 1 of a new PID namespace; when process 1 ends, the kernel ends all others.
Follows namespaces(7), user_namespaces(7), pivot_root(2) and mount_setattr(2).
"""

import ctypes
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number is the same on all architectures
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
FIRST_FREE_UID = 1 << 24  # of the program, if root starts it: each process has its own, so that it can be counted

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library; OSError with its name if it fails."""
    function = getattr(libc, name)
    encoded = [argument.encode() if isinstance(argument, str) else argument for argument in arguments]
    if function(*encoded) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    settings = json.loads(sys.argv[1])
    report = settings["report"]  # a pipe to sandbox.py
    os.set_inheritable(report, False)
    try:
        by_root = os.getuid() == 0
        proc = os.open("/proc/self", os.O_RDONLY)
        if by_root:
            call("unshare", NAMESPACES)
        else:
            uid, gid = os.getuid(), os.getgid()
            call("unshare", NAMESPACES | CLONE_NEWUSER)
            map_user(proc, inside=(0, 0), outside=(uid, gid))
        first = os.fork()
    except (OSError, AttributeError) as error:
        tell(report, error=str(error))
        return
    if first:
        supervise(first, settings["seconds"], report)
        return
    try:
        start_program(settings, by_root)
    except BaseException as error:  # nothing may continue here as a second supervisor
        tell(report, error=str(error))
        os._exit(1)


def supervise(first: int, seconds: float, report: int) -> None:
    """Wait for process 1 of the namespace, at most `seconds`, and report how it ended."""
    is_over = []

    def end(number: int, frame: Any) -> None:
        is_over.append(number)
        with suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(first, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.signal(signal.SIGTERM, end)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGTERM)  # if sandbox.py is killed, so is the program
    signal.setitimer(signal.ITIMER_REAL, seconds)
    _, status = os.waitpid(first, 0)
    for number in (signal.SIGALRM, signal.SIGTERM):  # from now on, `first` may name another process
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(status)
    is_timeout = bool(is_over) or code == -signal.SIGXCPU
    tell(report, code=code, timeout=is_timeout)


def tell(report: int, **content: Any) -> None:
    """Write a line to sandbox.py, which reads the first one."""
    os.write(report, json.dumps(content).encode() + b"\n")


def map_user(proc: int, inside: tuple[int, int], outside: tuple[int, int]) -> None:
    """Name the user and group of this process inside its new user namespace. `proc` is its open folder in /proc."""
    lines = {"setgroups": "deny", "uid_map": f"{inside[0]} {outside[0]} 1", "gid_map": f"{inside[1]} {outside[1]} 1"}
    for name, line in lines.items():
        file = os.open(name, os.O_WRONLY, dir_fd=proc)
        os.write(file, line.encode())
        os.close(file)


def start_program(settings: dict[str, Any], by_root: bool) -> None:
    """Become the program: see only `binds`, read-only, and an empty folder /box; without privileges; with limits."""
    proc = os.open("/proc/self", os.O_RDONLY)
    user = FIRST_FREE_UID + settings["number"] if by_root else 0
    program = Path(settings["program"]).read_bytes()
    build_root(settings["root"], settings["binds"], settings["file_bytes"], user)
    os.chdir("/box")
    Path("program.py").write_bytes(program)
    for number, limit in settings["limits"]:
        resource.setrlimit(number, (limit, limit))
    if by_root:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    else:  # a user other than 0 of another user namespace loses all capabilities when it executes a program
        call("unshare", CLONE_NEWUSER)
        map_user(proc, inside=(1000, 1000), outside=(0, 0))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.execve(settings["command"][0], settings["command"], settings["environment"])


def build_root(root: str, binds: list[str], file_bytes: int, user: int) -> None:
    """Replace the root of the file system by an empty one with `binds` and /box.

    Args:
        root: An empty folder.
        binds: Absolute paths of folders, files and links, to be seen under the same paths.
        file_bytes: Size of /box, which lies in memory.
        user: Owner of /box.
    """
    call("mount", "none", "/", None, MS_REC | MS_PRIVATE, None)
    call("mount", "none", root, b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path in binds:
        target = Path(root + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            target.symlink_to(os.readlink(path))
            continue
        if os.path.isdir(path):
            target.mkdir(exist_ok=True)
        else:
            target.touch()
        call("mount", path, str(target), None, MS_BIND | MS_REC, None)
    Path(root, "box").mkdir()
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, root, AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    options = f"size={file_bytes},mode=700,uid={user},gid={user}"
    call("mount", "none", f"{root}/box", b"tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    call("pivot_root", ".", ".")  # the old root now lies on top of the new one
    call("umount2", ".", MNT_DETACH)
    os.chdir("/")


if __name__ == "__main__":
    main()
