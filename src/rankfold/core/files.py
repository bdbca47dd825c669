"""Files written whole or not at all: a temporary file beside the target, fsync, then an atomic rename."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


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
