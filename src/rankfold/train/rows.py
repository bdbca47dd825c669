"""Rows of data: reading them from files, folders and hubs, and the seeded cut into training and held-out rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from rankfold.errors import RankfoldError
from rankfold.train.places import locate
from rankfold.train.recipe import Data

_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def read_split(data: Data, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The training rows and the held-out rows of a recipe, in the order of the source, with the columns of the source.

    The same seed gives the same cut on any machine.
    """
    rows = read_rows(data, data.path, data.split, "data.path")
    held = data.held_out
    if held.path is not None:
        train, held_out = rows, read_rows(data, held.path, data.split, "data.held_out.path")
    elif held.split is not None:
        train, held_out = rows, read_rows(data, data.path, held.split, "data.held_out.split")
    else:
        if len(rows) < 2:
            raise RankfoldError(f"data.path: {data.path} holds {len(rows)} rows; a held-out share needs at least 2")
        order = np.random.default_rng(seed).permutation(len(rows))
        count = min(max(1, round(held.fraction * len(rows))), len(rows) - 1)
        train, held_out = _pick(rows, order[count:]), _pick(rows, order[:count])
    train, held_out = _limit(train, data.limit, seed), _limit(held_out, held.limit, seed)
    for part, key in ((train, "data.path"), (held_out, "data.held_out")):
        if len(part) == 0:
            raise RankfoldError(f"{key}: there is no row")
    return train, held_out


def _limit(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(rows):
        return rows
    return _pick(rows, np.random.default_rng(seed).permutation(len(rows))[:limit])


def _pick(rows: datasets.Dataset, indices: np.ndarray) -> datasets.Dataset:
    return rows.select(np.sort(indices))


def read_rows(data: Data, place: str, split: str, key: str) -> datasets.Dataset:
    """All rows at `place`. Raises RankfoldError, naming the recipe key `key`, where they cannot be read."""
    path = locate(place, key)
    try:
        if path is None:
            return datasets.load_dataset(place, data.config, split=split, **data.read)
        if path.suffix == ".npz":
            return _read_arrays(path, data)
        if path.is_dir() and data.format == "image-classification":
            return datasets.load_dataset("imagefolder", data_dir=str(path), split="train", **data.read)
        reader, files = _files(path, key)
        options: dict[str, Any] = {"sample_by": "paragraph"} if reader == "text" else {}
        if reader == "csv" and files[0].suffix == ".tsv":
            options["delimiter"] = "\t"
        return datasets.load_dataset(reader, data_files=[str(f) for f in files], split="train", **options, **data.read)
    except RankfoldError:
        raise
    except Exception as error:  # readers raise anything from OSError to pyarrow's own; the cause is what helps
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise RankfoldError(f"{key}: cannot read {place}: {reason}") from error


def _files(path: Path, key: str) -> tuple[str, Sequence[Path]]:
    """The reader for `path`, and the data files there in sorted order."""
    found = sorted(f for f in path.rglob("*") if f.is_file() and _reader(f)) if path.is_dir() else [path]
    readers = {_reader(f) for f in found}
    known = ", ".join(_READERS)
    if len(readers) > 1:
        kinds = ", ".join(sorted(map(str, readers)))
        raise RankfoldError(f"{key}: {path} mixes kinds of files ({kinds}): name one file")
    reader = readers.pop() if readers else None
    if reader is None:
        raise RankfoldError(f"{key}: {path} holds no data file; known are {known} (or .npz arrays of pictures)")
    return reader, found


def _reader(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED]
    return _READERS.get(suffixes[-1].lower()) if suffixes else None


def _read_arrays(path: Path, data: Data) -> datasets.Dataset:
    """Pictures (n, height, width) or (n, height, width, 3), bytes or floats from 0 to 1, and labels (n,), as rows."""
    from PIL import Image

    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in (data.column("image"), data.column("label")) if name not in arrays]
        if missing:
            raise RankfoldError(f"data.columns: {path} has no array {missing[0]!r}; it has: {', '.join(arrays.files)}")
        pictures, labels = arrays[data.column("image")], arrays[data.column("label")]
    if pictures.dtype != np.uint8:
        pictures = (pictures * 255).round().clip(0, 255).astype(np.uint8)
    image, label = data.column("image"), data.column("label")
    features = datasets.Features({image: datasets.Image(), label: datasets.Value("string")})
    columns = {image: [Image.fromarray(picture) for picture in pictures], label: [str(value) for value in labels]}
    return datasets.Dataset.from_dict(columns, features=features)
