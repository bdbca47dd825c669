"""Adapters on disk: a folder with `adapter.safetensors` (the tensors) and `adapter.json` (what they are).

The document of `adapter.json` also stands in the metadata of the tensor file, so that one file is a whole adapter: a
save that was cut off between the two leaves either the old adapter or the new one. A random id, the same in both, tells
whether they belong together. Everything read from a file is checked before it is used, and the model is changed last.
"""

import functools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core import fingerprint
from rankfold.core.adapter import Adapter, check_finite, check_layout
from rankfold.core.attach import build_adapter, fold_offset
from rankfold.core.coded import CODED, CodedFile, Encoding
from rankfold.core.component import Component, build
from rankfold.core.delta import Delta, Site
from rankfold.core.document import (
    DOCUMENT,
    TENSORS,
    Base,
    Document,
    SiteRecord,
    as_text,
    deflated,
    describe,
    read_document,
)
from rankfold.core.files import MAX_JSON, adapter_folder, open_inside, write_whole
from rankfold.core.layers import kind_of
from rankfold.core.method import Init, Method
from rankfold.core.rank import cut_to
from rankfold.core.routing import find_state, state_of, unwrapped
from rankfold.core.seeded import Bases
from rankfold.core.targets import Target, inside_adapter, submodule
from rankfold.core.tensorfile import Entry, TensorFile, TensorWriter, apart, digest
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError

# Relative distances of the sampled base weights: a 16-bit copy is at 0.003, four bits at 0.1, another model at 1.4.
_NOTABLE, FOREIGN = 0.02, 0.5


@dataclass(frozen=True)
class AdapterFile:
    """An adapter on disk, known without its tensors and without a model: the document, and what the tensors are."""

    path: Path
    document: Document
    tensors: Mapping[str, Entry]
    bytes: int
    encoding: Encoding | None = None

    def num_parameters(self) -> int:
        """How many numbers the file holds, frozen ones included."""
        return sum(entry.numel for entry in self.tensors.values())


# ---- saving


def save(model: nn.Module, path: str | Path, name: str | None = "default") -> Path:
    """Write an adapter (`None`: the active one) into the folder `path`, replacing the one there.

    Each file is written whole or not at all: after a full disk or Ctrl-C the folder holds the old adapter or the
    new one.

    Raises:
        RankfoldError: no such adapter, `path` is a file, or a tensor holds NaN or infinity; the folder is unchanged.
    """
    state = state_of(model)
    name = state.active if name is None else name
    if name is None:
        raise RankfoldError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    adapter: Adapter = state.adapters[state.check(name)]
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise RankfoldError(f"{path} is a file; an adapter is saved into a folder")
    tensors = apart(adapter.state_dict())
    check_finite(tensors, f"adapter {name!r} is not saved")
    text = as_text(describe(adapter, tensors, state.originals))

    def whole(file: Path) -> None:
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt", "rankfold": text})

    return _write(path, whole, text)


def write_spooled(path: Path, tensors: TensorWriter, text: str) -> Path:
    """Write tensors that were collected one by one, and their document, into the folder."""
    return _write(path, lambda file: tensors.write(file, {"format": "pt", "rankfold": text}), text)


def write_coded(path: Path, tensors: Mapping[str, Tensor], codes: bytes, document: Mapping[str, Any]) -> Path:
    """Write tensors, and the codes of others as the document's `encoding` has them, as one small file.

    The document stands in it alone, deflated: `adapter.json` would be larger than many a code.
    """
    from safetensors.torch import save_file

    stored = apart({**tensors, CODED: torch.frombuffer(bytearray(codes), dtype=torch.uint8)})
    text = as_text({**document, "sha256": digest(stored)})
    _check_length(text)
    metadata = {"format": "pt", "rankfold": deflated(text)}
    write_whole(path / TENSORS, lambda file: save_file(stored, file, metadata=metadata))
    (path / DOCUMENT).unlink(missing_ok=True)
    return path


def _check_length(text: str) -> None:
    if len(text) > MAX_JSON // 4:
        raise RankfoldError(f"the adapter's document would be {len(text):,} bytes long, more than can be read back")


def _write(path: Path, tensors: Callable[[Path], None], text: str) -> Path:
    _check_length(text)
    write_whole(path / TENSORS, tensors)
    write_whole(path / DOCUMENT, text)
    return path


