"""ComPEFT: Compression for Communicating Parameter Efficient Updates via Sparsification and Quantization.

Yadav et al. 2023, arXiv 2311.13171.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rankfold.compose._compression import Code, Compression
from rankfold.compose.compress import approximated, compress
from rankfold.core.adapter import Adapter
from rankfold.core.codecs import write_ternary
from rankfold.core.control import detach, using
from rankfold.core.method import Method
from rankfold.deltas.bi_lora import BiLoRA
from rankfold.errors import UnsupportedError

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1, 2, 3, 4, 5, 6, 8, 10)


class ComPEFT(Compression):
    """`τ̂ = α · std(τ) · γ`, where γ is the sign of the share k of τ that is largest by magnitude, and else 0.

    τ are all trained matrices of the adapter as one vector in the order of their names, std its unbiased deviation over
    all entries. It is stored in about `d (H(k) + k) + 16` bits, H the entropy of a coin (1 to 3 % above that, by Rice's
    code). `grid` finds k and α on validation data; for big models α = 1 does.

    - `scale="mean"` is STC, the mean magnitude of what is kept in place of std. The authors' code averages signed
      values there, which comes to nearly 0.
    - `by_tensor` takes k and the scale of each tensor by itself. A of a LoRA still has its random start in it and may
      be larger than all of B, of which then nothing is kept.
    - `from_start` takes τ from where training started and not from 0, as the paper does for (IA)³, which starts at 1.

    The authors' top-k keeps one entry more than k · d, and all ties; here it is k · d, the first of those that tie.
    With k = 100 % their code returns what it was given, and this one the signs of all.
    """

    slug: ClassVar[str] = "compeft"
    title: ClassVar[str] = "ComPEFT: Compression for Communicating Parameter Efficient Updates"
    source: ClassVar[str] = "arXiv 2311.13171"

    density: Annotated[float, Field(ge=0.001, le=1, description="k, the share that is kept")] = 0.2
    alpha: Annotated[float, Field(gt=0, le=1000, description="α, what the scale is multiplied by")] = 1.0
    scale: Literal["std", "mean"] = "std"
    by_tensor: bool = False
    from_start: bool = False

    def codes(self, tensors: Mapping[str, Tensor], methods: Mapping[str, Method]) -> list[Code]:
        groups = [(name,) for name in sorted(tensors)] if self.by_tensor else [tuple(sorted(tensors))]
        return [code for names in groups for code in self._codes({name: tensors[name] for name in names})]

    def method(self, method: Method) -> Method:
        if isinstance(method, BiLoRA):
            raise UnsupportedError(
                "compeft: the factors of bi-lora are quantised already, and only their signs would be left of what is "
                "behind that: compress it with how='onebit'"
            )
        return method

    def _codes(self, tensors: Mapping[str, Tensor]) -> list[Code]:
        """One code of all, or one of each where that is shorter: where some hold much more of what is kept."""
        tau = torch.cat([tensor.detach().cpu().reshape(-1).to(torch.float64) for tensor in tensors.values()])
        kept = largest(tau, self.density)
        signs = np.zeros(len(tau), np.int8)
        signs[kept.numpy()] = tau[kept].sign().numpy()
        scale = self.alpha * float(tau.std() if self.scale == "std" and len(tau) > 1 else tau[kept].abs().mean())
        parts = np.split(signs, np.cumsum([tensor.numel() for tensor in tensors.values()])[:-1])
        each = [Code("ternary", write_ternary(part, scale), (name,)) for name, part in zip(tensors, parts, strict=True)]
        whole = Code("ternary", write_ternary(signs, scale), tuple(tensors))
        return each if sum(len(code.data) for code in each) < len(whole.data) else [whole]


def largest(tau: Tensor, density: float) -> Tensor:
    """The places of the share `density` (at least one number) of a vector that is largest by magnitude."""
    return tau.abs().sort(descending=True, stable=True).indices[: max(1, round(density * len(tau)))]


def grid(
    adapter: Adapter,
    loss: Callable[[], float],
    densities: Sequence[float] = DENSITIES,
    alphas: Sequence[float] = ALPHAS,
    how: ComPEFT | None = None,
) -> tuple[ComPEFT, dict[tuple[float, float], float]]:
    """The k and α with the least loss on validation data, and the loss of each pair (k, α).

    `loss()` is that of the model as it stands: it is called with the adapter, attached, compressed each way in turn.
    The adapter itself is not changed. `how` are the other settings.
    """
    settings, losses = (how or ComPEFT()).model_dump(), {}
    compressed, _ = compress(adapter, how or ComPEFT())
    try:
        with using(adapter.model, compressed.name):
            for density in densities:
                for alpha in alphas:
                    tried = ComPEFT(**{**settings, "density": density, "alpha": alpha})
                    compressed.load_state_dict({**adapter.state_dict(), **approximated(adapter, tried)})
                    losses[density, alpha] = loss()
    finally:
        detach(adapter.model, compressed.name)
    density, alpha = min(losses, key=lambda pair: losses[pair])
    return ComPEFT(**{**settings, "density": density, "alpha": alpha}), losses
