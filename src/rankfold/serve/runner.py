"""A model of Transformers as an engine runs it: one forward for rows of any requests, under any adapters."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankfold.core.control import using
from rankfold.core.routing import find_state
from rankfold.errors import RankfoldError, UnsupportedError
from rankfold.serve.attention import NAME, Shape, Step, running
from rankfold.serve.guest import Beside, Window
from rankfold.serve.library import Library
from rankfold.serve.pool import Pool, Table
from rankfold.serve.request import Request, Sampling
from rankfold.serve.segments import Products, Segment


class Runner:
    """The model with its `pool` of pages and its `library` of adapters; `close` gives it back as it was found.

    `attention` is the implementation that it attends with by itself.

    Raises UnsupportedError for a model that attends in a way that pages cannot serve: that is tried on a few tokens.
    """

    def __init__(self, model: Any, adapters: Path | None, max_memory: int, host_memory: int, block: int):
        if find_state(model) is not None:
            raise RankfoldError("the model has adapters attached: detach them; the engine brings in those it serves")
        self.model = model.eval()
        self._keep: Tensor | None = None
        self.attention = model.config._attn_implementation
        expected = _plain_logits(model)
        self._head = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, args: (args[0] if self._keep is None else args[0].index_select(0, self._keep), *args[1:])
        )
        model.set_attn_implementation(NAME)
        self._products = Products(model)
        self.library: Any = None
        try:
            shape, weight = _shape_of(model), model.get_input_embeddings().weight
            self.pool = Pool(shape.layers, shape.width, max_memory, weight.dtype, weight.device, block)
            self.library = Library(model, adapters, self.pool, self._products, host_memory)
            self._check(expected)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.library is not None:
            self.library.close()
        self._products.close()
        self._head.remove()
        self.model.set_attn_implementation(self.attention)

    def forward(self, batch: Sequence[tuple[Request, int]], window: Window | None = None) -> Tensor:
        """Logits (requests that are read to their ends, V) of their next tokens, for requests with so many rows each.

        Their tables have room for these already. Rows of one adapter's products come one behind the other, and last
        those of a window of training tokens.
        """
        step: Any = Step(self.pool, [r.table for r, _ in batch], [n for _, n in batch])
        ids: list[int] = []
        last: list[int] = []
        names: list[str | None] = []
        segments: list[Segment] = []
        for request, n in batch:
            start = len(ids)
            ids += request.next(n)
            if request.unread == n:
                last.append(len(ids) - 1)
            entry = None if request.adapter is None else self.library.entry(request.adapter)
            placed = None if entry is None else entry.placed
            names += [None if placed is not None else request.adapter] * n
            if placed is not None:
                if segments and segments[-1].placed is placed:
                    segments[-1] = Segment(placed, segments[-1].start, len(ids))
                else:
                    segments.append(Segment(placed, start, len(ids)))
        if window is not None:
            ids += window.ids
            names += [window.name] * window.n
            step = Beside(step, window)
        device = self.pool.rows.device
        self._keep, self._products.segments = torch.tensor(last, dtype=torch.long, device=device), segments
        routed = nullcontext() if find_state(self.model) is None else using(self.model, names)
        beside = nullcontext() if window is None else window.run.beside(window.n)
        added = nullcontext() if window is None else window.added()
        try:
            with torch.no_grad(), running(step), routed, added, beside:
                x, positions = torch.tensor(ids, device=device)[:, None], step.positions[:, None]
                return self.model(input_ids=x, position_ids=positions, use_cache=False).logits[:, 0]
        finally:
            self._keep, self._products.segments = None, ()

    def _check(self, expected: Tensor) -> None:
        """Refuse a model that gives other logits over pages than by itself."""
        request = Request(_PROBE[:4], None, 3, Sampling(), frozenset(), None, None)
        request.table = Table(self.pool)
        got = []
        for n, behind in ((3, []), (1, _PROBE[4:5]), (1, _PROBE[5:]), (1, [])):
            request.table.extend(n)
            got.append(self.forward([(request, n)]))
            request.read += n
            request.tokens += behind
        request.table.free()
        logits = torch.cat(got)
        close = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.1
        if float((logits - expected).abs().max()) > close * float(expected.abs().max()):
            raise UnsupportedError(
                f"{type(self.model).__name__} gives other logits over paged keys and values than by itself: its layers "
                "keep more of a text than these, and cannot be served"
            )


_PROBE = (1, 2, 3, 4, 5, 6)


def _plain_logits(model: Any) -> Tensor:
    """Logits (3, V) behind the probe's fourth, fifth and sixth token."""
    with torch.no_grad():
        ids = torch.tensor([_PROBE], device=model.get_input_embeddings().weight.device)
        return model(input_ids=ids, use_cache=False).logits[0, 3:]


def _shape_of(model: Any) -> Shape:
    shape = Shape()
    with torch.no_grad(), running(shape):
        ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        model(input_ids=ids, position_ids=ids, use_cache=False)
    if not shape.widths:
        raise UnsupportedError(f"{type(model).__name__} does not attend through Transformers' attention interface")
    return shape
