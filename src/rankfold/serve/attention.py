"""Attention over paged keys and values, as one of Transformers' attention implementations.

A forward has N rows of one token each, of any requests: what a row attends to is said by its request's pages, and not
by a mask. Importing this registers the implementation `rankfold_paged`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from rankfold.core.compiled import compiled
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.serve.pool import Pool, Table

NAME = "rankfold_paged"


class _Kept(NamedTuple):
    """The keys, or the values, of one layer: the first heads · d numbers of `rows`, one row a token."""

    rows: Tensor
    heads: int
    d: int

    def read(self, rows: Tensor) -> Tensor:
        """(requests, heads, n, d) for rows (requests, n)."""
        there = self.rows.index_select(0, rows.flatten())[:, : self.heads * self.d]
        return there.view(*rows.shape, self.heads, self.d).transpose(-3, -2)


class _Decodes:
    """Requests that add one token each, of about equally many before it: `at` their places in the step."""

    def __init__(self, at: list[int], tables: Sequence[Table], pool: Pool):
        lengths = torch.tensor([table.length for table in tables])
        self.at = _places(at)
        width = int(lengths.max())
        most = max(len(table.pages) for table in tables)
        pages = torch.tensor([table.pages + table.pages[:1] * (most - len(table.pages)) for table in tables])
        token = torch.arange(width)
        token = torch.where(token < lengths[:, None], token, 0)  # a row that is there stands in for those that are not
        self.rows = pool.row(pages.gather(1, token // pool.block), token % pool.block)
        self._lengths, self._masks = lengths, dict[int | None, Tensor | None]()

    def attend(self, q: Tensor, keys: _Kept, values: _Kept, scale: float | None, window: int | None) -> Tensor:
        fits = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
        if fits and (loop := compiled("numba", "rankfold.serve.attention_cpu")) is not None:
            return loop.attend(q, keys, values, self.rows, self._lengths, scale, window)
        # The query heads that share a key head are as so many queries.
        asked, mask = q.unflatten(1, (keys.heads, -1)), self.mask(window)
        y = F.scaled_dot_product_attention(asked, keys.read(self.rows), values.read(self.rows), mask, scale=scale)
        return y.flatten(1, 2)

    def to(self, device: torch.device) -> "_Decodes":
        self.rows, self._lengths = self.rows.to(device), self._lengths.to(device)
        if isinstance(self.at, Tensor):
            self.at = self.at.to(device)
        return self

    def mask(self, window: int | None) -> Tensor | None:
        """Which of the rows each request attends to, (n, 1, 1, rows); None for all."""
        if window not in self._masks:
            token, ends = torch.arange(self.rows.shape[1], device=self.rows.device), self._lengths[:, None]
            seen = token < ends
            if window is not None:
                seen &= token >= ends - window
            self._masks[window] = None if bool(seen.all()) else seen[:, None, None]
        return self._masks[window]


class _Prefill:
    """The last n of equally many tokens of some requests, from `starts` of the step on."""

    def __init__(self, starts: list[int], n: int, tables: Sequence[Table], pool: Pool):
        token = torch.arange(tables[0].length)
        pages = torch.tensor([table.pages for table in tables])[:, token // pool.block]
        self.n, self.rows = n, pool.row(pages, token % pool.block)
        self.at = _places([start + i for start in starts for i in range(n)])
        self._masks = dict[int | None, Tensor | None]()

    def attend(self, q: Tensor, keys: _Kept, values: _Kept, scale: float | None, window: int | None) -> Tensor:
        asked, mask = q.unflatten(0, (-1, self.n)).transpose(1, 2), self.mask(window)
        y = F.scaled_dot_product_attention(
            asked, keys.read(self.rows), values.read(self.rows), mask,
            is_causal=mask is None, scale=scale, enable_gqa=keys.heads != q.shape[1],
        )  # fmt: skip
        return y.transpose(1, 2).flatten(0, 1)

    def to(self, device: torch.device) -> "_Prefill":
        self.rows = self.rows.to(device)
        if isinstance(self.at, Tensor):
            self.at = self.at.to(device)
        return self

    def mask(self, window: int | None) -> Tensor | None:
        """(n, rows); None where the first token of the requests is here and attention is simply causal."""
        if window not in self._masks:
            self._masks[window] = causal(self.n, self.rows.shape[1], window, self.rows.device)
        return self._masks[window]


def _places(at: list[int]) -> Tensor | slice:
    """Rows of a step: where they follow each other no copy is made of them."""
    return slice(at[0], at[-1] + 1) if at == list(range(at[0], at[-1] + 1)) else torch.tensor(at)


def causal(n: int, total: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last n of `total` tokens attend to, (n, total); None where they are all and it is simply causal."""
    if n == total and (window is None or window >= total):
        return None
    own, token = torch.arange(total - n, total, device=device)[:, None], torch.arange(total, device=device)
    return token <= own if window is None else (token <= own) & (token > own - window)


