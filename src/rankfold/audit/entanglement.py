"""Artificial Entanglement in the Fine-Tuning of Large Language Models. arXiv 2601.06788.

A matrix (2ᵃ, 2ᵇ) is read as a state of a + b sites with two levels each, the bits of the row first, most significant
first, then those of the column. At the cut behind site l it is a matrix (2ˡ, 2ⁿ⁻ˡ) with singular values σ, and

    S(l) = -Σ p ln p,  p = σ² / Σσ²   (nats)

At l = a that is a matter of the singular values of the matrix itself, and at most ln r for rank r: a product of two
factors has a valley there that an update of full rank has not. The external entanglement is that of the attention
probabilities (T, T) of T = 2ᵗ tokens; of it the paper says that low rank and tuning in full leave it alike.

No code of the authors is public; the order of the sites, what is done with sizes that are no powers of two (cut down to
one: padding with zeros would lower S) and how attention is sampled are ours.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold
from rankfold.audit.metrics import entropy
from rankfold.errors import RankfoldError


@dataclass(frozen=True)
class Profile:
    """`entropies[l - 1]` and `ranks[l - 1]` at the cut behind site l = 1 ... a + b - 1; `rows` is a."""

    entropies: list[float]
    ranks: list[int]
    rows: int

    @property
    def valley(self) -> float:
        """`½ (max_{l<a} S + max_{l>a} S) - S(a)`: above 0 there is a valley between rows and columns."""
        before, here, after = (self.entropies[s] for s in (slice(self.rows - 1), self.rows - 1, slice(self.rows, None)))
        return (max(before, default=0.0) + max(after, default=0.0)) / 2 - here  # type: ignore[arg-type,operator,return-value]


def profile(B: Tensor, A: Tensor) -> Profile:
    """Of the product B (out, r) A (r, in), which is not formed; cut down to powers of two. All 0 for a zero product."""
    a, b = (int(size).bit_length() - 1 for size in (B.shape[0], A.shape[1]))
    if a < 1 or b < 1:
        raise RankfoldError(f"a matrix {B.shape[0]}×{A.shape[1]} has no two sites on each side")
    B, A = B[: 2**a].double(), A[:, : 2**b].double()
    # With A = L Q, Q of orthonormal rows, B A has at the cuts inside the rows the singular values of B L; and likewise.
    left = B @ torch.linalg.qr(A.mT).R.mT
    right = torch.linalg.qr(B).R @ A
    entropies, ranks = [], []
    for cut in range(1, a + b):
        M = left.reshape(2**cut, -1) if cut <= a else right.reshape(-1, 2 ** (a + b - cut))
        M = M if M.shape[0] <= M.shape[1] else M.mT
        energy = torch.linalg.eigvalsh(M @ M.mT).clamp_min(0)  # σ², many times faster than σ
        entropies.append(float(entropy(energy)))
        ranks.append(int((energy.max() * max(M.shape) * torch.finfo(M.dtype).eps < energy).sum()))
    return Profile(entropies, ranks, a)


def curve(M: Tensor) -> Tensor:
    """S(l) at l = 1 ... 2t - 1 of each matrix (..., T, T), which no factors tell: attention probabilities."""
    bits = 2 * (M.shape[-1].bit_length() - 1)
    entropies = []
    for cut in range(1, bits):
        X = M.double().reshape(*M.shape[:-2], 2**cut, -1)
        X = X if X.shape[-2] <= X.shape[-1] else X.mT
        entropies.append(entropy(torch.linalg.eigvalsh(X @ X.mT).clamp_min(0)))
    return torch.stack(entropies, -1)


@dataclass(frozen=True)
class Law:
    """How S grows with the distance l from an end: `slope` and `R²` of a line over l (volume) and over ln l (area)."""

    volume_slope: float
    volume_fit: float
    area_slope: float
    area_fit: float


def law(entropies: list[float]) -> Law:
    """Fit the entropies at l = 1, 2, ... up to the valley or the middle. Raises for fewer than three."""
    if len(entropies) < 3:
        raise RankfoldError(f"a law needs three entropies at least, not {len(entropies)}")
    S = torch.tensor(entropies, dtype=torch.float64)
    length = torch.arange(1, len(S) + 1, dtype=torch.float64)
    return Law(*_line(length, S), *_line(length.log(), S))


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and R² of the least squares line."""
    x, y = x - x.mean(), y - y.mean()
    slope = (x * y).sum() / x.square().sum()
    total = y.square().sum()
    return float(slope), float(1 - (y - slope * x).square().sum() / total) if total > 0 else 1.0


@dataclass(frozen=True)
class Attention:
    """The external entanglement S(l) over `tokens` tokens, the mean over layers, heads and texts, with and without the
    adapter; `layers` says by how much the layers' own curves moved at most. The laws are of the first half, l ≤ t."""

    tokens: int
    base: list[float]
    adapted: list[float]
    layers: list[float]
    base_law: Law
    adapted_law: Law


@torch.no_grad()
def attention(model: nn.Module, name: str, blocks: Sequence[Tensor], texts: int = 4) -> Attention:
    """Of the first blocks of token ids (L,) each, under adapter `name`. Raises where the model shows no attention."""
    bits = min(6, len(blocks[0]).bit_length() - 1)
    if bits < 3:
        raise RankfoldError(f"blocks of {len(blocks[0])} tokens are too short for attention's entanglement: 8 at least")
    device, was_training, found = next(model.parameters()).device, model.training, []
    model.eval()
    try:
        with _shown(model):
            for route in (None, name):
                with rankfold.using(model, route):
                    of_texts = []
                    for block in blocks[:texts]:
                        out: Any = model(input_ids=block[None, : 2**bits].to(device), output_attentions=True)
                        if not getattr(out, "attentions", None) or out.attentions[0] is None:
                            raise RankfoldError(f"{type(model).__name__} does not show its attention")
                        of_texts.append(torch.stack([curve(layer[0]).mean(0) for layer in out.attentions]))
                    found.append(torch.stack(of_texts).mean(0))  # (layers, 2t - 1)
    finally:
        model.train(was_training)
    base, adapted = (curves.mean(0).tolist() for curves in found)
    moved = (found[1] - found[0]).abs().amax(-1).tolist()
    return Attention(2**bits, base, adapted, moved, law(base[:bits]), law(adapted[:bits]))


@contextmanager
def _shown(model: Any) -> Iterator[None]:
    """The fused implementations of attention never hold the probabilities."""
    if not hasattr(model, "set_attn_implementation"):
        raise RankfoldError(f"{type(model).__name__} has no attention that can be shown")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
