"""Task arithmetic: Editing Models with Task Arithmetic. Ilharco et al. 2022, arXiv 2212.04089."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankfold.compose._merge import Merge, Pair, stacked


class TaskArithmetic(Merge):
    """`ΔW = Σ w_i s_i B_i A_i`."""

    slug: ClassVar[str] = "task-arithmetic"
    title: ClassVar[str] = "Editing Models with Task Arithmetic"
    source: ClassVar[str] = "arXiv 2212.04089"

    def combine(
        self, pairs: Sequence[Pair], weights: Sequence[float], rank: int | None, rng: torch.Generator, seen: Any = None
    ) -> tuple[Tensor, Tensor, float]:
        return *stacked(pairs, weights), 0.0
