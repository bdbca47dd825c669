"""Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. Zhang and Pilanci 2024, arXiv 2402.02347."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback
from rankfold.optim._pairs import pairs


class LoRAPrecond(Callback):
    """Before a step `g_A ← (BᵀB + δI)⁻¹ g_A` and `g_B ← g_B (AAᵀ + δI)⁻¹`, two systems of size r.

    With SGD and δ = 0 the step in BA does not depend on which factors stand for the product. Adam's moments see the
    preconditioned gradients. Both systems are those before the step; the authors' code moves A first and uses the new
    A for B, which the equations do not say. Their δ is 1e-6; PEFT's is 1e-2. At δ = 0 both factors need full rank,
    which B lacks when it starts at zero.
    """

    slug: ClassVar[str] = "lora-precond"
    title: ClassVar[str] = "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models"
    source: ClassVar[str] = "arXiv 2402.02347"

    delta: Annotated[float, Field(ge=0, description="δ on the diagonal of both systems")] = 1e-6
    _pairs: list[tuple[nn.Parameter, nn.Parameter]] = PrivateAttr(default_factory=list)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        self._pairs = pairs(adapter, self.slug)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for B, A in self._pairs:
            if A.grad is not None:
                A.grad.copy_(self._solve(B.mT, A.grad))
            if B.grad is not None:
                B.grad.copy_(self._solve(A, B.grad.mT).mT)

    def _solve(self, F: Tensor, g: Tensor) -> Tensor:
        """(F Fᵀ + δI)⁻¹ g: F (r, n), g (r, m)."""
        wide = torch.promote_types(F.dtype, torch.float32)
        F = F.to(wide)
        eye = torch.eye(F.shape[-2], dtype=wide, device=F.device)
        return torch.linalg.solve(F @ F.mT + self.delta * eye, g.to(wide))
