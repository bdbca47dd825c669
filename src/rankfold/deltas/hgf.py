"""Hybrid Gated Flow (HGF): Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction. arXiv 2602.05269 (2026)."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rankfold.core import Delta, Method, Rank, Site
from rankfold.core.activations import Activations, rounded
from rankfold.core.adapter import Adapter
from rankfold.core.attach import attach
from rankfold.core.control import detach
from rankfold.core.delta import as_kept
from rankfold.core.packed import Packed, PackedLinear, Scheme, decode, encode, pack
from rankfold.deltas.lora import LoRA, start_product


class HGF(Method):
    """`y = q(x) W_tᵀ + φ(g) (x Aᵀ) Bᵀ`: BitNet's ternary weight, and a low-rank path with one gate g that repairs it.

    `W_t = γ clamp(round(V / γ), −1, 1)`, `γ = mean|V|`, of `V = W + D`: D, of W's size and 0 at first, is trained
    through the rounding; without `latent` W stays and the path alone is trained. q is 8 bits for each token, of its own
    range and not BitNet's symmetric one. B starts at 0, and at g = 0 the layer is BitNet's for good.

    `backbone` makes of a trained adapter what it stands for: ternary packed layers with a LoRA on them. The paper
    publishes neither rank nor φ nor how g starts; its differential attention is a matter of the model.
    """

    slug: ClassVar[str] = "hgf"
    title: ClassVar[str] = "Hybrid Gated Flow (HGF): Stabilizing 1.58-bit LLMs via Selective Low-Rank Correction"
    source: ClassVar[str] = "arXiv 2602.05269"
    over: ClassVar[tuple[str, ...]] = ("float",)
    departs: ClassVar[str | None] = "it computes with a ternary weight from the start"

    rank: Rank = 8
    gate_init: float = 0.1
    gate_fn: Annotated[Literal["none", "tanh"], Field(description="φ")] = "none"
    activations: Annotated[Activations | None, Field(description="q; None leaves x as it is")] = "int8"
    latent: Annotated[bool, Field(description="train the weight under the rounding too")] = True

    def delta(self, site: Site, shared: nn.Module | None) -> "HGFDelta":
        return HGFDelta(site, self)

    def count(self, site: Site) -> int:
        return self.rank * (site.in_ + site.out) + 1 + (site.in_ * site.out if self.latent else 0)

    def refuses(self, site: Site) -> str | None:
        if site.kind != "linear":
            return "what it ends as is a packed linear layer"
        largest = min(site.in_, site.out)
        return f"rank {self.rank} is over the layer's size, at most {largest} fits" if self.rank > largest else None


class HGFDelta(Delta):
    """B (out, r), A (r, in), g (1,), D (out, in) or None."""

    def __init__(self, site: Site, method: HGF):
        super().__init__(site)
        self.scheme = Scheme(format="ternary", group="tensor", scales="float32", activations=method.activations)
        self.gate_init, self.gate_fn = method.gate_init, method.gate_fn
        if method.activations is not None:
            self.form = "function"  # type: ignore[misc]  # of x, and no matrix
        self.B, self.A = site.parameter_like(site.out, method.rank), site.parameter_like(method.rank, site.in_)
        self.g = site.parameter_like(1)
        self.D = site.parameter_like(site.out, site.in_) if method.latent else None

    def start(self, rng: torch.Generator) -> None:
        start_product(self.site, self.B, self.A, "uniform", rng)
        nn.init.constant_(self.g, self.gate_init)
        if self.D is not None:
            nn.init.zeros_(self.D)

    def transform(self, W: Tensor) -> Tensor:
        B, A = self.correction()
        return self.ternary(W) + B @ A

    def linear(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        assert W is not None
        B, A = self.correction()
        y = F.linear(rounded(x, self.scheme.activations), self.ternary(W.to(A.dtype)).to(x.dtype), b)
        return y + F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def correction(self) -> tuple[Tensor, Tensor]:
        """φ(g) B and A."""
        B, A = self.pair()
        return B * (self.g.tanh() if self.gate_fn == "tanh" else self.g), A

    def ternary(self, W: Tensor) -> Tensor:
        """W_t, as the packed layer has it; gradients go to D as if it were V."""
        V = W if self.D is None else W + self.D
        with torch.no_grad():
            q, s = self.codes(V)
            values = decode(q, s, None, self.scheme, V.dtype)
        return values + (V - V.detach())

    def codes(self, V: Tensor) -> tuple[Tensor, Tensor]:
        s = as_kept(V.abs().mean().clamp(min=1e-5), torch.float32).view(1, 1)
        return encode(V, s, None, self.scheme), s

    @torch.no_grad()
    def packed(self) -> PackedLinear:
        """The ternary layer under the correction."""
        W = self.W.to(self.A.dtype)
        q, s = self.codes(W if self.D is None else W + self.D)
        return PackedLinear.of(self.layer, Packed(pack(q, self.scheme), s.float(), None), self.scheme)  # type: ignore[arg-type]


@torch.no_grad()
def backbone(adapter: Adapter) -> Adapter:
    """Put ternary layers in the place of those that an HGF adapter sits on, and its corrections there as a LoRA.

    The LoRA has the adapter's name, which is taken off. There is no way back to the float weights.
    """
    model, name, made = adapter.model, adapter.name, {}
    for site, delta in adapter.deltas.items():
        assert isinstance(delta, HGFDelta)
        made[site] = delta.packed(), *delta.correction()
    detach(model, name)
    for site, (layer, _, _) in made.items():
        parent, _, leaf = site.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = layer
    ranks = {site: A.shape[0] for site, (_, _, A) in made.items()}
    widest = max(ranks.values())
    own = {site: {"rank": r, "alpha": r} for site, r in ranks.items() if r != widest}
    lora = attach(model, LoRA(rank=widest, alpha=widest), lambda path, _: path in made, name, overrides=own)
    for site, (_, B, A) in made.items():
        lora.deltas[site].set_start(B, A)
    return lora
