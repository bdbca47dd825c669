"""A product `B A` as rank-1 units: unit j is column j of B (..., out, r) with row j of A (..., r, in).

ΔW is the sum of the units. So their order does not matter, the units of two products side by side are the sum of both,
and a unit (b, a) may as well be written (c b, a / c), with a c of either sign.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.compose._merge import Pair, widest
from rankfold.core.linalg import truncate


def balanced(B: Tensor, A: Tensor) -> Pair:
    """The same units, the norm of each shared equally between its two sides; one that does nothing is zero on both."""
    b, a = B.norm(dim=-2, keepdim=True), A.norm(dim=-1, keepdim=True)
    each = (b.mT * a).sqrt()
    return B * (each.mT / b).nan_to_num(0, 0, 0), A * (each / a).nan_to_num(0, 0, 0)


def rows(B: Tensor, A: Tensor) -> Tensor:
    """Each unit as one row `[a ; b]`: (..., r, in + out)."""
    return torch.cat([A, B.mT], -1)


def factors(rows: Tensor, in_: int) -> Pair:
    """The B (..., out, r) and A (..., r, in) of such rows."""
    return rows[..., in_:].mT, rows[..., :in_]


def widened(pairs: Sequence[Pair]) -> list[Pair]:
    """All of the largest rank, by units of zeros at the end."""
    r = widest(pairs)
    return [(F.pad(B, (0, r - B.shape[-1])), F.pad(A, (0, 0, 0, r - A.shape[-2]))) for B, A in pairs]


def mixed(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """`B = Σ w_i B_i` and `A = Σ w_i A_i`, of equal ranks: unit j is mixed with unit j, and ΔW is quadratic in w."""
    B = sum((w * B for w, (B, _) in zip(weights, pairs, strict=True)), torch.zeros_like(pairs[0][0]))
    return B, sum((w * A for w, (_, A) in zip(weights, pairs, strict=True)), torch.zeros_like(pairs[0][1]))


def cut(B: Tensor, A: Tensor, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """The best product of at most that rank, None for as it is, and of no more than it can have; its relative error."""
    most = min(B.shape[-2], A.shape[-1], rank or A.shape[-2])
    if most >= A.shape[-2]:
        return B, A, 0.0
    B, A, error = truncate(B, A, most)
    return B, A, float(error.amax())
