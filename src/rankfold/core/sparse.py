"""A change that is zero but for K entries: `ΔW = scatter(I, φ)`.

Of W (out, in) a forward keeps x, the K indices I and the K values φ, and nothing else: W' = W + scatter(I, φ) is made,
multiplied with and forgotten, made again for the gradient of x, and the dense `G = ∂L/∂W'` lives only inside the
backward of its own layer, until `∂L/∂φ = G.flatten()[I]` is read from it. The scatter costs a thirtieth of the product
it goes before (576 x 1536, 512 tokens, one thread: 0.3 of 12 ms at 1 %). Sparse products instead take 16 ms forward and
4 for ∂L/∂φ, where the dense one takes 14; at 10 % they take 27 and 16, and gathered rows of x ten times that.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function

from rankfold.core.delta import Delta, Site
from rankfold.core.lowrank import any_requires_grad, autocast_off, composed, matrix
from rankfold.core.method import Method


class Sparse(Delta):
    """φ (K,) trained, and I (K,) saved: row-major indices into W (out, in), for experts into the whole (E, out, in).

    `watch`, where it is set, is called with the dense gradient G in every backward pass (but not in compiled code).
    """

    indices: Tensor
    watch: Callable[[Tensor], Any] | None = None

    def __init__(self, site: Site, k: int):
        super().__init__(site)
        self.phi = nn.Parameter(torch.empty(k, dtype=site.dtype, device=site.device))
        self.register_buffer("indices", torch.zeros(k, dtype=index_dtype(self.size), device=site.device))

    @property
    def size(self) -> int:
        """How many entries W has."""
        return self.site.count * self.site.out * self.site.in_

    def start(self, rng: torch.Generator) -> None:
        self.place(choose(self.size, self.phi.numel(), rng))

    @torch.no_grad()
    def place(self, indices: Tensor, phi: Tensor | None = None) -> None:
        """Sit at these indices, with these values or zeros. φ stays the object that an optimiser knows."""
        self.make_room({"phi": tuple(indices.shape), "indices": tuple(indices.shape)})
        self.indices.copy_(indices)
        self.phi.zero_() if phi is None else self.phi.copy_(phi)

    def update(self) -> Tensor:
        dense = _scattered(None, self.indices, self.phi, self._shape)
        if self.watch is not None and dense.requires_grad and not composed():
            dense.register_hook(self.watch)
        return dense

    def linear(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        if composed():
            W = self.update() if W is None else _scattered(W, self.indices, self.phi, self._shape)
            return F.linear(x, W.to(x.dtype), None if b is None else b.to(x.dtype))
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(kind))
        b = None if b is None else b.to(x.dtype)
        with autocast_off(x):
            if any_requires_grad(x, W, b, self.phi):
                return _SparseLinear.apply(x, W, b, self.indices, self.phi, self._shape, self.watch)
            return _forward(x, W, b, self.indices, self.phi, self._shape)

    def adapted_weight(self, W: Tensor) -> Tensor:
        """W' (out, in); off the indices every bit is W's."""
        return _scattered(W, self.indices, self.phi, self._shape)

    @property
    def _shape(self) -> tuple[int, ...]:
        return *self.site.batch, self.site.out, self.site.in_

    def make_room(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """K is what a file says, or what was moved here from other layers: at most one value for each entry of W."""
        shape = shapes.get("phi", ())
        if len(shape) == 1 and shape == shapes.get("indices") and shape != self.phi.shape and shape[0] <= self.size:
            exchange(self.phi, self.phi.new_empty(shape))
            self.indices = self.indices.new_zeros(shape)

    def wrong(self, tensors: Mapping[str, Tensor]) -> str | None:
        indices = tensors["indices"]
        if indices.numel() == 0:
            return None
        if int(indices.min()) < 0 or int(indices.max()) >= self.size:
            return f"an index lies outside of the weight's {self.size:,} entries"
        return "an index stands there twice" if indices.unique().numel() < indices.numel() else None


class SparseMethod(Method):
    """What the sparse methods share: K is `density` of the weight's entries, at least 1, or `k`."""

    size: ClassVar[str] = "density"
    density: Annotated[float, Field(gt=0, le=1, description="K over the entries of each adapted weight")] = 0.01
    k: Annotated[int | None, Field(ge=0, description="K of a weight, all of its experts together; over density")] = None

    made: ClassVar[type[Sparse]] = Sparse

    def delta(self, site: Site, shared: nn.Module | None) -> Sparse:
        return self.made(site, self.values(site))

    def values(self, site: Site) -> int:
        """K at a site."""
        return site.count * max(1, int(self.density * site.out * site.in_)) if self.k is None else self.k

    def count(self, site: Site) -> int:
        return self.values(site) // site.count

    def refuses(self, site: Site) -> str | None:
        size = site.count * site.out * site.in_
        return f"k = {self.k} is over the weight's {size} entries" if self.k is not None and self.k > size else None


