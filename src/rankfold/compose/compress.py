"""Adapters in fewer bits: what was trained is stored as a code, and what is loaded is what the code stands for."""

import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

import rankfold
from rankfold.compose._compression import Code, Compression, decoded
from rankfold.core.adapter import Adapter, check_finite
from rankfold.core.checkpoint import SavedDeltas, load, starts, write_coded
from rankfold.core.component import build
from rankfold.core.delta import Delta
from rankfold.core.document import DOCUMENT, TENSORS, Document, as_text, describe
from rankfold.core.method import Method
from rankfold.core.routing import state_of
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError


@dataclass(frozen=True)
class Coded:
    """What became of a layer: the share of its coded numbers that are not zero, and what is lost.

    error is `‖ΔW − ΔW'‖ / ‖ΔW‖` (Frobenius) where the change is a product B A, else the same of the coded numbers.
    """

    kept: float
    error: float


@dataclass(frozen=True)
class Compressed:
    """Bytes before and after: of the files in both folders, and for an attached adapter, which has none, of its
    tensors. `numbers` is how many numbers the adapter holds, `coded` how many of them are coded, in `code` bytes."""

    before: int
    after: int
    numbers: int
    coded: int
    code: int
    layers: dict[str, Coded]

    @property
    def ratio(self) -> float:
        """How much smaller than 16 bits a number, all of the file counted."""
        return 2 * self.numbers / self.after


@overload
def compress(adapter: Adapter, how: str | Compression, to: str | None = None) -> tuple[Adapter, Compressed]: ...
@overload
def compress(adapter: Adapter | str | Path, how: str | Compression, to: Path) -> tuple[Path, Compressed]: ...
@overload
def compress(adapter: str | Path, how: str | Compression, to: str) -> tuple[Path, Compressed]: ...
@torch.no_grad()
def compress(
    adapter: Adapter | str | Path, how: str | Compression, to: str | Path | None = None
) -> tuple[Adapter | Path, Compressed]:
    """An adapter with its trained matrices in few bits. What is loaded from it is an ordinary adapter.

    Vectors (a magnitude, a bias), frozen tensors and modules held in full are stored as they are; with a compression
    from the start vectors are coded too. An adapter that was trained in few bits (`bi-lora`) becomes a plain LoRA.

    Args:
        adapter: one that is attached, or the folder of a saved one, which needs no base model. It stays as it is.
        how: a compression, or its slug with its defaults: `"onebit"`, `rankfold.ComPEFT(density=0.1)`.
        to: the folder that it is written to, a `Path` where the adapter is attached; or the name (default:
            `NAME-compressed`) under which what it stands for is put beside an attached one, inactive.

    Returns:
        the folder, or the new adapter, and what became of it.

    Raises:
        UnsupportedError: the adapter has no number to code, or its start cannot be made again.
        AdapterFileError: the file is missing, damaged or hostile.
    """
    how = build(how) if isinstance(how, str) else how
    if not isinstance(how, Compression):
        raise RankfoldError(f"compress: {how!r} does not compress adapters")
    if isinstance(adapter, Adapter):
        if isinstance(to, Path):
            return _write(adapter, how, to)
        with tempfile.TemporaryDirectory() as folder:
            path, report = _write(adapter, how, Path(folder))
            return load(adapter.model, path, to or f"{adapter.name}-compressed", active=False), report
    if to is None:
        raise RankfoldError(f"compress: say the folder for what {adapter} is compressed to")
    return _write(adapter, how, Path(to))


def _write(adapter: Adapter | str | Path, how: Compression, to: Path) -> tuple[Path, Compressed]:
    if to.exists() and not to.is_dir():
        raise RankfoldError(f"{to} is a file; an adapter is saved into a folder")
    if not isinstance(adapter, Adapter) and to.exists() and Path(adapter).exists() and to.samefile(adapter):
        raise RankfoldError(f"compress: {to} is the adapter itself, which stays as it is: give another folder")
    source, tensors, document, before = _opened(adapter)
    check_finite(tensors, f"adapter {source.name!r} is not compressed")
    document |= _recoded(source, how, document)
    codes, tau, _ = _coded(source, tensors, document, how)
    data = b"".join(code.data for code in codes)
    rest = {name: tensor for name, tensor in tensors.items() if name not in tau}
    write_coded(to, rest, data, {**document, "encoding": _encoding(how, codes, tau)})
    made, read = SavedDeltas(to), decoded(codes, tau)
    layers = {}
    for site, delta in source.deltas.items():
        own = [name for part, _ in delta.named_parameters() if (name := f"deltas.{site}.{part}") in tau]
        layers[site] = _compared(delta, made.delta(site), [(tau[name], read[name]) for name in own])
    numbers, coded = (sum(tensor.numel() for tensor in which.values()) for which in (tensors, tau))
    return to, Compressed(before, _bytes(to), numbers, coded, len(data), layers)


def approximated(adapter: Adapter, how: Compression) -> dict[str, Tensor]:
    """The coded tensors of an attached adapter as they would be read back; nothing is written."""
    source, tensors, document, _ = _opened(adapter)
    codes, tau, start = _coded(source, tensors, document | _recoded(source, how, document), how)
    read = decoded(codes, tau)
    return {name: start[name] + tensor for name, tensor in read.items()} if how.from_start else read


