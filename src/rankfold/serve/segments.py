"""Products of many adapters in one batch: each row of a batch gets its own adapter's `s B A`, out of the pool's pages.

Punica: Chen et al. 2023, arXiv 2310.18547 (segments of rows with one adapter). S-LoRA: Sheng et al. 2023, arXiv
2311.03285 (any ranks, from pages that lie anywhere).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.errors import UnsupportedError
from rankfold.serve.pool import Pool


@dataclass(frozen=True)
class Piece:
    """k components of a layer's product, in page `page` of an adapter: A (k, in) at `a`, Bᵀ (k, out) at `b`."""

    page: int
    k: int
    a: int
    b: int
    in_: int
    out: int

    def of(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A (k, in) and Bᵀ (k, out) in that page, a row of `pages`."""
        page = pages[self.page]
        return (
            page[self.a : self.a + self.k * self.in_].view(self.k, self.in_),
            page[self.b : self.b + self.k * self.out].view(self.k, self.out),
        )


@dataclass(frozen=True)
class Product:
    """An adapter as pages: `pages` (n, numbers of a page) in host memory, and what lies where, by the layer's path."""

    pages: Tensor
    pieces: Mapping[str, Sequence[Piece]]

    @property
    def bytes(self) -> int:
        return self.pages.nbytes


def as_product(adapter: Adapter, pool: Pool) -> Product | None:
    """The adapter's products in pages like the pool's, the scale within B; None if it is anything but products of
    linear layers.

    A layer's components fill up a page before the next is begun, so that less than one component of a layer is lost at
    the end of a page, whatever the ranks.
    """
    deltas = adapter.deltas
    if adapter.modules or not all(d.stackable and d.site.kind in ("linear", "conv1d") for d in deltas.values()):
        return None
    pieces: dict[str, list[Piece]] = {}
    parts: list[tuple[Piece, Tensor, Tensor]] = []
    page, at = 0, 0
    with torch.no_grad():
        for path, delta in deltas.items():
            B, A = delta.pair()
            B, (out, in_), done = B * delta.scale, (B.shape[0], A.shape[1]), 0
            if in_ + out > pool.numel:
                raise UnsupportedError(
                    f"{path}: one component of its product has {in_ + out:,} numbers, a page of the pool {pool.numel:,}"
                )
            while done < len(A):
                k = min(len(A) - done, (pool.numel - at) // (in_ + out))
                if not k:
                    page, at = page + 1, 0
                    continue
                piece = Piece(page, k, at, at + k * in_, in_, out)
                parts.append((piece, A[done : done + k], B[:, done : done + k].mT))
                pieces.setdefault(path, []).append(piece)
                at, done = at + k * (in_ + out), done + k
        pages = torch.zeros(page + 1, pool.numel, dtype=pool.pages.dtype)
        for piece, A, Bt in parts:
            to_A, to_Bt = piece.of(pages)
            to_A.copy_(A)
            to_Bt.copy_(Bt)
    return Product(pages, pieces)


class Placed:
    """An adapter's products in the pool, page i of it in page `where[i]` of the pool."""

    def __init__(self, product: Product, pool: Pool, where: Sequence[int]):
        for own, page in zip(product.pages, where, strict=True):
            pool.pages[page].copy_(own)
        self.factors: dict[str, list[tuple[Tensor, Tensor]]] = {
            path: [Piece(where[p.page], p.k, p.a, p.b, p.in_, p.out).of(pool.pages) for p in pieces]
            for path, pieces in product.pieces.items()
        }


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a batch, and the adapter that they are under."""

    placed: Placed
    start: int
    stop: int


def add_products(y: Tensor, x: Tensor, segments: Sequence[Segment], path: str) -> None:
    """y (N, out) += (x Aᵀ) Bᵀ, for each segment's rows with the factors that its adapter has for that layer."""
    for segment in segments:
        factors = segment.placed.factors.get(path)
        if factors is not None:
            own = y[segment.start : segment.stop]
            for A, Bt in factors:
                own.addmm_(x[segment.start : segment.stop] @ A.mT, Bt)


class Products:
    """Adds to what linear layers of a model give, while a step has `segments`, what its adapters' products give."""

    def __init__(self, model: nn.Module):
        self.segments: Sequence[Segment] = ()
        self._model = model
        self._hooks: dict[str, Any] = {}

    def watch(self, paths: Sequence[str]) -> None:
        """Let these layers have a part in it, from now on."""
        for path in paths:
            if path not in self._hooks:
                layer = self._model.get_submodule(path)
                hook = lambda _, args, y, path=path: self._add(path, args[0], y)  # noqa: E731
                self._hooks[path] = layer.register_forward_hook(hook)

    def _add(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        if self.segments:
            y = y.contiguous()
            add_products(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype), self.segments, path)
        return y

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
