"""Lower-rank adapters from trained ones. LoRA-Squeeze (Post-Squeeze), Vulić et al. 2026, arXiv 2602.10993."""

from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from rankfold.compose._result import Result
from rankfold.compose._sources import open_source
from rankfold.core.adapter import Adapter
from rankfold.core.delta import Delta
from rankfold.core.linalg import OVERSAMPLE, orthonormalise, svd, svd_of_product, wide
from rankfold.deltas.lora import LoRA
from rankfold.errors import AdapterFileError, RankfoldError, UnsupportedError

ITERATIONS = 2  # power iterations of the randomised decomposition


@dataclass(frozen=True)
class Squeezed:
    """What became of a layer: its rank before and after, and of ΔW the share of energy kept and what is lost.

    energy is `Σ_{i≤t} σ_i² / Σ σ_i²`, error `‖ΔW − ΔW_t‖ / ‖ΔW‖` (Frobenius). A change that is zero keeps all.
    """

    before: int
    rank: int
    energy: float
    error: float


@overload
def squeeze(
    adapter: Adapter, rank: int | None = None, to: str | None = None, *, keep_energy: float | None = None,
    alpha: float | None = None, randomised: bool = False, seed: int = 0,
) -> tuple[Adapter, dict[str, Squeezed]]: ...  # fmt: skip
@overload
def squeeze(
    adapter: str | Path, rank: int | None = None, to: str | Path | None = None, *, keep_energy: float | None = None,
    alpha: float | None = None, randomised: bool = False, seed: int = 0,
) -> tuple[Path, dict[str, Squeezed]]: ...  # fmt: skip
@torch.no_grad()
def squeeze(
    adapter: Adapter | str | Path,
    rank: int | None = None,
    to: str | Path | None = None,
    *,
    keep_energy: float | None = None,
    alpha: float | None = None,
    randomised: bool = False,
    seed: int = 0,
) -> tuple[Adapter | Path, dict[str, Squeezed]]:
    """The best LoRA of at most that rank in place of every layer's product `s B A`, which itself is not formed.

    With `ΔW_t = U_t diag(σ_t) V_tᵀ` the new factors are `B' = U_t σ_t^½ / √s'`, `A' = σ_t^½ V_tᵀ / √s'`, `s' = α'/t`.

    Args:
        adapter: one that is attached, or the folder of a saved one, which needs no base model.
        rank: the most that a layer may have.
        to: the new adapter's name (default: `NAME-squeezed`), put beside an attached one, inactive; or the folder that
            it is written to, for a saved one.
        keep_energy: give each layer the least rank that keeps this share of `Σ σ²`, as far as `rank` goes.
        alpha: α' of the new LoRA; None: the layer's rank, so that s' = 1.
        randomised: find the leading components from random projections, for ranks over 128; else exactly, through QR.
        seed: of those projections.

    Returns:
        the new adapter, or the folder, and what became of each layer.

    Raises:
        UnsupportedError: a delta is more than a product B A.
        AdapterFileError: the file is missing, damaged or hostile.
    """
    if rank is None and keep_energy is None:
        raise RankfoldError("squeeze: say the rank, or how much energy is to be kept")
    if (rank is not None and rank < 1) or (keep_energy is not None and not 0 < keep_energy <= 1):
        raise RankfoldError(f"squeeze: rank must be at least 1 and keep_energy in (0, 1]: {rank}, {keep_energy}")
    if alpha is not None and not alpha > 0:
        raise RankfoldError(f"squeeze: alpha must be above 0, not {alpha}")
    if not isinstance(adapter, Adapter) and to is None:
        raise RankfoldError(f"squeeze: say the folder for what {adapter} is squeezed to")
    source = open_source(adapter)
    rng = torch.Generator().manual_seed(seed)
    report: dict[str, Squeezed] = {}
    with Result(source, to if to is not None else f"{source.name}-squeezed", forced=source.forced) as result:
        for site in source.sites.values():
            own = source.methods[site.name]
            B, A = _product(source.delta(site.name), own.slug)
            try:
                (B, A), report[site.name] = squeeze_product(B, A, rank, keep_energy, rng if randomised else None)
            except RuntimeError as error:
                raise AdapterFileError(
                    f"{source.name}: the product at {site.name} cannot be squeezed: {error}"
                ) from error
            method = LoRA(rank=A.shape[-2], alpha=alpha, dropout=getattr(own, "dropout", 0.0))
            root = method.scale**0.5
            result.add(site, B / root, A / root, method)
        for path in source.full:
            result.add_full(source, path)
        return result.finish(), report


