"""OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models. Büyükakyüz 2024, arXiv 2406.01775."""

from typing import ClassVar

import torch
from torch import Tensor

from rankfold.core import Init, Site, Start
from rankfold.core.calibration import Calibration
from rankfold.core.linalg import orthonormalise, wide


class OLoRA(Init):
    """Start B at orthonormal columns, and take the start out of W as an offset: no SVD, one QR decomposition.

        W = Q R,  B₀ = Q_{:, :r},  A₀ = R_{:r, :},  W ← W − s B₀A₀

    B₀A₀ is not divided by s, so what is taken out grows with s; with s = 1 it is all of W's first r columns. QR is
    unique up to signs: here R's diagonal is positive, PEFT's has the signs that LAPACK leaves.
    """

    slug: ClassVar[str] = "olora"
    title: ClassVar[str] = "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models"
    source: ClassVar[str] = "arXiv 2406.01775"

    def factors(
        self, site: Site, W: Tensor, rank: int, scale: float, statistics: Calibration | None, rng: torch.Generator
    ) -> Start:
        Q = orthonormalise(W)[..., :rank]
        return Start(Q, (Q.mT @ wide(W)).triu(), offset=True)
