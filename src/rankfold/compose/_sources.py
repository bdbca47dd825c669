"""One adapter, attached or on disk, as products B A that are had one layer at a time."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core import fingerprint
from rankfold.core.adapter import Adapter
from rankfold.core.checkpoint import FOREIGN, SavedDeltas
from rankfold.core.convert import product
from rankfold.core.delta import Delta, Site
from rankfold.core.document import Base, Document, SiteRecord
from rankfold.core.layers import AdaptedConv, AdaptedConv1D, AdaptedEmbedding, AdaptedLinear, kind_of
from rankfold.core.method import Method
from rankfold.core.quantized import dense
from rankfold.core.routing import find_state, unwrapped
from rankfold.core.targets import site_at
from rankfold.core.weightfiles import WeightFiles
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError

_KINDS = {mixin.kind: mixin for mixin in (AdaptedLinear, AdaptedConv1D, AdaptedEmbedding, AdaptedConv)}
BaseWeights = nn.Module | str | Path


class Source:
    """An adapter that is read and never changed: `sites` by name, `methods` of each, `base` it was trained on.

    `adapter` is the attached adapter, `document` that of a saved one; the other is None. `full` names the tensors of
    each module that it holds in full, by path. `doubt` is what says that the base weights that were given are not its.
    """

    def __init__(self, name: str, sites: Mapping[str, Site], methods: Mapping[str, Method], base: Base):
        self.name, self.sites, self.methods, self.base = name, dict(sites), dict(methods), base
        self.adapter: Adapter | None = None
        self.document: Document | None = None
        self.full: dict[str, list[str]] = {}
        self.doubt: str | None = None

    @property
    def forced(self) -> str | None:
        """What spoke against making this adapter already."""
        made: Any = self.document or self.adapter
        return made.forced

    def delta(self, site: str) -> Delta:
        """The site's delta; of a saved adapter it is read now."""
        raise NotImplementedError

    def tensor(self, name: str) -> Tensor:
        """A tensor of a module that is held in full, `modules.<path>.<name>`."""
        raise NotImplementedError

    @torch.no_grad()
    def pair(self, site: str, rank: int | None = None) -> tuple[Tensor, Tensor, float]:
        """B (..., out, r), A (..., r, in) in float32 or float64 with ΔW ≈ B A, and the relative error of that.

        The scale is in them, √|s| in each, so that the factors can be mixed too. What is no product is decomposed, with
        all its rank or with `rank`; a LoRA holds no bias, so what an adapter adds to one counts as error. Raises
        UnsupportedError for a change that is no ΔW, or that depends on base weights which are not there.
        """
        delta = self.delta(site)
        if delta.form in ("function", "bias"):
            what = "only biases" if delta.form == "bias" else "the output by a function"
            raise UnsupportedError(
                f"{self.methods[site].slug} at {site} of {self.name!r} has no ΔW: it changes {what}, and cannot be "
                "seen as a product B A"
            )
        try:
            B, A, error = product(delta, rank)
        except RuntimeError as error:
            raise AdapterFileError(f"{self.name}: no product can be made of {site}: {error}") from error
        if delta.form == "factors" and delta.scale != 0:
            root = abs(delta.scale) ** 0.5
            B, A = B / root, A * root
        return B, A, error

    def alike(self, other: "Source") -> str | None:
        """What says that the other was trained on another base, or None."""
        mine, theirs = self.base, other.base
        if mine.class_ != theirs.class_:
            return f"{self.name!r} was trained on {mine} and {other.name!r} on {theirs}"
        common = mine.sample.keys() & theirs.sample.keys()
        apart = fingerprint.difference(mine.sample, theirs.sample)
        if apart > FOREIGN:
            return (
                f"the weights that {self.name!r} and {other.name!r} were trained on differ by {apart:.2g} (relative, "
                f"sampled in {len(common)} layers): {mine} and {theirs}"
            )
        if not common and mine.parameters != theirs.parameters:
            return f"{self.name!r} was trained on {mine} and {other.name!r} on {theirs}"
        return None


class _Attached(Source):
    def __init__(self, adapter: Adapter):
        methods = {site: adapter.methods.get(site, adapter.method) for site in adapter.deltas}
        state = find_state(adapter.model)
        marks = fingerprint.fingerprint(adapter.model, adapter.sites, {} if state is None else state.originals)
        super().__init__(adapter.name, {site.name: site for site in adapter.sites}, methods, Base.model_validate(marks))
        self.adapter = adapter
        self._tensors = {n: t.detach() for n, t in adapter.named_tensors() if n.startswith("modules.")}
        self.full = _by_module(adapter.modules, self._tensors)

    def delta(self, site: str) -> Delta:
        assert self.adapter is not None
        return self.adapter.deltas[site]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


