"""Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy.

Jie et al. 2023, arXiv 2307.16867.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rankfold.compose._compression import Code, Compression
from rankfold.core.codecs import write_levels
from rankfold.core.levels import MOST_BITS
from rankfold.core.method import Method
from rankfold.deltas.bi_lora import BiLoRA
from rankfold.deltas.lora import LoRA
from rankfold.errors import RankfoldError


class OneBit(Compression):
    """`w_q = σ Q(ŵ) + μ` for each trained matrix w, in `bits · numel + 64` bits; see `rankfold.core.levels` for Q.

    An adapter that was trained with it (`bi-lora`) becomes the plain LoRA that it computes, to the last bit; any other
    is quantised after training, which costs much at one bit. The authors' packer drops the last codes where they do not
    fill a byte; here the byte is filled up.
    """

    slug: ClassVar[str] = "onebit"
    title: ClassVar[str] = "Precision Redundancy: adapters in few bits"
    source: ClassVar[str] = "arXiv 2307.16867"

    bits: Annotated[int | None, Field(ge=1, le=MOST_BITS, description="None: what it was trained with, else 1")] = None

    def codes(self, tensors: Mapping[str, Tensor], methods: Mapping[str, Method]) -> list[Code]:
        by_bits: dict[int, list[str]] = {}
        for name in sorted(tensors):
            by_bits.setdefault(self._bits(methods[name]), []).append(name)
        return [
            Code("levels", write_levels([tensors[name] for name in names], bits), tuple(names))
            for bits, names in by_bits.items()
        ]

    def _bits(self, method: Method) -> int:
        return method.bits if isinstance(method, BiLoRA) else self.bits or 1

    def method(self, method: Method) -> Method:
        if not isinstance(method, BiLoRA):
            return method
        if self.bits not in (None, method.bits):
            raise RankfoldError(f"onebit: it was trained with {method.bits} bits, not {self.bits}: leave bits out")
        if self.from_start:
            raise RankfoldError("onebit: bi-lora was trained to be of few levels itself, not from its start")
        return LoRA(rank=method.rank, alpha=method.alpha, dropout=method.dropout)
