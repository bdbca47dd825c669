"""ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats. Wu et al. 2023,
arXiv 2307.09782."""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rankfold.core.packed import Scheme
from rankfold.quantizers.gptq import GPTQ
from rankfold.quantizers.rtn import ranges

Powers = Literal["none", "m1", "m2", "m2-floor"]


class ZeroQuantFP(GPTQ):
    """Numbers of 4 bits with a point, rounded by GPTQ, whose scales are powers of two apart: to make FP8 of them for a
    product with FP8 inputs, exponents are shifted.

        s = max|w| / 6                          (of a group, E2M1)
        M1:  s' = 2^⌈log₂ s⌉                    each scale by itself
        M2:  s'_i = s_max / 2^⌈log₂(s_max/s_i)⌉  of the groups of a row (of all rows, where a row is one group)

    A scale of M1 is never smaller than s. One of M2 never is larger, and what is above 6 s' saturates, which costs more
    than M1 does; the paper finds M2 the better one. So `powers` is "m2-floor", M2 with the exponent rounded down, where
    nothing saturates, and "m2" is as it is written. With both, scales are those of the weights before any feedback.
    W4A8 of the paper is `Scheme(format="fp4", group=256, activations="fp8")`, and `compensate="lorc"`;
    published code has no numbers below the smallest exponent but 0, and here they are as the format defines them.
    """

    slug: ClassVar[str] = "zeroquant-fp"
    title: ClassVar[str] = (
        "ZeroQuant-FP: A Leap Forward in LLMs Post-Training W4A8 Quantization Using Floating-Point Formats"
    )
    source: ClassVar[str] = "arXiv 2307.09782"

    powers: Annotated[Powers, Field(description="which scales there may be")] = "m2-floor"

    def ranges(self, groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
        scales, zeros = ranges(groups, scheme)
        return powers_of_two(scales, self.powers), zeros

    def is_static(self, scheme: Scheme) -> bool:
        return self.powers.startswith("m2") or super().is_static(scheme)


def powers_of_two(scales: Tensor, powers: Powers) -> Tensor:
    """Scales (rows, groups) so constrained, in the dtype they have; none gets below its smallest normal number."""
    s = scales.double()
    least = torch.finfo(scales.dtype).tiny
    if powers == "m1":
        return torch.exp2(s.log2().ceil()).to(scales.dtype)
    if powers == "none":
        return scales
    most = s.amax(1 if s.shape[1] > 1 else 0, keepdim=True)
    n = (most / s).log2()
    n = n.floor() if powers == "m2-floor" else n.ceil()
    return (most / torch.exp2(n.minimum((most / least).log2().floor()))).to(scales.dtype)
