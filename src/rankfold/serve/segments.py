"""Products of many adapters in one batch: each row of a batch gets its own adapter's `s B A`, out of the pool's pages.

Punica: Chen et al. 2023, arXiv 2310.18547 (segments of rows with one adapter). S-LoRA: Sheng et al. 2023, arXiv
2311.03285 (any ranks, from pages that lie anywhere).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.core.adapter import Adapter
from rankfold.core.compiled import compiled
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
        return _view(page, self.a, self.k, self.in_), _view(page, self.b, self.k, self.out)


def _view(flat: Tensor, at: int, k: int, n: int) -> Tensor:
    return flat[at : at + k * n].view(k, n)


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
    """An adapter's products in the pool, page i of it in page `where[i]` of the pool.

    `pieces`: for each layer, `(a, b, k)`: k rows of A and of Bᵀ, from `numbers[a]` and `numbers[b]` on.
    """

    def __init__(self, product: Product, pool: Pool, where: Sequence[int]):
        for own, page in zip(product.pages, where, strict=True):
            pool.pages[page].copy_(own)
        self.numbers = pool.pages.view(-1)
        self.pieces: dict[str, list[tuple[int, int, int]]] = {}
        for path, pieces in product.pieces.items():
            starts = [where[p.page] * pool.numel for p in pieces]
            self.pieces[path] = [(at + p.a, at + p.b, p.k) for at, p in zip(starts, pieces, strict=True)]


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a batch, and the adapter that they are under."""

    placed: Placed
    start: int
    stop: int


LONG = 32  # rows of a segment from which on a processor's own products of matrices are faster than one of rows


@dataclass(frozen=True)
class Table:
    """What one layer's products are, for the rows of a batch, in `numbers`, those of a pool.

    `pieces` (P, 6) int64: a segment's start and stop, a, b, k, and how many components of the segment come before.
    Those of a segment follow each other, `ends` (segments + 1,) says where, and no row is in two segments. The longest
    segment has so many `rows`, the one of the most components is so many of them wide, and `long` has the pieces of
    segments of more than LONG rows. `components` are those of the other pieces, once for every row.
    """

    numbers: Tensor
    pieces: Tensor
    ends: Tensor
    rows: int
    width: int
    long: Sequence[Sequence[int]]
    components: int

    @classmethod
    def of(cls, segments: Sequence[Segment], path: str) -> "Table | None":
        """None where no adapter of the batch has a product for the layer."""
        pieces, ends, width = list[tuple[int, ...]](), [0], 0
        for segment in segments:
            before = 0
            for a, b, k in segment.placed.pieces.get(path, ()):
                pieces.append((segment.start, segment.stop, a, b, k, before))
                before += k
            if before:
                ends.append(len(pieces))
                width = max(width, before)
        if not pieces:
            return None
        numbers, long = segments[0].placed.numbers, [piece for piece in pieces if piece[1] - piece[0] > LONG]
        rows, device = max(piece[1] - piece[0] for piece in pieces), numbers.device
        components = sum((stop - start) * k for start, stop, _, _, k, _ in pieces if stop - start <= LONG)
        return cls(
            numbers, torch.tensor(pieces).to(device), torch.tensor(ends).to(device), rows, width, long, components
        )


def add_products(y: Tensor, x: Tensor, table: Table) -> None:
    """y (N, out) += (x Aᵀ) Bᵀ for each piece of the table and its rows of x (N, in).

    Where Numba is installed, float32 and float64 on a processor go through a compiled loop, and where Triton is, CUDA
    goes through two kernels: a call for each piece costs more than its product.
    """
    if (kernel := _kernel(y)) is None:
        add_each(y, x, table.numbers, table.pieces.tolist())
    else:
        kernel.add_products(y, x, table)


def add_each(y: Tensor, x: Tensor, numbers: Tensor, pieces: Iterable[Sequence[int]]) -> None:
    """The same, piece after piece."""
    for start, stop, a, b, k, _ in pieces:
        A, Bt = _view(numbers, a, k, x.shape[1]), _view(numbers, b, k, y.shape[1])
        y[start:stop].addmm_(x[start:stop] @ A.mT, Bt)


def _kernel(y: Tensor) -> Any:
    if y.is_cuda:
        return None if y.dtype == torch.float64 else compiled("triton", "rankfold.serve.segments_cuda")
    fits = y.device.type == "cpu" and y.dtype in (torch.float32, torch.float64)
    return compiled("numba", "rankfold.serve.segments_cpu") if fits else None


class Products:
    """Adds to what linear layers of a model give, while a step has `segments`, what its adapters' products give."""

    def __init__(self, model: nn.Module):
        self.segments: Sequence[Segment] = ()
        self._model = model
        self._hooks: dict[str, Any] = {}
        self._tables: tuple[Sequence[Segment], dict[str, Table | None]] = ((), {})

    def watch(self, paths: Sequence[str]) -> None:
        """Let these layers have a part in it, from now on."""
        for path in paths:
            if path not in self._hooks:
                layer = self._model.get_submodule(path)
                hook = lambda _, args, y, path=path: self._add(path, args[0], y)  # noqa: E731
                self._hooks[path] = layer.register_forward_hook(hook)

    def _add(self, path: str, x: Tensor, y: Tensor) -> Tensor:
        if self.segments and (table := self._table(path)) is not None:
            y = y.contiguous()
            add_products(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).to(y.dtype).contiguous(), table)
        return y

    def _table(self, path: str) -> Table | None:
        """The layer's table, kept for as long as steps have the same segments: most of them do, token after token."""
        before, tables = self._tables
        if before is not self.segments:
            tables = tables if before == self.segments else {}
            self._tables = (self.segments, tables)
        if path not in tables:
            tables[path] = Table.of(self.segments, path)
        return tables[path]

    def close(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
