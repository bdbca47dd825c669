"""LoftQ: LoRA-Fine-Tuning-aware Quantization. Li et al. 2023, arXiv 2310.08659."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core import Init, Site, Start
from rankfold.core.calibration import Calibration
from rankfold.core.layers import as_matrix
from rankfold.core.linalg import svd
from rankfold.core.weightfiles import WeightFiles
from rankfold.errors import RankfoldError


class LoftQ(Init):
    """Over a quantised base, start at what quantising lost: `W ≈ Q + s B₀A₀`, with Q what the base stands for.

        W − Q = U diag(σ) Vᵀ,  B₀ = U_r diag(√(σ_r / s)),  A₀ = diag(√(σ_r / s)) V_rᵀ

    W comes from `reference`: the model before it was quantised, as a safetensors file, a Transformers directory, a
    hub id or a GGUF file; it is read a layer at a time. The base comes as it is, quantised by any library or restored
    from a quantised file, and it stays as it is. So this is the paper's T = 1, what PEFT's
    `replace_lora_weights_loftq` does. **The model starts near the reference**, not at the base: this is no offset.

    T > 1 alternates with `Q = quantise(W − B A)`, which would change the base: not offered, since adapters side by
    side need one base. Nor is a simulated quantiser over a base that is not quantised: that base loses nothing, and to
    add `W − Q` to it would take it further away. The authors' code leaves out s, so it is right for s = 1 only.
    """

    slug: ClassVar[str] = "loftq"
    title: ClassVar[str] = "LoftQ: LoRA-Fine-Tuning-aware Quantization for Large Language Models"
    source: ClassVar[str] = "arXiv 2310.08659"

    reference: Annotated[str, Field(min_length=1, description="where the unquantised model lies")]

    def describe(self) -> dict[str, Any]:
        # Where it lay on the disk of whoever saved the adapter is nobody's business.
        path = Path(self.reference).expanduser()
        known = path.is_absolute() or path.exists()
        return {**super().describe(), **({"reference": path.resolve().name or "/"} if known else {})}

    @cached_property
    def weights(self) -> WeightFiles:
        return WeightFiles.find(self.reference)

    def factors(
        self, site: Site, W: Tensor, rank: int, scale: float, statistics: Calibration | None, rng: torch.Generator
    ) -> Start:
        if scale <= 0:
            raise RankfoldError(f"loftq divides the singular values by the scale α/r, which is {scale} at {site.name}")
        name = site.name if site.kind == "experts" else f"{site.name}.{site.parameter}"
        stored, Q = self.weights.read(name), W
        W = as_matrix(site, stored.to(Q))
        if W.shape != Q.shape or not stored.is_floating_point():
            what = f"a {stored.dtype} tensor {tuple(stored.shape)}"
            raise RankfoldError(f"loftq: {name} in {self.reference} is {what}, expected floats for {tuple(Q.shape)}")
        lost = torch.linalg.vector_norm(W - Q)
        if not lost:
            raise RankfoldError(f"loftq: the base at {site.name} equals the reference, so nothing was lost: no start")
        if lost >= torch.linalg.vector_norm(W):
            raise RankfoldError(f"loftq: {name} in {self.reference} has nothing to do with the base: another model?")
        U, S, Vt = svd(W - Q, rank)
        root = (S / scale).sqrt()
        return Start(U * root.unsqueeze(-2), root.unsqueeze(-1) * Vt)
