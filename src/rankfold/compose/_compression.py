"""The contract of a compression: what an adapter's trained numbers are stored as, and what is lost."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from rankfold.core.codecs import READERS
from rankfold.core.component import Component
from rankfold.core.method import Method
from rankfold.core.tensorfile import Entry


class Code(NamedTuple):
    """Bytes that a codec of `rankfold.core.codecs` reads as the tensors of these names."""

    codec: str
    data: bytes
    names: tuple[str, ...]


class Compression(Component):
    """Codes the trained matrices of an adapter. With `from_start` what is coded is the difference to where a new
    adapter from the same seed starts, which costs nothing to store, and vectors are coded too."""

    axis: ClassVar[str] = "compose"
    from_start: bool = False

    def codes(self, tensors: Mapping[str, Tensor], methods: Mapping[str, Method]) -> list[Code]:
        """Codes of these tensors, each in one of them; `methods` are those of the layers they belong to, by name."""
        raise NotImplementedError

    def method(self, method: Method) -> Method:
        """What a layer's method becomes. Raises RankfoldError where its numbers cannot be coded this way."""
        return method


def decoded(codes: list[Code], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file of these codes of the tensors gives back."""
    found = {}
    for codec, data, names in codes:
        entries = [Entry(tensors[name].dtype, tuple(tensors[name].shape), 0, 0) for name in names]
        reader = READERS[codec](np.frombuffer(data, np.uint8), entries)
        found |= {name: reader.tensor(i) for i, name in enumerate(names)}
    return found