def _coded(
    source: Adapter, tensors: Mapping[str, Tensor], document: Mapping[str, Any], how: Compression
) -> tuple[list[Code], dict[str, Tensor], dict[str, Tensor]]:
    """The codes, what they are of, and where training started if that is the difference to it."""
    methods = _trained(source, tensors, how)
    if not methods:
        vectors = "" if how.from_start else ". Where it trains vectors, from_start=True codes these"
        raise UnsupportedError(f"{how.slug} codes trained matrices, and {source.method.slug} has none{vectors}")
    tau = {name: tensors[name].cpu() for name in methods}
    start = _start(document) if how.from_start else {}
    tau = {name: tensor - start[name] if how.from_start else tensor for name, tensor in tau.items()}
    return how.codes(tau, methods), tau, start


def _opened(adapter: Adapter | str | Path) -> tuple[Adapter, dict[str, Tensor], dict[str, Any], int]:
    """The adapter, all its tensors, its document, and how many bytes it takes."""
    if isinstance(adapter, Adapter):
        tensors = adapter.state_dict()
        document = describe(adapter, {}, state_of(adapter.model).originals)
        return adapter, tensors, document, sum(tensor.nbytes for tensor in tensors.values())
    saved = SavedDeltas(adapter)
    source = saved.whole()
    tensors = source.state_dict() | {name: saved.tensor(name) for name in saved.in_full}
    return source, tensors, saved.document.model_dump(by_alias=True), _bytes(saved.folder)


def _bytes(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in (TENSORS, DOCUMENT) if (folder / name).exists())


def _recoded(source: Adapter, how: Compression, document: Mapping[str, Any]) -> dict[str, Any]:
    """What is new in the document: an id of its own, and the methods that the layers have from now on."""
    common = how.method(source.method).describe()

    def own(site: str) -> dict[str, Any]:
        described = how.method(source.methods.get(site, source.method)).describe()
        return {key: value for key, value in described.items() if value != common.get(key)}

    sites = {name: {**record, "method": own(name)} for name, record in document["sites"].items()}
    return {"rankfold": rankfold.__version__, "id": secrets.token_hex(16), "method": common, "sites": sites}


def _trained(source: Adapter, tensors: Mapping[str, Tensor], how: Compression) -> dict[str, Method]:
    """The names of the tensors that are coded, with the method of the layer that each belongs to."""
    parts: list[tuple[str, nn.Module, Method, int]] = [
        (f"deltas.{site}", delta, source.methods.get(site, source.method), len(delta.site.batch))
        for site, delta in source.deltas.items()
    ]
    if source.shared is not None:
        parts.append(("shared", source.shared, source.method, 0))
    return {
        f"{prefix}.{name}": method
        for prefix, part, method, batch in parts
        for name, p in part.named_parameters()
        if f"{prefix}.{name}" in tensors  # and not the shared module, which every delta refers to
        if p.is_floating_point() and p.numel() and (how.from_start or p.dim() - batch > 1)
    }


def _start(document: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where the adapter started, made again from its seed."""
    if document["init"] is not None:
        raise UnsupportedError(
            f"from_start: the adapter was started by {document['init']['name']!r}, from weights or data that a file "
            "of codes does not hold: leave from_start out"
        )
    try:
        return starts(Document.model_validate_json(as_text(document)), "from_start")
    except AdapterFileError as error:
        raise UnsupportedError(f"{error}. Leave from_start out") from None


def _encoding(how: Compression, codes: Sequence[Code], tau: Mapping[str, Tensor]) -> dict[str, Any]:
    def described(tensor: Tensor) -> dict[str, Any]:
        return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

    return {
        "by": how.describe(),
        "from_start": how.from_start,
        "codes": [
            {"codec": codec, "bytes": len(data), "tensors": {name: described(tau[name]) for name in names}}
            for codec, data, names in codes
        ],
    }


def _compared(before: Delta, after: Delta, tensors: Sequence[tuple[Tensor, Tensor]]) -> Coded:
    """`tensors` are the layer's coded numbers, as they were and as they are read."""
    count = sum(was.numel() for was, _ in tensors)
    kept = sum(int(now.count_nonzero()) for _, now in tensors) / count if count else 0.0
    if before.form == "factors" and not before.biased:
        first, second = (_product(delta) for delta in (before, after))
        whole = _inner(first, first)
        apart = max(0.0, whole - 2 * _inner(first, second) + _inner(second, second))
    else:
        whole = sum(float(was.double().square().sum()) for was, _ in tensors)
        apart = sum(float((was.double() - now.double()).square().sum()) for was, now in tensors)
    return Coded(kept, (apart / whole) ** 0.5 if whole > 0 else float(apart > 0))


def _product(delta: Delta) -> tuple[Tensor, Tensor]:
    """B (..., out, r) and A (..., r, in) in float64, with ΔW = B A."""
    B, A = delta.pair(on_base=True)
    return delta.scale * B.cpu().double(), A.cpu().double()


def _inner(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """`⟨B A, B' A'⟩`, without forming the products."""
    return float(((first[0].mT @ second[0]) * (first[1] @ second[1].mT)).sum())
