"""Training tokens as rows of the requests' forward. FlexLLM: Oliaro et al. 2024, arXiv 2402.18789."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankfold.core.adapter import Adapter
from rankfold.core.layers import AdaptedLinear
from rankfold.serve.attention import causal

if TYPE_CHECKING:
    from rankfold.serve.windows import Windowed


@dataclass(frozen=True)
class Window:
    """The next `n` tokens of a training sequence, and the adapter that is trained, as it is now."""

    run: "Windowed"
    n: int
    adapter: Adapter

    @property
    def name(self) -> str | None:
        """What the rows are routed by: an adapter of nothing but products is `added` to rows of the base."""
        deltas = self.adapter.deltas.values()
        products = all(isinstance(d.layer, AdaptedLinear) and d.layer.stackable(d) for d in deltas)
        return None if products and not self.adapter.modules else self.adapter.name

    @property
    def ids(self) -> list[int]:
        return self.run.ids[0, self.run.done : self.run.done + self.n].tolist()

    @contextmanager
    def added(self) -> Iterator[None]:
        """Have `y += s (x Aᵀ) Bᵀ` on the rows, in the block: routing would copy the factors for each of them."""
        hooks = []
        if self.name is None:
            for delta in self.adapter.deltas.values():
                layer: Any = delta.layer
                hooks.append(layer.register_forward_hook(partial(self._add, delta)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, delta: Any, _: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        B, A = delta.pair()
        y[-self.n :] += (F.linear(F.linear(args[0][-self.n :].to(A.dtype), A), B) * delta.scale).to(y.dtype)


class Beside:
    """A step of requests (`attention.Step`) with a window's tokens as its last rows.

    The window's rows attend to their own sequence alone, whose keys and values lie in its buffers, where the backward
    pass needs them, and not in the pool's pages.
    """

    def __init__(self, step: Any, window: Window):
        self._step, self._n, self._layers = step, window.n, window.run.cache.layers
        self._start = window.run.done
        own = torch.arange(self._start, self._start + self._n, device=step.positions.device)
        self.positions = torch.cat([step.positions, own])
        self._masks = dict[int | None, Tensor | None]()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None) -> Tensor:
        n, stop = self._n, self._start + self._n
        kept = self._layers[layer]
        kept.keep(*(t[-n:].transpose(0, 1)[None] for t in (k, v)))
        K, V = (t[:, :, :stop] for t in kept.KV)
        if window not in self._masks:
            self._masks[window] = causal(n, stop, window, q.device)
        asked, mask, grouped = q[-n:].transpose(0, 1)[None], self._masks[window], q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(asked, K, V, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
        requests = self._step.attend(layer, q[:-n], k[:-n], v[:-n], scale, window)
        return torch.cat([requests, y[0].transpose(0, 1)])