def squeeze_product(
    B: Tensor, A: Tensor, rank: int | None, keep_energy: float | None = None, rng: torch.Generator | None = None
) -> tuple[tuple[Tensor, Tensor], Squeezed]:
    """B' (..., out, t) and A' (..., t, in), √σ in each, of the best approximation of `B A` of rank t, and what is lost.

    t is `rank`, or less where that keeps the share `keep_energy` of every matrix's energy. Randomised with an `rng`. A
    component that is zero keeps its direction in A', so that it can still be trained.
    """
    B, A = wide(B), wide(A)
    most = min(B.shape[-2], B.shape[-1], A.shape[-1])
    t = most if rank is None else min(rank, most)
    if rng is None or t + OVERSAMPLE >= most:
        U, S, Vh = svd_of_product(B, A)
        total = S.square().sum(-1)
        left = total[..., None] - S.square().cumsum(-1)
        left[..., -1] = 0
    else:
        U, S, Vh = randomised_svd_of_product(B, A, t, rng)
        total = ((B.double().mT @ B.double()) * (A.double() @ A.double().mT)).sum((-2, -1))  # ‖B A‖²
        left = total[..., None] - S.double().square().cumsum(-1)
    if keep_energy is not None:
        # What rounding takes from the whole is no reason for another component.
        spare = (1 - keep_energy + 8 * torch.finfo(S.dtype).eps) * total[..., None]
        enough = (left <= spare).reshape(-1, S.shape[-1]).all(0).nonzero()
        t = min(t, int(enough[0]) + 1) if len(enough) else t
    whole, lost = float(total.sum()), max(0.0, float(left[..., t - 1].sum()))
    share = lost / whole if whole > 0 else 0.0
    U, S, Vh = U[..., :t], S[..., :t], Vh[..., :t, :]
    none = S.amax(-1, keepdim=True) * most * torch.finfo(S.dtype).eps >= S
    on_B, on_A = torch.where(none, S, S.sqrt()), torch.where(none, 1.0, S.sqrt())
    return (U * on_B[..., None, :], on_A[..., :, None] * Vh), Squeezed(B.shape[-1], t, 1 - share, share**0.5)


def randomised_svd_of_product(
    B: Tensor, A: Tensor, rank: int, rng: torch.Generator, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, Tensor]:
    """About the `rank` leading components of `B A`, as `linalg.randomised_svd` gives them, without forming it."""
    q = min(rank + OVERSAMPLE, B.shape[-2], A.shape[-1])
    directions = torch.randn(*A.shape[:-2], A.shape[-1], q, generator=rng).to(A)
    Q = orthonormalise(B @ (A @ directions))
    for _ in range(iterations):
        Q = orthonormalise(B @ (A @ orthonormalise(A.mT @ (B.mT @ Q))))
    U, S, Vh = svd((Q.mT @ B) @ A)
    return Q @ U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _product(delta: Delta, slug: str) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) with ΔW = B A."""
    if delta.form != "factors" or delta.biased:
        raise UnsupportedError(
            f"squeeze re-factorises a product B A, and {slug} at {delta.site.name} is more, or none. Load it on its "
            "base model and take rankfold.as_lora(model, rank=...) where it has a ΔW"
        )
    B, A = delta.pair(on_base=True)
    return wide(B) * delta.scale, wide(A)
