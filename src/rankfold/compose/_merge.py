"""Several adapters as one: a merge says what becomes of one layer's products, and `combine` does the rest."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from rankfold.compose._result import Result
from rankfold.compose._sources import BaseWeights, Source, open_source
from rankfold.core.adapter import Adapter
from rankfold.core.component import Component, build, components
from rankfold.core.delta import Site
from rankfold.core.linalg import truncate
from rankfold.deltas.lora import LoRA
from rankfold.errors import RankfoldError

Pair = tuple[Tensor, Tensor]
Layers = Callable[[], Iterator[Sequence[Pair]]]
SHORT = {"linear": "task-arithmetic", "svd": "svd-merge", "lego": "lora-lego"}  # what people call them


class Merge(Component):
    """Makes one product of several, layer by layer: `combine(pairs, weights, rank, rng)` gives B, A and what it cut.

    `pairs` are B_i (..., out, r_i) and A_i (..., r_i, in) of each adapter in turn, float32 or float64, their scale in
    them (√|s| in each), r_i = 0 where an adapter leaves the layer alone; `weights` are w_i. `rank` is what the user
    asked for, None for the rule's own choice. The third value is the relative error `‖M − B A‖ / ‖M‖` of a cut to a
    rank, if the rule makes a M (out, in) that it cuts.

    A rule that has to see all layers before it can work on the first learns in `survey` what `combine` gets as `seen`.
    """

    axis: ClassVar[str] = "compose"

    @property
    def surveys(self) -> int:
        """How often `survey` reads through the layers."""
        return 0

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        raise NotImplementedError

    def survey(self, layers: Layers, weights: Sequence[float]) -> Any:
        """What `combine` has to know of all layers, as its `seen`; every call of `layers()` reads them through."""
        return None

    def weights(self, count: int) -> list[float]:
        """The weights w_i of so many adapters where the user gives none: their mean."""
        return [1 / count] * count


def rule_of(how: str, **hyperparameters: Any) -> Merge:
    """The merge of that slug, or of a name that people use for it."""
    rule = build(SHORT.get(how, how), **hyperparameters)
    if not isinstance(rule, Merge):
        merges = [cls.slug for cls in components() if issubclass(cls, Merge)]
        raise RankfoldError(f"{how!r} merges no adapters; there are: {', '.join([*SHORT, *merges])}")
    return rule


@dataclass(frozen=True)
class Combined:
    """What became of a layer.

    `before` are the adapters' ranks, 0 where one leaves the layer alone, and `rank` the new one. `read` is the largest
    relative error with which an adapter's change was read as a product, `cut` that of cutting the merged change to its
    rank, and `error` how far the new change is from the weighted sum, `‖ΔW − Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖`.
    """

    before: tuple[int, ...]
    rank: int
    read: float
    cut: float
    error: float


@overload
def combine(
    adapters: Sequence[Adapter], how: str | Merge, weights: Sequence[float] | None = None, to: str | None = None, *,
    rank: int | None = None, model: BaseWeights | None = None, force: bool = False, seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> tuple[Adapter, dict[str, Combined]]: ...  # fmt: skip
@overload
def combine(
    adapters: Sequence[str | Path], how: str | Merge, weights: Sequence[float] | None = None,
    to: str | Path | None = None, *, rank: int | None = None, model: BaseWeights | None = None, force: bool = False,
    seed: int = 0, progress: Callable[[], object] | None = None,
) -> tuple[Path, dict[str, Combined]]: ...  # fmt: skip
@torch.no_grad()
def combine(
    adapters: Sequence[Adapter | str | Path],
    how: str | Merge,
    weights: Sequence[float] | None = None,
    to: str | Path | None = None,
    *,
    rank: int | None = None,
    model: BaseWeights | None = None,
    force: bool = False,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> tuple[Adapter | Path, dict[str, Combined]]:
    """One LoRA out of several adapters of one base model, of any methods and ranks, layer by layer.

    Memory is bounded by the largest layer and what the rule makes of it, for adapters on disk. The adapters stay as
    they are. A module that one of them holds in full is taken over; where several hold it, they must agree.

    Args:
        adapters: attached ones, or folders of saved ones.
        how: a rule, or its slug with its defaults: `"ties"`, `rankfold.TIES(density=0.1)`.
        weights: w_i of each adapter, negative to take it away; default: the rule's own, most often 1/N.
        to: the new adapter's name (default: the rule's), put beside the first if that is attached, inactive; or the
            folder that it is written to, if the first is saved.
        rank: of each layer of the result; default: the rule's own choice.
        model: for saved adapters whose change depends on the base weights (DoRA, IA3, ...): the base model, or the
            folder or hub id of its safetensors files, of which one layer is read at a time.
        force: combine adapters of different bases all the same; the new adapter says so.
        seed: for what a rule draws.
        progress: called after each layer that is read, `rule.surveys` times more than once for each.

    Returns:
        the new adapter, or the folder, and what became of each layer.

    Raises:
        RankfoldError: the bases or the shapes differ, or a module is held in full in two ways; it names them.
        UnsupportedError: an adapter's change is no ΔW.
        AdapterFileError: a file is missing, damaged or hostile.
    """
    rule = rule_of(how) if isinstance(how, str) else how
    weights = _checked_weights(rule, adapters, weights)
    if rank is not None and rank < 1:
        raise RankfoldError(f"combine: rank must be at least 1, not {rank}")
    if not isinstance(adapters[0], Adapter) and to is None:
        raise RankfoldError("combine: say the folder for the new adapter")
    sources = [open_source(adapter, model) for adapter in adapters]
    differ = _compared(sources, force)
    sites = union(sources)
    full = _in_full(sources, sites)
    name = getattr(rule, "slug", "combined")  # a rule that somebody did not register has none
    seen = rule.survey(lambda: (pairs_at(sources, site, progress)[0] for site in sites.values()), weights)
    report: dict[str, Combined] = {}
    with Result(sources[0], name if to is None else to, name, differ) as result:
        for site in sites.values():
            pairs, errors = pairs_at(sources, site, progress)
            B, A, cut = rule.combine(pairs, weights, rank, site.rng(seed), seen)
            if A.shape[-2] > min(site.out, site.in_):  # more components than it has rank: nothing is lost
                B, A, _ = truncate(B, A, min(site.out, site.in_))
            before = tuple(A_i.shape[-2] for _, A_i in pairs)
            report[site.name] = Combined(before, A.shape[-2], max(errors), cut, _apart(B, A, pairs, weights))
            result.add(site, B, A, LoRA(rank=A.shape[-2], dropout=_dropout(sources, site.name)))
        for path, source in full.items():
            result.add_full(source, path)
        return result.finish(), report


def _checked_weights(rule: Merge, adapters: Sequence[Any], weights: Sequence[float] | None) -> list[float]:
    if not adapters:
        raise RankfoldError("combine: there is no adapter to combine")
    found = rule.weights(len(adapters)) if weights is None else [float(w) for w in weights]
    if len(found) != len(adapters):
        raise RankfoldError(f"combine: {len(found)} weights for {len(adapters)} adapters: give each one")
    if not all(abs(w) < float("inf") for w in found):
        raise RankfoldError(f"combine: weights must be numbers, not {found}")
    return found


def _compared(sources: Sequence[Source], force: bool) -> str | None:
    """What differs in the bases; refused unless forced."""
    against = (*(source.doubt for source in sources), *map(sources[0].alike, sources[1:]))
    found = [differ for differ in against if differ is not None]
    if found and not force:
        raise RankfoldError(
            f"adapters of different base models: {'; '.join(found)}. What one learned means nothing on the other's "
            "weights; force=True (--force) combines them all the same, and the new adapter says so"
        )
    known = [source.forced for source in sources if source.forced is not None]
    return "; ".join(dict.fromkeys([*found, *known]))[:2000] or None


def union(sources: Sequence[Source]) -> dict[str, Site]:
    """The sites that any of them adapts, in the order of the first that does."""
    sites: dict[str, Site] = {}
    for source in sources:
        for name, site in source.sites.items():
            known = sites.setdefault(name, site)
            if (known.kind, known.batch, known.out, known.in_) != (site.kind, site.batch, site.out, site.in_):
                shapes = ["×".join(map(str, (*s.batch, s.out, s.in_))) for s in (known, site)]
                raise RankfoldError(
                    f"{name} is {known.kind} of {shapes[0]} in one adapter and {site.kind} of {shapes[1]} in "
                    f"{source.name!r}: they were not trained on one base model"
                )
    return sites


def _in_full(sources: Sequence[Source], sites: Iterable[str]) -> dict[str, Source]:
    """The source of each module that is held in full."""
    found: dict[str, Source] = {}
    for source in sources:
        for path, names in source.full.items():
            first = found.setdefault(path, source)
            if first is source:
                continue
            same = sorted(first.full[path]) == sorted(names) and all(
                torch.equal(first.tensor(name).cpu(), source.tensor(name).cpu()) for name in names
            )
            if not same:
                raise RankfoldError(
                    f"{first.name!r} and {source.name!r} both hold {path} in full, and differ: two heads cannot be "
                    "combined. Save one of them without it, or train both adapters under one head"
                )
    for site in sites:
        if inside := [path for path in found if f"{site}.".startswith(f"{path}.")]:
            raise RankfoldError(
                f"{found[inside[0]].name!r} holds {inside[0]} in full, and another adapter has a delta on {site}: "
                "one of them would be lost. Train both adapters alike there"
            )
    return found


def pairs_at(
    sources: Sequence[Source], site: Site, progress: Callable[[], object] | None = None
) -> tuple[list[Pair], list[float]]:
    """Each source's factors of the site, and with what error they were read."""
    read = [source.pair(site.name) if site.name in source.sites else None for source in sources]
    there = [one for one in read if one is not None]
    device, dtype = there[0][0].device, max((B.dtype for B, _, _ in there), key=lambda dtype: dtype.itemsize)
    none = torch.empty(*site.batch, site.out, 0), torch.empty(*site.batch, 0, site.in_)
    pairs = [none if one is None else one[:2] for one in read]
    if progress is not None:
        progress()
    return [(B.to(device, dtype), A.to(device, dtype)) for B, A in pairs], [error for _, _, error in there]


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """B = [B_1 … B_N] and A = the w_i A_i above one another: the exact `Σ w_i B_i A_i`, of rank Σ r_i."""
    As = [w * A for w, (_, A) in zip(weights, pairs, strict=True)]
    return torch.cat([B for B, _ in pairs], -1), torch.cat(As, -2)


def widest(pairs: Sequence[Pair]) -> int:
    """The largest of the adapters' ranks."""
    return max(A.shape[-2] for _, A in pairs)


def _apart(B: Tensor, A: Tensor, pairs: Sequence[Pair], weights: Sequence[float]) -> float:
    """How far B A is from the weighted sum, relative to that, without forming either; 1 where that is zero."""
    summed = norm_of_product(*stacked(pairs, weights))
    apart = norm_of_product(*stacked([(B, A), *pairs], [1.0, *(-w for w in weights)]))
    nothing = 1e-6 * max(norm_of_product(w * B, A) for w, (B, A) in zip(weights, pairs, strict=True))  # rounding
    return apart / summed if summed > nothing else float(apart > nothing)


def norm_of_product(B: Tensor, A: Tensor) -> float:
    """‖B A‖ (Frobenius), without forming it where that saves memory."""
    if A.shape[-2] > min(B.shape[-2], A.shape[-1]):
        return float((B @ A).norm())
    B, A = B.double(), A.double()
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt())


def _dropout(sources: Sequence[Source], site: str) -> float:
    first: Mapping[str, Any] = next(source.methods for source in sources if site in source.methods)
    return getattr(first[site], "dropout", 0.0)
