"""Whole matrices in turn: FRUGAL's coarsest part of a gradient."""

import random
from typing import Any, Literal

from torch import Tensor

from rankfold.errors import RankfoldError
from rankfold.optim._base import precise
from rankfold.optim._projectors import Projector
from rankfold.optim._subspace import Subspace

Order = Literal["random", "ascending", "descending", "mirror"]


class Blocks(Subspace):
    """Adam on whole matrices, round(density · their number) of them for `every` steps, sign descent on the others.

    `order` draws them anew each time, or takes them in turn, from the first, from the last or from both ends. Those
    that begin have no moments, and those that end keep none. A matrix counts its own steps.
    """

    def __init__(self, *args: Any, density: float, order: Order, **options: Any):
        super().__init__(*args, projector=Projector(), **options)
        self.density = density
        self.order: Order = order
        if order == "mirror" and round(density * len(self._places)) % 2:
            count = f"{density} of {len(self._places)} matrices are {round(density * len(self._places))}"
            raise RankfoldError(f"frugal: order mirror takes matrices in pairs, and {count}")

    def awake(self, interval: int) -> set[int]:
        """The places of the matrices that Adam steps."""
        n = len(self._places)
        k = round(self.density * n)
        match self.order:
            case "random":
                return set(random.Random(f"{self.seed}/{interval}").sample(range(n), k))
            case "ascending":
                return {(interval * k + i) % n for i in range(k)}
            case "descending":
                return {(n - 1 - interval * k - i) % n for i in range(k)}
            case "mirror":
                ends = {(interval * (k // 2) + i) % (n // 2) for i in range(k // 2)}
                return ends | {n - 1 - i for i in ends}

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"step": 0} if self.projects(p, group) else super().start(p, group)

    def descend(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], lr: float) -> None:
        interval, t = divmod(state["step"], self.every)
        state["step"] += 1
        if t == 0:
            moments = self._moments(W)
            for name in moments:
                state.pop(name, None)
            if self.place(p) in self.awake(interval):
                state.update(moments)
        if "m" in state:
            N, factor = self.inner.direction(G, state, t + 1)
            W.add_(N, alpha=-lr * self.scale * factor)
        else:
            W.add_(G.sign(), alpha=-lr * self.scale * self.residual.ratio)  # type: ignore[attr-defined]

    def _moments(self, p: Tensor) -> dict[str, Any]:
        return self.inner.start(p, tuple(p.shape), precise(p))

    def state_bytes(self) -> int:
        """Of the interval that the last step was in."""
        held = [
            self._moments(p.detach().to("meta"))
            for p, place in self._places.items()
            if place in self.awake(max(0, self.state.get(p, {}).get("step", 0) - 1) // self.every)
        ]
        return super().state_bytes() + sum(value.nbytes for moments in held for value in moments.values())
