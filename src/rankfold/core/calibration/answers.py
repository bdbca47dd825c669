"""What a calibration found: statistics by site, in memory or on disk."""

import json
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

import rankfold
from rankfold.core.calibration.statistics import STATISTICS, Statistic
from rankfold.core.files import write_whole
from rankfold.errors import RankfoldError

T = TypeVar("T")
FORMAT = 1


class Calibration:
    """What `calibrate` collected: in memory, or on disk where it would not have fit `memory_limit`."""

    def __init__(
        self,
        where: dict[str, dict[Statistic[Any], tuple[int, str]]],
        parts: Sequence[dict[str, Tensor] | Path],
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ):
        self._where = where  # by site and statistic: the number of the part, and the tensors' prefix in it
        self._parts = list(parts)
        self._folder = folder  # lives, and is removed, with this object

    @property
    def sites(self) -> list[str]:
        return list(self._where)

    def get(self, statistic: Statistic[T], site: str) -> T:
        """The answer to `statistic` at the site of that name, on the CPU.

        Raises RankfoldError if it was not collected, with a list of what was.
        """
        if site not in self._where:
            there = f"{', '.join(self.sites[:4])} ({len(self.sites)} sites)" if self._where else "none"
            raise RankfoldError(
                f"no statistic was collected at {site!r}: either it was not among the calibration's targets or no "
                f"batch reached it. There is something at: {there}"
            )
        for collected, (part, key) in self._where[site].items():
            if collected.answers(statistic):
                try:
                    return statistic.read(self._tensors(part, key))
                except KeyError as error:
                    raise RankfoldError(f"{self._parts[part]} lacks the tensor {key}{error.args[0]}") from None
        there = ", ".join(map(repr, self._where[site]))
        raise RankfoldError(f"{statistic!r} was not collected at {site!r}; there are: {there}")

    def _tensors(self, part: int, key: str) -> dict[str, Tensor]:
        held = self._parts[part]
        if isinstance(held, dict):
            return {name.removeprefix(key): tensor for name, tensor in held.items() if name.startswith(key)}
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(held, "pt") as file:
                names = [name for name in file.keys() if name.startswith(key)]  # noqa: SIM118
                return {name.removeprefix(key): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RankfoldError(f"cannot read the calibration file {held}: {error}") from None

    def save(self, folder: str | Path) -> Path:
        """Write `calibration.json` and its tensors, as safetensors files, into the folder, in place of what was there.

        The JSON file comes last and names its tensor files: whatever interrupts leaves the old calibration or the new.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        old = list(folder.glob("calibration-*.safetensors"))
        stamp = uuid.uuid4().hex[:8]
        names = [f"calibration-{stamp}-{i}.safetensors" for i in range(len(self._parts))]
        for name, part in zip(names, self._parts, strict=True):
            if isinstance(part, dict):
                write_whole(folder / name, lambda path, part=part: save_file(part, path))
            else:
                write_whole(folder / name, lambda path, part=part: _copy(part, path))
        statistics = list(dict.fromkeys(statistic for there in self._where.values() for statistic in there))
        description = {
            "format": FORMAT,
            "rankfold": rankfold.__version__,
            "statistics": [{"name": type(s).__name__, **asdict(s)} for s in statistics],  # type: ignore[call-overload]
            "files": names,
            "sites": {
                site: [[statistics.index(statistic), part, key] for statistic, (part, key) in there.items()]
                for site, there in self._where.items()
            },
        }
        write_whole(folder / "calibration.json", json.dumps(description, indent=1))
        for path in old:
            path.unlink(missing_ok=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Calibration":
        """Read what `save` wrote. Tensors stay on disk until they are asked for.

        Raises RankfoldError if there is no calibration, or it is damaged or of another version.
        """
        folder = Path(folder)
        try:
            description = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RankfoldError(f"{folder} holds no readable calibration.json: {error}") from None
        if not isinstance(description, dict) or description.get("format") != FORMAT:
            found = description.get("format") if isinstance(description, dict) else type(description).__name__
            raise RankfoldError(f"{folder}: calibration format {found!r}, this version of Rankfold reads {FORMAT}")
        try:
            statistics = [_statistic(dict(entry)) for entry in description["statistics"]]
            parts = [_inside(folder, name) for name in description["files"]]
            where = {
                str(site): {statistics[int(i)]: (range(len(parts))[part], str(key)) for i, part, key in entries}
                for site, entries in description["sites"].items()
            }
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, RankfoldError):
                raise
            raise RankfoldError(f"{folder}: calibration.json is damaged ({type(error).__name__}: {error})") from None
        return cls(where, parts)

    def __repr__(self) -> str:
        statistics = dict.fromkeys(statistic for there in self._where.values() for statistic in there)
        return f"Calibration({len(self._where)} sites: {', '.join(map(repr, statistics))})"


def _statistic(entry: dict[str, Any]) -> Statistic[Any]:
    name = entry.pop("name")
    if name not in STATISTICS:
        raise RankfoldError(f"no statistic is called {name!r}; known are {', '.join(STATISTICS)}")
    return STATISTICS[name](**entry)


def _inside(folder: Path, name: str) -> Path:
    """A file directly in the folder; names with a path in them are refused."""
    if Path(name).name != name or not (folder / name).is_file():
        raise RankfoldError(f"{folder}: calibration.json names {name!r}, which is no file in that folder")
    return folder / name


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)
