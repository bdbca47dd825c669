"""TIES-Merging: Resolving Interference When Merging Models. Yadav et al. 2023, arXiv 2306.01708."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.compose._entries import EntryMerge
from rankfold.compose._merge import Layers, Pair

Density = Annotated[float, Field(gt=0, le=1, description="share K of an adapter's entries that is kept")]


class TIES(EntryMerge):
    """Trim small entries, elect a sign for each entry, and average those that agree with it.

        τ̂_i = the K·d entries of τ_i that are largest in magnitude,  γ = sign(Σ_i w_i τ̂_i)
        m_p = mean of {N w_i τ̂_{i,p} : its sign is γ_p},  ΔW = λ m

    With w_i = 1/N, the default, that is the paper's: it has no weights. K = 0.2 and λ = 1 (they search 0.8 to 3). What
    is K·d-th largest is found over all layers of an adapter, exactly, by reading them through twice. Where values
    cancel to zero, the sign is that of most entries, in this layer; in the authors' code in the whole model.

    The authors merge whole models and vectors of (IA)³. For LoRA τ_i is the change of the weights, ΔW_i, and what
    comes out has full rank: the cut back to a rank, which `report[site].cut` tells, is ours. PEFT's "ties" is that of
    `space="factors"`, but trims each tensor by itself, elects from unweighted values, and resolves zero to +; weights
    there are our N w_i. The authors' trimming keeps one entry more than K·d; here ⌊K·d⌋, and all that are equal to the
    last of them.
    """

    slug: ClassVar[str] = "ties"
    title: ClassVar[str] = "TIES-Merging: Resolving Interference When Merging Models"
    source: ClassVar[str] = "arXiv 2306.01708"

    density: Density = 0.2
    scale: Annotated[float, Field(gt=0, description="λ")] = 1.0

    @property
    def surveys(self) -> int:
        return 0 if self.density == 1 else 2

    def survey(self, layers: Layers, weights: Sequence[float]) -> list[float]:
        """The magnitude that an entry of each adapter must reach to be kept."""
        if self.density == 1:
            return [0.0] * len(weights)
        return thresholds(lambda: ([self.vectors(p) for p in pairs] for pairs in layers()), len(weights), self.density)

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        return super().combine(pairs, [len(weights) * w for w in weights], rank, rng, seen)

    def merge(self, taus: Sequence[Tensor], weights: Sequence[float], rng: torch.Generator, seen: Any) -> Tensor:
        trimmed = (w * tau * (tau.abs().float() >= least) for tau, w, least in zip(taus, weights, seen, strict=True))
        return self.scale * agreeing_mean(list(trimmed))


def agreeing_mean(taus: Sequence[Tensor]) -> Tensor:
    """The mean of the values that are not zero and have the sign of the sum, entry by entry; 0 where there is none."""
    elected = sum(taus[1:], taus[0]).sign()
    elected = torch.where(elected == 0, elected.sum().sign(), elected)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tau in taus:
        agrees = tau.sign() == elected  # where both are 0 there is nothing to add
        total += tau * agrees
        count += agrees
    return total / count.clamp(min=1)


Parts = Sequence[Iterable[Tensor]]  # of each vector, the parts that lie in one layer


def thresholds(layers: Callable[[], Iterator[Parts]], count: int, density: float) -> list[float]:
    """The ⌊K d⌋-th largest magnitude of each of `count` vectors of d entries, which are never there as a whole.

    The bits of a float32 without its sign are in order of size: the upper 15 are counted in one pass, and the lower 16
    of those that share the right upper ones in another.
    """
    upper = _counts(layers(), count, 15, lambda i, bits: bits >> 16)
    entries = upper.sum(-1)
    high, left = _reached(upper, (entries * density).long().clamp(min=1).minimum(entries))
    lower = _counts(layers(), count, 16, lambda i, bits: bits[bits >> 16 == high[i]] & 0xFFFF)
    low, _ = _reached(lower, left)
    return (high << 16 | low).int().view(torch.float32).tolist()


def _counts(layers: Iterator[Parts], count: int, width: int, of: Callable[[int, Tensor], Tensor]) -> Tensor:
    """How often each number of so many bits occurs in each vector: (count, 2^width)."""
    counts = torch.zeros(count, 1 << width, dtype=torch.long)
    for parts in layers:
        for i, own in enumerate(parts):
            for tau in own:
                bits = of(i, tau.abs().float().contiguous().view(torch.int32).flatten())
                counts[i] += torch.bincount(bits, minlength=1 << width).cpu()
    return counts


def _reached(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the place where as many as wanted lie from there to the end, and how many of them lie at it."""
    behind = counts.flip(-1).cumsum(-1).flip(-1)  # at a place and behind it
    place = (behind >= wanted[:, None]).sum(-1) - 1
    return place, wanted - behind.gather(-1, place[:, None])[:, 0] + counts.gather(-1, place[:, None])[:, 0]
