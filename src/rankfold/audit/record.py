"""What an audit found, kept beside the adapter in `audit.json`, so that whoever inspects, merges or exports it knows.

The record names the adapter's id, which is new with every save: an adapter that was trained on has none. It is no part
of the document, for an audit changes nothing about the adapter.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

import rankfold
from rankfold.core.checkpoint import read as read_adapter
from rankfold.core.files import open_inside, parse_json, write_whole
from rankfold.errors import AdapterFileError, RankfoldError

FILE = "audit.json"
_MOST = 4 << 20  # bytes; an alarm takes about 150
_Text = Annotated[str, Field(max_length=2000)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Raised(_Strict):
    """An alarm, as `report.Alarm`."""

    name: _Text
    where: _Text
    value: FiniteFloat
    threshold: FiniteFloat
    level: Literal["WARN", "HIGH"]

    def __str__(self) -> str:
        return f"{self.level} {self.name} at {self.where}: {self.value:.4g} (limit {self.threshold:g})"


class Record(_Strict):
    """`id` is the adapter's; `missing` what was not measured, and why: that is never a pass."""

    id: _Text
    rankfold: _Text
    alarms: list[Raised]
    missing: dict[_Text, _Text]


def write(folder: Path, alarms: Collection[Raised], missing: dict[str, str]) -> Path:
    """Put the record beside the adapter that it is of."""
    made = Record(id=read_adapter(folder).document.id, rankfold=rankfold.__version__, alarms=[*alarms], missing=missing)
    return write_whole(folder / FILE, made.model_dump_json(indent=2) + "\n")


def read(folder: Path) -> Record | None:
    """The record of the adapter in the folder, or None: there is none, or it is that of an adapter before this one.

    Raises AdapterFileError where the file is damaged or hostile.
    """
    adapter = read_adapter(folder)
    what = str(adapter.path / FILE)
    try:
        with open_inside(adapter.path, FILE) as handle:
            data = b""
            while len(data) <= _MOST and (part := handle.read(_MOST + 1 - len(data))):
                data += part
    except FileNotFoundError:
        return None
    if len(data) > _MOST:
        raise AdapterFileError(f"{what} is larger than {_MOST:,} bytes, more than an audit's record: delete it")
    try:
        found = Record.model_validate(parse_json(data, what))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))[:200]
        raise AdapterFileError(f"{what}: {at!r}: {first['msg']}; audit the adapter again, or delete the file") from None
    return found if found.id == adapter.document.id else None


def check(folder: Path, despite: Collection[str] = ()) -> None:
    """Refuse an adapter whose audit raised a HIGH alarm that is not named in `despite`."""
    found = read(folder)
    high = [] if found is None else [alarm for alarm in found.alarms if alarm.level == "HIGH"]
    if against := [alarm for alarm in high if alarm.name not in despite]:
        names = " ".join(f"--despite {name!r}" for name in dict.fromkeys(alarm.name for alarm in against))
        raise RankfoldError(f"the audit of {folder} raised {against[0]} ({len(against)} in all); to go on: {names}")
