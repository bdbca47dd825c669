"""Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint? Chen et al. 2024, arXiv 2410.01623."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rankfold.optim._fields import EightBit
from rankfold.optim._rules import NormScaled


class Fira(EightBit):
    """GaLore, and the gradient outside its subspace scaled a row (or column) as Adam scaled it inside:

        S = ‖N_j‖ / ‖R_j‖ · (G - α up(R)),  W ← W - η √(1-β2ᵗ)/(1-β1ᵗ) · (α up(N) + S)

    and ‖S‖ grows by at most `limit` a step. The paper subtracts all of up(R); its code, which made its results, takes
    α = `scale` of it, so that 1 - α of the gradient inside stays in S. `removes` picks one.
    """

    slug: ClassVar[str] = "fira"
    title: ClassVar[str] = "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?"
    source: ClassVar[str] = "arXiv 2410.01623"

    limit: Annotated[float, Field(ge=1, description="most that the residual's norm grows in a step")] = 1.01
    removes: Literal["authors", "paper"] = "authors"

    def residual(self) -> NormScaled:
        return NormScaled(self.limit, self.removes)
