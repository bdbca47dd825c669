"""Weight matching: hidden units in the order that brings two networks together. Git Re-Basin, Ainsworth, Hayase and
Srinivasa 2022, arXiv 2209.04836; what makes it work: Ito, Yamada and Kumagai 2024, arXiv 2402.04051.

A network is a list of layers, W_l (n_l, n_{l−1}) with b_l (n_l,) or None. A permutation P_l of layer l's units is a
tensor p of indices: unit i of P_l x is x[p[i]]. The units of the input and of the output stay: P_0 = P_L = I.

In a LoRA the units are those of the inner dimension: `WeightMatching` brings them together before it averages.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.compose._merge import Merge, Pair
from rankfold.compose._units import balanced, cut, mixed, widened
from rankfold.core.linalg import svd

Layer = tuple[Tensor, Tensor | None]
Svd = tuple[Tensor, Tensor, Tensor]
Loss = Callable[[list[Layer]], Tensor]


class WeightMatching(Merge):
    """Average the factors of LoRAs, `B = Σ w_i B_i` and `A = Σ w_i A_i`, after their rank-1 units were matched.

    The units (b, a) of each, with ‖b‖ = ‖a‖, get the order and the signs for which `Σ_j ⟨b_j, b_j'⟩ + ⟨a_j, a_j'⟩` is
    the largest, (b', a') the units of one LoRA, the first of the largest rank. Neither changes ΔW. A lower rank is
    filled up with units of zeros.
    """

    slug: ClassVar[str] = "weight-matching"
    title: ClassVar[str] = "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching"
    source: ClassVar[str] = "arXiv 2402.04051"

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        even = widened([balanced(B, A) for B, A in pairs])
        anchor = even[max(range(len(pairs)), key=lambda i: pairs[i][1].shape[-2])]
        return cut(*mixed([match_units(anchor, pair) for pair in even], weights), rank)


def match_units(a: Pair, b: Pair) -> Pair:
    """The units of b in the order and with the signs in which they agree best with those of a; of experts, each."""
    (B, A), (D, C) = a, b
    if A.dim() > 2:
        parts = [match_units(*both) for both in zip(zip(B, A, strict=True), zip(D, C, strict=True), strict=True)]
        D, C = (torch.stack(part) for part in zip(*parts, strict=True))
        return D, C
    agreement = B.mT @ D + A @ C.mT
    p = assign(agreement.abs()).to(A.device)
    sign = torch.where(agreement.gather(1, p[:, None]) < 0, -1.0, 1.0).to(A)
    return D[:, p] * sign.mT, C[p] * sign


@torch.no_grad()
def match(a: Sequence[Layer], b: Sequence[Layer], *, sweeps: int = 100, seed: int = 0) -> list[Tensor]:
    """The P_0 … P_L that maximise `Σ_l ⟨W_l^a, P_l W_l^b P_{l−1}ᵀ⟩ + ⟨b_l^a, P_l b_l^b⟩`.

    Coordinate ascent: each layer in turn, in an order drawn from `seed`, gets the P_l that is best beside the others as
    they are, a linear assignment, until a sweep finds nothing better by 1e-12 or `sweeps` are done. The end is a local
    maximum. The published code takes a new P_l that is no better, too; here the old one stays.
    """
    P = [torch.arange(b[0][0].shape[1]), *(torch.arange(len(W)) for W, _ in b)]
    rng = torch.Generator().manual_seed(seed)
    for _ in range(sweeps):
        before = P.copy()
        for i in (torch.randperm(len(b) - 1, generator=rng) + 1).tolist():
            (Wa, ba), (Wb, bb), (Va, _), (Vb, _) = a[i - 1], b[i - 1], a[i], b[i]
            C = Wa @ Wb[:, P[i - 1]].mT + Va.mT @ Vb[P[i + 1]]  # of a's unit with b's
            if ba is not None and bb is not None:
                C = C + torch.outer(ba, bb)
            best = assign(C)
            if _chosen(C, best) > _chosen(C, P[i]) + 1e-12:
                P[i] = best
        if all(map(torch.equal, P, before)):
            break
    return P


def assign(C: Tensor) -> Tensor:
    """For each row of C (n, m), n ≤ m, a column of its own, so that the entries there have the largest sum."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(C.detach().cpu().double().numpy(), maximize=True)[1])


