"""PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches.

Shahroz Khan et al. 2024, arXiv 2410.10870.
"""

import math
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

import rankfold
from rankfold.core import Component, fingerprint
from rankfold.core.adapter import Adapter
from rankfold.core.checkpoint import FOREIGN, write_coded, write_spooled
from rankfold.core.coded import CODED
from rankfold.core.document import TENSORS, Base, Document, SiteRecord, as_text, read_document
from rankfold.core.files import adapter_folder, open_inside
from rankfold.core.layers import AdaptedConv, AdaptedConv1D, AdaptedEmbedding, as_matrix
from rankfold.core.linalg import leading_svd, wide
from rankfold.core.quantized import dense
from rankfold.core.routing import find_state, unwrapped
from rankfold.core.targets import site_at
from rankfold.core.tensorfile import TensorFile, TensorWriter
from rankfold.core.weightfiles import WeightFiles
from rankfold.errors import AdapterFileError, RankfoldError

_LAYOUTS: dict[str, Any] = {mixin.kind: mixin for mixin in (AdaptedConv1D, AdaptedEmbedding, AdaptedConv)}
Weights = nn.Module | str | Path


class PortLLM(Component):
    """`θ'_i := θ' + Δθ_i`, by `port`: nothing is trained, and there is nothing to choose."""

    slug: ClassVar[str] = "portllm"
    title: ClassVar[str] = (
        "PortLLM: Personalizing Evolving Large Language Models with Training-Free and Portable Model Patches"
    )
    source: ClassVar[str] = "arXiv 2410.10870"


@dataclass(frozen=True)
class Drift:
    """What the update `Δθ = θ' − θ` did to a weight: `‖Δθ‖ / ‖θ‖`, and the cosine of the principal directions.

    The cosine is the mean of those of the principal angles between the leading singular subspaces of θ and θ', on the
    input's and the output's side: 1 if the update left them where they were, near 0 for a model trained anew. It is
    None for a bias.
    """

    size: float
    cosine: float | None


@overload
def port(
    adapter: Adapter, model: nn.Module, to: str | None = None, *, old: Weights | None = None,
    force: bool = False, directions: int = 8, progress: Callable[[], Any] = lambda: None,
) -> tuple[Adapter, dict[str, Drift]]: ...  # fmt: skip
@overload
def port(
    adapter: str | Path, model: Weights, to: str | Path | None = None, *, old: Weights | None = None,
    force: bool = False, directions: int = 8, progress: Callable[[], Any] = lambda: None,
) -> tuple[Path, dict[str, Drift]]: ...  # fmt: skip
def port(
    adapter: Adapter | str | Path,
    model: Weights,
    to: str | Path | None = None,
    *,
    old: Weights | None = None,
    force: bool = False,
    directions: int = 8,
    progress: Callable[[], Any] = lambda: None,
) -> tuple[Adapter | Path, dict[str, Drift]]:
    """Take an adapter to an update of its base model, unchanged: `θ'_i := θ' + Δθ_i`, in place of a new training.

    The adapter's numbers stay what they are, to the bit; what it is said to sit on is the new base, and `ported` in its
    document lists the former ones. It works as far as `Δθ'_i − Δθ_i`, what a new training would add, is small against
    `θ' + Δθ_i`: see `Drift`, which is measured where the old base is at hand. Weights are read one layer at a time.

    Args:
        adapter: one that is attached, or the folder of a saved one.
        model: the updated base θ', in memory, or (for a saved adapter) the folder or hub id of its safetensors files.
        to: the name on the new model (default: the old one), where it is put, inactive; or the folder of the new file.
        old: the base θ that the adapter was trained on, to compare; that of an attached adapter is known.
        force: port to weights that look like another model's too, which the new document then says.
        directions: singular directions that the cosine is taken of.
        progress: called after each layer.

    Returns:
        the new adapter, or its folder, and what the update did to each layer (nothing without the old base).

    Raises:
        RankfoldError: a layer is missing or has another shape, or the weights are another model's; nothing is written.
    """
    if isinstance(adapter, Adapter):
        with tempfile.TemporaryDirectory() as work:
            saved = rankfold.save(adapter.model, Path(work) / "old", adapter.name)
            old, whole = adapter.model if old is None else old, Path(work) / "new"
            _, drifts = port(saved, model, whole, old=old, force=force, directions=directions, progress=progress)
            assert isinstance(model, nn.Module)
            return rankfold.load(model, whole, name=None if to is None else str(to), active=False), drifts
    if to is None:
        raise RankfoldError(f"port: say the folder for what {adapter} becomes")
    document, tensors = _read(adapter)
    new, before = _opened(model), None if old is None else _opened(old)
    drifts, sample, wrong = dict[str, Drift](), dict[str, list[float]](), _unlike_modules(new, document, tensors)
    for name, record in document.sites.items():
        try:
            W = wide(_weight(new, name, record))
        except RankfoldError as error:
            wrong.append(str(error))
            continue
        if name in document.base.sample:
            sample[name] = [float(f"{value:.6g}") for value in fingerprint.values(W)]
        if before is not None:
            drifts[name] = drift(wide(_weight(before, name, record)), W, directions)
        progress()
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise RankfoldError(
            f"{adapter} cannot be ported: {'; '.join(wrong[:3])}{more}. It fits a model of the same architecture only; "
            "trans-lora moves an adapter to any"
        )
    apart = fingerprint.difference(document.base.sample, sample)
    doubt = f"ported to weights that differ by {apart:.2g} (relative, sampled) from those it was trained on"
    if apart > FOREIGN and not force:
        raise RankfoldError(
            f"{adapter} would be {doubt}: another model's, no update. Train it anew, move it with trans-lora, or pass "
            "force (--force)"
        )
    base = Base.model_validate({**_about(new, model, document.base), "sample": sample})
    changes = {"base": base, "ported": [*document.ported, document.base]}
    forced = doubt if apart > FOREIGN else document.forced
    return _write(Path(to), document.model_copy(update={**changes, "forced": forced}), tensors), drifts


