"""How alike two adapters are, told from their factors: ΔW is not formed."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rankfold.audit.metrics import overlap
from rankfold.compose._merge import Pair, pairs_at, union
from rankfold.compose._sources import BaseWeights, Source, open_source
from rankfold.compose.weight_matching import aligned
from rankfold.core.adapter import Adapter
from rankfold.core.linalg import spaces

GAMMA = 0.3


@dataclass(frozen=True)
class Alike:
    """How two changes of one weight, ΔW_a and ΔW_b (out, in), compare. A measure is None where a change is zero.

    `cosine` is `⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖)` and `ratio` `‖ΔW_b‖ / ‖ΔW_a‖` (Frobenius). `outputs` and `inputs` are
    the overlap φ of the spaces that the two write to and read from, 0 for orthogonal ones and 1 where one holds the
    other; `by_chance` is what random spaces of these dimensions would have, in the same order. `alignment` is R_γ,
    γ = 0.3: as the cosine, but of the leading directions whatever their singular values. `ranks` are the numerical
    ones. `errors` is the share of each change that is no product of factors, and not compared.
    """

    cosine: float | None
    ratio: float | None
    outputs: float | None
    inputs: float | None
    by_chance: tuple[float, float] | None
    alignment: float | None
    ranks: tuple[int, int]
    errors: tuple[float, float]


@dataclass(frozen=True)
class Similarity:
    """Two adapters side by side.

    `layers` are the weights that both change, of experts each, and `only` those that one alone does. For `cosine` and
    `ratio` an adapter is one long vector, with zeros for what it leaves alone; `outputs`, `inputs` and `alignment` are
    means over `layers`. `bases` says what the base models differ in, None if in nothing.
    """

    names: tuple[str, str]
    methods: tuple[str, str]
    bases: str | None
    cosine: float | None
    ratio: float | None
    outputs: float | None
    inputs: float | None
    alignment: float | None
    layers: dict[str, Alike]
    only: tuple[list[str], list[str]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def similar(a: Adapter | str | Path, b: Adapter | str | Path, *, model: BaseWeights | None = None) -> Similarity:
    """Compare two adapters of any methods and ranks, attached or on disk (a folder or a hub id), layer by layer.

    `model` is the base model, or its folder or hub id, for saved adapters whose change depends on the base weights.
    Adapters of different bases are compared too, and what these differ in is told.

    Raises:
        RankfoldError: a layer has another shape in the one than in the other.
        UnsupportedError: an adapter's change is no ΔW.
        AdapterFileError: a file is missing, damaged or hostile.
    """
    sources = one, other = open_source(a, model), open_source(b, model)
    layers: dict[str, Alike] = {}
    products = torch.zeros(3, dtype=torch.float64)  # ‖ΔW_a‖², ⟨ΔW_a, ΔW_b⟩, ‖ΔW_b‖² of all layers
    for name, site in union(sources).items():
        both, errors = pairs_at(sources, site)
        for place, (x, y) in _matrices(name, *both):
            own = torch.stack([_inner(x, x), _inner(x, y), _inner(y, y)]).cpu()
            products += own
            if name in one.sites and name in other.sites:
                layers[place] = _alike(x, y, own, (errors[0], errors[1]))
    cosine, ratio = _as_vectors(products)
    return Similarity(
        names=(one.name, other.name),
        methods=(_methods(one), _methods(other)),
        bases=one.alike(other),
        cosine=cosine,
        ratio=ratio,
        outputs=_mean(layer.outputs for layer in layers.values()),
        inputs=_mean(layer.inputs for layer in layers.values()),
        alignment=_mean(layer.alignment for layer in layers.values()),
        layers=layers,
        only=([s for s in one.sites if s not in other.sites], [s for s in other.sites if s not in one.sites]),
    )


def _alike(x: Pair, y: Pair, products: Tensor, errors: tuple[float, float]) -> Alike:
    cosine, ratio = _as_vectors(products)
    (U, S, Vh), (X, T, Yh) = one, other = spaces(*x), spaces(*y)
    ranks = len(S), len(T)
    if not min(ranks):
        return Alike(cosine, ratio, None, None, None, None, ranks, errors)
    outputs, inputs = overlap(U, X), overlap(Vh.mT, Yh.mT)
    agreement, count = aligned(one, other, GAMMA)
    chance = outputs.chance, inputs.chance
    return Alike(cosine, ratio, outputs.similarity, inputs.similarity, chance, agreement / count, ranks, errors)


def _matrices(name: str, x: Pair, y: Pair) -> Iterator[tuple[str, tuple[Pair, Pair]]]:
    """The two products of a site, or of each of its experts."""
    if x[0].dim() == 2:
        yield name, (x, y)
    else:
        for i, (B, A, D, C) in enumerate(zip(*x, *y, strict=True)):
            yield f"{name}[{i}]", ((B, A), (D, C))


def _inner(x: Pair, y: Pair) -> Tensor:
    """`⟨B A, D C⟩ = Σ (Bᵀ D) ∘ (A Cᵀ)`."""
    (B, A), (D, C) = x, y
    return ((B.mT.double() @ D.double()) * (A.double() @ C.mT.double())).sum()


def _as_vectors(products: Tensor) -> tuple[float | None, float | None]:
    """Cosine and ratio of norms, from ‖a‖², ⟨a, b⟩ and ‖b‖²."""
    a, inner, b = products.tolist()
    return inner / (a * b) ** 0.5 if a * b > 0 else None, (b / a) ** 0.5 if a > 0 else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _methods(source: Source) -> str:
    return ", ".join(sorted({method.slug for method in source.methods.values()}))
