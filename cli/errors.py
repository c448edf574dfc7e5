"""User errors: one line on stderr and exit status 2, without a traceback."""

import difflib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

# Parts of messages that report a full disk. OSError and safetensors say so; torch.save only says that a write failed.
DISK_FULL_MESSAGES = (os.strerror(errno.ENOSPC), "inline_container.cc", "PytorchStreamWriter failed writing")

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


def run_script(main: Callable[[], None]) -> None:
    """Call `main`. A [`UserError`] or a full disk becomes one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        _exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not any(message in str(error) for message in DISK_FULL_MESSAGES):
            raise
        _exit_with(f"the disk is full ({error}). Free some space and run the same command again")


def _exit_with(message: object) -> NoReturn:
    # The launcher kills all processes when the first one exits: let rank 0 print the message before the others exit.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(SECONDS_FOR_RANK_0)
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)
