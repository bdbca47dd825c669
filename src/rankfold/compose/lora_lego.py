"""LoRA-LEGO: Merging LoRAs like Playing LEGO. Zhao et al. 2024, arXiv 2409.16167."""

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rankfold.compose._merge import Merge, Pair, widest
from rankfold.compose._units import balanced, factors, rows, widened


class LoRALego(Merge):
    """Cut every LoRA into its rank-1 units, group all units by k-means, and build one LoRA of the groups' means.

        u_{n,j} = [A_n[j,:] ; B_n[:,j]],  clusters C_1 … C_k of all of them,  μ_c = mean of C_c
        μ_c ← μ_c · (mean_{u∈C_c} ‖u‖) / ‖μ_c‖      parameter reweighting: averaging shrinks norms
        ΔW = √(r/k) Σ_c b_c a_c                      output reweighting

    Row c of A and column c of B are the two parts of μ_c. r is the largest rank of the LoRAs, k the `rank` that is
    asked for, by default r. With k the number of all units and without reweighting ΔW is the sum of all LoRAs.

    A unit (b, a) is the same rank-1 matrix as (c b, a / c), of which the paper does not speak: with `balance` units get
    equal norms on both sides, and signs in which like ones are alike. Units are sorted before the seeded k-means, so
    that their order and that of the LoRAs change nothing. Units of zero are left out, and the rank is less than k where
    fewer differ. A weight multiplies a LoRA's units; by default all are 1.
    """

    slug: ClassVar[str] = "lora-lego"
    title: ClassVar[str] = "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes"
    source: ClassVar[str] = "arXiv 2409.16167"

    parameter_reweighting: bool = True
    output_reweighting: bool = True
    balance: Annotated[bool, Field(description="bring equal units into the same form first")] = True

    def weights(self, count: int) -> list[float]:
        return [1.0] * count

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        r = widest(pairs)
        seed = int(torch.randint(2**31, (), generator=rng))
        # √|w| on both sides, so that weights do not move a unit's direction.
        roots = [abs(w) ** 0.5 for w in weights]
        scaled = [(B * (w / g if g else 0), A * g) for w, g, (B, A) in zip(weights, roots, pairs, strict=True)]
        units = torch.cat([rows(*(balanced(B, A) if self.balance else (B, A))) for B, A in scaled], -2)
        matrices = units.reshape(-1, *units.shape[-2:])  # one, or one for each expert
        made = widened([factors(self.assemble(one, rank or r, r, seed), pairs[0][1].shape[-1]) for one in matrices])
        B, A = (torch.stack(parts).reshape(*units.shape[:-2], *parts[0].shape) for parts in zip(*made, strict=True))
        return B, A, 0.0

    def assemble(self, units: Tensor, k: int, r: int, seed: int) -> Tensor:
        """At most k units (k, in + out) in place of all (M, in + out)."""
        units = sort(units[units.any(-1)], turn=self.balance)
        if not len(units):
            return units.new_zeros(1, units.shape[-1])
        labels = cluster(units, min(k, len(units)), seed)
        groups = [units[labels == label] for label in labels.unique()]
        centroids = torch.stack([group.mean(0) for group in groups])
        if self.parameter_reweighting:
            norms = torch.stack([group.norm(dim=-1).mean() for group in groups])
            centroids = F.normalize(centroids, dim=-1) * norms[:, None]
        return centroids * (r / len(groups)) ** 0.25 if self.output_reweighting else centroids


def sort(units: Tensor, turn: bool) -> Tensor:
    """The units (M, n) in an order, and with `turn` of signs, that do not depend on those they came in.

    Each is turned to agree with the one before it that it resembles most, either way round.
    """
    if turn:
        units = units * units.gather(-1, units.abs().argmax(-1, keepdim=True)).sign()
    values = units.tolist()
    units = units[sorted(range(len(values)), key=values.__getitem__)]
    if turn:
        for i in range(1, len(units)):
            cosines = F.normalize(units[:i], dim=-1) @ units[i]
            if cosines[cosines.abs().argmax()] < 0:
                units[i] *= -1
    return units


def cluster(units: Tensor, k: int, seed: int) -> Tensor:
    """The number of each unit's cluster, by k-means: Euclidean, k-means++, the best of ten starts."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different units than clusters: some are empty
        means = KMeans(k, n_init=10, random_state=seed)  # type: ignore[arg-type] (a number, or "auto")
        found = means.fit_predict(units.double().cpu().numpy())
    return torch.from_numpy(found).to(units.device)
