"""LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization. Chang et al.
2025, arXiv 2502.14538.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback, Delta
from rankfold.errors import RankfoldError

_ROWS = 1000  # of W, that its mean row norm is estimated from


class LoRAGGPO(Callback):
    """Trains under noise in the weight, `y = x (W + s B A + ε)ᵀ`, which leads to flat minima. In row i

        ε_ij = ρ_i n_ij,  n ~ N(0, 1) anew in each forward pass,  ρ_i = (σ ‖W'_i‖ + β ‖∇_i‖²) / √out,
        ‖W'_i‖ = √(w̄² + ‖s (BA)_i‖²),  ∇ = s (B ∂A + ∂B A)

    with w̄ the mean row norm of W and the gradients of the last step; before the first there is no noise, and none in
    eval. The gradient for x sees ε, no gradient goes into ρ. Linear layers are perturbed; ε takes the memory of W while
    a layer's graph lives. The authors' repository is not public; later versions of the paper (LoRA-MGPO) take another
    direction than n.
    """

    slug: ClassVar[str] = "lora-ggpo"
    title: ClassVar[str] = (
        "LoRA-GGPO: Mitigating Double Descent in LoRA Fine-Tuning via Gradient-Guided Perturbation Optimization"
    )
    source: ClassVar[str] = "arXiv 2502.14538"

    sigma: Annotated[float, Field(ge=0, description="noise per norm of a row of the weight")] = 0.03
    beta: Annotated[float, Field(ge=0, description="noise per squared norm of a row of the gradient")] = 0.01
    _deltas: dict[str, Delta] = PrivateAttr(default_factory=dict)
    _means: dict[str, float] = PrivateAttr(default_factory=dict)
    _rho: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        for name, delta in adapter.deltas.items():
            if delta.site.kind == "linear" and {"A", "B"} <= delta._parameters.keys():
                self._deltas[name] = delta
                rows = delta.W[:: math.ceil(delta.site.out / _ROWS)]
                self._means[name] = float(rows.float().norm(dim=1).mean())
                delta.layer.register_forward_hook(self._hook(adapter.name, name, delta))
        if not self._deltas:
            raise RankfoldError(
                f"lora-ggpo perturbs linear layers under B and A, and adapter {adapter.name!r} has none"
            )

    def _hook(self, adapter: str, name: str, delta: Delta) -> Any:
        def perturb(layer: Any, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            rho = self._rho.get(name)
            if rho is None or not delta.training or layer._rankfold.route != adapter or not (self.sigma or self.beta):
                return y
            noise = torch.randn(delta.site.out, delta.site.in_, dtype=y.dtype, device=y.device)
            return y + nn.functional.linear(inputs[0].to(y.dtype), noise.mul_(rho.to(y).unsqueeze(1)))

        return perturb

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        for name, delta in self._deltas.items():
            B, A, gB, gA = delta.B, delta.A, delta.B.grad, delta.A.grad
            if gB is None or gA is None:
                continue
            weight = self._means[name] ** 2 + delta.scale**2 * _row_squares(B, A)
            gradient = delta.scale**2 * _row_squares(torch.cat([B, gB], 1), torch.cat([gA, A], 0))
            self._rho[name] = self.rho(weight.sqrt(), gradient)

    def rho(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """ρ (out,) from the norms of the weight's rows and the squared norms of the gradient's."""
        return (self.sigma * weight + self.beta * gradient) / math.sqrt(len(weight))

    def on_save(self) -> dict[str, Any]:
        return {"rho": self._rho}

    def on_load(self, state: Mapping[str, Any]) -> None:
        self._rho = {name: rho.to(self._deltas[name].B.device) for name, rho in state["rho"].items()}


def _row_squares(B: Tensor, A: Tensor) -> Tensor:
    """‖(BA)_i‖² without BA: B (out, k), A (k, in) -> (out,)."""
    return ((B @ (A @ A.mT)) * B).sum(1).clamp_min(0)
