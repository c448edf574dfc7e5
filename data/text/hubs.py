"""Find files of data sets on the Hugging Face Hub, on ModelScope, in other stores, and on this machine.

    hf://OWNER/NAME                 all files of a data set of the Hub; hf://OWNER/NAME@REVISION for one version
    hf://OWNER/NAME/data/*.jsonl    a file, folder or glob in it
    hf://OWNER/NAME/train_prefs     a split: train_prefs.jsonl, data/train_prefs-00000-of-00001.parquet, ...
    ms://OWNER/NAME/...             the same on ModelScope

Files of the Hub are streamed; `HF_ENDPOINT` sets a mirror. Those of ModelScope are downloaded into its cache.
"""

import glob
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from buddygpt.cli.errors import UserError
from buddygpt.cli.files import FILE_TYPES, file_sha256, file_type, find_files, select_data_files
from buddygpt.data.text.rows import is_url, remote_errors

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_KINDS = ("datasets", "models", "spaces", "buckets")  # first part of a path of the Hub's file system
PART_OF_SPLIT = r"(-\d+-of-\d+(-[0-9a-f]+)?)?"  # what the Hub appends to the name of a split, if anything
SHOWN = 5  # files of a data set that an error names


def find_source_files(path: str, types: Collection[str] = FILE_TYPES) -> list[str]:
    """Return the files that a path, glob, folder, URL or split of a hub stands for, sorted.

    Raises:
        UserError: There is none, or the Hub or store cannot be reached.
    """
    if path.startswith("ms://"):
        return _download_from_modelscope(path, types)
    if not is_url(path):
        if HUB_NAME.fullmatch(path) and file_type(path) not in FILE_TYPES and not Path(path).exists():
            raise UserError(f"no file matches `{path}`; of the Hub, it is `hf://{path}`, of ModelScope `ms://{path}`")
        return [str(file) for file in find_files([path], types)]
    url = _complete_hub_url(path)
    with remote_errors(url):
        system, pattern = fsspec.url_to_fs(url)
        if glob.has_magic(pattern):
            found = [name for name, info in system.glob(pattern, detail=True).items() if info["type"] == "file"]
        elif system.isdir(pattern):
            found = _files_below(system, pattern, url, types)
        elif system.exists(pattern):
            found = [pattern]
        elif url.startswith("hf://"):
            found = _files_of_split(system, pattern, url)
        else:
            found = []
    if not found:
        raise UserError(f"no file matches `{path}`")
    return [system.unstrip_protocol(name) for name in sorted(found)]


def _complete_hub_url(url: str) -> str:
    """Return hf://datasets/OWNER/NAME for hf://OWNER/NAME, which the Hub's file system takes for a model."""
    if not url.startswith("hf://"):
        return url
    path = url.removeprefix("hf://")
    if path.split("/")[0] not in HUB_KINDS:
        path = f"datasets/{path}"
    owner_and_name = "/".join(path.split("/")[1:3]).split("@")[0]
    if not HUB_NAME.fullmatch(owner_and_name):
        raise UserError(f"{url}: write hf://OWNER/NAME, or hf://OWNER/NAME/ and a file, folder, glob or split")
    return f"hf://{path}"


def _files_below(system: Any, folder: str, url: str, types: Collection[str]) -> list[str]:
    start = len(folder.rstrip("/")) + 1
    names = [name[start:] for name in system.find(folder)]
    return [f"{folder.rstrip('/')}/{name}" for name in select_data_files(url, names, types)]


def _files_of_split(system: Any, pattern: str, url: str) -> list[str]:
    """Return the files of a split, the last part of a path that does not exist.

    Raises:
        UserError: There is none. The message names files of the data set.
    """
    system.info("/".join(pattern.split("/")[:3]))  # raises if there is no such data set
    folder, _, split = pattern.rstrip("/").rpartition("/")
    names = system.find(folder)
    found = [name for name in names if _is_of_split(name, split)]
    if not found:
        names = [name[len(folder) + 1 :] for name in names if not name[len(folder) + 1 :].startswith(".")]
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        raise UserError(f"no file or split matches `{url}`; there are: {', '.join(names[:SHOWN])}{more}")
    return found


def _is_of_split(file: str, split: str) -> bool:
    """Return True for `train.jsonl` and `data/train-00000-of-00002.parquet` of the split `train`."""
    path = PurePosixPath(file)
    stem = path.name.split(".")[0]
    return file_type(file) in FILE_TYPES and bool(re.fullmatch(re.escape(split) + PART_OF_SPLIT, stem))


def _download_from_modelscope(url: str, types: Collection[str]) -> list[str]:
    """Download what an ms:// URL stands for into ModelScope's cache, and return the files.

    Files that are in the cache are not downloaded again.
    """
    owner, name, pattern = f"{url.removeprefix('ms://')}//".split("/", 2)
    if not HUB_NAME.fullmatch(f"{owner}/{name}") or ".." in pattern.split("/"):
        raise UserError(f"{url}: write ms://OWNER/NAME, or ms://OWNER/NAME/GLOB")
    try:
        from modelscope import dataset_snapshot_download  # takes seconds to import
    except ImportError as error:
        raise UserError(f"{url}: ModelScope's client is not installed: pip install modelscope") from error

    pattern = pattern.rstrip("/")
    split = "" if glob.has_magic(pattern) or file_type(pattern) in FILE_TYPES else PurePosixPath(pattern).name
    if glob.has_magic(pattern):
        # ModelScope matches with fnmatch: `*` also matches `/`, and `**/` needs at least one folder. So also allow
        # the pattern without `**/`, and without `**` ignore the files that lie deeper than the pattern.
        allowed = [pattern, pattern.replace("**/", "")]
        deeper = "/".join("*" * (pattern.count("/") + 2))
        ignored = [] if "**" in pattern else [deeper]
    else:
        allowed = [pattern, f"{pattern}/*"] if pattern else []
        ignored = []
    if split:
        folder = "" if "/" not in pattern else f"{pattern.rpartition('/')[0]}/"
        endings = (".*", "-*-of-*")
        allowed += [f"{folder}{deep}{split}{ending}" for ending in endings for deep in ("", "*/")]
    with remote_errors(url):
        folder = Path(dataset_snapshot_download(f"{owner}/{name}", allow_patterns=allowed, ignore_patterns=ignored))
    try:
        return [str(file) for file in find_files([str(Path(glob.escape(str(folder)), pattern))], types)]
    except UserError as error:  # it names the cache instead of the URL
        below = folder.joinpath(pattern).parent
        found = [str(file) for file in sorted(below.rglob("*")) if split and _is_of_split(str(file), split)]
        if not found:
            raise UserError(f"no file matches `{url}`") from error
        return found


def describe_file(file: str) -> dict[str, Any]:
    """Return `file`, `bytes` and `sha256` of a file. A URL is described by its hub or store, without a download.

    Hub files without a sha256 are identified by git blob id or ETag, as `git:...` or `etag:...`.
    """
    if not is_url(file):
        return {"file": file, "bytes": Path(file).stat().st_size, "sha256": file_sha256(Path(file))}
    with remote_errors(file):
        system, name = fsspec.url_to_fs(file)
        info = system.info(name)
        if info.get("lfs"):
            version = info["lfs"]["sha256"]
        elif info.get("blob_id"):
            version = f"git:{info['blob_id']}"
        else:
            version = f"etag:{info.get('ETag') or system.ukey(name)}"
        return {"file": file, "bytes": info["size"], "sha256": version}
