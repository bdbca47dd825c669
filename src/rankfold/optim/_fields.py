"""Hyperparameters that the optimisers of the GaLore family share."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from rankfold.core import Optimizer
from rankfold.optim._base import NotFinite, Rounding
from rankfold.optim._eightbit import AdamW8bit
from rankfold.optim._projectors import Dct, Projector, RandomisedSvd, Side, Svd
from rankfold.optim._rules import AdamW, Dropped, Inner, Residual
from rankfold.optim._subspace import Subspace

Share = Annotated[float, Field(ge=0, lt=1)]


class Stepping(Optimizer):
    """What every optimiser that follows gradients asks, and gives its `Stepwise`."""

    shards = "DTensor"

    not_finite: Annotated[NotFinite, Field(description="what a gradient of NaN or infinity does to a step")] = "raise"
    rounding: Annotated[
        Rounding, Field(description="of 16-bit parameters; stochastic loses no small step, nor do float32 masters")
    ] = "nearest"

    def stepping(self) -> dict[str, Any]:
        return {"not_finite": self.not_finite, "rounding": self.rounding}


class Projected(Stepping):
    """GaLore's hyperparameters. A method says what its `inner` and `residual` rules are."""

    kind: ClassVar[type[Subspace]] = Subspace

    rank: Annotated[int, Field(ge=1, description="rank r of the subspace; at most the matrix's smaller side")] = 128
    every: Annotated[int, Field(ge=1, description="steps between renewals of the subspace")] = 200
    scale: Annotated[float, Field(gt=0, description="factor of what is done in the subspace, besides the lr")] = 0.25
    projector: Literal["svd", "randomised-svd", "dct"] = "svd"
    side: Side = "std"
    spread: Annotated[bool, Field(description="renew the matrices in turn, not all at one step")] = True
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-6
    seed: Annotated[int, Field(ge=0)] = 0

    def basis(self) -> Projector:
        kinds: dict[str, type[Projector]] = {"svd": Svd, "randomised-svd": RandomisedSvd, "dct": Dct}
        return kinds[self.projector](self.rank, self.side)

    def adamw(self) -> AdamW:
        return AdamW(self.betas, self.eps)

    def inner(self) -> Inner:
        return self.adamw()

    def residual(self) -> Residual:
        return Dropped()

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return self.kind(
            groups,
            lr,
            weight_decay,
            projector=self.basis(),
            inner=self.inner(),
            residual=self.residual(),
            fallback=self.adamw(),
            scale=self.scale,
            every=self.every,
            spread=self.spread,
            seed=self.seed,
            **self.stepping(),
        )


class EightBit(Projected):
    """The same with moments in 8 bits, where asked; the basis stays as it is."""

    bits: Annotated[
        Literal[8, 32], Field(description="of a moment; 8 keeps matrices below 4096 numbers as they are")
    ] = 32

    def adamw(self) -> AdamW:
        return AdamW8bit(self.betas, self.eps) if self.bits == 8 else super().adamw()