def unport(adapter: str | Path, to: str | Path) -> Path:
    """Undo the last porting of a saved adapter: the file it was made from, but for the id, in the folder `to`."""
    document, tensors = _read(adapter)
    if not document.ported:
        raise RankfoldError(f"{adapter} was never ported: it sits on the base that it was trained on")
    changes = {"base": document.ported[-1], "ported": document.ported[:-1], "forced": None}
    return _write(Path(to), document.model_copy(update=changes), tensors)


@torch.no_grad()
def drift(W: Tensor, W1: Tensor, directions: int = 8) -> Drift:
    """What leads from θ = W to θ' = W1, each (..., out, in)."""
    norm = float(W.norm())
    size = float((W1 - W).norm()) / norm if norm else math.inf if bool(W1.any()) else 0.0
    if W.dim() < 2:
        return Drift(size, None)
    (U, _, Vh), (U1, _, V1h) = (leading_svd(M, directions, torch.Generator().manual_seed(0)) for M in (W, W1))
    cosines = [torch.linalg.svdvals(M).mean() for M in (U.mT @ U1, Vh @ V1h.mT)]
    return Drift(size, min(1.0, float(torch.stack(cosines).mean())))


def _read(adapter: str | Path) -> tuple[Document, dict[str, Tensor]]:
    """The document and the tensors as the file has them, also those of a compressed adapter."""
    folder = adapter_folder(adapter, [TENSORS], "`rankfold.save`")
    with open_inside(folder, TENSORS) as handle:
        file = TensorFile(handle, str(folder / TENSORS))
        document, tensors = read_document(folder, file), file.tensors()
        if file.digest() != document.sha256:
            raise AdapterFileError(f"{folder / TENSORS}: the tensors are not those that were saved: it is damaged")
    return document, tensors


def _write(to: Path, document: Document, tensors: dict[str, Tensor]) -> Path:
    if to.exists() and not to.is_dir():
        raise RankfoldError(f"{to} is a file; an adapter is saved into a folder")
    described = document.model_dump(by_alias=True, mode="json") | {"id": secrets.token_hex(16)}
    described["rankfold"] = rankfold.__version__
    if document.encoding is not None:
        codes = tensors.pop(CODED)
        return write_coded(to, tensors, codes.numpy().tobytes(), described)
    with closing(TensorWriter(next(place for place in to.absolute().parents if place.is_dir()))) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        return write_spooled(to, writer, as_text(described))


def _opened(model: Weights) -> nn.Module | WeightFiles:
    if not isinstance(model, nn.Module):
        return WeightFiles.find(str(model))
    if (state := find_state(model)) is not None and state.merged:
        raise RankfoldError(f"the model has {', '.join(state.merged)} merged into its weights: unmerge that first")
    return unwrapped(model)


def _weight(model: nn.Module | WeightFiles, name: str, record: SiteRecord) -> Tensor:
    """W (..., out, in) of a site in the base; of a normalisation its bias (out,). Raises for another shape."""
    if isinstance(model, nn.Module):
        if (target := site_at(model, name)) is None:
            raise RankfoldError(f"there is no layer {name}")
        W = as_matrix(target.site, dense(target.site.stored, target.layer))
    else:
        W = model.read(name + {"experts": "", "norm": ".bias"}.get(record.kind, ".weight"))
        W = _LAYOUTS[record.kind].to_matrix(None, W) if record.kind in _LAYOUTS else W
        if record.kind == "experts" and list(W.shape) != record.shape:  # some models store them as (E, in, out)
            W = W.mT
    wanted = record.shape[:1] if record.kind == "norm" else record.shape
    if list(W.shape) != wanted:
        raise RankfoldError(f"{name} is {_size(W.shape)}, and the adapter's is {_size(wanted)}")
    return W


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _unlike_modules(model: nn.Module | WeightFiles, document: Document, tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors of the modules that the adapter holds in full and that are another's in the model.

    A file of weights may well lack such a module: a head is most often new.
    """
    wrong = []
    for name in tensors:
        path = name.removeprefix("modules.")
        if path == name:
            continue
        try:
            there = model.read(path) if isinstance(model, WeightFiles) else model.state_dict().get(path)
        except RankfoldError:
            continue
        if there is None or there.shape != tensors[name].shape:
            wrong.append(f"{path}, which the adapter holds in full, is missing or has another shape")
    return wrong


def _about(model: nn.Module | WeightFiles, given: Weights, before: Base) -> dict[str, Any]:
    if isinstance(model, nn.Module):
        return fingerprint.about(model)
    from safetensors import safe_open

    count = 0
    for path in set(model.files.values()):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    name = Path(str(given)).name if Path(str(given)).exists() else str(given)
    return {"class": before.class_, "name_or_path": name[:200], "parameters": count}
