"""Where a composed adapter goes: beside an attached one, or into a folder, layer by layer."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import rankfold
from rankfold.compose._sources import Source
from rankfold.core.adapter import Adapter
from rankfold.core.checkpoint import write_spooled
from rankfold.core.convert import put_beside
from rankfold.core.delta import Site
from rankfold.core.document import as_text
from rankfold.core.tensorfile import TensorWriter
from rankfold.deltas.lora import LoRA
from rankfold.errors import RankfoldError


class Result:
    """A plain LoRA in the making, on the base and from the seed of `like`. Used as a context.

    Where `like` is attached, `to` is its name, and it is put beside it, inactive; where it is saved, `to` is a folder,
    into which factors go as they come: none of them stays in memory. There it is called `name`, by default as `like`.
    """

    def __init__(self, like: Source, to: str | Path, name: str | None = None, forced: str | None = None):
        self._like, self._to, self._name, self._forced = like, to, name or like.name, forced
        self._methods: dict[str, LoRA] = {}
        self._sites: dict[str, Site] = {}
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._full: dict[str, dict[str, Tensor]] = {}
        self._writer: TensorWriter | None = None

    def __enter__(self) -> "Result":
        if self._like.adapter is None:
            folder = Path(self._to)
            if folder.exists() and not folder.is_dir():
                raise RankfoldError(f"{folder} is a file; an adapter is saved into a folder")
            self._writer = TensorWriter(next(place for place in folder.absolute().parents if place.is_dir()))
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, site: Site, B: Tensor, A: Tensor, method: LoRA) -> None:
        """The factors B (..., out, r) and A (..., r, in) of a site, `ΔW = method.scale · B A`."""
        self._sites[site.name], self._methods[site.name] = site, method
        B, A = B.to(site.dtype), A.to(site.dtype)
        if self._writer is None:
            self._pairs[site.name] = (B, A)
        else:
            self._writer.add(f"deltas.{site.name}.B", B)
            self._writer.add(f"deltas.{site.name}.A", A)

    def add_full(self, source: Source, path: str) -> None:
        """The module at `path` in full, as the source has it."""
        own = self._full[path] = {}
        for name in source.full[path]:
            if self._writer is None:
                own[name.removeprefix(f"modules.{path}.")] = source.tensor(name)
            else:
                self._writer.add(name, source.tensor(name))

    def finish(self) -> Adapter | Path:
        if not self._methods:
            raise RankfoldError(f"{self._like.name!r} adapts no layer: there is nothing to make a LoRA of")
        if self._like.adapter is not None:
            made = put_beside(self._like.adapter, self._pairs, self._methods, str(self._to), self._full)
            made.forced = self._forced
            return made
        assert self._writer is not None
        return write_spooled(Path(self._to), self._writer, as_text(self._document(self._writer.digest())))

    def _document(self, sha256: str) -> dict[str, Any]:
        """The document of the first source, with another method and the layers that were added."""
        assert self._like.document is not None
        common = max(self._methods.values(), key=lambda method: method.rank).describe()

        def own(site: str) -> dict[str, Any]:
            return {key: value for key, value in self._methods[site].describe().items() if value != common[key]}

        old = self._like.document
        return {
            **old.model_dump(by_alias=True),
            "rankfold": rankfold.__version__,
            "id": secrets.token_hex(16),
            "name": self._name,
            "method": common,
            "init": None,
            "fold": False,
            "targets": old.targets if old.sites.keys() == self._sites.keys() else list(self._sites),
            "sites": {name: _record(site, own(name)) for name, site in self._sites.items()},
            "modules": list(self._full),
            "sha256": sha256,
            "nested": None,
            "forced": self._forced,
        }


def _record(site: Site, method: Mapping[str, Any]) -> dict[str, Any]:
    dtype = str(site.dtype).removeprefix("torch.")
    return {"kind": site.kind, "shape": [*site.batch, site.out, site.in_], "dtype": dtype, "method": dict(method)}
