"""DARE: Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch. Yu et al. 2023,
arXiv 2311.03099."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.compose._entries import EntryMerge
from rankfold.compose._merge import Pair
from rankfold.compose.task_arithmetic import weighted_sum
from rankfold.compose.ties import agreeing_mean


class DARE(EntryMerge):
    """Drop entries of each task vector at random and rescale the rest, then merge: fewer entries meet each other.

        τ̃_i = m_i ⊙ τ_i / (1 − p),  m_i ~ Bernoulli(1 − p)

    and then `rule="sum"`, `Σ w_i τ̃_i`, or `rule="ties"`, TIES without its trimming: the mean of the values that agree
    with the sign of the sum. p = 0.9; `E[τ̃] = τ` with variance τ² p/(1 − p). `rescale=False` leaves the 1/(1 − p) out,
    to see what it does.

    The authors drop entries of the changes of whole models. A ΔW of low rank has full rank after that, and the cut back
    to a rank (`report[site].cut`) takes most of what was dropped to be noise: at p = 0.9 expect a large cut. PEFT
    drops entries of A and B in "dare_linear" (`space="factors"`) and of ΔW in "dare_linear_svd"; its density is 1 − p.
    """

    slug: ClassVar[str] = "dare"
    title: ClassVar[str] = "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch"
    source: ClassVar[str] = "arXiv 2311.03099"

    drop: Annotated[float, Field(ge=0, lt=1, description="probability p of dropping an entry")] = 0.9
    rule: Annotated[Literal["sum", "ties"], Field(description="how what is left is merged")] = "sum"
    rescale: bool = True

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        scaled = [len(weights) * w for w in weights] if self.rule == "ties" else weights  # as TIES does
        return super().combine(pairs, scaled, rank, rng)

    def merge(self, taus: Sequence[Tensor], weights: Sequence[float], rng: torch.Generator, seen: Any) -> Tensor:
        kept = [dropped(tau, self.drop, rng, self.rescale) for tau in taus]
        if self.rule == "ties":
            return agreeing_mean([w * tau for tau, w in zip(kept, weights, strict=True)])
        return weighted_sum(kept, weights)


def dropped(tau: Tensor, p: float, rng: torch.Generator, rescale: bool = True) -> Tensor:
    """τ with entries dropped with probability p, the others divided by 1 − p; `rng` is a CPU generator."""
    mask = torch.bernoulli(torch.full(tau.shape, 1 - p, dtype=tau.dtype), generator=rng).to(tau.device)
    return mask * tau / (1 - p) if rescale else mask * tau