def _chosen(C: Tensor, p: Tensor) -> Tensor:
    return C.double()[torch.arange(len(p)), p].sum()


def permute(layers: Sequence[Layer], P: Sequence[Tensor]) -> list[Layer]:
    """`P_l W_l P_{l−1}ᵀ` and `P_l b_l`: the same function, if what is between the layers treats all units alike."""
    moved = zip(layers, P, P[1:], strict=False)
    return [(W[after][:, before], None if b is None else b[after]) for (W, b), before, after in moved]


def objective(a: Sequence[Layer], b: Sequence[Layer]) -> float:
    """`Σ_l ⟨W_l^a, W_l^b⟩ + ⟨b_l^a, b_l^b⟩`."""
    return sum(float(t) for layer in _each(lambda x, y: (x * y).sum(), a, b) for t in layer if t is not None)


def between(a: Sequence[Layer], b: Sequence[Layer], share: float) -> list[Layer]:
    """`(1−λ) θ_a + λ θ_b`, with λ the share."""
    return _each(lambda x, y: torch.lerp(x, y, share), a, b)


def _each(do: Callable[..., Tensor], *networks: Sequence[Layer]) -> list[Layer]:
    """A network of what `do` makes of the tensors that have the same place; None where one of them is."""
    found: list[Any] = []
    for layers in zip(*networks, strict=True):
        parts = zip(*layers, strict=True)
        found.append(tuple(None if any(t is None for t in part) else do(*part) for part in parts))
    return found


@torch.no_grad()
def barrier(loss: Loss, a: Sequence[Layer], b: Sequence[Layer], points: int = 11) -> float:
    """`max_λ L((1−λ)θ_a + λθ_b) − ((1−λ)L(θ_a) + λL(θ_b))` over so many evenly spaced λ, the ends among them."""
    shares = torch.linspace(0, 1, points).tolist()
    losses = [float(loss(between(a, b, share))) for share in shares]
    first, last = losses[0], losses[-1]
    return max(here - ((1 - share) * first + share * last) for here, share in zip(losses, shares, strict=True))


def match_by_loss(
    a: Sequence[Layer], b: Sequence[Layer], loss: Loss, *, steps: int = 100, lr: float = 1e-2, seed: int = 0
) -> list[Tensor]:
    """The rival that looks at data, the straight-through estimator (STE) of Git Re-Basin.

    θ̃ starts at θ_a. Every step takes P = match(θ̃, θ_b), and the gradient of `L(½(θ_a + P θ_b))` by P θ_b as that by θ̃.
    The P is returned whose loss was the lowest; `loss` may see another batch at each call.
    """
    latent = _each(lambda t: t.clone().requires_grad_(), a)
    optimizer = torch.optim.Adam([t for layer in latent for t in layer if t is not None], lr)
    found: list[tuple[float, list[Tensor]]] = []
    for step in range(steps):
        P = match(latent, b, seed=seed + step)
        through = _each(lambda w, t: w + (t - t.detach()), permute(b, P), latent)
        value = loss(between(a, through, 0.5))
        found.append((value.item(), P))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return min(found, key=lambda one: one[0])[1]


def alignment(a: Sequence[Layer], b: Sequence[Layer], gamma: float = 0.3) -> float:
    """R_γ: how well the singular vectors of the layers agree, 1 for equal layers, about 0 for unrelated ones.

        R_γ = Σ_{l,i,j} (u_i^aᵀ u_j^b)(v_i^aᵀ v_j^b) / Σ_l n_l

    over the components with σ ≥ γ σ_max of their layer. n_l is how many those are, in the layer that has more.
    """
    parts = [aligned(svd(W), svd(V), gamma) for (W, _), (V, _) in zip(a, b, strict=True)]
    return sum(part for part, _ in parts) / sum(count for _, count in parts)


def aligned(one: Svd, other: Svd, gamma: float) -> tuple[float, int]:
    """A layer's sum in R_γ and its n_l, of two thin SVDs (U, S, Vh)."""
    (U, S, Vh), (X, T, Yh) = one, other
    n, m = int((gamma * S[0] <= S).sum()), int((gamma * T[0] <= T).sum())
    agreement = (U[:, :n].mT @ X[:, :m]) * (Vh[:n] @ Yh[:m].mT)
    return float(agreement.sum()), max(n, m)
