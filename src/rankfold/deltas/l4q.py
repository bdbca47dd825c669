"""L4Q: Parameter Efficient Quantization-Aware Training on Large Language Models via LoRA-wise LSQ.

Jeon et al. 2024, arXiv 2402.04902.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import Function

from rankfold.core import Delta, Method, Rank, Site
from rankfold.core.delta import as_kept
from rankfold.core.lowrank import autocast_off, composed, matrix
from rankfold.core.packed import Packed, Scheme, decode, grouped, pack, spread, totals
from rankfold.deltas.lora import start_product


class L4Q(Method):
    """First merged, then rounded: `W_q = s_q round(w̃) + β`, `w̃ = clamp((W_c − β) / s_q, Q_N, Q_P)`, `W_c = W + s B A`.

    Steps s_q and biases β of groups are trained with B and A; W is not. `Q_N = −2ᵇ⁻¹`, `Q_P = 2ᵇ⁻¹ − 1`. Start
    (L4Qinit): `s_q = max(|min W / Q_N|, |max W / Q_P|)`, β = 0, B = 0, so nothing is cut off. Gradients are LSQ+'s:
    `∂W_q/∂W_c = 1` inside [Q_N, Q_P], `∂W_q/∂s_q = round(w̃) − w̃` inside and Q_N or Q_P outside, `∂W_q/∂β = 1` outside.
    `lsq_gain` multiplies the step's gradient by LSQ's `1 / √(g Q_P)`, which the paper does not state.

    Merging leaves a packed layer with codes `round(w̃) − Q_N`, scales s_q and zeros `−Q_N − β / s_q`, in float32. The
    training computes with these very numbers, so the packed model is the trained one.
    """

    slug: ClassVar[str] = "l4q"
    title: ClassVar[str] = (
        "L4Q: Parameter Efficient Quantization-Aware Training on Large Language Models via LoRA-wise LSQ"
    )
    source: ClassVar[str] = "arXiv 2402.04902"
    over: ClassVar[tuple[str, ...]] = ("float",)
    departs: ClassVar[str | None] = "it computes with the rounded weight from the start"

    rank: Rank = 4
    alpha: Annotated[float | None, Field(gt=0, description="s = α / r; None: s = 1")] = None
    bits: Literal[2, 3, 4, 8] = 4
    group: Annotated[int, Field(ge=1)] | Literal["channel"] = 128
    lsq_gain: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(format=f"int{self.bits}", group=self.group, scales="float32", zeros="float32")  # type: ignore[arg-type]

    def delta(self, site: Site, shared: nn.Module | None) -> "L4QDelta":
        return L4QDelta(site, self)

    def count(self, site: Site) -> int:
        rows, _, groups, _ = self.scheme.layout(site.out, site.in_)
        return self.rank * (site.in_ + site.out) + 2 * rows * groups

    def refuses(self, site: Site) -> str | None:
        if site.kind != "linear":
            return "what it ends as is a packed linear layer"
        largest = min(site.in_, site.out)
        return f"rank {self.rank} is over the layer's size, at most {largest} fits" if self.rank > largest else None


class L4QDelta(Delta):
    """B (out, r), A (r, in), step (out, groups), beta (out, groups)."""

    def __init__(self, site: Site, method: L4Q):
        super().__init__(site)
        self.scale = 1.0 if method.alpha is None else method.alpha / method.rank
        self.scheme, self.low, self.high = method.scheme, -(2 ** (method.bits - 1)), 2 ** (method.bits - 1) - 1
        rows, n, groups, _ = self.scheme.layout(site.out, site.in_)
        size = n if method.group == "channel" else method.group
        self.gain = 1 / math.sqrt(size * self.high) if method.lsq_gain else 1.0
        self.B, self.A = site.parameter_like(site.out, method.rank), site.parameter_like(method.rank, site.in_)
        self.step, self.beta = site.parameter_like(rows, groups), site.parameter_like(rows, groups)

    @torch.no_grad()
    def start(self, rng: torch.Generator) -> None:
        start_product(self.site, self.B, self.A, "uniform", rng)
        nn.init.zeros_(self.beta)
        groups = grouped(self.W.to(self.step.dtype), self.scheme)
        low, high = groups.amin(-1), groups.amax(-1)
        s = torch.maximum((low / self.low).abs(), (high / self.high).abs()).clamp(min=torch.finfo(torch.float32).tiny)
        cut = (low / s < self.low) | (high / s > self.high)  # by the last bit of s
        self.step.copy_(torch.where(cut, s.nextafter(torch.full_like(s, torch.inf)), s))

    @property
    def by_component(self) -> Mapping[str, int]:
        return {"B": -1, "A": -2}

    def transform(self, W: Tensor) -> Tensor:
        B, A = self.pair()
        s = self.step * self.gain + (self.step * (1 - self.gain)).detach()
        w, s, beta = self.scaled(W + self.scale * (B @ A), s, self.beta)
        w = w.clamp(self.low, self.high)
        passed = s * (w + (w.round() - w).detach()) + beta  # the graph whose gradients are those above
        return self.rounded(w).detach() + (passed - passed.detach())

    def linear(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """The same, with nothing of W's size kept for the backward pass."""
        assert W is not None
        if composed():
            return F.linear(x, self.transform(W.to(self.A.dtype)).to(x.dtype), None if b is None else b.to(x.dtype))
        B, A = self.pair()
        y: Any = _Linear.apply(x, W, B, A, self.step, self.beta, self)
        return y if b is None else y + b.to(y.dtype)

    def pack(self, W: Tensor) -> tuple[Packed, Scheme]:
        B, A = self.pair(on_base=True)
        w = self.scaled(W + self.scale * (B @ A), self.step, self.beta)[0].clamp(self.low, self.high)
        scales, zeros = self.kept()
        return Packed(pack(w.round() - self.low, self.scheme), scales.float(), zeros.float()), self.scheme

    def scaled(self, W: Tensor, s: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(W_c − β) / s_q, and s_q and β of each of its numbers."""
        s, beta = (spread(v, W.shape[-1], self.scheme) for v in (s, beta))
        return (W - beta) / s, s, beta

    def kept(self) -> tuple[Tensor, Tensor]:
        """Scales and zeros as the packed layer has them."""
        return as_kept(self.step, torch.float32), as_kept(-self.low - self.beta / self.step, torch.float32)

    def rounded(self, w: Tensor) -> Tensor:
        """W_q of a w̃, as the packed layer computes it."""
        return decode(w.round() - self.low, *self.kept(), self.scheme, w.dtype)


class _Linear(Function):
    """x W_qᵀ. G = dyᵀ x is made in the backward pass and dropped there."""

    @staticmethod
    def forward(ctx, x, W, B, A, step, beta, delta):
        ctx.save_for_backward(x, W, B, A, step, beta)
        ctx.delta = delta
        w, _, _ = delta.scaled(W.to(A.dtype) + delta.scale * (B @ A), step, beta)
        return F.linear(x, delta.rounded(w.clamp(delta.low, delta.high)).to(x.dtype))

    @staticmethod
    def backward(ctx, *grads):
        (dy,), (x, W, B, A, step, beta), delta = grads, ctx.saved_tensors, ctx.delta
        with autocast_off(dy):
            w, _, _ = delta.scaled(W.to(A.dtype) + delta.scale * (B @ A), step, beta)
            cut = w.clamp(delta.low, delta.high)
            dx = dy @ delta.rounded(cut).to(dy.dtype) if ctx.needs_input_grad[0] else None
            G = (matrix(dy).mT @ matrix(x).to(dy.dtype)).to(A.dtype)
            inside = cut == w
            dW = G * inside
            ds = totals(G * (cut.round() - w * inside), delta.scheme) * delta.gain
            dbeta = totals(G - dW, delta.scheme)
            return dx, None, delta.scale * dW @ A.mT, delta.scale * B.mT @ dW, ds, dbeta, None
