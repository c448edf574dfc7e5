"""User errors: one line on stderr and exit status 2, without a traceback."""

import argparse
import difflib
import errno
import os
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# Parts of messages that report a full disk. OSError and safetensors say so; torch.save only says that a write failed.
DISK_FULL_MESSAGES = (os.strerror(errno.ENOSPC), "inline_container.cc", "PytorchStreamWriter failed writing")

# Parts of messages of torch that report that memory ran out, on a GPU and on a CPU.
MEMORY_FULL_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory")

PROJECT = Path(__file__).resolve().parents[1]
SECONDS_FOR_RANK_0 = 10


class UserError(Exception):
    """A mistake the user can fix. The message is one line: what is wrong, where, what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to `name`, or None if none is close."""
    matches = difflib.get_close_matches(name, known, n=1)
    return matches[0] if matches else None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the damaged content of a file raises into a UserError that names the file; not if it is missing."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged or of another form ({type(error).__name__}: {error}); make it again"
        ) from error


@contextmanager
def library_errors(problem: str, remedy: str) -> Iterator[None]:
    """Turn what a library raises into a UserError: "PROBLEM: what the library says. REMEDY".

    Libraries check options where they use them. Errors of our own code are mistakes of ours and pass: what it raises,
    and what a library raises that it calls while it is called by a library, such as a callback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _is_ours(error) or _is_out_of(MEMORY_FULL_MESSAGES, error):
            raise
        message = textwrap.shorten(str(error), 300, placeholder=" ...").rstrip(".")
        if " " not in message:  # such as that of KeyError
            message = f"{type(error).__name__} {message}"
        raise UserError(f"{problem}: {message}. {remedy}") from error


def _is_ours(error: Exception) -> bool:
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [file.is_relative_to(PROJECT) and "site-packages" not in file.relative_to(PROJECT).parts for file in files]
    if all(ours) or ours[-1]:
        return True
    called_back = [file for file, is_ours in zip(files, ours, strict=True) if is_ours][ours.index(False) :]
    return any(file.parent != PROJECT / "model" for file in called_back)  # libraries build models through their code


def _is_out_of(messages: Iterable[str], error: Exception) -> bool:
    return any(message in str(error) for message in messages)


@contextmanager
def file_system_errors() -> Iterator[None]:
    """Turn an OSError about a file into a UserError: a name that is too long, a folder that is a file, a link loop."""
    try:
        yield
    except OSError as error:
        if error.filename is None or error.errno == errno.ENOSPC:  # `run_script` has another message for a full disk
            raise
        raise UserError(f"{error.filename}: {error.strerror}") from error


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser that raises [`UserError`] on a mistake and accepts no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")


def run_script(main: Callable[[], None]) -> None:
    """Call `main`. A [`UserError`], a full disk or full memory becomes one line on stderr and exit status 2."""
    try:
        with file_system_errors():
            main()
    except UserError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _is_out_of(DISK_FULL_MESSAGES, error):
            _exit_with(f"the disk is full ({error}). Free some space and run the same command again")
        if isinstance(error, MemoryError) or _is_out_of(MEMORY_FULL_MESSAGES, error):
            message = textwrap.shorten(str(error), 200, placeholder=" ...") or "MemoryError"
            _exit_with(f"there is not enough memory ({message}). Use smaller batches, shorter rows or a smaller model")
        raise


def _exit_with(message: object) -> NoReturn:
    # The launcher kills all processes when the first one exits: let rank 0 print the message before the others exit.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    bars = list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())) if "tqdm" in sys.modules else []
    for bar in bars:
        bar.disable = True  # writes nothing more, also when it is closed
    if bars:
        print(file=sys.stderr)  # the message begins on a line of its own
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
