"""Any method with a ΔW, as a plain LoRA."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.core.attach import build_adapter
from rankfold.core.delta import Delta
from rankfold.core.linalg import truncate, wide
from rankfold.core.routing import state_of
from rankfold.core.targets import site_at
from rankfold.errors import RankfoldError, UnsupportedError


def as_lora(
    model: nn.Module, name: str | None = None, rank: int | None = None, *, new_name: str | None = None
) -> tuple[Adapter, dict[str, float]]:
    """A plain LoRA that does what an attached adapter does, put beside it (inactive) as `new_name` or `"<name>-lora"`.

    With `rank=None` every layer gets the rank its ΔW has, so the result is exact up to rounding; otherwise the best
    approximation of at most that rank. A LoRA holds no bias change: what a method adds to a bias is lost and counted.

    Returns the adapter and the relative error of each site, `‖[ΔW Δb] − [s B A, 0]‖_F / ‖[ΔW Δb]‖_F` (0 where there is
    no change). Raises UnsupportedError for a method without a ΔW.
    """
    from rankfold.deltas.lora import LoRA

    state = state_of(model)
    name = state.active if name is None else state.check(name)
    if name is None:
        raise RankfoldError(f"no adapter is active: name one of {', '.join(state.adapters)}")
    if rank is not None and rank < 1:
        raise RankfoldError(f"rank must be at least 1, not {rank}")
    adapter = state.adapters[name]
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    report: dict[str, float] = {}
    for site_name, delta in adapter.deltas.items():
        if delta.form in ("function", "bias"):
            what = "only biases" if delta.form == "bias" else "the output by a function"
            raise UnsupportedError(
                f"{adapter.method.slug} has no ΔW to turn into a LoRA: it changes {what} (at {site_name})"
            )
        B, A, report[site_name] = product(delta, rank)
        pairs[site_name] = (B, A)

    methods = {site: LoRA(rank=A.shape[-2], alpha=A.shape[-2]) for site, (_, A) in pairs.items()}
    full = {path: copied.module.state_dict() for path, copied in adapter.modules.items()}
    return put_beside(adapter, pairs, methods, new_name or f"{name}-lora", full), report


def put_beside(
    adapter: Adapter,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    methods: Mapping[str, Any],
    name: str,
    full: Mapping[str, Mapping[str, Tensor]],
) -> Adapter:
    """A new, inactive adapter on the same model, of the LoRAs `methods` and their factors B and A by site.

    `full` are the tensors of the modules that it holds in full, by path.
    """
    widest = max(methods.values(), key=lambda method: method.rank)

    def fill(lora: Adapter) -> None:
        for site_name, delta in lora.deltas.items():
            delta.set_start(*pairs[site_name])
        for path, copied in lora.modules.items():
            copied.module.load_state_dict(full[path])

    matched = []
    for site_name in pairs:
        target = site_at(adapter.model, site_name)
        if target is None:
            raise RankfoldError(f"the model of adapter {adapter.name!r} has no {site_name} that a LoRA could sit on")
        matched.append(target)
    copies = {path: adapter.model.get_submodule(path) for path in full}
    return build_adapter(
        adapter.model, matched, widest, methods, name, fill,
        init=None, seed=adapter.seed, targets=list(pairs), copies=copies, active=False,
    )  # fmt: skip


@torch.no_grad()
def product(delta: Delta, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """B (out, r), A (r, in) with ΔW ≈ B A, and the relative error."""
    largest = min(delta.site.out, delta.site.in_)
    if delta.form == "factors":
        B, A = map(wide, delta.pair(on_base=True))
        B = B * delta.scale
        squared = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1))  # ‖B A‖², without forming the product
        keep = min(B.shape[-1], largest if rank is None else min(rank, largest))
        total, lost = float(squared.sum()), 0.0
        if keep < B.shape[-1]:
            B, A, error = truncate(B, A, keep)
            lost = float((error.square() * squared).sum())
    else:
        U, sigma, Vh = torch.linalg.svd(_whole_change(delta), full_matrices=False)
        energy = sigma.square()
        noise = sigma.amax() * largest * torch.finfo(sigma.dtype).eps
        keep = max(1, int((sigma > noise).sum(-1).max())) if rank is None else min(rank, largest)
        total, lost = float(energy.sum()), float(energy[..., keep:].sum())
        root = sigma[..., :keep].sqrt()
        B, A = U[..., :keep] * root[..., None, :], root[..., :, None] * Vh[..., :keep, :]
    change = delta.bias_update(delta.b) if delta.biased else None
    bias = 0.0 if change is None else float(change.square().sum())
    return B, A, ((lost + bias) / (total + bias)) ** 0.5 if total + bias > 0 else 0.0


def _whole_change(delta: Delta) -> Tensor:
    """ΔW (out, in) on the base as it was before anything was folded or merged into it."""
    if delta.form == "update":
        return wide(delta.update())
    site = delta.site
    at = site.name if site.kind == "experts" else f"{site.name}.{site.parameter}"
    original = delta.layer._rankfold.originals.get(at)
    if delta.is_folded:
        W = wide(delta.folded)
        W = W + delta.scale * (delta.B0 @ delta.A0).to(W.dtype)
    else:
        W = wide(delta.W if original is None else delta.layer.to_matrix(original))
    return delta.adapted_weight(W) - W
