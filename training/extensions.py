"""Where C++ and CUDA code is compiled while a run starts (DeepSpeed does), and how a killed compilation is got over.

`torch.utils.cpp_extension` marks a compilation by an empty file `lock`; killed, it leaves the file behind, and every
later run waits for it for ever, without a word. So ours compile in a folder of their own, one for each machine. While
a run starts it holds a lock of the kernel's there, which ends with the process however it ends: who gets that lock
alone knows that nobody compiles, and deletes the files that say otherwise.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

_held: TextIO | None = None


def claim_extensions() -> None:
    """Set TORCH_EXTENSIONS_DIR, if the user has not, and clear it of what killed compilations have left."""
    global _held
    if "TORCH_EXTENSIONS_DIR" in os.environ or sys.platform == "win32":
        return
    import fcntl

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "buddygpt" / "torch_extensions"
    folder = cache / f"{platform.node()}-py{platform.python_version()}-torch{version('torch')}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # The ninja of this Python also where its environment is not activated: another version would compile all anew.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    _held = open(folder / "starting", "w")  # noqa: SIM115  held until release_extensions, or the end of the process
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for lock in folder.glob("*/lock"):
            print(f"warning: {lock} was left by a compilation that was killed, and is deleted", file=sys.stderr)
            lock.unlink()
    except BlockingIOError:  # others are starting too, perhaps compiling
        pass
    fcntl.flock(_held, fcntl.LOCK_SH)


def release_extensions() -> None:
    """Everything is compiled: let the next run that starts clear the folder, although this one goes on."""
    global _held
    if _held is not None:
        import fcntl

        fcntl.flock(_held, fcntl.LOCK_UN)  # for the data loader's workers too, who have inherited it
        _held.close()
        _held = None


def build_extensions() -> None:
    """Compile DeepSpeed's communication between CPU processes, so that the first run need not (a minute)."""
    claim_extensions()
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()
