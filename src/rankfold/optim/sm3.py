"""Memory-Efficient Adaptive Optimization (SM3). Anil et al. 2019, arXiv 1901.11150."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from rankfold.core.sparse import Sparse
from rankfold.optim._base import NotFinite, Rounding, Stepwise, precise
from rankfold.optim._fields import Stepping


class Covered(Stepwise):
    """State: a number for each index of each dimension (a matrix's rows and columns), and M if there is momentum.

    A group with a `shape` holds the φ of `sparse` deltas: the values of matrices of that shape.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        sparse: Mapping[Tensor, Sparse] | None = None,
        momentum: float = 0.0,
        eps: float = 1e-8,
        not_finite: NotFinite = "raise",
        rounding: Rounding = "nearest",
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "shape": None}, not_finite, rounding)
        self.sparse, self.momentum, self.eps = sparse or {}, momentum, eps

    def start(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        dtype = precise(p)
        shape = group["shape"] or p.shape or (1,)
        covers = {f"cover.{d}": torch.zeros(n, dtype=dtype, device=p.device) for d, n in enumerate(shape)}
        return {**covers, **({"M": torch.zeros_like(p, dtype=dtype)} if self.momentum else {})}

    def update(self, p: Tensor, W: Tensor, G: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        covers = [cover for name, cover in state.items() if name.startswith("cover.")]
        if group["shape"]:
            at = torch.unravel_index(self.sparse[p].indices.long(), group["shape"])
            nu = G.square() + torch.minimum(*(cover[i] for cover, i in zip(covers, at, strict=True)))
            for cover, i in zip(covers, at, strict=True):
                cover.scatter_reduce_(0, i, nu, "amax")
        else:
            nu = G.square().view([len(cover) for cover in covers])
            wide = [cover.view([-1 if d == e else 1 for e in range(nu.dim())]) for d, cover in enumerate(covers)]
            nu += functools.reduce(torch.minimum, wide)
            for d, cover in enumerate(covers):
                cover.copy_(nu.movedim(d, 0).reshape(len(cover), -1).amax(1))
        step = G / (nu.view(G.shape) + self.eps).sqrt()
        if self.momentum:
            step = state["M"].mul_(self.momentum).add_(step, alpha=1 - self.momentum)
        W.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"])


class SM3(Stepping):
    """Adagrad whose sums of squares are kept by row and by column (its variant SM3-II), `out + in` numbers a matrix:

        ν_ij = min(μ_i, μ_j) + g_ij²,  μ_i ← max_j ν_ij,  μ_j ← max_i ν_ij,  W_ij ← W_ij − η g_ij / √(ν_ij + eps)

    With `momentum` β the step is the running mean of these, which takes as many numbers as W. A tensor of more
    dimensions has a μ for each. Of a sparse ΔW the rows and columns are those of W, and i, j run over the entries there
    are: from that the callback `sft-regrow` with `select="moments"` guesses which others would move most. Weight decay
    is decoupled. The paper's SM3 has no eps, and 0 for 0/0.
    """

    slug: ClassVar[str] = "sm3"
    title: ClassVar[str] = "Memory-Efficient Adaptive Optimization"
    source: ClassVar[str] = "arXiv 1901.11150"
    shards = "none"  # of sparse deltas it knows the parameters themselves, which sharding replaces

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    eps: Annotated[float, Field(gt=0)] = 1e-8
    _sparse: dict[Tensor, Sparse] = PrivateAttr(default_factory=dict)

    def parameter_groups(self, adapter: Any, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A group for each shape of the weights under sparse deltas, and one for the rest."""
        self._sparse = {delta.phi: delta for delta in adapter.deltas.values() if isinstance(delta, Sparse)}
        plain = {"lr": lr, "weight_decay": weight_decay}
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for phi, delta in self._sparse.items():
            shapes.setdefault((delta.site.count * delta.site.out, delta.site.in_), []).append(phi)
        rest = [p for p in adapter.parameters() if p not in self._sparse]
        return [
            *({"params": phis, "shape": shape, **plain} for shape, phis in shapes.items()),
            *([{"params": rest, **plain}] if rest else []),
        ]

    def optimizer(self, groups: list[dict[str, Any]], lr: float, weight_decay: float) -> Covered:
        return Covered(groups, lr, weight_decay, self._sparse, self.momentum, self.eps, **self.stepping())
