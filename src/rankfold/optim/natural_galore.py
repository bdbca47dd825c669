"""Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning. Das 2024, arXiv 2410.16029."""

from typing import Annotated, ClassVar

from pydantic import Field

from rankfold.optim._fields import Projected
from rankfold.optim._rules import Natural


class NaturalGaLore(Projected):
    """GaLore whose projected gradient is first multiplied by the inverse of an empirical Fisher matrix:

        g = vec(R),  H = the last s of them, g included,  g̃ = (λI + H Hᵀ)⁻¹ g,  then Adam on g̃

    State: GaLore's and s · numel(R) numbers, which is little only where s · r is. H is dropped when the subspace
    changes, since its columns are told in the old one; the authors keep it. They also compress both sides at once
    (`side="full"`), against the paper's equations, which compress one.
    """

    slug: ClassVar[str] = "natural-galore"
    title: ClassVar[str] = "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning"
    source: ClassVar[str] = "arXiv 2410.16029"

    damping: Annotated[float, Field(gt=0, description="λ")] = 1e-3
    history: Annotated[int, Field(ge=1, description="s: gradients of the Fisher matrix")] = 20

    def inner(self) -> Natural:
        return Natural(self.betas, self.eps, damping=self.damping, history=self.history)
