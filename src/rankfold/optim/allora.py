"""ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws. Huang and Balestriero 2024, arXiv 2410.09692."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rankfold.core import Callback
from rankfold.errors import RankfoldError
from rankfold.optim._pairs import pairs


class ALLoRA(Callback):
    """Row i of B learns `1 / sqrt(‖B_i‖ + 1/η²)` times as fast: η times at zero, where B starts, and slower after that.

    The norms are those before the step. The factor goes on what the optimiser does with B, decay included; `apply_to`
    "grad" puts it on the gradient, as the paper writes, which Adam all but undoes. It stands in for dropout and α / r:
    an adapter that has either is refused.
    """

    slug: ClassVar[str] = "allora"
    title: ClassVar[str] = "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws"
    source: ClassVar[str] = "arXiv 2410.09692"

    eta: Annotated[float, Field(gt=0, description="factor η on the learning rate of a row at zero")] = 2.0
    apply_to: Literal["update", "grad"] = "update"
    _factors: list[nn.Parameter] = PrivateAttr(default_factory=list)
    _before: list[Tensor] = PrivateAttr(default_factory=list)

    def on_attach(self, adapter: Any, model: nn.Module) -> None:
        for name, delta in adapter.deltas.items():
            if delta.scale != 1 or delta.dropout:
                raise RankfoldError(f"allora replaces dropout and alpha / rank: leave both out at {name}")
        self._factors = [B for B, _ in pairs(adapter, self.slug)]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        if self.apply_to == "update":
            self._before = [B.detach().clone() for B in self._factors]
            return
        for B in self._factors:
            if B.grad is not None:
                B.grad.mul_(self.factor(B))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for B, before in zip(self._factors, self._before, strict=False):  # there are none where gradients are scaled
            B.copy_(torch.lerp(before, B.detach(), self.factor(before)))
        self._before = []

    def factor(self, B: Tensor) -> Tensor:
        """(..., out, 1) for B (..., out, r)."""
        return (B.norm(dim=-1, keepdim=True) + 1 / self.eta**2).rsqrt()
