"""What generators of adapters share: products as one vector and back, and a model called with changed layers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import RankfoldError

Pairs = Mapping[str, tuple[Tensor, Tensor]]  # site -> B (out, r), A (r, in)


@dataclass(frozen=True)
class Layout:
    """The fixed order of an adapter's numbers: site after site, in each B (out, r) and then A (r, in), row by row."""

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, pairs: Pairs) -> "Layout":
        return cls({site: (tuple(B.shape), tuple(A.shape)) for site, (B, A) in pairs.items()})

    @property
    def sizes(self) -> list[int]:
        """How many numbers each tensor has, in order."""
        return [out * in_ for both in self.shapes.values() for out, in_ in both]

    def flatten(self, pairs: Pairs) -> Tensor:
        """One vector (P,). Raises RankfoldError where the products have other sites or shapes."""
        other = Layout.of(pairs).shapes
        if dict(other) != dict(self.shapes):
            differ = sorted(site for site in {*other, *self.shapes} if other.get(site) != self.shapes.get(site))
            raise RankfoldError(
                f"adapters that are flattened together need the same layers and ranks; these differ at {differ[0]}: "
                f"{self.shapes.get(differ[0])} and {other.get(differ[0])}"
            )
        return torch.cat([tensor.reshape(-1) for site in self.shapes for tensor in pairs[site]])

    def unflatten(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The products of a vector (P,), or the stacked products of several (..., P)."""
        parts = iter(flat.split(self.sizes, -1))
        return {
            site: (next(parts).unflatten(-1, B), next(parts).unflatten(-1, A)) for site, (B, A) in self.shapes.items()
        }

    def statistics(self, flats: Tensor) -> Tensor:
        """Mean and unbiased standard deviation of each tensor over several vectors (n, P): (2, tensors).

        A tensor whose numbers are all the same has a deviation of 1 here, so that it is restored and not divided by 0.
        """
        parts = flats.split(self.sizes, -1)
        means = torch.stack([part.mean() for part in parts])
        stds = torch.stack([part.std() if part.numel() > 1 else part.new_zeros(()) for part in parts])
        return torch.stack([means, torch.where(stds > 0, stds, 1.0)])

    def standardise(self, flat: Tensor, statistics: Tensor) -> Tensor:
        mean, std = self._spread(statistics)
        return (flat - mean) / std

    def restore(self, flat: Tensor, statistics: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        mean, std = self._spread(statistics)
        return flat * std + mean

    def _spread(self, statistics: Tensor) -> Tensor:
        return statistics.repeat_interleave(torch.tensor(self.sizes, device=statistics.device), -1)


@contextmanager
def adding(model: nn.Module, changes: Mapping[str, Callable[[Any], Tensor]]) -> Iterator[None]:
    """While inside, the output of each layer named in `changes` has `changes[layer](its input)` added to it.

    Gradients flow into whatever the functions use; nothing of the model is changed.
    """

    def hook(change: Callable[[Any], Tensor]) -> Callable[..., Tensor]:
        return lambda layer, inputs, y: y + change(inputs[0]).to(y.dtype)

    handles = [model.get_submodule(site).register_forward_hook(hook(change)) for site, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def products(pairs: Pairs) -> dict[str, Callable[[Tensor], Tensor]]:
    """`x ↦ B A x` for each site: what `adding` takes to call a model with an adapter that is only tensors."""

    def product(B: Tensor, A: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (x.to(A.dtype) @ A.mT) @ B.mT

    return {site: product(B, A) for site, (B, A) in pairs.items()}
