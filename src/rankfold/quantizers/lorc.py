"""ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation. Yao et
al. 2023, arXiv 2303.08302."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rankfold.core.calibration import Calibration
from rankfold.quantizers._quantizer import Compensation, nearest


class LoRC(Compensation):
    """Low-rank compensation: the best product of rank m for what quantising took from the weight, without any data.

        E = W − Ŵ = U diag(σ) Vᵀ,  B = U_m diag(σ_m)^½,  A = diag(σ_m)^½ V_mᵀ,  y = x Ŵᵀ + (x Aᵀ) Bᵀ

    m = 8; the paper tries 4 to 32 and sees the gain flatten. `‖E − B A‖² = Σ_{i>m} σ_i²`.
    """

    slug: ClassVar[str] = "lorc"
    title: ClassVar[str] = (
        "ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank Compensation"
    )
    source: ClassVar[str] = "arXiv 2303.08302"

    rank: Annotated[int, Field(ge=1, description="m")] = 8

    def factors(self, E: Tensor, statistics: Calibration | None, site: str) -> tuple[Tensor, Tensor]:
        return nearest(E, self.rank)
