"""LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization. Yen et al. 2024,
arXiv 2410.20625.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.optim._base import NotFinite, Rounding, Stepwise, precise, whole
from rankfold.optim._fields import Stepping
from rankfold.optim._pairs import pairs
from rankfold.optim._rules import AdamW


class _Seen(NamedTuple):
    """A factor F (n, r) from the other's side: its gradient ḡ = ∇F R⁻¹, with the other factor U R, and R⁻¹."""

    g: Tensor
    U: Tensor
    inverse: Tensor


class Rite(Stepwise):
    """Steps groups with `"pair": True`, which hold one B (out, r) and its A (r, in), and the rest by torch's AdamW.

    State of a factor: M and U as large as itself, V (r, r). U is the basis of its own columns at the last step, A's as
    rows.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        clip: float = 1.0,
        not_finite: NotFinite = "raise",
        rounding: Rounding = "nearest",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "pair": False}, not_finite, rounding)
        self.betas, self.eps, self.clip, self.fallback = betas, eps, clip, AdamW(betas, 1e-8, corrected=True)
        self._seen: dict[Tensor, _Seen] = {}
        self._shrink = 1.0

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if not group["pair"]:
            return {"t": 0, **self.fallback.start(p, tuple(p.shape), precise(p))}
        r = min(p.shape[-2:])
        zeros = torch.zeros_like(p, dtype=precise(p))
        return {"t": 0, "M": zeros, "V": zeros.new_zeros(*p.shape[:-2], r, r), "U": zeros.clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["pair"] and all(p.grad is not None for p in group["params"]):
                B, A = (self.numbers(p).detach().to(precise(p)) for p in group["params"])
                gB, gA = (whole(p.grad).to(precise(p)) for p in group["params"])
                self._seen |= zip(group["params"], (_see(gB, A.mT), _see(gA.mT, B)), strict=True)
        norms = [seen.g.norm() for seen in self._seen.values()]
        norm = torch.stack([n.to(norms[0].device) for n in norms]).norm() if norms else torch.zeros(())
        self._shrink = min(1.0, self.clip / max(norm.item(), 1e-30)) if self.clip else 1.0
        try:
            super().step()
        finally:
            self._seen.clear()
        return loss

    def update(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["t"] += 1
        keep = 1 - group["lr"] * group["weight_decay"]
        if not group["pair"]:
            N, factor = self.fallback.direction(G, state, state["t"])
            W.mul_(keep).add_(N, alpha=-group["lr"] * factor)
        elif p is group["params"][1] and p in self._seen:  # both at once, when both have their state
            moves = [self._move(q, other, group) for q, other in (group["params"], group["params"][::-1])]
            B, A = group["params"]
            wide = self.numbers(B)
            wide.mul_(keep).sub_(moves[0], alpha=group["lr"])
            self.write(B, wide)
            W.mul_(keep).sub_(moves[1].mT, alpha=group["lr"])
            self.state[B]["U"].copy_(self._seen[A].U)
            self.state[A]["U"].copy_(self._seen[B].U.mT)

    def _move(self, p: Tensor, other: Tensor, group: dict[str, Any]) -> Tensor:
        """M R^(−T) (n, r), after V, S and M of this step."""
        state, seen = self.state[p], self._seen[p]
        is_B = p is group["params"][0]
        t = self.state[group["params"][1]]["t"]
        beta1, beta2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in self.betas)
        before = self.state[other]["U"]
        P = seen.U.mT @ (before.mT if is_B else before)
        g, M = seen.g * self._shrink, state["M"] if is_B else state["M"].mT
        V = state["V"].copy_(beta2 * P @ state["V"] @ P.mT + (1 - beta2) / g.shape[-2] * g.mT @ g)
        values, vectors = torch.linalg.eigh(V)
        roots = values.clamp_min(0).sqrt() + self.eps
        S = g @ (vectors / roots.unsqueeze(-2)) @ vectors.mT
        M.copy_(beta1 * M @ P.mT + (1 - beta1) * S)
        return M @ seen.inverse.mT


def _see(g: Tensor, other: Tensor) -> _Seen:
    U, R = torch.linalg.qr(other)
    inverse = torch.linalg.pinv(R)
    return _Seen(g @ inverse, U, inverse)


class LoRARite(Stepping):
    """A step in BA that does not depend on which factors stand for the product.

    With `B = U_B R_B` and `Aᵀ = U_A R_A`, for Aᵀ (in, r), and for B with the letters changed:

        ḡ = ∇_{Aᵀ} R_B⁻¹,  clipped to the norm 1 over all factors
        V ← β2' P V Pᵀ + (1 − β2') ḡᵀḡ / in,  P = U_B(t)ᵀ U_B(t−1)
        S = ḡ V^(−1/2),  M ← β1' M Pᵀ + (1 − β1') S,  Aᵀ ← Aᵀ − η M R_B^(−T),  β' = β (1 − β^(t−1)) / (1 − β^t)

    The inverses are pseudo-inverses, for a B that starts at zero; eps is added to the roots of V's eigenvalues. The
    escape mass ρ of the paper, which the authors' code leaves out unless asked, is left out. The optimiser takes the
    groups of `parameter_groups`; what the adapter trains beside pairs is stepped by AdamW.
    """

    slug: ClassVar[str] = "lora-rite"
    title: ClassVar[str] = "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization"
    source: ClassVar[str] = "arXiv 2410.20625"

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    clip: Annotated[float, Field(ge=0, description="largest norm of all ḡ together; 0 leaves them")] = 1.0

    def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each pair, and one for the rest."""
        found = pairs(adapter, self.slug)
        ids = {id(p) for pair in found for p in pair}
        rest = [p for p in adapter.parameters() if id(p) not in ids]
        plain = {"lr": lr, "weight_decay": weight_decay}
        return [
            *({"params": list(pair), "pair": True, **plain} for pair in found),
            *([{"params": rest, **plain}] if rest else []),
        ]

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> Rite:
        if not any(group.get("pair") for group in groups):
            raise RankfoldError("lora-rite steps B and A together: it takes the groups of its parameter_groups")
        return Rite(groups, lr, weight_decay, self.betas, self.eps, self.clip, **self.stepping())
