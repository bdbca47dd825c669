"""The pairs of factors that an adapter trains."""

from typing import Any

from torch import nn

from rankfold.errors import RankfoldError


def pairs(adapter: Any, slug: str) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """B (out, r) and A (r, in) of each delta that trains both. Raises RankfoldError where none does."""
    found = []
    for delta in adapter.deltas.values():
        B, A = (delta._parameters.get(letter) for letter in "BA")
        if B is not None and A is not None and B.dim() == A.dim() >= 2 and B.shape[-1] == A.shape[-2]:
            found.append((B, A))
    if not found:
        raise RankfoldError(f"{slug} steps B and A together, and no delta of adapter {adapter.name!r} trains both")
    return found
