"""Files: written whole or not at all, and read with care where a stranger may have made them."""

import contextlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from rankfold.errors import AdapterFileError

MAX_JSON = 32 << 20  # bytes; some 50,000 adapted layers fit, and parsing it takes bounded memory
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def write_whole(path: str | os.PathLike[str], data: bytes | str | Callable[[Path], None]) -> Path:
    """Replace `path` by `data` atomically: a reader sees the old file or the new one, never a part.

    `data` is the content (text is UTF-8), or a function that writes it to the temporary path it is given. Missing
    parent folders are made. A failure (full disk, Ctrl-C, an error in the function) leaves the old file as it was
    and no temporary file behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        os.close(handle)
        if callable(data):
            data(temporary)
        else:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def fill_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make `folder` of what `fill` writes into the empty folder it is given, in the place of one that is there.

    A failure leaves that as it was, and nothing beside it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        work = Path(temporary) / "whole"
        work.mkdir()
        fill(work)
        if folder.exists():
            folder.rename(Path(temporary) / "old")
        work.rename(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Some file systems refuse to open or sync a folder; the rename itself still holds there."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open the regular file `name` of a folder that a stranger may have made, for reading, unbuffered.

    A symbolic link counts only if it stays inside the folder, or leads from a snapshot in the Hugging Face cache to the
    blobs of the same repository. Raises FileNotFoundError if there is no such file, AdapterFileError for a link that
    leads elsewhere and for anything that is no regular file.
    """
    path = folder / name
    try:
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            path = _follow(folder, path)
            found = path.lstat()
        # A pipe would block the opening and a device could act on it, so neither is opened at all. What takes the
        # file's place after this look is caught by O_NOFOLLOW, O_NONBLOCK and the second look, at the open file.
        if not stat.S_ISREG(found.st_mode):
            raise AdapterFileError(
                f"{folder / name} is not a regular file but a {_sort(found.st_mode)}: put the file itself there"
            )
        flags = [getattr(os, flag, 0) for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY", "O_CLOEXEC")]
        handle = os.open(path, os.O_RDONLY | sum(flags))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterFileError(f"{folder / name} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise AdapterFileError(f"{folder / name} was replaced while it was opened: read a folder that nobody writes to")
    return os.fdopen(handle, "rb", buffering=0)


def _follow(folder: Path, link: Path) -> Path:
    """The file behind a link that stays inside what the folder may refer to."""
    here = Path(os.path.realpath(folder))
    allowed = [here]
    if here.parent.name == "snapshots":
        allowed.append(here.parent.parent / "blobs")
    try:
        target = Path(os.path.realpath(link, strict=True))
    except FileNotFoundError:
        raise AdapterFileError(f"{link} is a symbolic link to nothing: put the file itself there") from None
    if not any(target.is_relative_to(place) for place in allowed):
        raise AdapterFileError(f"{link} is a symbolic link that leads out of its folder: put the file itself there")
    return target


def _sort(mode: int) -> str:
    for test, what in ((stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket")):
        if test(mode):
            return what
    return "device"


def parse_json(data: bytes | bytearray, what: str) -> Any:
    """Parse JSON strictly: UTF-8, no NaN or infinity, no key twice. Raises AdapterFileError that names `what`."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise AdapterFileError(f"{what} is nested too deeply to be an adapter's: it is damaged or hostile") from None
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{what} is not JSON: byte {error.start} is not UTF-8") from None
    except ValueError as error:
        raise AdapterFileError(f"{what} is not valid JSON: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} stands there twice")
            seen.add(key)
    return parsed


def _constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def adapter_folder(path: str | Path, files: list[str], written_by: str) -> Path:
    """The folder at `path`, or the one that the Hugging Face Hub's `org/name` was downloaded to (these files only).

    Raises AdapterFileError for anything else; `written_by` says what writes such a folder.
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        there = folder.exists()
    except (OSError, ValueError) as error:  # an impossible path: too long, or with a NUL in it
        raise AdapterFileError(f"{str(path)[:200]!r} is no path: {error}") from None
    if there:
        raise AdapterFileError(f"{folder} is a file: give the folder that holds {files[0]}")
    if not _HUB_ID.fullmatch(str(path)):
        raise AdapterFileError(
            f"there is no folder {str(path)[:200]!r}: give the one that {written_by} wrote, "
            "or a hub id such as 'org/name'"
        )
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(path), allow_patterns=files))
    except Exception as error:  # the hub client raises a dozen types, of its own and of the HTTP library below it
        reason = str(error).strip().splitlines() or [""]
        raise AdapterFileError(
            f"there is no folder {str(path)!r}, and it cannot be downloaded from the Hugging Face Hub: "
            f"{type(error).__name__}: {reason[0]}"
        ) from error