# ---- reading


def read(path: str | Path) -> AdapterFile:
    """What an adapter on disk is, from its headers alone: no tensor is loaded and no model is needed.

    `path` is a folder, or a Hugging Face Hub id (`org/name`). Raises AdapterFileError as `load` does.
    """
    with _opened(path) as (folder, file, document):
        encoding = file.encoding if isinstance(file, CodedFile) else None
        return AdapterFile(folder, document, file.entries, file.size, encoding)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Path, TensorFile | CodedFile, Document]]:
    """The folder, its tensor file with the header checked, and the document that belongs to it.

    A compressed adapter looks like any other: the file is that of the tensors which its codes stand for.
    """
    folder = adapter_folder(path, [TENSORS, DOCUMENT], "`rankfold.save`")
    try:
        handle = open_inside(folder, TENSORS)
    except FileNotFoundError:
        raise AdapterFileError(f"{folder} holds no {TENSORS}{_what_else(folder)}") from None
    with handle:
        what = str(folder / TENSORS)
        file = TensorFile(handle, what)
        document = read_document(folder, file)
        if document.encoding is None:
            yield folder, file, document
            return
        of_start = functools.cache(lambda coded: starts(document, what, coded))
        coded = CodedFile(file, document.encoding, what, of_start)
        yield folder, coded, document.model_copy(update={"encoding": None})


def starts(document: Document, what: str, file: CodedFile | None = None) -> dict[str, Tensor]:
    """The tensors of a new adapter of that method, from that seed, on no model; of no more numbers than the file has.

    Raises AdapterFileError where they cannot be made: most often because they are taken from the base weights.
    """
    method = _component(document.method, Method, what)
    methods = _own_methods(method, document, what)
    sites = [_bare_site(name, record) for name, record in document.sites.items()]
    if file is not None:
        _check_size(method, methods, sites, file, what)
    adapter = Adapter(document.name, nn.Module(), method, None, document.seed, None)
    try:
        adapter.shared = method.shared(sites, document.seed)
        for site in sites:
            delta = adapter.deltas[site.name] = methods[site.name].delta(site, adapter.shared)
            delta.start(site.rng(document.seed))
    except Exception as error:  # whatever a method does where there is no layer
        raise AdapterFileError(
            f"{what}: the start of {method.slug} cannot be made without the base: {error}"
        ) from error
    return adapter.state_dict()


