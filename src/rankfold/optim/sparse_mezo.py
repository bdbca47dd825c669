"""Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning. Liu et al. 2024,
arXiv 2402.15751.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.optim.mezo import MeZO, ZerothOrder, packed, pieces


class SparseZerothOrder(ZerothOrder):
    """A `ZerothOrder` step on the numbers with `|θ| ≤ h`; the h of each parameter are its whole state."""

    def __init__(self, params: Any, *args: Any, sparsity: float = 0.75, **kwargs: Any):
        super().__init__(params, *args, **kwargs)
        self.sparsity = sparsity

    def mask(self, p: Tensor, part: Tensor) -> Tensor | None:
        if self.sparsity == 0:
            return None
        if "h" not in self.state[p]:
            h = kth_smallest(pieces(p), max(round((1 - self.sparsity) * p.numel()), 1))
            self.state[p]["h"] = h if h > 0 else torch.full_like(h, torch.inf)
        return packed(part.abs() <= self.state[p]["h"])

    def state_bytes(self) -> int:
        return sum(state["h"].nbytes for state in self.state.values() if "h" in state)


def kth_smallest(parts: Sequence[Tensor], k: int) -> Tensor:
    """The k-th smallest |θ| of a parameter's pieces, without a copy of it.

    The bits of a magnitude rise with it. So it is found from its leading 16 bits on, by counting those of all others.
    """
    size = parts[0].itemsize
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    found = 0
    for shift in range(8 * size - 16, -1, -16):
        counts = torch.zeros(2**16, dtype=torch.int64, device=parts[0].device)
        for part in parts:
            digits = part.abs().flatten().view(whole).long() >> shift
            counts += torch.bincount(digits[digits >> 16 == found] & 0xFFFF, minlength=2**16)
        below = counts.cumsum(0)
        digit = int(torch.searchsorted(below, k))
        found, k = found << 16 | digit, k - int(below[digit] - counts[digit])
    return torch.tensor(found, dtype=whole, device=parts[0].device).view(parts[0].dtype)


class SparseMeZO(MeZO):
    """MeZO that perturbs and steps the small weights alone: `ẑ = M ⊙ z` with `M = 1[|θ| ≤ h]`.

    h is the quantile of |θ|, parameter by parameter, that leaves `1 − sparsity` of the numbers below it at the start,
    and stays; M is taken anew before each step. (The authors publish no code, and tune the sparsity for each task.) A
    parameter with h = 0, such as LoRA's B at its start, is small throughout and not masked. Here M is kept for the
    length of a step, a bit a number. The learning rate can be 5 to 10 times MeZO's.
    """

    slug: ClassVar[str] = "sparse-mezo"
    title: ClassVar[str] = "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning"
    source: ClassVar[str] = "arXiv 2402.15751"
    shards = "none"  # h is of a whole parameter

    sparsity: Annotated[float, Field(ge=0, lt=1, description="share of the numbers, the largest, left alone")] = 0.75

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> SparseZerothOrder:
        return SparseZerothOrder(groups, lr, weight_decay, self.eps, self.seed, self.not_finite, sparsity=self.sparsity)
