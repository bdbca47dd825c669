"""MeZO: Fine-Tuning Language Models with Just Forward Passes. Malladi et al. 2023, arXiv 2305.17333."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankfold.core import Optimizer
from rankfold.errors import RankfoldError
from rankfold.optim._base import NotFinite, own, share

_AT_ONCE = 2**20  # numbers of z made at a time: what a step needs beside the forward pass
Masks = dict[Tensor, list[Tensor | None]]


class ZerothOrder(torch.optim.Optimizer):
    """`c = (L(θ + ε z) − L(θ − ε z)) / 2ε`, then `θ ← θ − η (c z + λ θ)`, with z ~ N(0, I) made again from a seed.

    `step(closure)` calls the closure twice without gradients; it returns the loss on the same batch both times and
    does no backward pass. Both calls see the same state of torch's random generator; put the model in `eval()`, as the
    paper does, all the same: dropout only adds noise. Nothing is kept between steps but their number. θ comes back from
    its perturbations up to the rounding of its dtype, also where the closure raises. Biases and other vectors are not
    decayed; parameters that do not require a gradient are left alone. A parameter that FSDP has sharded is moved where
    it lies, by the same z. `c` is that of the last step, `skipped` counts
    the steps without a finite one.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        eps: float = 1e-3,
        seed: int = 0,
        not_finite: NotFinite = "raise",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "steps": 0, "skipped": 0})
        self.eps, self.seed, self.not_finite, self.c = eps, seed, not_finite, math.nan

    @property
    def skipped(self) -> int:
        return int(self.param_groups[0]["skipped"])

    def state_bytes(self) -> int:
        return 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise RankfoldError("a zeroth-order step evaluates the loss itself: call step(closure)")
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        masks = {p: [self.mask(p, part) for part in pieces(p)] for p in trained}
        self._perturb(self.eps, masks)
        with torch.random.fork_rng():
            plus = self._called(closure, -self.eps, masks)
        self._perturb(-2 * self.eps, masks)
        minus = self._called(closure, self.eps, masks)
        self.c = (float(plus) - float(minus)) / (2 * self.eps)
        finite = math.isfinite(self.c)
        for group, p, part, z in self._directions(masks):
            part.add_(z, alpha=self.eps)
            if finite:
                if p.dim() > 1:
                    part.mul_(1 - group["lr"] * group["weight_decay"])
                part.add_(z, alpha=-group["lr"] * self.c)
        for group in self.param_groups:
            group["steps"] += 1
            group["skipped"] += not finite
        if not finite and self.not_finite == "raise":
            raise RankfoldError(
                f"the losses of a zeroth-order step are {float(plus)} and {float(minus)}; θ is restored"
            )
        return plus

    def mask(self, p: Tensor, part: Tensor) -> Tensor | None:
        """Which numbers of a piece of p this step may touch, asked before anything is perturbed; None is all of them.

        It is kept for the step, so it comes packed: see `packed`.
        """
        return None

    def _called(self, closure: Callable[[], Any], back: float, masks: Masks) -> Any:
        """The closure's loss; where there is none, θ goes `back` to what it was."""
        try:
            loss = closure()
            float(loss)
        except BaseException:
            self._perturb(back, masks)
            raise
        return loss

    def _perturb(self, size: float, masks: Masks) -> None:
        for _, _, part, z in self._directions(masks):
            part.add_(z, alpha=size)

    def _directions(self, masks: Masks) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
        """(group, parameter, a piece of it, z of that piece): the same z each time until the step is over."""
        rngs: dict[torch.device, torch.Generator] = {}
        digest = hashlib.sha256(f"{self.seed}/{self.param_groups[0]['steps']}".encode()).digest()
        for group in self.param_groups:
            for p in group["params"]:
                if p not in masks:
                    continue
                if p.device not in rngs:
                    rngs[p.device] = torch.Generator(p.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                wide = torch.promote_types(p.dtype, torch.float32)
                for part, mask in zip(pieces(p), masks[p], strict=True):
                    shape = p.shape if isinstance(p, DTensor) else part.shape
                    z = share(torch.randn(shape, generator=rngs[p.device], device=p.device, dtype=wide), p)
                    if mask is not None:
                        z.mul_(unpacked(mask, z.shape))
                    yield group, p, part, z


def pieces(p: Tensor) -> Sequence[Tensor]:
    """Views that make up p. Numbers that do not lie in a row cannot be cut so, and are taken whole, as a shard is."""
    if isinstance(p, DTensor) or not p.is_contiguous():
        return [own(p.detach())]
    return p.detach().view(-1).split(_AT_ONCE)


def packed(mask: Tensor) -> Tensor:
    """The truth values of a mask as bits, eight a byte."""
    flat = nn.functional.pad(mask.flatten().byte(), (0, -mask.numel() % 8))
    return (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask of this shape that was `packed`."""
    mask = bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1
    return mask.view(-1)[: shape.numel()].view(shape)


class MeZO(Optimizer):
    """Training without a backward pass: a step along one random direction, as far as two losses say.

    `c = (L(θ + ε z) − L(θ − ε z)) / 2ε` and `θ ← θ − η (c z + λ θ)`. The optimiser needs a closure (see `ZerothOrder`)
    and a learning rate of 1e-7 to 1e-6 in full models, constant. It takes the memory of inference.
    """

    slug: ClassVar[str] = "mezo"
    title: ClassVar[str] = "Fine-Tuning Language Models with Just Forward Passes"
    source: ClassVar[str] = "arXiv 2305.17333"
    backward: ClassVar[bool] = False
    shards = "DTensor"

    eps: Annotated[float, Field(gt=0, description="size ε of the perturbation")] = 1e-3
    seed: Annotated[int, Field(ge=0, description="seed of the directions")] = 0
    not_finite: Annotated[NotFinite, Field(description="what a loss of NaN or infinity does")] = "raise"

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> ZerothOrder:
        return ZerothOrder(groups, lr, weight_decay, self.eps, self.seed, self.not_finite)
