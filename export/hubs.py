"""Send a folder to Hugging Face or ModelScope through their own clients, and say in one line why one refuses."""

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from buddygpt.cli.errors import UserError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOGIN = {
    "hf": "Log in with a token that may write there: hf auth login",
    "modelscope": "Log in: modelscope login --token TOKEN",
}
FULL = ("quota", "storage limit", "payment")
REFUSED = ("401 ", "403 ", "unauthorized", "forbidden", "[e3001]", "[e3002]")  # also if a client gives no status
AGAIN = "Run the same command again; what has arrived is not sent twice"


class Target(NamedTuple):
    """A repository: `hub` is a key of `LOGIN`, `name` is USER/NAME."""

    hub: str
    name: str

    def __str__(self) -> str:
        return f"{self.hub}:{self.name}"


def parse_target(text: str) -> Target:
    """Read HUB:USER/NAME. Raises UserError if it has another form."""
    hub, _, name = text.partition(":")
    if hub not in LOGIN or not HUB_NAME.fullmatch(name):
        raise UserError(f"--to {text}: write hf:USER/NAME or modelscope:USER/NAME")
    return Target(hub, name)


def send(target: Target, folder: Path, private: bool) -> str:
    """Send all files of a folder, make the repository if needed, and return the address of its page.

    Files with the same names are replaced, others stay. It can be repeated.

    Args:
        target: The repository.
        folder: Folder with exactly the files to send.
        private: Make a new repository private. An existing one must be private already.

    Raises:
        UserError: The hub refuses, cannot be reached, or the repository is public although `private` is set.
    """
    try:
        return {"hf": _send_to_hugging_face, "modelscope": _send_to_modelscope}[target.hub](target, folder, private)
    except (UserError, AttributeError, NameError, TypeError):  # the others are mistakes of ours
        raise
    except Exception as error:  # the clients raise many kinds, of several HTTP libraries
        raise UserError(f"{target}: {_reason(error)}. {_remedy(target.hub, error)}") from error


def _send_to_hugging_face(target: Target, folder: Path, private: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(target.name, private=private or None, exist_ok=True)
    if private:
        _require_private(target, api.model_info(target.name).private)
    api.upload_folder(repo_id=target.name, folder_path=folder, commit_message="Upload the model")
    return f"{api.endpoint}/{target.name}"


def _send_to_modelscope(target: Target, folder: Path, private: bool) -> str:
    from modelscope_hub import HubApi
    from modelscope_hub.errors import is_repo_exists_error

    with _errors_logged_by_modelscope() as logged:
        api = HubApi()
        try:
            api.create_repo(target.name, "model", visibility="private" if private else "public")
        except Exception as error:
            if not is_repo_exists_error(error):
                raise
            if private:
                _require_private(target, api.get_repo(target.name, "model").visibility == 1)
        try:
            # Its cache would be a file in the folder, and would believe in files of a repository that was deleted.
            api.upload_folder(target.name, "model", folder, commit_message="Upload the model", use_cache=False)
        except Exception as error:
            if not logged:
                raise
            raise RuntimeError(logged[0]) from error  # the exception only counts the files that failed
    return f"{api.legacy.endpoint}/models/{target.name}"


def _require_private(target: Target, is_private: bool | None) -> None:
    if not is_private:
        raise UserError(f"{target} exists and is public: make it private on its page, or leave out --private")


@contextmanager
def _errors_logged_by_modelscope() -> Iterator[list[str]]:
    """Collect the errors that its client logs, and hide its other messages and its report."""
    logged: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("modelscope_hub")
    used, logger.handlers = logger.handlers, [handler]
    try:
        with redirect_stdout(io.StringIO()):
            yield logged
    finally:
        logger.handlers = used


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that an exception, or one that it was raised from, is about."""
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    text = " ".join(message.split()).partition(" | code=")[0].rstrip(".")  # modelscope_hub adds the whole answer
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _remedy(hub: str, error: Exception) -> str:
    status = _status(error)
    text = _reason(error).lower()
    if status in (402, 507) or any(word in text for word in FULL):
        return "Free some space there, then run the same command again"
    if status in (401, 403) or any(word in text for word in REFUSED):
        return LOGIN[hub]
    return AGAIN
