"""Compile C++ and CUDA extensions in our own folder, and recover from killed builds.

DeepSpeed compiles extensions when a run starts, through `torch.utils.cpp_extension`, which marks a build with an empty
file `lock`. A killed build leaves this file behind, and later runs hang silently. We use our own folder, one per
machine. Every run holds a lock of the operating system there while it starts, which ends with the process. The process
that gets this lock exclusively knows that nobody is compiling, and deletes stale `lock` files.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

_starting: TextIO | None = None  # locked while the run starts


def claim_extensions() -> None:
    """Set TORCH_EXTENSIONS_DIR, unless the user has, and delete the lock files of killed builds there."""
    global _starting
    if "TORCH_EXTENSIONS_DIR" in os.environ or sys.platform == "win32":
        return
    import fcntl

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "buddygpt" / "torch_extensions"
    folder = cache / f"{platform.node()}-py{platform.python_version()}-torch{version('torch')}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # Use the ninja of this Python even if its environment is not activated: another version would recompile it all.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    _starting = open(folder / "starting", "w")  # noqa: SIM115  open until release_extensions or the process ends
    try:
        fcntl.flock(_starting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in folder.glob("*/lock"):
            print(f"warning: deleted {lock}, left by a killed build", file=sys.stderr)
            lock.unlink()
    except BlockingIOError:  # another run is starting and may be compiling
        pass
    fcntl.flock(_starting, fcntl.LOCK_SH)


def release_extensions() -> None:
    """Release the lock once everything is compiled, so that the next run can clean up while this one trains."""
    global _starting
    if _starting is not None:
        import fcntl

        fcntl.flock(_starting, fcntl.LOCK_UN)  # closing is not enough: data loader workers have inherited the file
        _starting.close()
        _starting = None


def build_extensions() -> None:
    """Compile DeepSpeed's communication between CPU processes now (about a minute), not in the first run."""
    claim_extensions()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()
