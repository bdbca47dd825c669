"""Composable Sparse Fine-Tuning for Cross-Lingual Transfer (LT-SFT). Ansell et al. 2022, arXiv 2110.07560."""

from typing import ClassVar

from rankfold.core.sparse import SparseMethod


class LTSFT(SparseMethod):
    """`θ = θ₀ + φ`, φ zero but on a mask of K entries. `K = ⌊density · numel(W)⌋`, at least 1, or `k`.

    On its own the mask is random, which is the paper's variant "Random". The callback `lt-sft-lottery` finds it: it
    trains everything first, keeps the K largest |θ₁ − θ₀| over all weights together, and starts again on those.

    Differences add: merge an adapter of a language and one of a task into one model, in any order. A task is learned
    on top of a merged language, and its file holds the task's difference alone. The published code adds each
    difference to the weights and lets weight decay move those off the mask too; here nothing else is ever changed,
    and decay acts on φ.
    """

    slug: ClassVar[str] = "lt-sft"
    title: ClassVar[str] = "Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
    source: ClassVar[str] = "arXiv 2110.07560"