class Step:
    """What one forward does: for each request, in the order of its rows, its table (grown already) and new tokens."""

    def __init__(self, pool: Pool, tables: Sequence[Table], new: Sequence[int]):
        self.pool, device = pool, pool.rows.device
        positions, rows, self._parts = [], [], list[_Decodes | _Prefill]()
        decodes, prefills = dict[int, list[tuple[int, Table]]](), dict[tuple[int, int], list[tuple[int, Table]]]()
        at = 0
        for table, n in zip(tables, new, strict=True):
            token = torch.arange(table.length - n, table.length)
            positions.append(token)
            rows.append(pool.row(torch.tensor(table.pages)[token // pool.block], token % pool.block))
            if n == 1:
                # Together with those of at most twice as many pages: little is read that no one attends to.
                decodes.setdefault(len(table.pages).bit_length(), []).append((at, table))
            else:
                prefills.setdefault((n, table.length), []).append((at, table))
            at += n
        for group in decodes.values():
            places, own = zip(*group, strict=True)
            self._parts.append(_Decodes(list(places), own, pool).to(device))
        for (n, _), group in prefills.items():
            places, own = zip(*group, strict=True)
            self._parts.append(_Prefill(list(places), n, own, pool).to(device))
        self.positions = torch.cat(positions).to(device)  # of each row in its request
        self._write = torch.cat(rows).to(device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        """q (N, H, D), k and v (N, H_kv, D): written to the pool, and (N, H, D) of what each row reads there."""
        rows, heads = self.pool.rows[layer * self.pool.layer_step :], k.shape[1]
        keys, values = _Kept(rows, heads, k.shape[2]), _Kept(rows[self.pool.value_step :], heads, v.shape[2])
        keys.rows[self._write, : k[0].numel()] = k.flatten(1)
        values.rows[self._write, : v[0].numel()] = v.flatten(1)
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        for part in self._parts:
            out[part.at] = part.attend(q[part.at], keys, values, scale, window)
        return out


class _Now(threading.local):
    step: Step | None = None


_now = _Now()


@contextmanager
def running(step: Any) -> Iterator[None]:
    """Let attention in this thread's forwards be that of the step."""
    before, _now.step = _now.step, step
    try:
        yield
    finally:
        _now.step = before


def _paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query (N, H, 1, D), key and value (N, H_kv, 1, D) -> (N, 1, H, D)."""
    if _now.step is None:
        raise RankfoldError("this model is being served: only its engine runs it, until the engine is closed")
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise UnsupportedError(f"{type(module).__name__} attends with {name}, which paged attention does not know")
    layer: Any = module.layer_idx
    y = _now.step.attend(layer, query[:, :, 0], key[:, :, 0], value[:, :, 0], scaling, sliding_window)
    return y[:, None], None


AttentionInterface.register(NAME, _paged)


class Shape:
    """Stands in for a step and notes what a model's attention asks of a pool: `layers`, and numbers of a row."""

    def __init__(self) -> None:
        self.widths: dict[int, int] = {}

    @property
    def layers(self) -> int:
        return max(self.widths) + 1

    @property
    def width(self) -> int:
        return max(self.widths.values())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        self.widths[layer] = max(k[0].numel(), v[0].numel())
        return q[..., : v.shape[-1]]