def index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64


def choose(n: int, k: int, rng: torch.Generator) -> Tensor:
    """k different numbers below n, sorted; where k is small without memory for n."""
    if 4 * k > n:
        return torch.randperm(n, generator=rng)[:k].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < k:
        drawn = torch.cat([drawn, torch.randint(n, (k + k // 4 + 8,), generator=rng)]).unique()
    return drawn[torch.randperm(drawn.numel(), generator=rng)[:k]].sort().values


def exchange(parameter: Tensor, data: Tensor) -> None:
    """Give a parameter data of another shape. Its gradient goes; the state an optimiser keeps for it is the caller's.

    Autograd remembers the old shape for as long as an old graph lives (a loss that is still in scope), unless the
    dtype changes in between.
    """
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    parameter.data = data


def forget(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Make the optimiser start anew on these parameters."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _scattered(W: Tensor | None, indices: Tensor, phi: Tensor, shape: tuple[int, ...]) -> Tensor:
    """W + scatter(I, φ) in W's dtype, or scatter(I, φ) alone."""
    if W is None:
        flat = torch.zeros(torch.Size(shape).numel(), dtype=phi.dtype, device=phi.device)
    else:
        flat, phi = W.reshape(-1), phi.to(W.dtype)
    return flat.index_add(0, indices, phi).view(shape)


def _forward(
    x: Tensor, W: Tensor | None, b: Tensor | None, indices: Tensor, phi: Tensor, shape: tuple[int, ...]
) -> Tensor:
    y = F.linear(matrix(x), _scattered(W, indices, phi, shape).to(x.dtype), b)
    # A plain view made in here could not be overwritten later (a ReLU in place, a residual added in place).
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


class _SparseLinear(Function):
    @staticmethod
    def forward(ctx, x, W, b, indices, phi, shape, watch):
        _, need_W, _, _, need_phi, *_ = ctx.needs_input_grad
        ctx.shape, ctx.watch = shape, watch
        ctx.save_for_backward(x if need_W or need_phi else None, W, indices, phi)
        return _forward(x, W, b, indices, phi, shape)

    @staticmethod
    def backward(ctx, gy):
        x, W, indices, phi = ctx.saved_tensors
        need_x, need_W, need_b, _, need_phi, *_ = ctx.needs_input_grad
        with autocast_off(gy):
            lead, gy = gy.shape[:-1], matrix(gy)
            gx = gW = gphi = None
            if need_x:
                gx = (gy @ _scattered(W, indices, phi, ctx.shape).to(gy.dtype)).view(*lead, ctx.shape[-1])
            if need_W or need_phi:
                G = gy.mT @ matrix(x)
                gW = G.to(W.dtype) if need_W else None
                gphi = G.reshape(-1).index_select(0, indices).to(phi.dtype) if need_phi else None
                if ctx.watch is not None:
                    ctx.watch(G.detach())
            return gx, gW, gy.sum(0) if need_b else None, None, gphi, None, None