def _what_else(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return ", but a PEFT adapter: read it with rankfold.import_peft"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return ", but a pickle, which can run any code when it is opened: Rankfold reads safetensors files only"
    return ": give the folder that `rankfold.save` wrote"


def _bare_site(name: str, record: SiteRecord) -> Site:
    return Site(name, record.kind, tuple(record.shape), True, getattr(torch, record.dtype))


class SavedDeltas:
    """An adapter on disk whose deltas are made one at a time: memory is asked for one layer, and what all share.

    `site(name, record)` makes the site of a delta; by default one without a layer, on which nothing works that asks for
    the base weight. The whole file is checked first: raises AdapterFileError as `load` does.
    """

    def __init__(self, path: str | Path, site: Callable[[str, SiteRecord], Site] = _bare_site):
        with _opened(path) as (folder, file, document):
            self.folder, self.document, self._file, self._what = folder, document, file, str(folder / TENSORS)
            self.method = _component(document.method, Method, self._what)
            self.methods = _own_methods(self.method, document, self._what)
            self._site = site
            sites = [site(name, record) for name, record in document.sites.items()]
            _check_size(self.method, self.methods, sites, file, self._what)
            with self._made():
                self._shared = self.method.shared(sites, document.seed)
            shared = self._part(None)
            _keep_bases(shared, file)
            own = dict(shared.named_tensors())
            known = {name: tensor.to("meta") for name, tensor in own.items()}
            for site_name in document.sites:
                known |= {name: tensor.to("meta") for name, tensor in self._own(self._part(site_name)).items()}
            prefixes = tuple(f"modules.{module}." for module in document.modules)
            self.in_full = [name for name in file.entries if name.startswith(prefixes)]
            check_layout(known, _without(file.entries, self.in_full), self._what, AdapterFileError)
            _check_digest(file.streamed_digest(), document, self._what)
            self._fill(shared, own)

    def whole(self) -> Adapter:
        """All deltas at once, as an adapter that sits on no model, without the modules that are held in full."""
        adapter = self._part(None)
        adapter.methods = {site: own for site, own in self.methods.items() if own != self.method}
        adapter.deltas = {site: self.delta(site) for site in self.document.sites}
        return adapter

    def delta(self, name: str) -> Delta:
        """The delta of a site, with its tensors."""
        part = self._part(name)
        self._fill(part, self._own(part))
        return part.deltas[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor of a module that is held in full, one of those called `in_full`."""
        return self._read([name])[name]

    def _part(self, name: str | None) -> Adapter:
        """An adapter of one delta, or only of what all share, whose tensors have no values yet."""
        part = Adapter(self.document.name, nn.Module(), self.method, None, self.document.seed, None)
        part.shared = self._shared
        if name is not None:
            with self._made():
                site = self._site(name, self.document.sites[name])
                part.deltas[name] = self.methods[name].delta(site, self._shared)
                part.make_room(self._file.entries)
        return part

    def _own(self, part: Adapter) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in part.named_tensors() if not name.startswith("shared.")}

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with open_inside(self.folder, TENSORS) as handle:
            return self._file.some(handle, names)

    def _fill(self, part: Adapter, own: Mapping[str, Tensor]) -> None:
        _fill(part, own, self._read(own), self._what)

    @contextmanager
    def _made(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise AdapterFileError(f"{self._what}: the deltas it asks for cannot be made: {error}") from error


def _without(entries: Mapping[str, Entry], names: Iterable[str]) -> dict[str, Entry]:
    left_out = set(names)
    return {name: entry for name, entry in entries.items() if name not in left_out}


# ---- loading


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    active: bool = True,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    rank: int | None = None,
) -> Adapter:
    """Attach a saved adapter to the model it was trained on, or to another copy of it (16-bit, quantised, merged over).

    Args:
        model: the base model; other adapters may be attached.
        path: the folder that `save` wrote, or a Hugging Face Hub id (`org/name`).
        name: what to call it here; default: the name it was saved under.
        active: whether plain forwards use it from now on.
        strict: refuse a base whose weights are another model's; with False, warn. A layer that is missing or has
            another shape is always refused.
        dtype: of the adapter's parameters; default: as saved.
        rank: cut the adapter to its first so many components, if it was trained for that (`dylora`).

    Raises:
        AdapterFileError: the files are missing, damaged or hostile, or were made for another model; the message names
            the file, the cause and the fix.
        RankfoldError: the name is taken or malformed, or the adapter cannot be cut to that rank.

    The model is unchanged then.
    """
    with _opened(path) as (folder, file, document):
        what = str(folder / TENSORS)
        if rank is not None:
            _check_nested(document, rank, folder)
        method = _component(document.method, Method, what)
        init = None if document.init is None else _component(document.init, Init, what)
        state = find_state(model)
        root = unwrapped(model) if state is None else state.model
        matched = [_target(root, site, record, document, what, dtype) for site, record in document.sites.items()]
        methods = _own_methods(method, document, what)
        copies = {path: _module(root, path, file.entries, document, what) for path in document.modules}
        _check_size(method, methods, [target.site for target in matched], file, what)
        _check_base(root, document, [t.site for t in matched], {} if state is None else state.originals, strict, what)

        def fill(adapter: Adapter) -> None:
            _take(adapter, file, document, what)
            if rank is not None:
                cut_to(adapter, rank)

        try:
            return build_adapter(
                root,
                matched,
                method,
                methods,
                document.name if name is None else name,
                fill,
                init=init,
                seed=document.seed,
                targets=document.targets,  # type: ignore[arg-type]  # None where a callable chose them
                copies=copies,
                active=active,
            )
        except UnsupportedError as error:
            raise AdapterFileError(f"{what}: {error}") from error
        except (MemoryError, OverflowError, RuntimeError) as error:
            raise AdapterFileError(f"{what}: the deltas it asks for cannot be made: {error}") from error


def _check_nested(document: Document, rank: int, folder: Path) -> None:
    """Refuse to cut an adapter to a rank that it was not trained for."""
    if document.nested is None:
        raise RankfoldError(
            f"{folder} was not trained to be cut: its first {rank} components are no better than any others. Squeeze "
            f"it instead (rankfold squeeze {folder} --rank {rank} --output DIR), or train with the callback dylora"
        )
    described = (document.method, *(record.method for record in document.sites.values()))
    ranks = [r for own in described if isinstance(r := own.get("rank"), int)]
    if not document.nested <= rank <= max(ranks, default=0):
        raise RankfoldError(
            f"{folder} can be cut to ranks from {document.nested} to {max(ranks, default=0)}, and not to {rank}"
        )


def _component(described: Mapping[str, Any], axis: type[Component], what: str) -> Any:
    hyperparameters = dict(described)
    slug = hyperparameters.pop("name", None)
    if not isinstance(slug, str) or len(slug) > 100:
        raise AdapterFileError(f"{what}: the {axis.__name__.lower()} has no name: the document is damaged")
    if strange := [key for key in hyperparameters if not key.isidentifier() or len(key) > 100]:
        raise AdapterFileError(
            f"{what}: {strange[0][:100]!r} is no hyperparameter of {slug!r}: the document is damaged"
        )
    try:
        built = build(slug, **hyperparameters)
    except RankfoldError as error:
        raise AdapterFileError(
            f"{what}: {error}. If {slug!r} is yours, import the file that defines it first; if it is newer than "
            "this Rankfold, upgrade"
        ) from None
    if not isinstance(built, axis):
        raise AdapterFileError(
            f"{what}: {slug!r} is of the axis {type(built).axis!r}, where a {axis.__name__.lower()} belongs"
        )
    return built


def _own_methods(method: Method, document: Document, what: str) -> dict[str, Method]:
    """The method of each site; sites with the same hyperparameters share one."""
    made: dict[str, Method] = {"{}": method}
    methods = {}
    for site, record in document.sites.items():
        key = json.dumps(record.method, sort_keys=True) if record.method else "{}"
        if key not in made:
            made[key] = _component({**document.method, **record.method}, Method, f"{what}: {site}")
        methods[site] = made[key]
    return methods


def _target(
    model: nn.Module, name: str, record: SiteRecord, document: Document, what: str, dtype: torch.dtype | None
) -> Target:
    path = name.rpartition(".")[0] if record.kind == "experts" else name
    layer = submodule(model, path) if path else None
    shape = "×".join(map(str, record.shape))
    trained_on = f"it was trained on {document.base}, so load that model"
    mixin = None if layer is None else kind_of(layer)
    if layer is None or mixin is None:
        there = "no such layer" if layer is None else f"a {type(layer).__name__} there, which no delta can sit on"
        raise AdapterFileError(
            f"{what} adapts {name!r} ({record.kind[:40]!r}, {shape}), and this {type(model).__name__} has {there}; "
            f"{trained_on}"
        )
    for site in mixin.sites(path, layer):
        if site.name == name:
            ours = [*site.batch, site.out, site.in_]
            if site.kind != record.kind or ours != record.shape:
                raise AdapterFileError(
                    f"{what} adapts {name!r} as {record.kind[:40]!r} of {shape}, and in this {type(model).__name__} "
                    f"it is {site.kind!r} of {'×'.join(map(str, ours))}; {trained_on}"
                )
            site.dtype = getattr(torch, record.dtype) if dtype is None else dtype
            return Target(site, mixin, path, layer)
    raise AdapterFileError(
        f"{what} adapts {name!r} ({shape}), and the {type(layer).__name__} there has no such weight; {trained_on}"
    )


def _module(model: nn.Module, path: str, entries: Mapping[str, Entry], document: Document, what: str) -> nn.Module:
    """The module that the file holds in full; its tensors are compared before it is copied."""
    module = submodule(model, path)
    trained_on = f"it was trained on {document.base}, so load that model"
    if module is None:
        raise AdapterFileError(
            f"{what} holds the module {path!r} in full, and this {type(model).__name__} has none there; {trained_on}"
        )
    for name, parameter in module.named_parameters():
        if inside_adapter(name):
            continue
        entry = entries.get(f"modules.{path}.{name}")
        if entry is None or entry.shape != tuple(parameter.shape):
            theirs = "no such tensor" if entry is None else f"one of {'×'.join(map(str, entry.shape))}"
            raise AdapterFileError(
                f"{what}: {path}.{name} has shape {'×'.join(map(str, parameter.shape))} here, and the file holds "
                f"{theirs}; {trained_on}"
            )
    return module


def _check_size(
    method: Method, methods: Mapping[str, Method], sites: Sequence[Site], file: TensorFile | CodedFile, what: str
) -> None:
    """Refuse hyperparameters that ask for more numbers than the file holds, before any memory is asked for."""
    try:
        needed = sum(site.count * methods[site.name].count(site) for site in sites) + method.shared_count(sites)
    except (ArithmeticError, MemoryError) as error:
        raise AdapterFileError(f"{what}: the hyperparameters of {method.slug!r} make no sense: {error}") from None
    held = sum(entry.numel for entry in file.entries.values())
    if needed > held:
        raise AdapterFileError(
            f"{what}: {method!r} on {len(sites)} sites needs {needed:,} numbers and the file holds {held:,}: the "
            "document and the tensors do not belong together; save or fetch it again"
        )


def _check_base(
    model: nn.Module,
    document: Document,
    sites: Sequence[Site],
    originals: Mapping[str, Tensor],
    strict: bool,
    what: str,
) -> None:
    theirs = document.base.sample
    sampled = {site.name: fingerprint.sample(site, originals) for site in sites if site.name in theirs}
    ours = {name: values for name, values in sampled.items() if values is not None}
    error = fingerprint.difference(theirs, ours)
    if error <= _NOTABLE:
        return
    here = Base.model_validate({**fingerprint.about(model), "sample": {}})
    compared = (
        f"{what}: the weights of this model differ from those the adapter was trained on by {error:.2g} "
        f"(relative, sampled in {len(ours)} layers). It was trained on {document.base}; this is {here}"
    )
    if error <= FOREIGN:
        warnings.warn(
            f"{compared}. A quantised or further trained base looks like that; the adapter is loaded", stacklevel=3
        )
    elif strict:
        raise AdapterFileError(
            f"{compared}. These are another model's weights: load the model it was trained on, or pass strict=False"
        )
    else:
        warnings.warn(
            f"{compared}. These are another model's weights; the adapter is loaded since strict=False", stacklevel=3
        )


def _take(adapter: Adapter, file: TensorFile | CodedFile, document: Document, what: str) -> None:
    """Make the file's tensors the adapter's own, once all fit: nothing is copied, they share one storage."""
    adapter.nested, adapter.forced, adapter.ported = document.nested, document.forced, list(document.ported)
    adapter.make_room(file.entries)
    _keep_bases(adapter, file)
    own = dict(adapter.named_tensors())
    check_layout(own, file.entries, what, AdapterFileError)
    tensors = file.tensors()
    _check_digest(file.digest(), document, what)
    _fill(adapter, own, tensors, what)
    if document.fold:
        for delta in adapter.deltas.values():
            if "A0" not in delta._buffers:
                raise AdapterFileError(
                    f"{what}: the offset is folded, it says, and there is none at {delta.site.name}: it is damaged"
                )
            fold_offset(delta)


def _keep_bases(adapter: Adapter, file: TensorFile | CodedFile) -> None:
    """Make room for bases that are not their seed's: an adapter that another library made."""
    if isinstance(adapter.shared, Bases):
        adapter.shared.keep(
            **{name: own for name, own in adapter.shared.named_buffers() if f"shared.{name}" in file.entries}
        )


def _check_digest(digest: str, document: Document, what: str) -> None:
    if digest != document.sha256:
        raise AdapterFileError(
            f"{what}: the tensors are not those that were saved (their sha256 differs): the file is damaged; fetch or "
            "save it again"
        )


def _fill(adapter: Adapter, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str) -> None:
    """Put checked tensors from a file in the place of the adapter's own."""
    fitted = {name: tensors[name].to(device=mine.device, dtype=mine.dtype) for name, mine in own.items()}
    narrowed = {name: tensor for name, tensor in fitted.items() if tensor.dtype != tensors[name].dtype}
    check_finite(narrowed, f"{what}, in another dtype", AdapterFileError)
    adapter.check_fit(tensors, what, AdapterFileError)
    for name, mine in own.items():
        mine.data = fitted[name]
