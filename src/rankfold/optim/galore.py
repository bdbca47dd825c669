"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. Zhao et al. 2024, arXiv 2403.03507."""

from typing import ClassVar

from rankfold.optim._fields import EightBit


class GaLore(EightBit):
    """Adam on the gradient in the r leading singular directions of its smaller side, found anew every T steps:

        R = G P (or Pᵀ G),  W ← W - η √(1-β2ᵗ)/(1-β1ᵗ) · scale · (m / (√v + eps)) Pᵀ

    The moments stay as they are when P changes, eps is not bias-corrected and decay comes after the step, as in the
    authors' code. State: 2 r max(out, in) + r min(out, in) numbers a matrix. What is no matrix, and groups with
    `"project": False` (embeddings and the head, in the paper), are stepped by AdamW.

    `bits=8` keeps the moments in 8 bits. The authors renew every P at the steps that `every` divides; with
    `spread=False` so do we.
    """

    slug: ClassVar[str] = "galore"
    title: ClassVar[str] = "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection"
    source: ClassVar[str] = "arXiv 2403.03507"