class _Saved(Source):
    def __init__(self, path: str | Path, model: BaseWeights | None):
        self._at, self._model = str(path), model
        if isinstance(model, str | Path):
            self._files = WeightFiles.find(str(model))
        self._saved = SavedDeltas(path, self._site)
        document = self._saved.document
        sites = {name: self._site(name, record) for name, record in document.sites.items()}
        super().__init__(document.name, sites, self._saved.methods, document.base)
        self.document = document
        self.full = _by_module(document.modules, self._saved.in_full)
        self.doubt = None if model is None else self._compared()

    def delta(self, site: str) -> Delta:
        return self._saved.delta(site)

    def tensor(self, name: str) -> Tensor:
        return self._saved.tensor(name)

    def _compared(self) -> str | None:
        """What says that the weights that were given are another model's, or None."""
        ours = {}
        for name in self.base.sample:
            site = self.sites[name]
            if not isinstance(site.layer, _NoLayer):
                W = site.layer.to_matrix(dense(site.stored, site.layer))
                ours[name] = fingerprint.values(W)
        apart = fingerprint.difference(self.base.sample, ours)
        if apart <= FOREIGN:
            return None
        return f"the base weights that were given differ from those that {self._at} was trained on by {apart:.2g}"

    def _site(self, name: str, record: SiteRecord) -> Site:
        site = _Unplaced(name, record.kind, tuple(record.shape), True, getattr(torch, record.dtype))
        if isinstance(self._model, nn.Module):
            target = site_at(unwrapped(self._model), name)
            ours = None if target is None else [*target.site.batch, target.site.out, target.site.in_]
            if target is None or ours != record.shape:
                there = "no such layer" if ours is None else f"one of {'×'.join(map(str, ours))}"
                raise RankfoldError(
                    f"{self._at} adapts {name} ({'×'.join(map(str, record.shape))}), and the model has {there}: give "
                    "the model that it was trained on"
                )
            if (state := find_state(self._model)) is not None and state.merged:
                raise RankfoldError(
                    f"the model has {', '.join(state.merged)} merged into its weights: unmerge that first, or give "
                    "the base model as it was"
                )
            site.parameter, site.layer = target.site.parameter, _Layer(target.layer)
        elif self._model is not None and record.kind in _KINDS:
            site.layer = _StoredLayer(self._files, name, record.kind)
        else:
            site.layer = _NoLayer(f"the change that {self._at} makes at {name} depends on the base weights")
        return site


class _Unplaced(Site):
    """A site of an adapter that sits on no model: its tensors are on the CPU."""

    device = None  # type: ignore[assignment]


class _Apart:
    """What stands for an adapted layer where there is none."""

    _rankfold = SimpleNamespace(tags=None, originals={})  # no model, so no rows and nothing merged


class _Layer(_Apart):
    """A layer of a model in memory, as a delta wants to see it, without the model being adapted."""

    def __init__(self, layer: nn.Module):
        self._layer: Any = layer
        self._mixin: Any = kind_of(layer)

    @property  # so that `isinstance` takes it for the layer
    def __class__(self) -> type:
        return type(self._layer)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return self._mixin.to_matrix(self._layer, weight)

    @property
    def own_bias(self) -> Tensor | None:
        return self._layer._parameters.get("bias")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _StoredLayer(_Apart):
    """Stands for a layer of which there are only the tensors, in a file: they are read when a delta asks for them."""

    def __init__(self, files: WeightFiles, path: str, kind: str):
        self._parameters = _Stored(files, path)
        self._mixin: Any = _KINDS[kind]

    def to_matrix(self, weight: Tensor) -> Tensor:
        return self._mixin.to_matrix(self, weight)

    @property
    def own_bias(self) -> Tensor | None:
        try:
            return self._parameters["bias"]
        except RankfoldError:  # it has none
            return None

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            f"the adapter asks for the layer's {name}, which no file of weights tells: load the model"
        )


class _Stored(dict[str, Tensor]):
    def __init__(self, files: WeightFiles, path: str):
        self._files, self._path = files, path

    def __missing__(self, name: str) -> Tensor:
        return self._files.read(f"{self._path}.{name}")


class _NoLayer(_Apart):
    def __init__(self, why: str):
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(f"{self._why}, which are not there: give the base model, or the folder that holds it")


def open_source(adapter: Adapter | str | Path, model: BaseWeights | None = None) -> Source:
    """An attached adapter, or a saved one (a folder or a hub id), as a source of products.

    `model` is for saved ones whose change depends on the base weights: the base model, or the folder or hub id of its
    safetensors files, which are read a layer at a time. Raises AdapterFileError for files that are missing, damaged or
    hostile.
    """
    return _Attached(adapter) if isinstance(adapter, Adapter) else _Saved(adapter, model)


def _by_module(paths: Any, names: Any) -> dict[str, list[str]]:
    return {path: [name for name in names if name.startswith(f"modules.{path}.")] for path in paths}
